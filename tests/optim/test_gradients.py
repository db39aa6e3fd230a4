"""A step in phases, and clipping: the norm, what is scaled, and which optimizers it can matter to.

tests/optim/test_sharding.py has the same on several ranks.
"""

import copy
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from optim import Muon, clip_gradients, finish_reduction, start_reduction
from tests.matrices import randn
from tests.optim import rules

pytestmark = [pytest.mark.usefixtures("float32_products"), pytest.mark.filterwarnings("ignore:PolarGrad")]
Make = Callable[..., torch.optim.Optimizer]
Run = tuple[dict[str, nn.Parameter], list[torch.optim.Optimizer]]


def run() -> Run:
    """Matrices in two banks (one without gradient, one of 16 bits) and vectors (one without), each with gradients."""
    shapes = dict(a=(6, 4), b=(6, 4), silent=(6, 4), half=(5, 3), gain=(7,), scale=(2,), idle=(3,))
    params = {name: nn.Parameter(randn(*shape, seed=i)) for i, (name, shape) in enumerate(shapes.items())}
    params["half"].data = params["half"].data.bfloat16()
    for i, (name, p) in enumerate(params.items()):
        if name not in ("silent", "idle"):
            p.grad = 10 ** (i - 2) * randn(*p.shape, seed=10 + i).to(p.dtype)
    matrices = [(name, p) for name, p in params.items() if p.ndim == 2]
    vectors = [p for p in params.values() if p.ndim == 1]
    return params, [Muon(matrices), torch.optim.SGD(vectors, lr=1.0)]


def gradients(params: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in params.items() if p.grad is not None}


@pytest.mark.parametrize("max_norm", [0.25, 1e9])
def test_the_norm_is_torch_s_and_what_moves_is_scaled_by_it(max_norm: float) -> None:
    params, optimizers = run()
    before = gradients(params)
    exact = [nn.Parameter(g.double()) for g in before.values()]
    for p in exact:
        p.grad = p.detach().clone()
    expected = torch.nn.utils.clip_grad_norm_(exact, max_norm)
    norm = clip_gradients(optimizers, max_norm)
    assert norm.shape == ()
    assert norm.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, gradient in gradients(params).items():
        factor = min(1, max_norm / norm.item()) if params[name].ndim == 1 else 1
        torch.testing.assert_close(gradient, factor * before[name])
    # ... as a step does that is given scaled gradients
    others, reference = run()
    for p in others.values():
        if p.grad is not None:
            p.grad *= min(1, max_norm / norm.item())
    for optimizer in [*optimizers, *reference]:
        optimizer.step()
    for name, p in params.items():
        torch.testing.assert_close(p, others[name])
    assert (params["gain"] - run()[0]["gain"]).norm() > 0


def test_phases_that_are_left_out_change_no_bit() -> None:
    results = []
    for phases in ([], [start_reduction], [finish_reduction], [start_reduction, finish_reduction, finish_reduction]):
        params, optimizers = run()
        for phase in phases:
            phase(optimizers)
        for optimizer in optimizers:
            optimizer.step()
        results.append(torch.cat([p.detach().float().flatten() for p in params.values()]))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["b", "gain"])
def test_a_norm_that_is_not_finite_scales_nothing_and_the_step_names_the_matrix(name: str, value: float) -> None:
    params, optimizers = run()
    params[name].grad.view(-1)[1] = value  # type: ignore[union-attr]
    before = gradients(params)
    assert not clip_gradients(optimizers, 0.1).isfinite()
    assert all(torch.equal(g[g.isfinite()], before[k][g.isfinite()]) for k, g in gradients(params).items())
    if name == "b":
        with pytest.raises(FloatingPointError, match="the gradient of b holds NaN or infinity"):
            optimizers[0].step()
    else:
        optimizers[0].step()


def test_gradients_of_zero_have_norm_zero_and_huge_ones_a_finite_norm() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    for value in (0.0, 1e30):
        weight.grad = torch.full((4, 4), value)
        optimizer = Muon([weight])
        assert clip_gradients([optimizer], 1.0).item() == pytest.approx(4 * value)
        optimizer.step()
    assert weight.isfinite().all()


def test_gradients_of_a_closure_are_the_step_s() -> None:
    (params, optimizers), (fresh, reference) = run(), run()

    def closure() -> float:
        for each in (params, fresh):
            each["a"].grad = randn(6, 4, seed=99)
        return 1.0

    finish_reduction(optimizers)
    assert optimizers[0].step(closure) == 1.0
    reference[0].step()
    assert torch.equal(params["a"], fresh["a"])


@pytest.mark.parametrize("skip", ["zero_grad", "start_reduction", "add_param_group"])
def test_gradients_of_a_step_that_was_skipped_are_forgotten(skip: str) -> None:
    params, optimizers = run()
    (fresh, reference), matrix = run(), optimizers[0]
    finish_reduction(optimizers)
    if skip == "zero_grad":
        matrix.zero_grad()
    elif skip == "start_reduction":
        start_reduction(optimizers)
    else:
        matrix.add_param_group(dict(params=[("late", nn.Parameter(randn(2, 2)))]))
    for each in (params, fresh):
        for name in ("a", "b"):
            each[name].grad = randn(6, 4, seed=99 + ord(name))
        each["half"].grad = randn(5, 3, seed=98).bfloat16()
    matrix.step()
    reference[0].step()
    assert all(torch.equal(params[name], fresh[name]) for name in ("a", "b", "half"))


