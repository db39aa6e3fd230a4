"""Do the options of today's small-model recipes pay on the clock? Each against the plain model, for equal time.

    ./run.sh options --jobs 2                                    all options on the embedded sample, 3 seeds
    ./run.sh options --arms unet_skips short_rows --seeds 0 1 2 3 4
    ./run.sh options --table experiments/results/options.json

Steps of every arm are timed first, arms taking turns in this process; then each arm's schedule is given as many steps
as fit into the time of the plain one's, and the runs themselves may share the machine: what counts is the loss at the
end, and that does not depend on how fast it came. Differences from the plain model are of runs with the same seed, with
a 95% interval by Student's t. An option pays when the interval is below zero.

The sources of the options are in model.py; batch and row lengths that grow are from GPT-3 (2005.14165) and from
curriculum by sequence length (2108.06084).
"""

import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from scipy import stats
from tqdm import tqdm

from data import console
from data.files import check_writable, user_path, whole_file
from experiments.cost import confirm, duration
from experiments.sweep import GOES_ON, Cell, run_sweep
from harness.machine import device_name, find_machine, versions
from harness.tables import Row, align, cell
from train_gpt import load_config, plan_step, set_up, train_step

# What each arm sets; a share of the schedule stands where a number of steps is meant.
ARMS: dict[str, dict[str, str | float]] = {
    "plain": {},
    "value_embeds": dict(value_embeds="1"),
    "embed_skip": dict(embed_skip="true"),
    "unet_skips": dict(unet_skips="true"),
    "tie_head": dict(tie_head_steps=2 / 3, embed_lr="0.004"),
    "small_batch": dict(small_batch_steps=0.5),
    "short_rows": dict(short_row_steps=0.5),
    "joint_matrices": dict(joint_matrices="true"),
    "mask_padding": dict(mask_padding="true"),
    "z_loss": dict(z_loss="1e-4"),
    "doc_mask": dict(doc_mask="true"),
    "window": dict(window="128"),
}
FIXED = dict(
    stop_at_target="false", target_loss="0", checkpoint_every="0", resume="", fused_norm="true", fused_mlp="true",
    fused_head="true", attention="blocks",
)  # fmt: skip
ROUNDS = 25


@dataclass(frozen=True)
class Options:
    recipe: tyro.conf.Positional[str] = "configs/sotu_cpu.toml"  # model, data and the plain schedule
    arms: tuple[str, ...] = tuple(ARMS)  # options to try; the plain model is always there
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 0  # of the plain schedule; 0: the recipe's
    set: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()  # key=value ...: settings of every run
    jobs: int = 1  # runs at once
    out: str = "runs/options"  # folder of the runs and of result.json
    table: str = ""  # run nothing, print this result.json
    yes: bool = False  # do not ask before starting


def arguments(options: Options, arm: str, train_steps: int) -> Cell:
    """Settings of an arm whose schedule has `train_steps`."""
    settings = {"train_steps": str(train_steps), "val_every": str(train_steps)}
    for key, value in ARMS[arm].items():
        settings[key] = value if isinstance(value, str) else str(round(value * train_steps))
    return settings


def fixed_settings(options: Options) -> Cell:
    words = [word.partition("=") for group in options.set for word in group]
    bad = ["".join(word) for word in words if not all(word)]
    if bad:
        raise ValueError(f"--set {bad[0]}: not key=value; try --set train_files=data/sotu_byte/sotu_train_*.bin")
    return {**FIXED, **{key: value for key, _, value in words}}


def step_seconds(options: Options, arms: Sequence[str], steps: int) -> dict[str, float]:
    """Mean seconds of a step over each arm's schedule: medians of its first kind of step and of its last, weighted
    by their shares. Arms take turns. One thread on a CPU is timed by what it computed, not by how long it waited for
    its neighbours."""
    own_time = torch.get_num_threads() == 1
    words = [f"--{key}={value}" for key, value in fixed_settings(options).items()]
    runs, times = {}, dict[str, tuple[list[float], list[float]]]()
    with tempfile.TemporaryDirectory() as folder:
        for arm in arms:
            own = [f"--{key}={value}" for key, value in arguments(options, arm, steps).items()]
            config = load_config([options.recipe, *words, *own, f"--run_dir={folder}"])
            runs[arm], times[arm] = set_up(config, find_machine(config.device, config.dtype)), ([], [])
            own_time &= runs[arm].machine.device.type == "cpu"
        now = time.thread_time if own_time else time.perf_counter
        for turn in tqdm(range(ROUNDS + 1), desc="timing", unit="round", leave=False, disable=None):
            for arm, run in runs.items():
                for kind, step in enumerate((0, steps - 1)):
                    run.follow(plan_step(run.config, step))
                    batch = run.batch()
                    run.clock.switch("step")
                    start = now()
                    train_step(run, *batch)
                    run.clock.switch("between")
                    if turn:
                        times[arm][kind].append(now() - start)
        for run in runs.values():
            run.loader.close()
    shares = {arm: next((v for v in ARMS[arm].values() if isinstance(v, float)), 0.5) for arm in arms}
    medians = {arm: [statistics.median(kind) for kind in times[arm]] for arm in arms}
    return {arm: shares[arm] * medians[arm][0] + (1 - shares[arm]) * medians[arm][1] for arm in arms}


