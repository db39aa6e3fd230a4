"""report_to: TensorBoard's files read back with its own reader, Weights & Biases by a stand-in that notes each call."""

import sys
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness import reporters
from harness.reporters import numbers_in
from tests.conftest import Trainer
from tests.test_train import metrics, only_run

STEPS = ["--train_steps=6", "--val_every=3", "--log_every=2", "--grad_clip=1"]


def scalars(directory: Path) -> dict[str, dict[int, float]]:
    reader = EventAccumulator(str(directory)).Reload()
    return {tag: {event.step: event.value for event in reader.Scalars(tag)} for tag in reader.Tags()["scalars"]}


def test_tensorboard_has_the_numbers_of_the_metrics(trainer: Trainer, tmp_path: Path) -> None:
    result = trainer(*STEPS, "--report_to=tensorboard", "--checkpoint_every=3", "--name=first")
    assert result.returncode == 0, result.stderr
    run = only_run(tmp_path)
    found = scalars(run)
    for name in ("val_loss", "train_loss", "lr_scale", "train_time_s"):
        for step, value in metrics(run, name).items():
            assert found[name][step] == pytest.approx(value, rel=1e-6)
    assert found["val_loss"].keys() == {0, 3, 6}
    assert found["extra/grad_norm"].keys() >= {2, 4, 6}
    assert "step" not in found
    later = ["--report_to=tensorboard", f"--resume={run / 'checkpoint_000003.pt'}", "--name=later"]
    assert trainer(*STEPS, *later).returncode == 0
    (resumed,) = (tmp_path / "runs").glob("later-*")
    assert scalars(resumed)["val_loss"] == found["val_loss"]  # those before the checkpoint as well


def test_wandb_is_offline_in_the_run_directory(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    logged: list[dict[str, float]] = []

    class Run:
        def define_metric(self, name: str, step_metric: str) -> None:
            assert (name, step_metric) == ("*", "step")

        def log(self, numbers: dict[str, float]) -> None:
            logged.append(numbers)

        def finish(self) -> None:
            logged.append({"finished": 1})

    def init(**how: Any) -> Run:
        begun.append(how)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", type("wandb", (), {"init": init, "__spec__": object()}))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    result = trainer(*STEPS, "--report_to=wandb")
    assert result.returncode == 0, result.stderr
    run = only_run(tmp_path)
    (how,) = begun
    assert (how["dir"], how["name"], how["mode"]) == (run, run.name, "offline")
    assert how["config"]["train_steps"] == 6
    assert {row["step"]: row["val_loss"] for row in logged if "val_loss" in row} == metrics(run, "val_loss")
    assert logged[-1] == {"finished": 1}


def test_a_missing_package_is_told_before_there_is_a_run(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporters, "find_spec", lambda name: None)
    result = trainer(*STEPS, "--report_to=wandb")
    assert result.returncode == 2
    assert result.stderr == "error: report_to = 'wandb' needs a package: pip install wandb; or leave report_to out\n"
    assert not (tmp_path / "runs").exists()
    assert "must be" in trainer("--report_to=paper").stderr


def test_a_service_that_fails_does_not_end_a_run(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Service:
        def __init__(self, *_: Any) -> None:
            if fails_at == "start":
                raise Exception("no key\nand more")

        def write(self, numbers: dict[str, float], step: int) -> None:
            if fails_at == "write":
                raise Exception("socket closed")

        def close(self) -> None:
            raise Exception("still busy")

    monkeypatch.setitem(reporters.SERVICES, "wandb", Service)
    monkeypatch.setattr(reporters, "find_spec", lambda name: True)
    fails_at = "start"
    result = trainer(*STEPS, "--report_to=wandb")
    assert result.returncode == 2
    assert result.stderr == "error: report_to = 'wandb' does not start (no key); leave it out, or mend that\n"
    assert not [*(tmp_path / "runs").iterdir()]
    for place, why in (("write", "socket closed"), ("end", "still busy")):
        fails_at = place
        result = trainer(*STEPS, "--report_to=wandb")
        assert result.returncode == 0
        assert result.stdout.count(f"a service has failed and gets no more metrics ({why})") == 1


def test_numbers_inside_others_go_by_the_path_of_their_keys() -> None:
    values = dict(step=3, loss=1.5, extra=dict(norm=2, none=None), tasks=dict(piqa=dict(acc=0.5, name="x")), on=True)
    assert dict(numbers_in(values)) == {"step": 3, "loss": 1.5, "extra/norm": 2, "tasks/piqa/acc": 0.5}
