"""Which matrices of a batch hold NaN or infinity.

Memory-bound: 4 bytes per element of float32, read where the matrices are. A program takes a run of elements of one
matrix and marks it if one of them is not finite.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.scattered import TYPES, Scattered, matrix_at
from kernels.triton_common import Tile, cdiv, launch_options, operator

FLAT = Tile(1, 4096, 0, 4, 1)  # elements at a time: eight loads of 16 bytes per thread. Not yet timed.


@triton.jit
def not_finite_kernel(
    table, flags, size, stride_flags,
    TYPE: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    runs = tl.cdiv(size, COLUMNS)
    b = tl.program_id(0) // runs
    at = (tl.program_id(0) % runs).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    address = tl.load(table + b)
    if address != 0:
        X = tl.load(matrix_at(address, TYPE, ALIGNED) + at, mask=at < size, other=0.0).to(tl.float32)
        if tl.max((tl.abs(X) < float("inf")).to(tl.int32) ^ 1):  # NaN is not less, either
            tl.store(flags + b * stride_flags, 1.0)


def mark_not_finite(matrices: Scattered, flags: Tensor, tile: Tile | None = None) -> None:
    """Set `flags` [B], float32 on the same device, to 1 for each matrix that holds NaN or infinity; the rest of it is
    left alone. Raises ValueError for other flags."""
    if flags.shape != (len(matrices.addresses),) or flags.dtype != torch.float32 or flags.device != matrices.device:
        raise ValueError(
            f"mark_not_finite: flags are {flags.dtype} {tuple(flags.shape)} on {flags.device}; they must be float32 "
            f"[{len(matrices.addresses)}] on {matrices.device}"
        )
    if matrices.tensors:
        _mark_not_finite(flags, matrices.tensors, matrices.table, matrices.is_aligned, tile and list(tile))


@operator(fake=lambda *_: None, mutates=("flags",))
def _mark_not_finite(
    flags: Tensor, matrices: list[Tensor], table: Tensor, is_aligned: bool, tile: list[int] | None
) -> None:
    size = matrices[0].numel()
    _, columns, _, warps, stages = tile or FLAT
    not_finite_kernel[(flags.size(0) * cdiv(size, columns),)](
        table, flags, size, flags.stride(0), TYPE=TYPES[matrices[0].dtype], ALIGNED=is_aligned, COLUMNS=columns,
        **launch_options(warps, stages),
    )  # fmt: skip
