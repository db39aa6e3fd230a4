"""A checkpoint file is whole or absent, only the newest stay, damage is noticed, and a thread changes nothing."""

import errno
import os
import resource
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import checkpoint
from harness.checkpoint import CheckpointWriter, load_checkpoint, read_checkpoint, verify
from harness.machine import Machine
from tests.conftest import PATIENCE_S

ALONE = Machine(0, 1, torch.device("cpu"), torch.float32, ())
CPU = torch.device("cpu")


def model_and_optimizer(seed: int) -> tuple[nn.Linear, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    model = nn.Linear(300, 200)
    model(torch.ones(300)).sum().backward()
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(model.parameters())]
    optimizers[0].step()
    return model, optimizers


def writer(directory: Path, keep: int = 2, in_thread: bool = False, earlier: tuple[Path, ...] = ()) -> CheckpointWriter:
    directory.mkdir(exist_ok=True)
    return CheckpointWriter(directory, keep, in_thread, ALONE, earlier)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    model, optimizers = model_and_optimizer(0)
    checkpoints = writer(tmp_path)
    checkpoints.save(7, model, optimizers, train_time_s=1.5)
    expected_draw = torch.rand(3)
    other, other_optimizers = model_and_optimizer(1)
    state = load_checkpoint(checkpoints.newest, other, other_optimizers, CPU)
    assert torch.equal(torch.rand(3), expected_draw)
    assert (state["step"], state["train_time_s"]) == (7, 1.5)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    saved, loaded = (optimizer[0].state_dict()["state"] for optimizer in (optimizers, other_optimizers))
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)


