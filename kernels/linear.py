"""Products of activations with weights, in the activations' dtype or with operands of 8 bits.

    y = x W^T            x [..., D], W [M, D] or several stacked [N, M, D], y [..., M] or [..., N M]

In 8 bits an operand a is s_a a8 to rounding, with one scale s_a, a power of two that takes its largest magnitude into
the upper half of the format's range, and the three products of a training step are

    y = s_x s_W (x8 W8^T)        dx = s_g s_W (g8 W8)        dW = s_g s_x (g8^T x8)        g the gradient of y

x8 and W8 are e4m3: rounded by at most 2^-4, zero below 2^-17.8 of the largest at the latest. g8 is e5m2: 2^-3, and
2^-31.8. These are the formats and uses of Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433. Sums
are float32, but for y on Hopper, whose fast sums keep 14 bits, which is not tried for wide models here.

A scale is one for all tokens of a micro-batch, those to come and other rows' among them. So 8 bits are for training
alone: where no gradients are made, which is how losses are validated, products are in the activations' dtype.

What it should gain on an H100, whose tensor cores are twice as fast in 8 bits, is in docs/speed.md. What it costs is a
pass for each scale and one for each cast, two where torch.compile does not fuse it, and, as Hopper wants both operands
with the summed dimension last, copies that are transposed for the gradients. A CPU computes the same numbers, slowly.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of which a GPU wants all sizes of a product to be
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of an operand that is zero


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., D] times one matrix [M, D], or several stacked [N, M, D] as one product [..., N M], in x's dtype."""
    return F.linear(x, weight.flatten(0, -2).to(x.dtype), None if bias is None else bias.to(x.dtype))


def float8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """The same with operands of 8 bits, in all three products of a training step; the result has x's dtype. Just
    `linear` under no_grad and for no rows.

    On a GPU, of compute capability 8.9 or later, D, N M and, for gradients, the rows of x must be multiples of 16.
    Differentiable once. What is not finite comes out as NaN.
    """
    if not torch.is_grad_enabled() or not x.numel():
        return linear(x, weight)
    W = weight.flatten(0, -2)
    return _Float8Linear.apply(x.reshape(-1, x.size(-1)), W).view(*x.shape[:-1], W.size(0))


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x / scale in an 8-bit dtype, and the scale, a float32 scalar. What is below 1e-35 as a whole loses bits."""
    largest = torch.linalg.vector_norm(x.detach(), torch.inf) if x.numel() else x.new_zeros(())
    scale = torch.exp2(torch.ceil(torch.log2(largest.float() / torch.finfo(dtype).max))).clamp_min(SMALLEST_SCALE)
    return divided(x, scale).to(dtype), scale


def divided(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale, exact, as bfloat16 has the exponents of float32 and the scale is a power of two."""
    return (x if x.dtype == torch.bfloat16 else x.float()) / scale


def float8_product(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype, is_fast: bool = False,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """a b^T [n, m] in `dtype` of quantized a [n, k] and b [m, k]; `is_fast` lets Hopper round its sums."""
    (a8, a_scale), (b8, b_scale) = a, b
    # Not F.scaled_mm, its public form, which torch.compile has not always traced (pytorch issue 180604).
    return torch._scaled_mm(
        a8.contiguous(), b8.contiguous().t(), a_scale, b_scale, out_dtype=dtype, use_fast_accum=is_fast, out=out
    )


def transposed(a: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return a[0].t(), a[1]


def has_float8(device: torch.device) -> bool:
    """Whether there are products in 8 bits: on CUDA from compute capability 8.9 on, and elsewhere by emulation."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def check_float8_sizes(parts: Sequence[str], **sizes: int) -> None:
    """Raises ValueError where `parts` are to be in 8 bits and a size is none that a GPU takes."""
    for name, size in sizes.items() if parts else ():
        if size % MULTIPLE:
            works = MULTIPLE * -(-size // MULTIPLE)
            raise ValueError(f"{name} = {size} must be a multiple of {MULTIPLE} with float8; {works} works")


def check_float8(parts: Sequence[str], device: torch.device) -> None:
    """Raises ValueError where `parts` are to be in 8 bits and the device has no such products."""
    if parts and not has_float8(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"float8 = {','.join(parts)!r} needs a GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell); "
            f"this one has {major}.{minor}; leave float8 out"
        )


class _Float8Linear(torch.autograd.Function):
    """Keeps x in 8 bits, and W as it is: gathered weights of fsdp are not to be kept in another form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, W8 = quantize(x, E4M3), quantize(weight, E4M3)
        ctx.save_for_backward(*x8, weight, W8[1])
        return float8_product(x8, W8, x.dtype, is_fast=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x8, x_scale, weight, W_scale = ctx.saved_tensors
        g8 = quantize(gradient, E5M2)
        dx = dW = None
        if ctx.needs_input_grad[0]:
            W8 = divided(weight, W_scale).to(E4M3), W_scale
            dx = float8_product(g8, transposed(W8), gradient.dtype)
        if ctx.needs_input_grad[1]:
            dW = float8_product(transposed(g8), transposed((x8, x_scale)), torch.float32).to(weight.dtype)
        return dx, dW
