"""What else the sources say of Muon and Aurora: a masked-token model, clipping and the cooldown, many epochs.

    python -m experiments.claims                           (all three: an hour or more on two CPU cores; asks first)
    python -m experiments.claims --parts masked --jobs 2
    python -m experiments.claims --draw experiments/results/claims.json                    (the tables again)

Written before any reported run. All on `sotu_base`; embedding and head keep the recipe's AdamW rates.

masked      A bidirectional model that predicts hidden tokens (objective = "masked"), 400 steps: is Aurora's lead over
            Muon, and Muon's over AdamW, there as well? Losses are over the hidden tokens of 131,072.
clipping    Gradients clipped at a norm of 1 or not, the rate falling over the last 70% of 400 steps or constant, under
            Muon and AdamW: do these pay, and is it the same for both? Each rule's losses are compared with those of the
            recipe, which does not clip and cools down.
epochs      Six epochs of the first 499,712 bytes, 1,464 steps: at the same loss on the text that was trained on, is one
            rule's loss on other text lower? The training loss at a step is the mean over the batches of one whole
            epoch around it; the loss on other text, over 32,768 tokens, is of that step, interpolated between those at
            the ends of epochs. (Between steps 61 apart, as was meant at first, it would tell where in the text a rule
            is: the loss on other text also rises within an epoch, by up to 0.04 and in all runs alike.)

Tuning is equal: every arm of the first two takes the same four learning rates (AdamW a tenth of them) on seed 100,
which is not reported; the lowest final validation loss wins. (The lowest of the four was added when winners were at the
end of three; six epochs were ten before any had run.) In `epochs` the rates are those that won on the whole text
(experiments/results/neurons.json). Then seeds 0, 1 and 2. Differences are paired by seed; p-values are Holm-adjusted
over what one baseline is compared with.

The same command goes on where it stopped. OUT.json keeps what the tables need. Exit status as the sweep's.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from data.files import check_writable, user_path, write_json
from data.prepare import ensure
from data.shards import find_shards, open_shard, write_shard
from experiments import arms
from experiments.arms import EDGE, confirm, duration, names_of
from experiments.comparisons import Paired, against
from experiments.sweep import Cell, Result, rows_with
from harness.settings import parse_settings
from harness.tables import Row, mean_and_sd, table
from train_gpt import load_config

RECIPE = "configs/sotu_base.toml"
RATES = (0.005, 0.01, 0.02, 0.04)  # AdamW's are a tenth
TUNING_SEED = 100
SEEDS = (0, 1, 2)
EPOCH_STEPS = 244  # of 2,048 bytes
LEVELS = (1.3, 1.2, 1.1, 1.0, 0.9, 0.8)  # training losses at which the loss on other text is read


@dataclass(frozen=True)
class Arm:
    settings: Cell
    baseline: str  # the arm that its losses are compared with; its own name: none
    rates: tuple[float, ...]  # tried, or the one that is taken


@dataclass(frozen=True)
class Part:
    settings: Cell  # of all its runs
    arms: Mapping[str, Arm]


def rates_of(rule: str) -> tuple[float, ...]:
    return tuple(rate / 10 for rate in RATES) if rule == "adamw" else RATES


def scheduled(steps: int, **settings: str) -> Cell:
    return {"train_steps": str(steps), "stop_at_target": "false", "val_every": str(steps), **settings}


def clipping_arms() -> Iterator[tuple[str, Arm]]:
    for rule in ("muon", "adamw"):
        for clip, cooldown in itertools.product(("0", "1"), ("0.7", "0")):
            name = ", ".join([rule, *["clipped"] * (clip != "0"), *["constant rate"] * (cooldown == "0")])
            settings = {"matrix_optimizer": rule, "grad_clip": clip, "cooldown_frac": cooldown}
            yield name, Arm(settings, rule, rates_of(rule))


PARTS = {
    "masked": Part(
        scheduled(400, objective="masked"),
        {rule: Arm({"matrix_optimizer": rule}, "muon", rates_of(rule)) for rule in ("muon", "aurora", "adamw")},
    ),
    "clipping": Part(scheduled(400, log_every="10"), dict(clipping_arms())),
    "epochs": Part(
        scheduled(6 * EPOCH_STEPS, val_every=str(EPOCH_STEPS // 4), log_every="1", val_tokens="32768"),
        {
            rule: Arm({"matrix_optimizer": rule}, "muon", (rate,))
            for rule, rate in (("muon", 0.02), ("aurora", 0.02), ("adamw", 0.002))
        },
    ),
}


@dataclass(frozen=True)
class Options:
    parts: Annotated[tuple[str, ...], names_of(PARTS)] = tuple(PARTS)  # what to run
    steps: Annotated[int, ">= 0"] = 0  # of every schedule, for a trial; 0: each part's own
    out: str = "runs/claims"  # folder of the runs
    jobs: Annotated[int, ">= 1"] = 2  # runs at once
    yes: bool = False  # do not ask before starting
    draw: str = ""  # run nothing, print the tables of this JSON


def settings_of(part: str, options: Options) -> Cell:
    """Settings of all runs of a part."""
    settings = dict(PARTS[part].settings)
    if options.steps:
        settings |= {key: str(options.steps) for key in ("train_steps", "val_every")}
    if part == "epochs":
        settings["train_files"] = str(Path(options.out) / "few/few_train_*.bin")
    return settings


def cell_of(arm: Arm, rate: float) -> Cell:
    return {**arm.settings, "matrix_lr": f"{rate:g}"}


def write_few(options: Options) -> None:
    """The shard of `epochs`, if it is not there: runs that are under way read it."""
    path = Path(options.out) / "few/few_train_000001.bin"
    if path.exists():
        return
    config = load_config([RECIPE])
    tokens = open_shard(find_shards(config.train_files)[0])[: EPOCH_STEPS * config.batch_tokens]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(path, tokens)


def plan(options: Options) -> list[str]:
    """What is going to run, and how long it takes here at most."""
    lines, total_s, threads = [], 0.0, max(1, torch.get_num_threads() // options.jobs)
    for name in options.parts:
        part, settings = PARTS[name], settings_of(name, options)
        num_runs = sum(len(arm.rates) * (len(arm.rates) > 1) + len(SEEDS) for arm in part.arms.values())
        cells = [{**settings, **cell_of(arm, arm.rates[0])} for arm in part.arms.values()]
        run_s = max(arms.seconds_of_a_run(RECIPE, cell, threads) for cell in cells)
        lines.append(f"{name:10} {num_runs} runs of {settings['train_steps']} steps, {duration(run_s)} each at most")
        total_s += num_runs * run_s
    return [*lines, f"about {duration(total_s / options.jobs)} in all, {options.jobs} at a time"]


def run_part(name: str, options: Options) -> dict[str, Any]:
    """Tune the arms of a part, run them, and keep what its tables need."""
    part, fixed, out = PARTS[name], settings_of(name, options), Path(options.out) / name

    def sweep(cells: Sequence[Cell], seeds: Sequence[int], stage: str) -> list[Result]:
        return arms.sweep(RECIPE, cells, seeds, out / stage, options.jobs, fixed) if cells else []

    trials = [(arm, rate) for arm, of in part.arms.items() for rate in of.rates if len(of.rates) > 1]
    tuned = sweep([cell_of(part.arms[arm], rate) for arm, rate in trials], [TUNING_SEED], "tuning")
    tried: dict[str, dict[float, float]] = {}
    for (arm, rate), result in zip(trials, tuned, strict=True):
        tried.setdefault(arm, {})[rate] = np.inf if result.diverged else result.summary["val_loss"]
    rates = {arm: arms.best(tried[arm]) if arm in tried else of.rates[0] for arm, of in part.arms.items()}
    results = sweep([cell_of(of, rates[arm]) for arm, of in part.arms.items()], SEEDS, "runs")
    found = []
    for place, (arm, of) in enumerate(part.arms.items()):
        runs = results[place :: len(part.arms)]  # seeds are outermost
        found.append(dict(
            arm=arm, baseline=of.baseline, settings=of.settings, rate=rates[arm],
            at_edge=arms.at_edge(rates[arm], tried.get(arm, ())),
            tried=[[rate, round(loss, 4) if np.isfinite(loss) else None] for rate, loss in tried.get(arm, {}).items()],
            val_loss=[None if run.diverged else round(run.summary["val_loss"], 5) for run in runs],
            clipped=[share_clipped(run) for run in runs] if of.settings.get("grad_clip", "0") != "0" else None,
            curves=[curve(run) for run in runs] if name == "epochs" else None,
        ))  # fmt: skip
    summaries = [run.summary for run in results]
    return dict(steps=int(fixed["train_steps"]), seeds=list(SEEDS), **arms.origins(summaries), arms=found)


def share_clipped(run: Result) -> float | None:
    """Of the logged steps, how many had a gradient whose norm is above 1."""
    rows = rows_with("extra", Path(run.directory))
    norms = [norm for row in rows if (norm := row["extra"].get("grad_norm")) is not None]
    return round(float(np.mean(np.array(norms) > 1)), 4) if norms else None


def curve(run: Result) -> list[list[float]]:
    """[step, training loss, loss on other text] where one whole epoch is around the step."""
    directory = Path(run.directory)
    of_steps = np.array([row["train_loss"] for row in rows_with("train_loss", directory)])
    points = []
    for row in rows_with("val_loss", directory):
        first = row["step"] - EPOCH_STEPS // 2  # rows are logged after each step, from 1
        if 0 <= first <= len(of_steps) - EPOCH_STEPS:
            trained = float(of_steps[first : first + EPOCH_STEPS].mean())
            points.append([row["step"], round(trained, 4), round(row["val_loss"], 4)])
    return points


def losses(part: Mapping[str, Any]) -> list[Row]:
    """A row for each arm: its final losses, and how they differ from the baseline's at the same seeds."""
    of_all = {arm["arm"]: arm["val_loss"] for arm in part["arms"]}
    compared: dict[str, tuple[Paired, float]] = {}
    for baseline in dict.fromkeys(arm["baseline"] for arm in part["arms"]):
        names = [arm["arm"] for arm in part["arms"] if arm["baseline"] == baseline]
        found, p_values = against({name: of_all[name] for name in names}, baseline)
        compared |= {name: (each, p_values[name]) for name, each in found.items()}
    rows: list[Row] = []
    for arm in part["arms"]:
        rate = f"{arm['rate']:g}{EDGE if arm['at_edge'] else ''}"
        row: Row = {"arm": arm["arm"], "rate": rate, "final loss": mean_and_sd(arm["val_loss"], 4)}
        if any(each["clipped"] for each in part["arms"]):
            shares = [share for share in arm["clipped"] or () if share is not None]
            row["steps clipped"] = f"{np.mean(shares):.0%}" if shares else "-"
        each, p = compared.get(arm["arm"], (None, 1.0))
        row["baseline"] = arm["baseline"] if each else "-"
        row["lower by"] = f"{-each.mean:.4f}" if each else "-"
        row["95% interval"] = f"{-each.high:.4f} to {-each.low:.4f}" if each else "-"
        row["p (Holm)"] = f"{p:.2g}" if each else "-"
        rows.append(row)
    return rows


