"""Does Muon grok sooner? Every optimizer tuned alike, several seeds, runs that never generalise counted as such.

    python -m experiments.grokking                     (quick: add and mul, AdamW and Muon, minutes on two CPU cores)
    python -m experiments.grokking --preset=full       (everything: says what it will cost and asks first)
    python -m experiments.grokking --preset=full --parts main --optimizers adamw muon --out runs/mine    (a part of it)
    python -m experiments.grokking --draw runs/grokking_quick/result.json              (table and figure once more)

The protocol. The experiment has parts (protocol.py): `main` is all tasks and optimizers where generalising comes after
memorising, the others change one thing for AdamW and Muon. In each part, every optimizer of the hidden matrices
chooses from as many settings, by successive halving on a seed that is not reported, and takes its choice to the
reported seeds and all tasks of the part. Embedding and head are on AdamW in all runs, at one rate; their decay is
tuned. What is compared is the number of steps until validation accuracy is first at 95%; when the training rows were
memorised (99%), and when 95% was held for 300 steps, is told beside it (train.py).

The comparison is a ratio of steps to AdamW's, with an interval for each task, given the settings that were chosen; p is
of a rank test by permutation, Holm-adjusted over the tasks of a part (survival.py). A seed means the same split,
batches and weights for all optimizers. `later` trains what has generalised on, around the chosen settings of AdamW and
Muon. What is run was written before any reported run (trial runs had seeds 0 and 50 to 52); the ratio that is common to
the tasks of a part was added after.

OUT/runs.jsonl holds every run that has ended: the same command goes on from there, and another one with the same OUT
takes those runs that it needs from it. OUT/result.json and OUT/result.png are written at the end. --draw prints the
table of a result.json and draws its figure again, --table prints what there is so far of the runs that are asked for.
Exit status: 0 done, 1 a process was killed, 2 a mistake in what was asked for, 130 interrupted.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from tqdm import tqdm

from data.files import check_writable, user_path, write_json
from experiments import arms
from experiments.arms import confirm, duration, names_of
from experiments.grokking import findings, protocol
from experiments.grokking.pool import Store, machine_name, read_runs, run_all
from experiments.grokking.protocol import BOXES, LATER, PAIR, PARTS, RUNGS, Part
from experiments.grokking.tasks import TASKS
from experiments.grokking.train import Settings, seconds_per_step, stacks
from harness.machine import versions
from harness.tables import align
from optim.polar import fast_half_dtype

Known = Mapping[Settings, dict[str, Any]]
Chosen = dict[str, dict[str, dict[str, float]]]  # by part and optimizer
Seeds = Annotated[tuple[int, ...], ">= 0", f"<= {2**62}"]


@dataclass(frozen=True)
class Options:
    preset: Literal["quick", "full"] = "full"  # what all others are unless they are given
    parts: Annotated[tuple[str, ...], names_of((*PARTS, LATER))] = (*PARTS, LATER)  # of the experiment
    tasks: Annotated[tuple[str, ...], names_of(TASKS)] = TASKS  # of those that the parts report
    optimizers: Annotated[tuple[str, ...], names_of(BOXES)] = tuple(BOXES)  # of those that the parts have
    seeds: Seeds = (1, 2, 3, 4, 5, 6)  # of reported runs
    tuning_seed: Annotated[int, ">= 0", f"<= {2**62}"] = 100  # of the runs that settings are chosen by
    candidates: Annotated[int, ">= 1", "<= 1000"] = 20  # settings that each optimizer of a part chooses from
    max_steps: Annotated[int, ">= 20", "<= 10000000"] = 2500  # a reported run ends here at the latest
    jobs: Annotated[int, ">= 0", "<= 1000"] = 0  # runs at once, one thread each; 0: one for each CPU, four for each GPU
    out: str = "runs/grokking"  # folder of the results
    table: bool = False  # run nothing, print the table of what there is of these runs
    draw: str = ""  # run nothing, report what is in this result.json
    yes: bool = False  # start without asking


QUICK = Options(
    preset="quick", parts=("main",), tasks=("add", "mul"), optimizers=PAIR, seeds=(1, 2, 3, 4), candidates=9,
    max_steps=1500, out="runs/grokking_quick",
)  # fmt: skip


def check(options: Options) -> None:
    """Refuse, with ValueError, options that cannot be run together, before anything is."""
    for key, values in vars(options).items():
        if isinstance(values, tuple) and (not values or len(set(values)) < len(values)):
            raise ValueError(f"{key} = {' '.join(map(str, values)) or 'nothing'}: name at least one, and each once")
    if options.max_steps % Settings.eval_every:
        raise ValueError(f"max_steps = {options.max_steps} must be a multiple of {Settings.eval_every}")
    if options.tuning_seed in options.seeds:
        raise ValueError(f"seeds {options.seeds} have the tuning_seed = {options.tuning_seed}; report other seeds")
    if LATER in options.parts and not ("main" in options.parts and {*PAIR} <= {*options.optimizers}):
        raise ValueError(f"parts: {LATER} goes on from what main chose for {' and '.join(PAIR)}; name these as well")
    if LATER in options.parts and not {*protocol.LATER_TASKS} & {*options.tasks}:
        raise ValueError(f"parts: {LATER} is of {' and '.join(protocol.LATER_TASKS)} alone; name it among the tasks")
    if not set(options.parts) - {LATER} or not any(parts_of(options).values()):
        raise ValueError("tasks and optimizers: no part that was named has any of them; --help says which there are")


def parts_of(options: Options) -> dict[str, Part]:
    """The parts asked for, each with those of its optimizers and reported tasks that are; none that is left empty."""
    found = {}
    for name, part in PARTS.items():
        tasks = tuple(task for task in part.tasks if task in options.tasks)
        optimizers = tuple(each for each in part.optimizers if each in options.optimizers)
        if name in options.parts and tasks and optimizers:
            found[name] = dataclasses.replace(part, tasks=tasks, optimizers=optimizers)
    return found


def choosing(options: Options) -> list[tuple[str, Part, str]]:
    """Every part that chooses settings, or whose choice another takes, with each of its optimizers."""
    wanted = parts_of(options)
    sources = {part.chosen_in for part in wanted.values()}
    return [
        (name, part, optimizer)
        for name, part in PARTS.items()
        if not part.chosen_in and (name in wanted or name in sources)
        for optimizer in part.optimizers
        if optimizer in options.optimizers
    ]


def choose(options: Options, run: Callable[[list[Settings], str], Known]) -> tuple[Chosen, list[dict[str, Any]]]:
    """Halve the settings of every part and optimizer: the best of each, and all runs with the part of each. `run` gives
    the runs of settings; what it lacks ends the halving early."""
    arms_of = choosing(options)
    left = {(name, optimizer): protocol.candidates(optimizer, options.candidates) for name, _, optimizer in arms_of}
    tuning: list[dict[str, Any]] = []
    for rung, steps in enumerate(RUNGS):
        wanted = {
            (name, optimizer): protocol.rung_runs(part, optimizer, left[name, optimizer], rung, options.tuning_seed)
            for name, part, optimizer in arms_of
        }
        known = run([each for runs in wanted.values() for each in runs], f"tuning, {steps} steps")
        for name, part, optimizer in arms_of:
            runs = wanted[name, optimizer]
            if any(each not in known for each in runs):
                return {}, tuning
            found = [known[each] for each in runs]
            tuning += [dict(each, part=name) for each in found]
            tried = left[name, optimizer]
            left[name, optimizer] = protocol.survivors(part, tried, found, protocol.num_kept(len(tried), rung))
    chosen: Chosen = {}
    for (name, optimizer), (only,) in left.items():
        chosen.setdefault(name, {})[optimizer] = only
    return chosen, tuning


def reported(options: Options, chosen: Chosen) -> dict[str, list[Settings]]:
    """The runs to report, by part."""
    runs = {
        name: [
            each
            for optimizer in part.optimizers
            for each in protocol.reported_runs(
                part, optimizer, chosen[part.chosen_in or name][optimizer], options.seeds, max_steps=options.max_steps
            )
        ]
        for name, part in parts_of(options).items()
    }
    if LATER in options.parts:
        runs[LATER] = protocol.later_runs(chosen["main"], options.seeds[0], options.tasks)
    return runs


def cost(options: Options, jobs: int, known: Known) -> list[str]:
    """The plan in words, and about how long it takes at most, from a few steps of each kind timed here.

    Which settings will be left after a round is not known yet: others stand for them, which take as long.
    """
    tuning: list[Settings] = []
    number = options.candidates
    for rung in range(len(RUNGS)):
        for _, part, optimizer in choosing(options):
            tried = protocol.candidates(optimizer, number)
            tuning += protocol.rung_runs(part, optimizer, tried, rung, options.tuning_seed)
        number = protocol.num_kept(number, rung)
    any_choice: Chosen = {}
    for name, _, optimizer in choosing(options):
        any_choice.setdefault(name, {})[optimizer] = protocol.candidates(optimizer, 1)[0]
    to_report = [run for runs in reported(options, any_choice).values() for run in runs]
    left: dict[Settings, int] = {}  # steps by kind
    stack_of: dict[Settings, list[Settings]] = {}
    for stack in stacks([*tuning, *to_report]):
        stack_of.setdefault(_cost_kind(stack[0]), stack)
        for run in stack:
            left[_cost_kind(run)] = left.get(_cost_kind(run), 0) + run.max_steps
    for run in known:
        if _cost_kind(run) in left:
            left[_cost_kind(run)] = max(0, left[_cost_kind(run)] - run.max_steps)
    lines = [f"{len(tuning)} runs to choose settings in {len(RUNGS)} rounds, {len(to_report)} runs to report; "
             f"{len(known)} are done"]  # fmt: skip
    torch.set_num_threads(1)
    kinds = [kind for kind, steps in left.items() if steps]
    timing = tqdm(kinds, desc="timing a few steps of each kind", leave=False, disable=not sys.stderr.isatty())
    step_s = {kind: seconds_per_step(stack_of[kind]) for kind in timing}
    if step_s:
        least, highest = (f"{1000 * bound(step_s.values()):.0f}" for bound in (min, max))
        most = sum(left[kind] * seconds for kind, seconds in step_s.items()) / jobs
        lines += [f"about {duration(most)} at most here ({machine_name()}, {jobs} at once): {least} to {highest} ms "
                  f"per step, {options.max_steps} steps in a run that never generalises"]  # fmt: skip
    if not torch.cuda.is_available():
        lines.append("what it costs on a GPU is timed and said when the same command is started on one")
    return lines


def _cost_kind(run: Settings) -> Settings:
    """The settings that a step's time depends on."""
    task = run.task if run.task == "parity" else "add"
    return dataclasses.replace(run.kind, task=task, train_share=0.5, stop="held", is_frozen=False, max_steps=0)


