"""Aurora: orthogonal updates whose rows all have the same norm, so that no neuron is left behind.

The polar factor U of a tall M (m > n) has U^T U = I, but its row norms follow those of M: a neuron with a small
gradient gets a small update from Muon too. Aurora looks for the orthogonal U closest to M whose rows all have norm
sqrt(n / m). A wide matrix is treated as its transpose (equal columns); a square one is left to the polar factor, whose
rows all have norm 1 already. With h_i = ||U_i|| / sqrt(n / m), which should be 1:

release   d_i = 1 / ||M_i||;  `iterations` times:  U = polar(d * M),  d_i <- d_i / h_i^(2 beta)  (not after the last)
warm      d_i = c_i / ||M_i||, U = polar(d * M), and c_i <- c_i / h_i^(2 beta) for the next step: one polar factor a
          step, as Muon, because momentum changes little from step to step and with it the right d
paper     U_1 = polar(M_i / ||M_i||);  then  U_k+1 = polar(U_k / D), D_i <- D_i h_i^beta: the last polar factor is
          scaled instead of M

RiemannianAurora climbs <M, U> on the set of such U instead, at many times the cost; see `riemannian_polar`.

Source: Aurora, Tilde Research (2026), arXiv 2606.27715. `release` is what its code does and `paper` its Algorithm as we
read it (how D is damped is our choice); `warm` is ours.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from optim.bank import State
from optim.matrix_optimizer import MatrixOptimizer
from optim.options import Option, check_options
from optim.polar import as_matrices, check_polar_arguments, piece_length, polar, row_scaled_polar
from optim.unit_rows import UnitRows, takes_unit_rows

SIDES = ("both", "tall", "wide")
VARIANTS = ("release", "paper", "warm")


def correction(row_square: Tensor, share: float, beta: float) -> Tensor:
    """h^(-2 beta): the factor on rows whose squared norms are `row_square` that brings them nearer to `share` = n / m.
    Zero rows are left alone."""
    return torch.where(row_square > 0, share / row_square, 1) ** beta


@torch.no_grad()
def aurora_polar(
    M: Tensor | UnitRows,
    iterations: int = 2,
    beta: float = 0.5,
    method: str = "polar_express",
    steps: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    kernels: str = "auto",
    form: str = "auto",
    variant: str = "release",
    memory: Tensor | None = None,
) -> Tensor:
    """The row-balanced polar factor of each matrix of M [..., m, n] (columns where m < n), in `dtype`. M may be
    UnitRows, as in `polar`.

    Rows (columns) have norm sqrt(n / m) within some percent after 2 iterations; zero ones stay zero. The arguments
    from `method` to `form` are those of `polar`. `variant` "warm" uses and updates `memory`, c above, float32
    [..., max(m, n)], where zeros mean that nothing is known yet.
    """
    check_options("aurora_polar", dict(iterations=iterations, beta=beta, variant=variant), Aurora.options)
    check_polar_arguments(method, steps)
    polar_arguments: dict[str, Any] = dict(method=method, steps=steps, dtype=dtype, kernels=kernels, form=form)
    balance: Callable[..., Tensor] = partial(
        aurora_polar, iterations=iterations, beta=beta, variant=variant, **polar_arguments
    )
    M = M if isinstance(M, UnitRows) else as_matrices(M)
    m, n = M.shape[-2:]
    if m == n:
        return polar(M, **polar_arguments)
    if isinstance(M, UnitRows):
        U = _balanced(M, iterations, beta, variant, memory, polar_arguments)
        return U if m > n else U.mT
    if (length := piece_length(M)) is not None:
        memories = [None] * M.size(0) if memory is None else memory.split(length)
        return torch.cat([balance(M, memory=c) for M, c in zip(M.split(length), memories, strict=False)])
    if m < n:
        return balance(M.mT, memory=memory).mT
    U = _balanced(M.reshape(-1, m, n), iterations, beta, variant, memory, polar_arguments)
    return U.reshape(M.shape)


def _balanced(
    M: Tensor | UnitRows, iterations: int, beta: float, variant: str, memory: Tensor | None,
    polar_arguments: dict[str, Any],
) -> Tensor:  # fmt: skip
    """`aurora_polar` of tall M [B, m, n]; of UnitRows turned so that it is tall, too."""
    polar_of, norm = row_scaled_polar(M, **polar_arguments)
    m, n = max(M.shape[-2:]), min(M.shape[-2:])
    d = (norm > 0).float()  # of unit rows: the definition's 1 / ||M_i|| is in them
    if variant == "warm":
        assert memory is not None
        c = torch.where(memory > 0, memory, 1).view(norm.shape)
        U, row_square = polar_of(c * d, "both")
        c = c * correction(row_square, n / m, beta)
        # Only ratios count: they are kept about 1, and rows that are zero at 1, for the day when they are not.
        mean = (c * d).sum(dim=-1, keepdim=True) / d.sum(dim=-1, keepdim=True).clamp_min(1)
        memory.copy_(torch.where(d > 0, c / mean, 1).view(memory.shape))
    elif variant == "paper":
        damped = torch.ones_like(norm)
        U, row_square = polar_of(None, "matrix" if iterations == 1 else "both")
        for remaining in range(iterations - 2, -1, -1):
            damped = damped / correction(row_square, n / m, beta / 2)
            polar_of, norm = row_scaled_polar(U, **polar_arguments)
            U, row_square = polar_of(norm / damped, "both" if remaining else "matrix")
    else:
        scale: Tensor | None = None  # d, or None while it is 1
        for _ in range(iterations - 1):
            _, row_square = polar_of(scale, "row_square")
            scale = d = d * correction(row_square, n / m, beta)
        U, _ = polar_of(scale, "matrix")
    return U


def is_balanced(sides: str, m: int, n: int) -> bool:
    """Whether an m x n matrix is one that `sides` names; square ones never are."""
    return m != n and sides in ("both", "tall" if m > n else "wide")


class Aurora(MatrixOptimizer):
    """Muon with equal row norms; matrices that are not balanced, square ones among them, get Muon's update."""

    options: ClassVar = {
        "variant": Option(
            "release", "release, warm (one polar factor per step, with memory) or paper", choices=VARIANTS
        ),
        "iterations": Option(2, "polar factors in an update (1 is known as Muon-EQ); warm always takes 1", (">= 1",)),
        "beta": Option(0.5, "strength of the row correction, 0 to 1", (">= 0", "<= 1")),
        "sides": Option("both", "matrices that are balanced: both, tall or wide", choices=SIDES),
    }

    @takes_unit_rows
    def orthogonalize(self, update: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        if not is_balanced(group["sides"], *update.shape[-2:]):
            return self.polar(update, group)
        memory = None
        if group["variant"] == "warm":
            if "row_weight" not in state:
                B, m, n = update.shape
                state["row_weight"] = torch.zeros(B, max(m, n), dtype=torch.float32, device=update.device)
            memory = state["row_weight"]
        options = {name: group[name] for name in ("iterations", "beta", "variant")}
        return aurora_polar(update, **options, memory=memory, **self.polar_arguments(update, group))
