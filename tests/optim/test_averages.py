"""Look-ahead and average of the weights against float64 transcriptions of their definitions, with matrices on Muon and
the rest on AdamW; checkpoints, warm-up, what is evaluated, and refusals."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import train_gpt
from harness.checkpoint import evaluated_weights, read_checkpoint
from optim import build_optimizers
from optim.averages import Averages, AveragesConfig, Lookahead, TailAverage
from tests.conftest import Trainer
from tests.matrices import randn
from tests.test_train import only_run, summary, tiny_run
from train_gpt import Config, load_config, plan_step, train_step, warm_up

Array = npt.NDArray[np.float64]
SHAPES = {"embed": (7, 4), "block": (6, 4), "head": (7, 4), "gain": (4,)}
CONFIG = Config(
    matrix_optimizer="muon", polar_method="svd", matrix_lr=0.05, embed_lr=0.03, head_lr=0.02, scalar_lr=0.01,
    matrix_weight_decay=0.1, weight_decay=0.2, adam_betas=(0.8, 0.95), momentum=0.9, train_steps=50,
    warmup_steps=4, cooldown_frac=0.5, adamw_cooldown_frac=0.8, adamw_min_lr_frac=0.1,
    lookahead=0.6, lookahead_decay=0.9, lookahead_start=5, lookahead_end=40,
    average_steps=7, average_start=20, average_share=0.6,
)  # fmt: skip


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(7, 4), nn.Linear(4, 6, bias=False), nn.Linear(4, 7, bias=False)
        self.gain = nn.Parameter(torch.empty(4))
        self.double()
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(randn(*SHAPES[name.split(".")[0]], seed=len(name)))


def target(name: str, step: int) -> torch.Tensor:
    return randn(*SHAPES[name], seed=1000 * len(name) + step).double()


def rate(step: int, frac: float, least: float) -> float:
    """Of CONFIG, as a share of the full one."""
    fallen = least + (1 - least) * min(1.0, (50 - step) / (50 * frac))
    return min(fallen, (step + 1) / 4)


def by_definition() -> list[tuple[dict[str, Array], dict[str, Array]]]:
    """(weights, weights that are evaluated) after 1 to 50 steps; the gradient is W - target at the weights ahead."""
    W = {name: randn(*SHAPES[name], seed=len(f"{name}.weight" if name != "gain" else name)).double().numpy()
         for name in SHAPES}  # fmt: skip
    zeros = {name: np.zeros_like(value) for name, value in W.items()}
    E, m, v, previous, A = zeros, zeros, zeros, W, dict[str, Array]()
    found = []
    for t in range(50):
        shares = {name: (0.5, 0.0) if name == "block" else (0.8, 0.1) for name in W}
        if 5 <= t < 40:
            W = {name: value + 0.6 * rate(t - 1, *shares[name]) * E[name] for name, value in W.items()}
        G = {name: value - target(name, t).numpy() for name, value in W.items()}
        after = {}
        for name, weight in W.items():
            share = rate(t, *shares[name])
            if name == "block":
                m = m | {name: 0.9 * m[name] + 0.1 * G[name]}
                U, _, Vh = np.linalg.svd(0.1 * G[name] + 0.9 * m[name], full_matrices=False)
                after[name] = weight * (1 - 0.05 * share * 0.1) - 0.05 * share * (6 / 4) ** 0.5 * (U @ Vh)
            else:
                lr = share * {"embed": 0.03, "head": 0.02, "gain": 0.01}[name]
                m = m | {name: 0.8 * m[name] + 0.2 * G[name]}
                v = v | {name: 0.95 * v[name] + 0.05 * G[name] ** 2}
                U = (m[name] / (1 - 0.8 ** (t + 1))) / (np.sqrt(v[name] / (1 - 0.95 ** (t + 1))) + 1e-10)
                after[name] = weight * (1 - lr * 0.2) - lr * U
        W = after
        E = {name: 0.9 * E[name] + 0.1 * (W[name] - previous[name]) for name in W}
        previous = W
        if t + 1 == 20:
            A = W
        elif t + 1 > 20:
            A = {name: A[name] + (W[name] - A[name]) / 7 for name in W}
        found.append((W, {name: 0.4 * W[name] + 0.6 * A[name] for name in W} if A else W))
    return found


def weights(model: nn.Module) -> dict[str, Array]:
    return {name.split(".")[0]: p.detach().clone().numpy() for name, p in model.named_parameters()}


@pytest.mark.usefixtures("in_float64")
def test_both_are_their_definitions_over_50_steps() -> None:
    model = Model()
    optimizers = build_optimizers(model, CONFIG)
    averages = Averages(model, optimizers, CONFIG)
    for step, expected in enumerate(by_definition()):
        plan = plan_step(CONFIG, step)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * (plan.lr_factor if group["name"] == "matrix" else plan.adamw_lr_factor)
        averages.lookahead.shift(*plan.lookahead)
        for name, p in model.named_parameters():
            p.grad = p.detach() - target(name.split(".")[0], step)
        for optimizer in optimizers:
            optimizer.step()
        averages.lookahead.note_step()
        if plan.is_averaged:
            averages.tail.update()
        found = weights(model)
        with averages.tail.in_place():
            evaluated = weights(model)
        for each, definition in ((found, expected[0]), (evaluated, expected[1]), (weights(model), found)):
            for name, value in each.items():
                np.testing.assert_allclose(value, definition[name], rtol=0, atol=1e-9, err_msg=f"{name}, step {step}")


def test_the_trainer_goes_ahead_in_the_steps_asked_for_and_validates_the_average(
    tiny_recipe: Path, float32_products: None
) -> None:
    """Beside a run without either, to which the test does the same by hand."""
    settings = [
        "--train_steps=14", "--lookahead_start=3", "--lookahead_end=9", "--lookahead_decay=0.5", "--average_start=6",
        "--average_steps=4", "--average_share=0.6", "--warmup_steps=3", "--adamw_cooldown_frac=0.9",
    ]  # fmt: skip
    run, plain = tiny_run(tiny_recipe, *settings, "--lookahead=0.5"), tiny_run(tiny_recipe, *settings)
    plain.config = dataclasses.replace(plain.config, average_steps=0)
    params = [(group["name"], p) for o in plain.optimizers for group in o.param_groups for p in group["params"]]
    means, tail = [torch.zeros_like(p) for _, p in params], list[torch.Tensor]()
    for step in range(14):
        run.follow(plan_step(run.config, step))
        plain.follow(plan_step(plain.config, step))
        train_step(run, *run.batch())
        with torch.no_grad():
            before = [p.clone() for _, p in params]
            if 3 <= step < 9:
                last = plan_step(run.config, step - 1)
                for (name, p), mean in zip(params, means, strict=True):
                    p += 0.5 * (last.lr_factor if name == "matrix" else last.adamw_lr_factor) * mean
        train_step(plain, *plain.batch())
        with torch.no_grad():
            means = [0.5 * mean + 0.5 * (p - q) for mean, (_, p), q in zip(means, params, before, strict=True)]
            if step + 1 >= 6:
                now = [p.clone() for _, p in params]
                tail = [a + (p - a) / 4 for a, p in zip(tail, now, strict=True)] if tail else now
        for p, q in zip(run.model.parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
        with torch.no_grad():
            kept = [p.clone() for _, p in params]
            for (_, p), q, mean in zip(params, kept, tail or kept, strict=True):
                p.copy_(0.4 * q + 0.6 * mean)
            expected = train_gpt.evaluate(plain)
            for (_, p), q in zip(params, kept, strict=True):
                p.copy_(q)
        assert train_gpt.evaluate(run) == pytest.approx(expected, rel=1e-5)
    for each in (run, plain):
        each.loader.close()


def test_what_reads_a_checkpoint_gets_the_weights_that_were_validated(
    trainer: Trainer, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the closing sample does; training goes on from others."""
    sampled: list[dict[str, torch.Tensor]] = []

    def note_weights(model: nn.Module, *_: Any) -> str:
        sampled.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return ""

    monkeypatch.setattr(train_gpt, "sample_text", note_weights)
    settings = ["--tokenizer=byte", "--vocab_size=257", "--train_steps=8"]
    average = ["--average_steps=3", "--average_start=4", "--average_share=0.7"]
    assert trainer(*settings, *average, "--checkpoint_every=3").returncode == 0
    early, state = (read_checkpoint(only_run(tmp_path) / f"checkpoint_00000{step}.pt") for step in (6, 8))
    chosen = evaluated_weights(state)
    for name, weight in sampled[0].items():
        assert torch.equal(weight, chosen[name])
        assert torch.equal(chosen[name], state["model"][name].lerp(state["average"][name], 0.7))
        assert not torch.equal(chosen[name], state["model"][name])
    run = tiny_run(tiny_recipe, *settings)
    run.model.load_state_dict(chosen)
    assert train_gpt.evaluate(run) == summary(only_run(tmp_path))["val_loss"]
    run.loader.close()

    # by settings under which the average is to begin later, or is off, there is none yet
    for later in ([], [*average[:1], "--average_start=7"]):
        run = tiny_run(tiny_recipe, *settings, *later, f"--resume={only_run(tmp_path)}/checkpoint_000006.pt")
        run.loader.close()
        assert run.averages.state_dict() == {}
        assert early["average"].keys() == sampled[0].keys()
    run = tiny_run(tiny_recipe, *settings, *average, f"--resume={only_run(tmp_path)}/checkpoint_000006.pt")
    run.loader.close()
    torch.testing.assert_close(run.averages.state_dict()["average"], early["average"], rtol=0, atol=0)


