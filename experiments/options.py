"""Do the options of today's small-model recipes pay on the clock? Each against the plain model, for equal time.

    ./run.sh options --jobs 2                                    all options on the embedded sample, 3 seeds
    ./run.sh options --arms ngrams short_rows --seeds 0 1 2 3 4
    ./run.sh options configs/sotu_cpu.toml --arms plain --ideas "wide: model_dim=96" "rate: embed_lr=0.05"
    ./run.sh options --table experiments/results/options.json

Steps of every arm are timed first, arms taking turns in this process, a single CPU thread by what it computes; then
each arm's schedule is given as many steps as fit into the time of the plain one's, and the runs themselves may share
the machine: what counts is the loss at the end, and that does not depend on how fast it came. Differences from the
plain model are of runs with the same seed, with a 95% interval and p by Student's t. An option pays when it is lower
with a p below 0.05 after Holm's correction for the number of options.

The sources of the options are in model.py; batch and row lengths that grow are from GPT-3 (2005.14165) and from
curriculum by sequence length (2108.06084).
"""

import dataclasses
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch

from data.files import check_writable, user_path, write_json
from experiments import arms
from experiments.arms import confirm, duration, names_of
from experiments.comparisons import LEVEL, against
from harness.machine import find_machine, versions
from harness.overrides import arguments, assignments
from harness.settings import parse_settings
from harness.tables import Row, mean_and_sd, table
from train_gpt import load_config, set_up

# What each arm sets; a share of the schedule stands where a number of steps is meant.
ARMS: dict[str, dict[str, str | float]] = {
    "plain": {},
    "value_embeds": dict(value_embeds="1"),
    "embed_skip": dict(embed_skip="true"),
    "ngrams": dict(ngrams="2,3"),
    "tie_head": dict(tie_head_steps=2 / 3, embed_lr="0.004"),
    "small_batch": dict(small_batch_steps=0.5),
    "short_rows": dict(short_row_steps=0.5),
    "mask_padding": dict(mask_padding="true"),
    "z_loss": dict(z_loss="1e-4"),
    "doc_mask": dict(doc_mask="true"),
    "window": dict(window="128"),
}
FIXED = dict(stop_at_target="false", target_loss="0", checkpoint_every="0", resume="", fused="norm,mlp,head,blocks")
COMPARED = ("difference", "95% interval", "p", "p (Holm)", "pays")  # columns of the table
TURNS = 25  # of timing a step of every arm


@dataclass(frozen=True)
class Options:
    recipe: str = "configs/sotu_base.toml"  # model, data and the plain schedule
    arms: Annotated[tuple[str, ...], names_of(ARMS)] = tuple(ARMS)  # options to try; the plain model is always there
    ideas: tuple[str, ...] = ()  # more to try: a name and what it sets, "wide: model_dim=96 num_heads=3"
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: Annotated[int, ">= 0"] = 0  # of the plain schedule; 0: the recipe's
    set: tuple[tuple[str, ...], ...] = ()  # key=value ...: settings of every run
    jobs: Annotated[int, ">= 1"] = 1  # runs at once
    out: str = "runs/options"  # folder of the runs and of result.json
    table: str = ""  # run nothing, print this result.json
    yes: bool = False  # do not ask before starting


def all_arms(options: Options) -> dict[str, Mapping[str, str | float]]:
    """The plain model, the options to try and the user's own ideas. Raises ValueError."""
    found: dict[str, Mapping[str, str | float]] = {arm: ARMS[arm] for arm in ("plain", *options.arms)}
    return {**found, **arms.ideas(options.ideas, found)}


def arm_settings(sets: Mapping[str, str | float], train_steps: int) -> dict[str, str]:
    """Settings of an arm whose schedule has `train_steps`."""
    settings = {"train_steps": str(train_steps), "val_every": str(train_steps)}
    for key, value in sets.items():
        settings[key] = value if isinstance(value, str) else str(round(value * train_steps))
    return settings


def fixed_settings(options: Options) -> dict[str, str]:
    return {**FIXED, **assignments(itertools.chain(*options.set), "--set: ")}


