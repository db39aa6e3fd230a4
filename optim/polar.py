"""Polar factor: the orthogonal matrix nearest to a given one, by matrix products alone.

With X = W S V^T the polar factor is W V^T: every singular value becomes 1 and the singular vectors stay. A
Newton-Schulz step applies the odd polynomial p(s) = a s + b s^3 + c s^5 to the singular values, since

    X (a I + b A + c A^2) = W p(S) V^T    with A = X^T X    (or (a I + b A + c A^2) X with A = X X^T)

so a few steps with coefficients that push (0, 1] towards 1 replace a singular value decomposition. The Gram
matrix A is taken on the smaller side; with s = min(m, n) and l = max(m, n) a step costs 4 s^2 l + 2 s^3 FLOPs.

Coefficients: `quintic` from Keller Jordan, "Muon: an optimizer for hidden layers" (2024): fast, ends within about
[0.7, 1.2]. `polar_express` from Amsel et al., arXiv 2505.16932: the best polynomial for each step in turn.
`simple_quintic`: the slow textbook iteration, quadratically convergent at 1. `svd`: float64, the oracle for tests.
"""

from functools import cache

import torch
from torch import Tensor

Coefficients = tuple[float, float, float]

QUINTIC: list[Coefficients] = [(3.4445, -4.7750, 2.0315)] * 5
SIMPLE_QUINTIC: list[Coefficients] = [(2.0, -1.5, 0.5)] * 12
POLAR_EXPRESS: list[Coefficients] = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
COEFFICIENTS = {"polar_express": POLAR_EXPRESS, "quintic": QUINTIC, "simple_quintic": SIMPLE_QUINTIC}
METHODS = (*COEFFICIENTS, "svd")
# Polar Express is tuned for spectral norms up to 1/1.02, which leaves room for rounding in half precision.
SAFETY = {"polar_express": 1.02, "quintic": 1.0, "simple_quintic": 1.0}


@cache
def fast_half_dtype(device_type: str) -> torch.dtype:
    """bfloat16 where matrix products in it run in hardware, else float32."""
    if device_type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def polar(
    X: Tensor, method: str = "polar_express", steps: int | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Polar factor of each matrix of X [..., m, n], in X's shape and in `dtype` (float64 for "svd").

    `steps` defaults to the method's own number (polar_express 5, quintic 5, simple_quintic 12); further steps
    repeat the last coefficients. Works for any scale from 1e-30 to 1e30; a zero matrix stays zero.
    Raises ValueError for an unknown method, fewer than two dimensions or steps < 1.
    """
    check_polar_arguments(method, steps)
    if X.ndim < 2:
        raise ValueError(f"polar: X has shape {tuple(X.shape)}; the last two dimensions must be a matrix")
    if method == "svd":
        return _polar_svd(X)
    # Dividing by the largest entry first keeps the squares of very small or large entries inside float32.
    tiny = torch.finfo(torch.float32).tiny  # for the zero matrix
    X = X.float()
    X = X / X.abs().amax(dim=(-2, -1), keepdim=True).clamp_min(tiny)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    X = (X / (SAFETY[method] * norm).clamp_min(tiny)).to(dtype)
    shape, (m, n) = X.shape, X.shape[-2:]
    X = X.reshape(-1, m, n)
    coefficients = COEFFICIENTS[method]
    for step in range(steps or len(coefficients)):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        if m > n:
            A = X.mT @ X
            X = torch.baddbmm(X, X, torch.baddbmm(A, A, A, beta=b, alpha=c), beta=a)
        else:
            A = X @ X.mT
            X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.reshape(shape)


def check_polar_arguments(method: str, steps: int | None) -> None:
    if method not in METHODS:
        raise ValueError(f"polar_method = {method!r} is unknown; choose one of {', '.join(METHODS)}")
    if steps is not None and steps < 1:
        raise ValueError(f"polar_steps = {steps} must be at least 1; leave it out for the method's own number")


def _polar_svd(X: Tensor) -> Tensor:
    """W V^T over the singular values that are not numerically zero, so that a zero matrix stays zero."""
    W, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    rank_tolerance = S[..., :1] * max(X.shape[-2:]) * torch.finfo(torch.float64).eps
    return (W * (rank_tolerance < S).unsqueeze(-2)) @ Vh
