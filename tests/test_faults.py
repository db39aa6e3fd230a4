"""Real kills of real ranks and nodes: what comes out is the run that nobody killed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import PATIENCE_S, ROOT, Trainer, python, torchrun
from tests.harness.test_resume import assert_same_state
from tests.test_train import metrics, summary

PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])  # of scripts in tests/
FAULTY_LAUNCH = """
import pathlib, sys
from harness import launch
launch.ROOT = pathlib.Path(sys.argv.pop(1))
sys.exit(launch.main(sys.argv[1:]))
"""


def by_age(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda directory: (directory / "log.txt").stat().st_mtime)


@pytest.mark.slow
def test_a_run_killed_three_times_is_the_run_that_was_not_to_the_bit(
    two_ranks: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    """Between steps, in the middle of a checkpoint and within a validation."""
    killed = python(
        torchrun(2, restarts=3, script="tests/faulty_trainer.py"), tiny_recipe, "--micro_batch_tokens=32",
        "--checkpoint_every=5", "--checkpoint_async", f"--run_dir={tmp_path}",
        FAULTS="step:13,write:20,validation:30", PYTHONPATH=PYTHONPATH,
    )  # fmt: skip
    assert killed.returncode == 0, killed.stderr
    assert "Traceback" not in killed.stderr
    directories = by_age(tmp_path)
    assert len(directories) == 4
    for key in ("val_loss", "train_loss"):
        assert metrics(directories[-1], key) == metrics(two_ranks, key)
    final, resumed = summary(directories[-1]), re.findall(r"resumed from (\S+) at step (\d+);", killed.stdout)
    assert (final["status"], final["restarts"], final["resumed_from"]) == ("finished", 3, resumed[-1][0])
    assert resumed[0][1] in ("5", "10")  # where the thread had come to
    assert [Path(path).parent for path, _ in resumed] == directories[:3]
    name = "checkpoint_000040.pt"
    assert_same_state(*(torch.load(place / name, weights_only=True) for place in (directories[-1], two_ranks)))

    # of all four attempts two checkpoints are left, and nothing half written
    left = [path.name for directory in directories for path in directory.glob("checkpoint*")]
    assert sorted(left) == ["checkpoint_000035.pt", "checkpoint_000040.pt"]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", ["--fsdp=false", "--fsdp"])
def test_a_rank_says_that_the_other_one_is_gone(tiny_recipe: Path, tmp_path: Path, fsdp: str) -> None:
    """Without torchrun, which stops the rank that is left, sometimes before it has noticed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
    variables = {**os.environ, **place, "FAULTS": "step:13", "TORCHELASTIC_RESTART_COUNT": "0"}
    variables["PYTHONPATH"] = PYTHONPATH
    command = [sys.executable, "tests/warm.py", "tests/faulty_trainer.py", str(tiny_recipe), "--micro_batch_tokens=32"]
    command += ["--checkpoint_every=5", f"--run_dir={tmp_path}", fsdp]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**variables, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        for rank in "01"
    ]
    errors = [rank.communicate(timeout=PATIENCE_S)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [4, -signal.SIGKILL], errors
    assert re.search(
        r"^error: lost at step 13: another rank was lost \(.*\); start .*--resume=auto to go on from .*_000010.pt$",
        errors[0], re.M,
    )  # fmt: skip
    assert "Traceback" not in errors[0]


@pytest.mark.slow
def test_three_ranks_go_on_from_two_ranks_checkpoint(two_ranks: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    resume = f"--resume={two_ranks / 'checkpoint_000020.pt'}"
    three = python(torchrun(3), tiny_recipe, "--micro_batch_tokens=32", f"--run_dir={tmp_path}", resume)
    assert three.returncode == 0, three.stderr
    (directory,) = tmp_path.iterdir()
    for key in ("val_loss", "train_loss"):
        assert metrics(directory, key) == pytest.approx(metrics(two_ranks, key), rel=1e-5)


class Node:
    """One node's launcher, its output in a file; its trainer, train_gpt.py in the same folder, is the faulty one."""

    def __init__(
        self, output: Path, recipe: Path, port: int, *arguments: str, ranks: int, restarts: int, faults: str
    ) -> None:
        variables = dict(
            NNODES="2", NPROC_PER_NODE=str(ranks), RDZV_ENDPOINT=f"127.0.0.1:{port}", MAX_RESTARTS=str(restarts),
            FAULTS=faults, PYTHONPATH=PYTHONPATH,
        )  # fmt: skip
        self.output = output
        with output.open("w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", FAULTY_LAUNCH, str(output.parent), str(recipe), *arguments], cwd=ROOT,
                env={**os.environ, **variables}, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def end(self) -> tuple[int, str]:
        """Wait for it: exit status and what it printed."""
        return self.process.wait(PATIENCE_S), self.output.read_text(encoding="utf-8")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_two_nodes_are_one_and_the_loss_of_one_is_survived(trainer: Trainer, tiny_recipe: Path, tmp_path: Path) -> None:
    """Two ranks and one. The second node is lost twice: once both are started again, once it alone."""
    folder = tmp_path / "nodes"
    arguments = ["--micro_batch_tokens=32", "--train_steps=70"]
    assert trainer(*arguments, f"--run_dir={tmp_path / 'alone'}").returncode == 0
    (alone,) = (tmp_path / "alone").iterdir()
    faulty = f"from tests import warm\nsys.exit(warm.run([{str(ROOT / 'tests/faulty_trainer.py')!r}, *sys.argv[1:]]))\n"
    (tmp_path / "train_gpt.py").write_text(f"import sys\n{faulty}", encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments += ["--checkpoint_every=10", "--resume=auto", f"--run_dir={folder}"]

    def start(index: int, restarts: int, faults: str = "") -> Node:
        node = Node(
            tmp_path / f"node{index}.txt", tiny_recipe, port, *arguments, ranks=2 - index, restarts=restarts,
            faults=faults,
        )  # fmt: skip
        while index == 0 and not listens(port):  # it has to hold the rendezvous
            assert node.process.poll() is None, node.end()
            time.sleep(0.05)
        return node

    first, second = start(0, restarts=0), start(1, restarts=0, faults="node:13")
    assert second.end()[0] == -signal.SIGKILL, second.end()
    status, text = first.end()
    assert status == 4, text
    assert "Traceback" not in text
    assert re.search(r"^error: lost at step 13: another rank was lost \(.*\); start .*--resume=auto", text, re.M), text
    assert text.splitlines()[-1].startswith("error: another node or rank was lost; start the same command again on ev")

    first, second = start(0, restarts=1), start(1, restarts=1, faults="node:43")
    assert second.end()[0] == -signal.SIGKILL, second.end()
    second = start(1, restarts=1)
    for node in (first, second):
        status, text = node.end()
        assert status == 0, text
    final = by_age(folder)[-1]
    assert summary(final)["status"] == "finished"
    assert summary(final)["restarts"] == 1
    assert summary(final)["world_size"] == 3
    assert len(summary(final)["lineage"]) == 3
    for key in ("val_loss", "train_loss"):
        assert metrics(final, key) == pytest.approx(metrics(alone, key), rel=1e-4)
