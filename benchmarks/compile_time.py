"""Compile time of the model as one graph and block by block, and the time of what was compiled.

    python -m benchmarks.compile_time configs/sotu_base.toml --set num_layers=12

`first_s` are seconds of the first forward and backward pass of a micro-batch and the first forward pass without
gradients, the compiler's cache being empty; `cached_s` the same with the cache that this has left. Medians over rounds
in which both take turns. `pass_ms` is the median of later forward and backward passes, which take turns too. `graphs`
counts what was compiled, each time for training and for validation. Both have the same weights and batch; `loss_diff`
is the relative difference of their losses, and more than 1e-3 is refused.
"""

import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch

from data.files import user_path
from harness.compiling import compile_model
from harness.machine import find_machine
from harness.overrides import OWN, arguments, assignments
from harness.results import command, report
from harness.step_timer import median_seconds, take_turns
from harness.tables import Row
from train_gpt import Run, load_config, set_up

HOW = {"whole": False, "blocks": True}


@dataclass(frozen=True)
class Args:
    recipe: str = "configs/sotu_base.toml"  # the model and batch to time
    set: tuple[str, ...] = ()  # key=value ...: settings of every row
    rounds: Annotated[int, ">= 1"] = 3  # compilations of each from an empty cache
    passes: Annotated[int, ">= 1"] = 20  # that are timed when all is compiled
    label: str = ""  # the result is compile_time_<label>_<device>.json, so that none overwrites another's


def forward_and_backward(run: Run) -> float:
    """Of this rank's first micro-batch; its loss in nats."""
    inputs, targets = run.batch()
    loss = run.compiled(inputs[0], targets[0], run.window)
    loss.backward()
    run.model.zero_grad()
    return loss.item()


@torch.no_grad()
def forward_alone(run: Run) -> None:
    run.compiled(*(tokens[0] for tokens in run.batch()), run.window)


def first_calls(run: Run, by_block: bool) -> None:
    run.compiled = compile_model(run.model, by_block)
    forward_and_backward(run)
    forward_alone(run)


def main(args: Args) -> None:
    from torch._dynamo.utils import counters  # bring the compiler along: seconds
    from torch._inductor.utils import clear_caches

    fixed = ["--compile=false", "--checkpoint_every=0", "--resume="]  # compiled here
    given = arguments(assignments(args.set, "--set: ", OWN))
    config = load_config([str(user_path(args.recipe)), *fixed, *given])
    run = set_up(config, find_machine(config.device, config.dtype))
    for p in run.model.parameters():
        torch.nn.init.normal_(p, std=0.05)  # outputs that are zero at the start would hide an error
    device, expected = run.machine.device, forward_and_backward(run)
    first = {how: {key: list[float]() for key in ("first_s", "cached_s")} for how in HOW}
    graphs, differences = dict[str, int](), dict[str, float]()
    work = dict[str, Callable[[], float]]()
    with tempfile.TemporaryDirectory() as folder:
        for turn, how in [(turn, how) for turn in range(args.rounds) for how in HOW]:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{how}_{turn}"
            for seconds in first[how].values():
                torch._dynamo.reset()
                clear_caches()
                counters.clear()
                (taken,) = take_turns({how: partial(first_calls, run, HOW[how])}, 1, device=device)[how]
                seconds.append(taken.wall)
            graphs[how] = counters["stats"]["unique_graphs"]
        for how in HOW:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/{how}_{args.rounds - 1}"
            twin = dataclasses.replace(run)
            first_calls(twin, HOW[how])
            work[how] = partial(forward_and_backward, twin)
            differences[how] = abs(work[how]() / expected - 1)
            if not differences[how] < 1e-3:
                raise ValueError(f"compiled {how}, the loss differs by {differences[how]:.2g}; nothing is reported")
    passes = median_seconds(work, args.passes, warmups=2, device=device)
    run.loader.close()
    rows: list[Row] = []
    for how in HOW:
        row = {key: statistics.median(seconds) for key, seconds in first[how].items()}
        row["pass_ms"] = 1e3 * passes[how].wall
        ratios = {f"{key}_ratio": value / (rows[0][key] if rows else value) for key, value in row.items()}
        rows.append({"compiled": how, "graphs": graphs[how], **row, **ratios, "loss_diff": differences[how]})
    name = f"compile_time_{args.label}" if args.label else "compile_time"
    settings = {**dataclasses.asdict(args), "dtype": str(run.machine.dtype)}
    report(name, rows, str(device), **settings)


if __name__ == "__main__":
    command(main, Args, __doc__)
