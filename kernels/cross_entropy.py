"""Cross-entropy of soft-capped logits, a row at a time, which leaves the logits' gradients in their place.

    z = s tanh(u / s)      p = softmax(z)      L = log sum_j exp(z_j)                  u [R, V] logits, s the soft cap
    loss_i = L - z_t + zeta L^2                                                        t the target, zeta the z-loss
    d loss / d u_j = (p_j (1 + 2 zeta L) - [j = t]) (1 - tanh^2(u_j / s))              overwrites u_j

|z| <= s <= 40, so exp(z) stays within e^-40 and e^40 and a million of them within float32: no maximum has to be
subtracted, hence none found, and a row is summed lane by lane with one reduction at its end. tanh comes from
e = exp(-2 u / s) and r = 1 / (1 + e): tanh = 2 r - 1, and its slope 4 e r^2 without the cancellation of 1 - tanh^2.

A program takes a row: over its columns once for the sum, and again for the gradients. In half precision 4 V bytes
read, the second 2 V from L2 where the rows under way fit (396 of 50,304 columns, three on each multiprocessor of an
H100, are 40 MB of its 50), 2 V written. Without gradients 2 V read.

What an H100 should take for a row of 50,304, by the slowest of three: memory, 4 V to 6 V bytes at 3 TB/s, 0.07 to 0.10
us; special functions, 6 for each of the 53,248 lanes of 13 blocks at 16 a cycle, 0.09 us; instructions, 33 at 128 a
cycle (Triton 3.9, sm_90), 0.06 us. It was bound by the last, with 68, as long as exp and division came with the
handling of denormal numbers: exp2 and rsqrt have flushing forms, so the reciprocal is made of those. The three matrix
products around the kernel take 6 V D / 700 TFLOP/s = 0.33 us a row at D = 768. Measured, all together: 0.48 us
(docs/speed.md), by the kernel of before, which also loaded two bytes at a time. Plain torch moves some 90 V bytes a row
between the same products, nearly all in float32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton_common import DTYPES, Tile, launch_options, operator

# Columns at a time, 8 per thread; fewer for short rows. With 16 warps instead of 8 half as many rows are under way.
ROW = Tile(1, 4096, 0, 16, 1)
SHORT_ROW = Tile(1, 512, 0, 4, 1)

LOG2_E = math.log2(math.e)


@triton.jit
def exp_of(u, rate):
    """e = 2^(rate u), at most 2^126 so that 1 / (1 + e) is a normal number."""
    return tl.exp2(tl.minimum(u.to(tl.float32) * rate, 126.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def reciprocal(y):
    """1 / y for normal y > 0, by a step of Newton's after an approximation."""
    root = tl.rsqrt(y)
    r = root * root
    return r * (2.0 - y * r)


@triton.jit
def exp_of_capped(r, peak):
    """exp(z) of r = 1 / (1 + e)."""
    return tl.exp2(2.0 * peak * r - peak)


@triton.jit
def sum_block(logits, columns, num_columns, vocab_size, rate, peak, IS_MASKED: tl.constexpr):
    """exp of the capped logits of `columns`; with IS_MASKED those past the vocabulary are 0."""
    inside = columns < num_columns if IS_MASKED else None  # a known multiple of 16, so that 16 bytes go at a time
    p = exp_of_capped(reciprocal(1.0 + exp_of(tl.load(logits + columns, mask=inside), rate)), peak)
    return tl.where(columns < vocab_size, p, 0.0) if IS_MASKED else p


@triton.jit
def gradient_block(logits, columns, target, num_columns, vocab_size, rate, peak, scale, IS_MASKED: tl.constexpr):
    """Overwrites the logits of `columns` with their gradients; without IS_MASKED the target is not one of them."""
    inside = columns < num_columns if IS_MASKED else None
    e = exp_of(tl.load(logits + columns, mask=inside), rate)
    r = reciprocal(1.0 + e)
    gradient = exp_of_capped(r, peak) * scale
    if IS_MASKED:
        gradient -= tl.where(columns == target, 4.0, 0.0)
    gradient *= e * r * r
    if IS_MASKED:
        gradient = tl.where(columns < vocab_size, gradient, 0.0)
    tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy_kernel(
    logits, targets, loss, num_columns, vocab_size, stride, softcap, rate, peak, z_loss, ignore_index,
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
        target_e = exp_of(tl.load(logits + target, mask=is_valid, other=0.0), rate)
        target_z = softcap * (2.0 * reciprocal(1.0 + target_e) - 1.0)
        lanes = tl.zeros((COLUMNS,), dtype=tl.float32)
        for k in range(0, vocab_size, COLUMNS):
            if k + COLUMNS <= vocab_size:
                lanes += sum_block(logits, k + columns, num_columns, vocab_size, rate, peak, IS_MASKED=False)
            else:
                lanes += sum_block(logits, k + columns, num_columns, vocab_size, rate, peak, IS_MASKED=True)
        total = tl.sum(lanes)
        log_total = tl.log(total)
        row_loss = log_total - target_z + z_loss * log_total * log_total
        tl.store(loss + row, tl.where(is_valid, row_loss, float("nan")))
        if GRADIENT:
            scale = tl.where(is_valid, 4.0 * (1.0 + 2.0 * z_loss * log_total) / total, float("nan"))
            for k in range(0, num_columns, COLUMNS):
                if (k + COLUMNS <= vocab_size) & ((target < k) | (target >= k + COLUMNS)):
                    gradient_block(
                        logits, k + columns, target, num_columns, vocab_size, rate, peak, scale, IS_MASKED=False
                    )
                else:
                    gradient_block(
                        logits, k + columns, target, num_columns, vocab_size, rate, peak, scale, IS_MASKED=True
                    )


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
        logits, targets, loss, logits.size(1), vocab_size, logits.stride(0), softcap, -2.0 / softcap * LOG2_E,
        softcap * LOG2_E, z_loss, ignore_index,
        GRADIENT=gradient, COLUMNS=columns, **launch_options(warps, stages),
    )  # fmt: skip
    return loss