def step_seconds(options: Options, chosen: Mapping[str, Mapping[str, str | float]], steps: int) -> dict[str, float]:
    """Mean seconds of a step over each arm's schedule: medians of its first kind of step and of its last, weighted by
    their shares."""
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm, sets in chosen.items():
            words = arguments(fixed_settings(options) | arm_settings(sets, steps))
            config = load_config([options.recipe, *words, f"--run_dir={folder}"])
            runs[arm] = set_up(config, find_machine(config.device, config.dtype))
        seconds = arms.seconds_per_step(runs, (0, steps - 1), TURNS, computed=True)
        for run in runs.values():
            run.loader.close()
    shares = {arm: next((v for v in sets.values() if isinstance(v, float)), 0.5) for arm, sets in chosen.items()}
    return {arm: shares[arm] * first + (1 - shares[arm]) * last for arm, (first, last) in seconds.items()}


def summary(result: Mapping[str, Any]) -> list[Row]:
    """A row for each arm, best first, the plain model on top."""
    plain, ranked = next(arm for arm in result["arms"] if arm["arm"] == "plain"), []
    differences, adjusted = against({arm["arm"]: arm["val_loss"] for arm in result["arms"]}, "plain")
    for arm in result["arms"]:
        name, has_diverged = arm["arm"], None in arm["val_loss"]
        rank, told = math.inf, ("", "", "", "", "no" if has_diverged else "cannot tell")
        if arm is plain:
            rank, told = -math.inf, ("",) * 5
        elif name in differences:
            found = differences[name]
            rank = found.mean
            pays = "cannot tell" if adjusted[name] >= LEVEL else "yes" if rank < 0 else "costs"
            told = *found.told, f"{found.p:.2g}", f"{adjusted[name]:.2g}", pays
        row: Row = dict(option=name, step=f"{arm['step_s'] / plain['step_s']:.2f}x", steps=arm["steps"])
        row["final loss"] = "diverged" if has_diverged else mean_and_sd(arm["val_loss"], 4)
        row |= zip(COMPARED, told, strict=True)
        ranked.append((rank, row))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def experiment(options: Options) -> dict[str, Any]:
    """Time, confirm, run; the content of result.json. Raises ValueError for what was asked for."""
    if not options.seeds:
        raise ValueError("there is no seed; --seeds 0 1 2 is usual")
    fixed = fixed_settings(options)
    steps = options.steps or load_config([options.recipe, *arguments(fixed)]).train_steps
    chosen = all_arms(options)
    names = list(chosen)
    out = Path(options.out)
    check_writable(out, "choose another folder, such as --out=/tmp/options")
    timing = out / "timing.json"
    known = json.loads(timing.read_text(encoding="utf-8")) if timing.exists() else {}
    step_s = known.get("step_s", {})
    if known.get("arms") != json.loads(json.dumps(chosen)):  # else an earlier start's, whose runs go on
        with arms.cpu_threads(max(1, torch.get_num_threads() // options.jobs)):
            step_s = step_seconds(options, chosen, steps)
    schedule = {arm: round(steps * step_s["plain"] / step_s[arm]) for arm in names}
    num_runs = len(names) * len(options.seeds)
    total_s = num_runs * steps * step_s["plain"]
    confirm([f"{num_runs} runs of {min(schedule.values())} to {max(schedule.values())} steps: about "
             f"{duration(total_s / options.jobs)} of training, {options.jobs} at a time"], options.yes)  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_json(timing, dict(arms=chosen, step_s=step_s), indent=1)
    cells = [arm_settings(chosen[arm], schedule[arm]) for arm in names]
    results = arms.sweep(options.recipe, cells, options.seeds, out / "runs", options.jobs, fixed)
    losses = [None if run.diverged else run.summary["val_loss"] for run in results]  # seeds outermost
    return dict(
        recipe=options.recipe, settings=fixed, seeds=list(options.seeds), device=results[-1].summary["device"],
        versions=versions(),
        arms=[dict(arm=arm, sets=cell, step_s=step_s[arm], steps=schedule[arm], val_loss=losses[place :: len(names)])
              for place, (arm, cell) in enumerate(zip(names, cells, strict=True))],
    )  # fmt: skip


@arms.command
def main(argv: list[str]) -> None:
    options = parse_settings(Options, argv, __doc__, leading="recipe")
    recipe, out = (str(user_path(path)) for path in (options.recipe, options.out))
    options = dataclasses.replace(options, recipe=recipe, out=out)
    if options.table:
        result = arms.read_result(user_path(options.table), summary)
    else:
        result = experiment(options)
        write_json(Path(options.out) / "result.json", result, indent=1)
        print(f"-> {options.out}/result.json", file=sys.stderr)
    print(table(summary(result)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
