"""The processes of a sweep: what each is called with and given, and how they end."""

import errno
import fcntl
import json
import os
import signal
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from experiments import sweep
from experiments.sweep import main, run_sweep
from tests.experiments.fake_trainer import fake_trainer as fake_trainer


def test_arguments_and_order_of_runs(fake_trainer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, processes = sweep._start, []

    def start(*arguments: Any) -> Any:
        assert all(process.poll() is not None for process in processes)  # one after the other
        processes.append(genuine(*arguments))
        return processes[-1]

    monkeypatch.setattr(sweep, "_start", start)
    cells = [{"lr": "0.1"}, {"adam_betas": "0.9:0.95"}]
    results = run_sweep(str(fake_trainer), cells, [3, 4], tmp_path / "out", fixed={"dtype": "float32"})
    assert [(run.overrides, run.seed) for run in results] == [(cell, seed) for seed in (3, 4) for cell in cells]
    folder = tmp_path / "out/runs/adam_betas=0.9:0.95/seed3"
    assert results[1].summary["arguments"] == [
        str(fake_trainer), "--dtype=float32", "--adam_betas=0.9,0.95",
        "--seed=3", f"--run_dir={folder}", "--name=adam_betas=0.9:0.95",
    ]  # fmt: skip
    assert [process.args[2:] for process in processes] == [run.summary["arguments"] for run in results]


class FakeProcess:
    """A run of a sweep that ends when the test says so."""

    all: ClassVar[list["FakeProcess"]] = []

    def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
        self.command, self.environment, self.returncode, self.pid = command, env, None, 2**30
        self.all.append(self)

    def end(self) -> None:
        (words,) = (word.partition("=")[2] for word in self.command if word.startswith("--run_dir="))
        Path(words, "fake").mkdir()
        summary = dict(status="finished", val_loss=1.0, git_commit="", device="")
        Path(words, "fake/summary.json").write_text(json.dumps(summary), encoding="utf-8")
        self.returncode = 0

    def poll(self) -> int | None:
        return self.returncode

    def terminate(self) -> None:
        self.returncode = -signal.SIGTERM

    def wait(self, timeout: float | None = None) -> int | None:
        return self.returncode


@pytest.fixture
def fake_processes(monkeypatch: pytest.MonkeyPatch) -> list[FakeProcess]:
    monkeypatch.setattr(FakeProcess, "all", [])
    monkeypatch.setattr(sweep.subprocess, "Popen", FakeProcess)
    return FakeProcess.all


def test_each_job_has_a_gpu_and_threads_of_its_own(
    fake_trainer: Path, fake_processes: list[FakeProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second run ends first, so the third gets its GPU; then the first, whose GPU the fourth gets."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    ends = iter((1, 0, 3, 2))
    monkeypatch.setattr(time, "sleep", lambda _: fake_processes[next(ends)].end())
    results = run_sweep(str(fake_trainer), [{}], [0, 1, 2, 3], tmp_path / "out")
    assert [run.environment["CUDA_VISIBLE_DEVICES"] for run in fake_processes] == ["5", "7", "7", "5"]
    assert {run.environment["OMP_NUM_THREADS"] for run in fake_processes} == {"3"}
    assert {(run.jobs, run.threads) for run in results} == {(2, 3)}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert sweep.visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep.visible_gpus() == ["0", "1"]


def test_a_second_stop_does_not_keep_the_first_from_ending_the_runs(
    fake_trainer: Path, fake_processes: list[FakeProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """As a closed terminal sends two: the other waits until the runs have ended and sweep.json says so."""
    saves: list[bool] = []
    genuine = sweep.Sweep.save

    def save(of: sweep.Sweep) -> None:
        if fake_processes and fake_processes[0].returncode is not None:
            signal.raise_signal(signal.SIGTERM)
            saves.append(True)
        genuine(of)

    monkeypatch.setattr(sweep.Sweep, "save", save)
    monkeypatch.setattr(time, "sleep", lambda _: signal.raise_signal(signal.SIGHUP))
    monkeypatch.setattr(signal, "getsignal", lambda _: signal.SIG_DFL)  # whatever runs this test ignores
    assert main([str(fake_trainer), "--out", str(tmp_path / "out")]) == 130
    assert fake_processes[0].returncode == -signal.SIGTERM and saves == [True]
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; the same command goes on from here"


def test_a_sweep_needs_no_locks(
    fake_trainer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", without_locks)
    assert main([str(fake_trainer), "--out", str(tmp_path / "out")]) == 0
    assert "there are no locks here, so that another sweep in it would not be noticed" in capsys.readouterr().err


def without_locks(*_: Any) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def test_names_and_words_are_the_users(
    fake_trainer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder in ~ with brackets, and a value with a slash and a character beyond ASCII."""
    monkeypatch.setenv("HOME", str(tmp_path))
    fake_trainer.write_bytes(b"\xef\xbb\xbf" + fake_trainer.read_bytes())
    command = [f"~/{fake_trainer.name}", "--grid", "author=José/..", "--out", "~/sweep [1]"]
    assert main(command) == 0
    assert [path.name for path in (tmp_path / "sweep [1]/runs").iterdir()] == ["author=Jos%C3%A9%2F.."]
    record = json.loads((tmp_path / "sweep [1]/sweep.json").read_text(encoding="utf-8"))
    assert record["recipe"] == str(fake_trainer) and record["recipe_text"] == "num_layers = 1\n"
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(command) == 0 and len(list((tmp_path / "sweep [1]").glob("runs/*/*/*"))) == 2  # output.txt and the run


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(
    fake_trainer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main([str(fake_trainer), "--out", str(tmp_path / "file/out")]) == 2
    told = f"error: {tmp_path}/file/out cannot be written (Not a directory); choose another folder, such as"
    assert capsys.readouterr().err.startswith(told)
