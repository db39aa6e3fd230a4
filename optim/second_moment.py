"""Running means of squares, as Adam keeps them, for rules on batches of matrices [B, m, n]."""

from torch import Tensor

from kernels.reference import TINY

LARGEST = 1e16  # entries beyond it are cut: sums of their squares would leave float32's range and never come back
ROUNDING = 1e-6  # entries this far below the root mean square of their matrix are rounding, and stay small


def bounded(gradient: Tensor) -> Tensor:
    """The gradient itself, cut to what can be squared."""
    return gradient.clamp_(-LARGEST, LARGEST)


def over_root(update: Tensor, square: Tensor) -> Tensor:
    """update / sqrt(square), entry by entry, [B, m, n]; zeros where a matrix has no squares.

    Adam adds an absolute eps to the root, which makes an update depend on the scale of the gradients. Here roots below
    ROUNDING times the matrix's root mean square are raised to that instead.
    """
    least = ROUNDING**2 * square.mean(dim=(-2, -1), keepdim=True)
    return update * square.maximum(least).clamp_min(TINY).rsqrt()
