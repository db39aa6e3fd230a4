"""The Gram matrix of a matrix's columns, one triangle computed and mirrored.

    R = scale * X^T X        X [B, m, n],  scale [B],  R [B, n, n]

With T = ceil(n / tile) tiles: m n^2 (1 + 1/T) FLOPs, 2 m n^2 dense; bytes in half precision: 2 m n read at least,
2 n^2 written. Any strides: a transposed view, for the Gram matrix of the rows, costs no copy.
"""

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
    descriptor_x, x, scale, out, m, n, stride_b, stride_m, stride_n,
    SCALE: tl.constexpr, SIZE: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Tiles (i, j) and (j, i) of one matrix's R [n, n]; X is loaded by its descriptor if DESCRIBED (of X^T if
    TRANSPOSED)."""
    tiles = tl.cdiv(n, SIZE)
    pairs = tiles * (tiles + 1) // 2
    matrix = tl.program_id(0) // pairs
    b = matrix.to(tl.int64)
    i, j = lower_triangle(tl.program_id(0) % pairs)
    total = tl.zeros((SIZE, SIZE), dtype=tl.float32)
    if DESCRIBED:
        for k in range(0, m, DEPTH):
            left = tl.trans(load_block(descriptor_x, matrix, k, i * SIZE, DEPTH, SIZE, TRANSPOSED))
            right = load_block(descriptor_x, matrix, k, j * SIZE, DEPTH, SIZE, TRANSPOSED)
            total = tl.dot(left, right, total)
    else:
        columns_i, columns_j = i * SIZE + tl.arange(0, SIZE), j * SIZE + tl.arange(0, SIZE)
        rows = tl.arange(0, DEPTH)
        x += b * stride_b
        # X_i is loaded transposed: so both operands come in as the product reads them, without a turn in registers
        x_i = x + columns_i[:, None].to(tl.int64) * stride_n + rows[None, :].to(tl.int64) * stride_m
        x_j = x + rows[:, None].to(tl.int64) * stride_m + columns_j[None, :].to(tl.int64) * stride_n
        step = tl.full((), DEPTH, tl.int64) * stride_m
        for k in range(0, m, DEPTH):
            left = tl.load(x_i, mask=(columns_i < n)[:, None] & (k + rows < m)[None, :], other=0.0)
            right = tl.load(x_j, mask=(k + rows < m)[:, None] & (columns_j < n)[None, :], other=0.0)
            total = tl.dot(left, right, total, input_precision=PRECISION)
            x_i += step
            x_j += step
    if SCALE:
        total *= tl.load(scale + b)
    if i == j:  # symmetric only if the product sums both triangles in one order
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


def gram(X: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None, tile: Tile | None = None) -> Tensor:
    """scale * X^T X: the Gram matrix of X's columns, [B, n, n].

    X [B, m, n] float16, bfloat16 or float32 with any strides; scale [B] float32, 1 if left out. Sums in float32, the
    result in X's dtype or in `dtype` float32. `tile` replaces the device's own. Raises ValueError for other arguments.
    """
    check_batch("gram: X", X)
    if dtype not in (None, X.dtype, torch.float32):
        raise ValueError(f"gram: dtype = {dtype} must be X's own, {X.dtype}, or torch.float32")
    scale = check_scale("gram: scale", scale, (X.size(0),), X)
    return _gram(X, scale, dtype or X.dtype, tile and list(tile))


@operator(fake=lambda X, scale, dtype, _: X.new_empty((X.size(0), X.size(2), X.size(2)), dtype=dtype))
def _gram(X: Tensor, scale: Tensor | None, dtype: torch.dtype, tile: list[int] | None) -> Tensor:
    B, m, n = X.shape
    out = X.new_empty((B, n, n), dtype=dtype)
    size, _, depth, warps, stages = tile or product_tile(X)
    tiles = cdiv(n, size)
    described = describes(X)
    gram_kernel[(B * tiles * (tiles + 1) // 2,)](
        descriptor(X, depth, size) if described else None, X, scale, out, m, n, *X.stride(),
        SCALE=scale is not None, SIZE=size, DEPTH=depth, PRECISION=precision(X.dtype), DESCRIBED=described,
        TRANSPOSED=X.stride(2) != 1, **launch_options(warps, stages),
    )  # fmt: skip
    return out
