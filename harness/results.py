"""The result of a benchmark or race: a table on the terminal and a JSON file that names the machine; and the end of
every such command."""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from data import console
from data.files import check_writable, user_path, write_json
from harness.machine import ROOT, device_name, versions
from harness.settings import parse_settings
from harness.tables import Row, slug, table

RESULTS = ROOT / "benchmarks/results"
Args = TypeVar("Args")


def command(main: Callable[[Args], int | None], kind: type[Args], description: str | None) -> NoReturn:
    """End the process with the status of `main`, given the command line's arguments, once its result has a place to go
    to. The name of the first argument may be left out."""

    def work() -> int | None:
        first = dataclasses.fields(kind)[0].name  # type: ignore[arg-type]
        args = parse_settings(kind, sys.argv[1:], description, leading=first)
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
    print(table(rows))
    path = results_folder() / f"{benchmark}_{slug(name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": benchmark, "device": name, "versions": versions(), "settings": settings, "rows": list(rows)}
    write_json(path, content | {"time_utc": datetime.now(UTC).isoformat(timespec="seconds")}, indent=1)
    print(f"-> {path}")
    return path
