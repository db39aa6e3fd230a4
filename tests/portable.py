"""The numerical tests once for each thing that differs between machines, one at a time: ./run.sh test --portable

    ./run.sh test --portable                                           all of VARIATIONS
    ./run.sh test --portable --only TEST_THREADS=4,HOME=none+TZ=Asia/Kathmandu
                                                                       two runs, the second with two variations;
                                                                       TEST_BFLOAT16=other is what the CPU is not
    ./run.sh test --portable --only order=reversed -m "not slow" tests/optim/test_polar.py
                                                                       other arguments are pytest's

By default the test files that import torch. A table at the end has the outcome of each run, exit status 1 if any is
red. What this machine has not got is "not here", and what would change nothing on it is "as plain": neither is run.
Whether a variation has an effect is read off a process that has set itself up as a test does.
"""

import contextlib
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data import console

ROOT = Path(__file__).resolve().parent.parent
PLAIN_LOCALE = {"LC_ALL": "", "LANG": "", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
PROBE = """
import codecs, json, locale, os, sys, time
import tests.conftest
import torch, xdist
from optim.polar import fast_half_dtype
torch.set_num_threads(tests.surroundings.THREADS)  # alone, OMP_NUM_THREADS gives no more than there are cores
torch.ones(8, 8).to_mkldnn()  # has oneDNN print what it uses
with __import__("contextlib").suppress(locale.Error):
    locale.setlocale(locale.LC_CTYPE, "")
print(json.dumps(dict(
    python=sys.version, aten=torch.backends.cpu.get_cpu_capability(), threads=torch.get_num_threads(),
    bfloat16=fast_half_dtype("cpu") == torch.bfloat16, locale=locale.setlocale(locale.LC_CTYPE),
    encoding=codecs.lookup(locale.getpreferredencoding(False)).name, utc_offset_s=-time.timezone,
    home=os.path.isdir(os.path.expanduser("~")), has_avx2=torch.cpu._is_avx2_supported(),
    has_avx512=torch.cpu._is_avx512_supported(),
)))
"""


@dataclass(frozen=True)
class Variation:
    """One thing changed: in the environment (an empty value unsets a variable), the interpreter, or by its name alone.

    `fact` of PROBE has to be `value` then; without one, there is nothing to be seen.
    """

    name: str
    environment: dict[str, str] = field(default_factory=dict)
    fact: str = ""
    value: Any = None
    python: str = sys.executable


def variable(name: str, value: str, fact: str, expected: Any) -> Variation:
    return Variation(f"{name}={value}", {name: value}, fact, expected)


PLAIN = Variation("plain")
VARIATIONS = [
    *(variable("ATEN_CPU_CAPABILITY", level, "aten", level.upper()) for level in ("default", "avx2", "avx512")),
    variable("ONEDNN_MAX_CPU_ISA", "AVX2", "onednn", "AVX2"),
    variable("ONEDNN_MAX_CPU_ISA", "AVX512_CORE", "onednn", "AVX-512 with AVX512BW, AVX512VL, and AVX512DQ extensions"),
    *(variable("TEST_BFLOAT16", value, "bfloat16", value == "present") for value in ("present", "absent")),
    *(variable("TEST_THREADS", str(count), "threads", count) for count in (1, 2, 4)),
    *(Variation(f"python=3.{minor}", python=f"python3.{minor}") for minor in range(11, 16)),
    Variation("locale=C", PLAIN_LOCALE | {"LC_ALL": "C"}, "encoding", "ascii"),
    *(
        Variation(f"locale={name}", PLAIN_LOCALE | {"LC_ALL": name}, "locale", name)
        for name in ("tr_TR.UTF-8", "ja_JP.eucJP")
    ),
    variable("TZ", "Asia/Kathmandu", "utc_offset_s", 20700),
    Variation("HOME=none", {"HOME": "/dev/null/home"}, "home", False),  # nobody can make a folder there
    Variation("order=reversed"),
    Variation("order=shuffled"),
    Variation("load=2"),
]


def environment_of(variation: Variation) -> dict[str, str]:
    return {name: value for name, value in (os.environ | variation.environment).items() if value}


def facts_of(variation: Variation) -> dict[str, Any]:
    """What PROBE finds; ValueError with the reason if it cannot run."""
    python = shutil.which(variation.python)
    if not python:
        raise ValueError(f"no {variation.python}")
    environment = environment_of(variation) | {"ONEDNN_VERBOSE": "1"}
    result = subprocess.run(
        [python, "-c", PROBE], cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
    )
    if result.returncode:
        reasons = [line for line in result.stderr.splitlines() if re.search("Error|not found", line)]
        raise ValueError(reasons[-1] if reasons else f"exit status {result.returncode}")
    facts: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    isa = re.search(r"info,cpu,isa:(?:Intel )?(.*)", result.stdout)
    return facts | {"onednn": isa[1] if isa else "none"}


def combine(variations: list[Variation]) -> Variation:
    merged: dict[str, str] = {}
    for variation in variations:
        merged |= variation.environment
    python = next((variation.python for variation in variations if variation.python != sys.executable), sys.executable)
    return Variation("+".join(variation.name for variation in variations), merged, python=python)


def why_not(variations: list[Variation], plain: dict[str, Any]) -> str:
    """Why these need no run or cannot have one; empty if they are to be run."""
    if all(not variation.fact and variation.python == sys.executable for variation in variations):
        return ""
    for variation in variations:  # torch takes this variable at its word, and its process dies of it
        if plain.get(f"has_{variation.environment.get('ATEN_CPU_CAPABILITY')}") is False:
            return f"not here: this CPU has no {variation.value}"
    try:
        facts = facts_of(combine(variations))
    except ValueError as reason:
        return f"not here: {reason}"
    for variation in variations:
        if variation.fact and facts[variation.fact] != variation.value:
            return f"not here: {variation.fact} stays {facts[variation.fact]}"
    if facts == plain and all(variation.fact or variation.python != sys.executable for variation in variations):
        return "as plain, where it is so anyway"
    return ""


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield loops
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def numerical_tests() -> list[str]:
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    imports = re.compile(r"^(import|from) torch\b", re.MULTILINE)
    return [str(path.relative_to(ROOT)) for path in paths if imports.search(path.read_text(encoding="utf-8"))]


def run_tests(variation: Variation, arguments: list[str], seed: int) -> tuple[dict[str, int], bool]:
    """pytest's counts, and whether all is green. In one process where the order counts, else in two."""
    options = [argument for argument in arguments if not (ROOT / argument.partition("::")[0]).exists()]
    files = [argument for argument in arguments if argument not in options] or numerical_tests()
    if "order=reversed" in variation.name:
        files.reverse()
    if "order=shuffled" in variation.name:
        random.Random(seed).shuffle(files)
    processes = [] if "order=" in variation.name else ["-n", "2", "--dist", "loadfile"]
    command = [variation.python, "-m", "pytest", *processes, *options, *files]
    settings = [f"{name}={value}" for name, value in variation.environment.items()]
    print(f"\n{variation.name}: env {shlex.join(settings + command)}", flush=True)
    last = ""
    with busy_loops(2 if "load=2" in variation.name else 0):
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment_of(variation), stdout=subprocess.PIPE, encoding="utf-8",
            errors="backslashreplace",
        )  # fmt: skip
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line if re.search(r"\d+ \w+.* in [\d.]+s", line) else last
            status = process.wait()
        finally:  # it goes on alone only where this was stopped
            process.terminate()
    counts = {word.rstrip("s"): int(count) for count, word in re.findall(r"(\d+) ([a-z]+)", last)}
    return counts, status == 0