def test_a_folder_whose_name_is_no_utf8_is_no_damage(tmp_path: Path) -> None:
    checkpoints = writer(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    model, optimizers = model_and_optimizer(0)
    checkpoints.save(7, model, optimizers)
    verify(checkpoints.newest)
    for mapped in (True, False):
        assert read_checkpoint(checkpoints.newest, mapped)["step"] == 7


def test_a_name_that_cannot_be_given_to_the_system_is_no_damage(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot be opened"):
        read_checkpoint(tmp_path / "\ud800.pt")


def test_hyperparameters_are_those_asked_for_now(tmp_path: Path) -> None:
    model, optimizers = model_and_optimizer(0)
    checkpoints = writer(tmp_path)
    checkpoints.save(1, model, optimizers)
    optimizers[0].param_groups[0].update(lr=0.5, weight_decay=0.25)
    load_checkpoint(checkpoints.newest, model, optimizers, CPU)
    assert optimizers[0].param_groups[0]["lr"] == 0.5
    assert optimizers[0].param_groups[0]["weight_decay"] == 0.25


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_stay_over_all_directories_of_a_run(tmp_path: Path, keep: int) -> None:
    old, stranger = writer(tmp_path / "old", keep=9), writer(tmp_path / "stranger")
    for step in (5, 10, 15):  # 15 is what the run that goes on from 10 has not got: damaged, say
        old.save(step, *model_and_optimizer(0))
    stranger.save(1, *model_and_optimizer(0))
    (old.directory / "checkpoint_000020.tmp").write_bytes(b"killed while writing")
    earlier = tuple(old.directory / f"checkpoint_{step:06d}.pt" for step in (5, 10))
    new = writer(tmp_path / "new", keep, earlier=earlier)
    new.save(15, *model_and_optimizer(0))
    assert names(old.directory) == ["checkpoint_000005.pt", "checkpoint_000010.pt"][3 - keep :]
    new.save(100, *model_and_optimizer(0))
    assert names(old.directory) == ["checkpoint_000010.pt"][: keep - 1]
    assert names(new.directory) == ["checkpoint_000015.pt", "checkpoint_000100.pt"][-keep:]
    assert names(stranger.directory) == ["checkpoint_000001.pt"]


def test_a_million_steps_are_more_than_999999(tmp_path: Path) -> None:
    checkpoints = writer(tmp_path, keep=2)
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        checkpoints.save(step, *model_and_optimizer(0))
    assert names(tmp_path) == ["checkpoint_1000000.pt", "checkpoint_1000001.pt"]


def test_what_others_put_beside_a_run_s_checkpoints_stays(tmp_path: Path) -> None:
    theirs = ["checkpoint_000001_best.pt", "checkpoint_best.pt", "checkpoint_best.tmp"]
    for name in theirs:
        (tmp_path / name).write_bytes(b"mine")
    checkpoints = writer(tmp_path, keep=1)
    for step in (1, 2):
        checkpoints.save(step, *model_and_optimizer(0))
    assert names(tmp_path) == sorted([*theirs, "checkpoint_000002.pt"])


def test_what_cannot_be_deleted_or_flushed_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems: no fsync of folders, files of another user, folders that are stale."""
    genuine = os.fsync, Path.unlink

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        genuine[0](descriptor)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "checkpoint_000001.pt":
            raise PermissionError
        genuine[1](path, missing_ok)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "unlink", unlink)
    checkpoints = writer(tmp_path / "new", keep=1, earlier=(tmp_path / "gone/checkpoint_000000.pt",))
    for step in (1, 2, 3):
        checkpoints.save(step, *model_and_optimizer(0))
    assert names(checkpoints.directory) == ["checkpoint_000001.pt", "checkpoint_000003.pt"]


@contextmanager
def files_no_larger_than(num_bytes: int) -> Iterator[None]:
    """A disk that is full after so much: writes beyond fail with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("in_thread", [False, True], ids=["at once", "in a thread"])
def test_a_save_that_the_disk_refuses_leaves_the_older_checkpoints(tmp_path: Path, in_thread: bool) -> None:
    model, optimizers = model_and_optimizer(0)
    checkpoints = writer(tmp_path, in_thread=in_thread)
    checkpoints.save(1, model, optimizers)
    checkpoints.settle()
    first = tmp_path / "checkpoint_000001.pt"
    content = first.read_bytes()
    with files_no_larger_than(len(content) // 2), pytest.raises(OSError, match=r"000002.pt could not .*File too large"):
        checkpoints.save(2, model, optimizers)
        assert in_thread
        checkpoints.settle()
    assert names(tmp_path) == [first.name]
    assert first.read_bytes() == content
    assert checkpoints.newest == str(first)
    checkpoints.save(3, model, optimizers)  # room again
    checkpoints.settle()
    verify(checkpoints.newest)


def test_a_thread_writes_the_tensors_of_the_moment_and_one_file_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, begun, go_on, under_way = torch.save, threading.Event(), threading.Event(), []

    def slow_save(state: Any, file: Any) -> None:
        under_way.append(state["step"])
        begun.set()
        assert go_on.wait(PATIENCE_S)
        genuine(state, file)

    monkeypatch.setattr(checkpoint.torch, "save", slow_save)
    model, optimizers = model_and_optimizer(0)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    moment = optimizers[0].state[model.weight]["exp_avg"].clone()
    checkpoints = writer(tmp_path, in_thread=True)
    checkpoints.save(1, model, optimizers)  # comes back while the file is not written
    assert checkpoints.newest == "none"
    optimizers[0].step()
    second = threading.Thread(target=checkpoints.save, args=(2, model, optimizers))
    second.start()
    assert begun.wait(PATIENCE_S)
    second.join(0.2)  # time enough to show if it did not wait for the first
    assert second.is_alive()
    assert under_way == [1]
    go_on.set()
    second.join()
    checkpoints.settle()
    assert under_way == [1, 2]
    state = read_checkpoint(tmp_path / "checkpoint_000001.pt")
    torch.testing.assert_close(state["model"], expected, rtol=0, atol=0)
    assert torch.equal(state["optimizers"][0]["state"][0]["exp_avg"], moment)
    assert not torch.equal(read_checkpoint(checkpoints.newest)["model"]["weight"], expected["weight"])


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model, optimizers = model_and_optimizer(0)
    model.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="weight holds NaN"):
        writer(tmp_path).save(1, model, optimizers)
    assert not list(tmp_path.iterdir())


def test_every_changed_byte_of_the_data_is_noticed(tmp_path: Path) -> None:
    """A bit flipped in 60 places all over the file, and the file cut at as many lengths."""
    checkpoints = writer(tmp_path)
    checkpoints.save(1, *model_and_optimizer(0))
    path = Path(checkpoints.newest)
    verify(path)
    content = path.read_bytes()
    weights = content.index(read_checkpoint(path)["model"]["weight"].numpy().tobytes())
    for place in range(weights, weights + 240_000, 4_000):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(ValueError, match="checksum of"):
            verify(path)
    for length in range(0, len(content), len(content) // 60):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError):
            verify(path)


def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    model, optimizers = model_and_optimizer(0)
    checkpoints = writer(tmp_path)
    checkpoints.save(1, model, optimizers)
    with pytest.raises(ValueError, match="not a checkpoint of this model") as refusal:
        load_checkpoint(checkpoints.newest, nn.Linear(2, 2), optimizers, CPU)
    assert "\n" not in str(refusal.value)
    path = Path(checkpoints.newest)
    for foreign in ([1, 2], 3, {"step": 1, "model": 2}):
        torch.save(foreign, tmp_path / "foreign.pt")
        with pytest.raises(ValueError, match="not a checkpoint of this model"):
            load_checkpoint(str(tmp_path / "foreign.pt"), model, optimizers, CPU)
    os.truncate(path, 700)
    with pytest.raises(ValueError, match="not a checkpoint of this model") as refusal:
        load_checkpoint(checkpoints.newest, model, optimizers, CPU)
    assert "\n" not in str(refusal.value)
