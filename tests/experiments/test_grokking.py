"""Parts of the grokking experiment: tasks by brute force, weights and losses by definition, a stack of runs by the GPT
and the optimizers that are trained here elsewhere."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from torch.func import functional_call

from experiments.grokking import decoder, protocol, survival, tasks, train
from experiments.grokking.train import Measurement, Settings, Stack
from model import GPT, ModelConfig
from optim import build_optimizers
from train_gpt import Config

CPU = torch.device("cpu")

P = 97


def largest_common_divisor(a: int, b: int) -> int:
    return max((d for d in range(1, P) if a % d == 0 and b % d == 0), default=0) if a or b else 0


def product(factors: list[int]) -> int:
    result = 1
    for factor in factors:
        result = result * factor % P
    return result


BRUTE_FORCE: dict[str, Callable[[int, int, int], bool]] = {  # is c the answer to a, b?
    "add": lambda a, b, c: (a + b - c) % P == 0,
    "sub": lambda a, b, c: (b + c - a) % P == 0,
    "mul": lambda a, b, c: sum([a] * b) % P == c,
    "div": lambda a, b, c: b != 0 and b * c % P == a,
    "exp": lambda a, b, c: product([a] * b) == c,
    "gcd": lambda a, b, c: c == largest_common_divisor(a, b),
}


@pytest.mark.parametrize("task", BRUTE_FORCE)
def test_every_answer_by_brute_force(task: str) -> None:
    rows = tasks.table(task)
    pairs = rows.inputs[:, [0, 2]].tolist()
    expected = {(a, b) for a in range(P) for b in range(P) if task != "div" or b}
    assert len(pairs) == len(expected) == (9312 if task == "div" else 9409)
    assert {tuple(pair) for pair in pairs} == expected
    assert all(BRUTE_FORCE[task](a, b, c) for (a, b), c in zip(pairs, rows.targets.tolist(), strict=True))
    assert set(rows.targets.tolist()) <= set(range(rows.num_classes))
    assert (rows.inputs[:, 1] == tasks.OP).all() and (rows.inputs[:, 3] == tasks.EQUALS).all()


def test_conventions_at_zero() -> None:
    rows = {task: tasks.table(task) for task in ("exp", "gcd")}
    answer = {task: dict(zip(map(tuple, r.inputs[:, [0, 2]].tolist()), r.targets.tolist(), strict=True))
              for task, r in rows.items()}  # fmt: skip
    assert answer["exp"][0, 0] == 1 and answer["exp"][0, 5] == 0
    assert answer["gcd"][0, 0] == 0 and answer["gcd"][0, 7] == answer["gcd"][7, 0] == 7


def test_parity_of_all_ten_bit_numbers() -> None:
    rows = tasks.table("parity")
    assert len({tuple(bits) for bits in rows.inputs[:, :10].tolist()}) == 1024
    assert [sum(bits) % 2 for bits in rows.inputs[:, :10].tolist()] == rows.targets.tolist()
    assert rows.num_classes == 2 and (rows.inputs[:, 10] == tasks.EQUALS).all()


@pytest.mark.parametrize(("task", "num_train"), [("add", 7527), ("div", 7450), ("exp", 6586), ("parity", 512)])
def test_a_split_has_every_row_once(task: str, num_train: int) -> None:
    num_rows = len(tasks.table(task).targets)
    parts = tasks.split(num_rows, tasks.TRAIN_SHARES[task], torch.Generator().manual_seed(1))
    assert len(parts[0]) == num_train
    assert torch.cat(parts).sort().values.tolist() == list(range(num_rows))
    other = tasks.split(num_rows, tasks.TRAIN_SHARES[task], torch.Generator().manual_seed(2))
    assert not torch.equal(parts[0], other[0])


def stablemax_by_definition(z: list[float]) -> list[float]:
    s = [x + 1 if x >= 0 else 1 / (1 - x) for x in z]
    return [x / sum(s) for x in s]


def sparsemax_by_bisection(z: list[float]) -> list[float]:
    low, high = min(z) - 1, max(z)
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if sum(max(x - tau, 0) for x in z) > 1 else (low, tau)
    return [max(x - low, 0) for x in z]


SCORES = [
    [0.3, -2.0, 1.7, 0.0],
    [5.0, 4.9, -30.0, 4.2],
    [-1e4, 3.0, 1e4, 2.0],
    [0.2, 0.1, 0.15, 0.18],
    [-3.0, -3.5, -8, -9],
]


@pytest.mark.parametrize(
    ("name", "definition"), [("stablemax", stablemax_by_definition), ("sparsemax", sparsemax_by_bisection)]
)
def test_weights_are_those_of_the_definition(name: str, definition: Callable[[list[float]], list[float]]) -> None:
    expected = torch.tensor([definition(z) for z in SCORES], dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-3)):  # float32 has 1e4 to a thousandth
        found = decoder.WEIGHTS[name](torch.tensor(SCORES, dtype=dtype))
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
        torch.testing.assert_close(found.sum(-1).double(), torch.ones(5).double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", decoder.WEIGHTS)
def test_gradients_of_weights_and_losses(name: str) -> None:
    torch.manual_seed(0)
    z = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 6, 6])
    assert torch.autograd.gradcheck(decoder.WEIGHTS[name], (z,))
    assert torch.autograd.gradcheck(lambda z: decoder.LOSSES[name](z, targets).sum(), (z,))


def test_losses_are_those_of_the_definitions() -> None:
    torch.manual_seed(0)
    z, targets = 3 * torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 5
    own = torch.arange(8), targets
    torch.testing.assert_close(decoder.stablemax_loss(z, targets), -decoder.stablemax(z)[own].log())
    # Fenchel-Young: conjugate of half the squared norm on the simplex, plus that norm of the target, minus its score
    p = decoder.sparsemax(z)
    conjugate = (p * z).sum(-1) - p.square().sum(-1) / 2
    torch.testing.assert_close(decoder.sparsemax_loss(z, targets), conjugate + 0.5 - z[own])
    z = torch.zeros(2, 5, dtype=torch.float64)
    z[:, 3] = 1.0  # by the margin at which sparsemax is sure and its loss is zero
    assert decoder.sparsemax_loss(z, torch.tensor([3, 3])).sum() == 0
    assert decoder.sparsemax_loss(z, torch.tensor([3, 0])).sum() > 0


# ------------------------------------------------------------------------------------------------------------
# A stack of decoders, by the GPT


def own_weights(weights: Mapping[str, Tensor], place: int) -> dict[str, Tensor]:
    return {name: weight[place] for name, weight in weights.items()}


@pytest.mark.parametrize("task", ["parity", "mul"])
@pytest.mark.parametrize("depth", [1, 3])
def test_every_decoder_of_a_stack_is_the_gpt(depth: int, task: str) -> None:
    config = ModelConfig(
        vocab_size=tasks.VOCAB_SIZE, num_layers=depth, num_heads=2, head_dim=8, model_dim=16, seq_len=16,
        fused=("none",),
    )  # fmt: skip
    gpt = GPT(config, torch.float64).double()
    torch.manual_seed(depth)
    weights = {name: 0.3 * torch.randn(3, *p.shape, dtype=torch.float64, requires_grad=True) for name, p in
               gpt.named_parameters()}  # fmt: skip
    rows = tasks.table(task)
    rows_RB = torch.randint(len(rows.targets), (3, 20))
    decoders = decoder.Decoders(config, rows.inputs)
    decoders.cos_TK, decoders.sin_TK = (
        angle[: rows.inputs.size(1)] for angle in (gpt.rotary.cos_TK, gpt.rotary.sin_TK)
    )
    found = decoders(weights, rows_RB, rows.num_classes)

    class Hidden(torch.nn.Module):  # functional_call calls a module's forward
        def __init__(self) -> None:
            super().__init__()
            self.gpt = gpt

        def forward(self, inputs: Tensor) -> Tensor:
            return self.gpt.hidden(inputs)[:, -1]

    expected = []
    for place in range(3):
        own = own_weights(weights, place)
        hidden = functional_call(Hidden(), {f"gpt.{name}": w for name, w in own.items()}, rows.inputs[rows_RB[place]])
        expected.append(F.linear(hidden, own["head.weight"][: rows.num_classes]))
    torch.testing.assert_close(found, torch.stack(expected))
    gradients = [torch.autograd.grad(logits.square().sum(), list(weights.values()))
                 for logits in (found, torch.stack(expected))]  # fmt: skip
    for mine, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, wanted)


def test_a_stack_begins_as_the_seeds_say() -> None:
    config = train.model_config(Settings("mul", width=16, heads=2))
    weights = decoder.stacked_weights(config, (5, 3), CPU)
    for place, seed in enumerate((5, 3)):
        torch.manual_seed(seed)
        expected = dict(GPT(config, torch.float32).named_parameters())
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name][place], p) for name, p in expected.items())
    stds = {name: weight.std().item() for name, weight in weights.items()}
    assert stds["blocks.0.attention.out"] == pytest.approx(0.5 / 4, rel=0.1)
    assert stds["blocks.0.mlp.down"] == pytest.approx(0.5 / 8, rel=0.1)
    assert stds["head.weight"] == pytest.approx(0.02, rel=0.1)
    zero = decoder.stacked_weights(train.model_config(Settings("mul", width=16, heads=2, init="zero")), (5,), CPU)
    assert not any(zero[name].any() for name in ("blocks.0.attention.out", "blocks.0.mlp.down", "head.weight"))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("attention", decoder.WEIGHTS)
def test_attention_sees_what_it_should_and_weighs_as_named(attention: str, is_causal: bool) -> None:
    config = ModelConfig(vocab_size=8, num_heads=2, head_dim=8, model_dim=16, seq_len=5)
    decoders = decoder.Decoders(config, torch.zeros(1, 5, dtype=torch.int64), attention, is_causal)
    q, k, v = (torch.randn(2, 3, 5, 2, 8, dtype=torch.float64) for _ in range(3))
    for asked in (5, 1):
        found = decoders.attend(q[:, :, -asked:], k, v)
        for position in range(5 - asked, 5):
            seen = slice(position + 1) if is_causal else slice(None)
            scores = torch.einsum("rbhk,rbthk->rbht", q[:, :, position], k[:, :, seen]) / math.sqrt(8)
            expected = torch.einsum("rbht,rbthk->rbhk", decoder.WEIGHTS[attention](scores), v[:, :, seen])
            torch.testing.assert_close(found[:, :, position - 5], expected.flatten(2))
    k.requires_grad_()
    decoders.attend(q, k, v).sum().backward()
    assert k.grad is not None and k.grad.isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# A stack of runs, by runs of their own

RATES = {"adamw": (0.003, 0.3), "sgd": (0.1, 0.001), "rmsprop": (0.0003, 0.001)}
SMALL = Settings("mul", batch_size=128, width=32, max_steps=60)


def three_runs(optimizer: str, **changes: Any) -> list[Settings]:
    lr, decay = RATES.get(optimizer, (0.02, 0.3))
    plain = replace(SMALL, optimizer=optimizer, **changes)
    return [
        replace(plain, lr=lr * factor, weight_decay=decay * factor, adam_weight_decay=0.1 * factor, seed=factor)
        for factor in (1, 2, 3)
    ]


def losses_of(stack: Stack, steps: int) -> list[list[float]]:
    """The loss of every run before each step."""
    found: list[list[float]] = []
    genuine = stack.losses

    def noted(rows_RB: Tensor) -> Tensor:
        losses = genuine(rows_RB)
        found.append(losses.tolist())
        return losses

    stack.losses = noted  # type: ignore[method-assign]
    for step in range(steps):
        stack.step(min(1.0, (step + 1) / stack.kind.warmup_steps))
    return [list(of_run) for of_run in zip(*found, strict=True)]


def trained_alone(settings: Settings, steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """The losses and at last the weights of one GPT with the optimizers as the trainer builds them."""
    config = Config(
        matrix_optimizer=settings.optimizer, matrix_lr=settings.lr, matrix_weight_decay=settings.weight_decay,
        embed_lr=settings.adam_lr, head_lr=settings.adam_lr, weight_decay=settings.adam_weight_decay,
        adam_betas=(0.9, 0.98), adam_eps=1e-8,
    )  # fmt: skip
    torch.manual_seed(settings.seed)
    model = GPT(replace(train.model_config(settings), fused=("none",)), torch.float32)
    optimizers = build_optimizers(model, config)
    rows, generator = tasks.table(settings.task), torch.Generator().manual_seed(settings.seed)
    train_rows, _ = tasks.split(len(rows.targets), settings.train_share, generator)
    stream, losses = train.batches(train_rows, settings.batch_size, generator), []
    for step in range(steps):
        batch = next(stream)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * min(1.0, (step + 1) / settings.warmup_steps)
        logits = F.linear(model.hidden(rows.inputs[batch])[:, -1], model.head.weight[: rows.num_classes])
        loss = F.cross_entropy(logits, rows.targets[batch])
        loss.backward()
        losses.append(loss.item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("optimizer", protocol.BOXES)
def test_runs_of_a_stack_are_runs_of_their_own(optimizer: str, float32_products: None) -> None:
    runs = three_runs(optimizer)
    losses = losses_of(Stack(runs, CPU), 60)
    for run, of_stack in zip(runs, losses, strict=True):
        alone, _ = trained_alone(run, 60)
        assert of_stack[:6] == pytest.approx(alone[:6], rel=1e-4)
        assert of_stack == pytest.approx(alone, rel=1e-2)
    assert len({of_run[-1] for of_run in losses}) == 3


@pytest.mark.parametrize("optimizer", protocol.BOXES)
def test_rates_and_decays_are_each_runs_own(optimizer: str, float32_products: None) -> None:
    """By how far weights have come, with decays that are seen in a few steps."""
    strong = 0.1 if optimizer in train.COUPLED else 2.0
    runs = [replace(run, weight_decay=strong * run.seed, adam_weight_decay=run.seed) for run in three_runs(optimizer)]
    stack, before = Stack(runs, CPU), Stack(runs, CPU).weights
    losses_of(stack, 6)
    for index, run in enumerate(runs):
        _, alone = trained_alone(run, 6)
        for name, weight in stack.weights.items():
            start = before[name][index].detach()
            moved, expected = weight[index].detach() - start, alone[name] - start
            assert (moved - expected).norm() < 5e-3 * expected.norm(), (run.seed, name)


@pytest.mark.parametrize("optimizer", protocol.BOXES)
def test_a_run_that_leaves_changes_no_other(optimizer: str, float32_products: None) -> None:
    runs = three_runs(optimizer)
    whole, thinned = Stack(runs, CPU), Stack(runs, CPU)
    for stack in (whole, thinned):
        losses_of(stack, 5)
    before = {name: weight.detach().clone() for name, weight in whole.weights.items()}
    thinned.keep([0, 2])
    for stack in (whole, thinned):
        losses_of(stack, 3)
    for name, weight in thinned.weights.items():
        for index, old in enumerate((0, 2)):
            start, expected = before[name][old], whole.weights[name][old].detach()
            assert (weight[index] - expected).norm() < 5e-3 * (expected - start).norm(), (old, name)


@pytest.mark.parametrize(("optimizer", "loss"), [("sgd", "softmax"), ("muon", "stablemax"), ("adamw", "sparsemax")])
def test_a_run_that_diverges_stops_no_other(optimizer: str, loss: str) -> None:
    runs = three_runs(optimizer, loss=loss, attention=loss)
    sound = train.train(runs)
    runs[1] = replace(runs[1], lr=1e30)
    results = train.train(runs)
    assert (results[1]["status"], results[1]["crossed"]) == ("diverged", None)
    assert results[1]["steps"] < 60 and len(results[1]["curves"]["val_accuracy"]) == 1
    for index in (0, 2):
        assert (results[index]["status"], results[index]["steps"]) == ("ended", 60)
        curves = [of_runs[index]["curves"]["train_accuracy"] for of_runs in (results, sound)]
        assert curves[0] == pytest.approx(curves[1], abs=0.02)


def test_embedding_and_head_freeze_once_a_run_has_generalised() -> None:
    stack = Stack(three_runs("muon", is_frozen=True), CPU)
    stack.members[1].measurements.append(Measurement(20, 1.0, 0.96))
    stack.members[2].measurements.append(Measurement(20, 1.0, 0.94))
    before = {name: weight.detach().clone() for name, weight in stack.weights.items()}
    stack.step(1.0)
    for name, weight in stack.weights.items():
        has_moved = [not torch.equal(weight[place], before[name][place]) for place in range(3)]
        assert has_moved == [True, train.is_matrix(name), True]


@pytest.mark.parametrize("optimizer", protocol.BOXES)
def test_every_optimizer_learns_and_repeats_itself(optimizer: str) -> None:
    lr = {"adamw": 0.003, "sgd": 0.1, "rmsprop": 0.0003}.get(optimizer, 0.02)
    settings = Settings("gcd", optimizer, lr, 0.0, 0.0, width=16, heads=2, batch_size=128, max_steps=60)
    run, other = train.train([settings, replace(settings, seed=1)])
    assert run["steps"] == 60 and len(run["curves"]["train_accuracy"]) == 4
    assert run["curves"]["train_accuracy"][-1] > 0.3  # the answer is 1 for 60% of the rows
    if optimizer == "muon":
        again = train.train([settings, replace(settings, seed=1)])
        assert [each["curves"] for each in again] == [run["curves"], other["curves"]]


def test_a_stack_trains_on_training_rows_and_measures_either_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """By splits made here: what is learnt from, what is measured, and that no row is in both."""
    trained: list[Tensor] = []
    genuine = train.batches

    def noted_batches(rows: Tensor, *arguments: Any) -> Any:
        trained.append(rows)
        return genuine(rows, *arguments)

    monkeypatch.setattr(train, "batches", noted_batches)
    runs = [Settings("mul", seed=seed, train_share=0.3, width=16, heads=2, batch_size=16) for seed in (7, 8)]
    stack = Stack(runs, CPU)
    for seed, rows, member in zip((7, 8), trained, stack.members, strict=True):
        parts = tasks.split(9409, 0.3, torch.Generator().manual_seed(seed))
        assert [len(part) for part in parts] == [2823, 6586]
        assert torch.equal(rows, parts[0])
        for measured, part in zip(member.eval_rows, parts, strict=True):
            assert torch.equal(measured, part[:512])
        batch = next(member.batches)
        assert len(batch) == 16 and set(batch.tolist()) <= set(parts[0].tolist())


def test_a_measurement_is_the_accuracy_on_the_rows() -> None:
    stack = Stack([Settings("gcd", seed=seed, width=16, heads=2) for seed in (1, 2)], CPU)
    with torch.no_grad():
        stack.weights["head.weight"].mul_(100)  # answers of many kinds
    stack.measure(40)
    for place, member in enumerate(stack.members):
        weights = {name: weight[place : place + 1] for name, weight in stack.weights.items()}
        (measurement,), accuracies = member.measurements, []
        for rows in member.eval_rows:
            answers = stack.decoders(weights, rows[None], 97)[0].argmax(-1).tolist()
            targets = stack.rows.targets[rows].tolist()
            accuracies.append(sum(a == b for a, b in zip(answers, targets, strict=True)) / 512)
        assert measurement == Measurement(40, *(pytest.approx(each, abs=1e-6) for each in accuracies))


BASE = Settings("gcd", "adamw", 0.01, width=16, heads=2, batch_size=32, max_steps=20, warmup_steps=5, depth=2)


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1), dict(attention="stablemax"), dict(attention="sparsemax"), dict(loss="stablemax"),
        dict(loss="sparsemax"), dict(depth=1), dict(train_share=0.3), dict(batch_size=64), dict(batch_size=0),
        dict(warmup_steps=1), dict(adam_lr=0.02), dict(adam_weight_decay=1.0), dict(lr=0.02), dict(weight_decay=3.0),
        dict(heads=4), dict(init="zero"), dict(is_causal=False), dict(task="mul"), dict(optimizer="sgd"),
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_changes_what_is_computed(change: dict[str, Any]) -> None:
    found = []
    for settings in (BASE, replace(BASE, **change)):
        stack = Stack([settings], CPU)
        losses_of(stack, 6)
        found.append(stack.weights["blocks.0.mlp.down"].detach())
    assert not torch.equal(*found)


# ------------------------------------------------------------------------------------------------------------
# Milestones


def curve(*values: tuple[float, float]) -> list[Measurement]:
    """Measurements every 10 steps from (train accuracy, validation accuracy)."""
    return [Measurement(10 * i, of_train, of_val) for i, (of_train, of_val) in enumerate(values)]


NEW, MEMORISED, GROKKED = (0.01, 0.01), (1.0, 0.2), (1.0, 0.97)


@pytest.mark.parametrize(
    ("measured", "memorised", "crossed", "held", "collapsed"),
    [
        pytest.param(curve(*[NEW] * 8), None, None, None, False, id="learns nothing"),
        pytest.param(curve(NEW, *[MEMORISED] * 9), 10, None, None, False, id="never groks"),
        pytest.param(curve(NEW, *[MEMORISED] * 5, *[GROKKED] * 5), 10, 60, 60, False, id="late, and holds"),
        pytest.param(curve(NEW, *[MEMORISED] * 5, *[GROKKED] * 3), 10, 60, None, False, id="too late to be held"),
        pytest.param(
            curve(NEW, MEMORISED, GROKKED, (1.0, 0.3), *[GROKKED] * 5), 10, 20, 40, True, id="collapses, comes back"
        ),
        pytest.param(
            curve(NEW, MEMORISED, GROKKED, (1.0, 0.9), *[GROKKED] * 5), 10, 20, 40, False, id="dips, no collapse"
        ),
        pytest.param(curve(NEW, GROKKED, *[(0.5, 0.4)] * 9), 10, 10, None, True, id="collapses for good"),
        pytest.param(curve(NEW, (0.9, 0.96), *[GROKKED] * 5), 20, 10, 10, False, id="generalises before it memorises"),
        pytest.param(curve(NEW, *[(0.98, 0.96)] * 6), None, 10, 10, False, id="held without memorised"),
        pytest.param([], None, None, None, False, id="never"),
    ],
)
def test_milestones_of_synthetic_curves(
    measured: list[Measurement], memorised: int | None, crossed: int | None, held: int | None, collapsed: bool
) -> None:
    result = train.milestones(measured, hold_steps=40)
    assert [result[key] for key in ("memorised", "crossed", "held")] == [memorised, crossed, held]
    assert result["collapsed"] == collapsed
    after = [each.val_accuracy for each in measured if crossed is not None and each.step >= crossed]
    assert result["lowest_after"] == (min(after) if after else None)
    when_memorised = [each.val_accuracy for each in measured if each.step == memorised]
    assert result["val_when_memorised"] == (when_memorised[0] if when_memorised else None)


@pytest.mark.parametrize(("stop", "ends"), [("crossed", 30), ("held", 60), ("never", 200)])
def test_a_run_ends_when_it_has_got_there(monkeypatch: pytest.MonkeyPatch, stop: Any, ends: int) -> None:
    def generalised(self: Stack, step: int) -> None:
        for member in self.members:
            member.measurements.append(Measurement(step, 1.0 if step >= 20 else 0.2, 0.96 if step >= 30 else 0.1))

    monkeypatch.setattr(Stack, "measure", generalised)
    settings = Settings("parity", width=16, heads=2, max_steps=200, hold_steps=30, eval_every=10, stop=stop)
    (run,) = train.train([settings])
    held = None if stop == "crossed" else 30
    assert (run["memorised"], run["crossed"], run["held"], run["steps"]) == (20, 30, held, ends)


def test_batches_go_through_all_rows_before_any_comes_again() -> None:
    rows = torch.randperm(9409)[:1024]
    stream = train.batches(rows, 96, torch.Generator().manual_seed(0))
    seen = torch.cat([next(stream) for _ in range(32)]).view(3, 1024)  # three epochs
    assert all(epoch.sort().values.tolist() == rows.sort().values.tolist() for epoch in seen)
    assert not torch.equal(seen[0], seen[1])
    whole = train.batches(rows, 0, torch.Generator().manual_seed(0))
    assert torch.equal(next(whole), rows) and torch.equal(next(whole), rows)


def test_stacks_are_of_one_kind_even_and_not_too_large() -> None:
    plain = [Settings("mul", lr=lr, seed=seed) for lr in (0.1, 0.2) for seed in range(12)]
    wide = [replace(run, width=128, batch_size=0) for run in plain[:3]]
    found = train.stacks([*plain, *wide, *plain[:5]])
    assert sorted(run.seed for stack in found for run in stack) == sorted(run.seed for run in [*plain, *wide])
    assert [len(stack) for stack in found] == [8, 8, 8, 1, 1, 1]
    assert all(len({run.kind for run in stack}) == 1 for stack in found)
    with pytest.raises(ValueError, match="rates, decays and seed alone"):
        train.train([plain[0], replace(plain[1], depth=2)])


# ------------------------------------------------------------------------------------------------------------
# How settings are chosen


def test_every_optimizer_chooses_from_as_many_settings_of_its_own_box() -> None:
    for name, box in protocol.BOXES.items():
        found = protocol.candidates(name, 20)
        assert len({tuple(each.values()) for each in found}) == 20
        for key, (low, high) in zip(protocol.TUNED, box, strict=True):
            values = sorted(each[key] for each in found)
            assert low * 0.95 <= values[0] < low * (high / low) ** 0.15  # from end to end
            assert high * 1.05 >= values[-1] > high / (high / low) ** 0.15
    ranks = [np.argsort([each["lr"] for each in protocol.candidates(name, 20)]).tolist() for name in protocol.PAIR]
    assert ranks[0] == ranks[1]


def test_a_third_goes_on_and_one_is_left() -> None:
    left, kept = 20, []
    for rung in range(len(protocol.RUNGS)):
        left = protocol.num_kept(left, rung)
        kept.append(left)
    assert kept == [7, 3, 1]


def chosen_runs(part: protocol.Part, outcomes: Mapping[float, Sequence[tuple[int | None, float]]]) -> Any:
    """Runs of settings with these rates, on each of the part's tuning tasks: (step of the milestone, accuracy)."""
    tried = [dict(lr=lr, weight_decay=0.1, adam_weight_decay=0.2) for lr in outcomes]
    runs = []
    for settings in protocol.rung_runs(part, "muon", tried, 0, seed=100):
        step, best = outcomes[settings.lr][part.tuned_on.index(settings.task)]
        runs.append({"settings": vars(settings), "crossed": step, "held": step, "best_val_accuracy": best})
    return tried, runs


