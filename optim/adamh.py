"""AdamH: Adam's direction under the hyperball, so that each matrix keeps its norm and turns by lr in a step.

    V <- beta2 * V + (1 - beta2) * G^2        U = (B / (1 - momentum^t)) / sqrt(V / (1 - beta2^t))

with the momentum B as Adam's first moment (with `nesterov` M in its place, and t + 1 in its correction), t the matrix's
own steps, and the move of `hyperball` in apply_update.py. Source: arXiv 2606.16899. Weights that start at zero are
refused.
"""

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from optim.bank import by_matrix
from optim.batch import MatrixBatch
from optim.matrix_optimizer import MatrixOptimizer
from optim.options import Option
from optim.second_moment import bounded, over_root


class AdamH(MatrixOptimizer):
    """Adam on the sphere of a matrix's norm. State beside momentum: one number per weight, one per matrix."""

    options: ClassVar = {
        "beta2": Option(0.95, "share of the mean squares that a step keeps", (">= 0", "< 1")),
        "hyperball": replace(MatrixOptimizer.options["hyperball"], default=True),
        "nesterov": replace(MatrixOptimizer.options["nesterov"], default=False),
    }

    def direction(self, batch: MatrixBatch) -> Tensor:
        G, group, steps = bounded(batch.gradient), batch.group, batch.per_matrix("steps").add_(1)
        square = batch.per_matrix("square", *G.shape[1:]).lerp_(G.square(), 1 - group["beta2"])
        ahead = steps + group["nesterov"]
        correction = (1 - group["beta2"] ** steps).sqrt() / (1 - group["momentum"] ** ahead)
        return over_root(batch.momentum(), square) * by_matrix(correction, square)
