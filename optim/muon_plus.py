"""Muon+: polar factors whose columns and rows are set to norm 1 afterwards (arXiv 2602.21545).

    columns: U_ij / sqrt(sum_i U_ij^2 + 1e-7)       rows: U_ij / sqrt(sum_j U_ij^2 + 1e-7)

`order` says which, and in what order: col, row, col_row (the default, theirs for small GPTs) or row_col (for GPT base
and LLaMA). No state. The update has length sqrt(m) where rows come last and sqrt(n) where columns do, a polar factor
sqrt(min(m, n)): a learning rate of Muon's fits square matrices alone. Their scale is sqrt(m / n), without Muon's
max(1, .): `scale = "aspect"` (`matrix_scale`).

What nanochat calls Muon+ is another rule: it rescales a polar factor as a whole to length sqrt(min(m, n)) and leaves
rows and columns as they are. Copies of the paper's code differ in the constant (1e-7 or 1e-8) and in Nesterov momentum.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.bank import State
from optim.matrix_optimizer import MatrixOptimizer
from optim.options import Option
from optim.unit_rows import takes_unit_rows

SMALLEST = 1e-7  # beside squared norms of about min(m, n) / max(m, n): what is less is rounding and stays small


class MuonPlus(MatrixOptimizer):
    """Muon with the columns and rows of its update set to norm 1."""

    options: ClassVar = {
        "order": Option(
            "col_row", "what gets norm 1 after the polar factor: col, row, col_row (columns, then rows) or row_col",
            choices=("col", "row", "col_row", "row_col"),
        )
    }  # fmt: skip

    @takes_unit_rows
    def orthogonalize(self, update: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        U = self.polar(update, group).float()
        for axis in group["order"].split("_"):
            norm = torch.linalg.vector_norm(U, dim=-1 if axis == "row" else -2, keepdim=True)
            U = U.mul_((norm.square() + SMALLEST).rsqrt())
        return U
