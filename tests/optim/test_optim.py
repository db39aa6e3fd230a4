"""Muon and Aurora against independent references; the base class's promises; routing."""

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.polar_speed import exact_aurora
from model import GPT, ModelConfig
from optim import (
    RULES as RULE_CLASSES,
)
from optim import (
    TORCH_OPTIMIZERS,
    Aurora,
    MatrixOptimizer,
    Muon,
    NorMuon,
    RiemannianAurora,
    UNorMuon,
    build_optimizers,
    routing_table,
)
from optim.aurora import aurora_polar
from optim.polar import polar
from tests.matrices import randn, uneven

Make = Callable[..., MatrixOptimizer]
RULES = pytest.mark.parametrize(
    "rule",
    [Muon, NorMuon, UNorMuon, Aurora, partial(Aurora, variant="paper"), partial(Aurora, variant="warm", beta=0.1),
     partial(RiemannianAurora, outer_steps=1)],
    ids=["muon", "normuon", "unormuon", "aurora", "paper", "warm", "riemannian"],
)  # fmt: skip


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


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("shape", [(61, 23), (23, 61)], ids=["tall", "wide"])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_aurora_without_storing_the_scaled_matrix_is_its_definition(
    shape: tuple[int, int], form: str, dtype: torch.dtype, kernels: str, iterations: int
) -> None:
    """Scales folded into the products, in every format and form, against float64 with d * M written out."""
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


# Promises of the base class


@RULES
@pytest.mark.usefixtures("in_float64")
def test_stacked_and_grouped_matrices_move_as_if_each_were_alone(rule: Make) -> None:
    """[2, 3, m, n] is six matrices; another parameter of the same shape shares their batch."""
    alone = [nn.Parameter(randn(12, 7, seed=i).double()) for i in range(7)]
    stacked = nn.Parameter(torch.stack([p.detach() for p in alone[:6]]).view(2, 3, 12, 7))
    other = nn.Parameter(alone[6].detach().clone())
    together, apart = rule([stacked, other], flatten=False), [rule([p]) for p in alone]
    for step in range(4):
        gradients = [uneven(12, 7, seed=step * 10 + i).double() for i in range(7)]
        stacked.grad, other.grad = torch.stack(gradients[:6]).view(2, 3, 12, 7), gradients[6]
        together.step()
        for p, optimizer, gradient in zip(alone, apart, gradients, strict=True):
            p.grad = gradient
            optimizer.step()
    torch.testing.assert_close(stacked.view(6, 12, 7), torch.stack(alone[:6]), rtol=0, atol=1e-9)
    torch.testing.assert_close(other, alone[6], rtol=0, atol=1e-9)


