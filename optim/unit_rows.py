"""What polar factors begin with, in place of matrices that are not stored, and which update rules may be given it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class UnitRows:
    """Matrices M [B, m, n] as `polar` computes with them: the rows of a tall or square M, of a wide one the columns, at
    norm 1, and their norms. For M that was never stored."""

    rows: Tensor  # [B, max(m, n), min(m, n)], in the dtype to compute in
    norm: Tensor  # [B, max(m, n)] float32
    shape: torch.Size  # [B, m, n]

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"UnitRows have no {name}: an update rule whose orthogonalize is marked takes_unit_rows may ask `update` "
            "for its shape and device alone; without the mark it is given tensors"
        )


_takers = set[Callable[..., Tensor]]()


def takes_unit_rows(orthogonalize: F) -> F:
    """Mark an update rule's `orthogonalize` that hands `update` on to `polar` or `aurora_polar` and asks no more of it
    than its shape and device: it may be UnitRows then. A subclass that replaces the method gets tensors, as ever."""
    _takers.add(orthogonalize)
    return orthogonalize


def is_given_unit_rows(orthogonalize: Callable[..., Tensor]) -> bool:
    """Whether this very method is marked, and not one that it wraps."""
    return getattr(orthogonalize, "__func__", orthogonalize) in _takers
