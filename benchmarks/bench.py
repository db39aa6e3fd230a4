"""What the benchmarks share: fair timing, a table on the terminal, a JSON file that names the machine."""

import contextlib
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import tyro

from data import console
from data.files import check_writable, user_path, whole_file
from harness.machine import device_name, versions
from harness.tables import Row, align, cell

RESULTS = Path(__file__).parent / "results"
Args = TypeVar("Args")


class Seconds(NamedTuple):
    wall: float
    cpu: float  # of this process and of the children it waited for: what other users of the machine hardly change


def median_seconds(variants: Mapping[str, Callable[[], object]], passes: int) -> dict[str, Seconds]:
    """Median seconds of each variant. Variants take turns within a pass, so that a slow moment of a shared machine
    does not fall on one alone. What a variant starts on a GPU it has to wait for itself."""
    turns: dict[str, list[Seconds]] = {name: [] for name in variants}
    for _ in range(passes):
        for name, variant in variants.items():
            wall, cpu = time.perf_counter(), sum(os.times()[:4])
            variant()
            turns[name].append(Seconds(time.perf_counter() - wall, sum(os.times()[:4]) - cpu))
    return {name: Seconds(*map(statistics.median, zip(*times, strict=True))) for name, times in turns.items()}


def compile_everything() -> contextlib.AbstractContextManager[None]:
    """Without it torch.compile gives up, quietly, after a few variants of one function, and runs the next as it is."""
    return torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True)


def slug(name: str) -> str:
    """A device's name as part of a file's name."""
    return re.sub(r"(\((r|tm)\)|[^a-z0-9])+", "-", name.lower()).strip("-")


def command(main: Callable[[Args], int | None], kind: type[Args], description: str | None) -> NoReturn:
    """The end of a benchmark's file: `main` with the command line's arguments, once its result has a place to go to."""

    def work() -> int | None:
        args = tyro.cli(kind, description=description, use_underscores=True)
        check_writable(results_folder(), "BENCHMARK_RESULTS=/tmp/results chooses another folder")
        return main(args)

    sys.exit(console.run(work, "nothing was written; the same command starts again"))


def results_folder() -> Path:
    return user_path(os.environ.get("BENCHMARK_RESULTS") or RESULTS)


def report(benchmark: str, rows: Sequence[Row], device: str, **settings: Any) -> Path:
    """Print the rows as a table under the machine's name and save all of it in results/<benchmark>_<device>.json, or
    in the folder that BENCHMARK_RESULTS names; returns that path."""
    name = device_name(torch.device(device))
    print(f"{benchmark} on {name}; " + ", ".join(f"{package} {version}" for package, version in versions().items()))
    print(align([list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]))
    path = results_folder() / f"{benchmark}_{slug(name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": benchmark, "device": name, "versions": versions(), "settings": settings, "rows": list(rows)}
    content["time_utc"] = datetime.now(UTC).isoformat(timespec="seconds")
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=1) + "\n")
    print(f"-> {path}")
    return path
