"""Parts of the grokking experiment: tasks by brute force, weights and losses by definition, the decoder by the GPT."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from experiments.grokking import decoder, survival, tasks, train
from experiments.grokking.train import Measurement, Settings
from model import ModelConfig

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
    rows = tasks.table(task)
    parts = tasks.split(rows, tasks.TRAIN_SHARES[task], torch.Generator().manual_seed(1))
    assert len(parts[0].targets) == num_train
    together = [tuple(row) for part in parts for row in part.inputs.tolist()]
    assert sorted(together) == sorted(map(tuple, rows.inputs.tolist()))
    other = tasks.split(rows, tasks.TRAIN_SHARES[task], torch.Generator().manual_seed(2))
    assert not torch.equal(parts[0].inputs, other[0].inputs)


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
    assert torch.autograd.gradcheck(lambda z: decoder.LOSSES[name](z, targets), (z,))


def test_losses_are_those_of_the_definitions() -> None:
    torch.manual_seed(0)
    z, targets = 3 * torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 5
    own = torch.arange(8), targets
    torch.testing.assert_close(decoder.stablemax_loss(z, targets), -decoder.stablemax(z)[own].log().mean())
    # Fenchel-Young: conjugate of half the squared norm on the simplex, plus that norm of the target, minus its score
    p = decoder.sparsemax(z)
    conjugate = (p * z).sum(-1) - p.square().sum(-1) / 2
    torch.testing.assert_close(decoder.sparsemax_loss(z, targets), (conjugate + 0.5 - z[own]).mean())
    z = torch.zeros(2, 5, dtype=torch.float64)
    z[:, 3] = 1.0  # by the margin at which sparsemax is sure and its loss is zero
    assert decoder.sparsemax_loss(z, torch.tensor([3, 3])).item() == 0
    assert decoder.sparsemax_loss(z, torch.tensor([3, 0])).item() > 0


def tiny_decoder(depth: int, attention: str = "softmax") -> decoder.Decoder:
    torch.manual_seed(depth)
    shape = dict(vocab_size=tasks.VOCAB_SIZE, num_layers=depth, num_heads=2, head_dim=8, model_dim=16, seq_len=16)
    model = decoder.Decoder(ModelConfig(**shape), attention)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    model.dtype = torch.float64
    return model.double()


@pytest.mark.parametrize("depth", [1, 3])
def test_the_decoder_with_softmax_is_the_gpt(depth: int) -> None:
    model, rows = tiny_decoder(depth), tasks.table("parity").take(torch.arange(0, 1024, 37))
    expected = F.linear(model.hidden(rows.inputs)[:, -1], model.head.weight[:2])
    torch.testing.assert_close(model(rows.inputs, 2), expected)
    gradients = []
    for logits in (model(rows.inputs, 2), expected):
        gradients.append(torch.autograd.grad(logits.square().sum(), list(model.parameters()), allow_unused=True))
    for found, wanted in zip(*gradients, strict=True):
        assert found is not None and wanted is not None
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("attention", decoder.WEIGHTS)
def test_attention_is_causal_and_weighs_as_named(attention: str) -> None:
    model, shape = tiny_decoder(1, attention), (2, 5, 2, 8)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    found = model.attend(q, k, v)
    for position in range(5):
        scores = torch.einsum("bhk,bthk->bht", q[:, position], k[:, : position + 1]) / math.sqrt(8)
        expected = torch.einsum("bht,bthk->bhk", decoder.WEIGHTS[attention](scores), v[:, : position + 1])
        torch.testing.assert_close(found[:, position], expected.flatten(1))
    k.requires_grad_()
    model.attend(q, k, v).sum().backward()
    assert k.grad is not None and k.grad.isfinite().all()


def curve(*values: tuple[float, float]) -> list[Measurement]:
    """Measurements every 10 steps from (train accuracy, validation accuracy)."""
    return [Measurement(10 * i, 0.0, of_train, 0.0, of_val) for i, (of_train, of_val) in enumerate(values)]


NEW, MEMORISED, GROKKED = (0.01, 0.01), (1.0, 0.2), (1.0, 0.97)


@pytest.mark.parametrize(
    ("measured", "memorised", "crossed", "sustained", "collapsed"),
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
        pytest.param(curve(NEW, (0.9, 0.96), *[GROKKED] * 5), 20, 20, 20, False, id="generalises before it memorises"),
        pytest.param([], None, None, None, False, id="never"),
    ],
)
def test_milestones_of_synthetic_curves(
    measured: list[Measurement], memorised: int | None, crossed: int | None, sustained: int | None, collapsed: bool
) -> None:
    found = train.milestones(measured, sustain_steps=40)
    assert [found[key] for key in ("memorised", "crossed", "sustained")] == [memorised, crossed, sustained]
    assert found["collapsed"] == collapsed
    assert found["delay"] == (None if sustained is None or memorised is None else sustained - memorised)


def test_batches_go_through_all_rows_before_any_comes_again() -> None:
    rows = tasks.table("parity")
    stream = train.batches(rows, 96, torch.Generator().manual_seed(0))
    seen = torch.cat([next(stream).inputs for _ in range(32)])  # three epochs of 1024
    numbers = (seen[:, :10] * 2 ** torch.arange(10)).sum(1).view(3, 1024)
    assert all(sorted(epoch) == list(range(1024)) for epoch in numbers.tolist())
    assert not torch.equal(numbers[0], numbers[1])


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "aurora", "normuon", "sgd", "rmsprop"])
def test_every_optimizer_learns_and_repeats_itself(optimizer: str) -> None:
    lr = {"adamw": 0.003, "sgd": 0.1, "rmsprop": 0.0003}.get(optimizer, 0.02)
    settings = Settings("gcd", optimizer, lr, 0.0, width=16, heads=2, batch_size=128, max_steps=40, sustain_steps=20)
    run = train.train(settings)
    losses = run["curves"]["train_loss"]
    assert run["steps"] == 40 and run["curves"]["step"] == [0, 10, 20, 30, 40]
    assert losses[0] == pytest.approx(math.log(P), abs=1e-3)  # a new model has no preference
    assert losses[-1] < 0.7 * losses[0]
    if optimizer == "muon":
        assert train.train(settings)["curves"] == run["curves"]


def test_batches_are_of_training_rows_and_measurements_of_either_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a split made here: what is learnt from, what is measured as which, and that no row is in both."""
    seen: dict[str, list[tasks.Rows]] = {"batches": [], "measured": []}
    genuine_batches, genuine_measure = train.batches, train.measure

    def noted_batches(rows: tasks.Rows, *arguments: Any) -> Any:
        seen["batches"].append(rows)
        return genuine_batches(rows, *arguments)

    def noted_measure(model: Any, loss_of: Any, step: int, *parts: tasks.Rows) -> Measurement:
        seen["measured"] += parts
        return genuine_measure(model, loss_of, step, *parts)

    monkeypatch.setattr(train, "batches", noted_batches)
    monkeypatch.setattr(train, "measure", noted_measure)
    train.train(
        Settings("mul", seed=7, train_share=0.3, width=16, heads=2, batch_size=16, max_steps=10, sustain_steps=10)
    )
    parts = tasks.split(tasks.table("mul"), 0.3, torch.Generator().manual_seed(7))
    assert [len(part.targets) for part in parts] == [2823, 6586]
    assert not {tuple(row) for row in parts[0].inputs.tolist()} & {tuple(row) for row in parts[1].inputs.tolist()}
    for found, expected in zip([*seen["batches"], *seen["measured"]], [parts[0], *parts, *parts], strict=True):
        assert torch.equal(found.inputs, expected.inputs) and torch.equal(found.targets, expected.targets)


