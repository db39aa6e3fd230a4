"""The kernels in plain torch: the same functions, readable, for any device; used on the CPU and by the tests.

A batch of matrices is X [B, m, n]; scales are float32, one for each row or matrix. Products accumulate in float32
(float64 for float64 inputs) and results are rounded to X's dtype. Nothing here is differentiable by intent.
The last function belongs to the loss: logits [R, V] in, their gradients out in the same memory.
"""

import torch
from torch import Tensor

TINY = torch.finfo(torch.float32).tiny  # keeps 0 / 0 at 0
BLOCK = {"cpu": 1 << 17, "cuda": 1 << 26}  # logits in float32 at a time: 512 KiB stay in a core's cache, 256 MiB do not


def row_norm(X: Tensor) -> Tensor:
    """Euclidean norm of each row of X [B, m, n], float32 [B, m], for entries from 1e-30 to 1e30."""
    largest, unit = _without_largest(X)
    return largest * torch.linalg.vector_norm(unit, dim=-1)


def normalize_rows(X: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows of X [B, m, n] divided by their norm, in `dtype`, and the norms, float32 [B, m]; zero rows stay zero."""
    largest, unit = _without_largest(X)
    norm = torch.linalg.vector_norm(unit, dim=-1)
    return unit.div_(norm.clamp_min(TINY).unsqueeze(-1)).to(dtype), largest * norm


def _without_largest(X: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's largest magnitude (or TINY), and the row divided by it: its squares stay inside float32's range."""
    X = X.float()
    largest = X.abs().amax(dim=-1).clamp_min(TINY)
    return largest, X / largest.unsqueeze(-1)


def gram(
    X: Tensor,
    row_scale: Tensor | None = None,
    scale: Tensor | None = None,
    side: str = "columns",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """scale * Y^T Y ("columns", [B, n, n]) or scale * Y Y^T ("rows", [B, m, m]) with Y = diag(row_scale) X.

    row_scale [B, m], scale [B], both 1 where left out. In X's dtype, or in `dtype` float32 without rounding to it.
    """
    if scale is not None:
        root = scale.sqrt().unsqueeze(-1)  # on both operands: the unscaled product could leave float16's range
        row_scale = root.expand(X.shape[:-1]) if row_scale is None else row_scale * root
    if row_scale is not None:
        X = (X * row_scale.unsqueeze(-1)).to(X.dtype)
    left, right = (X.mT, X) if side == "columns" else (X, X.mT)
    if dtype in (None, X.dtype) and not _is_slow(X):
        return left @ right
    return _float32_product(left, right).to(dtype or X.dtype)


def _float32_product(A: Tensor, B: Tensor) -> Tensor:
    """A B with the float32 sums left as they are."""
    if A.dtype == torch.float32:
        return A @ B
    if A.is_cuda:
        return torch.bmm(A, B, out_dtype=torch.float32)
    return A.float() @ B.float()  # the CPU has no product with a wider result


def _is_slow(A: Tensor) -> bool:
    """CPUs have no products in float16; torch's loops for them take 10 to 50 times as long as float32's."""
    return A.dtype == torch.float16 and A.device.type == "cpu"


def _baddbmm(C: Tensor, A: Tensor, B: Tensor, beta: float, alpha: float = 1) -> Tensor:
    """beta C + alpha A B, summed in float32 and rounded once."""
    if _is_slow(A):
        return torch.baddbmm(C.float(), A.float(), B.float(), beta=beta, alpha=alpha).to(A.dtype)
    return torch.baddbmm(C, A, B, beta=beta, alpha=alpha)


def symmetric_product(
    A: Tensor, B: Tensor, alpha: float = 1, beta: float = 0, gamma: float = 0, unrounded_A: Tensor | None = None
) -> Tensor:
    """alpha A B + beta A + gamma B for symmetric A and B [B, n, n] that commute, so that the result is symmetric.

    `unrounded_A` float32 [B, n, n], from which A was rounded, takes its place in beta A.
    """
    if unrounded_A is None:
        product = _baddbmm(A, A, B, beta, alpha)
    else:
        product = torch.add(beta * unrounded_A, _float32_product(A, B), alpha=alpha).to(A.dtype)
    return product.add_(B, alpha=gamma) if gamma else product


def apply_symmetric(
    X: Tensor,
    S: Tensor,
    alpha: float = 0,
    row_scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    side: str = "right",
    outputs: str = "matrix",
) -> tuple[Tensor, Tensor]:
    """Y = diag(row_scale) (alpha X + X S), or (alpha X + S X) with side "left", and the sums of squares of Y's rows.

    X [B, m, n]; S symmetric, [B, n, n] or on the left [B, m, m]; row_scale [B, m]. Y [B, m, n] in `dtype` (default:
    X's), the sums of squares float32 [B, m]. `outputs` is "matrix", "row_square" or "both"; what was not asked for
    is an empty tensor.
    """
    if X.stride(1) < X.stride(2):  # the transposed problem, so that Y is in X's order of memory
        Y = _baddbmm(X.mT, S, X.mT, alpha).mT if side == "right" else _baddbmm(X.mT, X.mT, S, alpha).mT
    else:
        Y = _baddbmm(X, X, S, alpha) if side == "right" else _baddbmm(X, S, X, alpha)
    if row_scale is not None:
        Y = Y * row_scale.unsqueeze(-1)
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
    """Each row's loss, float32 [R]; with `gradient` the logits are overwritten with the gradients of the losses' sum.

    logits [R, V] (float64 ones give a float64 loss), targets int64 [R]; 0 < softcap <= 40, so that no maximum need be
    taken off before exp. Columns from vocab_size on are no part of the softmax, their gradient is 0. A target of
    ignore_index gives loss 0 and gradient 0; any other outside [0, vocab_size) NaN in both, and nothing is read there.
    """
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
