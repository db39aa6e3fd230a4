"""Output head, soft cap and cross-entropy in one operator that never holds the logits of the whole batch.

    loss = sum_i  L_i - z_i[t_i] + z_loss L_i^2,    z = s tanh(u / s),  u = x W^T,  L_i = log sum_j exp(z_ij)

x [N, D], W [V, D], t [N]. Rows of x go through in chunks. A chunk's logits u [C, V] are made in x's dtype; the
backend's `cross_entropy` turns them in place into their gradients G and gives each row's loss; then dx_chunk = G W, and
dW += G^T x_chunk in float32. So both gradients are ready when the loss is, and the backward pass multiplies them by the
gradient that arrives. 6 N V D FLOPs like the plain way, of which 2 N V D where no gradient is asked for.

Memory: C V logits, a copy of W in x's dtype (with float8 one in 8 bits, too), dx and float32 dW, against 16 N V bytes
of the plain way, four arrays of float32 logits (python -m benchmarks.loss_head measures both).

Chunking the head and its gradients: Hsu et al., "Liger Kernel", arXiv 2410.10989, and Wijmans et al., "Cut your losses
in large-vocabulary language models", arXiv 2411.09009.
"""

from typing import Any

import torch
from torch import Tensor

import kernels
from kernels.linear import E4M3, MULTIPLE, float8_product, quantize

# Bytes of a chunk's logits by default. On a CPU more of them only miss the cache. A GPU wants enough rows to fill it
# with tiles of G W, whose output is C x D alone: 8192 x 768 is 384 tiles of 128 x 128, near 3 a multiprocessor of
# an H100, where 4096 would leave a quarter of its second round idle. 1 GiB is 8192 rows of GPT-2's 50,304 in
# half precision. Reckoned, not yet timed on a device.
CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
LARGEST_SOFTCAP = 40.0  # exp(-40) to exp(40), and a million of these, are well inside float32
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    softcap: float = 15.0,
    vocab_size: int | None = None,
    z_loss: float = 0.0,
    ignore_index: int = -1,
    chunk_tokens: int | None = None,
    kernels: str = "auto",
    float8: bool = False,
) -> Tensor:
    """Summed cross-entropy in nats of softcap * tanh(x weight^T / softcap), float32 scalar (float64 for float64 x).

    x [N, D] bfloat16, float16, float32 or float64 with any strides; weight [V, D] float32 or x's dtype, rounded to
    x's for the products; targets int64 [N]. Rows whose target is `ignore_index` add nothing. Columns from
    `vocab_size` on (default: none) are no part of the softmax and get a gradient of exactly 0. `z_loss` times the
    squared logsumexp is added for each row. `chunk_tokens` rows go through at a time, by default as many as
    CHUNK_BYTES holds; the result depends on it by rounding alone. `kernels` is auto, triton or torch. With `float8`,
    but not under no_grad, the logits are a product of x and weight in 8 bits (kernels/linear.py), and the gradients'
    products stay in x's dtype; x is then not float64, and on a GPU D and V are multiples of 16.

    Differentiable once, in x and weight; gradients are made along with the loss where autograd will want them, and
    not at all under no_grad. The same arguments give the same bits. torch.compile takes it as one node.

    Any other target outside [0, vocab_size) is an IndexError on the CPU, as in F.cross_entropy. On a GPU, which
    would have to be waited for, nothing is read there, and loss and gradients become NaN instead of the device assert
    that ends the process. Raises ValueError for other arguments.
    """
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise ValueError(f"linear_cross_entropy: x is {x.dtype} {tuple(x.shape)}; it must be floating point [N, D]")
    if weight.ndim != 2 or weight.size(1) != x.size(1) or weight.dtype not in (torch.float32, x.dtype):
        raise ValueError(
            f"linear_cross_entropy: weight is {weight.dtype} {tuple(weight.shape)}; beside x it must be float32 or "
            f"{x.dtype} [V, {x.size(1)}]"
        )
    if targets.shape != x.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: targets are {targets.dtype} {tuple(targets.shape)}; they must be int64 "
            f"[{x.size(0)}], one for each row of x"
        )
    if not 0 < softcap <= LARGEST_SOFTCAP:
        raise ValueError(
            f"linear_cross_entropy: softcap = {softcap} must be above 0 and at most {LARGEST_SOFTCAP:g}, so that "
            "exp(logit) stays inside float32; 15 is usual"
        )
    if vocab_size is not None and not 0 < vocab_size <= weight.size(0):
        raise ValueError(f"linear_cross_entropy: vocab_size = {vocab_size} must be 1 to weight's {weight.size(0)} rows")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"linear_cross_entropy: chunk_tokens = {chunk_tokens} must be at least 1, or None")
    if float8 and (x.dtype == torch.float64 or (x.is_cuda and (x.size(1) % MULTIPLE or weight.size(0) % MULTIPLE))):
        raise ValueError(
            f"linear_cross_entropy: x is {x.dtype} {tuple(x.shape)} and weight {tuple(weight.shape)}; with float8 x "
            f"must not be float64, and D and V must be multiples of {MULTIPLE}"
        )
    needs_gradient = torch.is_grad_enabled()
    loss, _, _ = _linear_cross_entropy(
        x, weight, targets, softcap, vocab_size, z_loss, ignore_index, chunk_tokens, kernels,
        float8 and needs_gradient,
        needs_gradient and x.requires_grad, needs_gradient and weight.requires_grad,
    )  # fmt: skip
    return loss


