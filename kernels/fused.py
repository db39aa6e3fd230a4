"""Parts of the model with their gradients written out: fewer passes over memory than autograd makes of the plain form.

    y = rms_norm(x, is_fused=True)        y = rotate(x, cos, sin, is_fused=True)

The results are the plain form's to rounding. torch.compile fuses elementwise operations itself: the plain form is taken
there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, is_fused: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, eps that of float32 (float64 for float64)."""
    if not is_fused or torch.compiler.is_compiling() or not torch.is_grad_enabled():
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


def rotate(x: Tensor, cos: Tensor, sin: Tensor, is_fused: bool = False) -> Tensor:
    """(a cos - b sin, a sin + b cos) for the halves a, b of the last dimension, with cos and sin of their shape."""
    if not is_fused or torch.compiler.is_compiling() or not torch.is_grad_enabled():
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
