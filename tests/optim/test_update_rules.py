"""Update rules against float64 transcriptions of their definitions with an exact polar factor, and what they promise:
row norms, lengths, objective, blocks, cautious decay."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

import optim
from optim import (
    Aurora,
    MatrixOptimizer,
    Muon,
    NorMuon,
    UNorMuon,
)
from optim.aurora import aurora_polar
from optim.riemannian_aurora import riemannian_polar
from tests.matrices import randn, uneven
from tests.optim import rules
from tests.optim.definitions import DEFINITIONS, DIRECTIONS, SHAPES, STEPS, largest_difference

Matrix = npt.NDArray[np.float64]
Memory = dict[str, Any]


pytestmark = [pytest.mark.usefixtures("float32_products"), pytest.mark.filterwarnings("ignore:PolarGrad")]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_rule_follows_its_definition_in_float64(name: str, shape: tuple[int, int]) -> None:
    """50 steps. Conjugate gradients end at a residual of 1e-6, which moves weights by that, times rate and step size
    (0.02), twice a step."""
    assert largest_difference(name, shape) <= (50 * 2 * 0.02 * 1e-6 if name.startswith("riemannian") else 1e-9)


def test_every_rule_has_a_definition() -> None:
    made = [make for make, _ in (*DIRECTIONS.values(), *STEPS.values())]
    assert set(optim.RULES.values()) == {make.func if isinstance(make, partial) else make for make in made}


# What they promise


@pytest.mark.parametrize("shape", [(256, 64), (96, 32), (64, 256)], ids=str)
@pytest.mark.parametrize("spread", [0.3, 1.0])
@pytest.mark.parametrize("method", ["svd", "simple_quintic"])
def test_riemannian_ascent_reaches_more_than_aurora_at_rows_as_equal(
    shape: tuple[int, int], spread: float, method: str
) -> None:
    """Both miss orthogonality by less than 0.1%. Aurora's rows then differ by 0.9 to 2.2% (standard deviation), the
    ascent's by 0.02 to 0.7%, and <M, U> is 0.02 to 1.2% larger."""
    M, is_tall = uneven(*shape, spread=spread), shape[0] > shape[1]
    aurora = aurora_polar(M, method=method, dtype=torch.float32).double()
    ascended = riemannian_polar(M, method=method, dtype=torch.float32).double()
    errors = []
    for U in (aurora, ascended):
        tall = U if is_tall else U.mT
        norms = tall.norm(dim=1)
        identity = torch.eye(tall.size(1), dtype=torch.float64)
        assert (tall.mT @ tall - identity).norm() < 1e-3 * math.sqrt(tall.size(1))
        errors.append(norms.std() / norms.mean())
    assert errors[1] < errors[0] < 0.03
    gain = (M * ascended).sum() / (M * aurora).sum() - 1
    assert gain > 1e-4


@pytest.mark.parametrize("method", ["polar_express", "svd"])
def test_normuon_restores_the_length_of_the_polar_factor(method: str) -> None:
    weight, reference = (nn.Parameter(torch.zeros(24, 10)) for _ in range(2))
    optimizers = [rule([p], lr=1.0, polar_method=method) for rule, p in ((NorMuon, weight), (Muon, reference))]
    rows: list[torch.Tensor] = []
    for step in range(30):
        before = weight.detach().clone(), reference.detach().clone()
        weight.grad, reference.grad = (randn(24, 10, seed=step) * torch.linspace(0.1, 2, 24)[:, None] for _ in range(2))
        for optimizer in optimizers:
            optimizer.step()
        moves = [p.detach() - start for p, start in zip((weight, reference), before, strict=True)]
        torch.testing.assert_close(moves[0].norm(), moves[1].norm(), rtol=1e-4, atol=0)
        rows = [move.norm(dim=1) for move in moves]
    spreads = [float(norms.std() / norms.mean()) for norms in rows]
    assert spreads[0] < 0.7 * spreads[1]


