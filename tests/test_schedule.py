"""What changes over a run: learning rate, momentum, window, and the place and shape of each batch."""

import dataclasses
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import train_gpt
from tests.test_train import tiny_run
from train_gpt import Config, plan_step, plans_to_warm_up, warm_up

SHAPES = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: math.cos(math.pi * done / 2) ** 2,
    "sqrt": lambda done: 1 - done**0.5,
    "power": lambda done: (1 - done) ** 3,
}


def rates(config: Config) -> list[float]:
    return [plan_step(config, step).lr_factor for step in range(config.train_steps)]


def test_learning_rate_warms_up_stays_and_cools_down_to_almost_nothing() -> None:
    scales = rates(Config(train_steps=100, warmup_steps=10, cooldown_frac=0.4))
    assert scales[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert scales[10:61] == [1.0] * 51
    assert scales[60:] == pytest.approx([1 - i / 40 for i in range(40)])


def test_learning_rate_without_warmup_or_cooldown_is_constant() -> None:
    for shape in SHAPES:
        assert rates(Config(train_steps=10, warmup_steps=0, cooldown_frac=0.0, cooldown=shape)) == [1.0] * 10


@pytest.mark.parametrize("least", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_cooldown_follows_its_formula_down_to_the_floor(shape: str, least: float) -> None:
    config = Config(train_steps=50, cooldown_frac=0.6, cooldown=shape, cooldown_power=3.0, min_lr_frac=least)  # type: ignore[arg-type]
    found = rates(config)
    assert found[:20] == [1.0] * 20
    assert found[20:] == pytest.approx([least + (1 - least) * SHAPES[shape](i / 30) for i in range(30)], abs=1e-12)
    assert plan_step(config, 50).lr_factor == pytest.approx(least, abs=1e-12)
    assert all(later <= before for before, later in pairwise(found))


def test_adamw_groups_have_a_cooldown_of_their_own() -> None:
    """Each of its settings alone, and all; what is left out is as for the matrices."""
    matrices = dict(cooldown="linear", cooldown_frac=0.6, min_lr_frac=0.1)
    for own in (
        {},
        {"cooldown": "cosine"},
        {"cooldown_frac": 0.0},
        {"cooldown_frac": 0.2, "min_lr_frac": 0.0},
        {"cooldown": "power", "cooldown_frac": 1.0, "min_lr_frac": 0.3},
    ):
        config = Config(
            train_steps=50,
            warmup_steps=5,
            cooldown_power=3.0,
            **matrices,
            **{f"adamw_{k}": v for k, v in own.items()},  # type: ignore[arg-type]
        )
        for step in range(51):
            plan = plan_step(config, step)
            for found, asked in ((plan.lr_factor, matrices), (plan.adamw_lr_factor, matrices | own)):
                start = 50 * (1 - asked["cooldown_frac"])  # type: ignore[operator]
                done = max(0.0, (step - start) / (50 - start)) if start < 50 else 0.0
                least: float = asked["min_lr_frac"]  # type: ignore[assignment]
                full = least + (1 - least) * SHAPES[asked["cooldown"]](done)  # type: ignore[index]
                assert found == pytest.approx(min(full, (step + 1) / 5), abs=1e-12)


def test_the_power_cooldown_is_powercool() -> None:
    """lr = min(lr0, c (T_end - t)^1.2), flat until 2386 steps before the end, or 1413 for AdamW's groups."""
    config = Config(
        train_steps=2900,
        cooldown="power",
        cooldown_power=1.2,
        cooldown_frac=2386 / 2900,
        adamw_cooldown_frac=1413 / 2900,
    )
    for step in range(2901):
        plan = plan_step(config, step)
        for found, length in ((plan.lr_factor, 2386), (plan.adamw_lr_factor, 1413)):
            lr0, c = 0.0375, 0.0375 / length**1.2
            assert 0.0375 * found == pytest.approx(min(lr0, c * (2900 - step) ** 1.2), rel=1e-9, abs=1e-12)


def test_every_group_follows_its_own_factor_and_so_does_its_decay_if_asked(tiny_recipe: Path) -> None:
    settings = ["--matrix_lr=0.1", "--embed_lr=0.2", "--head_lr=0.4", "--matrix_weight_decay=2", "--weight_decay=3"]
    shapes = ["--cooldown_frac=0.5", "--adamw_cooldown=power", "--adamw_cooldown_frac=1", "--adamw_min_lr_frac=0.5"]
    for rule in ("muon", "adamw"):
        for decay in ("constant", "rate"):
            run = tiny_run(tiny_recipe, *settings, *shapes, f"--decay_schedule={decay}", f"--matrix_optimizer={rule}")
            run.loader.close()
            for step in (0, 30, 10):
                run.follow(plan_step(run.config, step))
                matrix, rest = {0: (1, 1), 30: (0.5, 0.5 + 0.5 / 16), 10: (1, 0.5 + 0.5 * 9 / 16)}[step]
                decays = (matrix, rest) if decay == "rate" else (1, 1)
                found = {
                    group["name"]: (group["lr"], group["weight_decay"])
                    for optimizer in run.optimizers
                    for group in optimizer.param_groups
                }
                assert found == {
                    "matrix": pytest.approx((0.1 * matrix, 2 * decays[0])),
                    "embed": pytest.approx((0.2 * rest, 3 * decays[1])),
                    "head": pytest.approx((0.4 * rest, 3 * decays[1])),
                }


def test_momentum_falls_back_to_085() -> None:
    config = Config(train_steps=8, momentum_warmup_steps=2, momentum_cooldown_steps=4)
    found = [plan_step(config, step).momentum for step in range(9)]
    assert found == pytest.approx([0.85, 0.9, 0.95, 0.95, 0.95, 0.925, 0.9, 0.875, 0.85])
    both = Config(train_steps=4, momentum_warmup_steps=4, momentum_cooldown_steps=4)  # the lower of the two
    assert [plan_step(both, step).momentum for step in range(5)] == pytest.approx([0.85, 0.875, 0.9, 0.875, 0.85])


def test_momentum_rises_from_085() -> None:
    def momenta(config: Config) -> list[float]:
        return [plan_step(config, step).momentum for step in range(6)]

    assert momenta(Config(momentum_warmup_steps=4)) == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])
    assert momenta(Config(momentum=0.9)) == [0.9] * 6
    assert momenta(Config(momentum=0.5, momentum_warmup_steps=4)) == [0.5] * 6  # never above the target


