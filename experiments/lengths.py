"""How long does a schedule have to be for a record? An estimate of the shortest one that is likely to pass.

    ./run.sh lengths --jobs 2                                        of configs/sotu_steps.toml as it stands
    ./run.sh lengths --ideas "muon: matrix_optimizer=muon train_steps=600" "mine: matrix_lr=0.03" --jobs 2
    ./run.sh lengths --table experiments/results/lengths.json        run nothing, print that result

Each idea, which is a name and settings on top of the recipe, is trained with schedules of its train_steps and of 0.85
times as many; then, while the loss that is wanted lies outside of what was reached, with one that a line through the
nearest two says, up to four lengths. The loss at the end is taken to be linear in log(train_steps).

A record's mean loss has to be below the target with p < 0.01 (one-sided t-test; the optimization track, whose rule is
another, is not what this is for). The loss that is wanted is lower than that asks for by one standard error of the
difference between an entry's mean and the one here: an entry of five then passes in two of three cases, if it was four
seeds here, their texts are independent, and their spread is the same at all lengths. The spread is pooled over ideas
and lengths, as few seeds say little of it. The seeds here are not the record's, which begin at 1000. Behind the table
comes the command that trains an entry of each idea.

OUT/result.json is written after every round, of the ideas that are named, and the same command goes on from finished
runs.
"""

import dataclasses
import math
import shlex
import statistics
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from scipy import stats

from data.files import check_writable, user_path, write_json
from experiments import arms
from harness.overrides import OWN, arguments
from harness.settings import parse_settings
from harness.tables import Row, mean_and_sd, table
from train_gpt import load_config

SHORTER = 0.85  # of the first length: the second one
MOST_LENGTHS = 4
NEAR = 1.03  # beyond what was tried, a line counts as measured as far as this factor
FURTHEST = 1.5  # and is followed to at most this one
SIGNIFICANCE = 0.01  # of a record, leaderboard/tracks.py
FIRST_SEED = 1000  # of a record, leaderboard/tracks.toml
SET_HERE = {*OWN, "val_every", "stop_at_target", "name", "description", "author", "track", "dry_run"} - {"train_steps"}

Losses = Mapping[int, Sequence[float]]  # final losses by length of the schedule, a loss for each seed


@dataclass(frozen=True)
class Options:
    recipe: str = "configs/sotu_steps.toml"  # model, data, batch and target
    ideas: tuple[str, ...] = ()  # what to try: a name and what it sets, "mine: matrix_lr=0.03"; empty: the recipe
    seeds: tuple[int, ...] = (100, 101, 102, 103)  # not a record's own
    jobs: Annotated[int, ">= 1"] = 1  # runs at once, which share the CPU's threads
    out: str = "runs/lengths"  # folder of the runs and of result.json
    table: str = ""  # run nothing, print this result.json
    yes: bool = False  # do not ask before starting


def wanted_loss(spread: float, tried: int, target: float, num_seeds: int) -> float:
    """The mean loss of `tried` seeds from which an entry of `num_seeds` runs is likely to pass; see the module's
    docstring. spread: standard deviation over seeds."""
    bound = stats.t.ppf(1 - SIGNIFICANCE, num_seeds - 1) / math.sqrt(num_seeds)
    return float(target - spread * (bound + math.sqrt(1 / num_seeds + 1 / tried)))


def pooled_spread(ideas: Iterable[Mapping[str, Any]]) -> float:
    """Standard deviation over seeds, of all lengths of all ideas at which no run diverged; 0 without any."""
    variances = [statistics.variance(of_length) for idea in ideas for of_length in losses_of(idea).values()]
    return math.sqrt(statistics.mean(variances)) if variances else 0.0


def steps_to(loss: float, losses: Losses) -> float:
    """The length at whose end the mean loss is `loss`: on the line in log(steps) through the nearest two lengths.

    Beyond all lengths by more than FURTHEST, or where the nearest two do not fall: infinite, or 0 if the shortest one
    has reached `loss`.
    """
    steps = sorted(losses)
    means = [statistics.mean(losses[n]) for n in steps]
    place = next((i for i in range(1, len(steps)) if means[i] <= loss), len(steps) - 1)
    if means[0] <= loss:
        place = 1
    slope = (means[place] - means[place - 1]) / math.log(steps[place] / steps[place - 1])
    if slope >= 0:
        return 0.0 if means[0] <= loss else math.inf
    log_steps = math.log(steps[place]) + (loss - means[place]) / slope
    if log_steps > math.log(steps[-1] * FURTHEST):
        return math.inf
    return math.exp(log_steps) if log_steps >= math.log(steps[0] / FURTHEST) else 0.0


