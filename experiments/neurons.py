"""Do MLP neurons die under Muon, and does Aurora keep them alive? Runs with harness/neuron_stats.py.

    python -m experiments.neurons                                    (quick: three arms, minutes on two CPU cores)
    python -m experiments.neurons --preset=full --yes                (all arms and variants, tuned: hours there)
    python -m experiments.neurons --preset=full --variants base      (the same, but for what changes one thing)
    python -m experiments.neurons --recipe=configs/classics_124m_aurora.toml --preset=full --arms adamw muon aurora
    python -m experiments.neurons --draw experiments/results/neurons.json         (tables and figure again)
    python -m experiments.neurons --run runs/sotu_cpu-20261122T033309Z-9823dd     (figure of one run)

The claim: under Muon the rows of gate and up get uneven leverage (squared row norms of the polar factor), so that over
a quarter of the neurons are dead by step 500 at 340 M parameters, by a threshold that was not published.

The protocol, written before any reported run. Every arm, a rule for the hidden matrices, trains the recipe's model to
the end of a schedule of 500 steps, all else alike: that is the variant `base` (MLPs 8/3 as wide as the model, outputs
starting at zero, no weight decay). Tuning is equal: each arm takes the same four learning rates on seed 100, which is
not reported; the lowest final validation loss wins, and a winner at an end of those tried is marked (SWITCHED take
Muon's). Then seeds 0, 1 and 2 with that rate (FEWER_SEEDS: what is slow takes the first). The other variants change one
thing for FACTOR_ARMS, at the rates that won in `base`. Losses are over all of the recipe's validation tokens; they are
compared with Muon's, paired by seed, Holm-adjusted over the arms of a variant.

What is measured, all of it fixed beforehand: idle are rows of gate and up whose leverage is below a quarter of the
mean, in the rule's own update and in the plain polar factor of its momentum; how many neurons contribute (mean
activation times norm of the column of down, participation ratio); by how much the final loss over the first 32,768
validation tokens rises without the tenth to half of each layer's neurons that contribute least; dead is a mean
activation below 0.1 of the layer's median. quick tunes nothing. A diverged run is a result.

OUT/tuning and OUT/runs are sweeps (experiments/sweep.py): the same command goes on where it stopped. A run keeps its
last checkpoint there, for the pruning. OUT.json keeps what the tables need, OUT.png is the figure. Exit status as the
sweep's.
"""

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tqdm import tqdm

from data.files import check_writable, user_path, write_json
from data.prepare import ensure
from experiments import arms
from experiments.arms import confirm, duration, names_of
from experiments.neuron_report import curves_of, draw, draw_run, pooled_over_layers, report
from experiments.sweep import Result, load_sweep, rows_with, visible_gpus
from harness.checkpoint import evaluated_weights, read_checkpoint
from harness.machine import device_name, find_machine
from harness.neuron_stats import PRUNED, contributions, loss_without, magnitudes
from harness.overrides import arguments, assignments
from model import multiple_of_64
from train_gpt import load_config, set_up, validation

ARMS = {
    "muon": {"matrix_optimizer": "muon"},  # what all others are compared with
    "aurora": {"matrix_optimizer": "aurora"},
    "adamw": {"matrix_optimizer": "adamw"},
    "normuon": {"matrix_optimizer": "normuon"},
    "unormuon": {"matrix_optimizer": "unormuon"},
    "muon_eq": {"matrix_optimizer": "muon_eq"},
    "aurora_tall": {"matrix_optimizer": "aurora", "aurora_sides": "tall"},
    "aurora_warm": {"matrix_optimizer": "aurora", "aurora_variant": "warm"},
    "riemannian_aurora": {"matrix_optimizer": "riemannian_aurora"},
}
# Muon for a share of the schedule and Aurora for the rest, or the reverse, to see whether and when leverage matters; by
# name, the first one and its share. They take Muon's rate.
SWITCHED = {
    "muon_first_fifth": ("muon", Fraction(1, 5)),
    "muon_first_half": ("muon", Fraction(1, 2)),
    "aurora_first_fifth": ("aurora", Fraction(1, 5)),
    "aurora_first_half": ("aurora", Fraction(1, 2)),
}
RATES = (0.02, 0.04, 0.01, 0.005)  # for all but adamw, whose are a tenth; --rates_tried takes the first so many
DEFAULT_RATE = 0.02  # without tuning
TUNING_SEED = 100
FACTOR_ARMS = ("muon", "unormuon", "aurora")  # that the variants are about
FEWER_SEEDS = {"riemannian_aurora": 1}
PRUNING_TOKENS = 32768  # of validation, about
START_S = 5.0  # of a run, before its first step
FIXED = {"stop_at_target": "false", "train_steps": "", "val_every": ""}  # the last two are --steps
Cell = dict[str, str]


