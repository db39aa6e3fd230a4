"""Momentum and what an update is made of, in one pass over a batch of gradients.

    B <- share B + (1 - share) G        M = share B + (1 - share) G with the new B (nesterov), or M = B
                                        G [B, m, n] in any format, B [B, m, n] float32

`momentum` gives M in float32, `momentum_rows` what Newton-Schulz starts from: Y, M's rows (a wide M's columns) scaled
to norm 1 and cast, and their norms. A matrix that is not active keeps its B, and its G counts as zero whatever it
holds, NaN too: it is not read. Gradients are one tensor, or scattered: read where they are.

Memory-bound: 16 bytes per element for M, 14 for Y in half precision, of gradients in float32. A program takes a run of
elements of one matrix; or a few rows, over which it runs with a running maximum and a sum of squares relative to it, so
that rows of 1e-30 or 1e30 neither vanish nor overflow, and once more, then from cache, to write B and Y.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.normalize_rows import add_squares
from kernels.scattered import TYPES, Scattered, matrix_at
from kernels.triton_common import DTYPES, Tile, cdiv, launch_options, number_or_tensor, operator

FLAT = Tile(1, 2048, 0, 4, 1)  # elements at a time: four loads of 16 bytes per thread from each. Not yet timed.
# Rows x columns at a time, by whether columns or rows are next to each other in memory. So few rows, 8 of float32 being
# the 32 bytes that memory is read by, that what the programs under way have read can stay in cache for the second time:
# three or four on each of 132 multiprocessors have 19 to 26 MB of rows of 768. Of 2048 they have 52 to 69 MB, more than
# the 50 of an H100. Not yet timed either.
CONTIGUOUS, TRANSPOSED = Tile(1, 1024, 0, 4, 1), Tile(8, 256, 0, 16, 1)


@triton.jit
def momentum_after(
    gradient, table, buffer, active, b, at, inside, size, stride_active, share_tensor, share, weight,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, NESTEROV: tl.constexpr, STORES: tl.constexpr,
):  # fmt: skip
    """M of matrix b at its elements `at`; with STORES B there becomes the new one."""
    if share_tensor is not None:
        share = tl.load(share_tensor)
        weight = 1.0 - share
    count = size  # of elements whose B changes, all or none: the interpreter makes no mask of a flag
    if active is not None:
        count = tl.where(tl.load(active + b * stride_active) != 0, count, 0)
    if table is not None:
        address = tl.load(table + b)
        count = tl.where(address != 0, count, 0)
        gradient = matrix_at(address, TYPE, ALIGNED)
    else:
        gradient += b * size
    moving = inside & (at < count)
    buffer += b * size + at
    G = tl.load(gradient + at, mask=moving, other=0.0).to(tl.float32)
    B = tl.load(buffer, mask=inside, other=0.0)
    B = tl.where(moving, share * B + weight * G, B)
    if STORES:
        tl.store(buffer, B, mask=moving)
    return share * B + weight * G if NESTEROV else B


@triton.jit
def momentum_kernel(
    gradient, table, buffer, out, active, size, stride_active, share_tensor, share, weight,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, NESTEROV: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    runs = tl.cdiv(size, COLUMNS)
    b = (tl.program_id(0) // runs).to(tl.int64)
    at = (tl.program_id(0) % runs).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    M = momentum_after(
        gradient, table, buffer, active, b, at, at < size, size, stride_active, share_tensor, share, weight,
        TYPE, ALIGNED, NESTEROV, True,
    )  # fmt: skip
    tl.store(out + b * size + at, M, mask=at < size)


@triton.jit
def momentum_rows_kernel(
    gradient, table, buffer, out, norm, active, size, m, n, stride_m, stride_n, stride_active,
    share_tensor, share, weight,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, NESTEROV: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(m, ROWS)
    b = (tl.program_id(0) // row_blocks).to(tl.int64)
    rows = tl.program_id(0) % row_blocks * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    largest = tl.full((ROWS,), 1.1754943508222875e-38, dtype=tl.float32)  # the smallest normal: 0 / largest is 0
    square = tl.zeros((ROWS,), dtype=tl.float32)  # sum of (M / largest)^2 so far
    for k in range(0, n, COLUMNS):
        inside = (rows < m)[:, None] & (k + columns < n)[None, :]
        at = rows[:, None].to(tl.int64) * stride_m + (k + columns)[None, :].to(tl.int64) * stride_n
        M = momentum_after(
            gradient, table, buffer, active, b, at, inside, size, stride_active, share_tensor, share, weight,
            TYPE, ALIGNED, NESTEROV, False,
        )  # fmt: skip
        largest, square = add_squares(largest, square, M)
    root = tl.sqrt(square)
    tl.store(norm + b * m + rows, largest * root, mask=rows < m)
    root = tl.where(root > 0, root, 1.0)[:, None]
    for passed in range(0, n, COLUMNS):
        k = (tl.cdiv(n, COLUMNS) - 1) * COLUMNS - passed  # backwards: what was read last is the surest to be in cache
        inside = (rows < m)[:, None] & (k + columns < n)[None, :]
        at = rows[:, None].to(tl.int64) * stride_m + (k + columns)[None, :].to(tl.int64) * stride_n
        M = momentum_after(
            gradient, table, buffer, active, b, at, inside, size, stride_active, share_tensor, share, weight,
            TYPE, ALIGNED, NESTEROV, True,
        )  # fmt: skip
        tl.store(out + b * size + at, (M / largest[:, None] / root).to(out.dtype.element_ty), mask=inside)


def momentum(
    gradient: Tensor | Scattered,
    buffer: Tensor,
    share: float | Tensor,
    nesterov: bool,
    active: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """The momentum after `gradient` [B, m, n], or with `nesterov` one more step ahead of that, in float32; in place of
    a gradient that is one tensor. `buffer`, float32 and contiguous, of the same shape, is the momentum and changes.

    Gradients are float32 and contiguous, or scattered, whose missing matrices are not active. `share` is what a step
    keeps, from 0 to below 1, a number or a tensor of one element, which is read on the device if it is there; `active`
    is bool [B], None for all matrices. Raises ValueError for other arguments.
    """
    _check("momentum", gradient, buffer, active)
    how = (*number_or_tensor(share, buffer.device), nesterov, active, tile and list(tile))
    if isinstance(gradient, Scattered):
        return _momentum_of(buffer, gradient.tensors, gradient.table, gradient.is_aligned, *how)
    _momentum(gradient, buffer, *how)
    return gradient


def momentum_rows(
    gradient: Tensor | Scattered,
    buffer: Tensor,
    share: float | Tensor,
    nesterov: bool,
    active: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """`normalize_rows` of what `momentum` gives, whose arguments these are: rows [B, m, n] in `dtype` and their norms
    [B, m], float32, where m >= n, else both of the transposed matrices.
    """
    _check("momentum_rows", gradient, buffer, active)
    if dtype not in DTYPES:
        raise ValueError(f"momentum_rows: dtype = {dtype} must be float16, bfloat16 or float32")
    if isinstance(gradient, Scattered):
        where: tuple[Any, ...] = None, gradient.tensors, gradient.table, gradient.is_aligned
    else:
        where = gradient, [], None, True
    how = (*number_or_tensor(share, buffer.device), nesterov, active, dtype, tile and list(tile))
    rows, norm = _momentum_rows(buffer, *where, *how)
    return (rows if buffer.size(1) >= buffer.size(2) else rows.mT), norm


def _check(what: str, gradient: Tensor | Scattered, buffer: Tensor, active: Tensor | None) -> None:
    B, device = buffer.size(0), buffer.device
    matrices = [("buffer", buffer)]
    if isinstance(gradient, Tensor):
        matrices.append(("gradient", gradient))
    else:
        size, given = buffer.size(1) * buffer.size(2), len(gradient.addresses)
        if given != B or gradient.device != device or any(X.numel() != size for X in gradient.tensors):
            sizes = sorted({X.numel() for X in gradient.tensors})
            raise ValueError(
                f"{what}: there are {given} gradients of {sizes} numbers each on {gradient.device} for a buffer "
                f"{tuple(buffer.shape)} on {device}; there must be one for each of its matrices, there and of as many "
                "numbers, or None"
            )
    for name, X in matrices:
        is_alike = X.shape == buffer.shape and X.device == device
        if not is_alike or X.ndim != 3 or X.dtype != torch.float32 or not X.is_contiguous():
            raise ValueError(
                f"{what}: {name} is {X.dtype} {tuple(X.shape)} with strides {X.stride()} on {X.device}; gradient and "
                "buffer must be float32 [B, m, n], contiguous, of one shape and on one device"
            )
    if active is not None and (active.shape != (B,) or active.dtype != torch.bool or active.device != device):
        raise ValueError(
            f"{what}: active is {active.dtype} {tuple(active.shape)} on {active.device}; it must be bool [{B}] on "
            f"{device}"
        )


@operator(fake=lambda *_: None, mutates=("gradient", "buffer"))
def _momentum(
    gradient: Tensor, buffer: Tensor, share: float, share_tensor: Tensor | None, nesterov: bool, active: Tensor | None,
    tile: list[int] | None,
) -> None:  # fmt: skip
    _launch(gradient, None, gradient, buffer, share, share_tensor, nesterov, active, tile, torch.float32, False)


@operator(fake=lambda buffer, *_: torch.empty_like(buffer), mutates=("buffer",))
def _momentum_of(
    buffer: Tensor, gradients: list[Tensor], table: Tensor, is_aligned: bool, share: float,
    share_tensor: Tensor | None, nesterov: bool, active: Tensor | None, tile: list[int] | None,
) -> Tensor:  # fmt: skip
    out, dtype = torch.empty_like(buffer), gradients[0].dtype if gradients else torch.float32
    _launch(None, table, out, buffer, share, share_tensor, nesterov, active, tile, dtype, is_aligned)
    return out


def _launch(
    gradient: Tensor | None, table: Tensor | None, out: Tensor, buffer: Tensor, share: float,
    share_tensor: Tensor | None, nesterov: bool, active: Tensor | None, tile: list[int] | None, dtype: torch.dtype,
    is_aligned: bool,
) -> None:  # fmt: skip
    size = buffer.size(1) * buffer.size(2)
    _, columns, _, warps, stages = tile or FLAT
    momentum_kernel[(buffer.size(0) * cdiv(size, columns),)](
        gradient, table, buffer, out, active, size, None if active is None else active.stride(0), share_tensor, share,
        1 - share, TYPE=TYPES[dtype], ALIGNED=is_aligned, NESTEROV=nesterov, COLUMNS=columns,
        **launch_options(warps, stages),
    )  # fmt: skip


def _empty_rows(buffer: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(buffer, dtype=arguments[-2]), buffer.new_empty(buffer.size(0), max(buffer.shape[1:]))


@operator(fake=_empty_rows, mutates=("buffer",))
def _momentum_rows(
    buffer: Tensor, gradient: Tensor | None, gradients: list[Tensor], table: Tensor | None, is_aligned: bool,
    share: float, share_tensor: Tensor | None, nesterov: bool, active: Tensor | None, dtype: torch.dtype,
    tile: list[int] | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, norm = _empty_rows(buffer, dtype, tile)
    B, m, n = buffer.shape
    strides, usual = ((n, 1), CONTIGUOUS) if m >= n else ((1, n), TRANSPOSED)
    rows, columns, _, warps, stages = tile or usual
    momentum_rows_kernel[(B * cdiv(max(m, n), rows),)](
        gradient, table, buffer, out, norm, active, m * n, max(m, n), min(m, n), *strides,
        None if active is None else active.stride(0), share_tensor, share, 1 - share,
        TYPE=TYPES[gradients[0].dtype if gradients else torch.float32], ALIGNED=is_aligned, NESTEROV=nesterov,
        ROWS=rows, COLUMNS=columns, **launch_options(warps, stages),
    )  # fmt: skip
    return out, norm
