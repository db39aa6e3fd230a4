"""Optimizers for hidden matrices, and the routing of a model's parameters to them.

    from optim import Aurora, Muon, build_optimizers           (where the wheel is installed: from nanogpt_aurora)

`build_optimizers(model, config)` gives every matrix inside the blocks to the matrix optimizer the config names, and
embeddings, head, gains and scalars to AdamW with a learning rate each. A step of all of them, on any number of ranks:

    start_reduction(optimizers)            before the backward pass that makes gradients final; overlaps with it
    loss.backward()
    finish_reduction(optimizers)           gradients are means over the ranks
    clip_gradients(optimizers, max_norm)
    for optimizer in optimizers: optimizer.step()

of which backward and step are enough.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from optim.matrix_optimizer import MatrixOptimizer  # isort: skip  # first: rules in other files import it from here
from optim.options import Option  # isort: skip
from optim.adamh import AdamH
from optim.adamuon import AdaMuon
from optim.aurora import Aurora
from optim.combined import CombinedOptimizer
from optim.config import (
    RULES,
    TORCH_OPTIMIZERS,
    OptimizerConfig,
    check_matrix_optimizer,
    find_rule,
    with_rule_options,
)
from optim.muon import Muon
from optim.muon_eq import MuonEq
from optim.muon_plus import MuonPlus
from optim.muon_squared import MuonSquared
from optim.muown import Muown
from optim.normuon import NorMuon, UNorMuon
from optim.polar_grad import PolarGrad
from optim.replicated import average_gradients, gradients_of, mark_as_means, numbers_of
from optim.riemannian_aurora import RiemannianAurora
from optim.routing import build_optimizers, routing_table
from optim.shards import cut_of, is_dtensor, local, shard_group
from optim.soap import Soap, SoapMuon

__all__ = [
    "RULES", "TORCH_OPTIMIZERS", "AdaMuon", "AdamH", "Aurora", "CombinedOptimizer", "MatrixOptimizer", "Muon",
    "MuonEq", "MuonPlus", "MuonSquared", "Muown", "NorMuon", "OptimizerConfig", "Option", "PolarGrad",
    "RiemannianAurora", "Soap", "SoapMuon", "UNorMuon", "build_optimizers", "check_matrix_optimizer", "clip_gradients",
    "find_rule", "finish_reduction", "routing_table", "start_reduction", "with_rule_options",
]  # fmt: skip


def start_reduction(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Let the next backward pass, which makes gradients final, start averaging those of matrices over the ranks."""
    for optimizer in optimizers:
        if isinstance(optimizer, MatrixOptimizer):
            optimizer.start_reduction()


def finish_reduction(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Have every optimizer hold mean gradients over the ranks, which its next step uses: of matrices a rank's own, in
    float32, and with one rank p.grad as it is; of the rest p.grad, averaged in place where it is not sharded. Every
    rank has to call it, once p.grad is final: whether later changes count depends on the ranks. A second call does
    nothing."""
    for optimizer in optimizers:
        if isinstance(optimizer, MatrixOptimizer):
            optimizer.mean_gradients()
        else:
            average_gradients(optimizer, process_group_of(optimizers))


@torch.no_grad()
def clip_gradients(optimizers: Sequence[torch.optim.Optimizer], max_norm: float) -> Tensor:
    """The L2 norm of all mean gradients as one vector, float64 on the device, the same for any number of ranks.

    Scales what the optimizers hold by min(1, max_norm / norm), decided on the device; p.grad of matrices stays as it
    is. A norm that is not finite scales nothing: the step says which parameter it comes from. To be called directly
    before the steps: loading a state or adding a group forgets what was scaled.
    """
    if not max_norm > 0:
        raise ValueError(f"clip_gradients: max_norm = {max_norm} must be > 0; 1.0 is usual")
    finish_reduction(optimizers)
    parts: dict[dist.ProcessGroup | None, list[Tensor]] = {}  # by the ranks that hold the whole between them
    shared = list[Tensor]()
    for optimizer in optimizers:
        if isinstance(optimizer, MatrixOptimizer):
            parts.setdefault(optimizer.owners(), []).extend(optimizer.finish_reduction())
        else:
            for gradient in gradients_of(optimizer):
                if is_dtensor(gradient) and cut_of(gradient):
                    parts.setdefault(shard_group(gradient), []).append(local(gradient))
                else:
                    shared.append(gradient)
    device = optimizers[0].param_groups[0]["params"][0].device
    square = torch.zeros((), dtype=torch.float64, device=device)
    for group, own in parts.items():
        part = sum_of_squares(own, device)
        if dist.is_initialized() and dist.get_world_size(group) > 1:
            dist.all_reduce(part, group=group)
        square += part
    norm = (square + sum_of_squares(map(numbers_of, shared), device)).sqrt()
    factor = torch.where(norm.isfinite(), (max_norm / norm).clamp(max=1), 1)
    for gradient in [*itertools.chain(*parts.values()), *map(local, map(numbers_of, shared))]:
        gradient.mul_(factor.to(gradient.device))
    mark_as_means(shared)
    return norm


def sum_of_squares(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        norm: Any = torch.linalg.vector_norm(tensor, dtype=torch.float64)
        total += (norm.full_tensor() if is_dtensor(norm) else norm).square().to(device)
    return total


def process_group_of(optimizers: Iterable[torch.optim.Optimizer]) -> dist.ProcessGroup | None:
    """The ranks that train one model together, as a matrix optimizer among `optimizers` has it; None: all ranks."""
    matrix_optimizer = next((each for each in optimizers if isinstance(each, MatrixOptimizer)), None)
    return matrix_optimizer.replicas() if matrix_optimizer else None
