"""Device, dtype and clock: fallbacks are said, refusals help, seconds land in the right phase."""

import os
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import pytest
import torch

import machine
from machine import PEAK_FLOPS, Clock, Machine, find_machine, lost_rank, versions
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("asked", "hardware", "expected", "notes"),
    [
        ("auto", torch.bfloat16, torch.bfloat16, 1),
        ("auto", torch.float32, torch.float32, 1),
        ("bfloat16", torch.bfloat16, torch.bfloat16, 1),
        ("bfloat16", torch.float32, torch.float32, 2),  # falls back, and says so
        ("float32", torch.bfloat16, torch.float32, 1),
    ],
)
def test_dtype_follows_the_hardware_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, asked: str, hardware: torch.dtype, expected: torch.dtype, notes: int
) -> None:
    monkeypatch.setattr(machine, "fast_half_dtype", lambda device_type: hardware)
    found = find_machine("cpu", asked)
    assert found.dtype == expected
    assert len(found.notes) == notes
    assert str(expected).removeprefix("torch.") in found.notes[-1]
    if notes == 2:
        assert "'bfloat16' was asked for, but this cpu has no bfloat16 units" in found.notes[0]


def test_a_rank_without_a_gpu_of_its_own_is_told_how_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="local rank 2 has no GPU of its own; set NPROC_PER_NODE=2"):
        find_machine("auto", "auto")


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", PEAK_FLOPS["H100"]),
        ("NVIDIA H100 PCIe", PEAK_FLOPS["H100 PCIe"]),
        ("NVIDIA L40S", PEAK_FLOPS["L40S"]),
        ("NVIDIA L4", PEAK_FLOPS["L4"]),
        ("NVIDIA A100-SXM4-80GB", PEAK_FLOPS["A100"]),
        ("Some Future GPU", None),
    ],
)
def test_peak_is_that_of_the_very_device(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(machine, "device_name", lambda device: name)
    assert Machine(0, 1, torch.device("cuda", 0), torch.bfloat16, ()).peak_flops == peak
    assert Machine(0, 1, torch.device("cpu"), torch.bfloat16, ()).peak_flops is None


def test_the_clock_runs_in_one_phase_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = Clock(torch.device("cpu"))
    for phase, seconds in (("train", 0.5), ("validation", 2.0), ("train", 0.25), ("end", 0.0)):
        clock.switch(phase)
        now += seconds
    clock.switch("after")
    assert clock.seconds == {"setup": 0.0, "train": 0.75, "validation": 2.0, "end": 0.0}


def test_training_step_after_step_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    clock = Clock(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waits.append(clock.phase))
    for _ in range(3):
        clock.switch("train")
    assert waits == ["setup"]
    clock.switch("validation")
    clock.switch("train")
    assert waits == ["setup", "train", "validation"]


@pytest.mark.parametrize(
    ("before", "after"),
    [("", ".cache/inductor"), (f"{tempfile.gettempdir()}/torchinductor_me", ".cache/inductor"), ("/mine", "/mine")],
    ids=["nothing", "torch's default", "the user's"],
)
def test_what_is_compiled_is_kept(before: str, after: str) -> None:
    """In a process of its own, which has imported the compiler by then as a run has."""
    code = (
        "import torch._dynamo, machine; machine.prepare_compiler(); "
        "from torch._inductor.runtime.cache_dir_utils import cache_dir; print(cache_dir())"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TORCHINDUCTOR_CACHE_DIR"}
    if before:
        environment["TORCHINDUCTOR_CACHE_DIR"] = before
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.stdout.strip() == str(ROOT / after), result.stderr


def test_versions_name_what_computes() -> None:
    assert versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:57520: Connection reset "
            "by peer. This is typically caused by a remote worker hanging or bugs in the application. Check",
            "Read error [127.0.0.1]:57520: Connection reset by peer",
        ),
        ("mat1 and mat2 shapes cannot be multiplied", ""),
    ],
    ids=["gloo", "a fault of our own"],
)
def test_a_lost_rank_is_told_from_other_errors(text: str, reason: str) -> None:
    assert lost_rank(RuntimeError(text)) == reason
    assert lost_rank(torch.distributed.DistBackendError(text)) == (reason or text)
