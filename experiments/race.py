"""A race: the same model under several optimizers, each for the same training time, to the same target loss.

    python -m experiments.race --seconds 240 --data data/classics
    python -m experiments.race configs/sotu_base.toml --matrix_optimizers adamw muon aurora --seconds 300
    python -m experiments.race configs/sotu_base.toml configs/sotu_cpu.toml --seconds 300

A few steps and a validation of every run are timed first; then the schedules are cut so that each run trains for the
same number of seconds and all of it (compilation, validations, set-up) ends within --seconds. The slowest run gets no
more steps than its recipe has; warm-ups shrink with the schedule. Without --target_loss the target is the highest of
the final losses, so that every run has a time for it: where a line between two validations first crosses it. One seed:
curves, not a record.

Writes results/race_<device>.json, with the curves, and the figure beside it. Runs go by their matrix optimizer, or by
the name in their recipe where optimizers are the same.
"""

import dataclasses
import gc
import lzma
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data.files import check_writable, user_path, whole_file
from experiments.arms import seconds_per_step
from experiments.curves import curve, draw
from harness.machine import Clock, find_machine
from harness.outcome import raise_if_cut_short
from harness.overrides import OWN, arguments, assignments
from harness.results import command, report
from harness.runlog import RunLog
from harness.step_timer import median_seconds
from harness.tables import Row
from optim import build_optimizers
from train_gpt import Config, Run, evaluate, load_config, set_up, train, warm_up

VALIDATIONS = 12  # of a run, after the one before its first step
FEWEST_STEPS = 2 * VALIDATIONS  # of a run that says anything
RECIPES = tuple(f"configs/classics_124m_{name}.toml" for name in ("adamw", "muon", "aurora"))
OVERHEAD_S = 2.0  # of a run, besides training and validations: its log, and warming up once more
Curve = Sequence[tuple[int, float, float]]  # step, seconds of training, validation loss


@dataclass(frozen=True)
class Args:
    recipes: tuple[str, ...] = RECIPES  # one for each run, or for all of --matrix_optimizers; the first is the baseline
    matrix_optimizers: tuple[str, ...] = ()  # runs of the first recipe, instead of one run for each recipe
    seconds: float = 240.0  # for everything together
    target_loss: float = 0.0  # nats per token; 0: the highest of the final losses
    data: str = ""  # folder with *_train_*.bin and *_val_*.bin, or the same as .bin.xz; empty: the recipe's files
    set: tuple[str, ...] = ()  # key=value ...: settings of every run
    folder: str = "runs/race"  # for run directories and unpacked shards


@dataclass
class Racer:
    name: str
    run: Run
    step_s: float
    validation_s: float


def shards(data: Path, folder: Path) -> list[str]:
    """The trainer's --train_files and --val_files for the shards in `data`; compressed ones are unpacked into `folder`.

    ValueError if there are none.
    """
    words = []
    for setting, pattern in (("train_files", "*_train_*.bin"), ("val_files", "*_val_*.bin")):
        is_plain, packed = any(data.glob(pattern)), sorted(data.glob(f"{pattern}.xz"))
        if not is_plain and not packed:
            raise ValueError(f"data = {str(data)!r} has no {pattern} and no {pattern}.xz; put shards there")
        for path in () if is_plain else packed:
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / path.stem).exists():
                with lzma.open(path) as source, whole_file(folder / path.stem, "wb") as copy:
                    shutil.copyfileobj(source, copy, 2**24)
        words.append(f"--{setting}={(data if is_plain else folder) / pattern}")
    return words


def make_racer(config: Config, name: str) -> Racer:
    """A run that has not begun: what was compiled and timed has left no trace in its weights and optimizers."""
    run = set_up(config, find_machine(config.device, config.dtype))
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    warm_up(run)
    (step_s,) = seconds_per_step({"": run})[""]
    validation = median_seconds({"": lambda: evaluate(run)}, 1, warmups=1, device=run.machine.device)
    run.model.load_state_dict(weights)
    run.optimizers = build_optimizers(run.model, config)
    return Racer(name, run, step_s, validation[""].wall)


def training_seconds(racers: Sequence[Racer], left_s: float) -> float:
    """How long each may train so that all of them end in `left_s`, the slowest by its recipe's end at the latest.
    ValueError if that is too short."""
    rest_s = sum((VALIDATIONS + 2) * racer.validation_s + OVERHEAD_S for racer in racers)
    slowest = max(racers, key=lambda racer: racer.step_s)
    need_s = rest_s + len(racers) * FEWEST_STEPS * slowest.step_s - left_s
    if need_s > 0:
        raise ValueError(
            f"seconds: {left_s:.0f} are left after compiling, too few for {len(racers)} runs of {FEWEST_STEPS} steps "
            f"or more; give {math.ceil(need_s)} more, or a smaller batch_tokens"
        )
    return min((left_s - rest_s) / len(racers), slowest.run.config.train_steps * slowest.step_s)


