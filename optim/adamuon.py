"""AdaMuon: the polar factor of the momentum's signs, each entry divided by its running root mean square
(arXiv 2507.11005).

    O = polar(sign(M))              V <- beta2 * V + (1 - beta2) * O^2
    A = O / (sqrt(V) + 1e-8)        U = A sqrt(min(m, n)) / ||A||

V starts at zero and is not corrected for it: that is one factor for all entries, which cancels. U has the length of a
polar factor, so that Muon's learning rates fit; with `scale = "match_rms_adamw"` (`matrix_scale`) the update is the
paper's, 0.2 sqrt(m n) A / ||A||. `beta2` None, the default, is the paper's: the momentum's own share. The small number
is beside entries of a polar factor, so the update does not depend on the gradients' scale. State: V, one number per
weight.

Disagreements: the paper's first version and NVIDIA's Emerging Optimizers take the polar factor of M, not of its signs;
the latter has beta2 = 0.95 apart from the momentum, Muon's scale, and does not restore the length.

An entry of M that rounding makes positive or negative moves O by as much as any other: what else changes rounding
alone (the number of ranks, kernels) can show here.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.reference import TINY
from optim.bank import State
from optim.matrix_optimizer import MatrixOptimizer
from optim.options import Option

EPS = 1e-8


class AdaMuon(MatrixOptimizer):
    """Muon of the momentum's signs, with every entry of the update normalised by its running root mean square."""

    options: ClassVar = {
        "beta2": Option(
            None, "share of the entries' mean squares that a step keeps; None: momentum", (">= 0", "< 1"), kind=float
        )
    }

    def orthogonalize(self, update: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        beta2 = group["momentum"] if group["beta2"] is None else group["beta2"]
        U = self.polar(update.sign_(), group).float()
        if "entry_square" not in state:
            state["entry_square"] = torch.zeros_like(U)
        v = state["entry_square"].lerp_(U.square(), 1 - beta2)
        U.div_(v.sqrt().add_(EPS))
        length = torch.linalg.vector_norm(U, dim=(-2, -1), keepdim=True)
        return U.div_((length / math.sqrt(min(U.shape[-2:]))).clamp_min(TINY))
