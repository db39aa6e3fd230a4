"""Real ranks: torchrun over gloo gives one process's curve, and the launcher gives the trainer's exit status."""

import signal
import subprocess
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import launch
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
    result = start(tiny_recipe, tmp_path, "--micro_batch_tokens=192", NPROC_PER_NODE="2")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "world_size * micro_batch_tokens = 2 * 192" in errors[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["--nproc_per_node=1", "--max_restarts=0", "--standalone"]),
        (
            {"NPROC_PER_NODE": "3", "MAX_RESTARTS": "2"},
            ["--nproc_per_node=3", "--max_restarts=2", "--standalone"],
        ),
        (
            {"NNODES": "2", "RDZV_ENDPOINT": "127.0.0.1:29500", "NPROC_PER_NODE": "8"},
            ["--nproc_per_node=8", "--max_restarts=0", "--nnodes=2", "--rdzv_backend=c10d",
             "--rdzv_endpoint=127.0.0.1:29500", "--rdzv_id=nanogpt-aurora"],
        ),
    ],
    ids=["alone", "three ranks", "two nodes"],
)  # fmt: skip
def test_what_torchrun_is_told(environment: dict[str, str], expected: list[str]) -> None:
    assert launch.torchrun_arguments(Config(device="cpu"), environment) == expected


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"NPROC_PER_NODE": "gpu"}, ["NPROC_PER_NODE = 'gpu'", "whole number"]),
        ({"NPROC_PER_NODE": "0"}, ["NPROC_PER_NODE = '0'"]),
        ({"MAX_RESTARTS": "-1"}, ["MAX_RESTARTS = '-1'", "such as 0"]),
        ({"NNODES": "2"}, ["NNODES = 2", "RDZV_ENDPOINT=host:port"]),
    ],
    ids=str,
)
def test_wrong_launch_variables_are_refused(environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        launch.torchrun_arguments(Config(device="cpu"), environment)
    assert all(word in str(refusal.value) for word in words)


def test_missing_data_of_your_own_is_a_sentence(tiny_recipe: Path, tmp_path: Path) -> None:
    result = start(tiny_recipe, tmp_path, f"--train_files={tmp_path}/mine_*.bin")
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "python -m data.prepare files" in result.stderr


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
