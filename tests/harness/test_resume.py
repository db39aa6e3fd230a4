"""--resume: which checkpoint is taken, what may have changed since, and what the log says about it."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data.processes import pid_scope, start_ticks
from harness import machine
from harness.resume import FREE_TO_DIFFER, StartingPoint, _idle, find_start
from harness.runlog import WRITER, is_running
from tests.conftest import Result, Trainer, at_step, stop
from tests.harness.test_checkpoint import files_no_larger_than
from tests.test_train import assert_refused, metrics, summary, tiny_run
from train_gpt import Config


@pytest.fixture
def interrupted(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 40 steps with checkpoints at 10 and 20, interrupted at step 25."""
    with monkeypatch.context() as patch:
        at_step(patch, 25, stop)
        assert trainer("--checkpoint_every=10").returncode == 130
    (directory,) = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in directory.glob("*.pt")) == ["checkpoint_000010.pt", "checkpoint_000020.pt"]
    return directory


def newest(tmp_path: Path, *others: Path) -> Path:
    (directory,) = set((tmp_path / "runs").iterdir()) - set(others)
    return directory


def flip(path: Path) -> None:
    """One bit of a weight."""
    content = bytearray(path.read_bytes())
    weights = torch.load(path, weights_only=True)["model"]["blocks.0.mlp.down"].numpy().tobytes()
    content[content.index(weights) + 100] ^= 1
    path.write_bytes(content)


