"""The Gram matrix of a matrix's columns, one triangle computed and mirrored.

    R = scale * Y^T Y    with Y = diag(row_scale) X,  X [B, m, n],  R [B, n, n]

Y is never stored: R_ij = sum_k d_k^2 X_ki X_kj, so one operand takes d^2 between its load and the product. `scale` (one
per matrix) waits for the end: 1 / ||Y||_F^2 there is Frobenius normalisation for free. In half precision row_scale
should be at most one and `scale` hold the rest; d^2 X is lifted by a power of two, so that float16 keeps rows of small
d: every |d_k^2 X_ki| up to 3 sqrt(m) fits.

With T = ceil(n / tile) tiles: m n^2 (1 + 1/T) FLOPs, 2 m n^2 dense; bytes in half precision: 2 m n read at least,
2 n^2 written. Any strides: a transposed view, for the Gram matrix of the rows, costs no copy.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import (
    Tile,
    cdiv,
    check_batch,
    check_scale,
    describes,
    descriptor,
    launch_options,
    load_block,
    lower_triangle,
    operator,
    precision,
    product_tile,
)


@triton.jit
def gram_kernel(
    descriptor_x, x, row_scale, scale, out, m, n, lift, stride_b, stride_m, stride_n,
    ROW_SCALE: tl.constexpr, SCALE: tl.constexpr, SIZE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Tiles (i, j) and (j, i) of one matrix's R [n, n]; X is loaded by its descriptor if DESCRIBED (of X^T if
    TRANSPOSED)."""
    tiles = tl.cdiv(n, SIZE)
    pairs = tiles * (tiles + 1) // 2
    matrix = tl.program_id(0) // pairs
    b = matrix.to(tl.int64)
    i, j = lower_triangle(tl.program_id(0) % pairs)
    columns_i, columns_j = i * SIZE + tl.arange(0, SIZE), j * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    if DESCRIBED:
        for k in range(0, m, DEPTH):
            left = tl.trans(load_block(descriptor_x, matrix, k, i * SIZE, DEPTH, SIZE, TRANSPOSED))
            right = load_block(descriptor_x, matrix, k, j * SIZE, DEPTH, SIZE, TRANSPOSED)
            total = tl.dot(left, right, total)
    else:
        rows = tl.arange(0, DEPTH)
        x += b * stride_b
        # X_i is loaded transposed: so both operands come in as the product reads them, without a turn in registers
        x_i = x + columns_i[:, None].to(tl.int64) * stride_n + rows[None, :].to(tl.int64) * stride_m
        x_j = x + rows[:, None].to(tl.int64) * stride_m + columns_j[None, :].to(tl.int64) * stride_n
        step = tl.full((), DEPTH, tl.int64) * stride_m
        for k in range(0, m, DEPTH):
            left = tl.load(x_i, mask=(columns_i < n)[:, None] & (k + rows < m)[None, :], other=0.0)
            right = tl.load(x_j, mask=(k + rows < m)[:, None] & (columns_j < n)[None, :], other=0.0)
            if ROW_SCALE:
                d = tl.load(row_scale + b * m + k + rows, mask=k + rows < m, other=0.0)
                left = (left * (d * d * lift)[None, :]).to(left.dtype)
            total = tl.dot(left, right, total, input_precision=PRECISION)
            x_i += step
            x_j += step
        if ROW_SCALE:
            total /= lift
    if SCALE:
        total *= tl.load(scale + b)
    if i == j:  # symmetric but for the rounding of the scaled operand
        total = 0.5 * (total + tl.trans(total))
    # Computed again: kept from above they would cost registers, and so the second block on a multiprocessor
    columns_i, columns_j = i * SIZE + tl.arange(0, SIZE), j * SIZE + tl.arange(0, SIZE)
    inside = (columns_i < n)[:, None] & (columns_j < n)[None, :]
    out += b * n * n
    result = total.to(out.dtype.element_ty)
    tl.store(out + columns_i[:, None].to(tl.int64) * n + columns_j[None, :], result, mask=inside)
    if i != j:
        mirrored = columns_j[:, None].to(tl.int64) * n + columns_i[None, :]
        tl.store(out + mirrored, tl.trans(result), mask=tl.trans(inside))


def gram(
    X: Tensor,
    row_scale: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """scale * Y^T Y with Y = diag(row_scale) X: the Gram matrix of Y's columns, [B, n, n].

    X [B, m, n] float16, bfloat16 or float32 with any strides; row_scale [B, m] and scale [B] float32, 1 where left
    out. Sums in float32, the result in X's dtype or in `dtype` float32. `tile` replaces the device's own. Raises
    ValueError for other arguments.
    """
    check_batch("gram: X", X)
    if dtype not in (None, X.dtype, torch.float32):
        raise ValueError(f"gram: dtype = {dtype} must be X's own, {X.dtype}, or torch.float32")
    row_scale = check_scale("gram: row_scale", row_scale, tuple(X.shape[:2]), X)
    scale = check_scale("gram: scale", scale, (X.size(0),), X)
    return _gram(X, row_scale, scale, dtype or X.dtype, tile and list(tile))


@operator(fake=lambda X, row_scale, scale, dtype, _: X.new_empty((X.size(0), X.size(2), X.size(2)), dtype=dtype))
def _gram(
    X: Tensor, row_scale: Tensor | None, scale: Tensor | None, dtype: torch.dtype, tile: list[int] | None
) -> Tensor:
    B, m, n = X.shape
    out = X.new_empty((B, n, n), dtype=dtype)
    size, _, depth, warps, stages = tile or product_tile(X)
    tiles = cdiv(n, size)
    lift = 2.0 ** (14 - math.ceil(math.log2(m) / 2))
    described = row_scale is None and describes(X)
    gram_kernel[(B * tiles * (tiles + 1) // 2,)](
        descriptor(X, depth, size) if described else None, X, row_scale, scale, out, m, n, lift, *X.stride(),
        ROW_SCALE=row_scale is not None, SCALE=scale is not None, SIZE=size, DEPTH=depth, PRECISION=precision(X.dtype),
        DESCRIBED=described, TRANSPOSED=X.stride(2) != 1, **launch_options(warps, stages),
    )  # fmt: skip
    return out
