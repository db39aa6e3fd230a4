"""A stack of runs: decoders on one task, trained side by side until each has generalised and held it, or its steps are
used up.

Steps are counted, not seconds. `memorised` is the first measurement at which the training rows are at 99% accuracy,
`crossed` the first with the validation rows at 95%, whatever the training rows are at, `held` the first from which they
stay at 95% for `hold_steps`. What has not happened when a run ends is censored, not missing: it is later than the last
step at which it could have been seen.

Runs of a stack share task, shape and optimizer; rates, decays and seed are each run's own. No optimizer here looks at
weights, so it updates a stack of zeros instead, at a rate of 1 and without decay, and each run takes its share of what
that makes of them, the negated update:

    W <- (1 - lr * weight_decay) * W - lr * update

The decay of sgd and rmsprop is torch's for them: added to the gradient. A run that has ended leaves the stack; so does
one whose gradient is not finite, at the next measurement, and until then its gradients are zero.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from experiments.grokking.decoder import LOSSES, Decoders, stacked_weights
from experiments.grokking.tasks import MAX_TOKENS, VOCAB_SIZE, Rows, split, table
from model import ModelConfig
from optim.config import TORCH_OPTIMIZERS, adamw, find_rule
from optim.routing import rule_optimizer
from train_gpt import Config

MEMORISED, GENERALISED, COLLAPSED = 0.99, 0.95, 0.8  # accuracies
ROWS_MEASURED = 512  # of either part at most: a standard error of one point at the 95% line
COUPLED = ("sgd", "rmsprop")  # whose decay is added to the gradient
LARGEST_STACK, STACK_NUMBERS = 10, 2**19  # runs; rows per step times width of all of them, past which caches overflow


@dataclass(frozen=True)
class Settings:
    """Settings that decide a run's curve. What is not a hidden matrix is on AdamW whatever the optimizer."""

    task: str
    optimizer: str = "muon"  # of the hidden matrices, as matrix_optimizer in training
    lr: float = 0.02  # of the hidden matrices
    weight_decay: float = 0.3  # of the hidden matrices
    adam_weight_decay: float = 0.1  # of embedding and head
    seed: int = 0  # of weights, split and batches
    init: Literal["normal", "zero"] = "normal"  # of the outputs of attention and MLP, and of the head
    attention: str = "softmax"
    loss: str = "softmax"
    is_causal: bool = True
    train_share: float = 0.5  # of the rows
    batch_size: int = 512  # rows per step; 0: all training rows
    depth: int = 1  # blocks
    width: int = 64
    heads: int = 4
    stop: Literal["crossed", "held", "never"] = "held"  # when a run ends before max_steps
    is_frozen: bool = False  # embedding and head stay as they are once validation accuracy has been at 95%
    max_steps: int = 2500
    hold_steps: int = 300
    eval_every: int = 20  # steps
    warmup_steps: int = 10
    adam_lr: float = 0.01  # embedding and head

    @property
    def kind(self) -> "Settings":
        """What runs of one stack share."""
        return replace(self, lr=0.0, weight_decay=0.0, adam_weight_decay=0.0, seed=0)


@dataclass
class Member:
    """A run of the stack and the rows that are its own, as numbers of rows of the task's table."""

    settings: Settings
    batches: Iterator[Tensor]
    eval_rows: tuple[Tensor, ...]  # of the training and of the validation part
    measurements: list["Measurement"] = field(default_factory=list)
    has_diverged: bool = False

    @property
    def has_crossed(self) -> bool:
        return any(each.val_accuracy >= GENERALISED for each in self.measurements)


@dataclass(frozen=True)
class Measurement:
    step: int
    train_accuracy: float
    val_accuracy: float


def model_config(settings: Settings) -> ModelConfig:
    """The model. normal: 0.5 / sqrt(fan-in) for output projections, as input matrices have, and 0.02 for the head."""
    config = ModelConfig(
        vocab_size=VOCAB_SIZE, num_layers=settings.depth, num_heads=settings.heads,
        head_dim=settings.width // settings.heads, model_dim=settings.width, seq_len=MAX_TOKENS,
    )  # fmt: skip
    if settings.init == "zero":
        return config
    stds = dict(init_out=0.5 / settings.width**0.5, init_down=0.5 / config.hidden_dim**0.5, init_head=0.02)
    return replace(config, **stds)


@cache
def rows_of(task: str, device: torch.device) -> Rows:
    return table(task).to(device)


