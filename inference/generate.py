"""Tokens from a model, one after the other. Keys and values of the tokens so far are kept, so that another one costs
one token's products and not a row's."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import Attend, visible_keys
from model import GPT, Rotary


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits, in this order."""

    temperature: float = 0.8  # divides the logits; 0: the likeliest token
    top_k: int = 0  # of the likeliest so many; 0: of all
    top_p: float = 1.0  # of the fewest likeliest whose probabilities have this sum

    def draw(self, logits_V: Tensor, generator: torch.Generator) -> int:
        """`generator` lives on the CPU."""
        logits_V = logits_V.float().cpu()
        if not self.temperature:
            return int(logits_V.argmax())
        logits_V, ids_V = ((logits_V - logits_V.max()) / self.temperature).sort(descending=True, stable=True)
        probabilities_V = logits_V[: self.top_k or None].softmax(0)
        are_before = probabilities_V.cumsum(0) - probabilities_V
        probabilities_V = probabilities_V * (are_before < self.top_p)  # the first always stays
        return int(ids_V[torch.multinomial(probabilities_V, 1, generator=generator)])


class Cache:
    """The keys and values of a row of at most seq_len tokens, which grows at its end."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.ids: list[int] = []
        self._kept: list[tuple[Tensor, Tensor]] = []  # of each block: keys and values, [1, seq_len, H, K]

    @torch.no_grad()
    def extend(self, tokens: list[int]) -> Tensor:
        """Add tokens to the row; their logits, float32 [tokens, V]: to rounding those of the model for the whole row.
        Raises ValueError where the row would be longer than seq_len."""
        model, start, end = self.model, len(self.ids), len(self.ids) + len(tokens)
        if end > model.config.seq_len:
            raise ValueError(f"a row of {end} tokens is longer than seq_len = {model.config.seq_len}")
        self.ids += tokens
        ids_1T = torch.tensor([self.ids], device=model.embed.weight.device)
        first = max(0, start + 1 - max(model.config.ngrams, default=1))  # n-grams reach back behind the new tokens
        _, values, embedded_BTD = model.enter(ids_1T[:, first:], None, "sdpa")
        values, embedded_BTD = [value[:, start - first :] for value in values], embedded_BTD[:, start - first :]
        rotary = cast(Rotary, partial(model.rotary, start=start))
        hidden_BTD = model.through_blocks(rotary, self._attend(ids_1T, start), values, embedded_BTD)
        return model.logits(hidden_BTD[0])

    def _attend(self, ids_1T: Tensor, start: int) -> Attend:
        """How new tokens attend to all so far, for as many blocks as the model has: called once by each, in order."""
        model, end, blocks = self.model, ids_1T.size(1), count()
        docs_1T = None if model.doc_token is None else (ids_1T == model.doc_token).cumsum(1)
        mask_11TS = visible_keys(ids_1T, docs_1T, model.config.window or None, slice(start, end), slice(0, end))

        def attend(q_1THK: Tensor, k_1THK: Tensor, v_1THK: Tensor) -> Tensor:
            if (block := next(blocks)) == len(self._kept):
                shape = 1, model.config.seq_len, *k_1THK.shape[2:]
                self._kept.append((k_1THK.new_empty(shape), v_1THK.new_empty(shape)))
            keys, values = self._kept[block]
            keys[:, start:end], values[:, start:end] = k_1THK, v_1THK
            q, k, v = (x.transpose(1, 2) for x in (q_1THK, keys[:, :end], values[:, :end]))
            return F.scaled_dot_product_attention(q, k, v, mask_11TS).transpose(1, 2)

        return attend


def generate(
    model: GPT, prompt: list[int], num_tokens: int, generator: torch.Generator, sampling: Sampling = Sampling(),
    stop: int | None = None, on_drop: Callable[[int], object] = lambda num_dropped: None,
) -> Iterator[int]:  # fmt: skip
    """Ids after `prompt`, which has at least one: `num_tokens` of them, or fewer if `stop` is drawn, which is not among
    them. `generator` lives on the CPU.

    A model knows rows of seq_len tokens. Where the row is full, its oldest half is dropped and what is left becomes the
    beginning of a new row; `on_drop` is told how many tokens went.
    """
    seq_len = model.config.seq_len
    cache, new = Cache(model), prompt
    for _ in range(num_tokens):
        row = cache.ids + new
        if len(row) > seq_len:
            kept = row[-(seq_len - seq_len // 2) :]
            on_drop(len(row) - len(kept))
            cache, new = Cache(model), kept
        logits_V = cache.extend(new)[-1, : model.config.vocab_size]
        token = sampling.draw(logits_V, generator)
        if token == stop:
            return
        yield token
        new = [token]
