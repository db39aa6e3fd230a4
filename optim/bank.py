"""Banks: matrices of one shape, gathered from many parameters and updated as one batch [B, m, n].

A bank is where the ranks meet. Today every rank owns every matrix: gradients are averaged over the ranks and
each rank computes the whole update. An owner per matrix changes this file and nothing in the update rules.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Bank:
    """Same-shape matrices of one param group; leading dimensions of a parameter (stacked weights) are batch.

    `state` holds float32 tensors of leading size B. The optimizer's per-parameter state are views of them, which
    keeps `state_dict()` whole and in torch's own form.
    """

    def __init__(self, params: list[Tensor], names: list[str]) -> None:
        self.params, self.names = params, names
        self.m, self.n = params[0].shape[-2:]
        self.sizes = [p.numel() // (self.m * self.n) for p in params]  # matrices in each parameter
        self.state: dict[str, Tensor] = {}

    def join(self, tensors: Iterable[Tensor]) -> Tensor:
        """One tensor for each parameter -> float32 [B, m, n], always a copy."""
        return torch.cat([t.detach().reshape(-1, self.m, self.n).float() for t in tensors])

    def views(self, batch: Tensor) -> list[Tensor]:
        """[B, ...] -> one view for each parameter, its leading dimensions restored."""
        parts = batch.split(self.sizes)
        return [part.view(*p.shape[:-2], *part.shape[1:]) for part, p in zip(parts, self.params, strict=True)]

    def attach(self, name: str, batch: Tensor, state: dict[Tensor, Any]) -> None:
        """Keep `batch` as state `name`, and show each parameter's part of it in the optimizer's state."""
        self.state[name] = batch
        for p, view in zip(self.params, self.views(batch), strict=True):
            state[p][name] = view

    def restore(self, state: dict[Tensor, Any]) -> None:
        """Take up per-parameter state that was loaded or unpickled; a parameter without any starts from zero."""
        shapes = {name: value.shape[p.ndim - 2 :] for p in self.params for name, value in state[p].items()}
        for name, shape in shapes.items():
            parts = [
                state[p][name].float().reshape(-1, *shape)
                if name in state[p]
                else p.new_zeros((size, *shape), dtype=torch.float32)
                for p, size in zip(self.params, self.sizes, strict=True)
            ]
            self.attach(name, torch.cat(parts), state)

    def average_gradients(self, process_group: dist.ProcessGroup | None) -> Tensor:
        """The gradients there are, [B', m, n] float32, averaged over the ranks; `.grad` itself is left alone."""
        gradient = self.join(p.grad for p in self.params if p.grad is not None)
        if dist.is_initialized():
            dist.all_reduce(gradient, op=dist.ReduceOp.AVG, group=process_group)
        return gradient

    def check_finite(self, gradient: Tensor) -> None:
        with_gradient = [i for i, p in enumerate(self.params) if p.grad is not None]
        for i, part in zip(with_gradient, gradient.split([self.sizes[i] for i in with_gradient]), strict=True):
            if not part.isfinite().all():
                raise FloatingPointError(
                    f"the gradient of {self.names[i]} holds NaN or infinity; nothing was updated. Lower the learning "
                    "rate, or skip the step with zero_grad() if one bad batch is expected"
                )

    def rows_with_gradient(self) -> Tensor | None:
        """Indices into the batch of the matrices that have a gradient; None when all have one."""
        if all(p.grad is not None for p in self.params):
            return None
        has_gradient = torch.tensor([p.grad is not None for p in self.params])
        return has_gradient.repeat_interleave(torch.tensor(self.sizes)).nonzero().flatten()

    def apply(self, update: Tensor, decay: float) -> None:
        """weight = weight * decay - update, for the parameters that have a gradient.

        Parameters in a shorter format follow a float32 master copy, so that small updates add up.
        """
        active = [(i, p) for i, p in enumerate(self.params) if p.grad is not None]
        updates = update.split([self.sizes[i] for i, _ in active])
        params = [p for _, p in active]
        targets = params
        if "master_weight" in self.state:
            masters = self.views(self.state["master_weight"])
            targets = [masters[i] for i, _ in active]
        torch._foreach_mul_(targets, decay)
        torch._foreach_sub_(targets, [u.view(p.shape) for u, p in zip(updates, params, strict=True)])
        if targets is not params:
            torch._foreach_copy_(params, targets)


def make_banks(params: list[Tensor], names: list[str]) -> list[Bank]:
    """Banks by matrix shape, dtype and device, in order of first appearance."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, p in enumerate(params):
        groups[p.shape[-2:], p.dtype, p.device].append(i)
    return [Bank([params[i] for i in rows], [names[i] for i in rows]) for rows in groups.values()]