@RULES
@pytest.mark.usefixtures("in_float64")
def test_parameters_without_gradient_are_skipped_and_resume_from_their_own_momentum(rule: Make) -> None:
    """a, b, c share a bank; b misses step 1. It must look as if b had an optimizer of its own."""
    shared, alone = ([nn.Parameter(randn(9, 4, seed=i).double()) for i in range(3)] for _ in range(2))
    together, apart = rule(shared), [rule([p]) for p in alone]
    for step in range(4):
        for i in range(3):
            gradient = None if (i, step) == (1, 1) else uneven(9, 4, seed=5 * step + i).double()
            shared[i].grad, alone[i].grad = gradient, gradient
        together.step()
        for optimizer in apart:
            optimizer.step()
    for p, q in zip(shared, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


@RULES
def test_zero_gradient_gives_zero_update(rule: Make) -> None:
    weight = nn.Parameter(randn(6, 4))
    before = weight.detach().clone()
    weight.grad = torch.zeros(6, 4)
    rule([weight]).step()
    assert torch.equal(weight, before)


@RULES
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_gradient_is_refused_by_name_and_nothing_moves(rule: Make, value: float) -> None:
    named = [
        ("first", nn.Parameter(randn(6, 4))),
        ("second", nn.Parameter(randn(3, 4))),
        ("third", nn.Parameter(randn(6, 4))),
    ]
    optimizer = rule(named)
    for _, p in named:
        p.grad = randn(*p.shape)
    optimizer.step()
    weights, state = [p.detach().clone() for _, p in named], copy.deepcopy(optimizer.state_dict()["state"])
    named[2][1].grad[1, 1] = value
    with pytest.raises(FloatingPointError, match="third"):
        optimizer.step()
    assert all(torch.equal(p, before) for (_, p), before in zip(named, weights, strict=True))
    for i, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(entry["momentum_buffer"], state[i]["momentum_buffer"])


@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_dict_round_trip_continues_exactly(rule: Make, dtype: torch.dtype) -> None:
    def make() -> tuple[list[nn.Parameter], MatrixOptimizer]:
        params = [nn.Parameter(randn(8, 4, seed=i).to(dtype)) for i in range(2)]
        return params, rule(params, weight_decay=0.1)

    def advance(params: list[nn.Parameter], optimizer: MatrixOptimizer, steps: range) -> None:
        for step in steps:
            for i, p in enumerate(params):
                p.grad = uneven(8, 4, seed=7 * step + i).to(dtype)
            optimizer.step()

    whole, whole_optimizer = make()
    advance(whole, whole_optimizer, range(6))
    first, first_optimizer = make()
    advance(first, first_optimizer, range(3))
    second, second_optimizer = make()
    for p, q in zip(second, first, strict=True):
        p.data.copy_(q)
    second_optimizer.load_state_dict(copy.deepcopy(first_optimizer.state_dict()))
    assert all(t.dtype == torch.float32 for s in second_optimizer.state.values() for t in s.values())
    advance(second, second_optimizer, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(whole, second, strict=True))


def test_bfloat16_parameters_do_not_lose_small_updates() -> None:
    """1000 steps of 1e-5 on weights near 1, where bfloat16 steps are 0.0078: alone, none would register."""
    weight, reference = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)), nn.Parameter(torch.ones(4, 4))
    optimizers = [Muon([weight], lr=1e-5), Muon([reference], lr=1e-5)]
    gradient = randn(4, 4)
    for _ in range(1000):
        weight.grad, reference.grad = gradient.bfloat16(), gradient.bfloat16().float()
        for optimizer in optimizers:
            optimizer.step()
    assert (reference - 1).abs().max() > 0.005
    assert torch.equal(weight, reference.bfloat16())


def test_closure_scheduler_groups_and_tensor_rate() -> None:
    a, b = nn.Parameter(randn(6, 4)), nn.Parameter(randn(6, 4, seed=1))
    optimizer = Muon([dict(params=[a], lr=torch.tensor(0.1))], momentum=0.0, nesterov=False, polar_method="svd")
    optimizer.add_param_group(dict(params=[b], lr=0.2))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = [a.detach().clone(), b.detach().clone()]

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (a * randn(6, 4, seed=2)).sum() + (b * randn(6, 4, seed=3)).sum()
        loss.backward()
        return loss

    expected = (before[0] * randn(6, 4, seed=2)).sum() + (before[1] * randn(6, 4, seed=3)).sum()
    assert optimizer.step(closure).item() == pytest.approx(expected.item())  # the loss before the step
    scheduler.step()
    length = math.sqrt(4) * math.sqrt(6 / 4)  # Frobenius norm of a 6x4 polar factor, times the spectral scale
    assert (a - before[0]).norm().item() == pytest.approx(0.1 * length, rel=1e-4)
    assert (b - before[1]).norm().item() == pytest.approx(0.2 * length, rel=1e-4)
    assert optimizer.param_groups[1]["lr"] == pytest.approx(0.1)


def test_deepcopy_is_independent() -> None:
    weight = nn.Parameter(randn(6, 4))
    optimizer = Muon([weight])
    weight.grad = randn(6, 4, seed=1)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    buffer = optimizer.state_dict()["state"][0]["momentum_buffer"].clone()
    (twin_weight,) = twin.param_groups[0]["params"]
    twin_weight.grad = randn(6, 4, seed=2)
    twin.step()
    assert torch.equal(optimizer.state_dict()["state"][0]["momentum_buffer"], buffer)
    assert not torch.equal(twin.state_dict()["state"][0]["momentum_buffer"], buffer)


