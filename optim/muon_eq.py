"""MuonEq: Muon whose momentum has rows (or columns) of one norm before the polar factor (arXiv 2603.28254).

With r_i and c_j the norms of M's rows and columns, the update is the polar factor of

    rows (the paper's R, its default):  M_ij / r_i      columns (C):  M_ij / c_j      both (RC):  M_ij / (r_i c_j)

for tall, wide and square matrices alike, with r and c of M itself in all of them. No state. For tall matrices rows are
Aurora's update with one iteration, which takes columns of wide matrices and leaves square ones as they are.

Differences from the paper's code: it divides by sqrt(r_i^2 + 1e-8), so that gradients with rows below 1e-4 are balanced
in part. Here only zero rows are spared and the update does not depend on the gradients' scale. Its scale is
`match_rms_adamw`, its momentum the same up to a factor, which cancels.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels import backend
from kernels.reference import TINY
from optim.bank import State
from optim.matrix_optimizer import MatrixOptimizer
from optim.options import Option
from optim.polar import piece_length, polar, row_scaled_polar


def unit_rows_polar(M: Tensor, **polar_arguments: Any) -> Tensor:
    """The polar factor of M [B, m, n], float32, with each row divided by its norm; zero rows stay zero."""
    if M.size(-2) < M.size(-1):
        rows, _ = backend(polar_arguments["kernels"], M.device).normalize_rows(M, torch.float32)
        return polar(rows, **polar_arguments)
    if (length := piece_length(M)) is not None:
        return torch.cat([unit_rows_polar(piece, **polar_arguments) for piece in M.split(length)])
    polar_of, _ = row_scaled_polar(M, **polar_arguments, form="auto")
    U, _ = polar_of(None, "matrix")
    return U


def balanced(M: Tensor, kernels: str) -> Tensor:
    """M_ij / (r_i c_j) for M [B, m, n], up to a factor for each matrix; zero rows and columns stay zero."""
    ops = backend(kernels, M.device)
    rows, _ = ops.normalize_rows(M, torch.float32)
    _, c = ops.normalize_rows(M.mT, torch.float32)
    c = c / c.amax(dim=-1, keepdim=True).clamp_min(TINY)  # r_i c_j could leave float32's range
    return rows.div_(c.clamp_min(TINY).unsqueeze(-2))


class MuonEq(MatrixOptimizer):
    """Muon with the rows of the momentum, its columns or both set to one norm before the polar factor."""

    options: ClassVar = {
        "axis": Option(
            "rows", "what is divided by its norm before the polar factor: rows, columns or both",
            choices=("rows", "columns", "both"),
        )
    }  # fmt: skip

    def orthogonalize(self, update: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        if group["axis"] == "both":
            return self.polar(balanced(update, self.kernels), group)
        polar_arguments = self.polar_arguments(update, group)
        if group["axis"] == "columns":
            return unit_rows_polar(update.mT, **polar_arguments).mT
        return unit_rows_polar(update, **polar_arguments)