def test_a_measurement_is_loss_and_accuracy_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "ROWS_MEASURED", 300)
    rows = tasks.table("gcd")
    model = tiny_decoder(1).float()
    found = train.measure(model, F.cross_entropy, 30, rows.take(torch.arange(200)), rows)
    for count, loss, accuracy in (
        (200, found.train_loss, found.train_accuracy),
        (300, found.val_loss, found.val_accuracy),
    ):
        logits = model(rows.inputs[:count], rows.num_classes)
        hits = sum(int(row.argmax()) == int(target) for row, target in zip(logits, rows.targets[:count], strict=True))
        assert accuracy == pytest.approx(hits / count, abs=1e-4)
        assert loss == pytest.approx(F.cross_entropy(logits, rows.targets[:count]).item(), abs=1e-4)


BASE = Settings("gcd", "adamw", 0.01, width=16, heads=2, batch_size=32, max_steps=20, sustain_steps=10, warmup_steps=5)


@pytest.fixture(scope="module")
def base_curve() -> Any:
    return train.train(BASE)["curves"]


@pytest.mark.parametrize(
    "change",
    [
        dict(seed=1), dict(attention="stablemax"), dict(attention="sparsemax"), dict(loss="stablemax"),
        dict(loss="sparsemax"), dict(depth=2), dict(train_share=0.3), dict(batch_size=64), dict(warmup_steps=1),
        dict(adam_lr=0.02), dict(adam_weight_decay=1.0), dict(lr=0.02), dict(weight_decay=3.0), dict(heads=4),
    ],
    ids=str,
)  # fmt: skip
def test_every_setting_changes_what_is_computed(change: dict[str, Any], base_curve: Any) -> None:
    curves = train.train(replace(BASE, **change))["curves"]
    assert curves["step"] == base_curve["step"]
    assert curves["train_loss"][1:] != base_curve["train_loss"][1:]