def default_chunk_tokens(vocab_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """The largest power of two of rows whose logits fit in CHUNK_BYTES, so that products keep whole tiles."""
    rows = CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (vocab_size * dtype.itemsize)
    return 1 << max(0, rows.bit_length() - 1)


@torch.library.custom_op(f"{kernels.NAMESPACE}::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, softcap: float, vocab_size: int | None, z_loss: float,
    ignore_index: int, chunk_tokens: int | None, backend: str, float8: bool, x_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss and the gradients asked for; those not asked for are empty."""
    vocab_size = vocab_size or weight.size(0)
    if x.device.type == "cpu":
        wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))]
        if wrong.numel():
            raise IndexError(
                f"linear_cross_entropy: target {int(wrong[0])} must be 0 to {vocab_size - 1}, or "
                f"ignore_index = {ignore_index}"
            )
    if backend == "auto" and x.dtype == torch.float64:
        backend = "torch"  # the Triton kernel computes in float32
    cross_entropy = kernels.backend(backend, x.device).cross_entropy
    chunk_tokens = chunk_tokens or default_chunk_tokens(weight.size(0), x.dtype, x.device)
    wide = torch.promote_types(x.dtype, torch.float32)
    loss = x.new_empty(x.size(0), dtype=wide)
    dx = x.new_empty(x.shape if x_gradient else 0)
    dweight = x.new_zeros(weight.shape if weight_gradient else 0, dtype=wide)
    head = weight.to(x.dtype)
    memory = x.new_empty(min(chunk_tokens, x.size(0)), weight.size(0))  # one allocation for the logits of every chunk
    if float8:
        (x8, x_scale), weight8 = quantize(x, E4M3), quantize(weight, E4M3)
    for start in range(0, x.size(0), chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        x_chunk = x[rows]
        logits = memory[: x_chunk.size(0)]
        if float8:
            float8_product((x8[rows], x_scale), weight8, x.dtype, is_fast=True, out=logits)
        else:
            torch.mm(x_chunk, head.mT, out=logits)
        loss[rows] = cross_entropy(
            logits, targets[rows], softcap, vocab_size, z_loss, ignore_index, x_gradient or weight_gradient
        )
        if x_gradient:
            torch.mm(logits, head, out=dx[rows])
        if weight_gradient:
            add_product(dweight, logits.mT, x_chunk)
    return loss.sum(), dx, dweight.to(weight.dtype)


def add_product(total: Tensor, A: Tensor, B: Tensor) -> None:
    """total += A B, with `total` float32 where A and B are half precision."""
    if total.dtype == A.dtype:
        total.addmm_(A, B)
    elif total.is_cuda:
        torch.addmm(total, A, B, out_dtype=total.dtype, out=total)
    else:
        total += A @ B  # the CPU has no half-precision product with a wider result: each chunk's is rounded once


@_linear_cross_entropy.register_fake
def _empty(x: Tensor, weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    x_gradient, weight_gradient = arguments[-2:]
    return (
        x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32)),
        x.new_empty(x.shape if x_gradient else 0),
        x.new_empty(weight.shape if weight_gradient else 0, dtype=weight.dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.wants = inputs[-2:]
    ctx.save_for_backward(*output[1:])


def _backward(
    ctx: Any, grad: Tensor | None, *grads_of_gradients: Tensor | None
) -> tuple[Tensor | None, Tensor | None, *tuple[None, ...]]:
    if any(g is not None for g in grads_of_gradients):
        raise RuntimeError("linear_cross_entropy can be differentiated once, not twice: its gradients are made with it")
    gradients = [
        (saved * grad.reshape(1)).to(saved.dtype) if wants and grad is not None else None  # [1]: not rounded to half
        for saved, wants in zip(ctx.saved_tensors, ctx.wants, strict=True)
    ]
    return gradients[0], gradients[1], *[None] * 10


_linear_cross_entropy.register_autograd(_backward, setup_context=_save)
