"""How long does a schedule have to be for a record? The shortest one that recipes are likely to pass with.

    ./run.sh lengths --jobs 2                                        of configs/sotu_steps.toml as it stands
    ./run.sh lengths --ideas "muon: matrix_optimizer=muon train_steps=600" "mine: matrix_lr=0.03" --jobs 2
    ./run.sh lengths --table experiments/results/lengths.json        run nothing, print that result

Each idea, which is a name and settings on top of the recipe, is trained with schedules of its train_steps and of 0.85
times as many; then, while the loss that is wanted lies outside of what was reached, with those that a line through the
nearest two says, up to four lengths. The loss at the end is taken to be linear in log(train_steps).

A record's mean loss has to be below the target with p < 0.01 (one-sided t-test). The loss that is wanted is lower than
that asks for by one standard error of the difference between an entry's mean and the one here, with the spread of the
seeds here, pooled over lengths: an entry of five then passes in two of three attempts. The seeds here are not the
record's, which begin at 1000. Behind the table comes the command that trains an entry of each idea.

OUT/result.json is written after every round, and the same command goes on from finished runs.
"""

import dataclasses
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from scipy import stats

from data.files import check_writable, user_path, write_json
from experiments import arms
from harness.overrides import OWN, arguments
from harness.settings import parse_settings
from harness.tables import Row, mean_and_sd, table
from train_gpt import Config, load_config

SHORTER = 0.85  # of the first length: the second one
MOST_LENGTHS = 4
FURTHEST = 1.5  # a line is followed to at most this factor beyond what was tried
SIGNIFICANCE = 0.01  # of a record, leaderboard/tracks.py
FIRST_SEED = 1000  # of a record, leaderboard/tracks.toml
SET_HERE = tuple(key for key in OWN if key != "train_steps")

Losses = Mapping[int, Sequence[float]]  # final losses by length of the schedule, a loss for each seed


@dataclass(frozen=True)
class Options:
    recipe: str = "configs/sotu_steps.toml"  # model, data, batch and target
    ideas: tuple[str, ...] = ()  # what to try: a name and what it sets, "mine: matrix_lr=0.03"; empty: the recipe
    seeds: tuple[int, ...] = (100, 101, 102, 103)  # not a record's own
    jobs: Annotated[int, ">= 1"] = 1  # runs at once, of one thread each on two cores
    out: str = "runs/lengths"  # folder of the runs and of result.json
    table: str = ""  # run nothing, print this result.json
    yes: bool = False  # do not ask before starting


def wanted_loss(losses: Losses, target: float, num_seeds: int) -> float:
    """The mean loss from which an entry of `num_seeds` runs is likely to pass; see the module's docstring."""
    spread = math.sqrt(np.mean([np.var(of_length, ddof=1) for of_length in losses.values()]))
    tried = len(next(iter(losses.values())))
    bound = stats.t.ppf(1 - SIGNIFICANCE, num_seeds - 1) / math.sqrt(num_seeds)
    return float(target - spread * (bound + math.sqrt(1 / num_seeds + 1 / tried)))


def steps_to(loss: float, losses: Losses) -> float:
    """The length at whose end the mean loss is `loss`: on the line in log(steps) through the nearest two lengths that
    were tried, or from them on; infinite where longer schedules do not end lower."""
    steps = sorted(losses)
    means = [float(np.mean(losses[n])) for n in steps]
    place = next((i for i in range(1, len(steps)) if means[i] <= loss), len(steps) - 1)
    slope = (means[place] - means[place - 1]) / math.log(steps[place] / steps[place - 1])
    return math.inf if slope >= 0 else steps[place] * math.exp((loss - means[place]) / slope)


def rounded(steps: float) -> int:
    """Up to a whole number, to a multiple of 10 from 316 on, of 100 from 3,162 on; what lies above one by rounding of
    floats alone stays."""
    unit = 10 ** max(0, round(math.log10(steps)) - 2)
    return unit * math.ceil(steps / unit - 1e-9)


def next_length(losses: Losses, loss: float) -> int | None:
    """What to try next; None once the lengths that were tried enclose `loss`, or are as many as may be."""
    if not losses or len(losses) >= MOST_LENGTHS or min(losses) <= steps_to(loss, losses) <= max(losses):
        return None
    needed = min(max(steps_to(loss, losses), min(losses) / FURTHEST), max(losses) * FURTHEST)
    return rounded(needed) if rounded(needed) not in losses else None