def test_unormuon_gives_tall_updates_one_row_norm_and_leaves_others_alone() -> None:
    for shape in ((40, 12), (12, 40), (12, 12)):
        moved = []
        for rule in (UNorMuon, Muon):
            weight = nn.Parameter(torch.zeros(shape))
            weight.grad = uneven(*shape)
            rule([weight], lr=1.0, scale="none").step()
            moved.append(-weight.detach())
        if shape == (40, 12):
            torch.testing.assert_close(moved[0].norm(dim=1), torch.full((40,), math.sqrt(12 / 40)))
            cosine = (moved[0] * moved[1]).sum(dim=1) / moved[0].norm(dim=1) / moved[1].norm(dim=1)
            assert cosine.min() > 0.9999
        else:
            assert torch.equal(moved[0], moved[1])


def test_memory_equalises_rows_that_one_polar_factor_leaves_uneven() -> None:
    """A gradient that stays the same: with memory one polar factor a step converges to equal rows."""
    gradient = torch.outer(torch.linspace(0.1, 3, 60), torch.ones(16)) + 0.3 * randn(60, 16)
    spread = {}
    for variant, settings in {"warm": {}, "release": dict(iterations=1)}.items():
        weight = nn.Parameter(torch.zeros(60, 16))
        optimizer = Aurora([weight], lr=1.0, variant=variant, polar_method="simple_quintic", **settings)  # type: ignore[arg-type]
        for _ in range(12):
            before = weight.detach().clone()
            weight.grad = gradient.clone()
            optimizer.step()
        norms = (weight.detach() - before).norm(dim=1)
        spread[variant] = float(norms.std() / norms.mean())
    assert spread["warm"] < 0.005
    assert spread["release"] > 0.05


def test_memory_of_rows_that_have_no_gradient_stays_at_one() -> None:
    """A quarter of the rows asleep for 400 steps: the others move all the while, and all of them once those wake up."""
    weight = nn.Parameter(torch.zeros(64, 12))
    optimizer = Aurora([weight], lr=1.0, variant="warm", scale="none", polar_method="simple_quintic")
    for step in range(402):
        gradient = randn(64, 12, seed=step)
        if step < 400:
            gradient[::4] = 0
        before, weight.grad = weight.detach().clone(), gradient
        optimizer.step()
    moved = (weight.detach() - before).norm(dim=1)
    assert moved.min() > 0.2 * math.sqrt(12 / 64)
    memory = optimizer.state[weight]["row_weight"]
    assert 0.3 < memory.min() < memory.max() < 3


def test_rounding_does_not_grow_in_the_memory_of_matrices_of_usual_shape() -> None:
    """The gradient changed by one part in 10^7: after 30 steps updates still differ by rounding alone."""
    moves = []
    for noise in (0.0, 1e-7):
        weight = nn.Parameter(torch.zeros(128, 48))
        optimizer = Aurora([weight], lr=1.0, variant="warm")
        for step in range(30):
            before = weight.detach().clone()
            weight.grad = uneven(128, 48, seed=2 * step) * (1 + noise * randn(128, 48, seed=77))
            optimizer.step()
        moves.append(weight.detach() - before)
    assert (moves[0] - moves[1]).norm() < 1e-3 * moves[0].norm()


