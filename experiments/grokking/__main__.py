"""Does Muon grok sooner? Every optimizer tuned alike, several seeds, runs that never grok counted as such.

    python -m experiments.grokking                     (quick: add and div, Muon and AdamW, minutes on two CPU cores)
    python -m experiments.grokking --preset=full       (everything: says what it will cost and asks first)
    python -m experiments.grokking --preset=full --tasks add parity --optimizers muon adamw --out runs/mine   (a part)
    python -m experiments.grokking --draw runs/grokking_quick/result.json               (table and figure once more)

The protocol. A setting is a task with its split, width and batch size. In each, every optimizer of the hidden
matrices tries the same number of learning rates x weight decays (GRIDS) on seeds that are not reported, with softmax
in attention and loss; the pair with the fewest steps to sustained generalisation is taken (then: the highest
validation accuracy). It then runs with each attention, loss and reported seed. Embedding and head are on AdamW with
the same settings for all, which were not tuned. What is compared is the number of steps until validation accuracy is
95% and stays there (train.py). The question is asked once for each optimizer: against AdamW, over all settings, by a
stratified log-rank test that is Holm-adjusted over the optimizers (survival.py); medians and a test for each setting
are printed beside it. A seed means the same split, batches and weights for all optimizers. Grids and these rules were
written after trial runs on other seeds (0, 50, and 100 of the sweep); reported seeds start at 1.

OUT/runs.jsonl holds every run that has ended: the same command goes on from there, and another one with the same OUT
uses those runs that it needs as well. OUT/result.json and OUT/result.png are written at the end. --draw prints the
table of a result.json and draws its figure again, --table prints what there is so far of the runs that are asked for.
Exit status: 0 done, 1 a process was killed, 2 a mistake in what was asked for, 130 interrupted.
"""

import dataclasses
import itertools
import os
import sys
from collections.abc import Container, Iterable, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from tqdm import tqdm

from data.files import check_writable, user_path, write_json
from experiments import arms
from experiments.arms import confirm, duration, names_of
from experiments.grokking import findings
from experiments.grokking.decoder import LOSSES, WEIGHTS
from experiments.grokking.pool import Store, place, read_runs, run_all
from experiments.grokking.tasks import TASKS, TRAIN_SHARES
from experiments.grokking.train import Settings, seconds_per_step
from harness.machine import versions
from harness.tables import align

# Optimizer -> learning rates, weight decays, in the order in which --lrs and --weight_decays take the first so many;
# the order is from trial runs of add and mul (seeds 0 and 50), more than twice as many of AdamW as of Muon. Weight
# decay of sgd and rmsprop is added to the gradient, as torch's own rules do it: another scale.
MUON_GRID = (0.02, 0.005, 0.06), (0.3, 1.0, 0.1, 3.0, 10.0)
GRIDS = {
    "adamw": ((0.01, 0.003, 0.001), (1.0, 0.3, 0.1, 3.0, 10.0)),
    **dict.fromkeys(("muon", "normuon", "unormuon", "aurora", "riemannian_aurora"), MUON_GRID),
    "sgd": ((0.1, 0.03, 0.3), (0.001, 0.0001, 0.003, 0.01, 0.0)),
    "rmsprop": ((0.0003, 0.001, 0.0001), (0.001, 0.0001, 0.01, 0.1, 0.0)),
}
OPTIMIZERS = ("adamw", "muon", "normuon", "aurora", "sgd", "rmsprop")
SPLITS = {"paper": 1.0, "half": 0.5}  # of the share of rows that the task's source trains on
Seeds = Annotated[tuple[int, ...], ">= 0", f"<= {2**62}"]


