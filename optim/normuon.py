"""NorMuon and U-NorMuon: polar factors whose rows are rescaled afterwards, and so are no longer orthogonal.

NorMuon (Li et al., arXiv 2510.05491) divides each row (a neuron's incoming weights) by its root mean square over time
and restores the length of the whole, so that Muon's learning rates fit:

    v_i <- beta2 * v_i + (1 - beta2) * mean_j U_ij^2       U' = U_i / sqrt(v_i)       update = U' ||U|| / ||U'||

`axis` "rows" is the paper. "long" is what records of the speedrun do (KellerJordan/modded-nanogpt, track 3, result 10):
rows of tall and square matrices, columns of wide ones, the same in all else. State: v, one number per row (column).

U-NorMuon (Tilde Research, 2026) has no memory: rows of tall updates get norm sqrt(n / m), the norm they would have if
an orthogonal matrix treated them alike. Rows of square and wide polar factors have norm 1 already.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.reference import TINY
from optim.bank import State
from optim.matrix_optimizer import MatrixOptimizer
from optim.options import Option
from optim.unit_rows import takes_unit_rows

SMALLEST = 1e-10  # mean square of a row that is still normalised: below it, a row of a polar factor is rounding


def with_mean_square(U: Tensor) -> tuple[Tensor, Tensor]:
    """A polar factor U [B, m, n], at most float32, and the mean square of each of its rows, float32 [B, m]."""
    U = U.float() if U.dtype == torch.float64 else U
    return U, torch.linalg.vector_norm(U, dim=-1, dtype=torch.float32).square() / U.size(-1)


class NorMuon(MatrixOptimizer):
    """Muon with rows normalised by a running mean of their squares, as Adam does for entries."""

    options: ClassVar = {
        "beta2": Option(0.95, "share of the rows' mean squares that a step keeps", (">= 0", "< 1")),
        "axis": Option("rows", "what is normalised: rows, or long (wide matrices: columns)", choices=("rows", "long")),
    }

    @takes_unit_rows
    def orthogonalize(self, update: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        U, name = self.polar(update, group), "row_square"
        by_columns = group["axis"] == "long" and U.size(-2) < U.size(-1)
        if by_columns:
            U, name = U.mT, "column_square"
        U, square = with_mean_square(U)
        if name not in state:
            state[name] = torch.zeros_like(square)  # its start is one factor for all rows, which cancels
        v = state[name].lerp_(square, 1 - group["beta2"])
        row_scale = v.clamp_min(SMALLEST).rsqrt()
        length, scaled_length = square.sum(dim=-1), (square * row_scale.square()).sum(dim=-1)
        row_scale = row_scale * (length / scaled_length.clamp_min(TINY)).sqrt().unsqueeze(-1)
        U = U.float().mul_(row_scale.unsqueeze(-1))
        return U.mT if by_columns else U


class UNorMuon(MatrixOptimizer):
    """Muon with the rows of tall updates set to one norm."""

    @takes_unit_rows
    def orthogonalize(self, update: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        U, square = with_mean_square(self.polar(update, group))
        m, n = U.shape[-2:]
        if m <= n:
            return U
        return U.float().mul_((square.clamp_min(SMALLEST) * m).rsqrt().unsqueeze(-1))
