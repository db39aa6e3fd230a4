"""One run as its files tell it: what log.txt, metrics.jsonl and summary.json say, not yet whether they agree.

Nothing here checks; leaderboard/verify.py does. `Run` is a run directory of this repository's trainer (runlog.py says
what is in it), `Log` the text form alone, which other speedruns write as well:

    step:125/3250 val_loss:4.58616 train_time:66.065s step_avg:528.52ms
    step:125/1390 val_loss:4.5861 train_time:7930ms step_avg:63.44ms
"""

import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

RULER = "=" * 100
FILES = ("log.txt", "metrics.jsonl", "summary.json")
LINE = re.compile(
    r"step:(?P<step>\d+)/(?P<planned>\d+)\s+(?P<kind>val|train)_loss:(?P<loss>\S+)\s+"
    r"train_time:(?P<time>[\d.]+)(?P<unit>ms|s)(?:\s+step_avg:(?P<step_avg>[\d.]+|nan|inf)ms)?"
)
HAS_STEP = re.compile(r"step:\d+/\d+ +(val|train)_loss:")


class Line(NamedTuple):
    """A step line of a log, in seconds and nats, as far as its digits go."""

    step: int
    planned: int  # steps of the whole schedule
    kind: str  # val or train
    loss: float
    time_s: float
    step_avg_ms: float | None
    half_digit_s: float  # half of the last printed digit of the time


class Validation(NamedTuple):
    step: int
    time_s: float  # on the clock, from the start of training
    loss: float  # nats a token


@dataclass
class Log:
    """log.txt taken apart. Anything that is missing is empty."""

    sources: dict[str, str] = field(default_factory=dict)  # path in the repository -> text
    machine: str = ""  # what stands between the two rulers, before the facts
    facts: dict[str, Any] = field(default_factory=dict)  # RunLog.facts in runlog.py
    lines: list[Line] = field(default_factory=list)  # in the order of the file
    unreadable: list[str] = field(default_factory=list)  # lines that look like a step's and are not
    notes: list[str] = field(default_factory=list)  # whatever else stands before ---
    ending: dict[str, str] = field(default_factory=dict)  # the block after ---: its first words -> the rest

    @property
    def validations(self) -> list[Validation]:
        return [Validation(line.step, line.time_s, line.loss) for line in self.lines if line.kind == "val"]


def parse_log(text: str) -> Log:
    """Any log whose step lines have one of the two forms above; sources and facts where it is this repository's."""
    log = Log()
    head, *rest = f"\n{text}".split(f"\n{RULER}\n")
    if rest:
        log.sources = _sources(head)
        log.machine, _, facts = rest[0].rpartition("\n{\n") if len(rest) > 1 else ("", "", "")
        try:
            log.facts = json.loads("{" + facts) if facts else {}
        except json.JSONDecodeError:
            log.machine = rest[0]
    body, _, ending = (rest[-1] if rest else head).partition("\n---\n")
    for text_line in body.splitlines():
        found = LINE.match(text_line)
        if found:
            log.lines.append(_line(found))
        elif HAS_STEP.match(text_line):
            log.unreadable.append(text_line)
        else:
            log.notes.append(text_line)
    for text_line in ending.splitlines():
        word, _, rest_of_line = text_line.partition(" ")
        if word:
            log.ending.setdefault(word, rest_of_line.strip())
    return log


def _sources(head: str) -> dict[str, str]:
    """The files that begin with `# file: PATH`; another speedrun's log has its one script there, named script."""
    script, *files = head.split("\n# file: ")
    own = [part.split("\n", 1) for part in files if "\n" in part]
    return dict(own) or ({"script": script.removeprefix("\n")} if script else {})


def _line(found: re.Match[str]) -> Line:
    scale = 1e-3 if found["unit"] == "ms" else 1.0
    digits = len(found["time"].partition(".")[2])
    try:
        loss = float(found["loss"])
    except ValueError:
        loss = float("nan")
    step_avg = float(found["step_avg"]) if found["step_avg"] else None
    return Line(
        int(found["step"]), int(found["planned"]), found["kind"], loss, float(found["time"]) * scale, step_avg,
        0.5 * 10**-digits * scale,
    )  # fmt: skip


@dataclass
class Run:
    """One seed: its three files as text, and what they say."""

    name: str  # in messages: seed 3
    texts: dict[str, str]  # file name -> content; empty where the file is missing
    log: Log = field(init=False)
    metrics: list[dict[str, Any]] = field(init=False)
    summary: dict[str, Any] = field(init=False)
    broken: list[str] = field(default_factory=list)  # files that cannot be read, and why

    def __post_init__(self) -> None:
        self.log, self.metrics, self.summary = parse_log(self.texts.get("log.txt", "")), [], {}
        for number, line in enumerate(self.texts.get("metrics.jsonl", "").splitlines(), start=1):
            row = self._json(line, f"metrics.jsonl line {number}")
            if row:
                self.metrics.append(row)
        if self.texts.get("summary.json"):
            self.summary = self._json(self.texts["summary.json"], "summary.json")

    def _json(self, text: str, where: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            self.broken.append(f"{where} is not JSON ({error})")
            return {}
        if not isinstance(value, dict):
            self.broken.append(f"{where} is not a JSON object")
            return {}
        return value

    @property
    def is_foreign(self) -> bool:
        """Whether there is a log and nothing else: another speedrun's."""
        return not self.texts.get("metrics.jsonl") and not self.texts.get("summary.json")

    @property
    def config(self) -> dict[str, Any]:
        found = self.log.facts.get("config")
        return found if isinstance(found, dict) else {}

    @property
    def seed(self) -> int | None:
        found = self.config.get("seed")
        return found if isinstance(found, int) else None

    @cached_property
    def validations(self) -> list[Validation]:
        """From metrics.jsonl, which has all digits; from the log where there is nothing else."""
        if self.is_foreign:
            return self.log.validations
        rows = [row for row in self.metrics if _numbers(row, "step", "train_time_s", "val_loss")]
        return [Validation(row["step"], row["train_time_s"], row["val_loss"]) for row in rows]

    @property
    def last(self) -> Validation:
        """The last validation: where the clock stopped. Without any, all nan."""
        return self.validations[-1] if self.validations else Validation(-1, float("nan"), float("nan"))

    @property
    def hardware(self) -> str:
        facts = self.log.facts
        return f"{facts.get('world_size')} x {facts.get('device')}" if facts else ""


def _numbers(row: dict[str, Any], *keys: str) -> bool:
    return all(isinstance(row.get(key), int | float) for key in keys)


def read_run(directory: Path) -> Run:
    """A run directory. Raises ValueError for one that is none or not complete."""
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise ValueError(
            f"{directory} is not the directory of a run that ended: it has no {', '.join(missing)}; name one such as "
            "runs/sotu_cpu-20261122T033309Z-9823dd, or say --foreign for the log file of another speedrun"
        )
    return Run(directory.name, {name: (directory / name).read_text() for name in FILES})
