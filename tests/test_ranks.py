"""Real ranks: torchrun over gloo gives one process's curve, and the launcher gives the trainer's exit status."""

import os
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError

import train_gpt
from data.console import STOPS
from harness import launch
from tests.conftest import Trainer, python, torchrun
from tests.test_train import metrics, only_run, summary
from train_gpt import Config


@pytest.mark.slow
@pytest.mark.parametrize("matrix_optimizer", ["aurora", "adamw"])
def test_two_and_three_ranks_follow_one_ranks_curve(
    trainer: Trainer, two_ranks: Path, tiny_recipe: Path, tmp_path: Path, matrix_optimizer: str
) -> None:
    """Float32, relative 1e-4 at every validation, across several shards and the end of an epoch (step 37 of 40)."""
    directories = {2: two_ranks} if matrix_optimizer == "aurora" else {}
    for ranks in {1, 2, 3} - directories.keys():
        arguments = [f"--matrix_optimizer={matrix_optimizer}", f"--run_dir={tmp_path / str(ranks)}"]
        arguments += ["--micro_batch_tokens=32"]
        result = trainer(*arguments) if ranks == 1 else python(torchrun(ranks), tiny_recipe, *arguments)
        assert result.returncode == 0, result.stderr
        (directories[ranks],) = (tmp_path / str(ranks)).iterdir()  # only the first rank writes
    curves = {}
    for ranks, directory in directories.items():
        assert summary(directory)["world_size"] == ranks
        assert "step:37 epoch 2 of the training data begins" in (directory / "log.txt").read_text(encoding="utf-8")
        curves[ranks] = metrics(directory, "val_loss") | {-s: v for s, v in metrics(directory, "train_loss").items()}
    assert len(curves[1]) == 5 + 8
    assert curves[1][40] < 0.75 * curves[1][0]
    assert curves[2] == pytest.approx(curves[1], rel=1e-4)
    assert curves[3] == pytest.approx(curves[1], rel=1e-4)


