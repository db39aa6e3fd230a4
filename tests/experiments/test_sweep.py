"""The sweep against its own runs: the table recomputed with numpy, what a restart repeats, and what is refused."""

import dataclasses
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import sweep
from experiments.sweep import Result, grid_cells, load_sweep, main, table
from tests.experiments.fake_trainer import fake_trainer as fake_trainer

ROOT = Path(__file__).resolve().parents[2]
GRID = ["--grid", "head_lr=0.0001,0.05", "--seeds", "0", "1"]


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


def test_runs_with_neuron_statistics_have_the_spread_of_their_updates_in_the_table(tmp_path: Path) -> None:
    """Two measurements of two layers, of which one had no update yet."""
    results = []
    for name, spread in (("muon", 0.4), ("aurora", 0.1)):
        (tmp_path / name).mkdir()
        neurons = dict(
            gate=dict(update_cv=[None, spread]), up=dict(update_cv=[spread, 3 * spread]),
            down=dict(update_cv=[spread, spread]),
        )  # fmt: skip
        rows = [dict(step=1, train_loss=3.0), dict(step=2, neurons=neurons), dict(step=4, neurons=neurons)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(lines, encoding="utf-8")
        run = result(3.0 + spread, optimizer=name)
        summary = run.summary | {"neurons": neurons}
        results.append(dataclasses.replace(run, directory=str(tmp_path / name), summary=summary))
    plain = result(5.0, optimizer="adamw")
    assert rows_of(table([plain], markdown=True))[0][-1] == "train_time_s"
    found = rows_of(table([*results, plain], markdown=True))
    assert [[row[0], *row[-2:]] for row in found] == [
        ["optimizer", "update_cv gate, up", "update_cv down"], ["aurora", "0.150", "0.100"], ["muon", "0.600", "0.400"],
        ["adamw", "-", "-"],
    ]  # fmt: skip


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
    assert len({line.index(row[4]) + len(row[4]) for line, row in zip(aligned, (header, *rows), strict=True)}) == 1
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


def test_a_cell_that_would_be_refused_is_named_before_any_runs(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([str(tiny_recipe), "--grid", "matrix_optimizer=muon,muonn", "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: matrix_optimizer=muonn: matrix_optimizer = 'muonn' is unknown; did you mean muon?")
    assert not out.exists()


def test_what_the_trainer_alone_refuses_ends_the_sweep_in_its_words(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep, "load_config", lambda argv: None)
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
