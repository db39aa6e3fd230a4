"""Two records, or recipes, whose steps take turns on one machine: the ratio of their times.

Wall time on a shared machine varies by half from one run to the next. Here both sides feel the same slow moments. Each
is a process of its own with its own logged source (duelist.py); one of them is at work at a time. A round has a step of
every kind from one side, then from the other, and the next round begins with the other: A B, B A, A B ... After some
rounds both start anew, since a process can have a speed of its own, a percent away from that of the next one.

A step that follows the other side's takes 4 to 7% longer here than one that follows its own, as every step does in
training. So in each round only the steps of the side that also ended the round before count. A side's time is the sum
over its kinds of step of their number in the run times the time of such a step.

The ratio is of step times alone: batches are read before the turn, and what a source does outside of train_step is not
seen. It says nothing of the loss.

The interval is of log(time of A / time of B), a value for each round in which A counts, with B's of the rounds before
and after it: what changes steadily cancels. A sitting, from one start to the next, is the median of these, which single
disturbed steps hardly move; the estimate is the mean of the sittings. What most steps of a kind do not do, a costly
update in every third, say, the median does not see; where the ratio of means is outside of the interval, `sentences`
says so. The error is Student's, of the sittings, times sqrt((1 + r) / (1 - r)) with r their lag-1 autocorrelation
(corrected for its bias, Kendall 1954; at least 0), which slow changes of the ratio make large.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats
from tqdm import tqdm

from data.files import whole_file
from data.processes import die_with_parent, end_group
from leaderboard import records
from leaderboard.records import Record, shared_config
from leaderboard.reproduce import ROOT, fetched, unpack_source
from leaderboard.runs import Run

SITTINGS = 6
ROUNDS = 20  # of a sitting
LEAST_ROUNDS = 8
OF_A_DUEL = ("train_files", "val_files", "log_every", "val_every")  # settings that are a duel's own
DECIDES = "wall"  # what a leaderboard's clock shows; CPU time is told beside it
CLOCKS = {"wall": 0, "cpu": 1}


class Turn(NamedTuple):
    side: str  # a or b
    kind: int  # of that side's kinds
    start_s: float  # by the machine's clock; 0 is the first turn's
    wall_s: float
    cpu_s: float  # of the whole process


class Ratio(NamedTuple):
    """A's time over B's; 95% interval."""

    estimate: float
    low: float
    high: float


def ratio(logs: Sequence[Sequence[float]]) -> Ratio:
    """Of the log ratios of each sitting."""
    medians = np.median(np.asarray(logs, dtype=float), axis=1)
    n, deviations = len(medians), medians - medians.mean()
    square = float(deviations @ deviations)
    r = float(deviations[1:] @ deviations[:-1]) / square if square else 0.0
    r = min(0.9, max(0.0, r + (1 + 3 * r) / n))
    error = np.sqrt(square / (n - 1) / n * (1 + r) / (1 - r))
    half = stats.t.ppf(0.975, n - 1) * error
    return Ratio(*(float(np.exp(medians.mean() + shift)) for shift in (0, -half, half)))


def order(round_index: int, kinds: dict[str, int]) -> list[tuple[str, int]]:
    """The turns of a sitting's round: (side, kind), every kind of one side, then of the other."""
    sides = ("a", "b") if round_index % 2 == 0 else ("b", "a")
    return [(side, kind) for side in sides for kind in range(kinds[side])]


def results(turns: Sequence[Turn], counts: Mapping[str, Sequence[int]]) -> dict[str, dict[str, float]]:
    """What the turns amount to, by clock: seconds of a whole run of each side (from medians of the steps that count)
    and of all its turns, and the ratio."""
    found = {}
    for clock, place in CLOCKS.items():
        times = {side: turn_times(turns, side, len(of_kinds), place) for side, of_kinds in counts.items()}
        seconds = {f"{side}_s": float(np.median(own(times[side], side), axis=(1, 2)) @ of_kinds)
                   for side, of_kinds in counts.items()}  # fmt: skip
        a, b = (np.tensordot(counts[side], own(times[side], side), 1) for side in ("a", "b"))  # [sittings, rounds]
        logs = np.log(a) - (np.log(b[:, :-1]) + np.log(b[:, 1:])) / 2
        turns_s = {f"{side}_turns_s": float(of_side.sum()) for side, of_side in times.items()}
        found[clock] = seconds | turns_s | ratio(logs.tolist())._asdict()
    return found


def turn_times(turns: Sequence[Sequence[Any]], side: str, kinds: int, place: int) -> np.ndarray:
    """Seconds of a side's turns by one clock, [kinds, rounds]."""
    of_kinds = [[turn[3 + place] for turn in turns if tuple(turn[:2]) == (side, kind)] for kind in range(kinds)]
    return np.array(of_kinds, dtype=float)