@pytest.mark.parametrize("part", ["main", "held"])
def test_halving_keeps_what_it_should(part: str) -> None:
    outcomes = {
        0.1: [(20, 1.0), (None, 0.9)],  # all steps for the task that did not get there
        0.2: [(140, 1.0), (100, 1.0)],
        0.3: [(None, 0.3), (None, 0.2)],
        0.4: [(None, 0.3), (None, 0.4)],
        0.5: [(120, 1.0), (60, 1.0)],
    }
    tried, runs = chosen_runs(protocol.PARTS[part], outcomes)
    kept = protocol.survivors(protocol.PARTS[part], tried, runs, 4)
    assert [each["lr"] for each in kept] == [0.5, 0.2, 0.1, 0.4]
    assert kept == protocol.survivors(protocol.PARTS[part], tried, runs[::-1], 4)
    assert {run["settings"]["max_steps"] for run in runs} == {400 if part == "main" else 700}
    assert {run["settings"]["stop"] for run in runs} == {"crossed" if part == "main" else "held"}


def test_a_diverged_setting_is_not_chosen() -> None:
    outcomes = {0.1: [(None, 0.01), (None, 0.01)], 0.2: [(None, 0.02), (None, 0.02)]}
    tried, runs = chosen_runs(protocol.PARTS["main"], outcomes)
    assert [each["lr"] for each in protocol.survivors(protocol.PARTS["main"], tried, runs, 1)] == [0.2]


