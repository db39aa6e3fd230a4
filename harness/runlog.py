"""The run's log: its directory (log.txt, metrics.jsonl, summary.json), and what the terminal shows of it."""

import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data.console import first_line
from data.files import try_lock, user_path, wait_for_lock, write_json
from data.processes import is_alive, pid_scope, start_ticks
from data.shards import DataError
from data.tokenizer import token_bytes
from harness.log_format import RULER, bits_per_byte, ending, is_before_step, join_sources, step_line
from harness.machine import ROOT, Machine, git_state, launcher, output_of, versions
from harness.reporters import Reporter, check_reporters, numbers_in, open_reporters
from optim import MatrixOptimizer

LONGEST_NAME = 255 - len("-20261122T033309Z-9823dd")  # bytes; the latter is what makes a run directory's name unique


def check_name(name: str) -> None:
    """ValueError unless `name` can begin a directory's name, and stay within the folder that is in."""
    if re.match(r"\w", name) and "/" not in name and name.isprintable() and len(name.encode()) <= LONGEST_NAME:
        return
    works = re.sub(r"[^\w.,=:+%@-]+", "_", name).lstrip("_.,=:+%@-").encode()[:LONGEST_NAME].decode(errors="ignore")
    raise ValueError(
        f"name = {name[:100]!r} must begin with a letter, a digit or _ and have no /, no control characters "
        f"and at most {LONGEST_NAME} bytes: the run directory's name begins with it; {works[:100] or 'run'!r} works"
    )