def search(options: Options, configs: Mapping[str, Config], ideas: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Train until every idea's lengths enclose its loss; the content of result.json."""
    found: dict[str, dict[int, list[float | None]]] = {name: {} for name in ideas}
    out, fixed = Path(options.out), dict(stop_at_target="false", target_loss="0", checkpoint_every="0", resume="")
    missing = [
        (name, rounded(share * config.train_steps)) for name, config in configs.items() for share in (1, SHORTER)
    ]
    result: dict[str, Any] = {}
    while missing:
        missing.sort(key=lambda each: -each[1])  # the longest first, so that no core is left alone with it
        cells = [{**ideas[name], "train_steps": str(steps), "val_every": str(steps)} for name, steps in missing]
        runs = arms.sweep(options.recipe, cells, options.seeds, out / "runs", options.jobs, fixed)
        losses = [None if run.diverged else run.summary["val_loss"] for run in runs]  # seeds outermost
        for place, (name, steps) in enumerate(missing):
            found[name][steps] = losses[place :: len(cells)]
        result = dict(recipe=options.recipe, seeds=options.seeds, **arms.origins(run.summary for run in runs))
        result["ideas"] = [
            dict(idea=name, sets=ideas[name], target=configs[name].target_loss, num_seeds=configs[name].num_seeds,
                 val_loss={str(steps): losses for steps, losses in sorted(found[name].items())})
            for name in ideas
        ]  # fmt: skip
        write_json(out / "result.json", result, indent=1)
        missing = [(idea["idea"], more) for idea in result["ideas"] if (more := next_length(*_read(idea)))]
    return result


def _read(idea: Mapping[str, Any]) -> tuple[Losses, float]:
    """Losses of an idea's lengths at which no run diverged, and the loss that is wanted (the target without any)."""
    losses = {int(steps): of_length for steps, of_length in idea["val_loss"].items() if None not in of_length}
    if len(losses) < 2:
        return {}, idea["target"]
    return losses, wanted_loss(losses, idea["target"], idea["num_seeds"])


def summary(result: Mapping[str, Any]) -> list[Row]:
    """A row for each idea, the shortest schedule first."""
    ranked = []
    for idea in result["ideas"]:
        losses, wanted = _read(idea)
        ends = ", ".join(f"{steps}: {'diverged' if None in of_length else mean_and_sd(of_length, 4)}"
                         for steps, of_length in idea["val_loss"].items())  # fmt: skip
        at_target, needed = (steps_to(loss, losses) if losses else math.inf for loss in (idea["target"], wanted))
        told = {key: "-" if math.isinf(steps) else f"{steps:,.0f}"
                for key, steps in (("steps to the target", at_target), ("for a record", needed))}  # fmt: skip
        row: Row = {"idea": idea["idea"], "final loss by steps": ends, "wanted": f"{wanted:.4f}", **told}
        ranked.append((needed, row))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def commands(result: Mapping[str, Any]) -> list[str]:
    """Lines for a shell that train an entry of each idea."""
    lines = []
    for idea in result["ideas"]:
        losses, wanted = _read(idea)
        if losses and not math.isinf(needed := steps_to(wanted, losses)):
            sets = {**idea["sets"], "train_steps": str(rounded(needed)), "name": idea["idea"].replace(" ", "_")}
            words = shlex.join([result["recipe"], *arguments(sets)])
            seeds = f"{{{FIRST_SEED}..{FIRST_SEED + idea['num_seeds'] - 1}}}"
            lines.append(f"for seed in {seeds}; do ./run.sh {words} --seed=$seed; done")
    return lines


def experiment(options: Options) -> dict[str, Any]:
    """Confirm and search. Raises ValueError for what no search can be made of."""
    ideas = arms.ideas(options.ideas, own=SET_HERE) or {Path(options.recipe).stem: {}}
    if len(options.seeds) < 2 or max(options.seeds) >= FIRST_SEED:
        raise ValueError(f"seeds: name two or more below {FIRST_SEED}, where a record's begin; 100 101 102 is usual")
    check_writable(Path(options.out), "choose another folder, such as --out=/tmp/lengths")
    configs = {name: load_config([options.recipe, *arguments(sets)]) for name, sets in ideas.items()}
    for name, config in configs.items():
        if config.num_seeds < 2 or config.target_loss <= 0:
            raise ValueError(f"{name}: an entry has a target_loss and num_seeds of 2 or more; add num_seeds=5")
    steps = sum((1 + SHORTER) * config.train_steps for config in configs.values())
    arms.confirm([f"{2 * len(ideas) * len(options.seeds)} runs of {steps * len(options.seeds):,.0f} steps in all, "
                  f"{options.jobs} at a time, and up to as many again"], options.yes)  # fmt: skip
    return search(options, configs, ideas)


@arms.command
def main(argv: list[str]) -> None:
    options = parse_settings(Options, argv, __doc__, leading="recipe")
    if options.table:
        result = arms.read_result(user_path(options.table), summary)
    else:
        recipe, out = (str(user_path(path)) for path in (options.recipe, options.out))
        result = experiment(dataclasses.replace(options, recipe=recipe, out=out))
        print(f"-> {out}/result.json", file=sys.stderr)
    print(table(summary(result)))
    print("\n".join(["", *commands(result)]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
