"""Does Muon grok sooner? Every optimizer tuned alike, several seeds, runs that never grok counted as such.

    python -m experiments.grokking                     (quick: add and div, Muon and AdamW, minutes on two CPU cores)
    python -m experiments.grokking --preset=full       (everything: says what it will cost and asks first)
    python -m experiments.grokking --preset=full --tasks add parity --optimizers muon adamw --out runs/mine   (a part)
    python -m experiments.grokking --draw runs/grokking_quick/result.json               (table and figure once more)

The protocol, fixed beforehand. A setting is a task with its split, width and batch size. In each, every optimizer of
the hidden matrices tries the same number of learning rates x weight decays (GRIDS) on seeds that are not reported, with
softmax in attention and loss; the pair with the fewest steps to sustained generalisation is taken (then: the highest
validation accuracy). It then runs with each attention, loss and reported seed. Embedding and head are on AdamW with
the same settings for all. What is compared is the number of steps until validation accuracy is 95% and stays there
(train.py), by medians and a log-rank test against AdamW (survival.py), Holm-adjusted over the table.

OUT/runs.jsonl holds every run that has ended; the same command goes on from there, and another one with the same OUT
takes over what they share. OUT/result.json and OUT/result.png are written at the end; --draw=RESULT.json prints its
table and draws its figure again. Exit status: 0 done, 1 a process was killed, 2 a
mistake in what was asked for, 130 interrupted.
"""

import dataclasses
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.tables import align
from experiments.cost import confirm, duration
from experiments.grokking import report
from experiments.grokking.decoder import LOSSES, WEIGHTS
from experiments.grokking.pool import Store, run_all
from experiments.grokking.tasks import TASKS, TRAIN_SHARES
from experiments.grokking.train import Settings, seconds_a_step
from machine import device_name, git_commit, versions
from settings import parse_settings

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
SPLITS = {"paper": 1.0, "half": 0.5}  # of the share of rows that the task's source trains on


@dataclass(frozen=True)
class Options:
    preset: str = "full"  # quick or full: what all others are unless they are given
    tasks: tuple[str, ...] = TASKS  # add sub mul div exp gcd parity
    splits: tuple[str, ...] = ("paper",)  # paper: the share of rows trained on that the source states; half: of that
    optimizers: tuple[str, ...] = ("adamw", "muon", "normuon", "aurora", "sgd", "rmsprop")  # of the hidden matrices
    attentions: tuple[str, ...] = tuple(WEIGHTS)  # what turns attention's scores into weights
    losses: tuple[str, ...] = tuple(LOSSES)  # and the logits in the loss
    widths: tuple[int, ...] = (128,)  # of the residual stream
    batch_sizes: tuple[int, ...] = (0,)  # rows a step; 0: 512, and 128 for parity
    depth: int = 1  # blocks
    heads: int = 4  # attention heads
    adam_lr: float = 0.01  # of embedding and head, which are on AdamW in all runs
    adam_weight_decay: float = 0.01  # of embedding and head
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # of reported runs
    tuning_seeds: tuple[int, ...] = (100,)  # of the sweep, which is not reported
    lrs: int = 3  # learning rates tried for each optimizer
    weight_decays: int = 5  # weight decays tried for each of them
    max_steps: int = 2000  # a run ends here at the latest
    sustain_steps: int = 300  # for which the validation accuracy has to stay up
    jobs: int = 0  # runs at once, one thread each; 0: one for each CPU this process may use
    out: str = "runs/grokking"  # folder of the results
    table: bool = False  # run nothing, report what there is of these runs
    draw: str = ""  # run nothing, report what is in this result.json
    yes: bool = False  # start without asking


QUICK = Options(
    preset="quick", tasks=("add", "div"), splits=("half",), optimizers=("adamw", "muon"), attentions=("softmax",),
    losses=("softmax",), widths=(64,), seeds=(0, 1, 2), lrs=2, weight_decays=2, max_steps=1200,
    out="runs/grokking_quick",
)  # fmt: skip


def check(options: Options) -> None:
    """Raises ValueError for what cannot be run, before anything is."""
    for key, known in (
        ("tasks", TASKS), ("splits", SPLITS), ("optimizers", GRIDS), ("attentions", WEIGHTS), ("losses", LOSSES)
    ):  # fmt: skip
        for value in getattr(options, key):
            if value not in known:
                raise ValueError(f"{key}: {value!r} is unknown; choose from {' '.join(known)}")
    for key in ("tasks", "splits", "optimizers", "attentions", "losses", "widths", "batch_sizes", "seeds"):
        if not getattr(options, key):
            raise ValueError(f"{key} is empty; name at least one, or leave it away for the default")
    for key, largest in (("lrs", 3), ("weight_decays", 5)):
        if not 1 <= getattr(options, key) <= largest:
            raise ValueError(f"{key} = {getattr(options, key)} must be 1 to {largest}")
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
            runs.append(
                Settings(
                    task, optimizer, lr, weight_decay, seed, train_share=SPLITS[split] * TRAIN_SHARES[task],
                    batch_size=batch_size, depth=options.depth, width=width, heads=options.heads,
                    max_steps=options.max_steps, sustain_steps=options.sustain_steps,
                    adam_lr=options.adam_lr, adam_weight_decay=options.adam_weight_decay,
                )
            )  # fmt: skip
    return runs