RULES: dict[str, tuple[Make, bool]] = {  # and whether a constant factor on all gradients matters
    **{name: (make, not rules.is_scale_free(make)) for name, make in rules.RULES.items()},
    "adamw": (lambda params: torch.optim.AdamW(params, lr=0.02, eps=1e-20), False),
    "rmsprop": (lambda params: torch.optim.RMSprop(params, lr=0.02, eps=1e-20), False),
    "sgd": (lambda params: torch.optim.SGD(params, lr=0.02), True),
}


@pytest.mark.parametrize("shape", [(8, 4), (4, 8), (6, 6)], ids=["tall", "wide", "square"])
@pytest.mark.parametrize("name", RULES)
def test_which_optimizers_the_scale_of_gradients_matters_to(name: str, shape: tuple[int, int]) -> None:
    """Means, sums over 2^19 tokens, and what a loss scaled down gives: factors that round nothing. Clipping that hits
    every step alike changes nothing either for the rules that divide by the gradients' size."""
    make, matters = RULES[name]
    moved = []
    for factor in (1, 2**19, 2**-20):
        start = randn(*shape, seed=9)
        weight = nn.Parameter(start.clone())
        optimizer = make([weight])
        for step in range(4):
            weight.grad = factor * randn(*shape, seed=step)
            optimizer.step()
        moved.append(weight.detach() - start)
    assert moved[0].abs().max() > 0.01
    for other in moved[1:]:  # decompositions (SOAP's) round otherwise at another scale
        assert torch.allclose(moved[0], other, rtol=1e-5, atol=1e-5) != matters


def test_clipping_one_step_of_several_changes_muon_s_momentum_and_where_it_moves() -> None:
    weight = nn.Parameter(torch.zeros(8, 4))
    optimizers = [Muon([weight])]
    twin = copy.deepcopy(optimizers)
    for step, size in enumerate((1, 30, 1)):
        for each in (optimizers, twin):
            (p,) = each[0].param_groups[0]["params"]
            p.grad = size * randn(8, 4, seed=step)
            if each is optimizers:
                clip_gradients(each, 8.0)
            each[0].step()
    (p,) = twin[0].param_groups[0]["params"]
    kept, other = optimizers[0].state[weight]["momentum_buffer"], twin[0].state[p]["momentum_buffer"]
    sizes = [min(1, 8.0 / (size * randn(8, 4, seed=step).norm())) * size for step, size in enumerate((1, 30, 1))]
    expected = sum(0.95 ** (2 - step) * 0.05 * size * randn(8, 4, seed=step) for step, size in enumerate(sizes))
    torch.testing.assert_close(kept, expected)
    assert other.norm() > 2 * kept.norm()
    assert (weight - p).norm() > 0.1 * weight.norm()


def test_gradients_that_were_replaced_since_are_reduced_anew() -> None:
    """As model.zero_grad() leaves them, which the optimizer does not see."""
    weight = nn.Parameter(torch.zeros(8, 4))
    optimizers = [Muon([weight])]
    weight.grad = randn(8, 4, seed=0)
    clip_gradients(optimizers, 1e-3)
    weight.grad = randn(8, 4, seed=1)
    assert clip_gradients(optimizers, 1e9).item() == pytest.approx(randn(8, 4, seed=1).norm().item())


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_gradients_that_have_gradients_are_reduced_too() -> None:
    """As a hook of backward does it, in grad mode, after backward(create_graph=True)."""
    p = nn.Parameter(randn(4, 3))
    (p**3).sum().backward(create_graph=True)
    assert p.grad is not None and p.grad.requires_grad and torch.is_grad_enabled()
    optimizer = Muon([p])
    ((bank, _),) = optimizer._make_banks()
    bank.start_reduction(range(1))
    with torch.no_grad():
        assert torch.equal(bank.own_gradients().whole[0], p.grad.detach())


def test_a_step_that_is_skipped_keeps_no_gradient_alive() -> None:
    weight = nn.Parameter(torch.zeros(8, 4))
    optimizers = [Muon([weight])]
    weight.grad = randn(8, 4, seed=0)
    finish_reduction(optimizers)
    alive = weakref.ref(weight.grad)
    optimizers[0].zero_grad()
    assert alive() is None


def test_clipping_within_a_closure_counts() -> None:
    weight = nn.Parameter(torch.zeros(8, 4))
    optimizers = [Muon([weight], momentum=0.0)]

    def closure() -> None:
        weight.grad = randn(8, 4, seed=0)
        clip_gradients(optimizers, 1e-3)

    optimizers[0].step(closure)
    assert optimizers[0].state[weight]["momentum_buffer"].norm().item() == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("max_norm", [0.0, -1.0, math.nan])
def test_a_norm_that_is_none_is_refused(max_norm: float) -> None:
    with pytest.raises(ValueError, match=r"max_norm = .* must be > 0"):
        clip_gradients([Muon([nn.Parameter(torch.zeros(2, 2))])], max_norm)