def start(recipe: Path, tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return python(["-m", "tests.warm_launcher"], recipe, f"--run_dir={tmp_path / 'runs'}", *arguments, **environment)


@pytest.mark.slow
def test_the_launcher_passes_ranks_on_and_exit_status_back(tiny_recipe: Path, tmp_path: Path) -> None:
    arguments = ["--micro_batch_tokens=96", "--train_steps=4", "--target_loss=0.1", "--require_target"]
    result = start(tiny_recipe, tmp_path, *arguments, NPROC_PER_NODE="2")
    assert result.returncode == 3, result.stderr
    assert "Traceback" not in result.stderr
    assert summary(only_run(tmp_path))["world_size"] == 2
    assert "0.1 nats not reached" in result.stdout


@pytest.mark.slow
def test_a_mistake_that_only_the_ranks_can_see_is_still_one_status(tiny_recipe: Path, tmp_path: Path) -> None:
    result = start(tiny_recipe, tmp_path, "--batch_tokens=160", "--micro_batch_tokens=160", NPROC_PER_NODE="2")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "world_size * seq_len = 2 * 32" in errors[0]
    assert not (tmp_path / "runs").exists()


ALONE = ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "--local_addr=127.0.0.1"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["--nproc_per_node=1", "--max_restarts=0", *ALONE]),
        ({"NPROC_PER_NODE": "", "NNODES": "", "MAX_RESTARTS": ""}, ["--nproc_per_node=1", "--max_restarts=0", *ALONE]),
        ({"NPROC_PER_NODE": "3", "MAX_RESTARTS": "2"}, ["--nproc_per_node=3", "--max_restarts=2", *ALONE]),
        (
            {"NNODES": "2", "RDZV_ENDPOINT": "127.0.0.1:29500", "NPROC_PER_NODE": "8"},
            ["--nproc_per_node=8", "--max_restarts=0", "--rdzv_backend=c10d", "--nnodes=2",
             "--rdzv_endpoint=127.0.0.1:29500", "--rdzv_id=nanogpt-aurora"],
        ),
    ],
    ids=["alone", "empty", "three ranks", "two nodes"],
)  # fmt: skip
def test_what_torchrun_is_told(environment: dict[str, str], expected: list[str]) -> None:
    arguments = launch.torchrun_arguments(Config(device="cpu"), environment)
    if arguments[-1] != "--rdzv_id=nanogpt-aurora":
        assert arguments.pop().startswith("--rdzv_id=")  # of its own
    assert arguments == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"NPROC_PER_NODE": "gpu"}, ["NPROC_PER_NODE = 'gpu'", "whole number"]),
        ({"NPROC_PER_NODE": "0"}, ["NPROC_PER_NODE = '0'"]),
        ({"MAX_RESTARTS": "-1"}, ["MAX_RESTARTS = '-1'", "such as 0"]),
        ({"NNODES": "2"}, ["NNODES = 2", "RDZV_ENDPOINT=host:port"]),
        ({"NNODES": "2", "RDZV_ENDPOINT": "node0"}, ["such as node0:29500; it is 'node0'"]),
        ({"NNODES": "2", "RDZV_ENDPOINT": "node0:"}, ["it is 'node0:'"]),
        ({"NNODES": "2", "RDZV_ENDPOINT": "node0:0"}, ["a port from 1 to 65535", "it is 'node0:0'"]),
        ({"NNODES": "2", "RDZV_ENDPOINT": "node0:65536"}, ["it is 'node0:65536'"]),
    ],
    ids=str,
)
def test_wrong_launch_variables_are_refused(environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        launch.torchrun_arguments(Config(device="cpu"), environment)
    assert all(word in str(refusal.value) for word in words)


def test_another_ranks_mistake_is_not_silent(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without torchrun's folder every rank speaks for itself, the first or not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    place = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    handlers = {stop: signal.getsignal(stop) for stop in STOPS}
    assert train_gpt.main([str(tiny_recipe), "--device=cuda"]) == 2
    for stop, handler in handlers.items():
        signal.signal(stop, handler)
    assert capsys.readouterr().err == "error: a rank has no GPU of its own; set NPROC_PER_NODE=1 or less\n"


class Torchrun:
    """What launch.main hands over to torchrun, in place of its ranks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, raises: BaseException | None = None) -> None:
        self.settings: Any = None
        self.environment: dict[str, str] = {}
        self.name = ""
        self.raises = raises
        monkeypatch.setattr(launch, "run", self.run)
        self.prepared = 0
        monkeypatch.setattr(launch.console, "prepare", self.prepare)
        monkeypatch.setattr(os, "environ", os.environ.copy())
        monkeypatch.setattr(socket, "getfqdn", socket.getfqdn)

    def prepare(self) -> None:
        self.prepared += 1

    def run(self, settings: Any) -> None:
        self.settings, self.environment, self.name = settings, dict(os.environ), socket.getfqdn("")
        if self.raises:
            raise self.raises


def test_other_launchers_are_not_obeyed(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torchrun_ = Torchrun(monkeypatch)
    theirs = dict(
        PET_NNODES="4", PET_NODE_RANK="3", PET_RDZV_ENDPOINT="away:1", PET_MODULE="1", PET_STANDALONE="no number",
        RANK="3", WORLD_SIZE="4", LOCAL_RANK="x", LOCAL_WORLD_SIZE="2", GROUP_RANK="1", ROLE_WORLD_SIZE="2",
        MASTER_ADDR="away", MASTER_PORT="1", TORCHELASTIC_RUN_ID="outer", PYTHON_EXEC="/nowhere/python",
    )  # fmt: skip
    for name, value in (theirs | dict(NCCL_DEBUG="WARN", NPROC_PER_NODE="2")).items():
        monkeypatch.setenv(name, value)
    assert launch.main([str(tiny_recipe)]) == 0
    assert not theirs.keys() & torchrun_.environment.keys()
    assert torchrun_.environment["NCCL_DEBUG"] == "WARN"
    settings = torchrun_.settings
    assert (settings.nnodes, settings.nproc_per_node, settings.node_rank, settings.module) == ("1:1", "2", 0, False)
    (said,) = capsys.readouterr().err.splitlines()
    assert all(name in said for name in theirs)


def test_a_signal_that_the_parent_ignores_stays_so_under_torchrun(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchrun_ = Torchrun(monkeypatch)
    for ignored, handled in [
        ({"SIGHUP"}, {"SIGINT", "SIGTERM", "SIGQUIT"}),
        ({"SIGHUP", "SIGINT", "SIGTERM", "SIGQUIT"}, {"SIGUSR2"}),
        (set(), {"SIGHUP", "SIGINT", "SIGTERM", "SIGQUIT"}),
    ]:
        now = {getattr(signal, name): signal.SIG_IGN for name in ignored}
        monkeypatch.setattr(signal, "getsignal", lambda stop, now=now: now.get(stop, signal.SIG_DFL))
        assert launch.main([str(tiny_recipe)]) == 0
        assert set(torchrun_.settings.signals_to_handle.split(",")) == handled
    assert torchrun_.prepared == 3


def test_one_node_looks_up_no_name(tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(name: str = "") -> str:
        return "looked up"

    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    torchrun_ = Torchrun(monkeypatch)
    for nodes, name in (("2", "looked up"), ("1", "no-such-host.invalid")):
        monkeypatch.setattr(socket, "getfqdn", lookup)
        monkeypatch.setenv("NNODES", nodes)
        monkeypatch.setenv("RDZV_ENDPOINT", "127.0.0.1:29500")
        assert launch.main([str(tiny_recipe)]) == 0
        assert torchrun_.name == name


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (SignalException("", signal.SIGHUP), 130, ""),
        (KeyboardInterrupt(), 130, ""),
        (OSError("No space left on device"), 2, "error: No space left on device\n"),
        (RendezvousError(), 4, "error: the node that holds RDZV_ENDPOINT"),
    ],
    ids=["a signal", "Ctrl-C", "a full disk", "no rendezvous"],
)
def test_how_torchrun_ends_is_one_status(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    raised: BaseException, status: int, said: str,
) -> None:  # fmt: skip
    Torchrun(monkeypatch, raised)
    assert launch.main([str(tiny_recipe)]) == status
    assert capsys.readouterr().err.startswith(said)


def test_missing_data_of_your_own_is_a_sentence(tiny_recipe: Path, tmp_path: Path) -> None:
    result = start(tiny_recipe, tmp_path, f"--train_files={tmp_path}/mine_*.bin")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert " -m data.prepare files" in result.stderr


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([4, -9, 130], -9),  # rank 1 was killed; rank 0 noticed, rank 2 was stopped
        ([4, 130, 2], 2),  # a mistake that one rank alone could see
        ([130, 4], 4),  # the lost rank is on another node
        ([-signal.SIGTERM, 1], 1),
        ([3, 3], 3),
    ],
    ids=str,
)
def test_of_several_failures_the_one_that_the_others_followed_from_counts(codes: list[int], expected: int) -> None:
    failures = [ProcessFailure(local_rank=i, pid=i, exitcode=code, error_file="none") for i, code in enumerate(codes)]
    assert launch.first_cause(failures).exitcode == expected
