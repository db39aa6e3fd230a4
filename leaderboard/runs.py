"""One run as its files tell it: what log.txt, metrics.jsonl and summary.json say, not yet whether they agree.

`Run` is a run directory of this repository's trainer (harness/runlog.py says what is in it), `Log` the text form alone,
which other speedruns write as well (harness/log_format.py).

Files come from strangers: whatever has not the form it should have is put into `broken` and left out, so that the rest
of the leaderboard deals with numbers that are numbers.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from harness.log_format import RULER, Line, parse_step_line, split_sources

FILES = ("log.txt", "metrics.jsonl", "summary.json")
LIKE_A_LINE = re.compile(r"step:\d+/\d+\s+val_loss:")
ROW = {"step": int, "tokens": int, "train_time_s": float}  # of metrics.jsonl, with one of the two below
ROW_KINDS: dict[str, dict[str, type]] = {"val": {"val_loss": float}, "train": {"train_loss": float, "lr_scale": float}}
DERIVED = {"val": {"bits_per_byte"}, "train": set[str]()}  # what newer runs have besides
BETWEEN_STEPS = {  # what shares the machine with a run
    "neurons": "metrics.jsonl has neuron statistics, which share the machine; a record's go without: neuron_stats = 0",
    "tasks": "metrics.jsonl has results of tasks, which share the machine; a record's go without: eval_every = 0",
}
FACTS = {  # RunLog.facts in harness/runlog.py
    "start_utc": str, "git_commit": str, "track": str, "world_size": int, "device": str, "dtype": str,
    "versions": dict, "train_fingerprint": str, "val_fingerprint": str, "config": dict,
}  # fmt: skip
CONFIG = {  # the settings that are used here
    "seed": int, "batch_tokens": int, "val_every": int, "log_every": int, "train_steps": int, "val_tokens": int,
    "vocab_size": int, "target_loss": float, "stop_at_target": bool, "name": str, "track": str, "tokenizer": str,
    "train_files": str, "val_files": str,
}  # fmt: skip
LATER = {"small_batch_steps": int}  # the same, which older runs do not have
SCHEDULE = ("train_steps", "batch_tokens", "small_batch_steps")  # what decides how many tokens a step has seen


class Validation(NamedTuple):
    step: int
    time_s: float  # on the clock, from the start of training
    loss: float  # nats per token


@dataclass
class Log:
    """log.txt taken apart. Anything that is missing is empty."""

    rulers: int = 0  # lines of 100 =
    sources: dict[str, str] = field(default_factory=dict)  # path in the repository -> text
    machine: list[str] = field(default_factory=list)  # lines between the two rulers, before the facts
    facts: dict[str, Any] = field(default_factory=dict)
    lines: list[Line] = field(default_factory=list)  # in the order of the file
    notes: list[str] = field(default_factory=list)  # whatever else stands before ---
    ending: dict[str, str] = field(default_factory=dict)  # the block after ---: its first words -> the rest
    broken: list[str] = field(default_factory=list)

    @property
    def validations(self) -> list[Validation]:
        return [Validation(line.step, line.time_s, line.loss) for line in self.lines if line.kind == "val"]


def parse_log(text: str) -> Log:
    """Any log whose step lines have one of the two forms above; sources and facts where it is this repository's."""
    log = Log()
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")  # as other systems' editors and shells leave it
    head, *rest = f"\n{text}".split(f"\n{RULER}\n")
    log.rulers = len(rest)
    if rest:
        for path, source in split_sources(head.removeprefix("\n")):
            if path in log.sources:
                log.broken.append(f"log.txt has the source of {path} twice")
            log.sources[path] = source
    if len(rest) == 2:
        machine, _, facts = rest[0].partition("\n{\n")
        log.machine = machine.splitlines()
        if facts:
            log.facts = _typed(_json("{" + facts, "the facts in log.txt", log.broken), FACTS, "the facts", log.broken)
            later = {key: kind for key, kind in LATER.items() if key in log.facts.get("config", {})}
            if log.facts and not _typed(log.facts["config"], CONFIG | later, "the settings", log.broken):
                log.facts = {}
    body, _, ending = (rest[-1] if rest else head).partition("\n---\n")
    for line in body.splitlines():
        if found := parse_step_line(line):
            log.lines.append(found)
        elif LIKE_A_LINE.search(line):
            log.broken.append(f"log.txt: {line[:100]!r} is not a step line")
        else:
            log.notes.append(line)
    for line in ending.splitlines():
        if LIKE_A_LINE.search(line):
            log.broken.append(f"log.txt has a step line after ---: {line[:100]!r}")
        word, _, rest_of_line = line.partition(" ")
        if word:
            log.ending.setdefault(word, rest_of_line.strip())
    return log