def assert_same_state(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Of two checkpoints: weights, optimizers and random state, to the bit."""
    assert found["step"] == expected["step"]
    for part in ("model", "rng"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
    for one, other in zip(found["optimizers"], expected["optimizers"], strict=True):
        assert one["param_groups"] == other["param_groups"]
        torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=0)


def test_auto_goes_on_and_the_newest_directory_is_the_whole_run(
    trainer: Trainer, tmp_path: Path, interrupted: Path
) -> None:
    assert trainer(f"--run_dir={tmp_path / 'whole'}").returncode == 0
    (whole,) = (tmp_path / "whole").iterdir()
    result = trainer("--resume=auto", "--checkpoint_every=15", "--log_every=5")
    assert f"resumed from {interrupted}/checkpoint_000020.pt at step 20" in result.stdout
    directory = newest(tmp_path, interrupted)
    for key in ("val_loss", "train_loss"):
        assert metrics(directory, key) == metrics(whole, key)
    assert not list(interrupted.glob("*.pt"))  # two newer ones have landed
    assert sorted(path.name for path in directory.glob("*.pt")) == ["checkpoint_000030.pt", "checkpoint_000040.pt"]

    # finished, and so is what it went on from: the same line trains anew
    result = trainer("--resume=auto")
    assert f"no checkpoint of an unfinished run with these settings in {tmp_path / 'runs'}; anew" in result.stdout
    assert "resumed" not in result.stdout


def test_what_a_complete_run_went_on_from_is_done_although_its_checkpoints_are_there(
    trainer: Trainer, tmp_path: Path, interrupted: Path
) -> None:
    result = trainer("--resume=auto", "--checkpoint_every=0", "--report_to=")
    assert f"resumed from {interrupted}/checkpoint_000020.pt at step 20" in result.stdout
    assert (interrupted / "checkpoint_000020.pt").exists()
    result = trainer("--resume=auto")
    assert "resumed" not in result.stdout
    assert "; anew" in result.stdout


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(
    trainer: Trainer, tmp_path: Path, interrupted: Path, damage: str
) -> None:
    path = interrupted / "checkpoint_000020.pt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        flip(path)
    assert_refused(
        trainer(f"--resume={path}", f"--run_dir={tmp_path / 'none'}"), tmp_path / "none", ["000020.pt", "damaged"]
    )
    for resume in (str(interrupted), "auto"):
        result = trainer(f"--resume={resume}", "--train_steps=40")
        assert result.returncode == 0, result.stderr
        assert f"{path} is damaged (" in result.stdout
        assert f"resumed from {interrupted}/checkpoint_000010.pt at step 10" in result.stdout
        for directory in set((tmp_path / "runs").iterdir()) - {interrupted}:
            assert sorted(metrics(directory, "val_loss")) == [0, 10, 20, 30, 40]
            shutil.rmtree(directory)
    (interrupted / "checkpoint_000010.pt").write_bytes(b"")
    result = trainer(f"--resume={interrupted}")
    assert result.returncode == 2
    assert "no whole checkpoint there" in result.stderr


def test_auto_takes_only_the_very_same_run(
    tiny_recipe: Path, tiny_data: Path, tmp_path: Path, interrupted: Path
) -> None:
    def start(*arguments: str) -> StartingPoint:
        run = tiny_run(tiny_recipe, "--resume=auto", f"--run_dir={tmp_path / 'runs'}", *arguments)
        run.loader.close()
        return run.start

    for other in ("--seed=1", "--matrix_lr=0.03", "--train_steps=50", "--val_every=20", "--name=tin", "--track=x"):
        assert start(other).path == "", other
        assert "anew" in start(other).notes[0]
    assert start(f"--train_files={tiny_data}/tiny_train_00000[12].bin").path == ""
    same = start(
        "--micro_batch_tokens=96",
        "--description=x",
        "--checkpoint_async",
        "--neuron_stats=5",
        f"--train_files={tiny_data}/*_t*.bin",
    )
    assert same.path == str(interrupted / "checkpoint_000020.pt")
    assert [path.name for path in same.earlier] == ["checkpoint_000010.pt", "checkpoint_000020.pt"]
    with (interrupted / "log.txt").open(encoding="utf-8") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # as the run itself does while it lives
        assert start().path == ""
        assert f"{interrupted} is still being written and left alone" in start().notes[0]


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has none."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    """One that lives, and is not this one."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def run_directory(path: Path, pid: int, checkpoint: bool = True, **changes: Any) -> Path:
    """As a run of that process leaves it, or of another one by `changes` of its writer.json."""
    path.mkdir(parents=True)
    writer = dict(pid=pid, start_ticks=start_ticks(pid), pid_scope=pid_scope(), has_lock=True, job=[], lineage=[])
    for name, text in {"log.txt": "", WRITER: json.dumps(writer | changes)}.items():
        (path / name).write_text(text, encoding="utf-8")
    if checkpoint:
        (path / "checkpoint_000010.pt").touch()
    return path


def test_a_run_s_name_is_found_as_an_ascii_locale_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = run_directory(tmp_path / "é-run-1", os.getpid(), checkpoint=False)
    config = Config(name="é-run", run_dir=str(tmp_path), resume="auto")
    state = dict(
        step=10, model={}, config=dataclasses.asdict(config), data={}, job=[], lineage=["é-run-1"], summary={},
        train_time_s=1.0,
    )  # fmt: skip
    torch.save(state, directory / "checkpoint_000010.pt")
    genuine = Path.glob

    def as_read(folder: Path, pattern: str) -> list[Path]:
        return [Path(os.fsencode(path).decode("ascii", "surrogateescape")) for path in genuine(folder, pattern)]

    monkeypatch.setattr(Path, "glob", as_read)
    alone = machine.Machine(0, 1, torch.device("cpu"), torch.float32, ())
    assert find_start(config, {}, alone).path == f"{tmp_path}/\udcc3\udca9-run-1/checkpoint_000010.pt"


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
ELSEWHERE = dict(pid_scope="node7/boot/pid:[1]")


@linux
def test_without_locks_a_process_of_this_machine_is_looked_up(
    tmp_path: Path, no_locks: None, other_process: subprocess.Popen[bytes]
) -> None:
    alive = run_directory(tmp_path / "alive", other_process.pid, has_lock=False)
    later = run_directory(tmp_path / "later", other_process.pid, start_ticks="1")
    here = run_directory(tmp_path / "here", os.getpid())  # an earlier run of this very process
    assert [is_running(path) for path in (alive, later, here)] == [True, False, False]
    other_process.kill()
    other_process.wait()
    assert is_running(alive) is False


@linux
def test_without_locks_another_machine_s_process_may_be_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_locks: None
) -> None:
    elsewhere = run_directory(tmp_path / "elsewhere", 1, **ELSEWHERE, agent="job/node7/1/2")
    older = run_directory(tmp_path / "older", 1)  # of a version that wrote no such file
    (older / WRITER).unlink()
    assert [is_running(path) for path in (elsewhere, older)] == [None, None]
    assert is_running(elsewhere, ["job/node7/1/2"]) is False  # the agent that has started this process ended that one
    assert is_running(elsewhere, ["job/node8/1/2"]) is None
    (elsewhere / "summary.json").write_text('{"status": "interrupted"}', encoding="utf-8")
    assert is_running(elsewhere) is False
    assert is_running(tmp_path) is False  # no run's directory at all

    monkeypatch.undo()  # with locks
    lockless = run_directory(tmp_path / "lockless", 1, **ELSEWHERE, has_lock=False)
    gone = run_directory(tmp_path / "gone", 1, **ELSEWHERE)
    assert [is_running(path) for path in (older, gone, lockless)] == [False, False, None]


