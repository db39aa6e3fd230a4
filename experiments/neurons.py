"""Do MLP neurons die under Muon, and does Aurora keep them alive? Runs with harness/neuron_stats.py.

    python -m experiments.neurons                                    (quick: three arms, minutes on two CPU cores)
    python -m experiments.neurons --preset=full --yes                (seven arms, three MLP widths, tuned: hours there)
    python -m experiments.neurons --recipe=configs/classics_124m_aurora.toml --preset=full --arms adamw muon aurora
    python -m experiments.neurons --draw experiments/results/neurons.json         (tables and figure again)
    python -m experiments.neurons --run runs/sotu_cpu-20261122T033309Z-9823dd     (figure of one run)

The claim: over 25% of the neurons dead by step 500 under Muon at 340 M parameters, by a threshold that was not
published. Protocol, with its thresholds, fixed before any reported run: every arm, a rule for the hidden matrices,
trains the recipe's model to the end of the schedule, all else alike, with MLPs of each expansion (hidden over width).
Tuning is equal: for each arm and expansion the same number of learning rates on seed 100, which is not reported; the
lowest final validation loss wins, and a winner at an end of the rates tried is marked. Then seeds 0, 1 and 2 with that
rate. Dead is a neuron whose mean activation is below 0.1 of its layer's median; all thresholds and both measures are
printed. quick takes rates that won over 200 steps (results/neurons.json) and tunes nothing. A diverged run is a result.

OUT/tuning and OUT/runs are sweeps (experiments/sweep.py): the same command goes on where it stopped. OUT.json keeps
what the tables need, OUT.png is the figure. Exit status as the sweep's.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tqdm import tqdm

from data.files import check_writable, user_path, write_json
from data.prepare import ensure
from experiments import arms
from experiments.arms import confirm, duration, names_of
from experiments.neuron_report import curves_of, draw, draw_run, report
from experiments.sweep import Result, load_sweep, rows_with, visible_gpus
from harness.machine import device_name, find_machine
from harness.overrides import arguments, assignments
from model import multiple_of_64
from train_gpt import load_config, set_up

ARMS = {
    **{rule: {"matrix_optimizer": rule} for rule in ("adamw", "muon", "unormuon", "normuon")},
    "aurora": {"matrix_optimizer": "aurora", "aurora_variant": "release"},
    "aurora_warm": {"matrix_optimizer": "aurora", "aurora_variant": "warm"},
    "riemannian_aurora": {"matrix_optimizer": "riemannian_aurora"},
}
RATES = (0.02, 0.04, 0.01, 0.005)  # for all but adamw, whose are a tenth; --rates_tried takes the first so many
DEFAULT_RATE = 0.02  # without tuning: what won for all arms tried at 8/3 over 200 steps (results/neurons.json)
TUNING_SEED = 100
START_S = 5.0  # of a run, before its first step
FIXED = {"stop_at_target": "false", "train_steps": "", "val_every": ""}  # the last two are --steps
Cell = dict[str, str]


@dataclass(frozen=True)
class Options:
    preset: Literal["quick", "full"] = "quick"  # what the next five are if they are not given
    arms: Annotated[tuple[str, ...], names_of(ARMS)] = ("muon", "aurora", "adamw")  # of the hidden matrices
    expansions: tuple[str, ...] = ("8/3",)  # hidden width of the MLP over model width
    seeds: tuple[int, ...] = (0, 1, 2)  # reported ones
    steps: Annotated[int, ">= 1"] = 300  # of the schedule
    rates_tried: int = 0  # learning rates tried for each arm and expansion; 0: no tuning
    recipe: str = "configs/sotu_base.toml"  # model, data and batch
    every: Annotated[int, ">= 1"] = 25  # steps between measurements of the neurons
    set: tuple[tuple[str, ...], ...] = ()  # key=value ...: the same in every run
    out: str = ""  # folder of the runs; empty: runs/neurons_<preset>
    jobs: Annotated[int, ">= 0"] = 0  # runs at once; 0: one for each GPU, or for each CPU thread
    yes: bool = False  # do not ask before the full preset starts
    draw: str = ""  # run nothing, print and draw this JSON
    run: str = ""  # run nothing, draw the measurements of this run directory


FULL = Options("full", tuple(ARMS), ("8/3", "4", "8"), steps=600, rates_tried=len(RATES))


@dataclass(frozen=True, eq=False)
class Group:
    """An arm with an expansion: what is tuned and compared."""

    arm: str
    expansion: str
    settings: Cell  # without the learning rate
    rates: tuple[float, ...]  # tried on the seed for tuning; the rate itself without tuning

    def cell(self, rate: float) -> Cell:
        return {**self.settings, "matrix_lr": f"{rate:g}"}


def completed(options: Options) -> Options:
    """Options with whole paths. Raises ValueError for what no run can be made of."""
    out, recipe = user_path(options.out or f"runs/neurons_{options.preset}"), user_path(options.recipe)
    options = dataclasses.replace(options, out=str(out), recipe=str(recipe))
    for key in ("arms", "expansions", "seeds"):
        values = getattr(options, key)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{key} = {' '.join(map(str, values)) or 'nothing'}: name at least one, and each once")
    if options.rates_tried not in (0, *range(2, len(RATES) + 1)):
        raise ValueError(f"rates_tried = {options.rates_tried} must be 0 (no tuning) or 2 to {len(RATES)}")
    if options.rates_tried and TUNING_SEED in options.seeds:
        raise ValueError(f"seeds: {TUNING_SEED} is for tuning and not reported; take another")
    if options.steps % options.every:
        raise ValueError(f"every = {options.every} must divide steps = {options.steps}; 25 is usual")
    own = {*FIXED, *itertools.chain(*ARMS.values()), "matrix_lr", "mlp_hidden", "seed", "neuron_stats"}
    assignments(itertools.chain(*options.set), "--set: ", own)
    return options


def groups(options: Options, model_dim: int) -> list[Group]:
    found, expansion_of = [], dict[int, str]()
    for expansion, arm in itertools.product(options.expansions, options.arms):
        try:
            hidden = multiple_of_64(float(Fraction(expansion) * model_dim))
        except (ValueError, ZeroDivisionError):
            hidden = 0
        if hidden <= 0:
            raise ValueError(f"expansions: {expansion!r} is no positive number; try 8/3 4 8")
        if expansion_of.setdefault(hidden, expansion) != expansion:
            both = f"{expansion_of[hidden]} and {expansion} are both mlp_hidden = {hidden}"
            raise ValueError(f"expansions: {both}; drop one")
        settings = {**ARMS[arm], "mlp_hidden": str(hidden)}
        found.append(Group(arm, expansion, settings, rates_of(arm, options.rates_tried)))
    return found


def rates_of(arm: str, count: int) -> tuple[float, ...]:
    """The first `count` rates, ascending; the default alone for 0."""
    tried = sorted(RATES[:count]) or [DEFAULT_RATE]
    return tuple(rate / 10 if arm == "adamw" else rate for rate in tried)


def seconds_of_a_run(options: Options, group: Group, threads: int) -> float:
    """Expected seconds of a run: start, training and two validations, from a few steps here without torch.compile."""
    fixed = arguments(fixed_settings(options) | group.cell(group.rates[0]))
    config = load_config([options.recipe, *fixed, "--compile=false", "--checkpoint_every=0", "--resume="])
    with arms.cpu_threads(threads):
        run = set_up(config, find_machine(config.device, config.dtype))
        (step_s,) = arms.seconds_per_step({"": run})[""]
    run.loader.close()
    torch.cuda.empty_cache()  # the runs need it
    steps_of_validation = 2 * config.val_tokens / config.batch_tokens / 3  # a forward pass is a third of a step
    return START_S + step_s * (config.train_steps + steps_of_validation)


def plan(options: Options, of_all: list[Group], jobs: int, on_gpu: bool) -> list[str]:
    """Lines that say what is going to run and how long it takes here; none if nothing is left to run."""
    threads = max(1, torch.get_num_threads() // jobs)
    num_done, settings, seeds = 0, [group.settings for group in of_all], (TUNING_SEED, *options.seeds)
    for sweep in Path(options.out).glob("*/sweep.json"):
        for result in load_sweep(sweep.parent).results.values():
            cell = {key: value for key, value in result.overrides.items() if key != "matrix_lr"}
            num_done += result.ended and result.seed in seeds and cell in settings
    num_tuning = options.rates_tried * len(of_all)
    num_runs = num_tuning + len(options.seeds) * len(of_all)
    if num_done >= num_runs:
        return []
    total_s, lines = 0.0, []
    for group in tqdm(of_all, desc="timing", unit="arm", leave=False, disable=None):
        run_s = seconds_of_a_run(options, group, threads)
        total_s += run_s * (options.rates_tried + len(options.seeds))
        lines.append(f"  {group.arm:17} MLP {group.expansion:4} {duration(run_s):>7} per run")
    left = 1 - num_done / num_runs
    title = f"{num_runs} runs of {options.steps} steps ({num_tuning} of them to tune), {num_done} done"
    end = f"about {duration(left * total_s / jobs)} for the rest, {jobs} at a time"
    if on_gpu:
        return [title, *lines, f"{end}, on {device_name(torch.device('cuda'))}, without torch.compile"]
    place = f"threads of each: {threads}, on {device_name(torch.device('cpu'))}"
    return [title, *lines, f"{end}, {place}", "what it takes on a GPU is measured when it is started on one"]


def fixed_settings(options: Options) -> Cell:
    """Settings of every run; one validation, at the end, as nothing stops at a target."""
    steps = str(options.steps)
    return {**FIXED, "train_steps": steps, "val_every": steps, **assignments(itertools.chain(*options.set))}


def stage(options: Options, name: str, cells: Sequence[Cell], seeds: Sequence[int], jobs: int) -> list[Result]:
    """The results of a sweep."""
    fixed = fixed_settings(options) | ({"neuron_stats": str(options.every)} if name == "runs" else {})
    return arms.sweep(options.recipe, cells, seeds, Path(options.out) / name, jobs, fixed)


def loss_of(result: Result) -> float | None:
    """Final validation loss, four decimals; None for a diverged run."""
    return None if result.diverged else round(result.summary["val_loss"], 4)


def best_rate(tried: dict[float, float | None]) -> tuple[float, bool]:
    """The rate of the lowest loss, the lowest rate if all diverged; whether it is at an end of those tried."""
    rate = arms.best({rate: math.inf if loss is None else loss for rate, loss in sorted(tried.items())})
    return rate, arms.at_edge(rate, tried)


def experiment(options: Options, of_all: list[Group], jobs: int) -> dict[str, Any]:
    """Tune, run, and keep what the tables need."""
    tuning, runs = [], []
    chosen = {group: (group.rates[0], False) for group in of_all}
    if options.rates_tried:
        cells = [group.cell(rate) for group in of_all for rate in group.rates]
        results = iter(stage(options, "tuning", cells, [TUNING_SEED], jobs))
        for group in of_all:
            tried = {rate: loss_of(next(results)) for rate in group.rates}
            chosen[group] = best_rate(tried)
            tuning.append(dict(arm=group.arm, expansion=group.expansion, tried=list(tried.items())))
    cells = [group.cell(rate) for group, (rate, _) in chosen.items()]
    results_of_runs = stage(options, "runs", cells, options.seeds, jobs)
    for (_, group), result in zip(itertools.product(options.seeds, of_all), results_of_runs, strict=True):
        looks, last = curves_of(rows_with("neurons", Path(result.directory)))
        (rate, at_edge), hidden = chosen[group], int(group.settings["mlp_hidden"])
        runs.append(dict(
            arm=group.arm, expansion=group.expansion, mlp_hidden=hidden, rate=rate, at_edge=at_edge, seed=result.seed,
            status=result.summary["status"], val_loss=loss_of(result), looks=looks, last=last,
        ))  # fmt: skip
    kept_options = {key: getattr(options, key) for key in ("recipe", "arms", "expansions", "seeds", "steps", "every")}
    return dict(
        **kept_options, **arms.origins(run.summary for run in results_of_runs),
        fixed=fixed_settings(options), tuning_seed=TUNING_SEED, tuning=tuning, runs=runs,
    )  # fmt: skip


@arms.command
def main(argv: list[str]) -> None:
    options = arms.parse_preset({"quick": Options(), "full": FULL}, argv, __doc__)
    if options.run:
        path = user_path(options.run) / "neurons.png"
        rows = rows_with("neurons", path.parent)
        if not rows:
            raise ValueError(f"{options.run} has no neuron statistics; train with --neuron_stats=25, for example")
        draw_run(rows, path)
        print(f"{len(rows)} measurements -> {path}")
        return
    path = user_path(options.draw)
    if not options.draw:
        options = completed(options)
        path = Path(f"{options.out}.json")
        check_writable(path.parent, "choose another place, such as --out=/tmp/neurons")
        config = load_config([options.recipe, *arguments(assignments(itertools.chain(*options.set)))])
        ensure(config.train_files, config.val_files, options.steps * config.batch_tokens)
        of_all, gpus = groups(options, config.model_dim), [] if config.device == "cpu" else visible_gpus()
        jobs = options.jobs or len(gpus) or torch.get_num_threads()  # two threads do less for one run than for two
        lines = plan(options, of_all, jobs, bool(gpus))
        if lines:
            confirm(lines, options.yes or options.preset == "quick")
        write_json(path, experiment(options, of_all, jobs), separators=(",", ":"), allow_nan=False)
    record = arms.read_result(path, report)
    draw(record, path.with_suffix(".png"))
    print(f"{report(record)}\n\n{len(record['runs'])} runs -> {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