def rounded(steps: float) -> int:
    """The length to try: up to a whole number, or to a multiple of 10 above 316, of 100 above 3,162."""
    unit = 10 ** max(0, round(math.log10(steps)) - 2)
    return int(unit * math.ceil(steps / unit - 1e-9))  # what floats alone have put above a unit stays there


def next_length(losses: Losses, loss: float, tried: Collection[int]) -> int | None:
    """What to try next, beside all that was tried (of `losses` those at which no run diverged); None once these
    enclose `loss`, or are as many as may be."""
    if len(losses) < 2 or len(tried) >= MOST_LENGTHS:
        return None
    least, most, needed = min(losses), max(losses), steps_to(loss, losses)
    if least / NEAR <= needed <= most * NEAR:
        return None
    steps = rounded(min(max(needed, least / FURTHEST), most * FURTHEST))
    return steps if steps not in tried else None


def search(options: Options, ideas: Mapping[str, Mapping[str, str]], first: Mapping[str, Any]) -> dict[str, Any]:
    """Train until every idea's lengths enclose its loss; the content of result.json. first: by idea, the Config of its
    first length."""
    found: dict[str, dict[int, list[float | None]]] = {name: {} for name in ideas}
    out, fixed = Path(options.out), dict(stop_at_target="false", target_loss="0", checkpoint_every="0", resume="")
    missing = {(name, steps) for name, config in first.items() for steps in first_lengths(config.train_steps)}
    result: dict[str, Any] = {}
    while missing:
        plan = sorted(missing, key=lambda each: (-each[1], each[0]))  # no core is left alone with the longest
        cells = [{**ideas[name], "train_steps": str(steps), "val_every": str(steps)} for name, steps in plan]
        runs = arms.sweep(options.recipe, cells, options.seeds, out / "runs", options.jobs, fixed)
        losses = [None if run.diverged else run.summary["val_loss"] for run in runs]  # seeds outermost
        for place, (name, steps) in enumerate(plan):
            found[name][steps] = losses[place :: len(cells)]
        result = dict(recipe=options.recipe, seeds=options.seeds, **arms.origins(run.summary for run in runs))
        result["dtype"] = runs[0].summary["dtype"]
        result["ideas"] = [
            dict(idea=name, sets=ideas[name], target=first[name].target_loss, num_seeds=first[name].num_seeds,
                 val_loss={str(steps): losses for steps, losses in sorted(found[name].items())})
            for name in ideas
        ]  # fmt: skip
        write_json(out / "result.json", result, indent=1)
        missing = set()
        for idea, wanted in zip(result["ideas"], wanted_losses(result), strict=True):
            name = idea["idea"]
            more = next_length(losses_of(idea), wanted, found[name])
            if more and (refused := _refusal(options.recipe, name, ideas[name], more)):
                print(f"{name}: {more} steps are not tried, as {refused}", file=sys.stderr)
            elif more:
                missing.add((name, more))
    return result


def first_lengths(train_steps: int) -> set[int]:
    return {train_steps, rounded(SHORTER * train_steps)}


def _refusal(recipe: str, name: str, sets: Mapping[str, str], steps: int) -> str:
    try:
        load_config([recipe, *arguments(entry(name, sets, steps))])
    except ValueError as error:
        return str(error)
    return ""


def losses_of(idea: Mapping[str, Any]) -> Losses:
    """Of the lengths at which no run diverged."""
    return {int(steps): of_length for steps, of_length in idea["val_loss"].items() if None not in of_length}


def wanted_losses(result: Mapping[str, Any]) -> list[float]:
    """Of each idea."""
    spread, tried = pooled_spread(result["ideas"]), len(result["seeds"])
    return [wanted_loss(spread, tried, idea["target"], idea["num_seeds"]) for idea in result["ideas"]]


def needed_steps(idea: Mapping[str, Any], loss: float) -> float:
    """As `steps_to`; infinite for fewer than two lengths at which no run diverged."""
    losses = losses_of(idea)
    return steps_to(loss, losses) if len(losses) > 1 else math.inf


