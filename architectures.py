"""Which class of model the settings ask for; and that of `objective = "masked"`, which predicts tokens that are hidden
from it (data/masking.py) from those before and after them.

It is any of the others with two differences: every query sees every key of its row, and the loss, computed at targets
alone, counts each for several tokens, so that the trainer's mean over all tokens is the mean over those that are
masked. It has no causal order, so it writes no text.
"""

from typing import Any

import torch
from torch import Tensor

from data.masking import num_masked
from kernels.attention import Attend
from model import GPT, IGNORE_INDEX, ModelConfig
from model_track3 import Track3


class Masked(GPT):
    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.bfloat16, doc_token: int | None = None) -> None:
        if config.vocab_size == config.padded_vocab_size:
            works = f"vocab_size = {config.vocab_size + 1} leaves one"
            raise ValueError(f"objective = 'masked' needs an id that is no token's, for the mask; {works}")
        if config.doc_mask or config.window:
            found = f"not doc_mask = {str(config.doc_mask).lower()}, window = {config.window}"
            raise ValueError(f"objective = 'masked' attends to whole rows: set doc_mask = false, window = 0, {found}")
        super().__init__(config, dtype, doc_token)

    def enter(self, inputs_BT: Tensor, window: int | Tensor | None, kind: str) -> tuple[Attend, list[Tensor], Tensor]:
        return super().enter(inputs_BT, window, "bidirectional")

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Summed over the targets, of which each row has the same number or none, times its tokens for each of them."""
        row_tokens = targets_BT.size(1)
        num_targets = num_masked(self.config.mask_share, row_tokens)
        is_target_BT = (targets_BT != IGNORE_INDEX).byte()
        places_BM = is_target_BT.topk(num_targets, sorted=False).indices  # nonzero would wait for a GPU
        hidden_BMD = hidden_BTD.gather(1, places_BM[..., None].expand(-1, -1, hidden_BTD.size(2)))
        return super().loss(hidden_BMD, targets_BT.gather(1, places_BM)) * (row_tokens / num_targets)

    def flops_per_token(self) -> int:
        head = sum(p.numel() for p in self.head.parameters())
        seq_len = self.config.seq_len
        not_targets = seq_len - num_masked(self.config.mask_share, seq_len)
        return super().flops_per_token() - 6 * head * not_targets // seq_len


class MaskedTrack3(Masked, Track3):
    pass


CLASSES: dict[tuple[str, str], type[GPT]] = {
    ("gpt", "causal"): GPT,
    ("gpt", "masked"): Masked,
    ("track3", "causal"): Track3,
    ("track3", "masked"): MaskedTrack3,
}


def class_of(config: Any) -> type[GPT]:
    """config: a ModelConfig, or one that has its settings."""
    return CLASSES[config.architecture, config.objective]