def run_sources(matrix_optimizer: str = "") -> dict[str, str]:
    """Source of every module of this repository that was imported, and of one outside that `matrix_optimizer` names as
    module:Class, by path: a log that can be run again."""
    files = [Path(str(getattr(module, "__file__", None))) for module in list(sys.modules.values())]
    paths = {file.resolve() for file in files if file.suffix == ".py" and file.is_absolute()}
    pythons = [prefix for prefix in (Path(sys.prefix), Path(sys.base_prefix)) if ROOT in prefix.parents]
    sources = {}
    for path in sorted(path for path in paths if ROOT in path.parents):
        name = path.relative_to(ROOT)
        is_installed = "site-packages" in name.parts or any(prefix in path.parents for prefix in pythons)
        if is_installed or any(part.startswith(".") for part in name.parts):  # .venv; .cache/inductor
            continue
        try:
            sources[str(name)] = path.read_text(encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            sources[str(name)] = f"# imported, and cannot be read now: {error.strerror}\n"
    if (module := matrix_optimizer.partition(":")[0]) in sys.modules:
        sources.setdefault(module.replace(".", "/") + ".py", inspect.getsource(sys.modules[module]))
    return sources


WRITER = "writer.json"  # beside log.txt: which process writes it


class RunLog:
    """The run directory and the terminal, written by the first rank; other ranks' calls do nothing.

    log.txt opens with all the run was made of: sources, state of git, of the GPUs, and `facts` as JSON. Every line is
    flushed: a killed run leaves a whole log. The first rank holds a lock on it as long as it lives, and writer.json
    says who that is, for file systems without locks (see is_running). `config` is the trainer's Config, `data` the
    fingerprints of train_files and val_files, `lineage` the names of the run directories that this one goes on from.
    Raises ValueError, on every rank, for a directory that cannot be made, or a service that is not installed.
    """

    def __init__(self, config: Any, machine: Machine, data: dict[str, str], lineage: Sequence[str] = ()) -> None:
        self.active, self.target = machine.rank == 0, config.target_loss
        self.bar = tqdm(total=config.train_steps, unit="step", dynamic_ncols=True, leave=False,
                        disable=not (self.active and _has_terminal()))  # fmt: skip
        self.validations: list[tuple[float, float]] = []  # (train_time_s, val_loss)
        commit, no_commit = git_state()  # or the reason why there is none
        self.notes = [f"no git commit: {no_commit}"] if no_commit else []
        self.facts = dict(  # what a summary repeats and a record is checked against
            start_utc=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), git_commit=commit, track=config.track,
            world_size=machine.world_size, device=machine.name, dtype=str(machine.dtype), versions=versions(),
            train_fingerprint=data["train_files"], val_fingerprint=data["val_files"], config=dataclasses.asdict(config),
        )  # fmt: skip
        stamp = self.facts["start_utc"].replace("-", "").replace(":", "")
        name, problem = f"{config.name}-{stamp}-{secrets.token_hex(3)}", None
        self.directory = user_path(Path(config.run_dir, name))
        self.reporters: list[Reporter] = []
        if self.active:
            try:
                check_reporters(config.report_to)
                self._open(machine, lineage)
            except ValueError as error:
                problem = str(error)
            except OSError as error:
                why = f"cannot be written ({error.strerror or error})"
                problem = f"run_dir = {config.run_dir!r} {why}; choose another, such as /tmp/runs"
        machine.raise_together(problem)
        self.directory = machine.share(self.directory) or self.directory  # the first rank's

    def _open(self, machine: Machine, lineage: Sequence[str]) -> None:
        """Make the directory with what it begins with, or nothing of it."""
        header = [join_sources(run_sources(self.facts["config"]["matrix_optimizer"])), RULER, f"python {sys.version}"]
        state = f"{self.facts['git_commit']}\n{output_of('git', 'status', '--short')}"
        header += [f"git ({self.notes[0]})" if self.notes else f"git {state}"]
        header += [f"{machine.world_size} x {machine.name}\n{output_of('nvidia-smi')}"]
        header += [json.dumps(self.facts, indent=1), RULER]
        self.directory.mkdir(parents=True)
        try:
            self.log, self.metrics = (
                (self.directory / name).open("w", encoding="utf-8", errors="backslashreplace")
                for name in ("log.txt", "metrics.jsonl")
            )
            writer = dict(
                pid=os.getpid(), start_ticks=start_ticks(os.getpid()), pid_scope=pid_scope(),
                has_lock=wait_for_lock(self.log), agent=launcher(), job=machine.job, lineage=lineage,
            )  # fmt: skip
            write_json(self.directory / WRITER, writer, indent=1)
            self.log.write("\n".join(header) + "\n")
            self.log.flush()
            self.reporters = open_reporters(self.facts["config"]["report_to"], self.directory, self.facts["config"])
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise

    def line(self, text: str) -> None:
        if self.active:
            print(text, file=self.log, flush=True)
            with contextlib.suppress(OSError, ValueError), self.bar.external_write_mode(file=sys.stdout):
                print(text, flush=True)  # for whoever is there

    def metric(self, **values: Any) -> None:
        if self.active:
            print(json.dumps(values), file=self.metrics, flush=True)
            self._report(values)
        if "val_loss" in values:
            self.validations.append((values["train_time_s"], values["val_loss"]))
            self.bar.set_postfix_str(f"val_loss {values['val_loss']:.3f}{self._eta_to_target()}")

    def _report(self, values: dict[str, Any]) -> None:
        step, numbers = values["step"], dict(numbers_in(values))
        del numbers["step"]
        self._each_reporter(lambda reporter: reporter.write(numbers, step))

    def _each_reporter(self, action: Callable[[Reporter], None]) -> None:
        """One that fails is left out from then on: the run does not depend on it."""
        for reporter in list(self.reporters):
            try:
                action(reporter)
            except Exception as error:  # whatever the package raises
                self.reporters.remove(reporter)
                self.line(f"report_to: a service has failed and gets no more metrics ({first_line(error)})")

    def continue_from(self, checkpoint: str, step: int) -> None:
        """Say so, and take over the earlier run's steps up to the checkpoint: this directory then has all of them."""
        self.bar.update(step)
        earlier = Path(checkpoint).parent
        if not self.active:
            return
        try:
            log, metrics = ((earlier / name).read_text("utf-8-sig", "replace") for name in ("log.txt", "metrics.jsonl"))
        except OSError:
            self.line(f"resumed from {checkpoint} at step {step}; there is no log beside it")
            return
        self.line(f"resumed from {checkpoint} at step {step}; in log.txt, its lines up to there:")
        for line in log.rpartition(RULER)[2].splitlines():
            if is_before_step(line, step):
                print(line, file=self.log)
        for line in metrics.splitlines():
            with contextlib.suppress(ValueError, LookupError, TypeError):  # a killed run's last line, or not ours
                if json.loads(line)["step"] <= step:
                    print(line, file=self.metrics)
                    self._report(json.loads(line))
        self.log.flush()
        self.metrics.flush()

    def _eta_to_target(self) -> str:
        """Where a line through the last two validations crosses the target."""
        if not self.target or len(self.validations) < 2:
            return ""
        (time_0, loss_0), (time_1, loss_1) = self.validations[-2:]
        if loss_1 <= self.target or loss_0 <= loss_1:
            return ""
        return f", target {self.target:g} in ~{(loss_1 - self.target) * (time_1 - time_0) / (loss_0 - loss_1):.0f}s"

    def summary(self, values: dict[str, Any]) -> None:
        """Write summary.json under its name only when it is whole."""
        if self.active:
            write_json(self.directory / "summary.json", values, indent=1)

    def closing(self, summary: dict[str, Any]) -> None:
        """End the terminal's output with what people look for in a summary."""
        self.line("---")
        for word, text in (ending(summary, self.target) | {"directory": str(self.directory)}).items():
            self.line(f"{word:<12} {text}")
        self._each_reporter(lambda reporter: reporter.close())