class Stack:
    """Models and optimizers of runs of one kind. `weights` are by name, [R, ...], and so are `updates`: what the
    optimizers move, zero between steps."""

    def __init__(self, runs: Sequence[Settings], device: torch.device) -> None:
        self.kind, self.device, self.rows = runs[0].kind, device, rows_of(runs[0].task, device)
        config = model_config(self.kind)
        self.decoders = Decoders(config, self.rows.inputs, self.kind.attention, self.kind.is_causal)
        self.weights = stacked_weights(config, [run.seed for run in runs], device)
        self.members = [self.member(run) for run in runs]
        self.updates = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.optimizers = build_optimizers(self.kind.optimizer, self.updates)

    def member(self, settings: Settings) -> Member:
        generator = torch.Generator().manual_seed(settings.seed)
        train_rows, val_rows = split(len(self.rows.targets), settings.train_share, generator)
        eval_rows = (rows[:ROWS_MEASURED].to(self.device) for rows in (train_rows, val_rows))
        return Member(settings, batches(train_rows, settings.batch_size, generator), tuple(eval_rows))

    def per_run(self, key: str, like: Tensor) -> Tensor:
        """A setting of every run, [R, 1, ...] of as many dimensions as `like`."""
        values = [getattr(member.settings, key) for member in self.members]
        return torch.tensor(values, dtype=like.dtype, device=self.device).view(-1, *[1] * (like.ndim - 1))

    def losses(self, rows_RB: Tensor) -> Tensor:
        """The mean loss over the rows, [R]."""
        logits = self.decoders(self.weights, rows_RB, self.rows.num_classes)
        of_rows = LOSSES[self.kind.loss](logits.flatten(0, 1), self.rows.targets[rows_RB].flatten())
        return of_rows.view(rows_RB.shape).mean(1)

    def step(self, warmup: float) -> None:
        """One step of every run; `warmup` multiplies all rates."""
        rows_RB = torch.stack([next(member.batches) for member in self.members]).to(self.device)
        self.losses(rows_RB).sum().backward()
        self.silence_diverged()
        with torch.no_grad():
            is_coupled = self.kind.optimizer in COUPLED
            for name, weight in self.weights.items():
                gradient = self.updates[name].grad = weight.grad
                if is_coupled and is_matrix(name) and gradient is not None:
                    gradient.addcmul_(self.per_run("weight_decay", weight), weight)
            for optimizer in self.optimizers:
                optimizer.step()
            for name, weight in self.weights.items():
                rates = warmup * self.per_run("lr" if is_matrix(name) else "adam_lr", weight)
                if not is_matrix(name) and self.kind.is_frozen:
                    is_free = [not member.has_crossed for member in self.members]
                    rates *= torch.tensor(is_free, device=self.device).view_as(rates)
                if not (is_coupled and is_matrix(name)):
                    decays = self.per_run("weight_decay" if is_matrix(name) else "adam_weight_decay", weight)
                    weight.mul_(1 - rates * decays)
                weight.addcmul_(rates, self.updates[name])
                self.updates[name].zero_()
                weight.grad = None

    @torch.no_grad()
    def silence_diverged(self) -> None:
        """Mark runs whose gradient is not finite, and zero their weights and gradients."""
        norms = [weight.grad.flatten(1).norm(dim=1) for weight in self.weights.values() if weight.grad is not None]
        is_sound = torch.stack(norms).isfinite().all(0)
        if is_sound.all():
            return
        for member, sound in zip(self.members, is_sound.tolist(), strict=True):
            member.has_diverged |= not sound
        for weight in self.weights.values():
            for values in (weight, weight.grad):
                assert values is not None
                values.masked_fill_(~is_sound.view(-1, *[1] * (weight.ndim - 1)), 0)

    @torch.no_grad()
    def measure(self, step: int) -> None:
        """Accuracy of every run on the first rows of either part, whose order is random."""
        accuracies = []
        for parts in zip(*(member.eval_rows for member in self.members), strict=True):
            rows_RB = torch.stack(parts)
            logits = self.decoders(self.weights, rows_RB, self.rows.num_classes)
            accuracies.append((logits.argmax(-1) == self.rows.targets[rows_RB]).float().mean(1).tolist())
        for member, *of_run in zip(self.members, *accuracies, strict=True):
            member.measurements.append(Measurement(step, *of_run))

    def keep(self, indices: Sequence[int]) -> None:
        """Go on with these runs alone."""
        kept = torch.tensor(indices, device=self.device)
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        self.members = [self.members[index] for index in indices]
        self.weights = {name: w.detach()[kept].requires_grad_() for name, w in self.weights.items()}
        self.updates = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        self.optimizers = build_optimizers(self.kind.optimizer, self.updates)
        for optimizer, saved in zip(self.optimizers, states, strict=True):
            for state in saved["state"].values():  # of [R, ...], but for torch's count of steps
                state.update({key: value[kept] for key, value in state.items() if value.ndim})
            optimizer.load_state_dict(saved)


def is_matrix(name: str) -> bool:
    return name.startswith("blocks.")


def build_optimizers(name: str, updates: Mapping[str, Tensor]) -> list[torch.optim.Optimizer]:
    """The optimizer of the matrices and AdamW for embedding and head, at a rate of 1 and without decay."""
    config = Config(matrix_optimizer=name, adam_betas=(0.9, 0.98), adam_eps=1e-8)
    make = TORCH_OPTIMIZERS.get(name) or partial(rule_optimizer, find_rule(name))
    groups: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
    for each in updates.items():
        groups[is_matrix(each[0])].append(each)
    plain: dict[str, Any] = dict(lr=1.0, weight_decay=0.0)
    matrices = dict(params=groups[True], flatten=False, **plain)  # leading dimensions are matrices beside each other
    return [make([matrices], config), adamw([dict(params=groups[False], **plain)], config)]