@pytest.mark.parametrize("make", [Muon, NorMuon, Aurora], ids=["muon", "normuon", "aurora"])
@pytest.mark.usefixtures("in_float64")
def test_row_blocks_move_as_matrices_of_their_own(make: Callable[..., MatrixOptimizer]) -> None:
    """A fused [3 D, D] of queries, keys and values, once more stacked over two layers, against its nine parts."""
    parts = [nn.Parameter(randn(6, 8, seed=i).double()) for i in range(9)]
    fused = nn.Parameter(torch.cat([p.detach() for p in parts[:3]]))
    stacked = nn.Parameter(torch.cat([p.detach() for p in parts[3:]]).view(2, 18, 8))
    together, apart = make([fused, stacked], row_blocks=3), make(parts)
    for step in range(5):
        for i, p in enumerate(parts):
            p.grad = uneven(6, 8, seed=20 * step + i).double()
        gradients = [p.grad for p in parts if p.grad is not None]
        fused.grad, stacked.grad = torch.cat(gradients[:3]), torch.cat(gradients[3:]).view(2, 18, 8)
        together.step()
        apart.step()
    expected = torch.cat([p.detach() for p in parts])
    torch.testing.assert_close(torch.cat([fused, stacked.flatten(0, 1)]), expected, rtol=0, atol=1e-9)
    whole = Muon([nn.Parameter(fused.detach().clone())])
    (p,) = whole.param_groups[0]["params"]
    p.grad = fused.grad
    whole.step()
    assert p.detach().sub(fused).norm() > 1e-2  # as one matrix it would have moved otherwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cautious_decay_spares_what_the_update_pushes_outwards(dtype: torch.dtype) -> None:
    start = randn(10, 6).to(dtype)
    gradient = randn(10, 6, seed=1)
    moved = {}
    for name, settings in {
        "none": {}, "plain": dict(weight_decay=0.5), "cautious": dict(weight_decay=0.5, cautious=True),
    }.items():  # fmt: skip
        weight = nn.Parameter(start.clone())
        weight.grad = gradient.to(dtype)
        optimizer = Muon([weight], lr=0.1, polar_method="svd", **settings)  # type: ignore[arg-type]
        optimizer.step()
        state = optimizer.state_dict()["state"][0]
        moved[name] = state.get("master_weight", weight.detach()).double()
    update = start.double() - moved["none"]
    shrinks = update * start.double() > 0
    assert 10 < shrinks.sum() < 50
    expected = torch.where(shrinks, moved["plain"], moved["none"])
    torch.testing.assert_close(moved["cautious"], expected, rtol=1e-6, atol=1e-6)


# Hostile gradients

SAME_CODE = {"muon_eq columns", "muon_plus row_col", "muon_plus col", "adamuon beta2"}
RULES = {name: make for name, (make, _) in {**DIRECTIONS, **STEPS}.items() if name not in SAME_CODE}


def one_hot(shape: tuple[int, int]) -> torch.Tensor:
    gradient = torch.zeros(shape)
    gradient[2, 3] = 1.0
    return gradient


