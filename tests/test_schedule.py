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