def main(arguments: list[str]) -> int:
    return console.run(lambda: _main(arguments), "the same command starts again")


def _main(arguments: list[str]) -> int:
    known = {variation.name: [variation] for variation in [PLAIN, *VARIATIONS]}
    chosen = list(known.values())
    plain, seed, rows, red = facts_of(PLAIN), int(time.time()), [], False
    known["TEST_BFLOAT16=other"] = known[f"TEST_BFLOAT16={'absent' if plain['bfloat16'] else 'present'}"]
    if arguments[:1] == ["--only"] and len(arguments) > 1:
        try:
            chosen = [[part for name in run.split("+") for part in known[name]] for run in arguments[1].split(",")]
        except KeyError as unknown:
            raise ValueError(f"--only: {unknown} is none of {', '.join(known)}") from None
        arguments = arguments[2:]
    for variations in chosen:
        variation = combine(variations)
        if reason := why_not(variations, plain):
            rows.append(f"{variation.name:40} {reason}")
            continue
        start = time.monotonic()
        counts, green = run_tests(variation, arguments, seed)
        red |= not green
        failed = counts.get("failed", 0) + counts.get("error", 0)
        numbers = f"{counts.get('passed', 0):6} {failed:6} {counts.get('skipped', 0):7}"
        rows.append(f"{variation.name:40} {numbers} {time.monotonic() - start:8.0f}  {'green' if green else 'RED'}")
    print(f"\n{'variation':40} passed failed skipped seconds", *rows, sep="\n")
    return int(red)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
