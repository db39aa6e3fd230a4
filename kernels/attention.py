"""Causal attention, within documents and a sliding window if asked for; or that of every query to every key.

    attend = attention("auto", inputs_BT, doc_token=50256, window=256)
    y_BTHK = attend(q_BTHK, k_BTHK, v_BTHK)

Query i sees key j where

    j <= i,    i - j < window,    and no document begins in (j, i].

`<|endoftext|>` stands before each document and belongs to it. What is before the first one in a row is a document too:
the end of one that began in an earlier row. Three ways to compute the same, to rounding:

    sdpa    torch's scaled_dot_product_attention: its fused causal kernels, and a dense mask for anything else
    flex    torch's flex_attention: one kernel that skips blocks of keys no query of a block may see; CUDA only
    blocks  a block of queries at a time in plain torch, gradients written out: for CPUs, where it skips such keys as
            well and its backward pass is about twice as fast as sdpa's
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
BLOCK = 128  # queries that `blocks` takes at a time: 64 and 256 were slower or as fast at 256 tokens, and wasted more


def attention(kind: str, inputs_BT: Tensor, doc_token: int | None = None, window: int | Tensor | None = None) -> Attend:
    """How the queries of these token ids attend: a function of q, k, v [B, T, H, K] that returns [B, T, H, K].

    doc_token: the id that begins a document; None: documents do not matter. window: keys that a query sees, its own
    included; None: all. An int, or except for `blocks` an int tensor of one element, which can change without another
    compilation. `auto` is sdpa, and with documents or a window on CUDA flex. `bidirectional`: every query sees every
    key of its row, whatever the rest says.
    """
    if kind == "bidirectional":
        return lambda q, k, v: _transposed(F.scaled_dot_product_attention, q, k, v)
    is_plain = doc_token is None and window is None
    if kind == "auto":
        kind = "flex" if inputs_BT.is_cuda and not is_plain else "sdpa"
    docs_BT = None if doc_token is None else (inputs_BT == doc_token).cumsum(1)
    if kind == "blocks":
        window = None if window is None else int(window)
        spans = _spans(inputs_BT.size(1), window)  # what is added to the scores of each, [B or 1, 1, queries, keys]
        biases = [torch.where(visible_keys(inputs_BT, docs_BT, window, *span), 0.0, -torch.inf) for span in spans]
        return lambda q, k, v: _transposed(_Blocks.apply, q, k, v, window, biases)
    if kind == "flex":
        # brings the compiler along: two seconds
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        B, T = inputs_BT.shape
        batch = None if docs_BT is None else B
        mask = create_block_mask(_visible(docs_BT, window), batch, None, T, T, device=inputs_BT.device)
        flex = _compiled_flex() if inputs_BT.is_cuda and not torch.compiler.is_compiling() else flex_attention
        return lambda q, k, v: _transposed(flex, q, k, v, None, mask)
    if is_plain:
        return lambda q, k, v: _transposed(F.scaled_dot_product_attention, q, k, v, None, 0.0, True)
    mask_B1TT = visible_keys(inputs_BT, docs_BT, window, slice(None), slice(None))
    return lambda q, k, v: _transposed(F.scaled_dot_product_attention, q, k, v, mask_B1TT)


def _transposed(function: Any, q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    """For functions that want heads before tokens, [B, H, T, K]."""
    return function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), *arguments).transpose(1, 2)


def _visible(docs_BT: Tensor | None, window: int | Tensor | None) -> Callable[..., Tensor]:
    """Whether query i sees key j, of batch b and head h: in flex_attention's form, and for indices that broadcast."""

    def is_visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        visible = j <= i
        if window is not None:
            visible = visible & (i - j < window)
        if docs_BT is not None:
            visible = visible & (docs_BT[b, i] == docs_BT[b, j])
        return visible

    return is_visible


def visible_keys(
    inputs_BT: Tensor, docs_BT: Tensor | None, window: int | Tensor | None, queries: slice, keys: slice
) -> Tensor:
    """Which of these keys each of these queries sees, bool [B or 1, 1, queries, keys]."""
    b, position_T = (torch.arange(size, device=inputs_BT.device) for size in inputs_BT.shape)
    i, j = position_T[queries, None], position_T[keys]
    return _visible(docs_BT, window)(b[:, None, None, None], b, i[None, None], j)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    """For a model that is not: uncompiled, flex_attention would hold all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _spans(num_tokens: int, window: int | None) -> list[tuple[slice, slice]]:
    """Blocks of queries, and the keys that one of them may see."""
    starts = range(0, num_tokens, BLOCK)
    first_keys = [0 if window is None else max(0, start - window + 1) for start in starts]
    ends = [min(start + BLOCK, num_tokens) for start in starts]
    return [(slice(start, end), slice(key, end)) for start, end, key in zip(starts, ends, first_keys, strict=True)]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, biases: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Of contiguous q, k, v [B H, T, K] (a product would copy others at every use): the result, and each block's
    probabilities in q's dtype. Scores are float32, float64 for float64."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scaled_q, wide_k = q.to(dtype) * q.size(-1) ** -0.5, k.to(dtype)
    out, probabilities = torch.empty_like(v), []
    for (queries, keys), bias in zip(_spans(q.size(1), window), biases, strict=True):
        scores = scaled_q[:, queries] @ wide_k[:, keys].mT
        scores.unflatten(0, (bias.size(0), -1)).add_(bias)
        probabilities.append(scores.softmax(-1).to(q.dtype))
        out[:, queries] = probabilities[-1] @ v[:, keys]
    return out, probabilities


class _Blocks(torch.autograd.Function):
    """q, k, v [B, H, T, K] to [B, H, T, K], `BLOCK` queries at a time and only the keys that one of them may see.

    The probabilities P are kept for the backward pass: at most B H T min(T, window + BLOCK) numbers. With
    dP = dO V^T the scores' gradient is P (dP - rowsum(dO O))."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int | None, biases: Sequence[Tensor]) -> Tensor:
        heads = q.shape[:2]
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
        out, probabilities = _forward(q, k, v, window, biases)
        ctx.window, ctx.scale = window, q.size(-1) ** -0.5
        ctx.save_for_backward(q, k, v, out, *probabilities)
        return out.unflatten(0, heads)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, *probabilities = ctx.saved_tensors
        heads, d_out = d_out.shape[:2], d_out.flatten(0, 1)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (d_out * out).sum(-1, keepdim=True)
        for P, (queries, keys) in zip(probabilities, _spans(q.size(1), ctx.window), strict=True):
            d_v[:, keys] += P.mT @ d_out[:, queries]
            d_scores = (d_out[:, queries] @ v[:, keys].mT).sub_(delta[:, queries]).mul_(P)
            d_q[:, queries] = d_scores @ k[:, keys]
            d_k[:, keys] += d_scores.mT @ q[:, queries]
        gradients = (d_q.mul_(ctx.scale), d_k.mul_(ctx.scale), d_v)
        return *(x.unflatten(0, heads) for x in gradients), None, None
