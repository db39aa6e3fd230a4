"""Tensors in shards (DTensors), as torch's fully_shard makes them, and whole ones."""

import math
from typing import Any

import torch.distributed as dist
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. (Asking for the type would import a second's worth of torch for those without.)"""
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Any:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor, or None, itself."""
    return tensor.to_local() if tensor is not None and is_sharded(tensor) else tensor


def shard_like(whole: Tensor, like: Any) -> Tensor:
    """A tensor that every rank has whole, in shards on the device of `like` as that is; itself if `like` is whole or of
    another shape."""
    if not isinstance(like, Tensor) or not is_sharded(like) or is_sharded(whole) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    part: Tensor = distribute_tensor(whole, mesh, placements, src_data_rank=None)  # None: nothing is sent
    return part.to(like.device)


def gathered(tree: Any, is_kept: bool = True) -> Any:
    """The same tree of dicts and lists with every sharded tensor whole, in main memory; without `is_kept` None in its
    place. The ranks that hold the shards have to call it together, and hold one whole tensor at a time."""
    if isinstance(tree, dict):
        return {key: gathered(value, is_kept) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value, is_kept) for value in tree)
    if not isinstance(tree, Tensor) or not is_sharded(tree):
        return tree
    whole = tree.detach().full_tensor()  # type: ignore[attr-defined]
    return whole.cpu() if is_kept else None


def cut_dim(p: Any) -> int | None:
    """The dimension of a sharded parameter's mesh over which dimension 0 is cut; None if it is placed another way."""
    from torch.distributed.tensor import Replicate, Shard

    cut = [dim for dim, placement in enumerate(p.placements) if not isinstance(placement, Replicate)]
    return cut[0] if len(cut) == 1 and p.placements[cut[0]] == Shard(0) else None


def shard_group(p: Any) -> dist.ProcessGroup:
    """The ranks that have the shards of a parameter; those with copies of them are in groups of their own."""
    dim = cut_dim(p)
    assert dim is not None
    group: dist.ProcessGroup = p.device_mesh.get_group(dim)
    return group


def numbers_of(p: Tensor, rank: int, num_ranks: int) -> range:
    """The numbers of the whole parameter that a rank holds: as torch.chunk cuts dimension 0."""
    length, rest = math.ceil(p.size(0) / num_ranks), p.numel() // p.size(0)
    start, stop = (min(place * length, p.size(0)) * rest for place in (rank, rank + 1))
    return range(start, stop)