def own(times: np.ndarray, side: str) -> np.ndarray:
    """Of [kinds, rounds] those that follow the side's own, [kinds, sittings, rounds]: B's of every second round, and
    A's between two of these."""
    pairs = times.reshape(len(times), SITTINGS, -1, 2)
    return pairs[..., 1:, 0] if side == "a" else pairs[..., 1]


def fingerprint(run: Run) -> str:
    """Of a run's source and settings, as it logged them; without those in which the runs of a record and a duel of it
    differ."""
    settings = {key: value for key, value in shared_config(run).items() if key not in OF_A_DUEL}
    content = json.dumps([run.log.sources, settings], sort_keys=True)
    return sha256(content.encode()).hexdigest()


# The duel itself


@dataclass
class Side:
    """A process that waits for its turns."""

    name: str
    steps: int  # of its run
    run: Run  # what it logged: source, settings, machine
    kinds: list[dict[str, Any]]
    ask: Callable[[int], list[float]]  # to take a step of a kind: start, wall and CPU seconds

    def described(self) -> dict[str, Any]:
        return dict(name=self.name, fingerprint=fingerprint(self.run), steps=self.steps, kinds=self.kinds)


def check(a: Record | Path, b: Record | Path) -> None:
    """Raises ValueError for what cannot take turns."""
    entered = [each for each in (a, b) if isinstance(each, Record)]
    if len(entered) == 2 and entered[0].path == entered[1].path:
        raise ValueError(f"{entered[0].name} cannot duel with itself; name two records")
    if len({record.path.parent.name for record in entered}) == 2:
        raise ValueError(f"{entered[0].name} and {entered[1].name} are of two tracks; name two records of one track")
    for record in entered:
        if record.is_foreign:
            raise ValueError(f"{record.name} is a foreign log; its source is not this repository's to run")
        if record.runs[0].log.facts["world_size"] != 1:
            raise ValueError(f"{record.name} ran on several ranks; a duel takes one process each")


@contextmanager
def side(which: Record | Path, data_files: dict[str, str]) -> Iterator[Side]:
    """A record's, or of this checkout with a recipe, ready for its turns. Raises ValueError if it ends before."""
    with tempfile.TemporaryDirectory(prefix="duel-") as folder, ExitStack() as stack:
        tree = Path(folder)
        if isinstance(which, Record):
            name, steps, recipe, source = which.path.name, which.steps, str(tree / "record.toml"), tree
            unpack_source(which.runs[0], tree)
        else:
            name, steps, recipe, source = str(which), 0, str(which.resolve()), ROOT
        settings = dict(data_files, run_dir=str(tree / "runs"), log_every=str(10**6), val_every=str(10**6))
        ours, theirs = socket.socketpair()
        said = stack.enter_context((tree / "said.txt").open("w+", encoding="utf-8", errors="replace"))
        variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
        process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("duelist.py")), str(theirs.fileno()), str(steps),
             recipe, *(f"--{key}={value}" for key, value in settings.items())],
            cwd=source, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env={**variables, "PYTHONUTF8": "1"},
            pass_fds=[theirs.fileno()], start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        stack.callback(end_group, process)
        theirs.close()
        stack.enter_context(ours)
        answers = stack.enter_context(ours.makefile(encoding="utf-8"))

        def hear(question: str = "") -> Any:
            try:
                ours.sendall(question.encode())
                return json.loads(answers.readline())
            except (ValueError, OSError):
                said.seek(0)
                last = "\n".join(said.read().strip().splitlines()[-8:])
                raise ValueError(f"{name} ended before the duel did; its last lines:\n{last}") from None

        def ask(kind: int) -> list[float]:
            return hear(f"{kind}\n")

        ready = hear()
        (log,) = (tree / "runs").glob("*/log.txt")
        run = Run(name, {"log.txt": log.read_text(encoding="utf-8")})
        yield Side(name, steps or ready["train_steps"], run, ready["kinds"], ask)


