"""Host time without a GPU: what is counted is what a step launches."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks.polar_model import PASSES, Call, recorder
from optim.polar import polar

ROOT = Path(__file__).resolve().parent.parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is packaged for Linux")


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.host_time", *words]
    return subprocess.run(command, env=kept | environment, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600)


@linux
@pytest.mark.slow
def test_the_launches_of_a_step_are_counted(tmp_path: Path) -> None:
    """Momentum, polar factors and update of three shapes of matrices."""
    told = run("--rules", "muon", "--steps", "2", BENCHMARK_RESULTS=str(tmp_path))
    assert told.returncode == 0, told.stderr
    (path,) = tmp_path.glob("host_time_*.json")
    ((row,),) = (json.loads(path.read_text(encoding="utf-8"))["rows"],)
    calls: list[Call] = []
    with mock.patch("optim.polar.backend", return_value=recorder(calls)):
        for shape in ((48, 32, 32), (24, 96, 32), (12, 32, 96)):
            polar(torch.empty(shape, device="meta"), dtype=torch.float16)
    assert row["launches"] == len(calls) + 2 * 3
    loading = [call for call in calls if call.what not in PASSES]
    assert 2 * len(loading) <= row["descriptors"] <= 3 * len(loading)
    assert 0 < row["operators"] <= 80
    assert 40 * row["launches"] < row["calls"] <= 9600  # 8,815 with Triton 3.9
    assert 0 < row["ms"] < 1000


@linux
def test_nothing_is_measured_of_the_interpreter() -> None:
    told = run("--rules", "muon", TRITON_INTERPRET="1")
    assert told.returncode == 2
    assert "TRITON_INTERPRET is set" in told.stderr
