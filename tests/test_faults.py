"""Real kills of real ranks and nodes: what comes out is the run that nobody killed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, Trainer
from tests.test_ranks import python
from tests.test_resume import assert_same_state
from tests.test_train import metrics, summary


def torchrun(ranks: int, restarts: int, script: str) -> list[str]:
    options = ["--standalone", f"--nproc_per_node={ranks}", f"--max_restarts={restarts}"]
    return ["-m", "torch.distributed.run", *options, script]


def by_age(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda directory: (directory / "log.txt").stat().st_mtime)


@pytest.mark.slow
def test_a_run_killed_three_times_is_the_run_that_was_not_to_the_bit(tiny_recipe: Path, tmp_path: Path) -> None:
    """Between steps, in the middle of a checkpoint, within a validation; and three ranks go on from two ranks' file."""
    arguments = ["--micro_batch_tokens=32", "--checkpoint_every=5"]
    whole = python(
        torchrun(2, 0, "train_gpt.py"), tiny_recipe, *arguments, "--checkpoint_keep=9", f"--run_dir={tmp_path}/whole"
    )
    assert whole.returncode == 0, whole.stderr
    (expected,) = (tmp_path / "whole").iterdir()

    killed = python(
        torchrun(2, 3, "tests/faulty_trainer.py"), tiny_recipe, *arguments, f"--run_dir={tmp_path}/killed",
        FAULTS="step:13,write:20,validation:30", PYTHONPATH=str(ROOT),
    )  # fmt: skip
    assert killed.returncode == 0, killed.stderr
    assert "Traceback" not in killed.stderr
    resumed = re.findall(r"resumed from \S+ at step (\d+);", killed.stdout)
    assert resumed == ["10", "15", "25"]
    directories = by_age(tmp_path / "killed")
    assert len(directories) == 4
    for key in ("val_loss", "train_loss"):
        assert metrics(directories[-1], key) == metrics(expected, key)
    final = summary(directories[-1])
    assert (final["status"], final["restarts"]) == ("finished", 3)
    assert final["resumed_from"] == str(directories[2] / "checkpoint_000025.pt")
    name = "checkpoint_000040.pt"
    assert_same_state(*(torch.load(place / name, weights_only=True) for place in (directories[-1], expected)))

    # of all four attempts two checkpoints are left, and nothing half written
    left = [path.name for directory in directories for path in directory.glob("checkpoint*")]
    assert sorted(left) == ["checkpoint_000035.pt", "checkpoint_000040.pt"]

    three = python(
        torchrun(3, 0, "train_gpt.py"), tiny_recipe, "--micro_batch_tokens=32", f"--run_dir={tmp_path}/three",
        f"--resume={expected / 'checkpoint_000020.pt'}",
    )  # fmt: skip
    assert three.returncode == 0, three.stderr
    (directory,) = (tmp_path / "three").iterdir()
    for key in ("val_loss", "train_loss"):
        assert metrics(directory, key) == pytest.approx(metrics(expected, key), rel=1e-5)


class Node:
    """One node's launcher with two ranks, its output in a file."""

    def __init__(self, output: Path, recipe: Path, port: int, *arguments: str, restarts: int = 0) -> None:
        variables = dict(NNODES="2", NPROC_PER_NODE="2", RDZV_ENDPOINT=f"127.0.0.1:{port}", MAX_RESTARTS=str(restarts))
        self.output = output
        with output.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "launch.py", str(recipe), *arguments], cwd=ROOT, env={**os.environ, **variables},
                stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def lose(self) -> None:
        """kill -9 of the launcher and its ranks."""
        pid = self.process.pid
        ranks = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for victim in (pid, *map(int, ranks)):
            os.kill(victim, signal.SIGKILL)
        self.process.wait()


def wait_for(condition: str, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < deadline, f"waited in vain for {condition}"
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds a launcher's ranks in /proc")
def test_two_nodes_are_one_and_the_loss_of_one_is_survived(trainer: Trainer, tiny_recipe: Path, tmp_path: Path) -> None:
    """The second node is lost twice: without restarts both start again by hand, with one the first waits for it."""
    folder = tmp_path / "nodes"
    arguments = ["--batch_tokens=256", "--micro_batch_tokens=64", "--train_steps=120", "--val_every=40"]
    assert trainer(*arguments, f"--run_dir={tmp_path / 'alone'}").returncode == 0
    (alone,) = (tmp_path / "alone").iterdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments += ["--checkpoint_every=20", "--resume=auto", f"--run_dir={folder}"]

    def start(index: int, restarts: int) -> Node:
        node = Node(tmp_path / f"node{index}.txt", tiny_recipe, port, *arguments, restarts=restarts)
        if index == 0:  # it has to hold the rendezvous
            wait_for("the rendezvous", lambda: listens(port))
        return node

    def both_until(step: int, restarts: int) -> list[Node]:
        nodes = [start(index, restarts) for index in (0, 1)]
        wait_for(f"the checkpoint of step {step}", lambda: any(folder.glob(f"*/checkpoint_{step:06d}.pt")))
        return nodes

    first, second = both_until(20, restarts=0)
    second.lose()
    lost = time.monotonic()
    assert first.process.wait(60) == 4, first.output.read_text()
    assert time.monotonic() - lost < 30
    text = first.output.read_text()
    assert "Traceback" not in text
    assert re.search(r"^error: failed at step \d+: another rank was lost \(.*\); start .*--resume=auto", text, re.M)
    assert text.splitlines()[-1].startswith("error: another node or rank was lost; start the same command again on ev")

    first, second = both_until(60, restarts=1)
    second.lose()
    second = start(1, restarts=1)
    assert first.process.wait(120) == 0, first.output.read_text()
    assert second.process.wait(120) == 0, second.output.read_text()
    final = by_age(folder)[-1]
    assert summary(final)["status"] == "finished"
    assert summary(final)["restarts"] == 1
    assert summary(final)["world_size"] == 4
    assert len(summary(final)["lineage"]) == 3
    for key in ("val_loss", "train_loss"):
        assert metrics(final, key) == pytest.approx(metrics(alone, key), rel=1e-4)
