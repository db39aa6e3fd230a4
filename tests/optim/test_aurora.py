"""Muon and Aurora against independent references: definitions, row norms, which matrices are balanced."""

import math

import pytest
import torch
from torch import nn

from benchmarks.polar_speed import exact_aurora
from optim import Aurora, Muon
from optim.aurora import aurora_polar
from optim.polar import polar
from tests.matrices import randn, uneven

pytestmark = pytest.mark.usefixtures("float32_products")


# Muon


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)], ids=str)
@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("scale", ["spectral", "match_rms_adamw", "none"])
@pytest.mark.usefixtures("in_float64")
def test_muon_takes_the_steps_of_torch_optim_muon(
    shape: tuple[int, int], nesterov: bool, weight_decay: float, scale: str
) -> None:
    """torch's Muon runs Newton-Schulz in bfloat16, but here."""
    ours, theirs = (nn.Parameter(randn(*shape, seed=9).double()) for _ in range(2))
    settings = dict(lr=0.02, momentum=0.9, nesterov=nesterov, weight_decay=weight_decay)
    optimizer = Muon([ours], polar_method="quintic", scale=scale, **settings)
    if scale == "none":  # not known there: their rate without their scale, decaying as much
        factor = math.sqrt(max(1, shape[0] / shape[1]))
        settings.update(lr=0.02 / factor, weight_decay=weight_decay * factor)
    adjust = "match_rms_adamw" if scale == "match_rms_adamw" else "original"
    reference = torch.optim.Muon([theirs], adjust_lr_fn=adjust, **settings)
    for step in range(20):
        ours.grad, theirs.grad = (randn(*shape, seed=step).double() for _ in range(2))
        optimizer.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("nesterov", [True, False], ids=["nesterov", "plain"])
@pytest.mark.usefixtures("in_float64")
def test_muon_follows_its_definition_in_float64(nesterov: bool) -> None:
    weight = nn.Parameter(randn(12, 5, seed=3).double())
    expected, momentum = weight.detach().clone(), torch.zeros(12, 5, dtype=torch.float64)
    optimizer = Muon([weight], lr=0.1, weight_decay=0.2, nesterov=nesterov, polar_method="svd")
    for step in range(20):
        gradient = randn(12, 5, seed=step).double()
        weight.grad = gradient.clone()
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        direction = 0.95 * momentum + 0.05 * gradient if nesterov else momentum
        W, _, Vh = torch.linalg.svd(direction, full_matrices=False)
        expected = expected * (1 - 0.1 * 0.2) - 0.1 * math.sqrt(12 / 5) * (W @ Vh)
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-9)
        assert torch.equal(weight.grad, gradient)


# Aurora


def reference_aurora(M: torch.Tensor, iterations: int, beta: float) -> torch.Tensor:
    """The release definition, a line at a time, with an exact polar factor."""
    if M.size(0) < M.size(1):
        return reference_aurora(M.T, iterations, beta).T
    m, n = M.shape
    d = torch.stack([1 / row.norm() for row in M])
    for k in range(iterations):
        W, _, Vh = torch.linalg.svd(torch.diag(d) @ M, full_matrices=False)
        U = W @ Vh
        if k < iterations - 1:
            d = torch.stack([d[i] * ((n / m) / U[i].norm() ** 2) ** beta for i in range(m)])
    return U


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)], ids=["tall", "wide"])
@pytest.mark.parametrize(("iterations", "beta"), [(1, 0.5), (2, 0.5), (3, 0.25)])
@pytest.mark.usefixtures("in_float64")
def test_aurora_follows_its_definition(shape: tuple[int, int], iterations: int, beta: float) -> None:
    M = uneven(*shape).double()
    expected = reference_aurora(M, iterations, beta)
    torch.testing.assert_close(aurora_polar(M, iterations, beta, "svd"), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(512, 128), (128, 512)], ids=["tall", "wide"])