@linux
def test_what_may_be_alive_or_is_gone_on_from_is_left_alone(
    tmp_path: Path, no_locks: None, other_process: subprocess.Popen[bytes]
) -> None:
    live = run_directory(tmp_path / "live", other_process.pid, lineage=["first"], checkpoint=False)
    first = run_directory(tmp_path / "first", os.getpid())
    elsewhere = run_directory(tmp_path / "elsewhere", 1, **ELSEWHERE)
    dead = run_directory(tmp_path / "dead", os.getpid())
    notes: list[str] = []
    assert _idle([live, first, elsewhere, dead], set(), notes) == [dead]
    assert notes == [
        f"resume: {first} is left alone, as {live} went on from it and is, or may be, alive",
        f"resume: {elsewhere} is left alone, as its run may be alive on node7: no lock here can tell; if it is not, go "
        f"on from it with --resume={elsewhere}/checkpoint_000010.pt",
    ]  # fmt: skip


@linux
def test_without_locks_auto_takes_a_killed_run_and_no_other(
    trainer: Trainer, tmp_path: Path, interrupted: Path, no_locks: None, other_process: subprocess.Popen[bytes]
) -> None:
    (interrupted / "summary.json").unlink()
    writer = json.loads((interrupted / WRITER).read_text(encoding="utf-8"))
    assert (writer["pid"], writer["has_lock"]) == (os.getpid(), True)
    live = writer | dict(pid=other_process.pid, start_ticks=start_ticks(other_process.pid))
    (interrupted / WRITER).write_text(json.dumps(live), encoding="utf-8")
    result = trainer("--resume=auto", "--checkpoint_every=1", "--checkpoint_keep=1")
    assert f"resume: {interrupted} is still being written and left alone" in result.stdout
    assert "resumed from" not in result.stdout
    assert len(list(interrupted.glob("*.pt"))) == 2
    anew = newest(tmp_path, interrupted)
    assert json.loads((anew / WRITER).read_text(encoding="utf-8"))["has_lock"] is False
    shutil.rmtree(anew)

    other_process.kill()
    other_process.wait()
    result = trainer("--resume=auto")
    assert f"resumed from {interrupted}/checkpoint_000020.pt at step 20" in result.stdout
    went_on = newest(tmp_path, interrupted)
    assert json.loads((went_on / WRITER).read_text(encoding="utf-8"))["lineage"] == [interrupted.name]


def as_torchrun_starts_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of torchrun's only rank."""
    place = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    for name, value in (place | {"TORCHELASTIC_RUN_ID": "one"}).items():
        monkeypatch.setenv(name, value)


def test_a_restart_leaves_an_attempt_alone_that_is_alive(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: Path
) -> None:
    """Of the same job of torchrun, by an agent that was cut off from the others, say."""
    as_torchrun_starts_one(monkeypatch)
    monkeypatch.setattr(machine, "launcher", lambda: "agent")
    shutil.rmtree(interrupted)
    assert trainer("--checkpoint_every=2", "--train_steps=3").returncode == 0
    first = newest(tmp_path)
    (first / "summary.json").unlink()
    with (first / "log.txt").open(encoding="utf-8") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        result = trainer("--train_steps=3")
        assert f"resume: {first} is still being written and left alone" in result.stdout
        assert "resumed from" not in result.stdout
        shutil.rmtree(newest(tmp_path, first))
        with monkeypatch.context() as patch:
            patch.setattr(machine, "launcher", lambda: "another job's")
            assert "left alone" not in trainer("--train_steps=3").stdout
    shutil.rmtree(newest(tmp_path, first))
    assert f"resumed from {first}/checkpoint_000003.pt" in trainer("--train_steps=3").stdout