@RULES
def test_a_pickle_and_a_saved_file_go_on_exactly(rule: Make, tmp_path: Path) -> None:
    """Two steps, then through pickle (weights and all) and through torch.save with weights_only, two steps more."""
    weight = nn.Parameter(randn(8, 4))
    optimizer = rule([weight], lr=0.1)
    for step in range(2):
        weight.grad = uneven(8, 4, seed=step)
        optimizer.step()
    unpickled = pickle.loads(pickle.dumps(optimizer))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = nn.Parameter(weight.detach().clone())
    loaded = rule([other])
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert loaded.param_groups[0]["lr"] == 0.1
    results = []
    for each in (optimizer, unpickled, loaded):
        (p,) = each.param_groups[0]["params"]
        for step in (2, 3):
            p.grad = uneven(8, 4, seed=step)
            each.step()
        results.append(p.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@RULES
@pytest.mark.usefixtures("in_float64")
def test_groups_added_later_leave_the_others_state_alone(rule: Make) -> None:
    first, second, alone = (nn.Parameter(randn(8, 4, seed=i).double()) for i in (0, 1, 0))
    optimizer, reference = rule([first]), rule([alone])
    for step in range(4):
        if step == 2:
            optimizer.add_param_group(dict(params=[second], lr=0.5, momentum=0.5, weight_decay=0.1, scale="none"))
        for p in (first, second, alone):
            p.grad = uneven(8, 4, seed=step).double()
        before = second.detach().clone()
        optimizer.step()
        reference.step()
        assert torch.equal(second, before) == (step < 2)
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-9)


@RULES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_float_type_follows_float32_to_its_rounding(rule: Make, dtype: torch.dtype) -> None:
    weight, reference = nn.Parameter(randn(8, 4).to(dtype)), nn.Parameter(randn(8, 4).to(dtype).float())
    optimizers = [rule([p], lr=0.1) for p in (weight, reference)]
    for step in range(5):
        gradient = uneven(8, 4, seed=step).to(dtype)
        weight.grad, reference.grad = gradient, gradient.float()
        for optimizer in optimizers:
            optimizer.step()
    assert weight.dtype == dtype
    torch.testing.assert_close(weight.float(), reference, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_state_is_in_sight_where_torch_has_it() -> None:
    """`optimizer.state` of one process shows the live tensors, for utilities and for whoever looks."""
    weight = nn.Parameter(randn(2, 6, 4))
    optimizer = NorMuon([weight])
    for step in range(2):
        weight.grad = randn(2, 6, 4, seed=step)
        optimizer.step()
        assert set(optimizer.state[weight]) == {"momentum_buffer", "row_square"}
        saved = optimizer.state_dict()["state"][0]["momentum_buffer"]
        assert optimizer.state[weight]["momentum_buffer"].shape == weight.shape
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], saved)
    expected = 0.95 * 0.05 * randn(2, 6, 4) + 0.05 * randn(2, 6, 4, seed=1)
    torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"], expected)


@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
def test_a_rule_may_replace_its_state_as_well_as_change_it(deferred: bool) -> None:
    class InPlace(MatrixOptimizer):
        def orthogonalize(
            self, update: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]
        ) -> torch.Tensor:
            state.setdefault("mean", torch.zeros_like(update)).lerp_(update, 0.3)
            return state["mean"].clone()

    class Replaced(MatrixOptimizer):
        def orthogonalize(
            self, update: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]
        ) -> torch.Tensor:
            state["mean"] = torch.lerp(state.get("mean", torch.zeros_like(update)), update, 0.3)
            return state["mean"]

    weights = []
    for rule in (InPlace, Replaced):
        params = [nn.Parameter(randn(6, 4, seed=i)) for i in range(2)]
        optimizer = rule(params, defer_check=deferred)
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = None if (i, step) == (1, 2) else randn(6, 4, seed=10 * step + i)
            optimizer.step()
        weights.append(torch.stack([p.detach() for p in params]))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)