def test_checkpoints_have_what_is_on_and_has_begun(trainer: Trainer, tmp_path: Path) -> None:
    both = ["--lookahead=0.5", "--average_steps=2"]
    for folder, settings, held in (
        (tmp_path / "off", [], set()),
        (tmp_path / "later", [*both, "--average_start=3"], {"lookahead"}),
        (tmp_path / "on", both, {"lookahead", "average"}),
    ):
        assert trainer(*settings, "--train_steps=4", "--checkpoint_every=2", f"--run_dir={folder}").returncode == 0
        state = read_checkpoint(next(folder.glob("*/checkpoint_000002.pt")))
        assert state.keys() & {"lookahead", "average"} == held
    without = next((tmp_path / "off").glob("*/checkpoint_000002.pt"))
    assert trainer(*both, f"--resume={without}", "--train_steps=4").returncode == 0  # they begin there


def test_warm_up_leaves_no_trace_in_means_that_have_begun(tiny_recipe: Path) -> None:
    run = tiny_run(tiny_recipe, "--lookahead=0.5", "--average_steps=3")
    for step in range(3):
        run.follow(plan_step(run.config, step))
        train_step(run, *run.batch())
    expected = copy.deepcopy(run.averages.state_dict())
    assert expected.keys() == {"lookahead", "average"}
    run.resumed = {"step": 3}
    warm_up(run)
    torch.testing.assert_close(run.averages.state_dict(), expected, rtol=0, atol=0)
    run.loader.close()