def test_brackets_and_stars_are_letters_of_a_name(trainer: Trainer, tmp_path: Path) -> None:
    where = [f"--run_dir={tmp_path}/[a]*/b?", "--name=x[1]*?", "--train_steps=3", "--checkpoint_every=2"]
    assert trainer(*where).returncode == 0
    (path,) = (tmp_path / "[a]*/b?").iterdir()
    (path / "summary.json").unlink()
    assert f"resumed from {path}/checkpoint_000003.pt" in trainer(*where, "--resume=auto").stdout


def test_files_that_other_programs_have_touched_end_nothing(
    trainer: Trainer, tmp_path: Path, interrupted: Path
) -> None:
    for name in ("log.txt", "metrics.jsonl"):
        content = (interrupted / name).read_bytes()
        (interrupted / name).write_bytes(b"\xef\xbb\xbf" + content + b'\xff\n[1]\n{"step": "x"}\n{}\n')
    for index, content in enumerate([b"\xff", b"[]", b"\xef\xbb\xbf{", b'{"status": 3, "job": 1, "lineage": null}']):
        other = tmp_path / f"runs/tiny-{index}"
        other.mkdir()
        for name in ("summary.json", WRITER):
            (other / name).write_bytes(content)
    torch.save([1], interrupted / "checkpoint_000030.pt")
    result = trainer("--resume=auto")
    assert f"resumed from {interrupted}/checkpoint_000020.pt at step 20" in result.stdout
    directory = newest(tmp_path, interrupted, *(tmp_path / "runs").glob("tiny-?"))
    assert sorted(metrics(directory, "val_loss")) == [0, 10, 20, 30, 40]


def test_what_auto_ignores_are_settings() -> None:
    assert set(FREE_TO_DIFFER.split()) <= {field.name for field in dataclasses.fields(Config)}


def test_a_path_allows_other_settings_and_says_which(
    trainer: Trainer, tiny_recipe: Path, tmp_path: Path, interrupted: Path
) -> None:
    result = trainer(f"--resume={interrupted}", "--matrix_lr=0.03", "--train_steps=60", "--checkpoint_every=10")
    assert result.returncode == 0, result.stderr
    assert "settings that differ from the checkpoint: matrix_lr 0.02 -> 0.03, train_steps 40 -> 60" in result.stdout
    directory = newest(tmp_path, interrupted)
    assert max(metrics(directory, "val_loss")) == 60
    assert len(list(interrupted.glob("*.pt"))) == 2  # named by path: never deleted
    same = trainer(f"--resume={interrupted}", "--train_steps=60", f"--run_dir={tmp_path / 'same'}")
    assert same.returncode == 0
    (other,) = (tmp_path / "same").iterdir()
    assert metrics(other, "train_loss")[20] == metrics(directory, "train_loss")[20]
    assert metrics(other, "train_loss")[60] != metrics(directory, "train_loss")[60]  # the new rate was felt
    first = tiny_run(tiny_recipe, "--resume=auto", f"--run_dir={tmp_path / 'runs'}")  # is as unfinished as before
    first.loader.close()
    assert first.start.path == str(interrupted / "checkpoint_000020.pt")


