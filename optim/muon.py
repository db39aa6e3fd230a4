"""Muon: hidden matrices move by the polar factor of their momentum.

Keller Jordan et al. (2024), https://kellerjordan.github.io/posts/muon. All but the polar factor is in
matrix_optimizer.py.
"""

from typing import Any

from torch import Tensor

from optim.bank import State
from optim.matrix_optimizer import MatrixOptimizer
from optim.unit_rows import takes_unit_rows


class Muon(MatrixOptimizer):
    """The update is the polar factor of the (Nesterov) momentum."""

    @takes_unit_rows
    def orthogonalize(self, update: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        return self.polar(update, group)