@pytest.mark.parametrize("method", ["svd", "simple_quintic"])
def test_aurora_moves_every_neuron_equally_and_muon_does_not(shape: tuple[int, int], method: str) -> None:
    """Row norms of the update (columns of a wide one) within 5% of sqrt(n/m), from log-normal gradient rows."""
    norms = {}
    for rule in (Muon, Aurora):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = uneven(*shape)
        rule([weight], lr=1.0, scale="none", polar_method=method).step()
        norms[rule] = weight.detach().norm(dim=1 if shape[0] > shape[1] else 0) / math.sqrt(min(shape) / max(shape))
    assert (norms[Aurora] - 1).abs().max() < 0.05
    assert norms[Muon].min() < 0.2
    assert norms[Muon].max() > 1.5


def test_aurora_with_polar_express_is_equal_about_a_mean_near_one() -> None:
    """Five Polar Express steps leave singular values about 2.5% high, which moves all rows alike."""
    norms = aurora_polar(uneven(512, 128), dtype=torch.float32).norm(dim=1) / math.sqrt(128 / 512)
    assert (norms / norms.mean() - 1).abs().max() < 0.05
    assert abs(norms.mean() - 1) < 0.05


@pytest.mark.parametrize("iterations", [1, 2])
def test_zero_rows_do_not_count(iterations: int) -> None:
    """In float16 either: the other rows get what they would alone."""
    M = uneven(48, 10)
    M[M.norm(dim=1).argsort()[12:]] = 0
    rows = M.any(dim=1)
    for dtype, rounding in ((torch.float32, 1e-4), (torch.float16, 0.01)):
        U = aurora_polar(M, iterations, beta=0, dtype=dtype)
        alone = aurora_polar(M[rows], iterations, beta=0, dtype=dtype)
        assert (U[~rows] == 0).all()
        assert (U[rows] - alone).norm() <= rounding * alone.norm()


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("shape", [(61, 23), (23, 61)], ids=["tall", "wide"])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_aurora_is_its_definition(
    shape: tuple[int, int], form: str, dtype: torch.dtype, kernels: str, iterations: int
) -> None:
    """In every format and form, by either kernels, against float64."""
    if kernels == "triton":
        pytest.importorskip("triton")
    M = torch.stack([uneven(*shape), uneven(*shape, seed=4)])
    expected = exact_aurora(M, iterations)
    result = aurora_polar(M, iterations, dtype=dtype, kernels=kernels, form=form).double()
    assert (result - expected).norm() <= (1e-3 if dtype == torch.float32 else 0.03) * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("shape", [(2048, 768), (768, 2048), (3072, 768)], ids=str)
def test_two_iterations_put_rows_of_real_shapes_within_three_percent(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Log-normal rows, the default method. Muon's rows of the same matrix differ tenfold."""
    M, is_tall = uneven(*shape), shape[0] > shape[1]
    share = math.sqrt(min(shape) / max(shape))
    norms = aurora_polar(M, 2, dtype=dtype).float().norm(dim=1 if is_tall else 0) / share
    assert (norms - 1).abs().max() < 0.03
    muon = polar(M, dtype=dtype).float().norm(dim=1 if is_tall else 0)
    assert muon.max() > 10 * muon.min()


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)], ids=["tall", "wide"])
@pytest.mark.parametrize("sides", ["both", "tall", "wide"])
def test_sides_choose_who_is_balanced(shape: tuple[int, int], sides: str) -> None:
    moved = []
    for rule, settings in ((Muon, {}), (Aurora, dict(sides=sides))):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = uneven(*shape)
        rule([weight], **settings).step()
        moved.append(weight.detach())
    is_tall = shape[0] > shape[1]
    balanced = sides == "both" or (sides == "tall") == is_tall
    assert torch.equal(moved[0], moved[1]) != balanced


def test_aurora_leaves_square_matrices_to_the_polar_factor() -> None:
    M = randn(16, 16)
    assert torch.equal(aurora_polar(M, dtype=torch.float32), polar(M, dtype=torch.float32))


def test_aurora_with_zero_rows_and_tiny_or_huge_rows_is_finite() -> None:
    M = uneven(32, 8)
    M[3] = 0
    M[5] *= 1e-18
    M[7] *= 1e18
    U = aurora_polar(M, dtype=torch.float32)
    assert U.isfinite().all()
    assert (U[3] == 0).all()
    assert (U[[5, 7]].norm(dim=1) / math.sqrt(8 / 32) - 1).abs().max() < 0.15