# sqrt(6); sqrt(20) for Muon+; sqrt(120) of Adam's entries of 1, in any basis; twice that for the norm of the weights
LENGTHS = {
    "normuon": 2.6,
    "adamuon": 2.6,
    "muon_plus": 4.6,
    "soap_muon": 1.3,
    "soap": 11.0,
    "adamh": 22.0,
    "muown": 6.0,
}
HOSTILE: dict[str, Callable[[tuple[int, int]], torch.Tensor]] = {
    "zero": torch.zeros,
    "one-hot": one_hot,
    "equal rows": torch.ones,
    "1e-30": lambda shape: randn(*shape) * 1e-30,
    "1e30": lambda shape: randn(*shape) * 1e30,
    "denormal": lambda shape: randn(*shape) * 1e-40,
    "rows from 1e-20 to 1e20": lambda shape: randn(*shape) * torch.logspace(-20, 20, shape[0])[:, None],
    "not contiguous": lambda shape: randn(2 * shape[1], shape[0])[::2].T,
}


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("shape", [(20, 6), (6, 20)], ids=["tall", "wide"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hostile_gradients_move_weights_by_no_more_than_any_other(
    rule: str, shape: tuple[int, int], hostile: str, dtype: torch.dtype
) -> None:
    """The update of a matrix has a spectral norm of about 1 (up to its length, sqrt(6), where rows or entries are
    scaled afterwards), whatever the gradient; of a rule that is not scale-free, of the gradient's nuclear norm."""
    start = randn(*shape, seed=1).to(dtype)
    weight = nn.Parameter(start.clone())
    optimizer = RULES[rule]([weight], lr=0.1, scale="none")
    for _ in range(3):
        weight.grad = HOSTILE[hostile](shape).to(dtype)
        before = weight.grad.clone()
        optimizer.step()
        assert torch.equal(weight.grad, before)
    moved = (weight - start).detach().float()
    assert moved.isfinite().all()
    rounding = 0.0 if dtype == torch.float32 else 0.02 * start.float().norm()
    length = next((length for name, length in LENGTHS.items() if name in rule), 1.3)
    if not rules.is_scale_free(RULES[rule]):
        length *= torch.linalg.matrix_norm(HOSTILE[hostile](shape).double(), "nuc")
    assert torch.linalg.matrix_norm(moved.double(), 2) <= 3 * 0.1 * length + rounding
    if hostile == "zero":
        assert torch.equal(weight.detach(), start)
    for entry in optimizer.state_dict()["state"].values():
        assert all(value.isfinite().all() for value in entry.values())


@pytest.mark.parametrize("rule", RULES)
def test_zero_gradients_of_wide_models_are_zero_updates(rule: str) -> None:
    """What a new model's first step gives its blocks. From width 16 on sqrt(width) over the least float32 overflows."""
    weight = nn.Parameter(torch.ones(2, 96, 32))
    optimizer = RULES[rule]([weight], lr=0.1)
    weight.grad = torch.stack([torch.zeros(96, 32), randn(96, 32)])
    optimizer.step()
    assert torch.equal(weight[0], torch.ones(96, 32))
    assert weight[1].isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
def test_what_is_not_finite_is_refused_by_name_and_leaves_weights_and_state_alone(
    rule: str, value: float, deferred: bool
) -> None:
    named = [(name, nn.Parameter(randn(9, 4, seed=i).to(dtype))) for i, (name, dtype) in enumerate(
        [("first", torch.float32), ("second", torch.float32), ("third", torch.bfloat16)])]  # fmt: skip
    decay = 0.0 if rule == "adamh" else 0.1  # which keeps norms
    optimizer = RULES[rule](named, weight_decay=decay, cautious=True, defer_check=deferred)
    for step in range(3):
        for i, (_, p) in enumerate(named):
            p.grad = randn(9, 4, seed=10 * step + i).to(p.dtype)
        if step < 2:
            optimizer.step()
    optimizer.raise_if_not_finite()
    weights = [p.detach().clone() for _, p in named]
    states = [{k: v.clone() for k, v in entry.items()} for entry in optimizer.state_dict()["state"].values()]
    named[1][1].grad[8, 3] = value  # type: ignore[index]
    with pytest.raises(FloatingPointError, match="second holds NaN or infinity"):
        optimizer.step()
        optimizer.raise_if_not_finite()
    assert all(torch.equal(p, before) for (_, p), before in zip(named, weights, strict=True))
    for entry, before in zip(optimizer.state_dict()["state"].values(), states, strict=True):
        assert entry.keys() == before.keys()
        assert all(torch.equal(entry[k], before[k]) for k in before)
    optimizer.raise_if_not_finite()  # said once
    optimizer.zero_grad()
    for step in range(2):  # SOAP moves from the fourth on
        for i, (_, p) in enumerate(named):
            p.grad = randn(9, 4, seed=50 + 10 * step + i).to(p.dtype)
        optimizer.step()
    assert all(not torch.equal(p, before) for (_, p), before in zip(named, weights, strict=True))


def test_a_first_gradient_that_is_bad_leaves_a_deferred_optimizer_as_new() -> None:
    weight = nn.Parameter(randn(9, 4))
    before = weight.detach().clone()
    fresh, spoilt = nn.Parameter(before.clone()), Aurora([weight], variant="warm", defer_check=True)
    weight.grad = torch.full((9, 4), math.nan)
    spoilt.step()
    assert torch.equal(weight.detach(), before)
    optimizer = Aurora([fresh], variant="warm")
    for step in range(3):
        for p, moved_by in ((weight, spoilt), (fresh, optimizer)):
            p.grad = randn(9, 4, seed=step)
            moved_by.step()
    assert torch.equal(weight, fresh)


def test_gradients_too_large_to_add_up_are_still_finite() -> None:
    """Their sum overflows float32; none of them does."""
    weight = nn.Parameter(randn(40, 40))
    weight.grad = torch.full((40, 40), 3e37)
    Muon([weight]).step()
    assert weight.isfinite().all()
