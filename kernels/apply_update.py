"""Weight decay and a step, in place, for weights that are tensors of their own.

    W <- W - rate (decay W + scale U)        W a list of [m, n] float32, U [B, m, n] in any format and order of memory

`cautious`: decay only where W and U have one sign, so that both shorten the weight. Memory-bound: W is read and written
once, U read once; 10 bytes per element with U in half precision. A program takes a tile of one matrix and looks it up
in a table [2, number of weights] on the device: the weight's address, and which matrix of U is its own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.scattered import PLAIN, address_table, are_aligned, matrix_at
from kernels.triton_common import DTYPES, Tile, cdiv, launch_options, number_or_tensor, operator

# rows x columns at a time: of a contiguous U, whose matrices are taken as one long row each, and of another one, whose
# tile is turned on the way. Not yet timed on a device.
FLAT, TILED = Tile(1, 2048, 0, 4, 1), Tile(64, 64, 0, 8, 1)


@triton.jit
def apply_update_kernel(
    u, table, rate_tensor, rate, scale, decay_tensor, decay, num_weights, m, n, stride_b, stride_m, stride_n,
    DECAYS: tl.constexpr, CAUTIOUS: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row_blocks, column_blocks = tl.cdiv(m, ROWS), tl.cdiv(n, COLUMNS)
    which = tl.program_id(0) // (row_blocks * column_blocks)
    block = tl.program_id(0) % (row_blocks * column_blocks)
    rows = (block // column_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = (block % column_blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = (rows < m) & (columns < n)
    weight = matrix_at(tl.load(table + which), tl.float32, ALIGNED) + rows * n + columns
    u += tl.load(table + num_weights + which) * stride_b + rows * stride_m + columns * stride_n
    W = tl.load(weight, mask=inside)
    U = tl.load(u, mask=inside).to(tl.float32)
    if rate_tensor is not None:
        rate = tl.load(rate_tensor)
    step = rate * scale * U
    if decay_tensor is not None:
        decay = tl.load(decay_tensor)
    if DECAYS:
        step += rate * decay * (tl.where(W * U > 0, W, 0.0) if CAUTIOUS else W)
    step = tl.where(rate == 0, 0.0, step)  # 0 times infinity would be NaN
    tl.store(weight, W - step, mask=inside)


def apply_update(
    weights: list[Tensor],
    U: Tensor,
    places: list[int],
    rate: float | Tensor,
    scale: float,
    decay: float | Tensor = 0.0,
    cautious: bool = False,
    tile: Tile | None = None,
) -> bool:
    """weight <- weight - rate (decay weight + scale U[place]), in place, for each weight and its place; False, with
    nothing done, if there is one that the kernel cannot change.

    U [B, m, n] has to be float16, bfloat16 or float32, with any strides; weights plain tensors in float32, contiguous,
    of m n numbers on U's device, without memory in common. `rate` and `decay` are numbers, or tensors of one element,
    which are read on the device if they are there. Raises ValueError for other places than one for each weight, from 0
    to below B.
    """
    size, device = U[:1].numel(), U.device
    if (
        U.ndim != 3
        or U.dtype not in DTYPES
        or not all(
            W.is_contiguous()
            and W.numel() == size
            and W.dtype == torch.float32
            and W.device == device
            and type(W) in PLAIN
            for W in weights
        )
    ):
        return False
    if len(places) != len(weights) or (places and not 0 <= min(places) <= max(places) < U.size(0)):
        raise ValueError(
            f"apply_update: the places {places} must be one for each of {len(weights)} weights, from 0 to "
            f"{U.size(0) - 1}"
        )
    if not weights:
        return True
    rates, decays = number_or_tensor(rate, device), number_or_tensor(decay, device)
    addresses = tuple([W.data_ptr() for W in weights])
    table, is_aligned = address_table((addresses, tuple(places)), device), are_aligned(addresses)
    _apply_update(U, weights, table, *rates, scale, *decays, cautious, is_aligned, tile and list(tile))
    torch.autograd.graph.increment_version(weights)
    return True


@operator(fake=lambda *_: None, mutates=("weights",))
def _apply_update(
    U: Tensor, weights: list[Tensor], table: Tensor, rate: float, rate_tensor: Tensor | None, scale: float,
    decay: float, decay_tensor: Tensor | None, cautious: bool, is_aligned: bool, tile: list[int] | None,
) -> None:  # fmt: skip
    m, n = U.shape[1:]
    is_flat = U.stride(2) == 1 and U.stride(1) == n
    rows, columns, _, warps, stages = tile or (FLAT if is_flat else TILED)
    if is_flat:
        m, n = 1, m * n
    grid = len(weights) * cdiv(m, rows) * cdiv(n, columns)
    apply_update_kernel[(grid,)](
        U, table, rate_tensor, rate, scale, decay_tensor, decay, len(weights), m, n, U.stride(0),
        n if is_flat else U.stride(1), U.stride(2), DECAYS=decay_tensor is not None or decay != 0, CAUTIOUS=cautious,
        ALIGNED=is_aligned, ROWS=rows, COLUMNS=columns, **launch_options(warps, stages),
    )  # fmt: skip
