"""Aurora under Accelerate on several ranks: gradient accumulation, clipping, a schedule, its checkpoints.

    torchrun --nproc-per-node 2 examples/accelerate_two_ranks.py

The ranks share the work: each one orthogonalises its part of the matrices.
"""

from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from nanogpt_aurora import Aurora, CombinedOptimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from toy import TinyTransformer, check, process_group, sequences

STEPS = 60


def train(folder: str, first: int = 0) -> tuple[torch.nn.Module, float]:
    """From the start, with a checkpoint half way, or from that; the model and the last loss of this rank."""
    set_seed(0)
    model = TinyTransformer()
    data: Any = sequences(64 * STEPS, seed=0)
    loader = DataLoader(data, batch_size=16)
    # shown
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = set(matrices)
    others = [p for p in model.parameters() if p not in chosen]
    optimizer = CombinedOptimizer([Aurora(matrices, lr=0.05), torch.optim.AdamW(others, lr=0.01)])
    schedule = LambdaLR(optimizer, lambda step: 1 - step / (STEPS * accelerator.num_processes))
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    # end
    if first:
        accelerator.load_state(folder)
        loader = accelerator.skip_first_batches(loader, 2 * first)
    # shown
    for i, batch in enumerate(loader, start=2 * first):
        with accelerator.accumulate(model):
            accelerator.backward(loss := model(batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        # end
        if i + 1 == STEPS and not first:  # half of the batches
            accelerator.save_state(folder)
    return accelerator.unwrap_model(model), loss.item()


def main() -> None:
    with process_group() as folder:
        with torch.no_grad():
            first = TinyTransformer()(sequences(64, seed=0)).item()
        whole, last = train(folder)
        resumed, _ = train(folder, first=STEPS // 2)
        check(first, last, whole, resumed, f"rank {dist.get_rank()}: ")
        for p in whole.parameters():
            mean = p.detach().clone()
            dist.all_reduce(mean, op=dist.ReduceOp.AVG)
            assert torch.equal(p, mean), "the ranks differ"


if __name__ == "__main__":
    main()
