"""The sweep against its own runs: the table recomputed with numpy, what a restart repeats, and what is refused."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest

from data import console
from experiments import sweep
from experiments.cost import confirm
from experiments.sweep import Result, grid_cells, load_sweep, main, run_sweep, table

ROOT = Path(__file__).resolve().parents[2]
GRID = ["--grid", "head_lr=0.0001,0.05", "--seeds", "0", "1"]

# Stands in for the trainer where only what the sweep does with it matters. The summary says how it was called.
FAKE_TRAINER = """
import json, pathlib, sys
words = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
if "crash" in sys.argv:
    sys.exit("RuntimeError: out of luck")
directory = pathlib.Path(words["run_dir"], "fake")
directory.mkdir()
summary = dict(status="finished", val_loss=1.0, train_time_s=2.0, time_to_target_s=None, steps_to_target=None,
               git_commit="", device="", arguments=sys.argv[1:])
(directory / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def fake_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe for a sweep of runs that compute nothing."""
    monkeypatch.setattr(sweep, "TRAINER", tmp_path / "fake_trainer.py")
    sweep.TRAINER.write_text(FAKE_TRAINER, encoding="utf-8")
    recipe = tmp_path / "fake.toml"
    recipe.write_text("num_layers = 1\n", encoding="utf-8")
    return recipe


@pytest.fixture(scope="module")
def swept(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished sweep: 2 cells, 2 seeds. Copy it before changing it."""
    out = tmp_path_factory.mktemp("sweep") / "out"
    assert main([str(tiny_recipe), *GRID, "--out", str(out), "--jobs", "2"]) == 0
    return out


def run_directories(out: Path) -> set[Path]:
    return {path.parent.relative_to(out) for path in out.glob("runs/*/*/*/log.txt")}


def rows_of(text: str) -> list[list[str]]:
    """The cells of a Markdown table, header first, without the rule below it."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [rows[0], *rows[2:]]


def result(val_loss: float, status: str = "finished", reached: tuple[float, int] | None = None, **cell: str) -> Result:
    time_s, steps = reached or (None, None)
    target = dict(time_to_target_s=time_s, steps_to_target=steps)
    return Result(cell, 0, 1, 1, "", dict(status=status, val_loss=val_loss, train_time_s=3.0, **target))


# ------------------------------------------------------------------------------------------------------------
# The grid


@pytest.mark.parametrize(
    ("grids", "cells"),
    [
        ([], [{}]),
        ([["a=1,2", "b=x,y"]], [dict(a="1", b="x"), dict(a="1", b="y"), dict(a="2", b="x"), dict(a="2", b="y")]),
        ([["a=1 b=x"], ["c=3"]], [{"a": "1", "b": "x"}, {"c": "3"}]),
        ([["a=1,2"], ["a=2,3"]], [{"a": "1"}, {"a": "2"}, {"a": "3"}]),
        ([["a=1 b=2"], ["b=2 a=1"]], [{"a": "1", "b": "2"}]),
        ([["betas=0.9:0.95,0.8:0.95"]], [{"betas": "0.9:0.95"}, {"betas": "0.8:0.95"}]),
    ],
    ids=["none", "product", "quoted union", "overlap", "same cell, other order", "tuples"],
)
def test_grid_cells(grids: list[list[str]], cells: list[dict[str, str]]) -> None:
    assert grid_cells(grids) == cells


@pytest.mark.parametrize("word", ["a", "a=", "a=1,,2", "=1", "2a=1", "a=1 a=2"])
def test_malformed_grid_is_refused_by_name(word: str) -> None:
    with pytest.raises(ValueError, match=f"{word.split()[-1]!r} is not key=value"):
        grid_cells([[word]])


def test_cell_names_are_file_names_of_one_cell() -> None:
    cells = [{"files": "a/b"}, {"files": "a_b"}, {"files": "a%2Fb"}, {"a": "1", "b": "2"}, {"a": "1,b=2"}, {}]
    names = [sweep.cell_name(cell) for cell in cells[:4] + cells[5:]]
    assert len(set(names)) == len(names)
    assert not any("/" in name for name in names)
    assert sweep.cell_name({"a": "Jos\udcc3\udca9"}) == sweep.cell_name({"a": "José"})  # as an ASCII locale reads it
    assert sweep.cell_name({"b": "2", "a": "1"}) == sweep.cell_name({"a": "1", "b": "2"})


# ------------------------------------------------------------------------------------------------------------
# What is computed


def test_table_is_the_mean_and_sd_of_the_summaries(swept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summaries = [json.loads(path.read_text(encoding="utf-8")) for path in swept.glob("runs/*/*/*/summary.json")]
    assert sorted((s["config"]["head_lr"], s["config"]["seed"]) for s in summaries) == [
        (0.0001, 0), (0.0001, 1), (0.05, 0), (0.05, 1),
    ]  # fmt: skip
    expected = []
    for head_lr in ("0.05", "0.0001"):  # 40 steps at the low rate learn less
        losses = np.array([s["val_loss"] for s in summaries if s["config"]["head_lr"] == float(head_lr)])
        times = np.array([s["train_time_s"] for s in summaries if s["config"]["head_lr"] == float(head_lr)])
        loss = f"{losses.mean():.4f} ± {losses.std(ddof=1):.4f}"
        expected.append([head_lr, "0/2", "0/2", loss, "-", "-", f"{times.mean():.2f} ± {times.std(ddof=1):.2f}"])
    assert main(["tiny.toml", "--out", str(swept), "--table", "--markdown"]) == 0
    header, *rows = rows_of(capsys.readouterr().out)
    assert rows == expected
    assert header[0] == "head_lr"
    assert len({s["val_loss"] for s in summaries}) == 4  # seeds differ, or this test would show nothing


def test_json_tells_what_ran(swept: Path, tiny_recipe: Path) -> None:
    record = json.loads((swept / "sweep.json").read_text(encoding="utf-8"))
    assert record["recipe_text"] == tiny_recipe.read_text(encoding="utf-8")
    assert record["cells"] == [{"head_lr": "0.0001"}, {"head_lr": "0.05"}]
    assert (record["seeds"], record["jobs"], record["threads"]) == ([0, 1], 2, 1)
    assert [(run["overrides"]["head_lr"], run["seed"]) for run in record["runs"]] == [
        ("0.0001", 0), ("0.05", 0), ("0.0001", 1), ("0.05", 1),
    ]  # fmt: skip
    for run in record["runs"]:
        summary = json.loads(Path(run["directory"], "summary.json").read_text(encoding="utf-8"))
        assert run["summary"] == summary
        assert summary["config"]["head_lr"] == float(run["overrides"]["head_lr"])
        assert summary["config"]["seed"] == run["seed"]


def test_table_of_cells_that_reach_diverge_or_do_neither() -> None:
    results = [
        result(1.0, "diverged by step 3: the training loss is nan", lr="9", optimizer="muon"),
        result(2.0, lr="9", optimizer="muon"),
        result(4.0, lr="1", optimizer="muon"),
        result(3.0, "stopped at target", (10.0, 100), lr="2", optimizer="aurora"),
        result(3.2, "stopped at target", (11.0, 110), lr="2", optimizer="aurora"),
        result(3.4, lr="2", optimizer="aurora"),
        result(3.9, lr="3", optimizer="aurora"),
        result(0.1, "interrupted", lr="4", optimizer="aurora"),
    ]
    header, *rows = rows_of(table(results, markdown=True))
    assert header == ["lr", "optimizer", "diverged", "reached", *sweep.DECIMALS]
    assert rows == [
        ["2", "aurora", "0/3", "2/3", "3.2000 ± 0.2000", "10.50 ± 0.71", "105 ± 7", "3.00 ± 0.00"],
        ["3", "aurora", "0/1", "0/1", "3.9000", "-", "-", "3.00"],
        ["1", "muon", "0/1", "0/1", "4.0000", "-", "-", "3.00"],
        ["9", "muon", "1/2", "0/2", "2.0000", "-", "-", "3.00"],
    ]
    assert rows_of(table(results, markdown=True, best_by="optimizer"))[1:] == [rows[0], rows[2]]
    aligned = table(results).splitlines()
    assert [line.split()[:2] for line in aligned] == [row[:2] for row in (header, *rows)]
    assert len({line.index(row[4]) for line, row in zip(aligned, (header, *rows), strict=True)}) == 1
    with pytest.raises(ValueError, match="it has: lr, optimizer"):
        table(results, best_by="seed")


def test_diverged_run_is_a_result(tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Weights grow 1e16 times a step: finite through the trainer's warm-up, not much longer.
    command = [str(tiny_recipe), "--grid", "weight_decay=1e18", "--out", str(tmp_path / "out"), "--markdown"]
    assert main(command) == 0
    assert rows_of(capsys.readouterr().out)[1][:4] == ["1e18", "1/1", "0/1", "-"]
    before = run_directories(tmp_path / "out")
    assert main(command) == 0
    assert run_directories(tmp_path / "out") == before


# ------------------------------------------------------------------------------------------------------------
# Starting again


def test_restart_runs_only_what_has_no_result(swept: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(swept, out)
    lost, *kept = sorted(run_directories(out))
    shutil.rmtree(out / lost)
    (out / lost.parent / "interrupted").mkdir()
    summary = json.loads((out / kept[0] / "summary.json").read_text(encoding="utf-8"))
    (out / lost.parent / "interrupted" / "summary.json").write_text(
        json.dumps({**summary, "status": "interrupted"}), encoding="utf-8"
    )
    assert main([str(tiny_recipe), *GRID, "--out", str(out), "--jobs", "1"]) == 0
    new = run_directories(out) - set(kept)
    assert len(run_directories(out)) == 4
    assert {path.parent for path in new} == {lost.parent}
    results = load_sweep(out).results.values()
    assert {Path(run.directory).relative_to(out) for run in results} == {*new, *kept}
    assert sorted(run.jobs for run in results) == [1, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("stop", "attempts"), [(signal.SIGTERM, 2), (signal.SIGKILL, 1)])
def test_stopped_sweep_goes_on(
    stop: signal.Signals, attempts: int, swept: Path, tiny_recipe: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One of two cells is done and one trains when the sweep is stopped. An orphan's run is awaited and counts."""
    out = tmp_path / "out"
    shutil.copytree(swept, out)
    done = run_directories(out)
    arguments = [str(tiny_recipe), "--out", str(out), "--grid", "head_lr=0.05", "--grid", "train_steps=200"]
    process = subprocess.Popen([sys.executable, "tests/warm.py", "-m", "experiments.sweep", *arguments], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in out.glob("runs/train_steps=200/seed0/*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(stop)
    assert process.wait() == (-stop if stop == signal.SIGKILL else 130)
    *ended, last = json.loads((out / "sweep.json").read_text(encoding="utf-8"))["runs"]
    assert len(ended) == 4 and all(run["summary"] for run in ended)
    assert last["overrides"] == {"train_steps": "200"} and not last["summary"]
    if stop == signal.SIGTERM:
        with (out / ".lock").open(encoding="utf-8") as lock:  # every process of a sweep holds it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert main(arguments) == 0
    assert ("waiting for another sweep" in capfd.readouterr().err) == (stop == signal.SIGKILL)
    assert {path.parts[1] for path in run_directories(out) - done} == {"train_steps=200"}
    assert len(run_directories(out)) == len(done) + attempts
    assert all(run.ended for run in load_sweep(out).results.values())


@pytest.mark.parametrize("change", ["recipe", "--set"])
def test_other_recipe_or_settings_are_refused(
    change: str, swept: Path, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "changed.toml"
    recipe.write_text(
        tiny_recipe.read_text(encoding="utf-8") + "momentum = 0.9\n" * (change == "recipe"), encoding="utf-8"
    )
    before = (swept / "sweep.json").read_bytes()
    more = ["--set", "momentum=0.9"] if change == "--set" else []
    assert main([str(recipe), *GRID, *more, "--out", str(swept)]) == 2
    what = str(recipe) if change == "recipe" else "--set"
    assert f"has runs of another {what}; undo the change or use another --out" in capsys.readouterr().err
    assert (swept / "sweep.json").read_bytes() == before


# ------------------------------------------------------------------------------------------------------------
# Mistakes and crashes


def test_setting_that_the_trainer_refuses_ends_the_sweep_in_its_words(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([str(tiny_recipe), "--grid", "matrix_optimiser=muon,aurora", "--out", str(out)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: matrix_optimiser=muon/seed0: ")
    assert last.endswith("matrix_optimiser is not a setting; did you mean matrix_optimizer?")
    assert [path.name for path in (out / "runs").iterdir()] == ["matrix_optimiser=muon"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a recipe first"),
        (["missing.toml"], "missing.toml"),
        (["fake.toml", "--grid", "lr"], "'lr' is not key=value"),
        (["fake.toml", "--grid", "seed=1,2"], "seed cannot be set here"),
        (["fake.toml", "--grid", "lr=1", "--set", "lr=2"], "lr cannot be set here"),
        (["fake.toml", "--jobs", "-1"], "jobs = -1 must be 0 or more"),
        (["fake.toml", "--seed", "1"], "seed is not a setting; did you mean seeds?"),
        (["fake.toml", "--table"], "sweep.json"),
    ],
    ids=["no recipe", "missing recipe", "no value", "seed", "fixed and grid", "jobs", "misspelt", "table of nothing"],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, fake_trainer: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.glob("runs/*/runs"))


def test_crash_is_reported_and_the_others_run(
    fake_trainer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(fake_trainer), "--grid", "optimizer=crash,muon", "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    output = tmp_path / "out/runs/optimizer=crash/seed0/output.txt"
    assert captured.err.splitlines()[-1] == f"optimizer=crash/seed0: crashed, see {output}"
    assert "out of luck" in output.read_text(encoding="utf-8")
    assert [line.split()[0] for line in captured.out.splitlines()] == ["optimizer", "muon"]


# ------------------------------------------------------------------------------------------------------------
# Processes


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
        str(fake_trainer), "--dtype", "float32", "--adam_betas", "0.9", "0.95",
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


# ------------------------------------------------------------------------------------------------------------
# Asking


@pytest.mark.parametrize("error", [EOFError(), OSError(errno.EIO, "Input/output error"), None], ids=str)
def test_only_a_yes_starts_what_was_asked_for(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-D, a terminal that went away, and a closed stdin that prepare() has replaced."""
    if error is None:
        monkeypatch.setattr(sys, "stdin", None)
        console.prepare()
        with pytest.raises(ValueError, match="there is no terminal to confirm this in; add --yes"):
            confirm(["a plan"], yes=False)
        return
    monkeypatch.setattr(sys, "stdin", mock.Mock(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", mock.Mock(side_effect=error))
    with pytest.raises(KeyboardInterrupt):
        confirm(["a plan"], yes=False)
    monkeypatch.setattr("builtins.input", lambda: "Yes ")
    confirm(["a plan"], yes=False)
