"""Masked tokens: some of a row are hidden from a model, which is to predict them from all the others.

Of each row of T tokens `num_masked(share, T)`, chosen at random, are targets, and no other token is. Of these a model
sees a mask token in eight of ten cases, a random one in one, and in one the token itself (BERT, arXiv 1810.04805).

What is random is a hash of a token's position in the stream and of a seed: neither the number of ranks nor the
micro-batch changes it, a run resumes from a position alone, and the next epoch, whose positions go on from the last
one's, hides other tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NO_TARGET = -1
LOW_32 = 0xFFFFFFFF


def num_masked(share: float, row_tokens: int) -> int:
    return max(1, round(share * row_tokens))


@dataclass(frozen=True)
class Masking:
    """What makes rows for the masked objective out of those for the causal one."""

    share: float  # of a row's tokens
    vocab_size: int  # random tokens are below this
    mask_token: int  # the id that stands for a hidden token
    seed: int

    def __call__(self, inputs: Tensor, targets: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """From rows [..., T] of inputs (int32) and of targets (int64) one position later, which follow each other in
        the stream from position `start`. A row whose targets are NO_TARGET only fills a batch, and still does."""
        row_tokens = inputs.size(-1)
        position = start + torch.arange(inputs.numel(), device=inputs.device).view(inputs.shape)
        order = self._random(position, 0) * row_tokens + position % row_tokens  # no two of a row are equal
        chosen = order.topk(num_masked(self.share, row_tokens), -1, largest=False, sorted=False).indices
        is_target = torch.zeros_like(inputs, dtype=torch.bool).scatter_(-1, chosen, True)
        case = self._random(position, 1) % 10  # 0: stays, 1: random
        shown = torch.where(case > 1, self.mask_token, self._random(position, 2) % self.vocab_size)
        masked = torch.where(is_target & (case > 0), shown.to(inputs.dtype), inputs)
        return masked, torch.where(is_target & (targets != NO_TARGET), inputs.to(targets.dtype), NO_TARGET)

    def _random(self, position: Tensor, purpose: int) -> Tensor:
        """Numbers in [0, 2^32), int64, for positions (int64) up to 2^63."""
        key = 3 * self.seed + purpose
        hashed = _mixed(_mixed(position & LOW_32) ^ (position >> 32))
        return _mixed(_mixed(hashed ^ (key & LOW_32)) ^ (key >> 32 & LOW_32))


def masking(config: Any, seed: int) -> Masking | None:
    """The masking of a config's objective, if it has one. The mask's id is the first of the vocabulary's padding."""
    if config.objective != "masked":
        return None
    return Masking(config.mask_share, config.vocab_size, config.vocab_size, seed)


def _mixed(x: Tensor) -> Tensor:
    """A one-to-one map of [0, 2^32) in which each bit depends on all. Multipliers: C. Wellons's "lowbias32"."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = x ^ (x >> shift)
        low, high = x & 0xFFFF, x >> 16  # the product of the whole has more than 63 bits
        x = (low * factor + ((high * factor & 0xFFFF) << 16)) & LOW_32
    return x ^ (x >> 16)
