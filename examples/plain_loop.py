"""Aurora in a training loop of one's own: a fused matrix of queries, keys and values, clipping, a schedule, a resume.

python examples/plain_loop.py
"""

import tempfile
from pathlib import Path

import torch
from nanogpt_aurora import Aurora, CombinedOptimizer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from toy import TinyTransformer, check, sequences

STEPS = 80


def train(model: TinyTransformer, checkpoint: Path, stop_at: int = STEPS) -> float:
    """From the checkpoint, if there is one, to a step; the last loss."""
    # shown
    named = dict(model.blocks.named_parameters())
    fused = [p for name, p in named.items() if name.endswith("in_proj_weight")]  # queries, keys and values in one
    single = [p for name, p in named.items() if name.endswith(("out_proj.weight", "linear1.weight", "linear2.weight"))]
    chosen = {*fused, *single}
    others = [p for p in model.parameters() if p not in chosen]
    aurora = Aurora([{"params": single}, {"params": fused, "row_blocks": 3}], lr=0.05)
    optimizer = CombinedOptimizer([aurora, torch.optim.AdamW(others, lr=0.01)])
    schedule = LambdaLR(optimizer, lambda step: 1 - step / STEPS)  # of both rates
    # end
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        first = saved["step"]
        for name, part in dict(model=model, optimizer=optimizer, schedule=schedule).items():
            part.load_state_dict(saved[name])
    # shown
    for step in range(first, stop_at):
        loss = model(sequences(64, seed=step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    # end
    parts = dict(model=model, optimizer=optimizer, schedule=schedule)
    torch.save({"step": stop_at, **{name: part.state_dict() for name, part in parts.items()}}, checkpoint)
    return loss.item()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = TinyTransformer()
        with torch.no_grad():
            first = model(sequences(64, seed=0)).item()
        last = train(model, Path(folder, "whole.pt"))

        torch.manual_seed(0)
        train(TinyTransformer(), Path(folder, "half.pt"), stop_at=STEPS // 2)
        resumed = TinyTransformer()
        train(resumed, Path(folder, "half.pt"))
    check(first, last, model, resumed)


if __name__ == "__main__":
    main()
