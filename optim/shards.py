"""Tensors in shards (DTensors), as torch's fully_shard makes them, and whole ones."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a DTensor. (Asking for the type would import a second's worth of torch for those without.)"""
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Any:
    """This rank's part of a sharded tensor, sharing its memory; any other tensor, or None, itself."""
    return tensor.to_local() if tensor is not None and is_dtensor(tensor) else tensor


def shard_like(whole: Tensor, like: Any) -> Tensor:
    """A tensor that every rank has whole, in shards on the device of `like` as that is; itself if `like` is whole or of
    another shape."""
    if not isinstance(like, Tensor) or not is_dtensor(like) or is_dtensor(whole) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    part: Tensor = distribute_tensor(whole, mesh, placements, src_data_rank=None)  # None: nothing is sent
    return part.to(like.device)


def gathered(tree: Any, is_kept: bool = True) -> Any:
    """The same tree of dicts and lists with every sharded tensor whole, in main memory; without `is_kept` None in place
    of every tensor. The ranks that hold the shards have to call it together, and hold one whole tensor at a time."""
    if isinstance(tree, dict):
        return {key: gathered(value, is_kept) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(gathered(value, is_kept) for value in tree)
    if not isinstance(tree, Tensor):
        return tree
    whole = tree.detach().full_tensor().cpu() if is_dtensor(tree) else tree  # type: ignore[attr-defined]
    return whole if is_kept else None


class Cut(NamedTuple):
    """How a parameter is cut: dimension `dim` over dimension `mesh_dim` of its mesh, as torch.chunk does."""

    mesh_dim: int
    dim: int


def cut_of(p: Any) -> Cut | None:
    """How a sharded parameter is cut; None if not over one dimension of its mesh, with copies over the others."""
    from torch.distributed.tensor import Replicate, Shard

    cuts = [Cut(i, place.dim) for i, place in enumerate(p.placements) if type(place) is Shard]
    others = [place for place in p.placements if not isinstance(place, Replicate)]
    return cuts[0] if len(cuts) == len(others) == 1 else None


def shard_group(p: Any) -> dist.ProcessGroup:
    """The ranks that have the shards of a parameter, or of its gradient; those with copies of them are in groups of
    their own. ValueError if it is cut in another way than `cut_of` knows."""
    cut = cut_of(p)
    if cut is None:
        placements = ", ".join(map(str, p.placements))
        raise ValueError(
            f"a DTensor of shape {tuple(p.shape)} is placed as ({placements}); it has to be cut over one dimension of "
            "its mesh and replicated over the others, as torch.distributed.fsdp.fully_shard does"
        )
    group: dist.ProcessGroup = p.device_mesh.get_group(cut.mesh_dim)
    return group


def flat_ranges(shape: Sequence[int], dim: int, rank: int, num_ranks: int) -> list[range]:
    """The numbers of a parameter that a rank holds, in its order, where dimension `dim` is cut: a range for each index
    of the dimensions before it."""
    length, rest = math.ceil(shape[dim] / num_ranks), math.prod(shape[dim + 1 :])
    start, stop = (min(place * length, shape[dim]) for place in (rank, rank + 1))
    leads = range(math.prod(shape[:dim])) if start < stop else range(0)
    return [range((lead * shape[dim] + start) * rest, (lead * shape[dim] + stop) * rest) for lead in leads]
