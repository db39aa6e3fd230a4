"""What the examples train: a small causal transformer, on sequences that count upwards by a step of their own."""

import gc
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, LENGTH, WIDTH, HEADS, BLOCKS = 32, 24, 64, 4, 2


def sequences(count: int, seed: int) -> Tensor:
    """[count, LENGTH] int64: x, x + s, x + 2 s ... mod VOCABULARY, with x and s < 8 of each sequence's own. Two tokens
    say all others, so that the loss can fall from log 32 = 3.47 to log(8) / 23 = 0.09."""
    generator = torch.Generator().manual_seed(seed)
    start, step = torch.randint(VOCABULARY, (2, count, 1), generator=generator)
    step %= 8
    return (start + step * torch.arange(LENGTH)) % VOCABULARY


class TinyTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(BLOCKS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """The mean loss per token of predicting each next one."""
        x_BTD = self.embed(tokens_BT[:, :-1]) + self.positions[: tokens_BT.size(1) - 1]
        mask = nn.Transformer.generate_square_subsequent_mask(x_BTD.size(1))
        for block in self.blocks:
            x_BTD = block(x_BTD, src_mask=mask, is_causal=True)
        logits_BTV = self.head(self.norm(x_BTD))
        return F.cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, 1:].flatten())


def check(first: float, last: float, whole: nn.Module, resumed: nn.Module, who: str = "") -> None:
    """Say how the loss fell, and fail if it did not, or if the run that was resumed ended with other weights."""
    print(f"{who}loss {first:.2f} -> {last:.2f}")
    assert last < 0.5 * first
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(whole_tensor(p), whole_tensor(q)), "the resumed run is another one"


def whole_tensor(p: Any) -> Tensor:
    """A parameter, which may lie on the ranks in shards."""
    return p.full_tensor() if hasattr(p, "full_tensor") else p


@contextmanager
def process_group() -> Iterator[str]:
    """The ranks that torchrun started, on one machine; gives a folder for all of them, which is removed at the end."""
    dist.init_process_group("gloo")
    shared = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(shared)
    try:
        yield shared[0]
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(shared[0])
        gc.collect()  # DistributedDataParallel, in a cycle, still holds the group, whose threads then abort at the end
        dist.destroy_process_group()