def test_all_that_is_no_hidden_matrix_is_the_same_for_every_optimizer() -> None:
    cpu = torch.device("cpu")
    for optimizer in ("adamw", "muon", "sgd"):
        settings = replace(BASE, optimizer=optimizer, lr=0.3, weight_decay=0.7, adam_lr=0.02, adam_weight_decay=0.1)
        model, (matrices, rest) = train.build(settings, cpu)
        assert [(g["name"], g["lr"], g["weight_decay"]) for g in matrices.param_groups] == [("matrix", 0.3, 0.7)]
        assert [(g["name"], g["lr"], g["weight_decay"]) for g in rest.param_groups] == [
            ("embed", 0.02, 0.1), ("head", 0.02, 0.1)
        ]  # fmt: skip
        assert {id(p) for g in matrices.param_groups for p in g["params"]} == {id(p) for p in model.blocks.parameters()}


def test_a_gradient_that_is_not_finite_ends_a_run_of_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(train.LOSSES, "softmax", lambda logits, targets: F.cross_entropy(logits, targets) * math.inf)
    monkeypatch.setattr(train, "measure", lambda model, loss_of, step, *rows: Measurement(step, 1.0, 0.1, 1.0, 0.1))
    run = train.train(replace(BASE, optimizer="muon"))
    assert (run["status"], run["steps"], run["sustained"]) == ("diverged", 0, None)


def test_a_run_ends_when_generalisation_was_held(monkeypatch: pytest.MonkeyPatch) -> None:
    def grokked(model: object, loss_of: object, step: int, *rows: object) -> Measurement:
        return Measurement(step, 0.1, 1.0 if step >= 20 else 0.2, 0.1, 0.96 if step >= 30 else 0.1)

    monkeypatch.setattr(train, "measure", grokked)
    run = train.train(Settings("parity", width=16, heads=2, max_steps=200, sustain_steps=20))
    assert (run["memorised"], run["crossed"], run["sustained"], run["delay"], run["steps"]) == (20, 30, 30, 10, 50)


def test_a_run_that_blows_up_is_a_result() -> None:
    run = train.train(Settings("parity", "sgd", 1e30, width=16, heads=2, max_steps=60, sustain_steps=20))
    assert run["status"] == "diverged" and run["sustained"] is None and run["steps"] < 60
    assert all(math.isfinite(loss) for loss in run["curves"]["val_loss"])


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
        assert survival.median(times).value == (min(reached) if reached else math.inf)


@pytest.mark.parametrize(("n", "least"), [(3, 0.75), (5, 0.9375), (6, 0.95), (12, 0.95)])
def test_interval_of_the_median_covers_as_stated(n: int, least: float) -> None:
    rng, latest = np.random.default_rng(0), 900
    draws = np.round(400 * np.exp(rng.normal(size=(1500, n))), 6)
    hits, stated = 0, 0.0
    for draw in draws:
        found = survival.median([step if step < latest else None for step in draw])
        hits += found.low <= 400 <= found.high
        stated = found.coverage
    assert stated >= least - 1e-9
    assert hits / len(draws) == pytest.approx(stated, abs=0.025)


def test_logrank_by_permutation() -> None:
    early, late = [100, 200, 300, 400, 500], [600, 700, 800, None, None]
    assert survival.logrank(early, late) == pytest.approx(2 / math.comb(10, 5))
    assert survival.logrank(early[:3], late[:3]) == pytest.approx(0.1)  # nothing smaller with three against three
    assert survival.logrank(early, early) == 1
    assert survival.logrank([None] * 3, [None] * 3) is None


def test_logrank_of_many_runs_is_the_usual_one() -> None:
    rng = np.random.default_rng(3)
    for shift in (1.0, 1.3, 1.8):
        groups = [scale * rng.exponential(300, 60) for scale in (1.0, shift)]
        times = [[step if step < 500 else None for step in group] for group in groups]
        censored = [
            stats.CensoredData([step for step in group if step is not None], right=[500] * group.count(None))
            for group in times
        ]
        found = survival.logrank(times[0], times[1])
        assert found == pytest.approx(stats.logrank(*censored).pvalue, abs=0.02)


def test_stratified_logrank_adds_up_what_settings_say() -> None:
    early, late = [100, 200, 300], [600, 700, None]
    assert survival.stratified_logrank([(early, late)]) == pytest.approx(survival.logrank(early, late), abs=0.02)
    three = survival.stratified_logrank([(early, late)] * 3)
    assert three == pytest.approx(2 / 20**3, abs=4e-4)  # both ends of the permutations of three settings
    assert survival.stratified_logrank([(early, late), (late, early)]) > 0.9
    assert survival.stratified_logrank([([None] * 3, [None] * 3)]) == 1
    # settings of another scale are no confounders, as they are when all runs are thrown together
    shifted = [([100, 110, 120], [105, 115, 125]), ([800, 810, 820], [805, 815, 825])]
    assert survival.stratified_logrank(shifted) < survival.logrank(*map(sum, zip(*shifted, strict=True), ([], [])))