def train(runs: Sequence[Settings]) -> list[dict[str, Any]]:
    """Run all of a stack to the end; settings, outcome and curves of each, all of it JSON. The same stack gives the
    same curves; another stack with the same run gives the same to rounding."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if len({run.kind for run in runs}) > 1:
        raise ValueError("a stack is of runs that differ in rates, decays and seed alone")
    stack, results, start = Stack(runs, device), dict[Settings, dict[str, Any]](), time.perf_counter()
    run_steps = 0
    for step in range(stack.kind.max_steps + 1):
        if step % stack.kind.eval_every == 0 or step == stack.kind.max_steps:
            stack.measure(step)
            ended = [index for index, member in enumerate(stack.members) if has_ended(member, step)]
            for member in (stack.members[index] for index in ended):
                results[member.settings] = outcome(member, step)
            if len(ended) == len(stack.members):
                break
            if ended:
                stack.keep([index for index in range(len(stack.members)) if index not in ended])
        stack.step(min(1.0, (step + 1) / stack.kind.warmup_steps))
        run_steps += len(stack.members)
    seconds = (time.perf_counter() - start) / max(1, run_steps)
    return [dict(results[run], seconds_per_step=round(seconds, 6)) for run in runs]


def has_ended(member: Member, step: int) -> bool:
    settings = member.settings
    if member.has_diverged or step == settings.max_steps:
        return True
    return settings.stop != "never" and milestones(member.measurements, settings.hold_steps)[settings.stop] is not None


def outcome(member: Member, step: int) -> dict[str, Any]:
    """Without the measurement after a run has diverged, which means nothing."""
    kept = member.measurements[:-1] if member.has_diverged else member.measurements
    status = "diverged" if member.has_diverged else "ended"
    curves = {key: [round(getattr(each, key), 4) for each in kept] for key in ("train_accuracy", "val_accuracy")}
    steps_of = milestones(kept, member.settings.hold_steps)
    return dict(settings=asdict(member.settings), status=status, steps=step, **steps_of, curves=curves)


def stacks(runs: Sequence[Settings]) -> list[list[Settings]]:
    """The runs by kind, in as few and as even stacks as are not too large."""
    alike: dict[Settings, list[Settings]] = {}
    for run in dict.fromkeys(runs):
        alike.setdefault(run.kind, []).append(run)
    found = []
    for kind, members in alike.items():
        rows = kind.batch_size or round(kind.train_share * len(table(kind.task).targets))
        largest = max(1, min(LARGEST_STACK, STACK_NUMBERS // (rows * kind.width)))
        number = math.ceil(len(members) / largest)
        found += [members[i::number] for i in range(number)]
    return found


def seconds_per_step(runs: Sequence[Settings], steps: int = 5) -> float:
    """Wall-clock seconds per step and run of a stack, its measurements included."""
    train([replace(run, max_steps=1) for run in runs])  # sets up
    return train([replace(run, max_steps=steps) for run in runs])[0]["seconds_per_step"]


def batches(rows: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Epoch after epoch of the rows in a new order, cut into batches of one size; some lie across two epochs. 0: all of
    them at every step."""
    order = torch.empty(0, dtype=torch.int64)
    while True:
        if not batch_size:
            yield rows
            continue
        while len(order) < batch_size:
            order = torch.cat((order, rows[torch.randperm(len(rows), generator=generator)]))
        yield order[:batch_size]
        order = order[batch_size:]


def milestones(curve: Sequence[Measurement], hold_steps: int) -> dict[str, Any]:
    """Milestones of a curve: the three steps above (None: not seen), validation accuracy when the training rows were
    memorised and at its best, the lowest after it had crossed, and whether that was a collapse, below 80%.

    With stop = "held" a run is not watched longer than it takes to see 95% held: later collapses are not seen.
    """
    memorised = next((each for each in curve if each.train_accuracy >= MEMORISED), None)
    crossed = next((each.step for each in curve if each.val_accuracy >= GENERALISED), None)
    groups = groupby(curve, lambda each: each.val_accuracy >= GENERALISED)
    spans = [[each.step for each in group] for is_up, group in groups if is_up]
    held = next((steps[0] for steps in spans if steps[-1] - steps[0] >= hold_steps), None)
    after = [each.val_accuracy for each in curve if crossed is not None and each.step >= crossed]
    return dict(
        memorised=memorised.step if memorised else None, crossed=crossed, held=held,
        val_when_memorised=round(memorised.val_accuracy, 4) if memorised else None,
        best_val_accuracy=round(max((each.val_accuracy for each in curve), default=0.0), 4),
        lowest_after=round(min(after), 4) if after else None, collapsed=bool(after) and min(after) < COLLAPSED,
    )  # fmt: skip