def test_a_path_refuses_another_run_and_names_the_difference(
    trainer: Trainer, tmp_path: Path, tiny_data: Path, interrupted: Path
) -> None:
    where = f"--run_dir={tmp_path / 'none'}"

    def refused(*words: str, resume: str = str(interrupted / "checkpoint_000020.pt"), **settings: object) -> None:
        asked = [f"--{key}={value}" for key, value in settings.items()]
        result: Result = trainer(f"--resume={resume}", where, *asked)
        assert_refused(result, tmp_path / "none", ["resume =", *words])
        assert not (tmp_path / "none").exists()

    refused("model_dim is 16 there and 32 here", "--model_dim=16", model_dim=32)
    refused("num_layers is 2 there and 1 here", num_layers=1)
    refused("track is '' there and 'sotu-byte' here", track="sotu-byte")
    refused("matrix_optimizer is 'aurora' there and 'muon' here", "--matrix_optimizer=aurora", matrix_optimizer="muon")
    refused("tokenizer is 'none' there and 'byte' here", tokenizer="byte", vocab_size=257)
    refused("the data of train_files", "tiny_train_*.bin", train_files=tiny_data / "tiny_train_00000[12].bin")
    refused("the data of val_files", "tiny_val", val_files=tiny_data / "tiny_train_*.bin")
    refused("val_tokens is 3840 there and 1920 here", val_tokens=1920)
    refused("step 20", "train_steps = 20", train_steps=20)
    state = torch.load(interrupted / "checkpoint_000020.pt", weights_only=True)
    state["config"]["data_start"] = "seed"
    torch.save(state, tmp_path / "of_seed.pt")
    refused("seed is 0 there and 1 here", resume=str(tmp_path / "of_seed.pt"), data_start="seed", seed=1)
    refused("nothing.pt", "No such file", resume="nothing.pt")
    refused("no whole checkpoint there", resume=str(tiny_data))
    refused("names a run, which goes on with its own weights", init_from="runs/another")
    export = tmp_path / "export"
    export.mkdir()
    (export / "model.safetensors").touch()
    refused(
        f"is an export, with which no run goes on; begin with its weights by --init_from={export}", resume=str(export)
    )


def test_a_checkpoint_without_its_log_is_enough(trainer: Trainer, tmp_path: Path, interrupted: Path) -> None:
    path = shutil.move(interrupted / "checkpoint_000020.pt", tmp_path)
    result = trainer(f"--resume={path}", f"--run_dir={tmp_path / 'moved'}")
    assert "there is no log beside it" in result.stdout
    (directory,) = (tmp_path / "moved").iterdir()
    assert sorted(metrics(directory, "val_loss")) == [30, 40]


def test_a_thread_writes_what_would_have_been_written_at_once(trainer: Trainer, tmp_path: Path) -> None:
    checkpoints = []
    for name in ("at_once", "in_thread"):
        result = trainer(
            f"--run_dir={tmp_path / name}", "--checkpoint_every=20", f"--checkpoint_async={name == 'in_thread'}"
        )
        assert result.returncode == 0, result.stderr
        checkpoints.append([torch.load(path, weights_only=True) for path in sorted((tmp_path / name).glob("*/*.pt"))])
    for at_once, in_thread in zip(*checkpoints, strict=True):
        assert_same_state(in_thread, at_once)


@pytest.mark.parametrize("in_thread", [False, True], ids=["at once", "in a thread"])
def test_a_full_disk_ends_the_run_with_a_sentence(trainer: Trainer, tmp_path: Path, in_thread: bool) -> None:
    size = ["--model_dim=256", f"--checkpoint_async={in_thread}", "--checkpoint_every=15", "--train_steps=20"]
    with files_no_larger_than(4 << 20):  # room for the log, with the source of all that the tests have imported
        result = trainer(*size)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: failed at step {20 if in_thread else 15}: ")
    assert "checkpoint_000015.pt could not be written (File too large); older checkpoints are as they were" in line
    (directory,) = (tmp_path / "runs").iterdir()
    ended = summary(directory)
    assert line == f"error: {ended['status']} {ended['reason']}"
    assert sorted(path.name for path in directory.iterdir()) == [
        "log.txt",
        "metrics.jsonl",
        "summary.json",
        "writer.json",
    ]


def test_a_job_that_ended_is_not_trained_again_by_a_restart(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun restarts a run that exits with 3: the second attempt must give the same status and do nothing."""
    as_torchrun_starts_one(monkeypatch)
    missed = ["--train_steps=3", "--target_loss=0.5", "--require_target"]
    assert trainer(*missed).returncode == 3
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = trainer(*missed)
    assert (result.returncode, result.stdout, result.stderr) == (3, "", "")
    assert len(list((tmp_path / "runs").iterdir())) == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")  # another job, as far as can be seen
    assert trainer(*missed).returncode == 3
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert {
        json.loads(p.read_text(encoding="utf-8"))["restarts"] for p in (tmp_path / "runs").glob("*/summary.json")
    } == {0, 1}