def duel(a: Record | Path, b: Record | Path, rounds: int) -> dict[str, Any]:
    """Let them take turns, `rounds` in each sitting; what is kept of it. Raises ValueError."""
    if rounds < LEAST_ROUNDS or rounds % 2:
        raise ValueError(f"rounds = {rounds} must be even and at least {LEAST_ROUNDS}; {ROUNDS} is usual")
    check(a, b)
    both, started, turns = dict(a=a, b=b), datetime.now(UTC), list[Turn]()
    data_files = {key: prepared(which) for key, which in both.items()}
    with tqdm(total=SITTINGS * rounds, desc="taking turns", unit="round", leave=False, disable=None) as bar:
        for sitting in range(SITTINGS):
            with ExitStack() as stack:
                keys = list(both)[:: 1 if sitting % 2 == 0 else -1]
                sides = {key: stack.enter_context(side(both[key], data_files[key])) for key in keys}
                machines = {key: each.run.hardware for key, each in sides.items()}
                if machines["a"] != machines["b"]:
                    raise ValueError(f"a runs on {machines['a']}, b on {machines['b']}; set one device in both recipes")
                kinds = {key: len(each.kinds) for key, each in sides.items()}
                for index in range(rounds):
                    turns += [Turn(key, kind, *sides[key].ask(kind)) for key, kind in order(index, kinds)]
                    bar.update()
    first, run = turns[0].start_s, sides["a"].run
    turns = [Turn(*turn[:2], *(round(s, 6) for s in (turn.start_s - first, *turn[3:]))) for turn in turns]
    return dict(
        start_utc=f"{started:%Y-%m-%dT%H:%M:%SZ}", hardware=run.hardware, dtype=run.log.facts["dtype"],
        versions=run.log.facts["versions"], threads=os.cpu_count(), a=sides["a"].described(),
        b=sides["b"].described(), decides=DECIDES,
        results=results(turns, {key: [kind["steps"] for kind in each.kinds] for key, each in sides.items()}),
        turns=turns,
    )  # fmt: skip


def prepared(which: Record | Path) -> dict[str, str]:
    """The settings that name its data; those that are missing and can be fetched are. Raises ValueError, also for a
    recipe that the trainer refuses."""
    if isinstance(which, Record):
        run = which.runs[0]
        return fetched(run.config, run.tokens_at(run.config["train_steps"]))
    from train_gpt import load_config, plan_step  # brings torch along, which reading a log does without

    config = load_config([str(which)])
    return fetched(dataclasses.asdict(config), plan_step(config, config.train_steps).first_token)


def ratio_of_means(found: dict[str, Any]) -> float:
    """A's wall time over B's, by the mean of each kind of step."""
    seconds = dict[str, float]()
    for key in ("a", "b"):
        counts = [kind["steps"] for kind in found[key]["kinds"]]
        counted = own(turn_times(found["turns"], key, len(counts), CLOCKS["wall"]), key)
        seconds[key] = float(counted.mean(axis=(1, 2)) @ counts)
    return seconds["a"] / seconds["b"]


def sentences(found: dict[str, Any]) -> list[str]:
    """What a duel says, as strongly as it can."""
    a, b = found["a"]["name"], found["b"]["name"]
    lines = [f"{found['hardware']}, {found['dtype']}; {SITTINGS} sittings, {len(found['turns']):,} turns"]
    for clock, result in found["results"].items():
        told = f"{a} {result['a_s']:.2f} s, {b} {result['b_s']:.2f} s"
        interval = f"{result['estimate']:.4f} (95% CI {result['low']:.4f} to {result['high']:.4f})"
        lines.append(f"{clock} time of all steps: {told}; ratio {interval}")
    result = found["results"][found["decides"]]
    if result["low"] <= 1 <= result["high"]:
        lines.append(f"The duel cannot tell which is faster ({found['decides']} time decides).")
    else:
        faster, slower, share = (a, b, result["estimate"]) if result["high"] < 1 else (b, a, 1 / result["estimate"])
        lines.append(f"{faster} takes {share:.1%} of the time of {slower} ({found['decides']} time decides).")
    if not result["low"] <= (of_means := ratio_of_means(found)) <= result["high"]:
        why = "the machine was busy, or some steps do work that most do not, which the ratio above leaves out"
        lines.append(f"By means instead of medians the ratio is {of_means:.4f}: {why}.")
    return lines


def file_name(found: dict[str, Any]) -> str:
    return f"{found['start_utc'][:10]}_{found['a']['name']}_against_{found['b']['name']}.json"


def duels_folder() -> Path:
    return records.RECORDS.with_name("duels")


def place(track: str, found: dict[str, Any]) -> Path:
    """Of a duel that is kept: of two records in this order, one a day."""
    return duels_folder() / track / file_name(found)


def save(found: dict[str, Any], track: str) -> Path:
    """Write it to its place; returns that."""
    path = place(track, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    turns = ",\n".join(json.dumps(turn) for turn in found["turns"])
    head = json.dumps({key: value for key, value in found.items() if key != "turns"}, indent=1).removesuffix("\n}")
    with whole_file(path) as file:
        file.write(f'{head},\n "turns": [\n{turns}\n]\n}}\n')
    return path