def _json(text: str, where: str, broken: list[str]) -> dict[str, Any]:
    """A JSON object; empty, with a word in `broken`, for anything else."""
    try:
        value = json.loads(text, object_pairs_hook=_each_key_once)
    except (ValueError, RecursionError) as error:
        broken.append(f"{where} cannot be read as JSON ({error})")
        return {}
    if isinstance(value, dict):
        return value
    broken.append(f"{where} is not a JSON object")
    return {}


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _typed(values: Any, kinds: dict[str, type], where: str, broken: list[str]) -> dict[str, Any]:
    """`values` if each of the keys is there with a value of its kind, else empty with a word in `broken`."""
    for key, kind in kinds.items():
        if not isinstance(values, dict) or key not in values:
            broken.append(f"{where}: there is no {key}")
            return {}
        if not _is(values[key], kind):
            broken.append(f"{where}: {key} is {short(values[key])}, not {kind.__name__}")
            return {}
    return values


def _is(value: Any, kind: type) -> bool:
    """Whether JSON's value is of this kind; numbers no larger than a float has digits for."""
    if kind in (int, float):
        numeric = (int, float) if kind is float else int
        return isinstance(value, numeric) and not isinstance(value, bool) and not abs(value) > 2**53
    return isinstance(value, kind)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


@dataclass
class Run:
    """One seed: its three files as text, and what they say."""

    name: str  # in messages: seed 3
    texts: dict[str, str]  # file name -> content; empty where the file is missing
    log: Log = field(init=False)
    metrics: list[dict[str, Any]] = field(init=False)
    summary: dict[str, Any] = field(init=False)
    broken: list[str] = field(default_factory=list)  # what cannot be read, and why

    def __post_init__(self) -> None:
        self.log, self.metrics, self.summary = parse_log(self.texts.get("log.txt", "")), [], {}
        self.broken += self.log.broken
        for number, line in enumerate(self.texts.get("metrics.jsonl", "").splitlines(), start=1):
            where = f"metrics.jsonl line {number}"
            row = _json(line, where, self.broken)
            if extras := [reason for key, reason in BETWEEN_STEPS.items() if key in row]:
                self.broken += [reason for reason in extras if reason not in self.broken]
                continue
            kind = "val" if "val_loss" in row else "train"
            kinds = ROW | ROW_KINDS[kind]
            if _typed(row, kinds, where, self.broken):
                self.metrics.append(row)
                known = kinds.keys() | DERIVED[kind] | {"extra"}  # where a run's own metrics may stand
                if unknown := sorted(row.keys() - known):
                    self.broken.append(f"{where} has {unknown}, which no trainer here writes")
        if self.texts.get("summary.json"):
            self.summary = _json(self.texts["summary.json"], "summary.json", self.broken)

    @property
    def is_foreign(self) -> bool:
        """Whether there is a log and nothing else: another speedrun's."""
        return not self.texts.get("metrics.jsonl") and not self.texts.get("summary.json")

    @property
    def config(self) -> dict[str, Any]:
        return self.log.facts.get("config", {})

    def tokens_at(self, step: int) -> int:
        """Tokens trained on by then, by the schedule in the settings; -1 if that is none."""
        return -1 if isinstance(self.schedule, str) else self.schedule(step).first_token

    @cached_property
    def schedule(self) -> Callable[[int], Any] | str:
        """From a step to its StepPlan, as far as tokens go; or why the settings have none."""
        from train_gpt import Config, plan_step  # brings torch along, which reading a log does without

        try:
            return partial(plan_step, Config(**{key: self.config[key] for key in SCHEDULE if key in self.config}))
        except ValueError as error:
            return str(error)

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    @cached_property
    def validations(self) -> list[Validation]:
        """From metrics.jsonl, which has all digits; from the log where there is nothing else."""
        if self.is_foreign:
            return self.log.validations
        rows = [row for row in self.metrics if "val_loss" in row]
        return [Validation(row["step"], row["train_time_s"], row["val_loss"]) for row in rows]

    @property
    def last(self) -> Validation:
        """The last validation: where the clock stopped. Without any, step -1 and nan."""
        return self.validations[-1] if self.validations else Validation(-1, math.nan, math.nan)

    @cached_property
    def train_losses(self) -> dict[int, float]:
        """Step -> training loss; validation losses where there are no others."""
        rows = {row["step"]: row["train_loss"] for row in self.metrics if "train_loss" in row}
        lines = {line.step: line.loss for line in self.log.lines if line.kind == "train"}
        return rows or lines or {v.step: v.loss for v in self.validations if v.step}

    @property
    def hardware(self) -> str:
        facts = self.log.facts
        return f"{facts['world_size']} x {facts['device']}" if facts else ""


def read_text(path: Path) -> str:
    """To the byte, line ends included. Raises ValueError for what is not UTF-8."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error})") from None


def read_run(directory: Path) -> Run:
    """A run directory. Raises ValueError for one that is none or not complete."""
    if missing := [name for name in FILES if not (directory / name).is_file()]:
        why = f"is not the directory of a run that ended: it has no {', '.join(missing)}"
        works = (
            "name one such as runs/sotu_cpu-20261122T033309Z-9823dd, or say --foreign for another speedrun's log file"
        )
        raise ValueError(f"{directory} {why}; {works}")
    return Run(directory.name, {name: read_text(directory / name) for name in FILES})
