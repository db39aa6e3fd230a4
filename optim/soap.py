"""SOAP and SOAP-Muon: second moments in the eigenbases of a matrix's gradients.

For gradients G with momentum M (B for SOAP), squares entry by entry:

    L <- shampoo_beta L + (1 - shampoo_beta) G G^T      R <- shampoo_beta R + (1 - shampoo_beta) G^T G
    Q_L, Q_R: their eigenvectors, largest first, once; then every step Q <- the Q of a QR decomposition of L Q

    SOAP        V <- beta2 V + (1 - beta2) (Q_L^T G Q_R)^2      U = Q_L (Q_L^T B Q_R / sqrt(V)) Q_R^T
    SOAP-Muon   V <- beta2 V + (1 - beta2) (Q_L^T M Q_R)^2      U = polar(Q_L (Q_L^T M Q_R / sqrt(V)) Q_R^T)

SOAP (arXiv 2409.11321) is Adam in that basis, with Adam's corrections of B and V, which both begin with the first
gradient after the bases; with `hyperball` it is SOAP-H of the optimizer track. SOAP-Muon is that track's, without its
gate on the attention's output projection: before each QR it sorts the columns of Q by diag(Q^T L Q), and V with them.

L of a tall matrix is singular until it has seen m / n gradients, and eigenvectors of a null space are whatever rounding
makes them. So the bases are taken when both factors can have full rank, after ceil(max(m, n) / min(m, n)) gradients
other than zero (the first one of a square matrix); all gradients are zero at the start of a model whose head is. Until
then SOAP's direction is zero, as in its authors' code in the first step, and SOAP-Muon is Muon. Where gradients have so
low a rank (few rows in a batch) that a factor is singular even then, rounding does decide: in a toy model gradients
changed by 1e-15, or averaged over two ranks, changed weights by 10% within 20 steps.

Cost: two QR decompositions, m^3 and n^3, and eight products with the bases in a step. State beside momentum: one number
per weight, 2 (m^2 + n^2) and one per matrix.
"""

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from optim.bank import by_matrix
from optim.batch import MatrixBatch
from optim.matrix_optimizer import MatrixOptimizer
from optim.options import Option
from optim.second_moment import bounded, over_root

FACTORS = "left_factor", "right_factor"
BASES = "left_basis", "right_basis"


class Soap(MatrixOptimizer):
    """Adam in the eigenbases of the gradients."""

    options: ClassVar = {
        "beta2": Option(0.9, "share of the mean squares that a step keeps", (">= 0", "< 1")),
        "shampoo_beta": Option(0.9, "share of the gradients' products that a step keeps", (">= 0", "< 1")),
        "nesterov": replace(MatrixOptimizer.options["nesterov"], default=False),
    }
    sorts_bases: ClassVar = False

    def direction(self, batch: MatrixBatch) -> Tensor:
        G = bounded(batch.gradient)
        left, right = (batch.per_matrix(name, size, size) for name, size in zip(BASES, G.shape[1:], strict=True))
        square = batch.per_matrix("square", *G.shape[1:])
        steps = batch.per_matrix("steps")
        steps.add_((steps >= steps_to_full_rank(batch)) | G.flatten(1).any(dim=-1))
        products = G @ G.mT, G.mT @ G  # now: momentum overwrites gradients
        U = self.rotated_direction(batch, G, left, right, square)
        for name, product in zip(FACTORS, products, strict=True):
            batch.per_matrix(name, *product.shape[1:]).lerp_(product, 1 - batch.group["shampoo_beta"])
        self.turn_bases(batch)
        return U

    def rotated_direction(self, batch: MatrixBatch, G: Tensor, left: Tensor, right: Tensor, square: Tensor) -> Tensor:
        """U [B, m, n] in the bases from before this step, `left` and `right`; `square`, V, is changed in place."""
        group, with_bases = batch.group, batch.state["steps"] - steps_to_full_rank(batch)
        square.lerp_((left.mT @ G @ right).square(), 1 - group["beta2"])
        G = G * by_matrix(with_bases > 0, G)  # older gradients have no part in the squares, and would be far above them
        divided = over_root(left.mT @ batch.momentum(G) @ right, square)
        with_bases = with_bases.clamp_min(1)
        ahead = with_bases + group["nesterov"]
        correction = (1 - group["beta2"] ** with_bases).sqrt() / (1 - group["momentum"] ** ahead)
        return left @ divided @ right.mT * by_matrix(correction, square)

    def turn_bases(self, batch: MatrixBatch) -> None:
        """One step of orthogonal iteration, or the eigenvectors when a matrix's factors are complete."""
        state, start, steps = batch.state, steps_to_full_rank(batch), batch.state["steps"]
        counts = [] if steps.is_meta else steps.tolist()  # the device waits, as in the decompositions
        for dim, factor, name in zip((-2, -1), FACTORS, BASES, strict=True):
            L, Q = state[factor], state[name]
            turned = Q
            if any(count > start for count in counts):
                if self.sorts_bases:
                    order = (Q * (L @ Q)).sum(dim=-2).argsort(dim=-1, descending=True)
                    Q = Q.take_along_dim(order.unsqueeze(-2), dim=-1)
                    order = order.unsqueeze(-1 if dim == -2 else -2)
                    state["square"] = state["square"].take_along_dim(order, dim=dim)
                turned = torch.linalg.qr(L @ Q).Q
            if start in counts:
                eigenvectors = torch.linalg.eigh(L).eigenvectors.flip(-1)
                turned = torch.where(by_matrix(steps == start, Q), eigenvectors, turned)
            state[name] = torch.where(by_matrix(steps >= start, Q), turned, Q)


class SoapMuon(Soap):
    """The polar factor of SOAP's direction."""

    options: ClassVar = {"nesterov": MatrixOptimizer.options["nesterov"]}
    sorts_bases: ClassVar = True

    def rotated_direction(self, batch: MatrixBatch, G: Tensor, left: Tensor, right: Tensor, square: Tensor) -> Tensor:
        M = batch.momentum()
        rotated = left.mT @ M @ right
        square.lerp_(rotated.square(), 1 - batch.group["beta2"])
        divided = left @ over_root(rotated, square) @ right.mT
        has_bases = by_matrix(batch.state["steps"] > steps_to_full_rank(batch), M)
        return self.polar(torch.where(has_bases, divided, M), batch.group)


def steps_to_full_rank(batch: MatrixBatch) -> int:
    """How many gradients the product of the longer side is a sum of before it can have full rank."""
    _, m, n = batch.shape
    return math.ceil(max(m, n) / min(m, n))