def write_loss(run: Any, log: RunLog, kind: str, step: int, tokens: int, loss: float, **values: float) -> None:
    """Write a loss, with what has gathered in run.extra, to log and metrics; `run` is the trainer's Run, `kind` val or
    train. Raises FloatingPointError for a loss, or a gradient since the last call, that is not finite."""
    if isinstance(run.optimizers[0], MatrixOptimizer):
        run.optimizers[0].raise_if_not_finite()
    if not math.isfinite(loss):
        what = dict(val="validation", train="training")[kind]
        raise FloatingPointError(f"the {what} loss is {loss}; lower the learning rates")
    found = {name: torch.as_tensor(value).item() for name, value in run.extra.items()}
    extra = {name: value if math.isfinite(value) else None for name, value in found.items()}  # for JSON
    seconds = run.clock.seconds["train"]
    run.extra.clear()
    if kind == "val":
        values |= of_text(run, log, loss)
    run.summary["extra"] = run.summary.get("extra", {}) | extra
    further: dict[str, Any] = values | ({"extra": extra} if extra else {})
    log.metric(step=step, tokens=tokens, train_time_s=seconds, **{f"{kind}_loss": loss}, **further)
    log.line(step_line(kind, step, run.config.train_steps, loss, seconds, extra))


def of_text(run: Any, log: RunLog, loss: float) -> dict[str, float]:
    """A validation loss in bits per byte, if that is known; the summary keeps the number of bytes."""
    if log.active and run.summary["val_bytes"] is None:
        run.summary["val_bytes"] = validation_bytes(run)
    found = bits_per_byte(loss, run.config.val_tokens, run.summary["val_bytes"])
    return {} if found is None else {"bits_per_byte": found}


def validation_bytes(run: Any) -> int:
    """Bytes of text that a run's validation tokens (as targets) stand for, by the trainer's Run; 0 where that says
    nothing, for masked tokens, or is unknown, for ids of the user's own or without the tokenizer's files."""
    config = run.config
    if config.tokenizer == "none" or config.objective != "causal":
        return 0
    try:
        return int(token_bytes(config.tokenizer)[run.val_stream.read(1, config.val_tokens)].sum())
    except DataError:
        return 0


def _has_terminal() -> bool:
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no stream, or a closed one
        return sys.stderr.isatty()
    return False


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(values, dict):
            return values
    return {}


def is_running(directory: Path, job: Collection[str] = ()) -> bool | None:
    """Whether the process that writes this run directory is alive, None where nobody can tell. `job`: this process's
    own torchrun agents.

    The lock on log.txt tells it, except where it could not be taken: then a run that has a summary is over, a process
    of this machine can be looked up, and an agent has ended its ranks before it starts others.
    """
    writer = read_json(directory / WRITER)
    try:
        with (directory / "log.txt").open("rb") as file:
            is_free = try_lock(file, shared=True)
    except FileNotFoundError:
        is_free = None if writer else True
    except OSError:
        is_free = None
    if is_free is False:
        return True
    if read_json(directory / "summary.json").get("status"):
        return False
    if writer.get("pid_scope") and writer["pid_scope"] == pid_scope():
        return writer["pid"] != os.getpid() and is_alive(writer["pid"], writer["start_ticks"])
    if writer.get("agent") and writer["agent"] in job:
        return False
    return False if is_free and writer.get("has_lock", True) else None