def ends_of_epochs(points: Sequence[Sequence[float]]) -> list[Sequence[float]]:
    return [point for point in points if point[0] % EPOCH_STEPS == 0]


def other_text_at(points: Sequence[Sequence[float]], level: float) -> float | None:
    """The loss on other text where the training loss first falls to `level`; None where it never does, or begins
    below."""
    for (_, before, other_before), (_, after, other_after) in itertools.pairwise(points):
        if before > level >= after:
            return other_before + (other_after - other_before) * (before - level) / (before - after)
    return None


def gaps(part: Mapping[str, Any]) -> list[Row]:
    """A row for each training loss that all runs passed: each rule's loss on other text there, and how it differs from
    Muon's; then one for the loss on other text after the last step."""
    rows: list[Row] = []
    curves = {arm["arm"]: [ends_of_epochs(points) for points in arm["curves"]] for arm in part["arms"]}
    found = {f"{level:g}": {arm: [other_text_at(points, level) for points in of] for arm, of in curves.items()}
             for level in LEVELS}  # fmt: skip
    found["at the end"] = {arm["arm"]: arm["val_loss"] for arm in part["arms"]}
    for level, of_arms in found.items():
        if any(None in values for values in of_arms.values()):  # in a trial, all
            continue
        compared, p_values = against(of_arms, "muon")
        row: Row = {"training loss": level}
        for arm, values in of_arms.items():
            row[arm] = mean_and_sd(values, 4)
            if arm in compared:
                each = compared[arm]
                row[f"{arm}: lower than muon's by"] = f"{-each.mean:.4f} ({-each.high:.4f} to {-each.low:.4f})"
                row[f"{arm}: p (Holm)"] = f"{p_values[arm]:.2g}"
        rows.append(row)
    return rows


TABLES = {"masked": losses, "clipping": losses, "epochs": gaps}


def report(record: Mapping[str, Any]) -> str:
    tables = {name: TABLES[name](part) for name, part in record["parts"].items()}
    return "\n\n".join(
        f"{name}: {part['steps']} steps, {part['device']}\n"
        + (table(tables[name]) if tables[name] else "no run passed one of the training losses")
        for name, part in record["parts"].items()
    )


@arms.command
def main(argv: list[str]) -> None:
    options = parse_settings(Options, argv, __doc__)
    path = user_path(options.draw)
    if not options.draw:
        options = dataclasses.replace(options, out=str(user_path(options.out)))
        path = Path(f"{options.out}.json")
        check_writable(path.parent, "choose another place, such as --out=/tmp/claims")
        config = load_config([RECIPE])
        ensure(config.train_files, config.val_files, config.train_steps * config.batch_tokens)
        if "epochs" in options.parts:
            write_few(options)
        confirm(plan(options), options.yes)
        parts = {name: run_part(name, options) for name in options.parts}
        write_json(path, dict(recipe=RECIPE, parts=parts), separators=(",", ":"), allow_nan=False)
    arms.read_result(path, lambda record: print(report(record)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
