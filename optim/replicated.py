"""torch.optim's own optimizers on gradients averaged over the ranks: every rank keeps the whole state.

For embeddings, head and whatever is not a hidden matrix, and as baselines for the hidden matrices.
"""

from typing import Any

import torch
import torch.distributed as dist


def average_gradients(optimizer: torch.optim.Optimizer, process_group: dist.ProcessGroup | None = None) -> None:
    """Replace each gradient by its mean over the ranks, in place, as DistributedDataParallel does."""
    works = [
        dist.all_reduce(p.grad, op=dist.ReduceOp.AVG, group=process_group, async_op=True)
        for group in optimizer.param_groups
        for p in group["params"]
        if p.grad is not None
    ]
    for work in works:
        work.wait()


def replicate(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Make every `step()` average the gradients over all ranks first, where there are several."""

    def before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        average_gradients(optimizer)

    if dist.is_initialized() and dist.get_world_size() > 1:
        optimizer.register_step_pre_hook(before_step)
    return optimizer
