"""What each part of a training step costs: the step without it, beside the whole one.

    python -m benchmarks.step_parts configs/sotu_base.toml --matrix_optimizer=adamw

Every row is a model of its own in which one part does nothing, or something plainer; what it computes is wrong, its
time is what counts. All take turns. Differences overlap where parts share work, so they do not add up to the whole.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch.nn.functional as F
from torch import Tensor

from data.files import user_path
from harness.machine import find_machine
from harness.results import command, report
from harness.step_timer import median_seconds
from harness.tables import Row
from kernels.linear import linear
from train_gpt import Run, load_config, set_up, train_step, warm_up


@dataclass(frozen=True)
class Args:
    recipe: str = "configs/sotu_base.toml"  # the model and batch to time
    matrix_optimizer: str = "adamw"
    turns: Annotated[int, ">= 1"] = 40  # steps of each; the table has medians over them


def same(x: Any, *_: Any) -> Any:
    return x


def without_attention(model: Any) -> None:
    """Its four projections stay."""
    enter = model.enter

    def no_scores(*arguments: Any) -> Any:
        _, values, embedded_BTD = enter(*arguments)
        return lambda q, k, v: v + 0 * (q + k), values, embedded_BTD

    model.enter = no_scores


def without_soft_cap(model: Any) -> None:
    """Nor the head's fusion: a product and torch's cross-entropy."""

    def loss(hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        logits = linear(hidden_BTD.flatten(0, 1), model.head.weight).float()
        return F.cross_entropy(logits, targets_BT.flatten(), reduction="sum")

    model.loss = loss


def without_norms(model: Any) -> None:
    model.norm = same
    for block in model.blocks:
        block.norm = same


def without_qk_norm(model: Any) -> None:
    for block in model.blocks:
        block.attention.norm = same


def without_rotary(model: Any) -> None:
    model.rotary.forward = same


def without_mlps(model: Any) -> None:
    for block in model.blocks:
        block.mlp.forward = same


# What is left out in each row: settings that differ, and what is done to the model.
PARTS: dict[str, tuple[dict[str, str], Callable[[Any], object]]] = {
    "nothing": ({}, same),
    "attention's scores": ({}, without_attention),
    "rotary": ({}, without_rotary),
    "QK-norm": ({}, without_qk_norm),
    "norms of the stream": ({}, without_norms),
    "soft cap and fused head": ({}, without_soft_cap),
    "SwiGLU (squared ReLU instead)": ({"activation": "squared_relu"}, same),
    "MLPs": ({}, without_mlps),
}


def prepared(args: Args, settings: dict[str, str], change: Callable[[Any], object]) -> Run:
    words = [f"--{key}={value}" for key, value in settings.items()]
    config = load_config([
        str(user_path(args.recipe)), f"--matrix_optimizer={args.matrix_optimizer}", "--checkpoint_every=0", "--resume=",
        *words,
    ])  # fmt: skip
    run = set_up(config, find_machine(config.device, config.dtype))
    change(run.model)
    warm_up(run)
    return run


def forward_and_backward(run: Run, inputs: Tensor, targets: Tensor) -> None:
    for inputs_BT, targets_BT in zip(inputs, targets, strict=True):
        (run.compiled(inputs_BT, targets_BT, run.window) / targets.numel()).backward()
    for optimizer in run.optimizers:
        optimizer.zero_grad()


def main(args: Args) -> None:
    runs = {name: prepared(args, *part) for name, part in PARTS.items()}
    work: dict[str, Callable[[], object]] = {name: partial(train_step, run, *run.batch()) for name, run in runs.items()}
    whole = runs["nothing"]
    work["optimizers"] = partial(forward_and_backward, whole, *whole.batch())
    seconds = median_seconds(work, args.turns, warmups=2)
    rows: list[Row] = []
    for name in work:
        step_ms, whole_ms = 1e3 * seconds[name].wall, 1e3 * seconds["nothing"].wall
        rows.append(dict(without=name, step_ms=step_ms, saves_ms=whole_ms - step_ms, saves=1 - step_ms / whole_ms))
    for run in runs.values():
        run.loader.close()
    report("step_parts", rows, "cpu", **dataclasses.asdict(args), dtype=str(whole.machine.dtype))


if __name__ == "__main__":
    command(main, Args, __doc__)
