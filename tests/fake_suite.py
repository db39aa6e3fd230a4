"""A GPU suite of parts that cost nothing, for tests of limits, kills and resumption. Imports no torch."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from benchmarks import gpu_suite
from benchmarks.suite_parts import NOWHERE, Found, Part

FACTS = dataclasses.replace(NOWHERE, device="A GPU", slug="a-gpu")
GOOD = "print('well')"


def last_line(lines: list[str], _: dict[str, Any]) -> Found:
    return Found({"said": lines[-1]})


def fake(name: str, code: str, limit_s: float = 20, files: str = "none", skip: str = "") -> Part:
    """A part that appends to <name>.runs of its folder (the first argument), then runs some code."""
    start = "import os, sys, time, pathlib; p = pathlib.Path(sys.argv[1]);"
    start += "(p / (sys.argv[2] + '.runs')).open('a').write('x');"
    return Part(name, f"what {name} does", ("-c", start + code, "{folder}", name), limit_s, last_line, 1, files, skip)


def run_fakes(folder: Path, *parts: Part, minutes: float = 1, commit: str = "c0ffee") -> tuple[int, dict[str, Any]]:
    """(exit status, records by part) of a suite of these parts, which keeps all its files in `folder`."""
    folder.mkdir(exist_ok=True)
    placed = [
        dataclasses.replace(part, command=tuple(word.replace("{folder}", str(folder)) for word in part.command))
        for part in parts
    ]
    facts = dataclasses.replace(FACTS, commit=commit)
    suite = gpu_suite.Suite(folder, folder / "out", facts, time.monotonic() + 60 * minutes)
    status = gpu_suite.run_suite(suite, placed, minutes)
    content = json.loads((folder / "out/gpu_suite_a-gpu.json").read_text(encoding="utf-8"))
    return status, {record["part"]: record for record in content["parts"]}
