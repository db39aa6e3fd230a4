"""Aurora: orthogonal updates whose rows all have the same norm, so that no neuron is left behind.

The polar factor U of a tall M (m > n) has U^T U = I, but its row norms follow those of M: a neuron with a small
gradient gets a small update from Muon too. Aurora looks for the orthogonal U closest to M whose rows all have norm
sqrt(n / m), by scaling the rows before orthogonalising and correcting the scale with what came out:

    d_i = 1 / ||M_i||
    repeat `iterations` times:  U = polar(d * M);  d_i <- d_i * ((n / m) / ||U_i||^2)^beta   (not after the last)

A wide matrix is treated as its transpose (equal columns); a square one is left to the polar factor, whose rows all
have norm 1 already. Source: the release variant of Aurora, Tilde Research (2026).
"""

from typing import Any

import torch
from torch import Tensor

from kernels import backend
from optim.muon import MatrixOptimizer
from optim.polar import (
    SAFETY,
    as_matrices,
    check_polar_arguments,
    fast_half_dtype,
    newton_schulz,
    plan_segments,
    polar,
    polar_svd,
    storage_dtype,
)

SIDES = ("both", "tall", "wide")


@torch.no_grad()
def aurora_polar(
    M: Tensor,
    iterations: int = 2,
    beta: float = 0.5,
    method: str = "polar_express",
    steps: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kernels: str = "auto",
    form: str = "auto",
) -> Tensor:
    """The row-balanced polar factor of each matrix of M [..., m, n] (columns where m < n), in `dtype`.

    Rows (columns) have norm sqrt(n / m) within some percent after 2 iterations; zero ones stay zero. The arguments
    after `beta` are those of `polar`. On CUDA d * M is never stored: it enters the products as they load M, and an
    iteration that only corrects d computes the row norms of its polar factor without writing it.
    """
    M = as_matrices(M)
    check_aurora_arguments("aurora_polar", iterations, beta)
    m, n = M.shape[-2:]
    if m == n:
        return polar(M, method, steps, dtype, kernels, form)
    if m < n:
        return aurora_polar(M.mT, iterations, beta, method, steps, dtype, kernels, form).mT
    check_polar_arguments(method, steps)
    ops = backend(kernels, M.device)
    storage = torch.float32 if method == "svd" else storage_dtype(dtype, M.device, method, steps)
    rows, norm = ops.normalize_rows(M.flatten(0, -3) if M.ndim > 2 else M.unsqueeze(0), storage)

    def factor(d: Tensor, outputs: str) -> tuple[Tensor, Tensor]:
        if method == "svd":
            U = polar_svd(d.unsqueeze(-1) * rows)
            return U, U.square().sum(dim=-1).float()
        plan = plan_segments(method, steps, storage, m, n, ops.symmetric, form)
        return newton_schulz(ops, rows, d, plan, SAFETY[method], dtype, outputs)

    d = (norm > 0).float()  # of unit rows: the definition's 1 / ||M_i|| is in them
    for _ in range(iterations - 1):
        _, row_square = factor(d, "row_square")
        d = d * torch.where(row_square > 0, n / (m * row_square), 1) ** beta
    U, _ = factor(d, "matrix")
    return U.reshape(M.shape)


def check_aurora_arguments(who: str, iterations: int, beta: float) -> None:
    if iterations < 1:
        raise ValueError(f"{who}: iterations = {iterations} must be at least 1; 2 is the usual choice")
    if not 0 <= beta <= 1:
        raise ValueError(f"{who}: beta = {beta} must be between 0 and 1; 0.5 is the usual choice")


class Aurora(MatrixOptimizer):
    """Muon with equal row norms. `sides` names the matrices it balances ("both", "tall" or "wide"); the others get
    Muon's update. `iterations` polar factors a step (1 is known as Muon-EQ) and `beta` the strength of correction.
    """

    def __init__(
        self, params: Any, lr: float = 0.02, iterations: int = 2, beta: float = 0.5, sides: str = "both", **muon: Any
    ) -> None:
        super().__init__(params, lr, iterations=iterations, beta=beta, sides=sides, **muon)

    def _check_group(self, index: int) -> None:
        super()._check_group(index)
        group = self.param_groups[index]
        check_aurora_arguments("Aurora", group["iterations"], group["beta"])
        if group["sides"] not in SIDES:
            raise ValueError(f"Aurora: sides = {group['sides']!r} is unknown; choose one of {', '.join(SIDES)}")

    def orthogonalize(self, update: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        m, n = update.shape[-2:]
        side = "tall" if m > n else "wide"
        iterations = group["iterations"] if group["sides"] in ("both", side) else 0
        dtype = fast_half_dtype(update.device.type)
        polar_arguments = group["polar_method"], group["polar_steps"], dtype, self.kernels
        if iterations == 0:
            return polar(update, *polar_arguments)
        return aurora_polar(update, iterations, group["beta"], *polar_arguments)
