"""Riemannian Aurora: climb <M, U> over the U with orthonormal columns and rows of equal norm.

The set (tall M, m > n) is  U^T U = I  and  ||U_i||^2 = n / m  for every row i. At a U in it, the part of M that is
tangent to the set is

    Z = M - U S - lambda * U       S = B - U^T (lambda * U),  B = sym(U^T M)

which keeps U^T U for any lambda, and the row norms for the lambda that solves

    (diag(w) - P o P) lambda = q    P = U U^T,  w = rowsum(P o P),  q = rowsum(M o U) - rowsum(U B o U)

where o is the elementwise product. The matrix is the Laplacian of a graph with weights P_ij^2: symmetric, never
negative, with the constant vector as its null space, so q is centred and conjugate gradients need no regularisation
(on the set w = n / m, the constant that Tilde Research writes; theirs has to be raised off it). P o P is never formed:
(P o P) v = rowsum(U (U^T (v * U)) o U), at 4 m n^2 FLOPs a product.

From U = polar(M), `outer_steps` times:  U <- retract(U + step_size * Z), where retracting is `retraction_steps` times
rows to sqrt(n / m), then the polar factor. M is first scaled to the norm of U, so that `step_size` means the same for
gradients of any size. The gain over Aurora (0.02 to 1.2% of <M, U>, at rows more equal, in the tests) needs an accurate
polar factor: `simple_quintic` gives all of it, the 19% by which five Polar Express steps miss orthogonality drown it.
The cost is 1 + outer_steps * retraction_steps polar factors and outer_steps * cg_steps products of 4 m n^2.

Source: Riemannian Aurora, Tilde Research (2026), arXiv 2606.27715.
"""

import math
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from kernels.reference import TINY
from optim.aurora import Aurora, is_balanced
from optim.bank import State
from optim.matrix_optimizer import MatrixOptimizer
from optim.options import Option
from optim.polar import as_matrices, polar


@torch.no_grad()
def riemannian_polar(
    M: Tensor,
    outer_steps: int = 3,
    cg_steps: int = 20,
    step_size: float = 0.1,
    retraction_steps: int = 2,
    method: str = "simple_quintic",
    steps: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kernels: str = "auto",
) -> Tensor:
    """A row-balanced orthogonal U with a large <M, U> for each matrix of M [..., m, n] (columns where m < n), float32.

    Polar factors are taken by `polar` with the arguments from `method` on; everything else is float32. Square matrices
    get the polar factor; zero ones stay zero.
    """
    polar_of = partial(polar, method=method, steps=steps, dtype=dtype, kernels=kernels)
    is_wide = M.size(-2) < M.size(-1)
    M = as_matrices(M.mT if is_wide else M).float()
    m, n = M.shape[-2:]
    M = M / M.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(TINY)
    M = math.sqrt(n) * M / torch.linalg.vector_norm(M, dim=(-2, -1), keepdim=True).clamp_min(TINY)  # n / TINY overflows
    U = polar_of(M).float()
    for _ in range(outer_steps if m > n else 0):
        U = U + step_size * tangent(M, U, cg_steps)
        for _ in range(retraction_steps):
            U = U * (math.sqrt(n / m) / torch.linalg.vector_norm(U, dim=-1, keepdim=True).clamp_min(TINY))
            U = polar_of(U).float()
    return U.mT if is_wide else U


def tangent(M: Tensor, U: Tensor, cg_steps: int) -> Tensor:
    """Z above: the part of M [..., m, n] tangent to the set at U, with lambda from `cg_steps` conjugate gradients."""
    B = U.mT @ M
    B = (B + B.mT) / 2
    rows = _row_multipliers(M, U, B, cg_steps).unsqueeze(-1) * U
    return M - U @ (B - U.mT @ rows) - rows


def _row_multipliers(M: Tensor, U: Tensor, B: Tensor, cg_steps: int) -> Tensor:
    """lambda [..., m], centred."""

    def squared_kernel(v: Tensor) -> Tensor:
        return ((U @ (U.mT @ (v.unsqueeze(-1) * U))) * U).sum(dim=-1)

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(dim=-1, keepdim=True)

    def centred(v: Tensor) -> Tensor:
        return v - v.mean(dim=-1, keepdim=True)

    w = squared_kernel(torch.ones_like(U[..., 0]))
    residual = centred((M * U).sum(dim=-1) - ((U @ B) * U).sum(dim=-1))
    solution, direction = torch.zeros_like(residual), residual
    square = first_square = dot(residual, residual)
    for _ in range(cg_steps):
        image = w * direction - squared_kernel(direction)
        curvature = dot(direction, image)
        # Solved or at the end of float32: stand still. Decided on the device, for each matrix.
        going_on = (curvature > 0) & (square > 1e-12 * first_square)
        length = torch.where(going_on, square / curvature, 0)
        solution = solution + length * direction
        residual = residual - length * image
        previous, square = square, dot(residual, residual)
        direction = torch.where(going_on, residual + square / previous * direction, direction)
    return centred(solution)


class RiemannianAurora(MatrixOptimizer):
    """Aurora by Riemannian ascent, see `riemannian_polar`."""

    options: ClassVar = {
        "outer_steps": Option(3, "steps of the ascent", (">= 1",)),
        "cg_steps": Option(20, "conjugate gradients in a step of the ascent", (">= 1",)),
        "step_size": Option(0.1, "length of such a step, above 0 and at most 1", ("> 0", "<= 1")),
        "retraction_steps": Option(2, "equal rows, then a polar factor: so many times after such a step", (">= 1",)),
        "sides": Aurora.options["sides"],
        "polar_method": replace(MatrixOptimizer.options["polar_method"], default="simple_quintic"),
    }

    def orthogonalize(self, update: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        if not is_balanced(group["sides"], *update.shape[-2:]):
            return self.polar(update, group)
        ascent = {name: group[name] for name in ("outer_steps", "cg_steps", "step_size", "retraction_steps")}
        return riemannian_polar(update, **ascent, **self.polar_arguments(update, group))
