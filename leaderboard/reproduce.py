"""Run a record's own source again, with its own settings, on this machine; is what comes out what it says?"""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats as scipy_stats

from data.files import user_path, whole_file
from data.processes import die_with_parent, end_group
from leaderboard.records import Record, config_toml
from leaderboard.runs import Run, read_run

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Verdict:
    is_consistent: bool
    lines: list[str]


def unpack_source(run: Run, tree: Path) -> None:
    """Write the logged files and the recipe below `tree`. Raises ValueError for paths that lead out of it."""
    for path, source in run.log.sources.items():
        target = (tree / path).resolve()
        if not target.is_relative_to(tree.resolve()) or target.suffix != ".py":
            raise ValueError(f"the log names a source file {path!r} outside of its repository; nothing was run")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source, encoding="utf-8")
    (tree / "record.toml").write_text(config_toml(run), encoding="utf-8")


def find_data(run: Run) -> dict[str, str]:
    """The patterns of its data, from this repository's folder; missing sets that can be fetched are."""
    from data.prepare import ensure

    patterns = {key: str(ROOT / user_path(run.config[key])) for key in ("train_files", "val_files")}
    ensure(**patterns, train_tokens=run.config["train_steps"] * run.config["batch_tokens"] + 1)
    return patterns


def run_again(record: Record, seed: int, tree: Path) -> Run:
    """Train that seed below `tree`, its output on the terminal; what came out. Raises ValueError if it failed."""
    run = next((run for run in record.runs if run.seed == seed), None)
    if run is None:
        raise ValueError(f"{record.name} has no seed {seed}; it has {[run.seed for run in record.runs]}")
    if record.is_foreign or "train_gpt.py" not in run.log.sources:
        raise ValueError(f"{record.name} is a foreign log; its source is not this repository's to run")
    unpack_source(run, tree)
    settings = {**find_data(run), "seed": str(seed), "run_dir": str(tree / "runs")}
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
    return dataclasses.replace(read_run(directories[0]), name=f"seed {seed} again")


def judge(record: Record, again: Run) -> Verdict:
    """Consistent: the same data, and each validation loss where a further seed's is expected (99% in all).

    The interval is a t prediction interval from the record's seeds, Bonferroni-corrected over the steps compared; what
    the same seed printed is compared as well, since on the same machine and versions it comes out to the bit. Time
    is told beside what is expected on the same hardware; it decides nothing, since a busy machine is no forgery.
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
    if again.hardware == run.hardware:
        lines.append(_time(record, again))
    else:
        lines.append(f"time {again.last.time_s:.2f} s on {again.hardware}, another clock than {run.hardware}")
    verdict = f"the losses of {record.name} are {'not ' if wrong else ''}what its source gives here"
    return Verdict(not wrong, [*lines, *wrong, verdict])


def _unexpected(record: Record, again: Run) -> list[str]:
    """Losses outside of the interval; step 0, at which seeds may not differ at all, is left out."""
    curves = np.array([[v.loss for v in run.validations if v.step] for run in record.runs])
    after = [v for v in again.validations if v.step]
    seeds = len(curves)
    t = scipy_stats.t.ppf(1 - 0.005 / len(after), seeds - 1)
    half = t * curves.std(0, ddof=1) * np.sqrt(1 + 1 / seeds)
    return [
        f"step {v.step}: loss {v.loss:.5f}, expected {mean:.5f} ± {width:.5f}"
        for v, mean, width in zip(after, curves.mean(0), half, strict=True)
        if not abs(v.loss - mean) <= width
    ]


def _time(record: Record, again: Run) -> str:
    """Beside what a further run is expected to take, by a t prediction interval of the logarithms."""
    logs, seeds, time_s = np.log(record.times), len(record.times), again.last.time_s
    half = scipy_stats.t.ppf(0.975, seeds - 1) * logs.std(ddof=1) * np.sqrt(1 + 1 / seeds)
    low, high = np.exp(logs.mean() - half), np.exp(logs.mean() + half)
    told = f"time {time_s:.2f} s; a further run of the record is expected to take {low:.2f} to {high:.2f} s (95%)"
    if low <= time_s <= high:
        return told
    return f"{told}: this machine is {'slower or busier' if time_s > high else 'faster'}, or that clock is not this one"


def save_comparison(verdict: Verdict, again: Run, path: Path) -> None:
    """A few lines of JSON to keep with a record."""
    kept = {key: again.log.facts[key] for key in ("start_utc", "device", "world_size", "versions")}
    with whole_file(path) as file:
        file.write(json.dumps(dict(consistent=verdict.is_consistent, said=verdict.lines, **kept), indent=1) + "\n")