def test_what_comes_later_is_around_what_was_chosen() -> None:
    chosen = {name: dict(lr=0.03, weight_decay=0.3, adam_weight_decay=0.1) for name in protocol.PAIR}
    runs = protocol.later_runs(chosen, seed=1)
    assert len(set(runs)) == len(runs) == 9 * 3 * len(protocol.LATER_TASKS)
    assert {(run.lr, run.weight_decay) for run in runs} == {
        (lr, d) for lr in (0.01, 0.03, 0.09) for d in (0.1, 0.3, 0.9)
    }
    assert {(run.optimizer, run.is_frozen) for run in runs} == {("adamw", False), ("muon", False), ("muon", True)}
    assert {(run.stop, run.max_steps, run.adam_weight_decay) for run in runs} == {("never", 5000, 0.1)}


# ------------------------------------------------------------------------------------------------------------
# Statistics


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13])
def test_median_is_kaplan_meiers(n: int) -> None:
    rng = np.random.default_rng(n)
    for latest in (60, 150):  # with and without censored runs
        steps = rng.integers(10, 100, n)
        times = [int(step) if step < latest else None for step in steps]
        seen = [time for time in times if time is not None]
        sf = stats.ecdf(stats.CensoredData(seen, right=[latest] * times.count(None))).sf
        below_half = [q for q, p in zip(sf.quantiles, sf.probabilities, strict=True) if p <= 0.5 + 1e-12]
        reached = [q for q in below_half if q < latest]
        assert survival.median(times) == (min(reached) if reached else math.inf)


