"""Rows of a batch of matrices, each times a number of its own.

    Y = diag(scale) X        X, Y [B, m, n],  scale [B, m]

Memory-bound: X read and Y written once, 4 m n bytes in half precision. Any strides: the columns of X are the rows of
its transposed view.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import DTYPES, Tile, cdiv, check_batch, check_scale, empty_in_order, launch_options, operator

# Rows x columns of a program, by whether columns or rows are next to each other in memory; not timed yet
CONTIGUOUS, TRANSPOSED = Tile(8, 256, 0, 4, 1), Tile(256, 8, 0, 4, 1)


@triton.jit
def scale_rows_kernel(
    x, scale, out, m, n, stride_xb, stride_xm, stride_xn, stride_ob, stride_om, stride_on,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of Y."""
    row_tiles, column_tiles = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    rows = tl.program_id(0) // column_tiles % row_tiles * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    b = (tl.program_id(0) // (row_tiles * column_tiles)).to(tl.int64)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    x += b * stride_xb + rows[:, None].to(tl.int64) * stride_xm + columns[None, :].to(tl.int64) * stride_xn
    out += b * stride_ob + rows[:, None].to(tl.int64) * stride_om + columns[None, :].to(tl.int64) * stride_on
    by = tl.load(scale + b * m + rows, mask=rows < m, other=0.0)[:, None]
    tl.store(out, (tl.load(x, mask=inside, other=0.0).to(tl.float32) * by).to(out.dtype.element_ty), mask=inside)


def scale_rows(X: Tensor, scale: Tensor, dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """diag(scale) X for X [B, m, n] and scale [B, m] float32, in `dtype` and in X's order of memory.

    X is float16, bfloat16 or float32 with any strides; products in float32. Raises ValueError for other arguments.
    """
    check_batch("scale_rows: X", X)
    if dtype not in DTYPES:
        raise ValueError(f"scale_rows: dtype = {dtype} must be float16, bfloat16 or float32")
    contiguous = check_scale("scale_rows: scale", scale, tuple(X.shape[:2]), X)
    assert contiguous is not None
    return _scale_rows(X, contiguous, dtype, tile and list(tile))


@operator(fake=lambda X, scale, dtype, tile: empty_in_order(X, dtype))
def _scale_rows(X: Tensor, scale: Tensor, dtype: torch.dtype, tile: list[int] | None) -> Tensor:
    out = empty_in_order(X, dtype)
    B, m, n = X.shape
    rows, columns, _, warps, stages = tile or (TRANSPOSED if X.stride(1) < X.stride(2) else CONTIGUOUS)
    scale_rows_kernel[(B * cdiv(m, rows) * cdiv(n, columns),)](
        X, scale, out, m, n, *X.stride(), *out.stride(), ROWS=rows, COLUMNS=columns, **launch_options(warps, stages)
    )
    return out