def scheduled(config: Config, train_steps: int, run_dir: str) -> Config:
    """The config with a schedule of `train_steps`, its warm-ups shortened alike."""
    share = train_steps / config.train_steps
    return dataclasses.replace(
        config, train_steps=train_steps, val_every=max(1, train_steps // VALIDATIONS), run_dir=run_dir,
        warmup_steps=round(config.warmup_steps * share), checkpoint_every=0, stop_at_target=False, target_loss=0.0,
        momentum_warmup_steps=round(config.momentum_warmup_steps * share),
    )  # fmt: skip


def seconds_to(target: float, losses: Curve) -> float | None:
    """Seconds of training at which a line between two validations first crosses the target; None if none does."""
    for (_, time_0, loss_0), (_, time_1, loss_1) in pairwise(losses):
        if loss_1 <= target:
            return time_1 - (time_1 - time_0) * (target - loss_1) / (loss_0 - loss_1) if loss_0 > target else time_0
    return None


def race(racers: Sequence[Racer], left_s: float, folder: Path) -> list[dict[str, Any]]:
    """Train them one after the other; what experiments.curves draws, one entry for each."""
    train_s, runs = training_seconds(racers, left_s), []
    for racer in racers:
        run = racer.run
        run.config = scheduled(run.config, int(train_s / racer.step_s), str(folder / "runs"))
        run.clock = Clock(run.machine.device)
        log, name = RunLog(run.config, run.machine, run.data), racer.name
        summary = train(run, log)
        run.loader.close()
        raise_if_cut_short(summary, name)
        summary.update(device=run.machine.name, config=dataclasses.asdict(run.config))
        kept = dict(overrides={"matrix_optimizer": name}, summary=summary, curve=curve(log.directory))
        runs.append(kept | dict(train_s=run.clock.seconds["train"]))
    return runs


def rows(runs: Sequence[dict[str, Any]], target: float) -> list[Row]:
    reached = [seconds_to(target, run["curve"]) for run in runs]
    table: list[Row] = []
    for run, time_s in zip(runs, reached, strict=True):
        summary, train_s = run["summary"], run["train_s"]
        table.append({
            "run": run["overrides"]["matrix_optimizer"], "status": summary["status"].split(":")[0],
            "train_time_s": train_s, "steps": summary["steps"],
            "tokens_per_s": summary["steps"] * summary["config"]["batch_tokens"] / train_s,
            "val_loss": summary["val_loss"], "time_to_target_s": "" if time_s is None else time_s,
            "speedup": reached[0] / time_s if reached[0] and time_s else "",
        })  # fmt: skip
    return table


def main(args: Args) -> None:
    started, folder = time.monotonic(), user_path(args.folder)
    recipes = [str(user_path(recipe)) for recipe in args.recipes]
    check_writable(folder, "choose another one, such as --folder=/tmp/race")
    words = shards(user_path(args.data), folder / "data") if args.data else []
    words += arguments(assignments(args.set, "--set: ", OWN))
    starts = [[recipe, *words] for recipe in recipes]
    if args.matrix_optimizers:
        starts = [[*starts[0], f"--matrix_optimizer={name}"] for name in args.matrix_optimizers]
    configs = [load_config(start) for start in starts]
    names = [config.matrix_optimizer for config in configs]
    if len({*names}) < len(names):
        names = [config.name for config in configs]
    if len({*names}) < len(names):
        raise ValueError(f"recipes: two are named {max(names, key=names.count)!r}, which runs go by; rename one")
    racers = [make_racer(config, name) for config, name in zip(configs, names, strict=True)]
    gc.collect()
    runs = race(racers, args.seconds - (time.monotonic() - started), folder)
    finals = [run["summary"]["val_loss"] for run in runs if run["summary"]["status"] == "finished"]
    target = args.target_loss or math.ceil(1e3 * max(finals, default=0.0)) / 1e3
    for run in runs:
        run["summary"]["config"]["target_loss"] = target
    device = str(racers[0].run.machine.device)
    settings = dataclasses.asdict(args) | dict(target_loss=target, recipes=[recipe for recipe, *_ in starts])
    curves = {run["overrides"]["matrix_optimizer"]: run["curve"] for run in runs}
    path = report("race", rows(runs, target), device, **settings, curves=curves)
    try:
        draw(dict(runs=runs, recipe=args.recipes[0]), path.with_suffix(".png"))
    except ImportError as error:
        print(f"no figure: {error}")


if __name__ == "__main__":
    command(main, Args, __doc__)
