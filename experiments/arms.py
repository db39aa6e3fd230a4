"""Parts that experiments share: the cost, said before anything starts, equal time and equal tuning for every arm, runs
as sweeps, and results."""

import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from data import console
from experiments.sweep import Cell, Result, run_sweep
from harness.machine import find_machine
from harness.overrides import OWN, arguments, assignments
from harness.settings import parse_settings
from harness.step_timer import median_seconds
from optim import Option
from train_gpt import Run, load_config, plan_step, set_up, train_step

Name = TypeVar("Name", bound=Hashable)
Options = TypeVar("Options")
START_S = 5.0  # of a run, before its first step
EDGE = "*"  # marks a setting at an end of those that were tried


class RunCrashedError(Exception):
    """A run that ended without a result; the others' results are kept."""


def command(work: Callable[[list[str]], None]) -> Callable[[list[str]], int]:
    """The main of an experiment that does `work` with its command line's words; its exit status is console.run's, and 1
    when a run crashed."""

    def status(argv: list[str]) -> int:
        try:
            work(argv)
        except RunCrashedError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0

    return lambda argv: console.run(lambda: status(argv))


def names_of(known: Iterable[str]) -> Option:
    """The rule of a setting whose values are some of these names."""
    return Option("", "", choices=tuple(known))


def ideas(words: Iterable[str], taken: Container[str] = (), own: Container[str] = OWN) -> dict[str, dict[str, str]]:
    """Settings by name, of ideas "wide: model_dim=96 num_heads=3". Raises ValueError for another form, a name that is
    taken, and a key of `own`, which the experiment sets itself."""
    found: dict[str, dict[str, str]] = {}
    for idea in words:
        name, _, sets = idea.partition(":")
        name = name.strip()
        if not name or not sets.strip() or name in found or name in taken:
            raise ValueError(f"--ideas: {idea!r} is not a new name and settings; try 'wide: model_dim=96'")
        found[name] = assignments(sets.split(), "--ideas: ", own)
    return found


def parse_preset(presets: Mapping[str, Options], argv: Sequence[str], description: str | None) -> Options:
    """The options on a command line; what is not given there is as in its --preset, or in the first of `presets`."""
    first, *_ = presets.values()
    named = re.findall(r"--preset[= ](\S+)", " ".join(argv))
    return parse_settings(type(first), argv, description, presets.get(named[-1], first) if named else first)


def duration(seconds: float) -> str:
    """Two digits' worth of a time: 45 s, 12 min, 3.4 h, 2.1 days."""
    for least, unit_s, text in ((129_600, 86_400, "{:.1f} days"), (5_400, 3_600, "{:.1f} h"), (100, 60, "{:.0f} min")):
        if seconds >= least:
            return text.format(seconds / unit_s)
    return f"{seconds:.0f} s"


def confirm(lines: list[str], yes: bool) -> None:
    """Print the plan and its cost on stderr; ask whether to start unless `yes`.

    Raises KeyboardInterrupt for a no, ValueError where there is nobody to ask.
    """
    print("\n".join(lines), file=sys.stderr)
    if yes:
        return
    if not sys.stdin.isatty():
        raise ValueError("nothing was started: there is no terminal to confirm this in; add --yes to go ahead")
    print("Start? [y/N] ", end="", file=sys.stderr, flush=True)
    answer = ""
    with contextlib.suppress(EOFError, OSError, UnicodeError):  # Ctrl-D; the terminal went away; no word at all
        answer = input().strip().lower()
    if answer not in ("y", "yes"):
        raise KeyboardInterrupt


@contextlib.contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """As many threads as a run will have, for timing its steps."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_per_step(
    runs: Mapping[Name, Run], steps: Sequence[int] = (0,), turns: int = 5, computed: bool = False
) -> dict[Name, list[float]]:
    """Median seconds of each of the training `steps`, for each run; all take turns, and all train their models.

    computed: of the CPU's time instead of the clock's where a single thread computes, so that waiting for neighbours
    does not count.
    """
    device = next(iter(runs.values())).machine.device
    computed &= device.type == "cpu" and torch.get_num_threads() == 1
    work = {(name, step): _training_step(run, step) for name, run in runs.items() for step in steps}
    seconds = median_seconds(work, turns, warmups=1, device=device)
    return {name: [seconds[name, step].cpu if computed else seconds[name, step].wall for step in steps]
            for name in runs}  # fmt: skip


def seconds_of_a_run(recipe: str, settings: Cell, threads: int) -> float:
    """Expected seconds of a run with so many CPU threads: start, training and validations, from a few steps here
    without torch.compile."""
    config = load_config([recipe, *arguments(settings), "--compile=false", "--checkpoint_every=0", "--resume="])
    with cpu_threads(threads):
        run = set_up(config, find_machine(config.device, config.dtype))
        (step_s,) = seconds_per_step({"": run})[""]
    run.loader.close()
    torch.cuda.empty_cache()  # the runs need it
    validations = 1 + math.ceil(config.train_steps / config.val_every)
    steps_of_validation = validations * config.val_tokens / config.batch_tokens / 3  # a forward pass is a third of one
    return START_S + step_s * (config.train_steps + steps_of_validation)


def _training_step(run: Run, step: int) -> Callable[[], object]:
    plan = plan_step(run.config, step)
    run.follow(plan)
    batch = run.batch()

    def train() -> None:
        run.follow(plan)
        train_step(run, *batch)

    return train


def best(scores: Mapping[Name, Any]) -> Name:
    """The choice with the lowest score, the first of equal ones."""
    return min(scores, key=scores.__getitem__)


def at_edge(value: float, tried: Iterable[float]) -> bool:
    """Whether it is the lowest or the highest of several values: one beyond them may be better."""
    ordered = sorted(set(tried))
    return len(ordered) > 1 and value in (ordered[0], ordered[-1])


def sweep(recipe: str, cells: Sequence[Cell], seeds: Sequence[int], out: Path, jobs: int, fixed: Cell) -> list[Result]:
    """The results of experiments.sweep.run_sweep. Raises RunCrashedError if a run has none."""
    results = run_sweep(recipe, cells, seeds, out, jobs, fixed)
    crashed = [f"{out}/runs/{run.name}/output.txt" for run in results if not run.ended]
    if crashed:
        raise RunCrashedError(f"{len(crashed)} runs crashed, see {crashed[0]}; the same command tries them again")
    return results


def origins(summaries: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The device and the commit of runs, several joined by commas."""
    kept = list(summaries)
    return {key: ", ".join(sorted({run[key] or "unknown" for run in kept})) for key in ("device", "git_commit")}


def read_result(path: Path, use: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """A result file, after `use` has worked with it. Raises ValueError for a file of another kind."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8-sig"))
        use(result)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"{path} is not a result of this experiment, or one of another version ({type(error).__name__}: {error})"
        ) from None
    return result