def reported_runs(options: Options, tuned: Iterable[Settings]) -> list[Settings]:
    """The settings that the sweep chose, with each attention, loss and seed; seeds outermost."""
    variants = list(itertools.product(options.attentions, options.losses))
    return [
        dataclasses.replace(settings, seed=seed, attention=attention, loss=loss)
        for seed in options.seeds
        for settings in tuned
        for attention, loss in variants
    ]


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
    best: dict[Settings, Settings] = {}
    for settings, score in scores.items():
        of = dataclasses.replace(settings, lr=0.0, weight_decay=0.0)
        if of not in best or score < scores[best[of]]:
            best[of] = settings
    return list(best.values())


def cost(options: Options, jobs: int) -> list[str]:
    """The plan in words, and the time it takes at most, from a few steps of each kind timed here."""
    tuning = tuning_runs(options)
    untuned = choose(dict(settings=dataclasses.asdict(run), sustained=0, best_val_accuracy=0.0) for run in tuning)
    reported = reported_runs(options, untuned)
    runs = [*tuning, *reported]
    torch.set_num_threads(1)
    step_s: dict[tuple[Any, ...], float] = {}
    for settings in tqdm(runs, desc="timing a few steps of each kind", leave=False, disable=not sys.stderr.isatty()):
        key = _kind(settings)
        if key not in step_s:
            step_s[key] = seconds_a_step(settings)
    most = sum(step_s[_kind(settings)] * settings.max_steps for settings in runs) / jobs
    lines = [
        f"{len(tuning)} runs to tune {len(untuned)} optimizers and settings, {len(reported)} runs to report",
        f"at most {duration(most)} here ({place()}, {jobs} at once): steps of {1000 * min(step_s.values()):.0f} to "
        f"{1000 * max(step_s.values()):.0f} ms, {options.max_steps} of them in a run that never groks",
    ]
    if not torch.cuda.is_available():
        lines.append("what it costs on a GPU is timed and said when the same command is started on one")
    return lines


def _kind(settings: Settings) -> tuple[Any, ...]:
    """What a step's time depends on, roughly."""
    return settings.task == "parity", settings.optimizer, settings.width, settings.rows_a_step


def place() -> str:
    return device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def report_on(result: dict[str, Any], picture: Path) -> None:
    """Print the table and the comparisons, draw the figure."""
    report.draw(result, picture)
    rows = report.rows(result)
    print(align([list(report.COLUMNS.values()), *([row[key] for key in report.COLUMNS] for row in rows)]))
    print("\n".join(report.remarks(result)))
    print(f"figure: {picture}")


def run(options: Options) -> None:
    """All of it: sweep, reported runs, result. Raises ValueError before anything has started, or KeyboardInterrupt."""
    check(options)
    jobs = options.jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    out, tuning = Path(options.out), tuning_runs(options)
    with Store(out) as store:
        if not options.table:
            confirm(cost(options, jobs), options.yes or options.preset == "quick")
            run_all(tuning, store, jobs, "tuning")
        reported = reported_runs(options, choose(store.of(tuning)))
        if not options.table:
            run_all(reported, store, jobs, "reported")
        result = dict(
            options=dataclasses.asdict(options), device=place(), versions=versions(), git_commit=git_commit(),
            tuning=[report.without_curves(run) for run in store.of(tuning)],
            runs=[report.thinned(run) for run in store.of(reported)],
        )  # fmt: skip
    if not result["runs"]:
        raise ValueError(f"{out} has none of these runs yet; leave --table away to start them")
    temporary = out / "result.json.tmp"
    temporary.write_text(json.dumps(result) + "\n")
    temporary.replace(out / "result.json")
    report_on(result, out / "result.png")


def main(argv: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        options = parse_settings(Options, argv, __doc__, preset_of(argv))
        if options.draw:
            path = Path(options.draw)
            report_on(json.loads(path.read_text()), path.with_suffix(".png"))
        else:
            run(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        print("error: a run's process was killed (out of memory?); fewer --jobs; the rest is kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def preset_of(argv: list[str]) -> Options:
    """The defaults for a command line, by the last --preset in it. Raises ValueError for an unknown one."""
    words = " ".join(argv).replace("--preset=", "--preset ").split()
    names = [name for word, name in itertools.pairwise(words) if word == "--preset"] or ["quick"]
    presets = {preset.preset: preset for preset in (QUICK, Options())}
    if names[-1] not in presets:
        raise ValueError(f"preset = {names[-1]!r} is unknown; choose quick or full")
    return presets[names[-1]]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