@dataclass(frozen=True)
class Options:
    preset: Literal["quick", "full"] = "full"  # what all others are unless they are given
    tasks: Annotated[tuple[str, ...], names_of(TASKS)] = TASKS  # each a table of rows, part of it to learn from
    splits: Annotated[tuple[str, ...], names_of(SPLITS)] = ("paper",)  # share of rows trained on: the source's, or half
    optimizers: Annotated[tuple[str, ...], names_of(GRIDS)] = OPTIMIZERS  # of the hidden matrices
    attentions: Annotated[tuple[str, ...], names_of(WEIGHTS)] = tuple(WEIGHTS)  # what turns scores into weights
    losses: Annotated[tuple[str, ...], names_of(LOSSES)] = tuple(LOSSES)  # and the logits in the loss
    widths: Annotated[tuple[int, ...], ">= 2", "<= 65536"] = (128,)  # of the residual stream
    batch_sizes: Annotated[tuple[int, ...], ">= 0", "<= 9312"] = (0,)  # rows per step; 0: 512, and 128 for parity
    depth: Annotated[int, ">= 1", "<= 100"] = 1  # blocks
    heads: Annotated[int, ">= 1", "<= 1000"] = 4  # attention heads
    adam_lr: Annotated[float, ">= 0", "<= 10"] = 0.01  # of embedding and head, which are on AdamW in all runs
    adam_weight_decay: Annotated[float, ">= 0", "<= 100"] = 0.01  # of embedding and head
    seeds: Seeds = (1, 2, 3, 4, 5)  # of reported runs
    tuning_seeds: Seeds = (100,)  # of the sweep, which is not reported
    lrs: Annotated[int, ">= 1", "<= 3"] = 3  # learning rates tried for each optimizer
    weight_decays: Annotated[int, ">= 1", "<= 5"] = 5  # weight decays tried for each of them
    max_steps: Annotated[int, ">= 10", "<= 10000000"] = 2000  # a run ends here at the latest
    sustain_steps: Annotated[int, ">= 10", "<= 10000000"] = 300  # for which the validation accuracy has to stay up
    jobs: Annotated[int, ">= 0", "<= 1000"] = 0  # runs at once, one thread each; 0: one for each CPU, four for each GPU
    out: str = "runs/grokking"  # folder of the results
    table: bool = False  # run nothing, print the table of what there is of these runs
    draw: str = ""  # run nothing, report what is in this result.json
    yes: bool = False  # start without asking


QUICK = Options(
    preset="quick", tasks=("add", "div"), splits=("half",), optimizers=("adamw", "muon"), attentions=("softmax",),
    losses=("softmax",), widths=(64,), seeds=(1, 2, 3), lrs=2, weight_decays=2, max_steps=1200,
    out="runs/grokking_quick",
)  # fmt: skip


SHARED = ("depth", "heads", "max_steps", "sustain_steps", "adam_lr", "adam_weight_decay")  # of Options and Settings


def check(options: Options) -> None:
    """Refuse, with ValueError, options that cannot be run together, before anything is."""
    for key, values in vars(options).items():
        if isinstance(values, tuple) and (not values or len(set(values)) < len(values)):
            raise ValueError(f"{key} = {' '.join(map(str, values)) or 'nothing'}: name at least one, and each once")
    for key in ("max_steps", "sustain_steps"):
        if getattr(options, key) % Settings.look_every:
            raise ValueError(f"{key} = {getattr(options, key)} must be a multiple of {Settings.look_every}")
    if set(options.seeds) & set(options.tuning_seeds):
        raise ValueError(f"seeds {options.seeds} and tuning_seeds {options.tuning_seeds} overlap; report other seeds")
    if options.max_steps <= options.sustain_steps:
        raise ValueError(f"max_steps = {options.max_steps} must be more than sustain_steps = {options.sustain_steps}")
    for width in options.widths:
        if width % (2 * options.heads):
            raise ValueError(f"width = {width} must be an even number times heads = {options.heads}; 128 and 4 will do")


def tuning_runs(options: Options) -> list[Settings]:
    """The sweep: for each setting and optimizer the same number of pairs."""
    runs = []
    for seed, task, split, width, batch_size, optimizer in itertools.product(
        options.tuning_seeds, options.tasks, options.splits, options.widths, options.batch_sizes, options.optimizers
    ):
        lrs, weight_decays = GRIDS[optimizer]
        for lr, weight_decay in itertools.product(lrs[: options.lrs], weight_decays[: options.weight_decays]):
            runs.append(Settings(
                task, optimizer, lr, weight_decay, seed, train_share=SPLITS[split] * TRAIN_SHARES[task],
                batch_size=0 if batch_size == Settings(task).rows_per_step else batch_size, width=width,
                **{key: getattr(options, key) for key in SHARED},
            ))  # fmt: skip
    return list(dict.fromkeys(runs))


def reported_runs(options: Options, tuned: Iterable[Settings]) -> list[Settings]:
    """The settings that the sweep chose, with each attention, loss and seed; seeds outermost."""
    grid = itertools.product(options.seeds, tuned, options.attentions, options.losses)
    return [dataclasses.replace(settings, seed=seed, attention=attention, loss=loss)
            for seed, settings, attention, loss in grid]  # fmt: skip


def choose(runs: Iterable[dict[str, Any]]) -> list[Settings]:
    """The best pair of each setting and optimizer: fewest steps to `sustained`, then highest validation accuracy.

    A run that does not get there counts with all its steps; several tuning seeds count by their sum.
    """
    scores: dict[Settings, tuple[float, float]] = {}
    for run in runs:
        settings = dataclasses.replace(Settings(**run["settings"]), seed=0)
        steps, accuracy = scores.get(settings, (0.0, 0.0))
        reached = settings.max_steps if run["sustained"] is None else run["sustained"]
        scores[settings] = (steps + reached, accuracy - run["best_val_accuracy"])
    alike: dict[Settings, dict[Settings, tuple[float, float]]] = {}  # by what is tuned, the pairs tried for it
    for settings, score in scores.items():
        alike.setdefault(dataclasses.replace(settings, lr=0.0, weight_decay=0.0), {})[settings] = score
    return [arms.best(tried) for tried in alike.values()]