def test_one_cycle_drives_rate_and_momentum_and_hooks_see_every_step() -> None:
    weight = nn.Parameter(randn(6, 4))
    optimizer = Muon([weight], lr=0.1, polar_method="svd")
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.4, total_steps=8)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    momenta, lengths = set(), []
    for step in range(8):
        weight.grad, before = randn(6, 4, seed=step), weight.detach().clone()
        momenta.add(round(optimizer.param_groups[0]["momentum"], 3))
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        lengths.append((weight.detach() - before).norm().item() / rate)
        if step < 7:
            scheduler.step()
    assert seen == ["before", "after"] * 8
    assert len(momenta) > 3
    assert lengths == pytest.approx([2 * math.sqrt(6 / 4)] * 8, rel=0.03)  # the last rate is near rounding


@pytest.mark.parametrize("option", ["differentiable", "maximize", "foreach", "capturable", "fused", "betas"])
def test_options_of_other_optimizers_are_refused_by_name(option: str) -> None:
    for rule in (Muon, NorMuon, Aurora, RiemannianAurora):
        with pytest.raises(TypeError, match=option):
            rule([nn.Parameter(torch.ones(2, 2))], **{option: True})


def test_sparse_gradients_are_refused_by_name() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([("table", weight)])
    weight.grad = torch.ones(4, 4).to_sparse()
    with pytest.raises(ValueError, match=r"gradient of table is sparse.*dense"):
        optimizer.step()
    assert torch.equal(weight.detach(), torch.ones(4, 4))


def test_nothing_of_a_refused_step_is_left_over() -> None:
    """The first of two banks has been read when the second is refused."""
    params, fresh = ([nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(3, 2, 2))] for _ in range(2))
    optimizer, reference = Muon(params, row_blocks=2), Muon(fresh, row_blocks=2)
    params[0].grad, params[1].grad = randn(4, 4, seed=5), torch.ones(3, 2, 2).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    for each in (params, fresh):
        each[0].grad, each[1].grad = randn(4, 4), randn(3, 2, 2)
    optimizer.step()
    reference.step()
    assert all(torch.equal(p, q) for p, q in zip(params, fresh, strict=True))


