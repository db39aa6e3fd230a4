"""Everything there is to check and measure on one GPU, in one command of a few minutes that can be cut off.

    python -m benchmarks.gpu_suite                          9 minutes: checks, training steps, a race, then the rest
    python -m benchmarks.gpu_suite --only classics --minutes 5
    python -m benchmarks.gpu_suite --out DIR                all that it writes goes there, none to benchmarks/results
    python -m benchmarks.gpu_suite --tiny                   the whole of it at toy size on a CPU, in about a minute

Parts (benchmarks/suite_parts.py), in order of worth: tests of the kernels; training steps of the 124M and 355M models,
plain and with every fused kernel; AdamW, Muon and Aurora racing on the classics shards; the kernels' benchmarks. Each
is a process group of its own with a limit out of the total. One that fails or runs out of time is reported with its
last lines, and the rest goes on. What is done is remembered in runs/gpu_suite/<device>/: the same command again goes on
with what is not (after a failure, a kill, or when the time was short), unless the commit has changed or --fresh is
given (which edits without a commit need). Results: gpu_suite_<device>.json and .png, and each part's own file.

It needs the trainer's packages (torch, numpy, tqdm, tiktoken); without pytest there are no tests of the kernels,
without matplotlib no figures. Where nothing can be installed, carry what is missing as a folder:

    python -m pip install --target site tqdm tiktoken       (elsewhere)
    PYTHONPATH=site python -m benchmarks.gpu_suite          (there)

The classics race needs shards in data/classics (or --data DIR), as .bin or .bin.xz.
Exit status: 0 nothing failed, 1 a part failed or ran out of time, 2 a mistake in what was asked for, 130 interrupted.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from benchmarks.suite_parts import NOWHERE, ROOT, Facts, Part, make_inputs, make_parts
from data import console
from data.files import check_writable, try_lock, user_path, write_json
from data.processes import die_with_parent, end_group
from harness.figures import pyplot, save
from harness.tables import align, cell

NEEDED = ("torch", "numpy", "tqdm", "tiktoken")
GRACE_S = 5.0  # between asking a part to end and ending it
TAIL = 15  # lines of a failed part's output that are kept
ENDED = {"done": "done", "failed": "FAILED", "out of time": "OUT OF TIME"}


@dataclass
class Suite:
    """A folder with what was found so far: <part>.json and <part>.txt (output), results/, plots."""

    folder: Path
    out: Path  # where results are copied to
    facts: Facts
    deadline: float  # by time.monotonic

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def finished(self, part: Part) -> dict[str, Any] | None:
        """Record of an earlier start, if the part was done then by the same commit."""
        path = self.folder / f"{part.name}.json"
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return record if record.get("status") == "done" and record["commit"] == self.facts.commit else None

    def run(self, part: Part) -> dict[str, Any]:
        """Run a part, or say why not; saves and returns its record."""
        record: dict[str, Any] = dict(part=part.name, what=part.what, commit=self.facts.commit, found={}, targets=[])
        left_s = self.deadline - time.monotonic() - GRACE_S
        limit_s = min(part.limit_s, left_s)
        if part.skip:
            return record | dict(status="skipped", seconds=0.0, why=part.skip)
        if left_s < min(part.least_s, part.limit_s):
            return record | dict(status="not begun", seconds=0.0, why=f"{max(0, left_s):.0f} s left; start this again")
        print(f"{part.name}: {part.what}, at most {limit_s:.0f} s ...", flush=True)
        output, start = self.folder / f"{part.name}.txt", time.monotonic()
        for path in self.results.glob(part.files):
            path.unlink()
        status, code = run_group(part.command_within(limit_s), limit_s, output, self.results)
        record |= dict(status=status, seconds=time.monotonic() - start, limit_s=limit_s)
        lines = output.read_text(errors="replace", encoding="utf-8").splitlines()
        if status != "out of time":
            try:
                written = [path for path in self.results.glob(part.files) if path.suffix == ".json"]
                found = part.find(lines, json.loads(written[0].read_text(encoding="utf-8")) if written else {})
                record |= dict(found=found.figures, targets=[vars(target) for target in found.targets])
            except (LookupError, ValueError, StopIteration, OSError) as error:
                record.update(status="failed", why=f"status {code}, and no result that can be read ({error!r})")
        if status == "failed":
            record["why"] = f"exit status {code}"
        if record["status"] != "done":
            record["last_lines"] = lines[-TAIL:]
        write_json(self.folder / f"{part.name}.json", record, indent=1)
        return record

    def publish(self, records: Sequence[dict[str, Any]], parts: Sequence[Part], minutes: float) -> Path:
        """Write the suite's own result, and copy the files of every part that is done beside it."""
        self.out.mkdir(parents=True, exist_ok=True)
        for part, record in zip(parts, records, strict=False):
            for path in self.results.glob(part.files) if record["status"] == "done" else ():
                if path.parent.resolve() != self.out.resolve():
                    shutil.copy(path, self.out)
        content = {
            "benchmark": "gpu_suite", "device": self.facts.device, "versions": self.facts.versions,
            "commit": self.facts.commit, "settings": {"minutes": minutes}, "parts": list(records),
            "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        write_json(path := self.out / f"gpu_suite_{self.facts.slug}.json", content, indent=1)
        return path


def run_group(command: Sequence[str], limit_s: float, output: Path, results: Path) -> tuple[str, int]:
    """Run python with these arguments as a process group of its own; ("done", "failed" or "out of time", its status).

    Whatever the outcome, nothing of the group lives on. A group, not a session: a caller that ends its session's
    processes ends these too.
    """
    own = {"BENCHMARK_RESULTS": str(results.resolve()), "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    with output.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=os.environ | own, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, process_group=0, preexec_fn=die_with_parent,
        )  # fmt: skip
    try:
        code = process.wait(limit_s)
        return ("failed" if code else "done"), code
    except subprocess.TimeoutExpired:
        return "out of time", -1
    finally:
        end_group(process, GRACE_S)


def run_suite(suite: Suite, parts: Sequence[Part], minutes: float) -> int:
    """Run what is not done yet, write the result after every part, print the tables; the exit status."""
    suite.results.mkdir(parents=True, exist_ok=True)
    records, interrupted = list[dict[str, Any]](), False
    try:
        for part in parts:
            earlier = suite.finished(part)
            records.append(earlier | {"earlier": True} if earlier else suite.run(part))
            suite.publish(records, parts, minutes)
            if records[-1]["status"] in ("failed", "out of time"):
                print("\n".join(["", *records[-1]["last_lines"], ""]))
    except KeyboardInterrupt:
        interrupted = True
    path = suite.publish(records, parts, minutes)
    print(table(records))
    if any(record["targets"] for record in records):
        print("\n" + target_table(records))
    print(draw_rates(json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png")))
    print(f"-> {path}")
    if any(record.get("earlier") for record in records) and not records[0]["commit"].isalnum():  # none, or -dirty
        print("what was done before may be of other code: there is no commit to tell; --fresh runs it again")
    if interrupted:
        print(f"interrupted; {console.GOES_ON}", file=sys.stderr)
        return 130
    if any(record["status"] == "not begun" for record in records):
        print(f"some parts were not begun; {console.GOES_ON}")
    return 1 if any(record["status"] in ("failed", "out of time") for record in records) else 0


def table(records: Sequence[dict[str, Any]]) -> str:
    lines = [["part", "outcome", "seconds"]]
    texts = ["found"]
    for record in records:
        outcome = ENDED.get(record["status"], record["status"]) + (" (before)" if record.get("earlier") else "")
        lines.append([record["part"], outcome, f"{record['seconds']:.0f}"])
        figures = ", ".join(f"{name} {cell(value)}" for name, value in record["found"].items() if name != "rates")
        texts.append("; ".join(text for text in (record.get("why", ""), figures) if text))
    return "\n".join(f"{line}  {text}".rstrip() for line, text in zip(align(lines).splitlines(), texts, strict=True))


def target_table(records: Sequence[dict[str, Any]]) -> str:
    lines = [["part", "figure", "found", "wanted", "verdict"]]
    for part, each in ((record["part"], target) for record in records for target in record["targets"]):
        found = "-" if each["value"] is None else cell(each["value"])
        lines.append([part, each["name"], found, each["wanted"], each["verdict"]])
    return align(lines)


def draw_rates(content: dict[str, Any], path: Path) -> str:
    """Draw tokens/s of each model and optimizer, plain and with all on, if a suite's result has training steps; returns
    a line that says what came of it."""
    parts = [part for part in content["parts"] if part["part"].startswith("train_step") and part["found"]]
    if not parts:
        return "no training steps: no figure of them"
    try:
        plt = pyplot()
    except ImportError as error:
        return f"no figures: {error}; install matplotlib and start this again"
    figure, axes = plt.subplots(1, len(parts), figsize=(1 + 4 * len(parts), 4), squeeze=False, layout="constrained")
    for axis, part in zip(axes[0], parts, strict=True):
        rates = part["found"]["rates"]
        for index, variant in enumerate(("plain", "all")):
            heights = [rate[variant] / 1e3 for rate in rates.values()]
            places = [place + 0.4 * index for place in range(len(rates))]
            bars = axis.bar(places, heights, width=0.38, label=f"compiled, {variant if index == 0 else 'all on'}")
            axis.bar_label(bars, fmt="%.4g", fontsize=8)
        axis.set_xticks([place + 0.2 for place in range(len(rates))], list(rates))
        axis.set_title(part["part"].removeprefix("train_step_"), fontsize=10)
        axis.grid(alpha=0.3, axis="y")
    axes[0][0].set_ylabel("thousand tokens/s")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(content["device"], fontsize=9)
    save(figure, path)
    return f"-> {path}"


@dataclass(frozen=True)
class Options:
    minutes: Annotated[float, "> 0"] = 9.0  # for everything together
    only: tuple[str, ...] = ()  # these parts alone
    skip: tuple[str, ...] = ()  # not these
    out: str = ""  # folder of the results; empty: benchmarks/results
    folder: str = ""  # what is remembered; empty: runs/gpu_suite/<device>
    data: str = str(ROOT / "data/classics")  # folder of the classics shards
    fresh: bool = False  # forget what an earlier start found
    tiny: bool = False  # toy sizes, on a CPU; never writes to benchmarks/results


def parse(argv: Sequence[str]) -> Options:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f"{', '.join(missing)} cannot be imported; install it, or carry it in a folder on PYTHONPATH")
    from harness.settings import parse_settings  # needs torch

    options = parse_settings(Options, argv, __doc__)
    names = [part.name for part in make_parts(NOWHERE, Path(), Path(), False)]
    for option in ("only", "skip"):
        if unknown := [name for name in getattr(options, option) if name not in names]:
            raise ValueError(f"--{option}: no part {', '.join(unknown)}; parts: {', '.join(names)}")
    return options


def find_facts(tiny: bool) -> Facts:
    """Facts of this machine, from a process of its own, so that the suite holds no memory of the GPU. ValueError if it
    will not do."""
    command = [sys.executable, "-c", "from benchmarks.suite_parts import print_facts; print_facts()"]
    result = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=False,
                            encoding="utf-8", errors="replace")  # fmt: skip
    if result.returncode:
        raise ValueError(f"the trainer cannot be imported ({(result.stderr.splitlines() or ['?'])[-1]})")
    facts = Facts(**json.loads(result.stdout.splitlines()[-1]))
    if not facts.on_gpu and not tiny:
        raise ValueError("torch finds no CUDA GPU; --tiny runs the whole suite at toy size on a CPU")
    return facts


def main(argv: Sequence[str]) -> int:
    return console.run(lambda: _main(argv))


def _main(argv: Sequence[str]) -> int:
    start, options = time.monotonic(), parse(argv)
    if options.tiny:  # and nothing is compiled, which takes longer than all the rest
        os.environ.update(CUDA_VISIBLE_DEVICES="", TORCHDYNAMO_DISABLE="1")
    facts = find_facts(options.tiny)
    name = f"tiny_{facts.slug}" if options.tiny else facts.slug
    folder = user_path(options.folder or ROOT / "runs/gpu_suite" / name).resolve()
    out = user_path(options.out) if options.out else (folder / "out" if options.tiny else ROOT / "benchmarks/results")
    if options.tiny and out.resolve() == (ROOT / "benchmarks/results").resolve():
        raise ValueError("--out benchmarks/results is for results of real sizes; choose another for --tiny")
    check_writable(folder, "choose another folder, such as --folder=/tmp/gpu_suite")
    check_writable(out, "choose another folder, such as --out=/tmp/results")
    parts = make_parts(facts, folder, user_path(options.data).resolve(), options.tiny)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w", encoding="utf-8") as lock:
        if (locked := try_lock(lock)) is False:
            raise ValueError(f"another suite is running in {folder}; wait until it has ended")
        if locked is None:
            print(f"{folder}: there are no locks here; see to it that no other suite runs in it", file=sys.stderr)
        suite = Suite(folder, out, facts, start + 60 * options.minutes)
        if options.fresh:
            for part in parts:
                (folder / f"{part.name}.json").unlink(missing_ok=True)
        parts = [part for part in parts if part.name in (options.only or [part.name]) and part.name not in options.skip]
        make_inputs(folder, options.tiny)
        print(f"{facts.device}; {len(parts)} parts in {options.minutes:g} minutes; {folder}", flush=True)
        return run_suite(suite, parts, options.minutes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