@dataclass(frozen=True)
class Variant:
    """What differs from the recipe's model and `base`."""

    expansion: Fraction = Fraction(8, 3)  # hidden width of the MLP over model width
    width: int = 1  # times the recipe's model width and heads
    rate: float | None = None  # of every arm; none: the one that won in `base`
    settings: Mapping[str, str] = field(default_factory=dict)


BASE = "base"
VARIANTS = {
    BASE: Variant(),
    "mlp_4": Variant(Fraction(4)),
    "mlp_8": Variant(Fraction(8)),
    "normal_start": Variant(settings={"init_out": "0.02", "init_down": "0.02", "init_head": "0.02"}),
    "decay_0.025": Variant(settings={"matrix_weight_decay": "0.025"}),
    "width_doubled": Variant(width=2),
    "rate_0.05": Variant(rate=0.05),
}


@dataclass(frozen=True)
class Options:
    preset: Literal["quick", "full"] = "quick"  # what the next five are if they are not given
    arms: Annotated[tuple[str, ...], names_of((*ARMS, *SWITCHED))] = (
        "muon",
        "aurora",
        "adamw",
    )  # of the hidden matrices
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


FULL = Options("full", (*ARMS, *SWITCHED), tuple(VARIANTS), steps=500, rates_tried=len(RATES))


@dataclass(frozen=True, eq=False)
class Group:
    """An arm in a variant: runs of several seeds."""

    arm: str
    variant: str
    settings: Cell  # without the learning rate

    def cell(self, rate: float) -> Cell:
        return {**self.settings, "matrix_lr": f"{rate:g}"}


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
    settings = [
        *FIXED,
        "switching_first",
        "switching_after",
        *itertools.chain(*ARMS.values()),
        *itertools.chain(*(v.settings for v in VARIANTS.values())),
    ]
    own = {*settings, "matrix_lr", "mlp_hidden", "model_dim", "num_heads", "seed", "neuron_stats", "checkpoint_every"}
    assignments(itertools.chain(*options.set), "--set: ", own)
    return options


def settings_of(arm: str, variant: str, steps: int, model_dim: int, num_heads: int) -> Cell:
    """What the runs of an arm in a variant set, for so many steps and a recipe of this width; without the learning
    rate."""
    of_variant = VARIANTS[variant]
    width = of_variant.width * model_dim
    wider = {"model_dim": str(width), "num_heads": str(of_variant.width * num_heads)} if of_variant.width > 1 else {}
    hidden = multiple_of_64(float(of_variant.expansion * width))
    if arm in SWITCHED:
        first, share = SWITCHED[arm]
        rule = {"matrix_optimizer": "experiments.switching:Switching", "switching_first": first}
        of_arm = {**rule, "switching_after": str(round(share * steps))}
    else:
        of_arm = ARMS[arm]
    return {**of_arm, **of_variant.settings, **wider, "mlp_hidden": str(hidden)}


def groups(options: Options, model_dim: int, num_heads: int) -> list[Group]:
    """What is reported, variant by variant."""
    return [
        Group(arm, variant, settings_of(arm, variant, options.steps, model_dim, num_heads))
        for variant in options.variants
        for arm in options.arms
        if variant == BASE or arm in FACTOR_ARMS
    ]


def rates_of(arm: str, count: int) -> tuple[float, ...]:
    """The first `count` rates, ascending; the default alone for 0."""
    tried = sorted(RATES[:count]) or [DEFAULT_RATE]
    return tuple(rate / 10 if arm == "adamw" else rate for rate in tried)


