"""What a matrix optimizer refuses: parameters that it cannot move, and state dicts that do not fit its own."""

import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parameter import is_lazy

from kernels import backend
from optim.apply_update import check_weight_options
from optim.bank import Bank, layout, matrices
from optim.options import check_options
from optim.shards import cut_of, flat_ranges, is_dtensor, local, shard_group

if TYPE_CHECKING:
    from optim.matrix_optimizer import MatrixOptimizer

OWN_STATE = {"momentum_buffer", "master_weight"}  # the base class's, not a rule's


def check_group(optimizer: "MatrixOptimizer", index: int) -> None:
    """ValueError for the first option of a param group that is not allowed, or parameter that cannot be moved."""
    who, group, seen = type(optimizer).__name__, optimizer.param_groups[index], set[Tensor]()
    check_options(who, group, optimizer.options)
    check_weight_options(who, group)
    for name, p in zip(optimizer._names(index), group["params"], strict=True):
        _check_parameter(who, name, p, group["row_blocks"], group["flatten"])
        if p in seen:
            raise ValueError(f"{who}: {name} is in its group twice and would move twice; leave one of them out")
        seen.add(p)
        if group["hyperball"] and not p.is_meta and _has_zero_matrix(p, group):
            raise ValueError(
                f"{who}: hyperball keeps norms, and {name} has a matrix of zeros, which would stay zero; start it from "
                "random numbers (in a recipe init_out = 0.02, init_down = 0.02), or give it a group without hyperball"
            )
    check_placement(optimizer)
    for device in {p.device for p in group["params"]}:
        backend(optimizer.kernels, device)


def is_capturing(p: Tensor | None) -> bool:
    """Whether a CUDA graph is capturing what happens to parameters such as this one."""
    return p is not None and p.is_cuda and torch.cuda.is_current_stream_capturing()


def check_capture(optimizer: "MatrixOptimizer") -> None:
    """RuntimeError if a CUDA graph is capturing this step and would replay anything else than further steps."""
    if not is_capturing(optimizer._any_param()):
        return
    banks, who = [bank for bank, _ in optimizer._banks], type(optimizer).__name__
    rates = [(group["lr"], p.device) for group in optimizer.param_groups for p in group["params"]]
    problem = ""
    if not optimizer.defer_check:
        problem = "checks the gradients at once, which waits for the device; make it with defer_check=True"
    elif any(not isinstance(lr, Tensor) or lr.device != device for lr, device in rates):
        problem = "has a learning rate that would stay as it is; let lr be a tensor on the parameters' device"
    elif optimizer._reduced is not None:
        problem = "would read gradients of before the capture; let finish_reduction or clipping be captured, too"
    elif any(bank.num_ranks > 1 for bank in banks):
        problem = "shares its matrices among ranks, whose exchange cannot be captured"
    elif not optimizer._gradient_check.has_counted or any(_is_new(bank) for bank in banks):
        problem = "would make its state anew in every replay; take an ordinary step before, with a rate above 0"
    if problem:
        raise RuntimeError(f"{who}: a CUDA graph cannot capture this step: the optimizer {problem}")


def _is_new(bank: Bank) -> bool:
    is_used = bool(bank.active_slots())
    return is_used and ("momentum_buffer" not in bank.state or (bank.needs_master and not bank.has_moved))


def _has_zero_matrix(p: Any, group: Mapping[str, Any]) -> bool:
    whole = p.detach().full_tensor() if is_dtensor(p) else p.detach()
    norms = torch._foreach_norm(matrices(whole, group["row_blocks"], group["flatten"]))
    return not torch.stack(norms).all()


def _check_parameter(who: str, name: str, p: Tensor, row_blocks: int, flatten: bool | None) -> None:
    """ValueError with the parameter's name unless it is a matrix, or a stack of them, that can be moved."""
    problem = ""
    if is_lazy(p):
        problem = "has no shape yet; run a batch through the model before making the optimizer"
    elif p.layout != torch.strided:
        problem = f"is stored as {p.layout}; only dense matrices (torch.strided) can be updated"
    elif p.ndim < 2:
        problem = f"has shape {tuple(p.shape)} and is no matrix; give it to torch.optim.AdamW"
    elif not p.is_floating_point():
        problem = f"has dtype {p.dtype}; only real floating-point matrices can be updated"
    elif p.dtype.itemsize == 1:
        problem = f"has dtype {p.dtype}, which cannot be computed with; make it torch.bfloat16 or wider"
    elif p.numel() == 0:
        problem = f"has shape {tuple(p.shape)} and so no elements; leave it out"
    elif any(stride == 0 and size > 1 for stride, size in zip(p.stride(), p.shape, strict=True)):
        problem = "is expanded, so that elements share memory; give it its own with clone()"
    elif is_dtensor(p):
        problem = _problem_of_shards(p, rows=0 if flatten else p.ndim - 2)
    if problem:
        raise ValueError(f"{who}: {name} {problem}")
    _, rows, _ = layout(p, 1, flatten)
    if rows % row_blocks:
        raise ValueError(
            f"{who}: row_blocks = {row_blocks} must divide the {rows} rows of {name}; 1 keeps matrices whole"
        )


def _problem_of_shards(p: Any, rows: int) -> str:
    """What keeps a DTensor, whose matrices' rows are dimension `rows`, from being moved by owners; empty if nothing
    does."""
    cut = cut_of(p)
    if cut is None or cut.dim > rows:
        placements = ", ".join(map(str, p.placements))
        return (
            f"is a DTensor placed as ({placements}); cut it along dimension 0 (up to {rows} works) over one dimension "
            "of its mesh and replicate it over the others, as torch.distributed.fsdp.fully_shard does"
        )
    held, group = local(p), shard_group(p)
    numbers = flat_ranges(p.shape, cut.dim, dist.get_rank(group), dist.get_world_size(group))
    if held.numel() != sum(map(len, numbers)) or not held.is_contiguous():
        return (
            f"has a shard of shape {tuple(held.shape)} that is not the contiguous part that torch.chunk would give; "
            "make it with fully_shard or distribute_tensor"
        )
    return ""


