"""Do MLP neurons die under Muon, and does Aurora keep them alive? Runs with harness/neuron_stats.py.

    python -m experiments.neurons                                    (quick: three arms, minutes on two CPU cores)
    python -m experiments.neurons --preset=full --yes                (all arms and variants, tuned: hours there)
    python -m experiments.neurons --preset=full --variants base      (the same, but for what changes one thing)
    python -m experiments.neurons --recipe=configs/classics_124m_aurora.toml --preset=full --arms adamw muon aurora
    python -m experiments.neurons --draw experiments/results/neurons.json         (tables and figure again)
    python -m experiments.neurons --run runs/sotu_cpu-20261122T033309Z-9823dd     (figure of one run)

The claim: under Muon the rows of gate and up get uneven leverage (squared row norms of the polar factor), so that over
a quarter of the neurons are dead by step 500 at 340 M parameters, by a threshold that was not published.

Every arm, a rule for the hidden matrices, trains the recipe's model with a few learning rates on one seed and reports
the best on others; variants change one thing. What is run and what is measured was fixed before any reported run, in
experiments/neuron_protocol.py; quick tunes nothing. A diverged run is a result.

OUT/tuning and OUT/runs are sweeps (experiments/sweep.py): the same command goes on where it stopped. A run keeps its
last checkpoint there until its pruning has been measured, after all runs. OUT.json keeps what the tables need, OUT.png
is the figure. Exit status as the sweep's.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tqdm import tqdm

from data.files import check_writable, user_path, write_json
from data.prepare import ensure
from experiments import arms
from experiments.arms import confirm, duration, names_of
from experiments.neuron_protocol import (
    ALL_ARMS,
    ARMS,
    BASE,
    FACTOR_ARMS,
    RATES,
    SWITCHED,
    TUNING_SEED,
    VARIANTS,
    Cell,
    Group,
    Key,
    Losses,
    groups,
    key_of,
    rates_of,
    reported,
    seeds_of,
)
from experiments.neuron_report import curves_of, draw, draw_run, pooled_over_layers, report
from experiments.sweep import Result, load_sweep, rows_with, visible_gpus
from harness.checkpoint import evaluated_weights, read_checkpoint
from harness.machine import device_name, find_machine
from harness.neuron_stats import pruning
from harness.overrides import arguments, assignments
from train_gpt import load_config, set_up, validation

PRUNING_TOKENS = 32768  # of validation


@dataclass(frozen=True)
class Options:
    preset: Literal["quick", "full"] = "quick"  # what the next five are if they are not given
    arms: Annotated[tuple[str, ...], names_of(ALL_ARMS)] = ("muon", "aurora", "adamw")  # rules of the hidden matrices
    variants: Annotated[tuple[str, ...], names_of(VARIANTS)] = (BASE,)  # all but base are for muon, unormuon, aurora
    seeds: tuple[int, ...] = (0, 1, 2)  # reported ones
    steps: Annotated[int, ">= 1"] = 300  # of the schedule
    rates_tried: int = 0  # learning rates tried for each arm; 0: no tuning
    recipe: str = "configs/sotu_base.toml"  # model, data and batch
    every: Annotated[int, ">= 1"] = 25  # steps between measurements of the neurons
    set: tuple[tuple[str, ...], ...] = ()  # key=value ...: the same in every run
    out: str = ""  # folder of the runs; empty: runs/neurons_<preset>
    jobs: Annotated[int, ">= 0"] = 0  # runs at once; 0: one for each GPU, or for each CPU thread
    yes: bool = False  # do not ask before the full preset starts
    draw: str = ""  # run nothing, print and draw this JSON
    run: str = ""  # run nothing, draw the measurements of this run directory


FULL = Options("full", ALL_ARMS, tuple(VARIANTS), steps=500, rates_tried=len(RATES))


def completed(options: Options) -> Options:
    """Options with whole paths. Raises ValueError for what no run can be made of."""
    out, recipe = user_path(options.out or f"runs/neurons_{options.preset}"), user_path(options.recipe)
    options = dataclasses.replace(options, out=str(out), recipe=str(recipe))
    for key in ("arms", "variants", "seeds"):
        values = getattr(options, key)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{key} = {' '.join(map(str, values)) or 'nothing'}: name at least one, and each once")
    if BASE not in options.variants and not {*FACTOR_ARMS} & {*options.arms}:
        raise ValueError(f"variants: all but {BASE} are for {' '.join(FACTOR_ARMS)}; name {BASE}, or one of these arms")
    if options.rates_tried not in (0, *range(2, len(RATES) + 1)):
        raise ValueError(f"rates_tried = {options.rates_tried} must be 0 (no tuning) or 2 to {len(RATES)}")
    if {*SWITCHED} & {*options.arms} and "muon" not in options.arms:
        raise ValueError(f"arms: {' '.join(SWITCHED)} take the rate that wins for muon; name it as well")
    if options.rates_tried and TUNING_SEED in options.seeds:
        raise ValueError(f"seeds: {TUNING_SEED} is for tuning and not reported; take another")
    if options.steps % options.every:
        raise ValueError(f"every = {options.every} must divide steps = {options.steps}; 25 is usual")
    of_groups = groups(ALL_ARMS, VARIANTS, options.steps, 64, 1)
    own = {"matrix_lr", "seed", *itertools.chain(*(group.settings for group in of_groups))}
    own |= fixed_settings(dataclasses.replace(options, set=()), "runs").keys()
    assignments(itertools.chain(*options.set), "--set: ", own)
    return options


def fixed_settings(options: Options, name: str) -> Cell:
    """Settings of every run of the sweep "tuning" or "runs"; the only validation is at the end."""
    steps = str(options.steps)
    fixed = {"stop_at_target": "false", "train_steps": steps, "val_every": steps}
    fixed |= assignments(itertools.chain(*options.set))
    measured = {"neuron_stats": str(options.every), "checkpoint_every": steps}
    return fixed | measured if name == "runs" else fixed


def check_out(options: Options) -> None:
    """Raises ValueError if OUT has runs of other options, before any is started."""
    for name in ("tuning", "runs"):
        path = Path(options.out) / name / "sweep.json"
        if not path.exists():
            continue
        there, asked = json.loads(path.read_text(encoding="utf-8"))["fixed"], fixed_settings(options, name)
        for key in sorted(there.keys() | asked.keys()):
            if there.get(key) != asked.get(key):
                what = f"{key} = {there.get(key, 'unset')}, not {asked.get(key, 'unset')}"
                raise ValueError(f"{path.parent} has runs with {what}; take their options, or another --out")


def ended_runs(options: Options, name: str) -> dict[Key, Result]:
    """What has ended so far of the sweep of that name."""
    folder = Path(options.out) / name
    results = load_sweep(folder).results.values() if (folder / "sweep.json").exists() else ()
    return {key_of(result.overrides, result.seed): result for result in results if result.ended}


def loss_of(result: Result) -> float | None:
    """Final validation loss, four decimals; None for a diverged run."""
    return None if result.diverged else round(result.summary["val_loss"], 4)


def losses_by_rate(options: Options, tuned: Sequence[Group], known: Mapping[Key, Result]) -> dict[str, Losses]:
    """For each arm that is tuned, what is known of its final loss by rate."""
    found: dict[str, Losses] = {}
    for group in tuned:
        keys = {rate: key_of(group.cell(rate), TUNING_SEED) for rate in rates_of(group.arm, options.rates_tried)}
        found[group.arm] = {rate: loss_of(known[key]) for rate, key in keys.items() if key in known}
    return found


def plan(options: Options, of_all: list[Group], tuned: list[Group], jobs: int, on_gpu: bool) -> list[str]:
    """Lines that say what is going to run and how long it takes here; none if nothing is left to run."""
    threads = max(1, torch.get_num_threads() // jobs)
    tried = losses_by_rate(options, tuned, ended_runs(options, "tuning"))
    to_tune = [group for group in tuned for _ in range(options.rates_tried - len(tried[group.arm]))]
    runs, known = reported(of_all, tried, options.seeds), ended_runs(options, "runs")
    to_run = [run.group for run in runs if to_tune or run.key not in known]  # which rates win is not known before
    left = to_tune + to_run
    if not left:
        return []
    lines, run_s = [], dict[frozenset[tuple[str, str]], float]()
    for group in tqdm(left, desc="timing", unit="run", leave=False, disable=None):
        kind = frozenset(group.settings.items())
        if kind not in run_s:
            settings = fixed_settings(options, "tuning") | group.settings
            run_s[kind] = arms.seconds_of_a_run(options.recipe, settings, threads)
            lines.append(f"  {group.variant:13} {group.arm:18} {duration(run_s[kind]):>7} per run")
    total_s = sum(run_s[frozenset(group.settings.items())] for group in left)
    num_tuning = options.rates_tried * len(tuned)
    num_runs = num_tuning + len(runs)
    title = f"{num_runs} runs of {options.steps} steps ({num_tuning} of them to tune), {num_runs - len(left)} done"
    end = f"about {duration(total_s / jobs)} for the rest, {jobs} at a time"
    kept = f"{len(to_run)} of them keep a checkpoint in {options.out} until their pruning has been measured"
    if on_gpu:
        return [title, *lines, f"{end}, on {device_name(torch.device('cuda'))}, without torch.compile", kept]
    place = f"threads of each: {threads}, on {device_name(torch.device('cpu'))}"
    return [title, *lines, f"{end}, {place}", kept, "what it takes on a GPU is measured when it is started on one"]


def stage(options: Options, name: str, cells: Sequence[Cell], seeds: Sequence[int], jobs: int) -> None:
    """Run a sweep, or what is left of it."""
    if cells:
        arms.sweep(options.recipe, cells, seeds, Path(options.out) / name, jobs, fixed_settings(options, name))


def measured_pruning(options: Options, result: Result) -> dict[str, float | None] | None:
    """The run's `pruning` on the first PRUNING_TOKENS validation tokens; None if it diverged. It is kept in the run
    directory, and the checkpoint that it was measured on is then deleted."""
    if result.diverged:
        return None
    path = Path(result.directory) / "pruning.json"
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if kept.get("tokens") != PRUNING_TOKENS:
        checkpoint = path.with_name(f"checkpoint_{options.steps:06d}.pt")
        if not checkpoint.exists():
            raise ValueError(
                f"{checkpoint}, which pruning is measured on, is gone; delete {path.parent} to run it again"
            )
        words = arguments(fixed_settings(options, "runs") | dict(result.overrides) | {"seed": str(result.seed)})
        config = load_config([options.recipe, *words, "--compile=false", "--resume="])
        run = set_up(config, find_machine(config.device, config.dtype))
        run.model.load_state_dict(evaluated_weights(read_checkpoint(checkpoint)))
        batches, num_rows = [], max(1, PRUNING_TOKENS // config.seq_len)
        for inputs_BT, targets_BT in validation(run.config, run.machine, run.val_stream):
            batches.append((inputs_BT[:num_rows], targets_BT[:num_rows]))
            num_rows -= len(inputs_BT)
            if num_rows <= 0:
                break
        kept = dict(tokens=PRUNING_TOKENS, rises=pruning(run.model, batches))
        run.loader.close()
        write_json(path, kept)
        checkpoint.unlink()
    rises: dict[str, float | None] = kept["rises"]
    return rises


def experiment(options: Options, of_all: list[Group], tuned: list[Group], jobs: int) -> dict[str, Any]:
    """Tune, run, and keep what the tables need."""
    cells = [group.cell(rate) for group in tuned for rate in rates_of(group.arm, options.rates_tried)]
    stage(options, "tuning", cells if options.rates_tried else [], [TUNING_SEED], jobs)
    tried = losses_by_rate(options, tuned, ended_runs(options, "tuning"))
    runs = reported(of_all, tried, options.seeds)
    for seeds, same in itertools.groupby(runs, lambda run: seeds_of(run.group.arm, options.seeds)):
        stage(options, "runs", [run.cell for run in same if run.seed == seeds[0]], seeds, jobs)
    known, found = ended_runs(options, "runs"), []
    for run in tqdm(runs, desc="pruning", unit="run", leave=False, disable=None):
        result = known[run.key]
        rows = rows_with("neurons", Path(result.directory))
        with arms.cpu_threads(result.threads):
            rises = measured_pruning(options, result)
        found.append(dict(
            arm=run.group.arm, variant=run.group.variant, settings=run.group.settings, rate=run.rate,
            at_edge=run.at_edge, seed=run.seed, status=result.summary["status"], val_loss=loss_of(result),
            pruning=rises, looks=curves_of(rows), last=pooled_over_layers(rows[-1]["neurons"]) if rows else None,
        ))  # fmt: skip
    summaries = [known[run.key].summary for run in runs]
    kept_options = {key: getattr(options, key) for key in ("recipe", "arms", "variants", "seeds", "steps", "every")}
    return dict(
        **kept_options, **arms.origins(summaries), params=sorted({each["num_params"] for each in summaries}),
        tokens=max(each["tokens"] for each in summaries), fixed=fixed_settings(options, "runs"),
        tuning_seed=TUNING_SEED, runs=found,
        tuning=[dict(arm=arm, tried=list(losses.items())) for arm, losses in tried.items() if losses],
    )  # fmt: skip


@arms.command
def main(argv: list[str]) -> None:
    options = arms.parse_preset({"quick": Options(), "full": FULL}, argv, __doc__)
    if options.run:
        path = user_path(options.run) / "neurons.png"
        rows = rows_with("neurons", path.parent)
        if not rows:
            raise ValueError(f"{options.run} has no neuron statistics; train with --neuron_stats=25, for example")
        try:
            draw_run(rows, path)
        except LookupError as error:
            raise ValueError(
                f"{options.run} has neuron statistics of another version (no {error}); train again"
            ) from None
        print(f"{len(rows)} measurements -> {path}")
        return
    path = user_path(options.draw)
    if not options.draw:
        options = completed(options)
        path = Path(f"{options.out}.json")
        check_writable(path.parent, "choose another place, such as --out=/tmp/neurons")
        config = load_config([options.recipe, *arguments(assignments(itertools.chain(*options.set)))])
        ensure(config.train_files, config.val_files, options.steps * config.batch_tokens)
        size = options.steps, config.model_dim, config.num_heads
        of_all, gpus = groups(options.arms, options.variants, *size), [] if config.device == "cpu" else visible_gpus()
        tuned = groups(dict.fromkeys(group.arm for group in of_all if group.arm in ARMS), [BASE], *size)
        jobs = options.jobs or len(gpus) or torch.get_num_threads()  # two threads do less for one run than for two
        check_out(options)
        lines = plan(options, of_all, tuned, jobs, bool(gpus))
        if lines:
            confirm(lines, options.yes or options.preset == "quick")
        write_json(path, experiment(options, of_all, tuned, jobs), separators=(",", ":"), allow_nan=False)
    arms.read_result(path, lambda record: show(record, path))


def show(record: dict[str, Any], path: Path) -> None:
    draw(record, path.with_suffix(".png"))
    print(f"{report(record)}\n\n{len(record['runs'])} runs -> {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
