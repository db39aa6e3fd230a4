"""Options of rules: what they refuse, and how they are declared."""

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from optim import (
    Aurora,
    MatrixOptimizer,
    Muon,
    NorMuon,
    RiemannianAurora,
)
from optim.aurora import aurora_polar
from optim.options import Option
from tests.matrices import randn

Make = Callable[..., MatrixOptimizer]
pytestmark = pytest.mark.usefixtures("float32_products")


@pytest.mark.parametrize("option", ["differentiable", "maximize", "foreach", "capturable", "fused", "betas"])
def test_options_of_other_optimizers_are_refused_by_name(option: str) -> None:
    for rule in (Muon, NorMuon, Aurora, RiemannianAurora):
        with pytest.raises(TypeError, match=option):
            rule([nn.Parameter(torch.ones(2, 2))], **{option: True})


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


class Spread(Aurora):  # as someone's own file would have it
    options: ClassVar = {
        "beta": Option(0.25, "half as strong", (">= 0", "<= 1")),
        "power": Option(None, "of nothing", ("> 0",), kind=int),
        "momentum": replace(MatrixOptimizer.options["momentum"], default=0.9),
    }


def test_options_are_those_of_all_bases_the_nearest_first() -> None:
    assert list(Muon.options) == list(MatrixOptimizer.options)
    assert set(Spread.options) == {*Aurora.options, "power"}
    assert Spread.options["sides"] is Aurora.options["sides"] is RiemannianAurora.options["sides"]
    assert RiemannianAurora.options["polar_method"].default == "simple_quintic"
    assert Muon.options["polar_method"].default == "polar_express"
    (group,) = Spread([nn.Parameter(torch.ones(2, 2))], 0.5, power=3).param_groups
    assert (group["lr"], group["beta"], group["momentum"], group["power"], group["sides"]) == (
        0.5,
        0.25,
        0.9,
        3,
        "both",
    )

    class Slow(Muon):
        options: ClassVar = {"lr": Option(0.001, "slow")}

    class Both(Slow, NorMuon):
        pass

    class Other(NorMuon, Slow):
        options: ClassVar = {"beta2": Option(0.5, "short")}

    assert [Both.options["lr"].default, Other.options["lr"].default, Other.options["beta2"].default] == [
        0.001,
        0.001,
        0.5,
    ]
    assert Both([nn.Parameter(torch.ones(2, 2))]).param_groups[0]["lr"] == 0.001


def test_a_signature_shows_every_option_with_its_default() -> None:
    shown = inspect.signature(Spread).parameters
    assert list(shown)[:2] == ["params", "lr"]
    assert {name: shown[name].default for name in Spread.options} == {
        name: option.default for name, option in Spread.options.items()
    }
    assert {"kernels", "comm_dtype", "defer_check", "process_group"} == set(shown) - {"params", *Spread.options}
    assert all(shown[name].kind is inspect.Parameter.KEYWORD_ONLY for name in shown if name not in ("params", "lr"))


@pytest.mark.parametrize(
    ("rule", "name", "hint"),
    [(Muon, "momentun", "did you mean momentum?"), (Aurora, "iteration", "did you mean iterations?"),
     (Muon, "beta", "its options are lr, momentum"), (NorMuon, "rule", "its options are lr")],
    ids=["near", "near of a rule", "of another rule", "none near"],
)  # fmt: skip
def test_an_unknown_option_names_the_nearest(rule: Make, name: str, hint: str) -> None:
    with pytest.raises(TypeError, match=rf"{rule.__name__} has no option {name}; {re.escape(hint)}"):
        rule([nn.Parameter(torch.ones(2, 2))], **{name: 1})


def test_an_option_without_a_value_has_bounds_where_there_is_one() -> None:
    Spread([nn.Parameter(torch.ones(2, 2))], power=None)
    with pytest.raises(ValueError, match="Spread: power = 0 must be > 0; None, the default, works"):
        Spread([nn.Parameter(torch.ones(2, 2))], power=0)
    with pytest.raises(ValueError, match=r"Spread: power = 2.5 is of type float; it must be an integer or None"):
        Spread([nn.Parameter(torch.ones(2, 2))], power=2.5)
    for value in (math.inf, math.nan):
        with pytest.raises(ValueError, match="Muon: lr = "):
            Muon([nn.Parameter(torch.ones(2, 2))], lr=value)


@pytest.mark.parametrize(
    "given", [dict(iterations=0), dict(beta=1.5), dict(variant="hot"), dict(iterations=2.5)], ids=str
)
def test_aurora_polar_refuses_what_aurora_does(given: dict[str, Any]) -> None:
    ((name, value),) = given.items()
    with pytest.raises(ValueError, match=f"aurora_polar: {name} = {value!r}"):
        aurora_polar(torch.ones(3, 2), **given)
