"""One run: a decoder on one task until it has grokked and held it, or until its steps are used up.

Steps are counted, not seconds: `memorised` is the first measurement at which the training rows are at 99% accuracy,
`crossed` the first one from there on with the validation rows at 95% (the definition of arXiv 2504.16041), `sustained`
the first from which they stay at 95% for `sustain_steps`. A run ends when that is seen. What has not happened by then
is censored, not missing: it is known to be later than the last step at which it could have been seen.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from experiments.grokking.decoder import LOSSES, Decoder
from experiments.grokking.tasks import MAX_TOKENS, TRAIN_SHARES, VOCAB_SIZE, Rows, split, table
from model import ModelConfig
from optim import MatrixOptimizer, build_optimizers
from train_gpt import Config

MEMORISED, GENERALISED, COLLAPSED = 0.99, 0.95, 0.8  # accuracies
ROWS_MEASURED = 1024  # of either part at most: a standard error of 0.7 points at the 95% line
BATCH_SIZES = {"parity": 128}  # rows per step; its 512 training rows would be one batch
DEFAULT_BATCH_SIZE = 512


@dataclass(frozen=True)
class Settings:
    """Settings that decide a run's curve. Whatever is not a hidden matrix is the same for every optimizer."""

    task: str
    optimizer: str = "muon"  # of the hidden matrices, as matrix_optimizer in training
    lr: float = 0.02  # of the hidden matrices
    weight_decay: float = 1.0  # of the hidden matrices; torch's own rule for sgd and rmsprop: added to the gradient
    seed: int = 0  # of weights, split and batches
    attention: str = "softmax"
    loss: str = "softmax"
    train_share: float = 0.0  # of the rows; 0: the task's own
    batch_size: int = 0  # rows per step; 0: the task's own
    depth: int = 1  # blocks
    width: int = 128
    heads: int = 4
    max_steps: int = 2000
    sustain_steps: int = 300
    look_every: int = 10  # steps
    warmup_steps: int = 10
    adam_lr: float = 0.01  # embedding and head
    adam_weight_decay: float = 0.01  # embedding and head

    @property
    def rows_per_step(self) -> int:
        return self.batch_size or BATCH_SIZES.get(self.task, DEFAULT_BATCH_SIZE)


@dataclass(frozen=True)
class Measurement:
    step: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float


def build(settings: Settings, device: torch.device) -> tuple[Decoder, list[torch.optim.Optimizer]]:
    """The model and its optimizers, routed as in training. `width` is an even number times `heads`."""
    shape = ModelConfig(
        vocab_size=VOCAB_SIZE, num_layers=settings.depth, num_heads=settings.heads,
        head_dim=settings.width // settings.heads, model_dim=settings.width, seq_len=MAX_TOKENS,
    )  # fmt: skip
    config = Config(
        matrix_optimizer=settings.optimizer, matrix_lr=settings.lr, matrix_weight_decay=settings.weight_decay,
        embed_lr=settings.adam_lr, head_lr=settings.adam_lr, weight_decay=settings.adam_weight_decay,
        adam_betas=(0.9, 0.98), adam_eps=1e-8,
    )  # fmt: skip
    with device:
        model = Decoder(shape, settings.attention)
    return model, build_optimizers(model, config)


def train(settings: Settings) -> dict[str, Any]:
    """Run to the end; settings, outcome and curves, all of it JSON. The same settings give the same curves."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    share = settings.train_share or TRAIN_SHARES[settings.task]
    train_rows, val_rows = (part.to(device) for part in split(table(settings.task), share, generator))
    model, optimizers = build(settings, device)
    loss_of, rows_of = LOSSES[settings.loss], batches(train_rows, settings.rows_per_step, generator)
    measured: list[Measurement] = []
    status, start = "ended", time.perf_counter()
    for step in range(settings.max_steps + 1):
        if step % settings.look_every == 0:
            measured.append(measure(model, loss_of, step, train_rows, val_rows))
            if not math.isfinite(measured[-1].train_loss + measured[-1].val_loss):
                status, measured = "diverged", measured[:-1]
                break
            if milestones(measured, settings.sustain_steps)["sustained"] is not None or step == settings.max_steps:
                break
        rows = next(rows_of)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["initial_lr"] * min(1.0, (step + 1) / settings.warmup_steps)
        loss_of(model(rows.inputs, rows.num_classes), rows.targets).backward()
        try:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
                if isinstance(optimizer, MatrixOptimizer) and step % settings.look_every == 0:
                    optimizer.raise_if_not_finite()  # a GPU puts this off
        except FloatingPointError:  # a gradient of muon or a relative
            status = "diverged"
            break
    outcome = dict(status=status, steps=step, seconds=round(time.perf_counter() - start, 3))
    curves = {field.name: [getattr(one, field.name) for one in measured] for field in fields(Measurement)}
    return dict(settings=asdict(settings), **outcome, **milestones(measured, settings.sustain_steps), curves=curves)


def seconds_per_step(settings: Settings, steps: int = 10) -> float:
    """Wall-clock seconds per step of a short run, measurements included, without the first step, which sets up."""
    train(replace(settings, max_steps=1))
    return train(replace(settings, max_steps=steps))["seconds"] / steps


def batches(rows: Rows, batch_size: int, generator: torch.Generator) -> Iterator[Rows]:
    """Epoch after epoch of the rows in a new order, cut into batches of one size; some lie across two epochs."""
    order = torch.empty(0, dtype=torch.int64)
    while True:
        while len(order) < batch_size:
            order = torch.cat((order, torch.randperm(len(rows.targets), generator=generator)))
        yield rows.take(order[:batch_size].to(rows.targets.device))
        order = order[batch_size:]


@torch.no_grad()
def measure(
    model: Decoder, loss_of: Callable[[Tensor, Tensor], Tensor], step: int, train_rows: Rows, val_rows: Rows
) -> Measurement:
    """Loss and accuracy on the first rows of either part, whose order is random."""
    found = []
    for rows in (train_rows, val_rows):
        targets = rows.targets[:ROWS_MEASURED]
        logits = model(rows.inputs[:ROWS_MEASURED], rows.num_classes)
        hits = (logits.argmax(-1) == targets).float().mean()
        found += [round(loss_of(logits, targets).item(), 5), round(hits.item(), 4)]
    return Measurement(step, *found)


def milestones(measured: Sequence[Measurement], sustain_steps: int) -> dict[str, Any]:
    """Milestones of a curve: the three steps above (None: not seen), delay from memorised to sustained, and collapse.

    collapsed: whether validation accuracy was below 80% at any measurement after it had crossed 95%. A run is not
    watched longer than it takes to see 95% held, so that later collapses are not seen.
    """
    memorised = next((one.step for one in measured if one.train_accuracy >= MEMORISED), None)
    later = [one for one in measured if memorised is not None and one.step >= memorised]
    crossed = next((one.step for one in later if one.val_accuracy >= GENERALISED), None)
    groups = groupby(later, lambda one: one.val_accuracy >= GENERALISED)
    spans = [[one.step for one in group] for is_up, group in groups if is_up]
    sustained = next((steps[0] for steps in spans if steps[-1] - steps[0] >= sustain_steps), None)
    after = [one.val_accuracy for one in later if crossed is not None and one.step >= crossed]
    return dict(
        memorised=memorised, crossed=crossed, sustained=sustained,
        delay=None if sustained is None or memorised is None else sustained - memorised,
        collapsed=bool(after) and min(after) < COLLAPSED,
        best_val_accuracy=max((one.val_accuracy for one in measured), default=0.0),
    )  # fmt: skip