def compare(losses: Sequence[float], plain: Sequence[float]) -> tuple[float, float, float]:
    """Mean difference of runs with the same seed, and its 95% interval (infinite for one seed)."""
    differences = np.subtract(losses, plain)
    mean, n = float(differences.mean()), len(differences)
    if n < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


def summary(result: Mapping[str, Any]) -> list[Row]:
    """A row for each arm, best first, the plain model on top."""
    arms = {arm["arm"]: arm for arm in result["arms"]}
    rows: list[tuple[float, Row]] = []
    for name, arm in arms.items():
        losses, plain = arm["val_loss"], arms["plain"]["val_loss"]
        row: Row = dict(option=name, step=f"{arm['step_s'] / arms['plain']['step_s']:.2f}x", steps=arm["steps"])
        if None in losses:
            rows.append(
                (math.inf, row | {"final loss": "diverged", "difference": "", "95% interval": "", "pays": "no"})
            )
            continue
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        row["final loss"] = f"{statistics.mean(losses):.4f} ± {spread:.4f}"
        mean, low, high = compare(losses, plain)
        if name == "plain":
            rows.append((-math.inf, row | {"difference": "", "95% interval": "", "pays": ""}))
            continue
        verdict = "yes" if high < 0 else "costs" if low > 0 else "cannot tell"
        rows.append((mean, row | {"difference": f"{mean:+.4f}", "95% interval": f"{low:+.4f} to {high:+.4f}",
                                  "pays": verdict}))  # fmt: skip
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]


def experiment(options: Options) -> dict[str, Any]:
    """Time, confirm, run; the content of result.json. Raises ValueError for what was asked for, RuntimeError for a
    run that crashed."""
    unknown = sorted(set(options.arms) - set(ARMS))
    if unknown or not options.seeds or options.jobs < 1 or options.steps < 0:
        what = f"arm {unknown[0]!r} is unknown" if unknown else "seeds, jobs or steps are none"
        raise ValueError(f"{what}; arms are {', '.join(ARMS)}, and --seeds 0 1 2 --jobs 2 is usual")
    fixed = fixed_settings(options)
    words = [f"--{key}={value}" for key, value in fixed.items()]
    steps = options.steps or load_config([options.recipe, *words]).train_steps
    arms = list(dict.fromkeys(("plain", *options.arms)))
    out = Path(options.out)
    check_writable(out, "choose another folder, such as --out=/tmp/options")
    timing, threads = out / "timing.json", torch.get_num_threads()
    if timing.exists() and json.loads(timing.read_text(encoding="utf-8")).keys() >= set(arms):
        step_s = json.loads(timing.read_text(encoding="utf-8"))  # an earlier start's, whose runs go on
    else:
        torch.set_num_threads(max(1, threads // options.jobs))
        step_s = step_seconds(options, arms, steps)
        torch.set_num_threads(threads)
    schedule = {arm: round(steps * step_s["plain"] / step_s[arm]) for arm in arms}
    num_runs, total_s = len(arms) * len(options.seeds), len(arms) * len(options.seeds) * steps * step_s["plain"]
    confirm([f"{num_runs} runs of {min(schedule.values())} to {max(schedule.values())} steps: about "
             f"{duration(total_s / options.jobs)} of training, {options.jobs} at a time"], options.yes)  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(timing) as file:
        file.write(json.dumps(step_s, indent=1) + "\n")
    cells = [arguments(options, arm, schedule[arm]) for arm in arms]
    results = iter(run_sweep(options.recipe, cells, options.seeds, out / "runs", options.jobs, fixed))
    losses: dict[str, list[float | None]] = {arm: [] for arm in arms}
    device = device_name(torch.device("cpu"))
    for _ in options.seeds:
        for arm in arms:
            run = next(results)
            if not run.ended:
                raise RuntimeError(
                    f"a run crashed, see {out}/runs/runs/{run.name}/output.txt; the same command goes on"
                )
            losses[arm].append(None if run.diverged else run.summary["val_loss"])
            device = run.summary["device"]
    return dict(
        recipe=options.recipe, settings=fixed, seeds=list(options.seeds), device=device, versions=versions(),
        arms=[dict(arm=arm, sets=arguments(options, arm, schedule[arm]), step_s=step_s[arm], steps=schedule[arm],
                   val_loss=losses[arm]) for arm in arms],
    )  # fmt: skip


def main(argv: Sequence[str]) -> int:
    return console.run(lambda: _main(argv), GOES_ON)


def _main(argv: Sequence[str]) -> int:
    options = tyro.cli(Options, args=argv, description=__doc__, use_underscores=True)
    recipe, out = (str(user_path(path)) for path in (options.recipe, options.out))
    options = dataclasses.replace(options, recipe=recipe, out=out)
    try:
        if options.table:
            result = json.loads(user_path(options.table).read_text(encoding="utf-8-sig"))
        else:
            result = experiment(options)
            path = Path(options.out) / "result.json"
            with whole_file(path) as file:
                file.write(json.dumps(result, indent=1) + "\n")
            print(f"-> {path}", file=sys.stderr)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    rows = summary(result)
    print(align([list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
