"""torch.optim's own optimizers on gradients averaged over the ranks: every rank keeps the whole state, or of sharded
parameters that of its shards.

For embeddings, head and whatever is not a hidden matrix, and as baselines for the hidden matrices.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from optim.shards import gathered, is_dtensor, shard_like

_means = WeakTensorKeyDictionary()  # gradients that are means over the ranks: their version when they became that


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The gradients, to write to; sparse ones have each row once after this."""
    for p in params_of(optimizer):
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()
    return [p.grad for p in params_of(optimizer) if p.grad is not None]


def numbers_of(gradient: Tensor) -> Tensor:
    """What is stored of it: a sparse one's rows, of which there is one each."""
    return gradient.values() if gradient.is_sparse else gradient


def mark_as_means(gradients: Iterable[Tensor]) -> None:
    """Say that these are means over the ranks, until someone writes to them."""
    for gradient in gradients:
        _means[gradient] = gradient._version


def average_gradients(optimizer: torch.optim.Optimizer, process_group: dist.ProcessGroup | None = None) -> None:
    """Replace each gradient by its mean over the ranks, in place, as DistributedDataParallel does; where it is the
    mean already, as in shards it is, nothing is sent. Of a sparse gradient its rows are sent."""
    if not dist.is_initialized() or dist.get_world_size(process_group) == 1:
        return
    works, means = [], list[Tensor]()
    for p in params_of(optimizer):
        if p.grad is None or is_dtensor(p.grad) or _means.get(p.grad) == p.grad._version:
            continue
        if p.grad.is_sparse:
            p.grad = mean_of_rows(p.grad, process_group)
        else:
            works.append(dist.all_reduce(p.grad, op=dist.ReduceOp.AVG, group=process_group, async_op=True))
        means.append(p.grad)
    for work in works:
        work.wait()
    mark_as_means(means)


def mean_of_rows(gradient: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """The mean over the ranks of a sparse gradient, by all ranks' rows; the same on all of them. Waits for the device:
    how many rows each rank has depends on its tokens."""
    gradient, num_ranks = gradient.coalesce(), dist.get_world_size(process_group)
    rows, values = gradient.indices()[0], gradient.values() / num_ranks
    most = torch.tensor(len(rows), device=rows.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=process_group)
    missing = int(most) - len(rows)  # filled up with zeros for row 0
    parts = [torch.cat((part, part.new_zeros(missing, *part.shape[1:]))) for part in (rows, values)]
    gathered_parts = []
    for part in parts:
        of_ranks = [torch.empty_like(part) for _ in range(num_ranks)]
        dist.all_gather(of_ranks, part, group=process_group)
        gathered_parts.append(torch.cat(of_ranks))
    rows, values = gathered_parts
    return torch.sparse_coo_tensor(rows[None], values, gradient.shape, check_invariants=False).coalesce()


def replicate(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make every `step()` average the gradients over all ranks first, where there are several, and state dicts whole,
    so that they fit whole parameters and any shards; of sharded ones all ranks have to ask for it."""

    def before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        average_gradients(optimizer)

    def cut(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = dict(zip(saved, (p for group in optimizer.param_groups for p in group["params"]), strict=False))
        state = {
            i: {key: shard_like(value, params.get(i)) for key, value in entry.items()}
            for i, entry in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_state_dict_post_hook(lambda optimizer, state_dict: gathered(state_dict))
    optimizer.register_load_state_dict_pre_hook(cut)
    return optimizer
