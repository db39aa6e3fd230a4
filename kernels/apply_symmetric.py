"""A matrix times a symmetric one, with what the optimizers want to know of the result.

    Y = scale (alpha X + X S)        X, Y [B, m, n],  S [B, n, n],  scale [B]

and the sums of squares of Y's rows, taken from the float32 sums before they are rounded: what Aurora's correction
needs, without another pass over Y. Y itself is written in any dtype, or not at all.

The sums come in one part for each tile along the row and are added after, in a fixed order: the same bits every time.
2 m n^2 FLOPs; bytes in half precision 2 m n read at least, 2 n^2 read, 2 m n written.
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
    empty_in_order,
    launch_options,
    load_block,
    operator,
    precision,
    product_tile,
)

OUTPUTS = ("matrix", "row_square", "both")


@triton.jit
def apply_symmetric_kernel(
    left, right, tile_x, x, s, scale, out, square, m, n, alpha,
    stride_xb, stride_xm, stride_xn, stride_ob, stride_om, stride_on,
    SCALE: tl.constexpr, STORE: tl.constexpr, SQUARE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """One tile of Y, and its part of the sums of squares; the first three are descriptors, of X (or X^T, if
    TRANSPOSED), S and X again, by which they are loaded if DESCRIBED."""
    row_tiles, column_tiles = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    j = tl.program_id(0) % column_tiles  # neighbours share the rows of X, which S is small enough to leave in cache
    i = tl.program_id(0) // column_tiles % row_tiles
    matrix = tl.program_id(0) // (column_tiles * row_tiles)
    b = matrix.to(tl.int64)
    rows, columns, depth = i * ROWS + tl.arange(0, ROWS), j * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    x += b * stride_xb + rows[:, None].to(tl.int64) * stride_xm
    y = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    if DESCRIBED:
        for k in range(0, n, DEPTH):
            x_block = load_block(left, matrix, i * ROWS, k, ROWS, DEPTH, TRANSPOSED)
            s_block = load_block(right, matrix, k, j * COLUMNS, DEPTH, COLUMNS, False)
            y = tl.dot(x_block, s_block, y)
        y += alpha * load_block(tile_x, matrix, i * ROWS, j * COLUMNS, ROWS, COLUMNS, TRANSPOSED).to(tl.float32)
    else:
        x_tile = x + depth[None, :].to(tl.int64) * stride_xn
        s_tile = s + b * n * n + depth[:, None].to(tl.int64) * n + columns[None, :]
        for k in range(0, n, DEPTH):
            x_block = tl.load(x_tile, mask=(rows < m)[:, None] & (k + depth < n)[None, :], other=0.0)
            s_block = tl.load(s_tile, mask=(k + depth < n)[:, None] & (columns < n)[None, :], other=0.0)
            y = tl.dot(x_block, s_block, y, input_precision=PRECISION)
            x_tile += tl.full((), DEPTH, tl.int64) * stride_xn
            s_tile += DEPTH * n
        y += alpha * tl.load(x + columns[None, :].to(tl.int64) * stride_xn, mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        y *= tl.load(scale + b)
    if SQUARE:  # outside the matrix y is 0
        tl.store(square + (b * column_tiles + j) * m + rows, tl.sum(y * y, axis=1), mask=rows < m)
    if STORE:
        out += b * stride_ob + rows[:, None].to(tl.int64) * stride_om + columns[None, :].to(tl.int64) * stride_on
        tl.store(out, y.to(out.dtype.element_ty), mask=inside)


def apply_symmetric(
    X: Tensor,
    S: Tensor,
    alpha: float = 0,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    outputs: str = "matrix",
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Y = scale (alpha X + X S), and the sums of squares of Y's rows.

    X [B, m, n] with any strides; S [B, n, n] symmetric, of X's dtype; scale float32 [B], 1 if left out. Y [B, m, n] in
    `dtype` (default: X's) and in X's order of memory; the sums float32 [B, m]. `outputs` is "matrix", "row_square" or
    "both"; what was not asked for is an empty tensor. `tile` replaces the device's own. Raises ValueError for other
    arguments; symmetry is not checked.
    """
    if outputs not in OUTPUTS:
        raise ValueError(f"apply_symmetric: outputs = {outputs!r} is unknown; choose one of {', '.join(OUTPUTS)}")
    check_batch("apply_symmetric: X", X)
    check_batch("apply_symmetric: S", S, like=X)
    scale = check_scale("apply_symmetric: scale", scale, (X.size(0),), X)
    if S.shape != (X.size(0), X.size(2), X.size(2)):
        raise ValueError(
            f"apply_symmetric: S has shape {tuple(S.shape)}; beside X {tuple(X.shape)} it must be "
            f"{(X.size(0), X.size(2), X.size(2))}"
        )
    Y, square = _apply_symmetric(X, S.contiguous(), alpha, scale, dtype or X.dtype, outputs, tile and list(tile))
    return Y, square.flatten() if outputs == "matrix" else square.sum(dim=1)


def _empty(
    X: Tensor, S: Tensor, alpha: float, scale: Tensor | None, dtype: torch.dtype, outputs: str,
    tile: list[int] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, m, n = X.shape
    _, columns, *_ = tile or product_tile(X)
    square = X.new_empty((B, cdiv(n, columns), m) if outputs != "matrix" else (0, 1), dtype=torch.float32)
    return (X.new_empty(0, dtype=dtype) if outputs == "row_square" else empty_in_order(X, dtype)), square


@operator(fake=_empty)
def _apply_symmetric(
    X: Tensor, S: Tensor, alpha: float, scale: Tensor | None, dtype: torch.dtype, outputs: str,
    tile: list[int] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, square = _empty(X, S, alpha, scale, dtype, outputs, tile)
    B, m, n = X.shape
    rows, columns, depth, warps, stages = tile or product_tile(X)
    is_stored, described = outputs != "row_square", describes(X, S)
    descriptors = [(X, rows, depth), (S, depth, columns), (X, rows, columns)]
    apply_symmetric_kernel[(B * cdiv(m, rows) * cdiv(n, columns),)](
        *(descriptor(*each) if described else None for each in descriptors), X, S, scale, out, square, m, n, alpha,
        *X.stride(), *(out.stride() if is_stored else (0, 0, 0)),
        SCALE=scale is not None, STORE=is_stored, SQUARE=outputs != "matrix",
        ROWS=rows, COLUMNS=columns, DEPTH=depth, PRECISION=precision(X.dtype), DESCRIBED=described,
        TRANSPOSED=X.stride(2) != 1, **launch_options(warps, stages),
    )  # fmt: skip
    return out, square