def cost(options: Options, jobs: int, done: Container[Settings]) -> list[str]:
    """The plan in words, and about how long it takes at most, from a few steps of each kind timed here."""
    tuning = tuning_runs(options)
    untuned = choose(dict(settings=dataclasses.asdict(run), sustained=0, best_val_accuracy=0.0) for run in tuning)
    reported = reported_runs(options, untuned)
    left = [run for run in (*tuning, *reported) if run not in done]
    step_s: dict[tuple[Any, ...], float] = {}
    torch.set_num_threads(1)
    for settings in tqdm(left, desc="timing a few steps of each kind", leave=False, disable=not sys.stderr.isatty()):
        if _kind(settings) not in step_s:
            step_s[_kind(settings)] = seconds_per_step(settings)
    most = sum(step_s[_kind(settings)] * settings.max_steps for settings in left) / jobs
    total = len(tuning) + len(reported)
    lines = [f"{len(tuning)} runs to tune {len(untuned)} optimizers and settings, {len(reported)} runs to report; "
             f"{total - len(left)} are done"]  # fmt: skip
    if left:
        least, highest = (f"{1000 * bound(step_s.values()):.0f}" for bound in (min, max))
        lines += [f"about {duration(most)} at most here ({place()}, {jobs} at once): {least} to {highest} ms per step, "
                  f"{options.max_steps} steps in a run that never groks"]  # fmt: skip
    if not torch.cuda.is_available():
        lines.append("what it costs on a GPU is timed and said when the same command is started on one")
    return lines


def _kind(settings: Settings) -> tuple[Any, ...]:
    """The settings that a step's time depends on, roughly."""
    return settings.task == "parity", settings.optimizer, settings.width, settings.rows_per_step, settings.depth


def tell(result: dict[str, Any]) -> None:
    """Print the table and what is to be said of it."""
    rows = findings.rows(result)
    print(align([list(findings.COLUMNS.values()), *([row[key] for key in findings.COLUMNS] for row in rows)]))
    print("\n".join(findings.remarks(result)))


def collect(options: Options, known: Mapping[Settings, dict[str, Any]]) -> dict[str, Any]:
    """The content of result.json: what is kept of these options' runs, as far as they have ended."""
    tuning = [known[run] for run in tuning_runs(options) if run in known]
    runs = [known[run] for run in reported_runs(options, choose(tuning)) if run in known]
    return dict(
        options=dataclasses.asdict(options), **arms.origins((*tuning, *runs)), versions=versions(),
        tuning=[{key: run[key] for key in run if key != "curves"} for run in tuning],
        runs=[findings.thinned(run) for run in runs],
    )  # fmt: skip


def run(options: Options) -> None:
    """Sweep, reported runs, result. Raises ValueError before anything has started, or KeyboardInterrupt."""
    check(options)
    out, gpus = user_path(options.out), torch.cuda.device_count()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = options.jobs or min(cpus, 4 * gpus or cpus)
    if options.table:
        known = read_runs(out)
    else:
        check_writable(out, "choose another folder, such as --out=/tmp/grokking")
        confirm(cost(options, jobs, read_runs(out)), options.yes or options.preset == "quick")
        tuning = tuning_runs(options)
        with Store(out) as store:
            run_all(tuning, store, jobs, "tuning")
            run_all(reported_runs(options, choose(store.runs[run] for run in tuning)), store, jobs, "reported")
            known = store.runs
    result = collect(options, known)
    if not result["runs"]:
        raise ValueError(f"{out} has none of these runs yet; leave --table away to start them")
    tell(result)
    if not options.table:
        write_json(out / "result.json", result)
        findings.draw(result, out / "result.png")
        print(f"{len(result['runs'])} runs -> {out}/result.json, {out}/result.png")


@arms.command
def main(argv: list[str]) -> None:
    options = arms.parse_preset({"quick": QUICK, "full": Options()}, argv, __doc__)
    try:
        if options.draw:
            path = user_path(options.draw)
            tell(arms.read_result(path, lambda result: findings.draw(result, path.with_suffix(".png"))))
        else:
            run(options)
    except BrokenProcessPool:
        told = "a run's process was killed (out of memory?); fewer --jobs; the rest is kept"
        raise arms.RunCrashedError(told) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
