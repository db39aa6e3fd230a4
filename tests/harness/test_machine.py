"""Device, dtype and clock: fallbacks are said, refusals help, seconds land in the right phase."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness import machine
from harness.machine import (
    PEAK_FLOPS,
    Clock,
    Machine,
    check_device,
    find_machine,
    git_commit,
    git_state,
    lost_rank,
    place_among_ranks,
    print_error,
    versions,
)

PLACE = dict(RANK="2", WORLD_SIZE="4", LOCAL_RANK="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")


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
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="a rank has no GPU of its own; set NPROC_PER_NODE=2 or less"):
        find_machine("auto", "auto")


@pytest.mark.parametrize(
    ("build", "hidden", "why"),
    [
        (None, None, rf"this build of torch \({re.escape(torch.__version__)}\) is for CPUs alone"),
        ("13.0", None, "torch finds no CUDA GPU; train on"),
        ("13.0", "", "torch finds no CUDA GPU with CUDA_VISIBLE_DEVICES=''"),
    ],
    ids=["a CPU build", "no GPU", "hidden"],
)
def test_a_recipe_for_a_gpu_says_why_there_is_none(
    monkeypatch: pytest.MonkeyPatch, build: str | None, hidden: str | None, why: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    with pytest.raises(ValueError, match=f"device = 'cuda', but {why}.*--device=cpu"):
        check_device("cuda", "auto")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert re.match(f"device = 'auto' is the CPU, as {why.partition(';')[0]}", find_machine("auto", "auto").notes[0])


@pytest.mark.parametrize(
    ("left", "place"),
    [
        ({}, (2, 4, 2)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, (0, 1, 2)),
        ({"LOCAL_RANK": "", "WORLD_SIZE": "1", "RANK": "0"}, None),  # alone, whatever the rest
        ({"RANK": ""}, None),
        ({"WORLD_SIZE": "", "MASTER_PORT": "auto"}, None),
        ({"RANK": "4"}, "RANK=4 and WORLD_SIZE=4"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE=four"),
        ({"LOCAL_RANK": ""}, "all of RANK, WORLD_SIZE, LOCAL_RANK"),
        ({"MASTER_ADDR": ""}, "unset RANK WORLD_SIZE"),
        ({"MASTER_PORT": "tcp://1"}, "MASTER_PORT are needed"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT from 1 to 65535"),
    ],
    ids=str,
)
def test_a_place_among_ranks_is_whole_or_refused_or_none(
    monkeypatch: pytest.MonkeyPatch, left: dict[str, str], place: tuple[int, int, int] | str | None
) -> None:
    """What other launchers leave is no place: never waited for others, never a traceback."""
    for name, value in (PLACE | left).items():
        monkeypatch.setenv(name, value)
    if isinstance(place, str):
        with pytest.raises(ValueError, match=place):
            place_among_ranks()
    else:
        assert place_among_ranks() == place


def test_what_is_left_of_another_launcher_is_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "none")
    found = find_machine("cpu", "float32")
    assert (found.rank, found.world_size, found.restarts, found.job) == (0, 1, 0, ())
    assert found.notes[0] == "one process alone: WORLD_SIZE of the environment, without the rest, not obeyed"


def test_ranks_of_one_machine_ask_for_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """gloo would look this machine's name up; on several machines, or if its user has chosen, that stays as it is."""
    joined: list[str | None] = []

    def join(*arguments: Any, **settings: Any) -> None:
        joined.append(os.environ.get("GLOO_SOCKET_IFNAME"))

    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    monkeypatch.setattr(torch.distributed, "all_gather_object", lambda into, value: None)
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    for here, chosen in (("2", None), ("4", None), ("4", "eth1")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        if chosen:
            monkeypatch.setenv("GLOO_SOCKET_IFNAME", chosen)
        find_machine("cpu", "float32")
    assert joined == [None, "lo0" if sys.platform == "darwin" else "lo", "eth1"]


def test_an_error_is_printed_once_in_an_attempt(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    for attempt, rank, text, event in [
        ("0", "1", "a file is missing", ""),  # the first rank may be the one that sees nothing
        ("0", "0", "a file is missing", ""),
        ("0", "2", "another file is", ""),
        ("0", "0", "lost: connection reset", "lost"),
        ("0", "1", "lost: timed out", "lost"),
        ("1", "0", "a file is missing", ""),
        ("gone", "0", "a file is missing", ""),
    ]:
        if attempt != "gone":
            (tmp_path / attempt / rank).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / attempt / rank / "error.json"))
        print_error(text, event)
    for _ in range(2):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "")  # not torchrun's
        print_error("alone")
    said = ["a file is missing", "another file is", "lost: connection reset", "a file is missing", "a file is missing"]
    assert capsys.readouterr().err.splitlines() == [f"error: {text}" for text in [*said, "alone", "alone"]]


@pytest.mark.parametrize("left", ["RANK", "MASTER_PORT"])
def test_an_outer_launcher_s_folder_silences_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    """Neither a process that is no rank, nor one that has the variables of the rank that started it."""
    for name, value in (PLACE | dict(TORCHELASTIC_ERROR_FILE=str(tmp_path / "0/0/error.json"))).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "0/0").mkdir(parents=True)
    for parent in (7, 8):
        monkeypatch.setattr(os, "getppid", lambda parent=parent: parent)
        print_error("a rank's child's")
    monkeypatch.delenv(left)
    for _ in range(2):
        print_error("no rank's")
    texts = ["a rank's child's"] * 2 + ["no rank's"] * 2
    assert capsys.readouterr().err.splitlines() == [f"error: {text}" for text in texts]


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


def git(folder: Path, *arguments: str) -> str:
    folder.mkdir(exist_ok=True)
    someone = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.check_output(["git", *someone, *arguments], cwd=folder, encoding="utf-8").strip()


def test_a_commit_is_of_this_checkout_or_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner = tmp_path / "outer", tmp_path / "outer/inner"
    monkeypatch.setattr(machine, "ROOT", inner)
    git(outer, "init", "--quiet")
    git(outer, "commit", "--quiet", "--allow-empty", "--message=other")
    inner.mkdir()
    (inner / "train_gpt.py").write_text("", encoding="utf-8")
    assert git_state() == ("", f"{inner} is no checkout of its own, it lies in that of {outer}")

    git(inner, "init", "--quiet")
    nothing = ("", f"the git repository in {inner} has no commit of these files")
    assert git_state() == nothing
    git(inner, "commit", "--quiet", "--allow-empty", "--message=files that are not these")
    assert git_state() == nothing
    git(inner, "add", "train_gpt.py")
    git(inner, "commit", "--quiet", "--message=these")
    commit = git(inner, "rev-parse", "HEAD")
    for variable in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):  # as in a hook of another repository
        monkeypatch.setenv(variable, str(outer / ".git"))
    assert git_state() == (commit, "")
    (inner / "train_gpt.py").write_text("changed", encoding="utf-8")
    assert git_commit() == f"{commit}-dirty"

    (inner / ".git/HEAD").unlink()
    (outer / ".git/HEAD").unlink()
    assert git_state()[1].startswith("not a git repository")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() == ("", "git cannot be started (No such file or directory)")


def test_what_git_says_is_a_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a checkout that belongs to another user, say: with the remedy."""
    script = tmp_path / "git"
    told = "fatal: dubious\\nTo add:\\n\\n\\tgit config it\\n"
    script.write_text(f"#!/bin/sh\nprintf '{told}' >&2; exit 128\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state() == ("", "dubious To add: git config it")


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
