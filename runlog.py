"""The run's log: its directory (log.txt, metrics.jsonl, summary.json), and what the terminal shows of it."""

import contextlib
import dataclasses
import fcntl
import json
import re
import secrets
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from machine import Machine, git_commit, output_of, versions
from neuron_stats import in_words

ROOT = Path(__file__).resolve().parent


def run_sources() -> dict[str, str]:
    """Source of every module of this repository that was imported, by path: a log that can be run again."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    paths = {Path(file).resolve() for file in files if file and Path(file).is_file()}
    own = sorted(path.relative_to(ROOT) for path in paths if path.is_relative_to(ROOT))
    return {str(path): (ROOT / path).read_text(encoding="utf-8") for path in own if "site-packages" not in path.parts}


class RunLog:
    """The run directory and the terminal, written by the first rank; other ranks' calls do nothing.

    log.txt opens with all the run was made of: sources, state of git, of the GPUs, and `facts` as JSON. Every line is
    flushed: a killed run leaves a whole log. The first rank holds a lock on it as long as it lives. `config` is the
    trainer's Config, `data` the fingerprints of train_files and val_files. Raises ValueError, on every rank, for a
    directory that cannot be made.
    """

    def __init__(self, config: Any, machine: Machine, data: dict[str, str]) -> None:
        self.active, self.target = machine.rank == 0, config.target_loss
        self.bar = tqdm(total=config.train_steps, unit="step", dynamic_ncols=True, leave=False,
                        disable=not (self.active and sys.stderr.isatty()))  # fmt: skip
        self.validations: list[tuple[float, float]] = []  # (train_time_s, val_loss)
        self.facts = dict(  # what a summary repeats and a record is checked against
            start_utc=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), git_commit=git_commit(), track=config.track,
            world_size=machine.world_size, device=machine.name, dtype=str(machine.dtype), versions=versions(),
            train_fingerprint=data["train_files"], val_fingerprint=data["val_files"], config=dataclasses.asdict(config),
        )  # fmt: skip
        stamp = self.facts["start_utc"].replace("-", "").replace(":", "")
        self.directory, problem = Path(config.run_dir) / f"{config.name}-{stamp}-{secrets.token_hex(3)}", None
        if self.active:
            try:
                self.directory.mkdir(parents=True)
            except OSError as error:
                problem = (
                    f"run_dir = {config.run_dir!r} cannot be written ({error.strerror}); choose another, such as "
                    "/tmp/runs"
                )
        problem = machine.agree(problem)
        if problem:
            raise ValueError(problem)
        self.directory = machine.agree(self.directory) or self.directory  # the first rank's
        if not self.active:
            return
        self.log, self.metrics = (
            (self.directory / name).open("w", encoding="utf-8") for name in ("log.txt", "metrics.jsonl")
        )
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        header = [f"# file: {path}\n{source}" for path, source in run_sources().items()]
        header += ["=" * 100, f"python {sys.version}"]
        header += [f"git {self.facts['git_commit']}\n{output_of('git', 'status', '--short')}"]
        header += [f"{machine.world_size} x {machine.name}\n{output_of('nvidia-smi')}"]
        header += [json.dumps(self.facts, indent=1), "=" * 100]
        self.log.write("\n".join(header) + "\n")

    def line(self, text: str) -> None:
        if self.active:
            print(text, file=self.log, flush=True)
            with self.bar.external_write_mode(file=sys.stdout):
                print(text, flush=True)

    def metric(self, **values: Any) -> None:
        if self.active:
            print(json.dumps(values), file=self.metrics, flush=True)
        if "val_loss" in values:
            self.validations.append((values["train_time_s"], values["val_loss"]))
            self.bar.set_postfix_str(f"val_loss {values['val_loss']:.3f}{self._eta_to_target()}")

    def continue_from(self, checkpoint: str, step: int) -> None:
        """Say so, and take over the earlier run's steps up to the checkpoint: this directory then has all of them."""
        self.bar.update(step)
        earlier = Path(checkpoint).parent
        if not self.active:
            return
        if not (earlier / "log.txt").exists() or not (earlier / "metrics.jsonl").exists():
            self.line(f"resumed from {checkpoint} at step {step}; there is no log beside it")
            return
        self.line(f"resumed from {checkpoint} at step {step}; in log.txt, its lines up to there:")
        for line in (earlier / "log.txt").read_text(encoding="utf-8").rpartition("=" * 100)[2].splitlines():
            found = re.match(r"step:(\d+)(/?)", line)  # a line without / is of what came after the checkpoint
            if found and (int(found[1]) < step or (int(found[1]) == step and found[2])):
                print(line, file=self.log)
        for line in (earlier / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run
                if json.loads(line)["step"] <= step:
                    print(line, file=self.metrics)
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
            temporary = self.directory / "summary.json.tmp"
            temporary.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
            temporary.replace(self.directory / "summary.json")

    def closing(self, summary: dict[str, Any]) -> None:
        """End the terminal's output with what people look for in a summary."""
        self.line("---")
        if summary["steps_to_target"] is not None:
            where = f"{summary['steps_to_target']} steps, {summary['tokens_to_target']:,} tokens"
            time_s = summary["time_to_target_s"]
            self.line(f"target       {self.target:g} nats reached after {time_s:.1f} s of training, {where}")
        elif self.target and summary["val_loss"] is not None:
            gap = summary["val_loss"] - self.target
            self.line(f"target       {self.target:g} nats not reached: {gap:.4f} short after {summary['steps']} steps")
        self.line(f"run          {summary['status']}")
        if summary["val_loss"] is not None:
            self.line(f"val_loss     {summary['val_loss']:.5f} nats a token after {summary['tokens']:,} tokens")
        if summary["neurons"]:
            self.line(f"neurons      {in_words(summary['neurons'])}")
        mfu = f", MFU {summary['mfu']:.1%}" if summary["mfu"] else ""
        self.line(f"speed        {summary['tokens_per_s']:,.0f} tokens/s{mfu}")
        machine = f"{summary['world_size']} x {summary['device']}"
        self.line(f"machine      {machine}, peak memory {summary['peak_memory_mib']:,.0f} MiB")
        phases = (f"{phase} {time_s:.1f}" for phase, time_s in summary["phase_s"].items())
        self.line(f"seconds      {', '.join(phases)}")
        self.line(f"directory    {self.directory}")


def is_running(directory: Path) -> bool:
    """Whether the process that writes this run directory is alive, as far as its lock on log.txt says."""
    try:
        with (directory / "log.txt").open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # no log, or a file system without locks
    return False
