"""A checkpoint file is whole or absent, and only the newest stay."""

from pathlib import Path

import pytest
import torch
from torch import nn

import checkpoint
from checkpoint import load_checkpoint, save_checkpoint


def model_and_optimizer(seed: int) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    model(torch.ones(3)).sum().backward()
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(model.parameters())]
    optimizers[0].step()
    return model, optimizers


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    model, optimizers = model_and_optimizer(0)
    path = save_checkpoint(tmp_path, 7, model, optimizers, train_time_s=1.5)
    other, other_optimizers = model_and_optimizer(1)
    state = load_checkpoint(str(path), other, other_optimizers, torch.device("cpu"))
    assert (state["step"], state["train_time_s"]) == (7, 1.5)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    saved, loaded = (optimizer[0].state_dict()["state"] for optimizer in (optimizers, other_optimizers))
    torch.testing.assert_close(loaded, saved, rtol=0, atol=0)


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, *model_and_optimizer(0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_000010.pt", "checkpoint_000100.pt"]


def test_a_save_that_breaks_off_leaves_the_older_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizers = model_and_optimizer(0)
    first = save_checkpoint(tmp_path, 1, model, optimizers)
    content = first.read_bytes()

    def broken_save(state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.torch, "save", broken_save)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, 2, model, optimizers)
    assert list(tmp_path.glob("*.pt")) == [first]
    assert first.read_bytes() == content


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model, optimizers = model_and_optimizer(0)
    model.weight.data[0, 0] = float("nan")  # type: ignore[union-attr, operator]
    with pytest.raises(FloatingPointError, match="weight holds NaN"):
        save_checkpoint(tmp_path, 1, model, optimizers)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"garbage", None], ids=["empty", "garbage", "truncated"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    model, optimizers = model_and_optimizer(0)
    path = save_checkpoint(tmp_path, 1, model, optimizers)
    path.write_bytes(path.read_bytes()[:700] if content is None else content)
    with pytest.raises(ValueError, match="not a checkpoint of this model") as refusal:
        load_checkpoint(str(path), model, optimizers, torch.device("cpu"))
    assert "\n" not in str(refusal.value)
