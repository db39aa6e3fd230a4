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

from optim.muon import MatrixOptimizer
from optim.polar import fast_half_dtype, polar

SIDES = ("both", "tall", "wide")


def aurora_polar(
    M: Tensor,
    iterations: int = 2,
    beta: float = 0.5,
    method: str = "polar_express",
    steps: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """The row-balanced polar factor of each matrix of M [..., m, n] (columns where m < n), in `dtype`.

    Rows (columns) have norm sqrt(n / m) within some percent after 2 iterations; zero ones stay zero.
    """
    m, n = M.shape[-2:]
    if m == n:
        return polar(M, method, steps, dtype)
    if m < n:
        return aurora_polar(M.mT, iterations, beta, method, steps, dtype).mT
    # Unit rows: M and d of the definition enter only as d * M. Two divisions keep the squares inside float32.
    tiny = torch.finfo(torch.float32).tiny  # for zero rows
    M = M.float()
    M = M / M.abs().amax(dim=-1, keepdim=True).clamp_min(tiny)
    M = M / torch.linalg.vector_norm(M, dim=-1, keepdim=True).clamp_min(tiny)
    U = polar(M, method, steps, dtype)
    d = torch.ones_like(M[..., :1])
    for _ in range(iterations - 1):
        row_square = U.float().square().sum(dim=-1, keepdim=True)
        d = d * torch.where(row_square > 0, n / (m * row_square), 1) ** beta
        U = polar(d * M, method, steps, dtype)
    return U


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
        if group["iterations"] < 1:
            raise ValueError(f"Aurora: iterations = {group['iterations']} must be at least 1; 2 is the usual choice")
        if not 0 <= group["beta"] <= 1:
            raise ValueError(f"Aurora: beta = {group['beta']} must be between 0 and 1; 0.5 is the usual choice")
        if group["sides"] not in SIDES:
            raise ValueError(f"Aurora: sides = {group['sides']!r} is unknown; choose one of {', '.join(SIDES)}")

    def orthogonalize(self, update: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> Tensor:
        m, n = update.shape[-2:]
        side = "tall" if m > n else "wide"
        iterations = group["iterations"] if group["sides"] in ("both", side) else 0
        polar_arguments = group["polar_method"], group["polar_steps"], fast_half_dtype(update.device.type)
        if iterations == 0:
            return polar(update, *polar_arguments)
        return aurora_polar(update, iterations, group["beta"], *polar_arguments)
