"""Muown: Muon on the directions of a matrix's rows, Adam on their norms.

Each row is W_i = g_i v_i / |v_i|. With u_i = v_i / |v_i| = W_i / g_i and k_i = |v_i| the gradients of the parts are

    dg_i = <G_i, u_i>        dv_i = (g_i / k_i) (G_i - dg_i u_i)

and a step is, M being the momentum of dv and s the update's scale,

    v <- v - lr * s * polar(M)        g <- g - lr * Adam(dg)        W_i <- g_i v_i / |v_i|

v starts as W. Its norm can but grow, roughly, since dv is orthogonal to it; the angle by which a row turns shrinks with
it. g is what |W_i| is when the step begins, with a sign of its own, so that weight decay acts on it. A row of zeros has
g = k = INITIAL_NORM in its first step and this k in its second one too: what a step alone has made of v may be no
longer than rounding, or zero, and would blow up dv. The authors' scale s is match_rms_adamw.

Source: arXiv 2605.10797. Record runs of the optimizer track lead k along a schedule of its own instead; the form here
is the plain one.
"""

from typing import ClassVar

import torch
from torch import Tensor

from optim.apply_update import SCALES
from optim.batch import MatrixBatch
from optim.matrix_optimizer import MatrixOptimizer
from optim.options import Option
from optim.second_moment import bounded, over_root

INITIAL_NORM = 0.33**0.5  # of zero rows, as in the track's records
SHORTEST = 1e-30  # of rows of v


class Muown(MatrixOptimizer):
    """Weight-normalised Muon. State beside momentum: four numbers per row, one per matrix."""

    options: ClassVar = {
        "beta1": Option(0.9, "share of the norms' mean gradient that a step keeps", (">= 0", "< 1")),
        "beta2": Option(0.95, "share of the mean square of the norms' gradient that a step keeps", (">= 0", "< 1")),
    }

    def direction(self, batch: MatrixBatch) -> Tensor:
        G, W, group = bounded(batch.gradient), batch.weights(), batch.group
        m, n = G.shape[1:]
        sign, k, mean, square = (batch.per_matrix(name, m) for name in ("gain", "length", "gain_mean", "gain_square"))
        steps = batch.per_matrix("steps").add_(1).unsqueeze(-1)
        norm = torch.linalg.vector_norm(W, dim=-1)
        g = torch.where(norm > 0, norm, INITIAL_NORM).copysign(sign)
        k = torch.where(k > 0, k, g.abs())
        u = W / g.unsqueeze(-1)
        dg = (G * u).sum(dim=-1)
        dv = (g / k).unsqueeze(-1) * (G - dg.unsqueeze(-1) * u)
        P = self.polar(batch.momentum(dv), group).float()
        mean.lerp_(dg, 1 - group["beta1"])
        square.lerp_(dg.square(), 1 - group["beta2"])
        correction = (1 - group["beta2"] ** steps).sqrt() / (1 - group["beta1"] ** steps)
        adam = correction * over_root(mean.unsqueeze(-1), square.unsqueeze(-1)).squeeze(-1)
        # (W - g v / |v|) / (lr s) without the division, so that no step is exactly none; |v|^2 = k^2 + lr s growth
        lr, scale = group["lr"], SCALES[group["scale"]](m, n)
        growth = lr * scale * P.square().sum(dim=-1) - 2 * k * (u * P).sum(dim=-1)
        before = torch.where(norm > 0, k, 0)
        length = (before.square() + lr * scale * growth).clamp_min(0).sqrt().clamp_min(SHORTEST)
        gain = g - lr * adam
        batch.state.update(gain=gain, length=torch.where(norm > 0, length, k))
        along = adam / scale + gain * growth / (before + length) / length
        return along.unsqueeze(-1) * u + (gain / length).unsqueeze(-1) * P
