"""Weights on the ranks: whole on each, or in shards by torch's fully_shard, a block at a time.

In shards a rank holds 1/R of weights, gradients and optimizer state. A block's weights are gathered before its forward
and its backward pass, in the dtype they are multiplied in, and dropped after it; gradients are averaged in float32.
Embedding, head and scalars are gathered together, in float32. A forward pass is a collective then: every rank has to
take it.

A stack of matrices is cut along the rows of each where the number of ranks divides these (fully_shard wants it to, in
dimensions but the first), and along the stack where it does not: ranks beyond its length then have no part of it.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from harness.machine import Machine


def check_fsdp(config: Any) -> None:
    """Raises ValueError for settings that do not go with `fsdp`."""
    if config.fsdp and config.neuron_stats:
        raise ValueError(f"neuron_stats = {config.neuron_stats} needs whole weights; set it to 0, or fsdp = false")
    if config.fsdp and config.architecture == "track3":
        raise ValueError(
            "fsdp gathers embedding and head in one dtype, and track3's embedding has its own; leave it off"
        )
    if config.fsdp and config.ngram_sparse:
        raise ValueError("fsdp shards dense gradients, and ngram_sparse = true makes sparse ones; set one to false")
    if config.fsdp and config.compile and not config.compile_blocks:
        raise ValueError("fsdp gathers block by block, and compile_blocks = false makes one graph; leave it on")


def place(model: nn.Module, blocks: Iterable[nn.Module], machine: Machine, is_sharded: bool) -> None:
    """Give every rank the first one's weights, whole or in shards. Whole they have to fit a rank's memory once, before
    there are gradients and state."""
    if machine.world_size == 1:
        return
    for p in model.parameters():
        dist.broadcast(p.data, src=0)
    if not is_sharded:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh(machine.device.type, (machine.world_size,))
    reduce_dtype = torch.promote_types(machine.dtype, torch.float32)
    policy = MixedPrecisionPolicy(machine.dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, shard_placement_fn=lambda p: Shard(cut_dim(p, mesh.size())))
    root: Any = fully_shard(model, mesh=mesh)
    # What it gathers besides stays until backward. Without one, averaged weights would be left for the next step.
    root.register_forward_hook(lambda root, *_: None if torch.is_grad_enabled() else root.reshard())


def cut_dim(p: torch.Tensor, ranks: int) -> int:
    """The dimension along which a parameter is cut."""
    return 1 if p.ndim == 3 and p.size(1) % ranks == 0 else 0  # fully_shard cuts dimensions but the first evenly alone


@contextlib.contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """A block in which the parts of a sharded model around its blocks can be called one by one, by all ranks alike."""
    if not hasattr(model, "unshard"):
        yield
        return
    model.unshard()  # type: ignore[operator]
    try:
        yield
    finally:
        model.reshard()  # type: ignore[operator]
