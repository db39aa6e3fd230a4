"""Which update rule, which polar coefficients, which of Aurora's sides? Equal tuning, then the same seeds for all.

    ./run.sh rules                                              every rule in RULES on the embedded sample
    ./run.sh rules --question polar --jobs 2 --yes              Muon with each set of coefficients
    ./run.sh rules --question sides --seeds 0 1 2 3 4           Aurora on tall, wide or all matrices
    ./run.sh rules --table experiments/results/rules_polar.json (run nothing)

Every arm gets the same search for its learning rate on seed 100, which is not reported: three rates, a factor of two
apart, then one more at a time beyond the best while that is at an end, up to seven; the lowest final validation
loss wins. Then all seeds at that rate. Differences from the first arm are of runs with the same seed, with a 95%
interval by Student's t and p after Holm's correction for the number of arms. Steps of all arms are timed first, taking
turns in this process. --tuning_steps shortens the search, for all arms alike; a rate that wins in a short run may be
too high for a long one. --rate leaves it out.

OUT/tuning and OUT/runs are sweeps: the same command goes on where it stopped. OUT/result.json keeps what the tables
need. A diverged run is a result.
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
from typing import Annotated, Any, Literal

import torch

from data.files import check_writable, user_path, write_json
from experiments import arms
from experiments.comparisons import against
from experiments.sweep import Result
from harness.machine import find_machine, versions
from harness.overrides import arguments, assignments
from harness.settings import parse_settings
from harness.tables import Row, mean_and_sd, table
from optim import RULES
from optim.polar import METHODS
from train_gpt import Run, load_config, set_up

RATES = (0.5, 1.0, 2.0)  # tried first, in units of the arm's own
MOST_TRIED = 7
TUNING_SEED = 100
UNIT = 0.02  # of the learning rate, where UNITS has no other
UNITS = {"adamw": 0.002, "soap": 0.002, "muown": 0.0025, "polar_grad": 1.0}  # near published ones, or a first guess
FROM_NOISE = {"init_out": "0.02", "init_down": "0.02"}  # for rules that keep norms
OWN_SETTINGS: dict[str, dict[str, str]] = {
    "adamh": FROM_NOISE,
    "muown": {"matrix_scale": "match_rms_adamw"},
    "muon_plus": {"matrix_scale": "aspect"},
}
ARMS: dict[str, dict[str, dict[str, str]]] = {
    "rules": {
        **{rule: {"matrix_optimizer": rule, **OWN_SETTINGS.get(rule, {})} for rule in (*RULES, "adamw")},
        "normuon long": {"matrix_optimizer": "normuon", "normuon_axis": "long"},
        "muonh": {"matrix_optimizer": "muon", "hyperball": "true", **FROM_NOISE},
        "muon floor": {"matrix_optimizer": "muon", "update_floor": "0.35"},
    },
    "polar": {method: {"matrix_optimizer": "muon", "polar_method": method} for method in METHODS},
    "sides": {sides: {"matrix_optimizer": "aurora", "aurora_sides": sides} for sides in ("both", "tall", "wide")},
}
FIXED = {"stop_at_target": "false", "target_loss": "0", "checkpoint_every": "0", "resume": ""}
TURNS = 15  # of timing a step of every arm


@dataclass(frozen=True)
class Options:
    recipe: str = "configs/sotu_base.toml"  # model, data and schedule
    question: Literal["rules", "polar", "sides"] = "rules"  # which arms there are
    arms: tuple[str, ...] = ()  # some of them; empty: all; differences are from the first one
    seeds: tuple[int, ...] = (0, 1, 2)  # reported ones
    steps: Annotated[int, ">= 0"] = 0  # of the schedule; 0: the recipe's
    rate: Annotated[float, ">= 0"] = 0.0  # learning rate of all arms, without a search; 0: search
    tuning_steps: Annotated[int, ">= 0"] = 0  # of the schedule while rates are searched; 0: as steps
    set: tuple[tuple[str, ...], ...] = ()  # key=value ...: settings of every run
    jobs: Annotated[int, ">= 1"] = 1  # runs at once
    out: str = ""  # folder of the runs and of result.json; empty: runs/rules_<question>
    table: str = ""  # run nothing, print this result.json
    yes: bool = False  # do not ask before starting


def completed(options: Options) -> Options:
    """Options with everything filled in. Raises ValueError for what no run can be made of."""
    known = ARMS[options.question]
    named = options.arms or tuple(known)
    if unknown := [arm for arm in named if arm not in known]:
        raise ValueError(f"arms: {unknown[0]!r} is unknown; choose from {', '.join(known)}")
    if not options.seeds or TUNING_SEED in options.seeds:
        raise ValueError(f"seeds: name at least one and not {TUNING_SEED}, which is for tuning; 0 1 2 is usual")
    recipe, out = str(user_path(options.recipe)), str(user_path(options.out or f"runs/rules_{options.question}"))
    own = {*FIXED, *itertools.chain(*known.values()), "matrix_lr", "seed", "train_steps", "val_every"}
    fixed = assignments(itertools.chain(*options.set), "--set: ", own)
    steps = options.steps or load_config([recipe, *arguments(fixed)]).train_steps
    tuning_steps = options.tuning_steps or steps
    return dataclasses.replace(
        options, arms=named, recipe=recipe, out=out, steps=steps, tuning_steps=tuning_steps
    )  # fmt: skip


def fixed_settings(options: Options, steps: int) -> dict[str, str]:
    """Settings of every run; one validation, at the end."""
    given = assignments(itertools.chain(*options.set))
    return {**FIXED, "train_steps": str(steps), "val_every": str(steps), **given}


def cell(options: Options, arm: str, rate: float) -> dict[str, str]:
    return {**ARMS[options.question][arm], "matrix_lr": f"{rate:g}"}


def unit(options: Options, arm: str) -> float:
    return UNITS.get(ARMS[options.question][arm]["matrix_optimizer"], UNIT)


def loss_of(result: Result) -> float | None:
    """Final validation loss; None for a diverged run."""
    return None if result.diverged else result.summary["val_loss"]


def next_rate(tried: Mapping[float, float | None]) -> float | None:
    """The rate beyond the best one, if that is at an end and there are rates left to try."""
    best = best_rate(tried)
    if len(tried) >= MOST_TRIED or not arms.at_edge(best, tried):
        return None
    return best * 2 if best == max(tried) else best / 2


def best_rate(tried: Mapping[float, float | None]) -> float:
    return arms.best({rate: math.inf if loss is None else loss for rate, loss in sorted(tried.items())})


def tune(options: Options) -> dict[str, dict[float, float | None]]:
    """{arm: {rate: loss}} on the seed for tuning."""
    tried: dict[str, dict[float, float | None]] = {arm: {} for arm in options.arms}
    wanted = [(arm, unit(options, arm) * factor) for arm in options.arms for factor in RATES]
    while wanted and not options.rate:
        cells = [cell(options, arm, rate) for arm, rate in wanted]
        fixed = fixed_settings(options, options.tuning_steps)
        results = arms.sweep(options.recipe, cells, [TUNING_SEED], Path(options.out) / "tuning", options.jobs, fixed)
        for (arm, rate), result in zip(wanted, results, strict=True):
            tried[arm][rate] = loss_of(result)
        following = {arm: next_rate(losses) for arm, losses in tried.items()}
        wanted = [(arm, rate) for arm, rate in following.items() if rate is not None]
    return tried


def measured(options: Options) -> dict[str, dict[str, float]]:
    """Of each arm: median seconds of a step, and numbers of optimizer state for each weight of the matrices."""
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for arm in options.arms:
            words = arguments(fixed_settings(options, options.steps) | cell(options, arm, unit(options, arm)))
            config = load_config([options.recipe, *words, f"--run_dir={folder}"])
            runs[arm] = set_up(config, find_machine(config.device, config.dtype))
        seconds = arms.seconds_per_step(runs, (0,), TURNS, computed=True)
        states = {arm: state_per_weight(run) for arm, run in runs.items()}
        for run in runs.values():
            run.loader.close()
    return {arm: dict(step_s=seconds[arm][0], state_per_weight=states[arm]) for arm in runs}


def state_per_weight(run: Run) -> float:
    """Numbers that the matrices' optimizer keeps after its first steps, over all ranks, for each weight."""
    optimizer = run.optimizers[0]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = (value for p in params for value in optimizer.state[p].values() if isinstance(value, torch.Tensor))
    return sum(value.numel() for value in state) / sum(p.numel() for p in params)