def test_splits_are_those_of_the_mann_whitney_test() -> None:
    for n, m in ((3, 3), (4, 6), (6, 6)):
        counts = [survival.num_splits(n, m, u) for u in range(n * m + 1)]
        assert sum(counts) == math.comb(n + m, n)
        for u in range(n * m // 2):
            x = np.arange(n) * 100.0  # apart from the others but for u pairs
            y = 1000.0 + np.arange(m)
            pairs = u
            for i in reversed(range(n)):
                beyond = min(m, pairs)
                x[i] = 999.5 - n + i if beyond == 0 else 1000.0 + beyond - 0.5 + 0.01 * i
                pairs -= beyond
            found = stats.mannwhitneyu(x, y, method="exact")
            assert found.statistic == u
            assert min(1.0, 2 * sum(counts[: u + 1]) / sum(counts)) == pytest.approx(found.pvalue)


@pytest.mark.parametrize(("n", "covered"), [(3, 0.9), (5, 0.968), (6, 0.959)])
def test_interval_of_a_ratio_covers_as_stated(n: int, covered: float) -> None:
    rng, hits, num_known = np.random.default_rng(0), 0, 0
    for _ in range(600):
        mine, other = 200 * np.exp(0.5 * rng.normal(size=n)), 400 * np.exp(0.5 * rng.normal(size=n))
        whole = survival.ratio(mine.tolist(), other.tolist(), 1e9)
        hits += whole.low <= 0.5 <= whole.high
        assert whole.coverage == pytest.approx(covered, abs=1e-3)
        assert whole.low <= whole.least <= whole.high and whole.least == pytest.approx(whole.most)
        cut = [[step if step < 500 else None for step in group.tolist()] for group in (mine, other)]
        censored = survival.ratio(cut[0], cut[1], 500)
        assert censored.low <= whole.low and whole.high <= censored.high  # what is not known only widens it
        assert censored.least <= whole.least * (1 + 1e-12) and whole.most <= censored.most * (1 + 1e-12)
        num_known += censored.least == censored.most
    assert hits / 600 >= covered - 0.03
    assert 0 < num_known < 600


@pytest.mark.parametrize(("mine", "other", "spread"), [(190, 230, 0.05), (250, 600, 0.05), (110, 160, 0.1)])
def test_an_interval_covers_steps_that_are_seen_every_20(mine: float, other: float, spread: float) -> None:
    rng, hits, naive = np.random.default_rng(0), 0, 0
    for _ in range(400):
        groups = [np.ceil(median * np.exp(spread * rng.normal(size=6)) / 20) * 20 for median in (mine, other)]
        found = survival.ratio(groups[0].tolist(), groups[1].tolist(), 1e9, resolution=20)
        hits += found.low <= mine / other <= found.high
        found = survival.ratio(groups[0].tolist(), groups[1].tolist(), 1e9)
        naive += found.low <= mine / other <= found.high
    assert hits / 400 >= 0.95 > naive / 400


def test_a_ratio_of_runs_that_were_cut_off() -> None:
    never, early, late = [None] * 6, [100] * 6, [400] * 6
    assert survival.ratio(early, late, 500)[:4] == (0.25,) * 4
    assert survival.ratio(early, never, 500)[:4] == (0, 0.2, 0, 0.2)  # AdamW took 500 steps or more
    assert survival.ratio(never, early, 500)[:4] == (5, math.inf, 5, math.inf)
    assert survival.ratio(never, never, 500)[:4] == (0, math.inf, 0, math.inf)
    seen_late = survival.ratio(early, late, 500, resolution=20)
    assert seen_late[:4] == (0.25, 0.25, 80 / 400, 100 / 380)


def test_rank_test_by_permutation() -> None:
    early, late = [100, 200, 300, 400, 500], [600, 700, 800, None, None]
    assert survival.rank_test(early, late) == pytest.approx(2 / math.comb(10, 5))
    assert survival.rank_test(early[:3], late[:3]) == pytest.approx(0.1)  # nothing smaller with three against three
    assert survival.rank_test(early, early) == survival.rank_test([20] * 3, [20] * 3) == 1
    assert survival.rank_test([None] * 3, [None] * 3) is None


def test_rank_test_is_mann_whitneys() -> None:
    rng = np.random.default_rng(3)
    for n in (4, 6):
        for shift in (1.0, 1.5, 2.5):
            groups = [(scale * rng.exponential(300, n)).tolist() for scale in (1.0, shift)]
            expected = stats.mannwhitneyu(*groups, method="exact").pvalue
            assert survival.rank_test(*groups) == pytest.approx(expected)
            last = sorted(step for group in groups for step in group)[-2]  # the very last one is cut off: as late
            cut = [[step if step <= last else None for step in group] for group in groups]
            assert survival.rank_test(*cut) == pytest.approx(expected)


def test_stratified_rank_test_adds_up_what_settings_say() -> None:
    early, late = [100, 200, 300], [600, 700, None]
    assert survival.stratified_rank_test([(early, late)]) == pytest.approx(survival.rank_test(early, late), abs=0.02)
    three = survival.stratified_rank_test([(early, late)] * 3)
    assert three == pytest.approx(2 / 20**3, abs=4e-4)  # both ends of the permutations of three settings
    assert survival.stratified_rank_test([(early, late), (late, early)]) > 0.9
    assert survival.stratified_rank_test([([None] * 3, [None] * 3)]) == 1
    # settings of another scale are no confounders, as they are when all runs are thrown together
    shifted = [([100, 110, 120], [105, 115, 125]), ([800, 810, 820], [805, 815, 825])]
    assert survival.stratified_rank_test(shifted) < survival.rank_test(*map(sum, zip(*shifted, strict=True), ([], [])))


def test_a_common_ratio_of_settings_of_several_scales() -> None:
    rng, hits = np.random.default_rng(5), 0
    for _ in range(30):
        strata = []
        for scale in (200, 500, 1500):  # the last is cut off now and then
            mine, other = (factor * scale * np.exp(0.3 * rng.normal(size=6)) for factor in (0.7, 1.0))
            strata.append([[step if step < 2000 else None for step in group.tolist()] for group in (mine, other)])
        ratio, low, high = survival.common_ratio([(mine, other) for mine, other in strata], last=2000)
        assert low < ratio < high
        hits += low <= 0.7 <= high
    assert hits / 30 > 0.85


def test_a_common_ratio_that_runs_do_not_bound() -> None:
    never, early = [None] * 6, [100, 110, 120, 130, 140, 150]
    ratio, low, high = survival.common_ratio([(early, never)], last=1000)
    assert low == ratio == 0 and high == pytest.approx(0.12, abs=0.04)
    ratio, low, high = survival.common_ratio([(never, early)], last=1000)
    assert high == ratio == math.inf and low == pytest.approx(8, abs=2.5)
    seen, wide = (survival.common_ratio([(early, early)], last=1000, resolution=step) for step in (0, 20))
    assert wide[1] < seen[1] < 1 < seen[2] < wide[2]
