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


def gradients_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def mark_as_means(gradients: Iterable[Tensor]) -> None:
    """Say that these are means over the ranks, until someone writes to them."""
    for gradient in gradients:
        _means[gradient] = gradient._version


def average_gradients(optimizer: torch.optim.Optimizer, process_group: dist.ProcessGroup | None = None) -> None:
    """Replace each gradient by its mean over the ranks, in place, as DistributedDataParallel does; where it is the
    mean already, as in shards it is, nothing is sent."""
    if not dist.is_initialized() or dist.get_world_size(process_group) == 1:
        return
    gradients = [
        gradient for gradient in gradients_of(optimizer)
        if not is_dtensor(gradient) and _means.get(gradient) != gradient._version
    ]  # fmt: skip
    works = [dist.all_reduce(g, op=dist.ReduceOp.AVG, group=process_group, async_op=True) for g in gradients]
    for work in works:
        work.wait()
    mark_as_means(gradients)


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