def test_a_block_that_fails_gives_the_weights_back() -> None:
    model = nn.Linear(2, 2)
    average = TailAverage(model, 2, 1.0)
    average.update()
    with torch.no_grad():
        model.weight += 1
    kept = model.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), average.in_place():
        assert torch.equal(model.weight, average.mean["weight"])
        raise KeyboardInterrupt
    assert torch.equal(model.weight, kept)


def test_weights_of_16_bits_are_averaged_in_32_and_never_ahead() -> None:
    model = nn.Linear(1, 1, bias=False).bfloat16()
    average = TailAverage(model, 512, 1.0)
    for value in (1.0, 2.0):
        nn.init.constant_(model.weight, value)
        average.update()
    assert average.mean["weight"].item() == 1 + 1 / 512
    with average.in_place():
        assert model.weight.item() == 1  # as bfloat16 has it
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "name": "matrix"}], lr=0.1)
    with pytest.raises(ValueError, match=r"not torch.bfloat16; keep them in float32"):
        Lookahead([optimizer], 0.9)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--lookahead=0.5", "--lookahead_start=300"], "lookahead_start = 300 must be less than train_steps = 300"),
        (
            ["--lookahead=0.5", "--lookahead_start=9", "--lookahead_end=9"],
            "must be less than lookahead_end = 9; 0 works",
        ),
        (["--lookahead=0.5", "--lookahead_start=301", "--lookahead_end=400"], "must be less than train_steps = 300"),
        (["--average_steps=5", "--average_start=300"], "average_start = 300 must be less than train_steps = 300"),
    ],
    ids=["start", "end", "late end", "average"],
)
def test_means_that_would_begin_after_their_end_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_config(words)
    load_config([word for word in words if "=0.5" not in word and "=5" not in word])  # off, so they do not matter
    assert AveragesConfig().lookahead == AveragesConfig().average_steps == 0
