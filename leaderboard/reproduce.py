"""Run a record's own source again, with its own settings, on this machine; is what comes out what it says?"""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from data.files import user_path
from data.prepare import ensure
from data.processes import die_with_parent, end_group
from leaderboard.records import Record, config_toml
from leaderboard.runs import Run, read_run

ROOT = Path(__file__).resolve().parent.parent


def unpack_source(run: Run, tree: Path) -> None:
    """Write the logged files and the recipe below `tree`. Raises ValueError for paths that lead out of it."""
    for path, source in run.log.sources.items():
        target = (tree / path).resolve()
        if not target.is_relative_to(tree.resolve()) or target.suffix != ".py":
            raise ValueError(f"the log names a source file {path!r} outside of its repository; nothing was run")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source, encoding="utf-8")
    (tree / "record.toml").write_text(config_toml(run), encoding="utf-8")


def fetched(config: Mapping[str, Any], train_tokens: int) -> dict[str, str]:
    """The settings that name a run's data, found where run.sh has them; what is missing and can be fetched is."""
    base = ROOT if os.access(ROOT, os.W_OK) else Path.cwd()
    files = {key: str(base / user_path(config[key])) for key in ("train_files", "val_files")}
    unit = config["batch_tokens"] if config.get("shard_tail") == "drop" else 0
    ensure(files["train_files"], files["val_files"], train_tokens, unit)
    return files


def run_again(record: Record, seed: int | None, tree: Path) -> Run:
    """Train that seed (None: the first) below `tree`, its output on the terminal; what came out. Data that are missing
    and can be fetched are. Raises ValueError if it failed."""
    run = next((run for run in record.runs if seed in (run.seed, None)), None)
    if run is None:
        raise ValueError(f"{record.name} has no seed {seed}; it has {[run.seed for run in record.runs]}")
    if record.is_foreign or "train_gpt.py" not in run.log.sources:
        raise ValueError(f"{record.name} is a foreign log; its source is not this repository's to run")
    unpack_source(run, tree)
    files = fetched(run.config, run.tokens_at(run.config["train_steps"]))
    settings = {**files, "seed": str(run.seed), "run_dir": str(tree / "runs")}
    world_size = int(run.log.facts["world_size"])
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"] if world_size > 1 else []
    command = [sys.executable, *launch, "train_gpt.py", "record.toml"]
    # run.sh names the checkout in these two where it cannot be written, and its modules are not the record's
    variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    process = subprocess.Popen(  # an older source may read its files as the locale has it
        [*command, *(f"--{key}={value}" for key, value in settings.items())], cwd=tree, stdin=subprocess.DEVNULL,
        env={**variables, "PYTHONUTF8": "1"}, start_new_session=True, preexec_fn=die_with_parent,
    )  # fmt: skip
    try:
        status = process.wait()
    finally:
        end_group(process)
    directories = [path.parent for path in (tree / "runs").glob("*/summary.json")]
    if status or not directories:
        raise ValueError(f"the record's source ended with status {status} here; its last lines are above")
    return dataclasses.replace(read_run(directories[0]), name=f"seed {run.seed} again")


def judge(record: Record, again: Run) -> tuple[bool, list[str]]:
    """Whether `again` is consistent with the record, and what to tell of it.

    Consistent: the same data and source, and each validation loss where a further seed's is expected (99% in all, with
    Bonferroni's correction over the steps). On the same machine and versions the same seed's losses come out to the
    bit, so they are compared as well. Time is told beside what is expected on the same hardware; it decides nothing,
    since a busy machine is no forgery.
    """
    run = next(run for run in record.runs if run.seed == again.seed)
    here, there = again.log.facts, run.log.facts
    lines = [f"{name} {here['versions'].get(name)} here, {version} in the record"
             for name, version in there["versions"].items() if here["versions"].get(name) != version]  # fmt: skip
    wrong = [f"{key} is {here[key]} here, {there[key]} in the record"
             for key in ("val_fingerprint", "train_fingerprint") if here[key] != there[key]]  # fmt: skip
    if again.log.sources != run.log.sources:
        wrong.append("another source ran than the one in the log")
    found, expected = ([(v.step, v.loss) for v in one.validations] for one in (again, run))
    if [step for step, _ in found] != [step for step, _ in expected]:
        wrong.append(f"it was validated at other steps: {[step for step, _ in found]}")
    elif found == expected:
        lines.append(f"seed {run.seed}: every validation loss is the record's to the last digit")
    else:
        off, step = max((abs(a - b), step) for (step, a), (_, b) in zip(found, expected, strict=True))
        lines.append(
            f"seed {run.seed}: validation losses differ from the record's by at most {off:.5f}, at step {step}"
        )
        wrong += _unexpected(record, again)
    time_s = again.last.time_s
    if again.hardware == run.hardware:
        low, high = np.exp(_expected(np.log(record.times).tolist(), 0.95))
        told = f"time {time_s:.2f} s; a further run of the record is expected to take {low:.2f} to {high:.2f} s (95%)"
        if not low <= time_s <= high:
            machine = "slower or busier" if time_s > high else "faster"
            told += f": this machine is {machine}, or that clock is not this one"
        lines.append(told)
    else:
        lines.append(f"time {time_s:.2f} s on {again.hardware}, another clock than {run.hardware}")
    verdict = f"the losses of {record.name} are {'not ' if wrong else ''}what its source gives here"
    return not wrong, [*lines, *wrong, verdict]


def _unexpected(record: Record, again: Run) -> list[str]:
    """Losses outside of the interval; step 0, at which seeds may not differ at all, is left out."""
    after = [v for v in again.validations if v.step]
    found = []
    for v, *losses in zip(after, *([v.loss for v in run.validations if v.step] for run in record.runs), strict=True):
        low, high = _expected(losses, 1 - 0.01 / len(after))
        if not low <= v.loss <= high:
            found.append(f"step {v.step}: loss {v.loss:.5f}, expected {low:.5f} to {high:.5f}")
    return found


def _expected(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """Where a further value is expected beside these: a t prediction interval."""
    n, mean = len(values), float(np.mean(values))
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * float(np.std(values, ddof=1)) * (1 + 1 / n) ** 0.5
    return mean - half, mean + half