def test_load_hooks_have_the_last_word() -> None:
    weight = nn.Parameter(randn(6, 4))
    optimizer = Muon([weight])
    weight.grad = randn(6, 4, seed=1)
    optimizer.step()

    def halve(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {i: {k: v / 2 for k, v in entry.items()} for i, entry in state_dict["state"].items()}
        return {**state_dict, "state": state}

    other = Muon([nn.Parameter(weight.detach().clone())])
    other.register_load_state_dict_pre_hook(halve)
    other.load_state_dict(optimizer.state_dict())
    (loaded,) = other.state_dict()["state"].values()
    torch.testing.assert_close(loaded["momentum_buffer"], 0.5 * 0.05 * randn(6, 4, seed=1))


def test_master_weights_of_other_weights_are_not_taken_up() -> None:
    """Weights that were put in place after saving win over the master copy that was saved."""
    weight = nn.Parameter(randn(6, 4).bfloat16())
    optimizer = Muon([weight], lr=1e-3)
    weight.grad = randn(6, 4, seed=1).bfloat16()
    optimizer.step()
    saved = optimizer.state_dict()
    weight.data.fill_(5)
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert (weight - 5).abs().max() < 0.1


def test_an_empty_group_is_nothing_to_do() -> None:
    Muon([dict(params=[])]).step()


@pytest.mark.parametrize(
    ("rule", "settings", "words"),
    [
        (Muon, dict(lr=-1.0), ["lr = -1.0", ">= 0; 0.02"]),
        (Muon, dict(momentum=1.0), ["momentum = 1.0", ">= 0 and < 1"]),
        (Muon, dict(scale="big"), ["scale = 'big'", "spectral"]),
        (Muon, dict(polar_method="qr"), ["'qr'", "polar_express"]),
        (Aurora, dict(iterations=0), ["iterations = 0", ">= 1; 2,"]),
        (Aurora, dict(beta=2.0), ["beta = 2.0", "0.5"]),
        (Aurora, dict(sides="left"), ["sides = 'left'", "both"]),
        (Aurora, dict(variant="hot"), ["variant = 'hot'", "warm"]),
        (Muon, dict(row_blocks=3), ["row_blocks = 3", "2 rows", "1 keeps"]),
        (Muon, dict(comm_dtype=torch.float16), ["comm_dtype = torch.float16", "torch.bfloat16"]),
        (NorMuon, dict(beta2=1.0), ["beta2 = 1.0", "0.95"]),
        (RiemannianAurora, dict(outer_steps=0), ["outer_steps = 0", ">= 1; 3, the default, works"]),
        (RiemannianAurora, dict(step_size=0.0), ["step_size = 0.0", "> 0 and <= 1; 0.1"]),
        (RiemannianAurora, dict(sides="left"), ["sides = 'left'", "both"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_settings_are_refused(rule: Make, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        rule([nn.Parameter(torch.ones(2, 2))], **settings)
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize(
    ("rule", "option", "values", "words"),
    [
        (Muon, "lr", ["0.1", None, True, 1j, torch.ones(2)], ["a real number", "lr = 0.02"]),
        (Muon, "momentum", ["0.9", None, False], ["a real number", "momentum = 0.95"]),
        (Muon, "weight_decay", ["0.1", None, True], ["a real number", "weight_decay = 0.0"]),
        (Muon, "row_blocks", [2.0, "1", None, True], ["an integer", "row_blocks = 1"]),
        (Muon, "polar_steps", [2.5, 5.0, "5", True], ["an integer or None"]),
        (Muon, "flatten", ["no", 0, 1], ["True or False or None"]),
        (Muon, "cautious", ["false", None, 1], ["True or False", "cautious = False"]),
        (Muon, "nesterov", ["no", None, 0], ["True or False", "nesterov = True"]),
        (Muon, "scale", [["a"], None, 1], ["a string", "spectral"]),
        (Muon, "polar_method", [["a"], None], ["a string", "polar_express"]),
        (NorMuon, "beta2", ["0.9", None], ["a real number", "0.95"]),
        (Aurora, "iterations", [2.0, "2"], ["an integer", "iterations = 2"]),
        (Aurora, "variant", [["warm"]], ["a string"]),
        (RiemannianAurora, "step_size", ["0.1"], ["a real number"]),
        (RiemannianAurora, "cg_steps", [2.5], ["an integer"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_settings_of_another_type_are_refused(rule: Make, option: str, values: list[Any], words: list[str]) -> None:
    for value in values:
        with pytest.raises(ValueError) as refusal:
            rule([nn.Parameter(torch.ones(2, 2))], **{option: value})
        told = str(refusal.value)
        assert all(word in told for word in [f"{option} = {value!r} is of type {type(value).__name__}", *words]), told


def test_numbers_may_be_numpy_s_or_a_tensor_s() -> None:
    p = nn.Parameter(torch.ones(2, 2))
    for lr in (1, np.float32(0.1), torch.tensor(0.1)):
        optimizer = Muon([p], lr=lr, polar_steps=np.int64(3), row_blocks=np.int64(2), flatten=True)
        p.grad = randn(2, 2)
        optimizer.step()


def test_vectors_are_sent_to_adamw_and_a_refused_group_leaves_no_trace() -> None:
    optimizer = Muon([nn.Parameter(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=r"gain has shape \(4,\).*AdamW"):
        Muon([("gain", nn.Parameter(torch.ones(4)))])
    with pytest.raises(ValueError, match="AdamW"):
        optimizer.add_param_group(dict(params=[nn.Parameter(torch.ones(4))]))
    assert len(optimizer.param_groups) == 1


# Routing


def config(**changes: Any) -> SimpleNamespace:
    settings: dict[str, Any] = dict(
        matrix_optimizer="aurora", matrix_lr=0.02, matrix_weight_decay=0.1, matrix_scale="none", cautious=False,
        momentum=0.95,
        polar_method="auto", polar_steps=0, kernels="auto", comm_dtype="float32", aurora_variant="release",
        aurora_iterations=2, aurora_beta=0.5, aurora_sides="both", embed_lr=0.3, head_lr=0.004, scalar_lr=0.015,
        adam_betas=(0.8, 0.95), adam_eps=1e-10, weight_decay=0.01,
    )  # fmt: skip
    return SimpleNamespace(**{**settings, **changes})


@pytest.mark.parametrize("name", [*RULE_CLASSES, *TORCH_OPTIMIZERS])
def test_every_parameter_is_moved_once_by_the_optimizer_it_belongs_to(name: str) -> None:
    model = GPT(ModelConfig(vocab_size=50, num_layers=2, num_heads=2, head_dim=8, model_dim=16, seq_len=8))
    model.gain = nn.Parameter(torch.ones(16))  # as a fork might add
    matrix, rest = optimizers = build_optimizers(model, config(matrix_optimizer=name))
    assert type(matrix).__name__.lower() == name.replace("_", "")
    assert type(rest) is torch.optim.AdamW
    moved = {group["name"]: set(group["params"]) for o in optimizers for group in o.param_groups}
    assert moved["matrix"] == set(model.blocks.parameters())
    assert moved["embed"] == {model.embed.weight}
    assert moved["head"] == {model.head.weight}
    assert moved["scalar"] == {model.gain}
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for o in optimizers for group in o.param_groups}
    assert rates == {"matrix": (0.02, 0.1), "embed": (0.3, 0.01), "head": (0.004, 0.01), "scalar": (0.015, 0.01)}
    table = routing_table(optimizers)
    count = sum(p.numel() for p in model.blocks.parameters())
    assert f"matrix: 8 tensors, {count:,} parameters" in table
    assert ("torch kernels" in table) == isinstance(matrix, MatrixOptimizer)


def test_kernels_that_cannot_run_are_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match=r"kernels = 'triton' needs a CUDA GPU.*on cpu"):
        Muon([weight], kernels="triton")
    with pytest.raises(ValueError, match=r"kernels = 'fast' is unknown"):
        Aurora([weight], kernels="fast")


def test_kernels_are_the_machine_s_own_and_no_part_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    saved = Muon([nn.Parameter(torch.zeros(4, 4))], kernels="triton").state_dict()
    optimizer = Muon([nn.Parameter(torch.zeros(4, 4))], kernels="torch")
    optimizer.load_state_dict(saved)
    assert optimizer.kernels == copy.deepcopy(optimizer).kernels == "torch"


def tiny_gpt(**changes: Any) -> GPT:
    shape = dict(vocab_size=50, num_layers=2, num_heads=2, head_dim=8, model_dim=16, seq_len=8)
    return GPT(ModelConfig(**{**shape, **changes}))


def routes(model: nn.Module) -> dict[str, set[nn.Parameter]]:
    return {group["name"]: set(group["params"]) for o in build_optimizers(model, config()) for group in o.param_groups}


@pytest.mark.parametrize("wrappers", ["_orig_mod", "module", "module _orig_mod", "_fsdp_wrapped_module", "model"])
def test_a_wrapped_model_is_routed_as_without(wrappers: str) -> None:
    """By torch.compile, DistributedDataParallel, both, and others, around the whole or around its parts."""
    model = tiny_gpt()
    expected = routes(model)
    assert len(expected) == 3
    whole: nn.Module = model
    for name in reversed(wrappers.split()):
        whole = nn.ModuleDict({name: whole})
    assert routes(whole) == expected
    model.head, model.embed = (nn.ModuleDict({wrappers.split()[0]: part}) for part in (model.head, model.embed))
    model.blocks[1] = nn.ModuleDict({wrappers.split()[0]: model.blocks[1]})
    assert routes(whole) == expected


@pytest.mark.parametrize(
    "wrap",
    [
        lambda gpt: nn.Sequential(gpt),
        lambda gpt: nn.ModuleList([gpt]),
        lambda gpt: nn.ModuleDict({"0": gpt}),
        lambda gpt: nn.Sequential(nn.ModuleDict({"module": gpt})),
        lambda gpt: nn.ModuleList([nn.Sequential(gpt), nn.Identity()]),
    ],
    ids=["sequential", "list", "dict", "sequential module", "list of two"],
)
def test_a_model_in_a_list_is_routed_as_without(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_gpt()
    attention = model.blocks[0].attention
    attention.head, attention.bias_table = nn.Linear(16, 4, bias=False), nn.Embedding(8, 2)
    expected = routes(model)
    assert expected["head"] == {model.head.weight}
    assert attention.head.weight in expected["matrix"]
    assert routes(wrap(model)) == expected


def test_every_model_has_its_head_and_blocks_alone_have_none() -> None:
    pair = nn.ModuleList([tiny_gpt(), tiny_gpt()])
    assert routes(pair)["head"] == {model.head.weight for model in pair}
    blocks = tiny_gpt().blocks
    blocks[0].attention.head = nn.Linear(16, 4, bias=False)
    assert set(routes(blocks)) == {"matrix"}
    around = nn.ModuleDict(dict(trunk=tiny_gpt(), head=nn.Linear(16, 3, bias=False)))
    assert routes(around)["head"] == {around["head"].weight, around["trunk"].head.weight}


def test_a_parametrized_embedding_is_one() -> None:
    model = tiny_gpt()
    nn.utils.parametrizations.weight_norm(model.embed)
    assert routes(model)["embed"] == set(model.embed.parameters())


def test_a_head_of_a_block_is_a_matrix_and_a_bias_of_the_head_is_the_head_s() -> None:
    model = tiny_gpt()
    model.blocks[0].attention.head = nn.Linear(16, 4, bias=False)
    model.head = nn.Linear(16, 64)
    assert model.blocks[0].attention.head.weight in routes(model)["matrix"]
    assert routes(model)["head"] == set(model.head.parameters())


def test_a_tied_head_and_a_bag_are_embeddings() -> None:
    model = tiny_gpt()
    model.bag = nn.EmbeddingBag(50, 16)
    model.head.weight = model.embed.weight
    assert routes(model) == {"matrix": set(model.blocks.parameters()), "embed": {model.embed.weight, model.bag.weight}}


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_model_without_matrices_is_refused_and_one_of_matrices_alone_is_not(name: str) -> None:
    with pytest.raises(ValueError, match=f"matrix_optimizer = '{name}': the model has no matrices"):
        build_optimizers(
            nn.ModuleDict(dict(embed=nn.Embedding(8, 4), head=nn.Linear(4, 8))), config(matrix_optimizer=name)
        )
    (only,) = build_optimizers(nn.Linear(4, 8, bias=False), config(matrix_optimizer=name))
    assert only.param_groups[0]["name"] == "matrix"


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def other_default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    yield request.param
    torch.set_default_dtype(torch.float32)


@RULES
@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
def test_torch_s_default_dtype_changes_nothing(rule: Make, deferred: bool, other_default_dtype: torch.dtype) -> None:
    """Weights with a master copy and without, gradients that are missing, a state that is loaded: the same bits."""
    results = []
    for default in (torch.float32, other_default_dtype):
        torch.set_default_dtype(default)
        params = [nn.Parameter(randn(8, 4, seed=i).to((torch.float32, torch.bfloat16)[i % 2])) for i in range(4)]
        optimizer = rule(params, lr=0.0213, weight_decay=0.1, defer_check=deferred)
        for step in range(4):
            for i, p in enumerate(params):
                p.grad = None if (i, step) in ((0, 1), (1, 2)) else randn(8, 4, seed=10 * step + i).to(p.dtype)
            optimizer.step()
            if step == 2:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        state = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
        assert {value.dtype for value in state} == {torch.float32}
        results.append([*params, *state])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_unknown_matrix_optimizer_is_refused() -> None:
    model = GPT(ModelConfig(vocab_size=50, num_layers=1, num_heads=1, head_dim=8, model_dim=8, seq_len=8))
    with pytest.raises(ValueError, match=r"matrix_optimizer = 'lion'.*muon"):
        build_optimizers(model, config(matrix_optimizer="lion"))