def test_the_window_grows_in_multiples_of_its_start_and_ends_whole() -> None:
    config = Config(window=1000, window_start=128, train_steps=100)
    sizes = [plan_step(config, step).window for step in range(101)]
    assert sizes[0] == 128
    assert sizes[-1] == 1000
    assert sorted(set(sizes), key=sizes.index) == [128, 256, 384, 512, 640, 768, 896, 1000]
    assert all(size >= 128 + 872 * step / 100 for step, size in enumerate(sizes) if size != 1000)


def test_a_window_without_a_start_is_constant_and_none_is_none() -> None:
    assert {plan_step(Config(window=64), step).window for step in range(300)} == {64}
    assert plan_step(Config(), 0).window is None


def test_every_shape_and_window_of_a_run_is_warmed_up_once() -> None:
    config = Config(
        train_steps=500, small_batch_steps=7, short_row_steps=300, window=60, window_start=10, batch_tokens=8192
    )

    def kind(plan: train_gpt.StepPlan) -> tuple[object, ...]:
        return plan.batch_tokens, plan.row_tokens, plan.window

    for first in (0, 6, 7, 200, 499, 500):
        plans = [plan_step(config, step) for step in range(first, 500)]
        expected = [plan for before, plan in pairwise([None, *plans]) if not before or kind(before) != kind(plan)]
        assert plans_to_warm_up(config, first, windows_count=True) == expected
        assert len(plans_to_warm_up(config, first, windows_count=False)) <= 3


def test_set_up_does_not_grow_with_the_steps(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan for each of 300 million steps would take minutes."""
    planned = []

    def counting_plan(config: Config, step: int) -> train_gpt.StepPlan:
        planned.append(step)
        return plan_step(config, step)

    monkeypatch.setattr(train_gpt, "plan_step", counting_plan)
    monkeypatch.setattr(train_gpt, "train_step", lambda *_: None)
    growth = ["--window=32", "--window_start=8", "--small_batch_steps=2", "--micro_batch_tokens=96"]
    run = tiny_run(tiny_recipe, *growth, "--train_steps=300000000")
    run.config = dataclasses.replace(run.config, compile=True)  # of which windows are a part
    run.compiled = lambda *_: torch.zeros(())
    warm_up(run)
    run.loader.close()
    kinds, steps_of_bisection = 4 + 1, 28 + 1  # windows 8, 16, 24, 32 and the first two steps; 2**28 < 3e8 < 2**29
    assert len(planned) <= 2 * kinds * (steps_of_bisection + 3)  # set-up and warm-up
