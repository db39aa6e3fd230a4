"""Cross-entropy of soft-capped logits, a row at a time, which leaves the logits' gradients in their place.

    z = s tanh(u / s)      p = softmax(z)      L = log sum_j exp(z_j)                  u [R, V] logits, s the soft cap
    loss_i = L - z_t + zeta L^2                                                        t the target, zeta the z-loss
    d loss / d u_j = (p_j (1 + 2 zeta L) - [j = t]) (1 - tanh^2(u_j / s))              overwrites u_j

|z| <= s <= 40, so exp(z) stays within e^-40 and e^40 and a million of them within float32: no maximum has to be
subtracted, hence none found, and a row is summed lane by lane with one reduction at its end. tanh comes from
e = exp(-2 |u| / s) <= 1, which cannot overflow: tanh = (1 - e) / (1 + e), and its slope 4 e / (1 + e)^2 without the
cancellation of 1 - tanh^2.

A program takes a row: over its columns once for the sum, and again for the gradients. In half precision 4 V bytes
read, the second 2 V from L2 (a row of 50,304 is 100 kB, and those under way some 50 MB at most), 2 V written. Without
gradients 2 V read. 6 special-function operations and about 40 FLOPs an element, against the 6 D of the three matrix
products around it: at D = 768 and 50,304 columns these take 6 V D / 700 TFLOP/s = 0.33 us a row on an H100, the
kernel's 6 V bytes 0.10 us at 3 TB/s. Measured there, all together: 0.48 us (docs/speed.md), by a kernel
that loaded two bytes at a time and took 4096 columns. Plain torch moves some 90 V bytes a row between the same
products, nearly all in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import DTYPES, Tile, launch_options, operator

# Columns at a time, 8 per thread; fewer for short rows. Twice as many spill registers, in float32 on Hopper and in
# bfloat16 on Blackwell (python -m benchmarks.kernel_resources).
ROW = Tile(1, 2048, 0, 8, 1)
SHORT_ROW = Tile(1, 512, 0, 4, 1)


@triton.jit
def soft_cap(u, softcap):
    """softcap * tanh(u / softcap) and its derivative."""
    e = tl.exp(tl.abs(u) * (-2.0 / softcap))
    r = 1.0 / (1.0 + e)
    return tl.where(u < 0, -softcap, softcap) * (1.0 - e) * r, 4.0 * e * r * r


@triton.jit
def cross_entropy_kernel(
    logits, targets, loss, num_columns, vocab_size, stride, softcap, z_loss, ignore_index,
    GRADIENT: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    columns = tl.arange(0, COLUMNS)
    target = tl.load(targets + row)
    if target == ignore_index:
        tl.store(loss + row, 0.0)
        if GRADIENT:
            for k in range(0, num_columns, COLUMNS):
                zero = tl.zeros((COLUMNS,), dtype=logits.dtype.element_ty)
                tl.store(logits + k + columns, zero, mask=k + columns < num_columns)
    else:
        is_valid = (target >= 0) & (target < vocab_size)  # others are not read from, and show as NaN
        target_z, _slope = soft_cap(tl.load(logits + target, mask=is_valid, other=0.0).to(tl.float32), softcap)
        lanes = tl.zeros((COLUMNS,), dtype=tl.float32)
        for k in range(0, vocab_size, COLUMNS):
            inside = k + columns < vocab_size  # loads go by num_columns, which keeps them 16 bytes wide
            u = tl.load(logits + k + columns, mask=k + columns < num_columns, other=0.0)
            z, slope = soft_cap(u.to(tl.float32), softcap)
            lanes += tl.where(inside, tl.exp(z), 0.0)
        total = tl.sum(lanes)
        log_total = tl.log(total)
        row_loss = log_total - target_z + z_loss * log_total * log_total
        tl.store(loss + row, tl.where(is_valid, row_loss, float("nan")))
        if GRADIENT:
            scale = tl.where(is_valid, (1.0 + 2.0 * z_loss * log_total) / total, float("nan"))
            for k in range(0, num_columns, COLUMNS):
                inside = k + columns < vocab_size
                u = tl.load(logits + k + columns, mask=k + columns < num_columns, other=0.0)
                z, slope = soft_cap(u.to(tl.float32), softcap)
                gradient = (tl.exp(z) * scale - tl.where(k + columns == target, 1.0, 0.0)) * slope
                gradient = tl.where(inside, gradient, 0.0).to(logits.dtype.element_ty)
                tl.store(logits + k + columns, gradient, mask=k + columns < num_columns)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    softcap: float,
    vocab_size: int,
    z_loss: float,
    ignore_index: int,
    gradient: bool,
    tile: Tile | None = None,
) -> Tensor:
    """Each row's loss, float32 [R]; with `gradient` the logits are overwritten with the gradients of the losses' sum.

    logits [R, V] float16, bfloat16 or float32 with columns next to each other in memory and rows any distance apart;
    targets int64 [R]; 0 < softcap <= 40. Columns from vocab_size on are no part of the softmax, their gradient is 0.
    A target of ignore_index gives loss 0 and gradient 0; any other outside [0, vocab_size) NaN in both, and nothing
    is read there. `tile` replaces the kernel's own. Raises ValueError for other arguments.
    """
    if logits.ndim != 2 or logits.stride(1) != 1 or logits.dtype not in DTYPES:
        raise ValueError(
            f"cross_entropy: logits are {logits.dtype} {tuple(logits.shape)} with strides {logits.stride()}; they must "
            "be float16, bfloat16 or float32 [R, V] with columns next to each other in memory"
        )
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64 or targets.device != logits.device:
        raise ValueError(
            f"cross_entropy: targets are {targets.dtype} {tuple(targets.shape)} on {targets.device}; they must be "
            f"int64 [{logits.size(0)}] on {logits.device}"
        )
    return _cross_entropy(
        logits, targets.contiguous(), softcap, vocab_size, z_loss, ignore_index, gradient, tile and list(tile)
    )


@operator(fake=lambda logits, *_: logits.new_empty(logits.size(0), dtype=torch.float32), mutates=("logits",))
def _cross_entropy(
    logits: Tensor, targets: Tensor, softcap: float, vocab_size: int, z_loss: float, ignore_index: int, gradient: bool,
    tile: list[int] | None,
) -> Tensor:  # fmt: skip
    loss = logits.new_empty(logits.size(0), dtype=torch.float32)
    _, columns, _, warps, stages = tile or (ROW if logits.size(1) > SHORT_ROW.columns else SHORT_ROW)
    cross_entropy_kernel[(logits.size(0),)](
        logits, targets, loss, logits.size(1), vocab_size, logits.stride(0), softcap, z_loss, ignore_index,
        GRADIENT=gradient, COLUMNS=columns, **launch_options(warps, stages),
    )  # fmt: skip
    return loss
