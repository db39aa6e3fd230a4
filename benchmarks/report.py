"""What the benchmarks share: fair timing, a table on the terminal, a JSON file that names the machine."""

import json
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from machine import device_name, versions

RESULTS = Path(__file__).parent / "results"

Row = dict[str, Any]


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


def report(benchmark: str, rows: Sequence[Row], device: str, **settings: Any) -> Path:
    """Print the rows as a table under the machine's name and save all of it in
    results/<benchmark>_<device>.json; returns that path."""
    name = device_name(torch.device(device))
    print(f"{benchmark} on {name}; " + ", ".join(f"{package} {version}" for package, version in versions().items()))
    print(align([list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]))
    slug = re.sub(r"(\((r|tm)\)|[^a-z0-9])+", "-", name.lower()).strip("-")
    path = RESULTS / f"{benchmark}_{slug}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"benchmark": benchmark, "device": name, "versions": versions(), "settings": settings, "rows": list(rows)}
    content["time_utc"] = datetime.now(UTC).isoformat(timespec="seconds")
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"-> {path}")
    return path


def align(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a table, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A Markdown table of the columns {key in a row: heading}; absent values are a dash."""
    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[_cell(row[key]) if row.get(key, "") != "" else "-" for key in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def with_section(document: str, name: str, content: str) -> str:
    """The document with `content` between the lines <!-- name --> and <!-- /name -->; ValueError without them."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if start not in document or end not in document:
        raise ValueError(f"the document has no section between {start.strip()} and {end}; add both lines")
    before, rest = document.split(start, 1)
    return before + start + content + end + rest.split(end, 1)[1]
