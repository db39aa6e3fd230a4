"""Muon squared: the momentum is divided by the root of its squared gradients, as in Adam, before the polar factor.

    V <- beta2 * V + (1 - beta2) * G^2        U = polar(M / sqrt(V))

with squares and quotient entry by entry and the raw gradient G. V starts at zero without correction, whose factor the
polar factor would not see. Source: arXiv 2604.09967. Its factorised form of V is left out.
"""

from typing import ClassVar

from torch import Tensor

from optim.batch import MatrixBatch
from optim.matrix_optimizer import MatrixOptimizer
from optim.options import Option
from optim.second_moment import bounded, over_root


class MuonSquared(MatrixOptimizer):
    """The polar factor of Adam's direction. State beside momentum: one number per weight."""

    options: ClassVar = {"beta2": Option(0.95, "share of the mean squares that a step keeps", (">= 0", "< 1"))}

    def direction(self, batch: MatrixBatch) -> Tensor:
        G = bounded(batch.gradient)
        square = batch.per_matrix("square", *G.shape[1:]).lerp_(G.square(), 1 - batch.group["beta2"])
        return self.polar(over_root(batch.momentum(), square), batch.group)
