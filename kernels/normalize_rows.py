"""Rows of a batch of matrices scaled to norm 1 and cast, and their norms.

    r_i = ||X_i||        Y_i = X_i / ||X_i||  in another dtype        X, Y [B, m, n],  r [B, m]

Memory-bound: X is read from memory once (4 m n bytes in float32), Y written once (2 m n in half precision). A program
takes a few rows, runs over them with a running maximum and a sum of squares relative to it, so that rows of 1e-30 or
1e30 neither vanish nor overflow, and over them again for Y, then from cache. Any strides: the columns of X are the rows
of its transposed view.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import DTYPES, Tile, cdiv, check_batch, empty_in_order, launch_options, operator

# rows x columns at a time, by whether columns or rows are next to each other in memory. 2.1 TB/s on an H100.
CONTIGUOUS, TRANSPOSED = Tile(8, 256, 0, 4, 3), Tile(64, 32, 0, 4, 3)


@triton.jit
def add_squares(largest, square, X):
    """(the largest magnitude in each row so far, the sum of squares relative to it) with those of the columns X."""
    larger = tl.maximum(largest, tl.max(tl.abs(X), axis=1))
    shrink = largest / larger
    unit = X / larger[:, None]
    return larger, square * shrink * shrink + tl.sum(unit * unit, axis=1)


@triton.jit
def normalize_rows_kernel(
    x, out, norm, m, n, stride_xb, stride_xm, stride_xn, stride_ob, stride_om, stride_on,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(m, ROWS)
    b = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    x += b * stride_xb + rows[:, None].to(tl.int64) * stride_xm
    largest = tl.full((ROWS,), 1.1754943508222875e-38, dtype=tl.float32)  # the smallest normal: 0 / largest is 0
    square = tl.zeros((ROWS,), dtype=tl.float32)  # sum of (x / largest)^2 so far
    for k in range(0, n, COLUMNS):
        inside = (rows < m)[:, None] & (k + columns < n)[None, :]
        tile = tl.load(x + (k + columns)[None, :].to(tl.int64) * stride_xn, mask=inside, other=0.0).to(tl.float32)
        largest, square = add_squares(largest, square, tile)
    root = tl.sqrt(square)
    tl.store(norm + b * m + rows, largest * root, mask=rows < m)
    root = tl.where(root > 0, root, 1.0)[:, None]
    out += b * stride_ob + rows[:, None].to(tl.int64) * stride_om
    for k in range(0, n, COLUMNS):
        inside = (rows < m)[:, None] & (k + columns < n)[None, :]
        tile = tl.load(x + (k + columns)[None, :].to(tl.int64) * stride_xn, mask=inside, other=0.0).to(tl.float32)
        unit = (tile / largest[:, None] / root).to(out.dtype.element_ty)
        tl.store(out + (k + columns)[None, :].to(tl.int64) * stride_on, unit, mask=inside)


def normalize_rows(X: Tensor, dtype: torch.dtype, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Rows of X [B, m, n] divided by their norm, in `dtype` and in X's order of memory, and the norms [B, m] float32.

    Zero rows stay zero. X is float16, bfloat16 or float32 with any strides. Raises ValueError for other arguments.
    """
    check_batch("normalize_rows: X", X)
    if dtype not in DTYPES:
        raise ValueError(f"normalize_rows: dtype = {dtype} must be float16, bfloat16 or float32")
    return _normalize_rows(X, dtype, tile and list(tile))


def _empty(X: Tensor, dtype: torch.dtype, tile: list[int] | None) -> tuple[Tensor, Tensor]:
    return empty_in_order(X, dtype), X.new_empty(X.shape[:2], dtype=torch.float32)


@operator(fake=_empty)
def _normalize_rows(X: Tensor, dtype: torch.dtype, tile: list[int] | None) -> tuple[Tensor, Tensor]:
    out, norm = _empty(X, dtype, tile)
    B, m, n = X.shape
    rows, columns, _, warps, stages = tile or (TRANSPOSED if X.stride(1) < X.stride(2) else CONTIGUOUS)
    normalize_rows_kernel[(B * cdiv(m, rows),)](
        X, out, norm, m, n, *X.stride(), *out.stride(),
        ROWS=rows, COLUMNS=columns, **launch_options(warps, stages),
    )  # fmt: skip
    return out, norm
