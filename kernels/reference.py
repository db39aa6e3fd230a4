"""The kernels in plain torch: the same functions, readable, for any device; used on the CPU and by the tests.

Arguments and results are those of the function of the same name in a Triton file, which describes them; float64 is
taken too. Products accumulate in float32 (float64 for float64 inputs). Nothing here is differentiable by intent.
"""

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny  # keeps 0 / 0 at 0
BLOCK = {"cpu": 1 << 17, "cuda": 1 << 26}  # logits in float32 at a time: 512 KiB stay in a core's cache, 256 MiB do not


def normalize_rows(X: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of X [B, m, n] divided by their norm, in `dtype`, and the norms, float32 [B, m]; zero rows stay zero."""
    X = X.float()
    largest = X.abs().amax(dim=-1).clamp_min(TINY)
    unit = X / largest.unsqueeze(-1)  # its squares stay inside float32's range
    norm = torch.linalg.vector_norm(unit, dim=-1)
    return unit.div_(norm.clamp_min(TINY).unsqueeze(-1)).to(dtype), largest * norm


def scale_rows(X: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """diag(scale) X for X [B, m, n] and scale [B, m], in `dtype`."""
    return (X * scale.unsqueeze(-1)).to(dtype)


def momentum(
    gradient: Tensor, buffer: Tensor, share: float | Tensor, nesterov: bool, active: Tensor | None = None
) -> Tensor:
    """`gradient` [B, m, n], overwritten with the momentum after it, or with `nesterov` one more step ahead; `buffer`,
    the momentum, changes, too, but for matrices that are not `active`, whose gradient counts as zero."""
    weight: float | Tensor = 1 - share
    if active is not None:
        gradient.masked_fill_(~active[:, None, None], 0)
        weight = weight * active[:, None, None].float()
    buffer.lerp_(gradient, weight)
    return gradient.lerp_(buffer, share) if nesterov else gradient.copy_(buffer)


def momentum_rows(
    gradient: Tensor,
    buffer: Tensor,
    share: float | Tensor,
    nesterov: bool,
    active: Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> tuple[Tensor, Tensor]:
    """`normalize_rows` of what `momentum` gives: of its rows, or of a wide matrix's columns."""
    M = momentum(gradient, buffer, share, nesterov, active)
    return normalize_rows(M if M.size(1) >= M.size(2) else M.mT, dtype)


def apply_update(
    weights: list[Tensor],
    U: Tensor,
    places: list[int],
    rate: float | Tensor,
    scale: float,
    decay: float | Tensor = 0.0,
    cautious: bool = False,
) -> bool:
    """weight <- weight - rate (decay weight + scale U[place]) for each weight and its place; `cautious`: decay only
    where weight and update have one sign. True, as there is nothing that it cannot do."""
    for W, place in zip(weights, places, strict=True):
        update = U[place].reshape(W.shape).to(W.dtype)
        decaying = W.where(W * update > 0, 0) if cautious else W
        W.sub_(rate * (decay * decaying + scale * update))
    return True


def gram(X: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """scale * X^T X: the Gram matrix of X's columns, [B, n, n]."""
    if scale is not None:  # on both operands: the unscaled product could leave float16's range
        X = (X * scale.sqrt()[:, None, None]).to(X.dtype)
    if dtype in (None, X.dtype):
        return (as_multiplied(X.mT) @ as_multiplied(X)).to(X.dtype)
    return _float32_product(X.mT, X)


def as_multiplied(A: Tensor) -> Tensor:
    """A, in float32 if it is of halves and on a CPU without units for them: a product of halves takes 60 times as long
    there as one of float32, for the same sums. The caller rounds the result."""
    is_slow = A.device.type == "cpu" and A.dtype.itemsize == 2 and not (A.dtype == torch.bfloat16 and has_bfloat16())
    return A.float() if is_slow else A


def has_bfloat16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 in hardware."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _baddbmm(C: Tensor, A: Tensor, B: Tensor, beta: float, alpha: float = 1) -> Tensor:
    """beta C + alpha A B, rounded once to C's dtype."""
    return torch.baddbmm(*map(as_multiplied, (C, A, B)), beta=beta, alpha=alpha).to(C.dtype)


def _float32_product(A: Tensor, B: Tensor) -> Tensor:
    """A B with the float32 sums left as they are."""
    if A.dtype == torch.float32:
        return A @ B
    if A.is_cuda:
        return torch.bmm(A, B, out_dtype=torch.float32)
    return A.float() @ B.float()  # the CPU has no product with a wider result


def symmetric_product(
    A: Tensor, B: Tensor, alpha: float = 1, beta: float = 0, gamma: float = 0, unrounded_A: Tensor | None = None
) -> Tensor:
    """alpha A B + beta A + gamma B for symmetric A and B [B, n, n] that commute, so that the result is symmetric."""
    if unrounded_A is None:
        product = _baddbmm(A, A, B, beta, alpha)
    else:
        product = torch.add(beta * unrounded_A, _float32_product(A, B), alpha=alpha).to(A.dtype)
    return product.add_(B, alpha=gamma) if gamma else product


def apply_symmetric(
    X: Tensor,
    S: Tensor,
    alpha: float = 0,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    outputs: str = "matrix",
) -> tuple[Tensor, Tensor]:
    """Y = scale (alpha X + X S), [B, m, n], and the sums of squares of Y's rows, [B, m]."""
    is_transposed = X.stride(1) < X.stride(2)  # then the transposed problem, so that Y is in X's order of memory
    Y = _baddbmm(X.mT, S, X.mT, alpha).mT if is_transposed else _baddbmm(X, X, S, alpha)
    if scale is not None:
        Y = Y * scale[:, None, None]
    if outputs == "matrix":
        row_square = X.new_empty(0, dtype=torch.float32)
    else:
        row_square = torch.linalg.vector_norm(Y, dim=-1, dtype=torch.promote_types(Y.dtype, torch.float32)).square()
    return Y.to(dtype or X.dtype) if outputs != "row_square" else X.new_empty(0), row_square


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    softcap: float,
    vocab_size: int,
    z_loss: float,
    ignore_index: int,
    gradient: bool,
) -> Tensor:
    """Each row's loss, float32 [R] (float64 of float64 logits); with `gradient` the logits [R, V] are overwritten with
    the gradients of the losses' sum."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    is_valid = (targets >= 0) & (targets < vocab_size)
    weight = is_valid.to(wide).masked_fill(~is_valid, torch.nan).masked_fill(targets == ignore_index, 0).unsqueeze(1)
    index = targets.clamp(0, vocab_size - 1).unsqueeze(1)
    loss = logits.new_empty(logits.size(0), dtype=wide)
    rows = max(1, BLOCK.get(logits.device.type, BLOCK["cuda"]) // vocab_size)
    for start in range(0, logits.size(0), rows):
        here = slice(start, start + rows)
        u = logits[here, :vocab_size]
        tanh = u.to(wide, copy=True).div_(softcap).tanh_()
        p = torch.mul(tanh, softcap).exp_()
        total = p.sum(dim=1, keepdim=True)
        log_total = total.log()
        row_loss = log_total - softcap * tanh.gather(1, index[here]) + z_loss * log_total.square()
        loss[here] = (weight[here] * row_loss).squeeze(1)
        if gradient:
            p.mul_(weight[here] * (1 + 2 * z_loss * log_total) / total).scatter_add_(1, index[here], -weight[here])
            u.copy_(p.addcmul_(p, tanh.square_(), value=-1))
    if gradient:
        logits[:, vocab_size:] = 0
    return loss
