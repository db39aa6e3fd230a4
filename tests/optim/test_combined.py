"""Several optimizers as one: the same numbers, groups that schedulers reach, one state dict in torch's form."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from optim import Aurora, CombinedOptimizer
from tests.matrices import randn

Model = nn.ParameterDict


def new_model() -> Model:
    shapes = dict(tall=(6, 4), wide=(3, 5), gain=(7,), bias=(2,))
    return Model({name: nn.Parameter(randn(*shape, seed=i)) for i, (name, shape) in enumerate(shapes.items())})


def parts(model: Model) -> list[torch.optim.Optimizer]:
    """Two groups of matrices, one of vectors."""
    matrices = [{"params": [model["tall"]], "weight_decay": 0.1}, {"params": [model["wide"]], "lr": 0.01}]
    return [Aurora(matrices), torch.optim.AdamW([model["gain"], model["bias"]], lr=0.1)]


def train(model: Model, optimizers: list[torch.optim.Optimizer], steps: range = range(4), uses_closure: bool = False):
    """Steps with a schedule, for one optimizer or several alike; the losses."""
    schedules = [LambdaLR(optimizer, lambda step: 0.5**step, steps.start - 1) for optimizer in optimizers]
    losses = []
    for step in steps:

        def loss_and_gradients(step: int = step) -> torch.Tensor:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = sum(((p - randn(*p.shape, seed=step)) ** 2).sum() for p in model.values())
            loss.backward()
            return loss

        loss = None if uses_closure else loss_and_gradients()
        for optimizer in optimizers:
            loss = optimizer.step(loss_and_gradients) if uses_closure else optimizer.step() or loss
        for schedule in schedules:
            schedule.step()
        losses.append(loss.item())
    return losses


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("uses_closure", [False, True])
def test_a_step_is_a_step_of_each_at_the_rates_of_one_schedule(uses_closure: bool) -> None:
    one, several = new_model(), new_model()
    combined = CombinedOptimizer(parts(one))
    expected = train(several, optimizers := parts(several))
    assert train(one, [combined], uses_closure=uses_closure) == expected
    assert_same(one.state_dict(), several.state_dict())
    assert [group["lr"] for group in combined.param_groups] == [0.02 / 16, 0.01 / 16, 0.1 / 16]
    assert [group["lr"] for each in optimizers for group in each.param_groups] == [0.02 / 16, 0.01 / 16, 0.1 / 16]
    assert set(combined.state) == set(one.values())
    assert_same(combined.state[one["gain"]], optimizers[1].state[several["gain"]])


def test_a_state_dict_goes_on_to_the_bit_and_has_torch_s_form() -> None:
    model = new_model()
    combined = CombinedOptimizer(parts(model))
    train(model, [combined], range(2))
    file = io.BytesIO()
    torch.save([model.state_dict(), combined.state_dict()], file)
    train(model, [combined], range(2, 4))

    other = new_model()
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    assert saved["state"].keys() == {0, 1, 2, 3}
    assert [group["params"] for group in saved["param_groups"]] == [[0], [1], [2, 3]]
    other.load_state_dict(weights)
    resumed = CombinedOptimizer(parts(other))
    resumed.load_state_dict(saved)
    train(other, [resumed], range(2, 4))
    assert_same(other.state_dict(), model.state_dict())
    assert_same(resumed.state_dict()["state"], combined.state_dict()["state"])
    assert resumed.state_dict()["param_groups"] == combined.state_dict()["param_groups"]


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_to_the_bit(twin_of: Any) -> None:
    model = new_model()
    combined = CombinedOptimizer(parts(model))
    train(model, [combined], range(2))
    twin_model, twin = twin_of((model, combined))
    train(model, [combined], range(2, 4))
    train(twin_model, [twin], range(2, 4))
    assert_same(twin_model.state_dict(), model.state_dict())


def test_under_torch_compile_a_step_is_the_same() -> None:
    model, plain = new_model(), new_model()
    combined, expected = (CombinedOptimizer(parts(each)[:1]) for each in (model, plain))  # AdamW's is torch's concern
    for step in torch.compile(combined.step, backend="eager"), expected.step:
        for i in range(2):
            for p in (*model.values(), *plain.values()):
                p.grad = randn(*p.shape, seed=i)
            step()
    assert_same(model.state_dict(), plain.state_dict())
    assert_same([*combined.state.values()], [*expected.state.values()])


def test_hooks_are_called() -> None:
    combined, called = CombinedOptimizer(parts(new_model())), list[str]()
    combined.register_step_pre_hook(lambda *_: called.append("before step"))
    combined.register_step_post_hook(lambda *_: called.append("after step"))
    combined.register_state_dict_pre_hook(lambda _: called.append("before saving"))
    combined.register_state_dict_post_hook(lambda _, state: {**state, "note": 1})
    combined.register_load_state_dict_pre_hook(lambda _, state: called.append("before loading"))
    combined.register_load_state_dict_post_hook(lambda _: called.append("after loading"))
    combined.step()
    saved = combined.state_dict()
    combined.load_state_dict(saved)
    assert saved["note"] == 1
    assert called == ["before step", "after step", "before saving", "before loading", "after loading"]


def test_what_does_not_fit_is_refused_before_anything_changes() -> None:
    model = new_model()
    aurora, adamw = parts(model)
    with pytest.raises(ValueError, match="there are no optimizers"):
        CombinedOptimizer([])
    with pytest.raises(ValueError, match=r"SGD has a parameter \(7,\) of another"):
        CombinedOptimizer([aurora, adamw, torch.optim.SGD([model["gain"]])])
    combined = CombinedOptimizer([aurora, adamw])
    with pytest.raises(ValueError, match=r"add it to one of \.optimizers"):
        combined.add_param_group({"params": [nn.Parameter(randn(3))]})
    saved = CombinedOptimizer([adamw, aurora]).state_dict()
    saved["param_groups"][1]["lr"] = 9.0
    with pytest.raises(ValueError, match=r"groups of \[2, 1, 1\] parameters, the optimizers of \[1, 1, 2\]"):
        combined.load_state_dict(saved)
    assert [group["lr"] for group in combined.param_groups] == [0.02, 0.01, 0.1]
