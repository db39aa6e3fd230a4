"""Momentum and what an update is made of, in place and in one pass over a batch of gradients.

    B <- share B + (1 - share) G        G <- share B + (1 - share) G with the new B (nesterov), or G <- B
                                        G, B [B, m, n] float32

A matrix that is not active keeps its B, and its G counts as zero whatever it holds, NaN too: it is not read.
Memory-bound: 16 bytes per element, G and B read and written once. A program takes a run of elements of one matrix.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import Tile, cdiv, launch_options, number_or_tensor, operator

FLAT = Tile(1, 2048, 0, 4, 1)  # elements at a time: four loads of 16 bytes per thread from each. Not yet timed.


@triton.jit
def momentum_kernel(
    gradient, buffer, active, size, stride_active, share_tensor, share, weight,
    NESTEROV: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    runs = tl.cdiv(size, COLUMNS)
    b = (tl.program_id(0) // runs).to(tl.int64)
    elements = (tl.program_id(0) % runs).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = elements < size
    gradient += b * size + elements
    buffer += b * size + elements
    if share_tensor is not None:
        share = tl.load(share_tensor)
        weight = 1.0 - share
    old = tl.load(buffer, mask=inside)
    new, G = old, tl.zeros_like(old)
    moves = active is None or tl.load(active + b * stride_active) != 0
    if moves:
        G = tl.load(gradient, mask=inside)
        new = share * old + weight * G
        tl.store(buffer, new, mask=inside)
    tl.store(gradient, share * new + weight * G if NESTEROV else new, mask=inside)


def momentum(
    gradient: Tensor,
    buffer: Tensor,
    share: float | Tensor,
    nesterov: bool,
    active: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """`gradient` [B, m, n], overwritten with the momentum after it, or with `nesterov` one more step ahead of that;
    `buffer`, of the same shape, is the momentum and changes, too.

    Both are float32 and contiguous. `share` is what a step keeps, from 0 to below 1, a number or a tensor of one
    element, which is read on the device if it is there; `active` is bool [B], None for all matrices. Raises ValueError
    for other arguments.
    """
    for name, X in (("gradient", gradient), ("buffer", buffer)):
        is_alike = X.shape == gradient.shape and X.device == gradient.device
        if not is_alike or X.ndim != 3 or X.dtype != torch.float32 or not X.is_contiguous():
            raise ValueError(
                f"momentum: {name} is {X.dtype} {tuple(X.shape)} with strides {X.stride()} on {X.device}; gradient and "
                "buffer must be float32 [B, m, n], contiguous, of one shape and on one device"
            )
    B, device = gradient.size(0), gradient.device
    if active is not None and (active.shape != (B,) or active.dtype != torch.bool or active.device != device):
        raise ValueError(
            f"momentum: active is {active.dtype} {tuple(active.shape)} on {active.device}; it must be bool [{B}] on "
            f"{device}"
        )
    _momentum(gradient, buffer, *number_or_tensor(share, device), nesterov, active, tile and list(tile))
    return gradient


@operator(fake=lambda *_: None, mutates=("gradient", "buffer"))
def _momentum(
    gradient: Tensor, buffer: Tensor, share: float, share_tensor: Tensor | None, nesterov: bool, active: Tensor | None,
    tile: list[int] | None,
) -> None:  # fmt: skip
    size = gradient.size(1) * gradient.size(2)
    _, columns, _, warps, stages = tile or FLAT
    momentum_kernel[(gradient.size(0) * cdiv(size, columns),)](
        gradient, buffer, active, size, None if active is None else active.stride(0), share_tensor, share,
        1 - share, NESTEROV=nesterov, COLUMNS=columns, **launch_options(warps, stages),
    )  # fmt: skip
