"""Rules that take gradients or weights themselves, and what acts on weights under any rule: against float64
transcriptions of their definitions, a line at a time."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from optim import MatrixOptimizer, Muon
from optim.adamh import AdamH
from optim.muon_squared import MuonSquared
from optim.muown import Muown
from optim.soap import Soap, SoapMuon
from tests.matrices import randn, uneven
from tests.optim.definitions import Matrix, Memory, exact_polar, hyperball, momentum, muown

pytestmark = pytest.mark.usefixtures("float32_products")


@pytest.mark.usefixtures("in_float64")
def test_a_gain_that_crosses_zero_turns_its_row_round() -> None:
    """Muown's gains have a sign that the weights' norms do not show: seen against variables of their own."""
    weight = nn.Parameter(0.05 * randn(3, 8, seed=1).double())
    optimizer, memory = Muown([weight], lr=0.1, scale="match_rms_adamw", polar_method="svd"), Memory()
    expected = weight.detach().clone().numpy()
    for step in range(30):
        weight.grad = weight.detach() + 0.1 * randn(3, 8, seed=step).double()  # towards zero and past it
        expected = muown(expected, weight.grad.numpy(), memory, lr=0.1)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.from_numpy(expected), rtol=0, atol=1e-9)
    assert (memory["g"] < 0).any()


def test_rows_of_zeros_start_as_if_they_had_a_norm() -> None:
    weight = nn.Parameter(torch.zeros(4, 6))
    optimizer = Muown([weight], lr=0.01)
    weight.grad = randn(4, 6)
    weight.grad[0] = 0
    optimizer.step()
    norms = weight.detach().norm(dim=1)
    assert norms[0] == 0
    torch.testing.assert_close(norms[1:], torch.full((3,), 0.33**0.5), rtol=0, atol=0.011)  # a step of Adam's on it


@pytest.mark.parametrize("lr", [0.0, 1e-6, 0.02], ids=str)
def test_a_first_step_that_leaves_rows_at_zero_does_not_blow_up_the_next(lr: float) -> None:
    """A rate of zero, a small one of a warm-up, or the zero gradient of a model whose head is zero."""
    weight, expected = (nn.Parameter(torch.zeros(6, 8)) for _ in range(2))
    optimizers = Muown([weight], lr=lr), Muown([expected], lr=0.02)
    for step in range(5):
        gradient = randn(6, 8, seed=step)
        for p, optimizer in zip((weight, expected), optimizers, strict=True):
            p.grad = 0 * gradient if step == 0 and lr == 0.02 and p is weight else gradient.clone()
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.02
    mean, usual = (o.state[p]["momentum_buffer"].norm() for p, o in zip((weight, expected), optimizers, strict=True))
    torch.testing.assert_close(mean, usual, rtol=0.3, atol=0)


@pytest.mark.parametrize("rule", [Soap, SoapMuon])
@pytest.mark.parametrize("shape", [(12, 3), (3, 12), (6, 6)], ids=["tall", "wide", "square"])
def test_zero_gradients_at_the_start_count_for_no_rank(rule: Callable[..., MatrixOptimizer], shape: Any) -> None:
    """Else eigenvectors would be taken of factors that are still singular."""
    runs = [nn.Parameter(randn(*shape)) for _ in range(2)]
    for zeros, weight in enumerate(runs):
        optimizer = rule([weight], lr=0.02)
        for step in range(-2 * zeros, 8):
            weight.grad = randn(*shape, seed=step) if step >= 0 else torch.zeros(shape)
            optimizer.step()
    assert torch.equal(*runs)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("make", [Soap, partial(AdamH, hyperball=False)])
@pytest.mark.parametrize("shape", [(64, 8), (8, 64), (20, 20)], ids=["tall", "wide", "square"])
def test_a_first_step_is_as_long_as_adams(
    make: Callable[..., MatrixOptimizer], shape: tuple[int, int], nesterov: bool
) -> None:
    """Entries of 1; SOAP's means have no gradients from before the bases."""
    weight = nn.Parameter(torch.zeros(shape))
    optimizer, step = make([weight], lr=1.0, scale="none", nesterov=nesterov), 0
    while not weight.any():
        weight.grad, step = randn(*shape, seed=step), step + 1
        optimizer.step()
    assert step == (max(shape) // min(shape) + 1 if make is Soap else 1)
    torch.testing.assert_close(weight.detach().square().mean().sqrt(), torch.tensor(1.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("rule", [MuonSquared, AdamH, Muown, Soap, SoapMuon])
def test_a_rate_of_zero_moves_nothing(rule: Callable[..., MatrixOptimizer]) -> None:
    weight = nn.Parameter(randn(9, 4))
    before, optimizer = weight.detach().clone(), rule([weight], lr=0.0)
    for step in range(5):
        weight.grad = randn(9, 4, seed=step)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", [MuonSquared, AdamH, Muown, Soap, SoapMuon])
def test_one_gradient_beyond_all_bounds_does_no_lasting_harm(rule: Callable[..., MatrixOptimizer]) -> None:
    """Its square is infinite in float32, and would stay that in a running mean."""
    weight = nn.Parameter(randn(9, 4))
    optimizer = rule([weight], lr=0.01)
    for step in range(6):
        before, weight.grad = weight.detach().clone(), randn(9, 4, seed=step) * (1e25 if step == 3 else 1)
        optimizer.step()
        assert weight.isfinite().all()
    assert all(value.isfinite().all() for value in optimizer.state[weight].values())
    assert (weight.detach() - before).norm() > 0


# What acts on weights, under any rule


def floor(W: Matrix, U: Matrix, axis: int | None) -> Matrix:
    lengths = [np.linalg.norm(X, axis=axis, keepdims=True) for X in (W, U)]
    return U * np.maximum(1, 0.35 * lengths[0] / lengths[1])


def braked(W: Matrix, U: Matrix, keep: Matrix, lengthen: Callable[[Matrix], Matrix]) -> Matrix:
    a = (U * W).sum() / (W * W).sum()
    U = lengthen(U - a * W + (0.5 if a < 0 else 1) * a * W)
    r = np.linalg.norm(W) - 0.1 * (U * W).sum() / np.linalg.norm(W)
    moved = W - 0.1 * U
    moved = moved * r / np.linalg.norm(moved)
    return moved * (1 - 0.1 * 0.2 * (U * W > 0))


WEIGHT_STEPS: dict[str, tuple[dict[str, Any], Callable[[Matrix, Matrix], Matrix]]] = {
    "hyperball": (dict(hyperball=True), lambda W, U: hyperball(W, U, 0.1)),
    "floor": (dict(update_floor=0.35, weight_decay=0.2),
              lambda W, U: (W - 0.1 * floor(W, U, None)) * 1 - 0.1 * 0.2 * (W - 0.1 * floor(W, U, None))),
    "floor by row": (dict(update_floor=0.35, floor_by_row=True), lambda W, U: W - 0.1 * floor(W, U, 1)),
    "brake, floor by row, cautious decay": (
        dict(radial_brake=0.5, update_floor=0.35, floor_by_row=True, weight_decay=0.2, cautious=True),
        lambda W, U: braked(W, U, W, lambda U: floor(W, U, 1)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(14, 5), (5, 14), (6, 6)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("name", WEIGHT_STEPS)
@pytest.mark.usefixtures("in_float64")
def test_a_constraint_follows_its_definition_in_float64(name: str, shape: tuple[int, int]) -> None:
    """Weights of norms on both sides of where the floor begins; gradients that push outwards and inwards."""
    options, step_of = WEIGHT_STEPS[name]
    weights = [nn.Parameter(size * randn(*shape, seed=i).double()) for i, size in enumerate((0.1, 1.0, 10.0))]
    optimizer = Muon(weights, lr=0.1, polar_method="svd", **options)
    expected, memories = [w.detach().clone().numpy() for w in weights], [Memory() for _ in weights]
    for step in range(50):
        for i, w in enumerate(weights):
            w.grad = uneven(*shape, seed=7 * step + i).double() + (0.5 if step % 2 else -0.5) * w.detach()
            U = exact_polar(momentum(w.grad.numpy(), memories[i], nesterov=True))
            expected[i] = step_of(expected[i], U * math.sqrt(max(1, shape[0] / shape[1])))
        optimizer.step()
        for w, wanted in zip(weights, expected, strict=True):
            torch.testing.assert_close(w.detach(), torch.from_numpy(wanted), rtol=0, atol=1e-9)


CONSTRAINTS = pytest.mark.parametrize("options", [each for each, _ in WEIGHT_STEPS.values()], ids=WEIGHT_STEPS)


@CONSTRAINTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_constraint_holds_for_every_float_type(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Weights of 16 bits follow a float32 master, to their own rounding."""
    start = randn(2, 12, 5).to(torch.bfloat16)
    weights = [nn.Parameter(start.to(each, copy=True)) for each in (dtype, torch.float32)]
    for weight in weights:
        optimizer = Muon([weight], lr=0.01, row_blocks=2, **options)
        for step in range(20):
            weight.grad = randn(2, 12, 5, seed=step).to(dtype).to(weight.dtype)
            optimizer.step()
    tolerance = dict(rtol=torch.finfo(torch.bfloat16).eps, atol=1e-3) if dtype.itemsize < 4 else dict(rtol=0, atol=1e-5)
    torch.testing.assert_close(weights[0].float(), weights[1].float(), **tolerance)


@CONSTRAINTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_step_that_is_skipped_or_empty_leaves_weights_to_the_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    weight = nn.Parameter(randn(12, 5).to(dtype))
    optimizer = Muon([weight], lr=0.1, defer_check=True, **options)
    for bad in (randn(12, 5, seed=1), torch.full((12, 5), math.nan), torch.full((12, 5), math.inf)):
        before, weight.grad = weight.detach().clone(), bad.to(dtype)
        optimizer.step()
        assert torch.equal(weight.detach(), before) == (not bad.isfinite().all())
    with pytest.raises(FloatingPointError):
        optimizer.raise_if_not_finite()
    if not options.get("weight_decay"):
        weight, other = nn.Parameter(randn(12, 5).to(dtype)), nn.Parameter(torch.ones(2, 2))
        before, optimizer = weight.detach().clone(), Muon([weight, other], lr=0.1, **options)
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_skipped_step_leaves_the_shortest_weights_to_the_bit(dtype: torch.dtype) -> None:
    """The brake gives weights that start at zero a norm of 1e-8, and would set it anew."""
    weights = [nn.Parameter(torch.zeros(9, 4, dtype=dtype)) for _ in range(20)]
    optimizer = Muon(weights, lr=0.02, radial_brake=0.5, defer_check=True)
    for size in (1.0, math.nan):
        masters = [optimizer.state[w].get("master_weight", w).detach().clone() for w in weights]
        for i, weight in enumerate(weights):
            weight.grad = (size * randn(9, 4, seed=i)).to(dtype)
        optimizer.step()
    assert all(
        torch.equal(optimizer.state[w].get("master_weight", w), before)
        for w, before in zip(weights, masters, strict=True)
    )


def test_the_hyperball_keeps_norms_through_many_steps_at_any_rate() -> None:
    weight = nn.Parameter(randn(3, 20, 8))
    norms = weight.detach().norm(dim=(1, 2))
    optimizer = Muon([weight], lr=0.5, hyperball=True, flatten=False)
    for step in range(200):
        weight.grad = randn(3, 20, 8, seed=step)
        optimizer.step()
    torch.testing.assert_close(weight.detach().norm(dim=(1, 2)), norms, rtol=200 * 2e-7, atol=0)


@pytest.mark.parametrize(
    ("rule", "options", "words"),
    [
        (Muon, dict(hyperball=True), ["hyperball", "zeros", "init_out"]),
        (AdamH, {}, ["hyperball", "zeros"]),
        (Muon, dict(hyperball=True, weight_decay=0.1), ["weight_decay = 0.1", "set weight_decay = 0.0"]),
        (Muon, dict(hyperball=True, update_floor=0.1), ["update_floor = 0.1"]),
        (Muon, dict(hyperball=True, radial_brake=0.5), ["set radial_brake = 1.0"]),
        (Muon, dict(floor_by_row=True), ["update_floor", "0.35"]),
        (Muon, dict(radial_brake=1.5), ["radial_brake = 1.5", "<= 1"]),
    ],
)  # fmt: skip
def test_constraints_that_cannot_hold_are_refused(rule: Any, options: dict[str, Any], words: list[str]) -> None:
    weight = nn.Parameter(torch.zeros(2, 4, 3))
    weight.data[0] = 1
    with pytest.raises(ValueError) as refusal:
        rule([("blocks.0.out", weight)], flatten=False, **options)
    assert all(word in str(refusal.value) for word in words)
