"""Parts of the model with their gradients written out: fewer passes over memory than autograd makes of the plain form.

    y = rms_norm(x)        y = rotate(x, cos, sin)        y = swiglu(x, gate_up, down)

The results are the plain form's to rounding. torch.compile fuses elementwise operations itself: norm and rotation are
the plain form again there, and of swiglu the saved memory remains, with one kernel each for silu(gate) * up and for the
gradients of it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, eps that of float32 (float64 for float64)."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return F.rms_norm(x, (x.size(-1),))
    return _RMSNorm.apply(x)


class _RMSNorm(torch.autograd.Function):
    """dx = r (dy - y mean(dy y)) with r = 1 / sqrt(mean(x^2) + eps): y is kept for the next product anyway, and r is
    one number a row; autograd keeps x and r and makes ten passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        r = norm.square_().div_(x.size(-1)).add_(torch.finfo(dtype).eps).rsqrt_()
        y = (x * r).to(x.dtype)
        ctx.save_for_backward(y, r.to(x.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        y, r = ctx.saved_tensors
        share = (dy * y).mean(-1, keepdim=True)
        return torch.addcmul(dy, y, share, value=-1).mul_(r)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """(silu(x G^T) * (x U^T)) D^T for x [..., D], gate_up [2 F, D] (G above U) and down [D, F], all of one dtype."""
    if torch.is_grad_enabled():
        return _SwiGLU.apply(x, gate_up, down)
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


class _SwiGLU(torch.autograd.Function):
    """Keeps the one product [.., 2 F] of gate and up, and makes the neurons' outputs from it again in the backward
    pass: 2 F numbers a token instead of 4 F."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        product = F.linear(x, gate_up)
        ctx.save_for_backward(x, gate_up, down, product)
        gate, up = product.chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, down)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, gate_up, down, product = ctx.saved_tensors
        gate, up = product.chunk(2, dim=-1)
        silu, d_hidden = F.silu(gate), dy @ down
        d_product = torch.cat((torch.ops.aten.silu_backward(d_hidden * up, gate), d_hidden * silu), dim=-1)
        d_down = dy.flatten(0, -2).mT @ silu.mul_(up).flatten(0, -2)
        return d_product @ gate_up, d_product.flatten(0, -2).mT @ x.flatten(0, -2), d_down


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a cos - b sin, a sin + b cos) for the halves a, b of the last dimension, with cos and sin of their shape."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return _Rotate.apply(x, cos, sin)


class _Rotate(torch.autograd.Function):
    """The gradient is turned back by the same angle. Halves are written where they belong, not put together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for (a, b), out, sign in zip((x.chunk(2, -1), x.chunk(2, -1)[::-1]), y.chunk(2, -1), (-1, 1), strict=True):
            torch.mul(a, cos, out=out).addcmul_(b, sin, value=sign)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(dy, cos, -sin), None, None