def experiment(options: Options) -> dict[str, Any]:
    """Time, confirm, tune, run; the content of result.json."""
    check_writable(Path(options.out), "choose another folder, such as --out=/tmp/rules")
    timing = Path(options.out) / "timing.json"
    costs = json.loads(timing.read_text(encoding="utf-8")) if timing.exists() else {}
    if not costs.keys() >= set(options.arms):  # else an earlier start's, whose runs go on
        with arms.cpu_threads(max(1, torch.get_num_threads() // options.jobs)):
            costs = measured(options)
    tuning_runs = 0 if options.rate else len(RATES)
    steps = tuning_runs * options.tuning_steps + len(options.seeds) * options.steps
    total_s = sum(costs[arm]["step_s"] for arm in options.arms) * steps / options.jobs
    num_runs = len(options.arms) * (tuning_runs + len(options.seeds))
    more = "" if options.rate else " or more, as rates at an end are followed"
    arms.confirm([f"{num_runs} runs{more}: about {arms.duration(total_s)} of training, {options.jobs} at a time"],
                 options.yes)  # fmt: skip
    Path(options.out).mkdir(parents=True, exist_ok=True)
    write_json(timing, costs, indent=1)
    tried = tune(options)
    rates = {arm: options.rate or best_rate(losses) for arm, losses in tried.items()}
    cells = [cell(options, arm, rate) for arm, rate in rates.items()]
    fixed = fixed_settings(options, options.steps)
    results = arms.sweep(options.recipe, cells, options.seeds, Path(options.out) / "runs", options.jobs, fixed)
    losses = [loss_of(run) for run in results]  # seeds outermost
    return dict(
        question=options.question, recipe=options.recipe, settings=fixed, seeds=list(options.seeds),
        tuning_seed=TUNING_SEED, tuning_steps=options.tuning_steps, steps=options.steps,
        **arms.origins(run.summary for run in results), versions=versions(),
        arms=[dict(arm=arm, sets=ARMS[options.question][arm], **costs[arm], tried=sorted(tried[arm].items()),
                   rate=rate, val_loss=losses[place :: len(cells)])
              for place, (arm, rate) in enumerate(rates.items())],
    )  # fmt: skip


def summary(result: Mapping[str, Any]) -> list[Row]:
    """A row for each arm, best first: its rate (marked where it is at an end of those tried), step time and losses, and
    how they differ from the first arm's."""
    first, *_ = result["arms"]
    differences, adjusted = against({arm["arm"]: arm["val_loss"] for arm in result["arms"]}, first["arm"])
    ranked = []
    for arm in result["arms"]:
        losses, rank, loss, difference, interval, p = arm["val_loss"], math.inf, "diverged", "", "", ""
        if None not in losses:
            rank, loss = sum(losses), mean_and_sd(losses, 4)
        if arm["arm"] in differences:
            (difference, interval), p = differences[arm["arm"]].told, f"{adjusted[arm['arm']]:.2g}"
        edge = arms.EDGE if arms.at_edge(arm["rate"], [rate for rate, _ in arm["tried"]]) else ""
        row: Row = {result["question"]: arm["arm"], "rate": f"{arm['rate']:g}{edge}"}
        row |= {"state per weight": f"{arm['state_per_weight']:.2f}", "step": f"{arm['step_s'] / first['step_s']:.2f}x"}
        row |= {"final loss": loss, f"from {first['arm']}": difference, "95% interval": interval, "p (Holm)": p}
        ranked.append((rank, row))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


@arms.command
def main(argv: list[str]) -> None:
    options = parse_settings(Options, argv, __doc__, leading="recipe")
    if options.table:
        result = arms.read_result(user_path(options.table), summary)
    else:
        options = completed(options)
        result = experiment(options)
        write_json(Path(options.out) / "result.json", result, indent=1)
        print(f"-> {options.out}/result.json", file=sys.stderr)
    print(table(summary(result)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
