"""How far a training step on a CPU is from the time that its matrix products alone would take, and where the rest goes.

    python -m benchmarks.step_bound configs/sotu_base.toml leaderboard/records/sotu-byte/*/config.toml
    python -m benchmarks.step_bound configs/sotu_base.toml --set matrix_optimizer=adamw

The bound is the FLOPs of all products of a step, optimizers included, counted by torch on the plain step (fused=none)
with all keys for every query, at the rate of one large product in the same dtype. Steps of all recipes and that product
take turns. The shares are of the time inside torch's operations, by the profiler: `products` are matrix products of all
sizes, `lookups` reads and updates of table rows, `elementwise` everything else. Recipes of older records may not load.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from data.files import user_path
from harness.machine import find_machine
from harness.overrides import arguments, assignments
from harness.results import command, report
from harness.step_timer import median_seconds
from harness.tables import Row
from train_gpt import Run, load_config, set_up, train_step, warm_up

LARGE = 2048  # rows and columns of the large product
FUSED_ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")}
PRODUCTS |= {FUSED_ATTENTION, f"{FUSED_ATTENTION}_backward"}
LOOKUPS = {
    "aten::index_select",
    "aten::index_add_",
    "aten::index_copy_",
    "aten::embedding_dense_backward",
    "aten::sort",
}


@dataclass(frozen=True)
class Args:
    recipes: tuple[str, ...] = ("configs/sotu_base.toml",)  # the models and batches to time
    set: tuple[str, ...] = ()  # key=value ...: settings of every recipe
    turns: Annotated[int, ">= 1"] = 30  # steps of each; the table has medians over them
    profiled: Annotated[int, ">= 1"] = 5  # steps under the profiler


def prepared(recipe: str, words: list[str], fused: str = "") -> Run:
    config = load_config([str(user_path(recipe)), *words, *([f"--fused={fused}"] if fused else [])])
    run = set_up(config, find_machine(config.device, config.dtype))
    warm_up(run)
    return run


def product_flops(run: Run) -> int:
    """FLOPs of the matrix products of one step, of model and optimizers."""
    inputs, targets = run.batch()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # fused attention is not counted
        train_step(run, inputs, targets)
    run.loader.close()
    return counter.get_total_flops()


def shares(step: Callable[[], object], steps: int) -> dict[str, float]:
    """Milliseconds per step inside operations, by kind; `elementwise` has all that no other kind names."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    found = Counter[str]()
    for event in profiler.key_averages():
        if event.key.startswith(("Optimizer.", "ProfilerStep")):  # marks of torch's own around whole steps
            continue
        kind = "products" if event.key in PRODUCTS else "lookups" if event.key in LOOKUPS else "elementwise"
        found[kind] += event.self_cpu_time_total / steps / 1e3
    return dict(found)


def main(args: Args) -> None:
    words = arguments({"device": "cpu", "checkpoint_every": "0", "resume": ""} | assignments(args.set, "--set: "))
    flops = {recipe: product_flops(prepared(recipe, words, "none")) for recipe in args.recipes}
    runs = {recipe: prepared(recipe, words) for recipe in args.recipes}
    dtype = next(iter(runs.values())).machine.dtype
    a, b = torch.randn(2, LARGE, LARGE, dtype=dtype)
    steps: dict[str, Callable[[], object]] = {
        recipe: partial(train_step, run, *run.batch()) for recipe, run in runs.items()
    }
    seconds = median_seconds({"product": lambda: a @ b, **steps}, args.turns, warmups=2)
    rate = 2 * LARGE**3 / seconds["product"].wall
    rows: list[Row] = []
    for recipe, step in steps.items():
        step_ms, bound_ms = 1e3 * seconds[recipe].wall, 1e3 * flops[recipe] / rate
        of_kinds = shares(step, args.profiled)
        inside = sum(of_kinds.values())
        rows.append(
            dict(recipe=recipe, tokens=runs[recipe].config.batch_tokens, step_ms=step_ms, gflop=flops[recipe] / 1e9,
                 bound_ms=bound_ms, of_bound=bound_ms / step_ms)
            | {f"{kind}_%": 100 * of_kinds.get(kind, 0.0) / inside for kind in ("products", "lookups", "elementwise")}
        )  # fmt: skip
        runs[recipe].loader.close()
    settings = dict(dataclasses.asdict(args), dtype=str(dtype), product_gflops=rate / 1e9)
    report("step_bound", rows, "cpu", **settings)


if __name__ == "__main__":
    command(main, Args, __doc__)
