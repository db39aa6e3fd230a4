"""Symmetric products of a matrix with itself, one triangle computed and mirrored.

    R = scale * Y^T Y    with Y = diag(row_scale) X,  X [B, m, n],  R [B, n, n]      (side "columns")
    R = scale * Y Y^T                                                R [B, m, m]      (side "rows")

Y is never stored. Where the summed dimension carries the scale (columns), R_ij = sum_k d_k^2 X_ki X_kj, so one operand
takes d^2 between its load and the product; where the output carries it (rows), the float32 sums take d_i d_j at the
end. `scale` (one a matrix) also waits for the end: 1 / ||Y||_F^2 there is Frobenius normalisation for free. In half
precision row_scale should be at most one and `scale` hold the rest; d^2 X is lifted by a power of two, so that float16
keeps rows of small d: every |d_k^2 X_ki| up to 3 sqrt(m) fits.

With s = n (columns) or m (rows), l the other one and T = ceil(s / tile) tiles: s^2 l (1 + 1/T) FLOPs, 2 s^2 l dense;
bytes in half precision: 2 m n read at least, 2 s^2 written. Any strides: a transposed view costs no copy.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import Tile, check_batch, check_scale, lower_triangle, operator, precision, product_tile

SIDES = ("columns", "rows")


@triton.jit
def gram_kernel(
    x, row_scale, scale, out, m, n, lift, stride_b, stride_m, stride_n,
    ROW_SCALE: tl.constexpr, SCALE: tl.constexpr, SIZE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles (i, j) and (j, i) of X^T X [n, n]. ROW_SCALE: "none", "summed" (d [m]) or "output" (d [n])."""
    tiles = tl.cdiv(n, SIZE)
    pairs = tiles * (tiles + 1) // 2
    b = (tl.program_id(0) // pairs).to(tl.int64)
    i, j = lower_triangle(tl.program_id(0) % pairs)
    columns_i, columns_j = i * SIZE + tl.arange(0, SIZE), j * SIZE + tl.arange(0, SIZE)
    rows = tl.arange(0, DEPTH)
    x += b * stride_b
    # X_i is loaded transposed: so both operands come in as the product reads them, without a turn in registers
    x_i = x + columns_i[:, None].to(tl.int64) * stride_n + rows[None, :].to(tl.int64) * stride_m
    x_j = x + rows[:, None].to(tl.int64) * stride_m + columns_j[None, :].to(tl.int64) * stride_n
    step = tl.full((), DEPTH, tl.int64) * stride_m
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    for k in range(0, m, DEPTH):
        left = tl.load(x_i, mask=(columns_i < n)[:, None] & (k + rows < m)[None, :], other=0.0)
        right = tl.load(x_j, mask=(k + rows < m)[:, None] & (columns_j < n)[None, :], other=0.0)
        if ROW_SCALE == "summed":
            d = tl.load(row_scale + b * m + k + rows, mask=k + rows < m, other=0.0)
            left = (left * (d * d * lift)[None, :]).to(left.dtype)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        x_i += step
        x_j += step
    if ROW_SCALE == "summed":
        total /= lift
    if ROW_SCALE == "output":
        d_i = tl.load(row_scale + b * n + columns_i, mask=columns_i < n, other=0.0)
        d_j = tl.load(row_scale + b * n + columns_j, mask=columns_j < n, other=0.0)
        total *= d_i[:, None] * d_j[None, :]
    if SCALE:
        total *= tl.load(scale + b)
    if i == j:  # symmetric but for the rounding of the scaled operand
        total = 0.5 * (total + tl.trans(total))
    result = total.to(out.dtype.element_ty)
    inside = (columns_i < n)[:, None] & (columns_j < n)[None, :]
    out += b * n * n
    tl.store(out + columns_i[:, None].to(tl.int64) * n + columns_j[None, :], result, mask=inside)
    if i != j:
        tl.store(
            out + columns_j[:, None].to(tl.int64) * n + columns_i[None, :], tl.trans(result), mask=tl.trans(inside)
        )


def gram(
    X: Tensor,
    row_scale: Tensor | None = None,
    scale: Tensor | None = None,
    side: str = "columns",
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """scale * Y^T Y ("columns", [B, n, n]) or scale * Y Y^T ("rows", [B, m, m]) with Y = diag(row_scale) X.

    X [B, m, n] float16, bfloat16 or float32 with any strides; row_scale [B, m] and scale [B] float32, 1 where left
    out. Sums in float32, the result in X's dtype or in `dtype` float32. `tile` replaces the device's own. Raises
    ValueError for other arguments.
    """
    if side not in SIDES:
        raise ValueError(f"gram: side = {side!r} is unknown; choose columns (X^T X) or rows (X X^T)")
    check_batch("gram: X", X)
    if dtype not in (None, X.dtype, torch.float32):
        raise ValueError(f"gram: dtype = {dtype} must be X's own, {X.dtype}, or torch.float32")
    row_scale = check_scale("gram: row_scale", row_scale, tuple(X.shape[:2]), X)
    scale = check_scale("gram: scale", scale, (X.size(0),), X)
    tall = X if side == "columns" else X.mT
    return _gram(tall, row_scale, scale, side == "rows", dtype or X.dtype, tile and list(tile))


def _empty(
    X: Tensor, row_scale: Tensor | None, scale: Tensor | None, scales_output: bool, dtype: torch.dtype,
    tile: list[int] | None,
) -> Tensor:  # fmt: skip
    return X.new_empty((X.size(0), X.size(2), X.size(2)), dtype=dtype)


@operator(fake=_empty)
def _gram(
    X: Tensor, row_scale: Tensor | None, scale: Tensor | None, scales_output: bool, dtype: torch.dtype,
    tile: list[int] | None,
) -> Tensor:  # fmt: skip
    out = _empty(X, row_scale, scale, scales_output, dtype, tile)
    B, m, n = X.shape
    size, _, depth, warps, stages = tile or product_tile(X)
    tiles = triton.cdiv(n, size)
    mode = "none" if row_scale is None else "output" if scales_output else "summed"
    lift = 2.0 ** (14 - math.ceil(math.log2(m) / 2))
    gram_kernel[(B * tiles * (tiles + 1) // 2,)](
        X, row_scale, scale, out, m, n, lift, *X.stride(),
        ROW_SCALE=mode, SCALE=scale is not None, SIZE=size, DEPTH=depth, PRECISION=precision(X.dtype),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out