def summary(result: Mapping[str, Any]) -> list[Row]:
    """A row for each idea, the shortest schedule first."""
    ranked = []
    for idea, wanted in zip(result["ideas"], wanted_losses(result), strict=True):
        needed = needed_steps(idea, idea["target"]), needed_steps(idea, wanted)
        ends = ", ".join(f"{steps}: {'diverged' if None in of_length else mean_and_sd(of_length, 4)}"
                         for steps, of_length in idea["val_loss"].items())  # fmt: skip
        told = ["fewer" if not steps else "more" if math.isinf(steps) else f"{math.ceil(steps):,}" for steps in needed]
        row: Row = {"idea": idea["idea"], "final loss by steps": ends, "wanted": f"{wanted:.4f}"}
        row |= zip(("steps to the target", "for a record"), told, strict=True)
        ranked.append((needed[1], row))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def entry(idea: str, sets: Mapping[str, str], steps: int) -> dict[str, str]:
    """The settings of a record's runs."""
    words = dict(name=idea.replace(" ", "_"), author="You", description=idea, stop_at_target="false")
    return {**sets, "train_steps": str(steps), **words}


def commands(result: Mapping[str, Any]) -> list[str]:
    """Lines for a shell that train an entry of each idea that has a length."""
    lines = []
    for idea, wanted in zip(result["ideas"], wanted_losses(result), strict=True):
        needed = needed_steps(idea, wanted)
        if needed and not math.isinf(needed):
            sets = entry(idea["idea"], idea["sets"], math.ceil(needed))
            seeds = f"{{{FIRST_SEED}..{FIRST_SEED + idea['num_seeds'] - 1}}}"
            words = shlex.join([result["recipe"], *arguments(sets)])
            lines.append(f"for seed in {seeds}; do ./run.sh {words} --seed=$seed; done")
    return lines


def experiment(options: Options) -> dict[str, Any]:
    """Confirm and search. Raises ValueError for what no search can be made of."""
    stem, seeds = Path(options.recipe).stem, options.seeds
    ideas = arms.ideas(options.ideas, own=SET_HERE) or {stem: {}}
    if len(seeds) < 2 or len(set(seeds)) < len(seeds) or not all(0 <= seed < FIRST_SEED for seed in seeds):
        raise ValueError(f"seeds: name two or more below {FIRST_SEED}, where a record's begin; 100 101 102 is usual")
    check_writable(Path(options.out), "choose another folder, such as --out=/tmp/lengths")
    first, distinct = {}, dict[object, str]()
    for name, sets in ideas.items():
        first[name] = config = load_config([options.recipe, *arguments(sets)])
        if config.target_loss <= 0:
            raise ValueError(f"{options.recipe} has no target_loss; a recipe of a track, such as sotu_steps, has one")
        if config.num_seeds < 2:
            raise ValueError(f"{name}: an entry has num_seeds of 2 or more; try --ideas '{name}: num_seeds=5'")
        for steps in first_lengths(config.train_steps):
            if refused := _refusal(options.recipe, name, sets, steps):
                raise ValueError(f"{name}: {refused}")
        for same in (entry(name, sets, 0)["name"], tuple(sorted({**sets, "train_steps": ""}.items()))):
            if (other := distinct.setdefault(same, name)) != name:
                raise ValueError(f"--ideas: {other!r} and {name!r} have one name or the same settings; leave out one")
    runs = [steps for config in first.values() for steps in first_lengths(config.train_steps)] * len(seeds)
    arms.confirm([f"{len(runs)} runs of {sum(runs):,} steps in all, {options.jobs} at a time; then up to two further "
                  f"lengths of each idea"], options.yes)  # fmt: skip
    return search(options, ideas, first)


def as_text(result: Mapping[str, Any]) -> str:
    return "\n".join([table(summary(result)), "", *commands(result)])


@arms.command
def main(argv: list[str]) -> None:
    options = parse_settings(Options, argv, __doc__, leading="recipe")
    if options.table:
        result = arms.read_result(user_path(options.table), as_text)
    else:
        recipe, out = (str(user_path(path)) for path in (options.recipe, options.out))
        result = experiment(dataclasses.replace(options, recipe=recipe, out=out))
        print(f"-> {out}/result.json", file=sys.stderr)
    print(as_text(result))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
