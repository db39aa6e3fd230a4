"""A step that a CUDA graph could capture: all that it does is operators on tensors that stay where they are."""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import HAS_TRITON
from optim import AdamH, AdaMuon, Aurora, MatrixOptimizer, Muon, NorMuon, Soap, SoapMuon
from optim.config import RULES

SHAPES = ((12, 8), (8, 16), (12, 8))
WARM_UP = 1  # ordinary steps, which make state and banks
LOOKS = ("aten.promote_types", "profiler.")  # what gives no tensor and still asks none for its values
WAITED_FOR = ("lift_fresh", "nonzero", "masked_select", "unique", "_unique", "repeat_interleave", "linalg_eig",
              "linalg_inv", "linalg_solve", "linalg_chol", "linalg_svd", "_linalg_eig", "_linalg_svd", "_linalg_solve",
              "_linalg_check")  # fmt: skip
WAITS = tuple(f"aten.{name}" for name in WAITED_FOR)


class Graph(TorchDispatchMode):
    """In place of a CUDA graph: what was done under it is done again by `replay`, on the same memory and with the same
    numbers wherever they were no tensors. Raises RuntimeError, as a capture does, where a tensor's values are asked for
    or a new one is made from the host's."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = str(func), func(*args, **(kwargs or {}))
        if not name.startswith(LOOKS):
            is_mask = name.startswith("aten.index") and any(is_bool(leaf) for leaf in tree_leaves(args[1:]))
            if is_mask or name.startswith(WAITS) or not all(map(is_tensor, tree_leaves(result))):
                raise RuntimeError(f"{name} would make the host wait for the device")
            self.calls.append((func, args, kwargs or {}, result))
        return result

    def __enter__(self) -> "Graph":
        self.patches = ExitStack()
        for reading in ("tolist", "numpy", "cpu"):  # no operators on a CPU
            self.patches.enter_context(mock.patch.object(Tensor, reading, refuse_to_read))
        for who in ("optim.checks", *(["kernels.scattered"] if HAS_TRITON else [])):
            self.patches.enter_context(mock.patch(f"{who}.is_capturing", return_value=True))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.patches.close()
        super().__exit__(*exception)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if old is not None and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def refuse_to_read(tensor: Tensor) -> None:
    raise RuntimeError("this would make the host wait for the device")


def is_bool(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == torch.bool


def is_tensor(leaf: object) -> bool:
    return leaf is None or isinstance(leaf, Tensor)


def make(
    rule: type[MatrixOptimizer], dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[list[nn.Parameter], MatrixOptimizer]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    for p in params:
        p.grad = torch.zeros_like(p)
    options = {name: torch.tensor(value) if name in CHANGING else value for name, value in options.items()}
    return params, rule(params, torch.tensor(0.02), defer_check=True, **options)


def give(params: Iterable[Tensor], optimizer: MatrixOptimizer, step: int, lr: float) -> None:
    """Gradients and the rates of a step, where a graph looks for them; one of NaN before the sixth."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        assert p.grad is not None
        p.grad.copy_(torch.randn(p.shape, generator=generator))
        p.grad += torch.nan if step == 5 else 0.0
    (group,) = optimizer.param_groups
    group["lr"].fill_(lr)
    for name in CHANGING:
        if isinstance(group[name], Tensor):
            group[name].mul_(0.9)


CHANGING = ("momentum", "weight_decay")  # options that may be tensors, like lr
SOAPS = (Soap, SoapMuon)  # which ask how many gradients a matrix has had
CASES: list[tuple[type[MatrixOptimizer], dict[str, Any]]] = [(rule, {}) for rule in RULES.values() if rule not in SOAPS]
CASES += [(Muon, dict(weight_decay=0.1)), (Muon, dict(weight_decay=0.1, cautious=True)), (Muon, dict(hyperball=True))]
CASES += [(Muon, dict(update_floor=0.35)), (Muon, dict(radial_brake=0.5)), (Muon, dict(row_blocks=2))]
CASES += [(Aurora, dict(dtype=torch.bfloat16))]
CASES += [
    (rule, dict(kernels="triton", polar_steps=2, momentum=0.95, weight_decay=0.1)) for rule in (Muon, Aurora, NorMuon)
]
CASES += [(rule, dict(momentum=0.95, cautious=True)) for rule in (AdamH, AdaMuon)]