def check_placement(optimizer: "MatrixOptimizer") -> None:
    """ValueError unless all parameters are whole, or all are sharded over the same ranks."""
    names = [name for index in range(len(optimizer.param_groups)) for name in optimizer._names(index)]
    params: list[Any] = [p for group in optimizer.param_groups for p in group["params"]]
    places = [(p.device_mesh, shard_group(p)) if is_dtensor(p) else "whole" for p in params]
    other = next((name for name, place in zip(names, places, strict=True) if place != places[0]), "")
    who = type(optimizer).__name__
    if other:
        raise ValueError(
            f"{who}: {other} and {names[0]} are not sharded alike (one is whole, or they are on different meshes); "
            "give each kind an optimizer of its own"
        )
    if params and is_dtensor(params[0]) and optimizer.process_group is not None:
        raise ValueError(f"{who}: process_group is for whole parameters, and {names[0]} is sharded; leave it out")


def warn_of_stacks(who: str, names: list[str], group: Mapping[str, Any]) -> None:
    """Warn of parameters that may be convolution weights and are taken as stacks of small matrices."""
    deep = [name for name, p in zip(names, group["params"], strict=True) if p.ndim > 3]
    if deep and group["flatten"] is None:
        warnings.warn(
            f"{who}: the last two dimensions of {_listed(deep)} are taken as the matrices; for convolution weights "
            "set flatten=True in their param group, which makes [out, in, kh, kw] one matrix [out, in * kh * kw], for "
            "stacks flatten=False",
            stacklevel=level_of_caller(),
        )


def level_of_caller() -> int:
    """The `stacklevel`, for the function that calls this, of the first line outside torch and this package."""
    inside = {Path(path).resolve().parent for path in (__file__, torch.__file__)}
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and not inside.isdisjoint(Path(frame.f_code.co_filename).resolve().parents):
        frame, level = frame.f_back, level + 1
    return level


def fitted_state_dict(optimizer: "MatrixOptimizer", state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict, completed with the options and names of the optimizer's groups where it has none.

    Raises ValueError, before anything is changed, for a state that is not a matrix optimizer's or is of other
    parameters.
    """
    who, own_groups = type(optimizer).__name__, optimizer.param_groups
    if not {"state", "param_groups"} <= set(state_dict):
        raise ValueError(f"{who}: a state dict has state and param_groups, and this one has {_listed(state_dict)}")
    entries, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(entries, Mapping) or not isinstance(groups, list):
        raise ValueError(
            f"{who}: the state dict has a state of type {type(entries).__name__} and param_groups of type "
            f"{type(groups).__name__}; they must be a dict and a list, as state_dict() gives them"
        )
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list):
            found = _listed(group) if isinstance(group, Mapping) else repr(group)
            raise ValueError(
                f"{who}: group {index} of the state dict has {found}; it must be a dict with a list of its parameters' "
                "numbers as params, as state_dict() gives it"
            )
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
            check_group(optimizer, index)
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
    names, own_names = saved.get("param_names") or [], own.get("param_names", [])
    if names != own_names and sorted(names) == sorted(own_names):
        theirs, ours = next(pair for pair in zip(names, own_names, strict=True) if pair[0] != pair[1])
        raise ValueError(f"{who}: the state is of {theirs} where the optimizer has {ours}; keep the parameters' order")
    return {**own, **saved, **({"param_names": own_names} if own_names else {})}


def _check_entry(
    optimizer: "MatrixOptimizer", name: str, p: Tensor, group: dict[str, Any], entry: Mapping[str, Any]
) -> None:
    """ValueError unless the state of one parameter is empty, or momentum and whatever else in its matrices' shape."""
    who = type(optimizer).__name__
    if not isinstance(entry, Mapping):
        raise ValueError(f"{who}: the state of {name} is {entry!r}; it must be a dict, empty before the first step")
    if entry and "momentum_buffer" not in entry:
        raise ValueError(f"{who}: the state of {name} has {_listed(entry)}, and no momentum_buffer")
    lead, m, n = layout(p, group["row_blocks"], group["flatten"])
    shapes = dict.fromkeys(OWN_STATE, torch.Size((m, n)))
    if not OWN_STATE.issuperset(entry):
        with suppress(RuntimeError):  # a rule that asks for values has none to look at here
            shapes |= {key: value.shape[1:] for key, value in optimizer.rule_state(m, n, group).items()}
    for key, value in entry.items():
        if not isinstance(value, Tensor) or value.is_complex() or value.layout != torch.strided:
            found = f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"{who}: {key} in the state of {name} is {found}; it must be a dense tensor of real numbers"
            )
        if value.is_meta and not p.is_meta:
            raise ValueError(
                f"{who}: {key} in the state of {name} is on the device meta, without values; load the state with its "
                "values, as torch.load(path, map_location='cpu') does"
            )
        if value.shape[: len(lead)] != lead or (key in shapes and value.shape[len(lead) :] != shapes[key]):
            expected = ", ".join(map(str, (*lead, *shapes.get(key, ["..."]))))
            raise ValueError(
                f"{who}: {key} in the state of {name} has shape {tuple(value.shape)}; it must be ({expected}): the "
                "state is of another model, or of other row_blocks or flatten"
            )


def _listed(items: Iterable[Any]) -> str:
    return ", ".join(map(str, items)) or "nothing"
