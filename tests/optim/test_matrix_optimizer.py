"""What the base class promises for every rule: batches, state, dtypes, hooks, kernels."""

import copy
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from optim import Aurora, MatrixOptimizer, Muon, NorMuon
from tests.matrices import randn, uneven
from tests.optim import rules
from tests.optim.rules import Make

RULES = pytest.mark.parametrize("rule", rules.RULES.values(), ids=rules.RULES)


pytestmark = [pytest.mark.usefixtures("float32_products"), pytest.mark.filterwarnings("ignore:PolarGrad")]


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


@pytest.mark.parametrize("options", [{}, {"hyperball": True}], ids=["muon", "hyperball"])
def test_master_weights_are_made_from_what_is_loaded_after_a_step_at_rate_zero(options: dict[str, Any]) -> None:
    module, gradient = nn.Linear(4, 6, bias=False, dtype=torch.bfloat16), randn(6, 4, seed=1).bfloat16()
    weight, expected = module.weight, nn.Parameter(randn(6, 4).bfloat16())
    optimizer, other = Muon([weight], lr=1e-3, **options), Muon([expected], lr=1e-3, **options)
    get_optimizer_state_dict(module, optimizer)  # makes state by such a step
    module.load_state_dict({"weight": expected})
    for _ in range(3):
        weight.grad, expected.grad = gradient, gradient
        optimizer.step()
        other.step()
    assert torch.equal(weight, expected)
    assert torch.equal(optimizer.state[weight]["master_weight"], other.state[expected]["master_weight"])


def test_an_empty_group_is_nothing_to_do() -> None:
    Muon([dict(params=[])]).step()


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


def test_an_update_of_another_shape_is_refused() -> None:
    class Turned(MatrixOptimizer):
        def orthogonalize(self, update: torch.Tensor, state: Any, group: Any) -> torch.Tensor:
            return update.mT

    weight = nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"Turned: the update of matrices \(1, 3, 2\) has shape \(1, 2, 3\)"):
        Turned([weight]).step()