def seeds_of(arm: str, options: Options) -> tuple[int, ...]:
    return options.seeds[: FEWER_SEEDS.get(arm)]


def seconds_of_a_run(options: Options, group: Group, threads: int) -> float:
    """Expected seconds of a run: start, training and two validations, from a few steps here without torch.compile."""
    fixed = arguments(fixed_settings(options) | group.cell(DEFAULT_RATE))
    config = load_config([options.recipe, *fixed, "--compile=false", "--checkpoint_every=0", "--resume="])
    with arms.cpu_threads(threads):
        run = set_up(config, find_machine(config.device, config.dtype))
        (step_s,) = arms.seconds_per_step({"": run})[""]
    run.loader.close()
    torch.cuda.empty_cache()  # the runs need it
    steps_of_validation = 2 * config.val_tokens / config.batch_tokens / 3  # a forward pass is a third of a step
    return START_S + step_s * (config.train_steps + steps_of_validation)


def plan(options: Options, of_all: list[Group], tuned: list[Group], jobs: int, on_gpu: bool) -> list[str]:
    """Lines that say what is going to run and how long it takes here; none if nothing is left to run."""
    threads = max(1, torch.get_num_threads() // jobs)
    num_done, settings = 0, [group.settings for group in of_all + tuned]
    for sweep in Path(options.out).glob("*/sweep.json"):
        for result in load_sweep(sweep.parent).results.values():
            cell = {key: value for key, value in result.overrides.items() if key != "matrix_lr"}
            num_done += result.ended and result.seed in (TUNING_SEED, *options.seeds) and cell in settings
    num_tuning = options.rates_tried * len(tuned)
    num_runs = num_tuning + sum(len(seeds_of(group.arm, options)) for group in of_all)
    if num_done >= num_runs:
        return []
    total_s, lines = 0.0, []
    for group in tqdm(of_all, desc="timing", unit="arm", leave=False, disable=None):
        run_s = seconds_of_a_run(options, group, threads)
        num_tried = options.rates_tried if group.variant == BASE and group.arm in ARMS else 0
        total_s += run_s * (len(seeds_of(group.arm, options)) + num_tried)
        lines.append(f"  {group.variant:13} {group.arm:18} {duration(run_s):>7} per run")
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
    fixed, is_reported = fixed_settings(options), name == "runs"
    if is_reported:
        fixed |= {"neuron_stats": str(options.every), "checkpoint_every": str(options.steps)}
    return arms.sweep(options.recipe, cells, seeds, Path(options.out) / name, jobs, fixed)


def loss_of(result: Result) -> float | None:
    """Final validation loss, four decimals; None for a diverged run."""
    return None if result.diverged else round(result.summary["val_loss"], 4)


def best_rate(tried: dict[float, float | None]) -> tuple[float, bool]:
    """The rate of the lowest loss, the lowest rate if all diverged; whether it is at an end of those tried."""
    rate = arms.best({rate: math.inf if loss is None else loss for rate, loss in sorted(tried.items())})
    return rate, arms.at_edge(rate, tried)


def pruning(options: Options, result: Result) -> dict[str, float] | None:
    """By how much the final loss over the first validation tokens rises without a share of each layer's neurons, those
    that contribute least over these tokens; None for a diverged run. Kept in the run directory once it is known."""
    if result.diverged:
        return None
    directory = Path(result.directory)
    path = directory / "pruning.json"
    if not path.exists():
        checkpoint = directory / f"checkpoint_{options.steps:06d}.pt"
        words = arguments(fixed_settings(options) | dict(result.overrides) | {"seed": str(result.seed)})
        config = load_config([options.recipe, *words, "--compile=false", "--resume="])
        run = set_up(config, find_machine(config.device, config.dtype))
        run.model.load_state_dict(evaluated_weights(read_checkpoint(checkpoint)))
        num_batches = max(1, PRUNING_TOKENS // config.micro_batch_tokens)
        batches = list(itertools.islice(validation(config, run.machine, run.val_stream), num_batches))
        weights = torch.tensor([len(inputs) for inputs, _ in batches], dtype=torch.float64)
        sizes = [
            torch.stack(of_layer) for of_layer in zip(*(magnitudes(run.model, x) for x, _ in batches), strict=True)
        ]
        means = [(weights[:, None, None] * of_layer).sum(0) / weights.sum() for of_layer in sizes]
        losses = loss_without(run.model, contributions(run.model, means), batches)
        run.loader.close()
        write_json(path, {f"{share:g}": round(losses[share] - losses[0], 6) for share in PRUNED})
    rises: dict[str, float] = json.loads(path.read_text(encoding="utf-8"))
    return rises


def tune(options: Options, tuned: list[Group], jobs: int) -> tuple[dict[str, tuple[float, bool]], list[dict[str, Any]]]:
    """The rate of each arm and whether it is at an end of those tried, and what was tried."""
    if not options.rates_tried:
        return {group.arm: (rates_of(group.arm, 0)[0], False) for group in tuned}, []
    chosen, tuning = {}, []
    cells = [group.cell(rate) for group in tuned for rate in rates_of(group.arm, options.rates_tried)]
    results = iter(stage(options, "tuning", cells, [TUNING_SEED], jobs))
    for group in tuned:
        tried = {rate: loss_of(next(results)) for rate in rates_of(group.arm, options.rates_tried)}
        chosen[group.arm] = best_rate(tried)
        tuning.append(dict(arm=group.arm, tried=list(tried.items())))
    return chosen, tuning


def experiment(options: Options, of_all: list[Group], tuned: list[Group], jobs: int) -> dict[str, Any]:
    """Tune, run, and keep what the tables need."""
    chosen, tuning = tune(options, tuned, jobs)
    chosen |= {arm: chosen["muon"] for arm in SWITCHED if "muon" in chosen}
    rates = [(rate, False) if (rate := VARIANTS[group.variant].rate) else chosen[group.arm] for group in of_all]
    results: dict[tuple[Group, int], Result] = {}
    for seeds, same in itertools.groupby(of_all, lambda group: seeds_of(group.arm, options)):
        ours = list(same)
        cells = [group.cell(rates[of_all.index(group)][0]) for group in ours]
        found = stage(options, "runs", cells, seeds, jobs)
        results.update(zip(((group, seed) for seed in seeds for group in ours), found, strict=True))
    runs = []
    for (group, seed), result in tqdm(results.items(), desc="pruning", unit="run", leave=False, disable=None):
        rows = rows_with("neurons", Path(result.directory))
        rate, at_edge = rates[of_all.index(group)]
        with arms.cpu_threads(result.threads):
            rises = pruning(options, result)
        runs.append(dict(
            arm=group.arm, variant=group.variant, settings=group.settings, rate=rate, at_edge=at_edge, seed=seed,
            status=result.summary["status"], val_loss=loss_of(result), pruning=rises,
            looks=curves_of(rows), last=pooled_over_layers(rows[-1]["neurons"]) if rows else None,
        ))  # fmt: skip
    summaries = [result.summary for result in results.values()]
    kept_options = {key: getattr(options, key) for key in ("recipe", "arms", "variants", "seeds", "steps", "every")}
    return dict(
        **kept_options, **arms.origins(summaries), params=sorted({each["num_params"] for each in summaries}),
        tokens=max(each["tokens"] for each in summaries), fixed=fixed_settings(options), tuning_seed=TUNING_SEED,
        tuning=tuning, runs=runs,
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
        size = config.model_dim, config.num_heads
        of_all, gpus = groups(options, *size), [] if config.device == "cpu" else visible_gpus()
        named = list(dict.fromkeys(group.arm for group in of_all if group.arm in ARMS))
        tuned = [Group(arm, BASE, settings_of(arm, BASE, options.steps, *size)) for arm in named]
        jobs = options.jobs or len(gpus) or torch.get_num_threads()  # two threads do less for one run than for two
        lines = plan(options, of_all, tuned, jobs, bool(gpus))
        if lines:
            confirm(lines, options.yes or options.preset == "quick")
        write_json(path, experiment(options, of_all, tuned, jobs), separators=(",", ":"), allow_nan=False)
    record = arms.read_result(path, report)
    draw(record, path.with_suffix(".png"))
    print(f"{report(record)}\n\n{len(record['runs'])} runs -> {path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