def name_of(value: object) -> str:
    return value.__name__ if isinstance(value, type) else ",".join(f"{k}={v}" for k, v in value.items())  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:PolarGrad")
@pytest.mark.parametrize(("rule", "options"), CASES, ids=name_of)
def test_a_captured_step_is_an_ordinary_one(
    rule: type[MatrixOptimizer], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other gradients and learning rates than it was captured with, and one step that is skipped."""
    if "kernels" in options:
        pytest.importorskip("triton")
        monkeypatch.setattr("optim.matrix_optimizer.fast_half_dtype", lambda device_type: torch.float16)
    params, ordinary = make(rule, **options)
    twins, captured = make(rule, **options)
    graph = Graph()
    for step, lr in enumerate((0.02, 0.02, 0.03, 0.01, 0.005, 0.02, 0.04)):
        give(params, ordinary, step, lr)
        give(twins, captured, step, lr)
        ordinary.step()
        if step < WARM_UP:
            captured.step()
        elif step == WARM_UP:
            with graph:
                captured.step()
        else:
            graph.replay()
        assert all(map(torch.equal, params, twins)), step
    state, twin_state = (optimizer.state_dict()["state"] for optimizer in (ordinary, captured))
    assert all(torch.equal(value, twin_state[i][name]) for i, kept in state.items() for name, value in kept.items())
    for optimizer in (ordinary, captured):
        with pytest.raises(FloatingPointError, match="parameter 0"):
            optimizer.raise_if_not_finite()
        optimizer.raise_if_not_finite()  # said once


@pytest.mark.parametrize("rule", [Muon, NorMuon])
def test_gradients_may_lie_elsewhere_in_a_capture(rule: type[MatrixOptimizer], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where backward is captured, too, p.grad is the graph's own; its address cannot be sent to the device then."""
    pytest.importorskip("triton")
    monkeypatch.setattr("optim.matrix_optimizer.fast_half_dtype", lambda device_type: torch.float16)
    (params, ordinary), (twins, captured) = (make(rule, kernels="triton", polar_steps=2) for _ in range(2))
    graph = Graph()
    for step in range(4):
        if step == 1:
            for p in (*params, *twins):
                p.grad = torch.zeros_like(p)
        give(params, ordinary, step, 0.02)
        give(twins, captured, step, 0.02)
        ordinary.step()
        if step == 1:
            with graph:
                captured.step()
        elif step:
            graph.replay()
        else:
            captured.step()
        assert all(map(torch.equal, params, twins)), step


@pytest.mark.parametrize("rule", SOAPS)
def test_what_waits_for_the_device_cannot_be_captured(rule: type[MatrixOptimizer]) -> None:
    _, optimizer = make(rule)
    optimizer.step()
    with pytest.raises(RuntimeError, match="would make the host wait"), Graph():
        optimizer.step()


def ends_the_state(optimizer: MatrixOptimizer) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


WRONG = {
    "wait": ("defer_check=True", lambda optimizer: setattr(optimizer, "defer_check", False)),
    "number": ("let lr be a tensor", lambda optimizer: optimizer.param_groups[0].update(lr=0.02)),
    "gradients": ("of before the capture", lambda optimizer: optimizer.finish_reduction()),
    "new state": ("take an ordinary step", ends_the_state),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_would_be_replayed_wrongly_is_refused(what: str) -> None:
    words, spoil = WRONG[what]
    params, optimizer = make(Muon)
    optimizer.step()
    spoil(optimizer)
    before = [p.clone() for p in params]
    with pytest.raises(RuntimeError, match=words), Graph():
        optimizer.step()
    assert all(map(torch.equal, params, before))


def test_the_first_step_is_refused_and_of_16_bits_one_at_rate_zero() -> None:
    _, optimizer = make(Aurora)
    with pytest.raises(RuntimeError, match="take an ordinary step"), Graph():
        optimizer.step()
    _, optimizer = make(Aurora, torch.bfloat16)
    optimizer.param_groups[0]["lr"].fill_(0.0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="with a rate above 0"), Graph():
        optimizer.step()