def tell(result: dict[str, Any]) -> None:
    """Print the table and what is to be said of it."""
    rows = findings.rows(result)
    print(align([list(rows[0]), *(list(row.values()) for row in rows)]))
    print("\n".join(findings.remarks(result)))


def collect(options: Options, tuning: Sequence[dict[str, Any]], runs: Mapping[str, Sequence[dict[str, Any]]],
            chosen: Chosen) -> dict[str, Any]:  # fmt: skip
    """The content of result.json."""
    of_parts = [dict(run, part=name) for name, found in runs.items() for run in found]
    return dict(
        options=dataclasses.asdict(options), **arms.origins((*tuning, *of_parts)), versions=versions(), chosen=chosen,
        polar_dtype=str(fast_half_dtype("cuda" if torch.cuda.is_available() else "cpu")).removeprefix("torch."),
        tuning=[findings.tuning_row(run) for run in tuning], runs=[findings.thinned(run) for run in of_parts],
    )  # fmt: skip


def run(options: Options) -> None:
    """Choose, report, write. Raises ValueError before anything has started, or KeyboardInterrupt."""
    check(options)
    out, gpus = user_path(options.out), torch.cuda.device_count()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = options.jobs or min(cpus, 4 * gpus or cpus)
    if options.table:
        known: Known = read_runs(out)
        chosen, tuning = choose(options, lambda wanted, what: known)
        wanted = reported(options, chosen) if chosen else {}
    else:
        check_writable(out, "choose another folder, such as --out=/tmp/grokking")
        confirm(cost(options, jobs, read_runs(out)), options.yes or options.preset == "quick")
        with Store(out) as store:

            def run_them(wanted: list[Settings], what: str) -> Known:
                run_all(wanted, store, jobs, what)
                return store.runs

            chosen, tuning = choose(options, run_them)
            wanted = reported(options, chosen)
            known = run_them([run for runs in wanted.values() for run in runs], "reported")
    found = {name: [known[run] for run in runs if run in known] for name, runs in wanted.items()}
    if not any(found.values()):
        raise ValueError(f"{out} has none of these runs yet; leave --table away to start them")
    result = collect(options, tuning, found, chosen)
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
