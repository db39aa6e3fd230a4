"""Aurora on parameters that torch's fully_shard has cut, and torch.distributed.checkpoint for what it trains.

    torchrun --nproc-per-node 2 examples/fsdp2_two_ranks.py

Each rank receives whole the matrices that it owns, orthogonalises them and sends the shards back.
"""

from typing import Any

import torch
import torch.distributed as dist
from nanogpt_aurora import Aurora
from torch import nn
from torch.distributed.checkpoint import load, save  # type: ignore[attr-defined]
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from toy import TinyTransformer, check, process_group, sequences

STEPS = 60


def train(folder: str, first: int = 0) -> tuple[nn.Module, float]:
    """From the start, with a checkpoint half way, or from that; the model and the last loss of this rank."""
    torch.manual_seed(0)
    model = TinyTransformer()
    # shown
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)  # then the optimizers
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = set(matrices)
    others = [p for p in model.parameters() if p not in chosen]
    optimizers = [Aurora(matrices, lr=0.05), torch.optim.AdamW(others, lr=0.01)]
    # end
    if first:
        # shown
        saved: Any = dict(zip(("model", "optimizers"), get_state_dict(model, optimizers), strict=True))
        load(saved, checkpoint_id=folder)  # into what is there
        set_state_dict(model, optimizers, model_state_dict=saved["model"], optim_state_dict=saved["optimizers"])
        # end
    for step in range(first, STEPS):
        if step == STEPS // 2 and not first:
            # shown
            saved = dict(zip(("model", "optimizers"), get_state_dict(model, optimizers), strict=True))
            save(saved, checkpoint_id=folder)
            # end
        tokens = sequences(64, seed=step).chunk(dist.get_world_size())[dist.get_rank()]
        loss = model(tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return model, loss.item()


def main() -> None:
    with process_group() as folder:
        with torch.no_grad():
            first = TinyTransformer()(sequences(64, seed=0)).item()
        whole, last = train(folder)
        resumed, _ = train(folder, first=STEPS // 2)
        check(first, last, whole, resumed, f"rank {dist.get_rank()}: ")


if __name__ == "__main__":
    main()
