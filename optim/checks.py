"""What a matrix optimizer refuses: parameters that it cannot move, and state dicts that do not fit its own."""

import inspect
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from optim.bank import layout

if TYPE_CHECKING:
    from optim.matrix_optimizer import MatrixOptimizer

OWN_STATE = {"momentum_buffer", "master_weight"}  # the base class's, not a rule's
PLACE = ("kernels", "comm_dtype", "defer_check", "process_group", "rule")  # arguments that are no options of a group


def check_parameters(who: str, names: list[str], group: Mapping[str, Any]) -> None:
    """ValueError with a parameter's name for the first of a group that cannot be moved."""
    seen = set[Tensor]()
    for name, p in zip(names, group["params"], strict=True):
        _check_parameter(who, name, p, group["row_blocks"], group["flatten"])
        if p in seen:
            raise ValueError(f"{who}: {name} is in its group twice and would move twice; leave one of them out")
        seen.add(p)


def _check_parameter(who: str, name: str, p: Tensor, row_blocks: int, flatten: bool | None) -> None:
    """ValueError with the parameter's name unless it is a matrix, or a stack of them, that can be moved."""
    if is_lazy(p):
        raise ValueError(f"{who}: {name} has no shape yet; run a batch through the model before making the optimizer")
    if hasattr(p, "device_mesh"):
        raise ValueError(f"{who}: {name} is a DTensor; give whole parameters, whose updates are shared out among ranks")
    if p.layout != torch.strided:
        raise ValueError(f"{who}: {name} is stored as {p.layout}; only dense matrices (torch.strided) can be updated")
    if p.ndim < 2:
        raise ValueError(f"{who}: {name} has shape {tuple(p.shape)} and is no matrix; give it to torch.optim.AdamW")
    if not p.is_floating_point():
        raise ValueError(f"{who}: {name} has dtype {p.dtype}; only real floating-point matrices can be updated")
    if p.numel() == 0:
        raise ValueError(f"{who}: {name} has shape {tuple(p.shape)} and so no elements; leave it out")
    if any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        raise ValueError(f"{who}: {name} is expanded, so that elements share memory; give it its own with clone()")
    _, rows, _ = layout(p, 1, flatten)
    if row_blocks < 1 or rows % row_blocks:
        raise ValueError(
            f"{who}: row_blocks = {row_blocks} must divide the {rows} rows of {name}; 1 keeps matrices whole"
        )


def warn_of_stacks(who: str, names: list[str], group: Mapping[str, Any]) -> None:
    """Warn of parameters that may be convolution weights and are taken as stacks of small matrices."""
    deep = [name for name, p in zip(names, group["params"], strict=True) if p.ndim > 3]
    if deep and group["flatten"] is None:
        warnings.warn(
            f"{who}: the last two dimensions of {_listed(deep)} are taken as the matrices; for convolution weights "
            "set flatten=True in their param group, which makes [out, in, kh, kw] one matrix [out, in * kh * kw], for "
            "stacks flatten=False",
            stacklevel=4,
        )


def option_defaults(kind: type) -> dict[str, Any]:
    """The options of param groups of a matrix optimizer, with their defaults as arguments of its class."""
    parameters: dict[str, inspect.Parameter] = {}
    for base in reversed(kind.__mro__[: -len(torch.optim.Optimizer.__mro__)]):
        parameters.update(inspect.signature(base).parameters)
    empty = inspect.Parameter.empty
    return {name: p.default for name, p in parameters.items() if p.default is not empty and name not in PLACE}


def fitted_state_dict(optimizer: "MatrixOptimizer", state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict, completed with the options and names of the optimizer's groups where it has none.

    Raises ValueError, before anything is changed, for a state that is not a matrix optimizer's or is of other
    parameters.
    """
    who, own_groups = type(optimizer).__name__, optimizer.param_groups
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(f"{who}: a state dict has state and param_groups, and this one has {_listed(state_dict)}")
    entries, groups = state_dict["state"], state_dict["param_groups"]
    saved_sizes, sizes = ([len(group["params"]) for group in each] for each in (groups, own_groups))
    if saved_sizes != sizes:
        raise ValueError(
            f"{who}: the state is of groups of {_listed(saved_sizes)} parameters, and the optimizer has groups of "
            f"{_listed(sizes)}; load it where the same groups were made"
        )
    groups = [_fitted_group(who, saved, own) for saved, own in zip(groups, own_groups, strict=True)]
    if unknown := set(entries) - {i for group in groups for i in group["params"]}:
        raise ValueError(
            f"{who}: the state has entries for {_listed(unknown)}, which are parameters of none of its groups"
        )
    optimizer.param_groups = [dict(new, params=own["params"]) for new, own in zip(groups, own_groups, strict=True)]
    try:
        for index, group in enumerate(optimizer.param_groups):
            optimizer._check_group(index)
            for i, name, p in zip(groups[index]["params"], optimizer._names(index), group["params"], strict=True):
                _check_entry(optimizer, name, p, group, entries.get(i, {}))
    finally:
        optimizer.param_groups = own_groups
    return {**state_dict, "param_groups": groups}


def _fitted_group(who: str, saved: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    if "polar_method" not in saved:
        raise ValueError(
            f"{who}: the state is of another kind of optimizer, whose groups have {_listed(saved)} and no polar_method"
        )
    for key, default in (("row_blocks", 1), ("flatten", None)):  # what matrices are, and so the shape of their state
        theirs, ours = saved.get(key, own[key]) or 0, own[key] or 0
        if theirs != ours and own[key] != default:
            raise ValueError(f"{who}: {key} = {saved[key]} in the state, and {own[key]} here; make the two equal")
    names, own_names = saved.get("param_names", []), own.get("param_names", [])
    if names != own_names and sorted(names) == sorted(own_names):
        theirs, ours = next(pair for pair in zip(names, own_names, strict=True) if pair[0] != pair[1])
        raise ValueError(f"{who}: the state is of {theirs} where the optimizer has {ours}; keep the parameters' order")
    return {**own, **saved, **({"param_names": own_names} if own_names else {})}


def _check_entry(
    optimizer: "MatrixOptimizer", name: str, p: Tensor, group: dict[str, Any], entry: Mapping[str, Any]
) -> None:
    """ValueError unless the state of one parameter is empty, or momentum and whatever else in its matrices' shape."""
    who = type(optimizer).__name__
    if entry and "momentum_buffer" not in entry:
        raise ValueError(f"{who}: the state of {name} has {_listed(entry)}, and no momentum_buffer")
    lead, m, n = layout(p, group["row_blocks"], group["flatten"])
    shapes = dict.fromkeys(OWN_STATE, torch.Size((m, n)))
    if not OWN_STATE.issuperset(entry):
        with suppress(NotImplementedError, RuntimeError):  # a rule that asks for values has none to look at here
            shapes |= {key: value.shape[1:] for key, value in optimizer.rule_state(m, n, group).items()}
    for key, value in entry.items():
        if not isinstance(value, Tensor) or value.is_complex() or value.layout != torch.strided:
            found = f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"{who}: {key} in the state of {name} is {found}; it must be a dense tensor of real numbers"
            )
        if value.shape[: len(lead)] != lead or (key in shapes and value.shape[len(lead) :] != shapes[key]):
            expected = ", ".join(map(str, (*lead, *shapes.get(key, ["..."]))))
            raise ValueError(
                f"{who}: {key} in the state of {name} has shape {tuple(value.shape)}; it must be ({expected}): the "
                "state is of another model, or of other row_blocks or flatten"
            )


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items)) or "nothing"
