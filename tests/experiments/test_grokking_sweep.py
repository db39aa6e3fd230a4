"""The grokking experiment as a whole: equal sweeps, a fair choice, runs that survive a kill, and what is reported."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from experiments.grokking import __main__ as grokking
from experiments.grokking import findings, pool
from experiments.grokking.train import Settings
from harness.machine import git_commit
from tests.conftest import ROOT

SMALL = ["--tasks", "parity", "--optimizers", "adamw", "muon", "--attentions", "softmax", "--losses", "softmax",
         "--widths", "16", "--heads=2", "--seeds", "0", "1", "--lrs=2", "--weight_decays=1", "--batch_sizes", "64",
         "--max_steps=20", "--sustain_steps=10", "--jobs=1", "--preset=full", "--yes"]  # fmt: skip
NUM_RUNS = 2 * (2 + 2)  # optimizers x (pairs tried + seeds reported)


class HerePool:
    """Stands in for the pool of processes: runs everything at once and in this one."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "HerePool":
        return self

    def __exit__(self, *_: object) -> None: ...

    def shutdown(self, **_: Any) -> None: ...

    def submit(self, function: Any, settings: Settings) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(settings))
        except BaseException as error:
            future.set_exception(error)
        return future


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pool, "Workers", HerePool)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def what_came_out(out: Path) -> dict[str, Any]:
    """result.json without what differs from machine to machine and from one time to the next."""
    result: dict[str, Any] = json.loads((out / "result.json").read_text(encoding="utf-8"))
    result["options"].pop("out")
    for run in result["tuning"] + result["runs"]:
        run.pop("seconds")
    return result


def test_a_resumed_sweep_is_the_uninterrupted_one(in_process: None, tmp_path: Path) -> None:
    assert grokking.main([*SMALL, f"--out={tmp_path / 'whole'}"]) == 0
    whole = what_came_out(tmp_path / "whole")
    lines = (tmp_path / "whole/runs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == NUM_RUNS and len(whole["tuning"]) == len(whole["runs"]) == 4
    for kept in (2, 5):  # in the sweep, and after it
        out = tmp_path / f"cut_{kept}"
        out.mkdir()
        (out / "runs.jsonl").write_text(
            "".join(lines[:kept]) + lines[kept][:200], encoding="utf-8"
        )  # killed while it wrote a line
        assert grokking.main([*SMALL, f"--out={out}"]) == 0
        assert what_came_out(out) == whole
        assert (out / "runs.jsonl").read_text(encoding="utf-8").startswith("".join(lines[:kept]))
    assert {run["settings"]["seed"] for run in whole["tuning"]} == {100}
    assert {run["settings"]["seed"] for run in whole["runs"]} == {0, 1}
    assert {(run["git_commit"], run["device"]) for run in whole["runs"]} == {(git_commit(), pool.place())}


def test_a_finished_sweep_runs_nothing_again(
    in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*SMALL, "--optimizers", "muon", f"--out={tmp_path}"]
    assert grokking.main(command) == 0
    first = capsys.readouterr().out
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(pool, "train", lambda settings: pytest.fail("ran again"))
    written = (tmp_path / "result.json").stat().st_mtime_ns
    with pool.Store(tmp_path):  # as while the sweep goes on
        assert grokking.main([*command, "--table"]) == 0
    assert grokking.main(["--draw", str(tmp_path / "result.json")]) == 0
    assert (tmp_path / "result.json").stat().st_mtime_ns == written
    table, _, _ = first.rpartition("2 runs -> ")
    assert capsys.readouterr().out == table * 2
    assert grokking.main(command) == 0
    assert "2 runs to report; 4 are done\n" in capsys.readouterr().err
    assert grokking.main([*SMALL, "--table", f"--out={tmp_path / 'new'}"]) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "experiments.grokking", *SMALL, "--max_steps=200", f"--out={tmp_path}"]
    command += ["--lrs=3", "--weight_decays=5", "--seeds", *map(str, range(99))]  # far more than will be run
    for stop, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            start_new_session=True,
            text=True,
            preexec_fn=hear_ctrl_c,
            encoding="utf-8",
        )
        before = number_of_lines(tmp_path)
        deadline = time.monotonic() + 120
        while number_of_lines(tmp_path) == before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert number_of_lines(tmp_path) > before
        os.kill(process.pid, stop)
        _, errors = process.communicate(timeout=60)  # until every process that holds its stderr is gone
        assert process.returncode == status
        assert "Traceback" not in errors
    kept = pool.Store(tmp_path)
    assert all(run["curves"]["step"][-1] == 200 for run in kept.runs.values())


def hear_ctrl_c() -> None:
    """Tests that were started in the background of a script have it ignored, and their children with them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def number_of_lines(out: Path) -> int:
    file = out / "runs.jsonl"
    return file.read_text(encoding="utf-8").count("\n") if file.exists() else 0


def test_two_processes_do_not_write_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = pool.Store(tmp_path)
    assert grokking.main([*SMALL, f"--out={tmp_path}"]) == 2
    assert "being written by another process" in capsys.readouterr().err
    held.file.close()


def test_a_store_needs_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_locks(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    with pool.Store(tmp_path) as store:
        store.add(run_of())
    assert list(pool.read_runs(tmp_path)) == [Settings(**run_of()["settings"])]
    assert "there are no locks here; see to it that no other process writes it" in capsys.readouterr().err


def test_where_there_is_no_commit_the_result_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    options = grokking.QUICK
    tuning = grokking.tuning_runs(options)
    known = {run: {**run_of(), "settings": asdict(run), "device": "a", "git_commit": ""} for run in tuning}
    known[tuning[0]]["git_commit"] = "c0ffee-dirty"
    assert grokking.collect(options, known)["git_commit"] == "c0ffee-dirty, unknown"


# ------------------------------------------------------------------------------------------------------------
# The protocol


def test_every_optimizer_gets_a_sweep_of_the_same_size() -> None:
    for options in (grokking.Options(), grokking.QUICK):
        counts: dict[tuple[str, str], int] = {}
        for run in grokking.tuning_runs(options):
            counts[run.task, run.optimizer] = counts.get((run.task, run.optimizer), 0) + 1
        assert len(counts) == len(options.tasks) * len(options.optimizers)
        assert set(counts.values()) == {options.lrs * options.weight_decays}
    assert all((len(set(lrs)), len(set(decays))) == (3, 5) for lrs, decays in grokking.GRIDS.values())


def test_the_full_preset_is_everything() -> None:
    tuned = [Settings(task, optimizer) for task in grokking.TASKS for optimizer in grokking.Options().optimizers]
    runs = grokking.reported_runs(grokking.Options(), tuned)
    assert len(set(runs)) == len(runs) == 7 * 6 * 3 * 3 * 5


def test_the_half_split_trains_on_half_as_many_rows() -> None:
    options = grokking.Options(tasks=("add", "gcd"), splits=("paper", "half"))
    shares = {(run.task, run.train_share) for run in grokking.tuning_runs(options)}
    assert shares == {("add", 0.8), ("add", 0.4), ("gcd", 0.5), ("gcd", 0.25)}


def run_of(
    optimizer: str = "muon", sustained: int | None = None, best: float = 0.5, seed: int = 100, **settings: Any
) -> dict[str, Any]:
    """A run as it is kept, made by hand."""
    chosen = asdict(Settings("add", optimizer, seed=seed, max_steps=1000, sustain_steps=200, **settings))
    curves = dict(step=[0, 500], train_accuracy=[0.0, 1.0], val_accuracy=[0.0, best])
    return dict(
        settings=chosen, status="ended", steps=1000, seconds=10.0, memorised=100, collapsed=False,
        crossed=None if sustained is None else sustained - 50, sustained=sustained,
        delay=None if sustained is None else sustained - 100, best_val_accuracy=best, curves=curves,
    )  # fmt: skip


def test_the_sweep_chooses_fewest_steps_then_accuracy() -> None:
    runs = [
        run_of(lr=0.1, sustained=300), run_of(lr=0.2, sustained=200), run_of(lr=0.3, best=1.0),
        run_of("adamw", lr=0.1, best=0.5), run_of("adamw", lr=0.2, best=0.7), run_of("adamw", lr=0.3, best=0.6),
    ]  # fmt: skip
    assert [(best.optimizer, best.lr) for best in grokking.choose(runs)] == [("muon", 0.2), ("adamw", 0.2)]
    second = [run_of(lr=0.1, sustained=210, seed=101), run_of(lr=0.2, seed=101)]  # the latter fails on another seed
    assert [best.lr for best in grokking.choose([*runs[:2], *second])] == [0.1]
    assert [best.lr for best in grokking.choose([*second, *runs[:2]])] == [0.1]


# ------------------------------------------------------------------------------------------------------------
# The report


@pytest.fixture
def result() -> dict[str, Any]:
    """Muon at 100 to 500 steps; AdamW at 600 to 800, and twice never."""
    tuning = [
        run_of(name, lr=lr, weight_decay=wd) for name in ("adamw", "muon") for lr in (0.1, 0.2, 0.3) for wd in (1, 2)
    ]
    steps = {"adamw": (600, 700, 800, None, None), "muon": (100, 200, 300, 400, 500)}
    runs = [
        run_of(name, sustained, seed=seed, lr=0.2 if name == "muon" else 0.3, weight_decay=1)
        for name, of_seeds in steps.items()
        for seed, sustained in enumerate(of_seeds)
    ]
    options = asdict(grokking.Options(max_steps=1000, sustain_steps=200))
    return dict(options=options, device="none", tuning=tuning, runs=runs)


def test_the_table_says_what_the_runs_do(result: dict[str, Any]) -> None:
    adamw, muon = findings.rows(result)
    assert (adamw["sustained"], adamw["interval"], adamw["never"]) == ("800", "600 to never", "2/5")
    assert (muon["sustained"], muon["interval"], muon["never"]) == ("300", "100 to 500", "0/5")
    assert (muon["delay"], muon["memorised"], muon["ratio"]) == ("200", "100", "0.38")
    assert (adamw["crossed"], muon["crossed"]) == ("750", "250")
    assert (muon["p"], adamw["ratio"], adamw["p"]) == ("0.0079", "-", "-")
    assert (adamw["lr"], muon["lr"], muon["decay"]) == ("0.3*", "0.2", "1*")
    told = "\n".join(findings.remarks(result))
    assert "muon over all 1 settings: before adamw in 1, after it in 0; stratified log-rank p = 0.00" in told
    assert "0.38 (1)" in told and "with 5 seeds it covers 94% and p is 0.0079 or more" in told


def test_the_table_in_brief(result: dict[str, Any]) -> None:
    (row,) = findings.summary(result)
    assert row == {
        "setting": "add, 80% of rows, width 128", "adamw": "750 / 800 (3 of 5)", "muon": "250 / 300 (5 of 5)",
        "p, muon": "0.0079",
    }  # fmt: skip
    for run in result["runs"]:
        run["crossed"] = run["sustained"] = None
    (row,) = findings.summary(result)
    assert (row["adamw"], row["muon"], row["p, muon"]) == ("never (0 of 5)", "never (0 of 5)", "-")


def test_verdicts_are_adjusted_over_the_optimizers(result: dict[str, Any]) -> None:
    muon = [run for run in result["runs"] if run["settings"]["optimizer"] == "muon"]
    result["runs"] += [{**run, "settings": {**run["settings"], "optimizer": "aurora"}} for run in muon]
    first, second = findings.verdicts(result)
    assert first["p"] == second["p"] and float(first["holm"]) == pytest.approx(2 * float(first["p"]), rel=0.06)


def test_settings_are_told_apart_by_their_names() -> None:
    differing: list[dict[str, Any]] = [
        {}, {"width": 64}, {"batch_size": 64}, {"train_share": 0.4}, {"attention": "sparsemax"}, {"loss": "stablemax"}
    ]  # fmt: skip
    names = [findings.setting_name(run_of(**settings)) for settings in differing]
    assert len(set(names)) == len(names)
    assert names[0] == "add, 80% of rows, width 128"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tasks", "pow"], "tasks = 'pow' must be one of add, sub"),
        (["--optimizers", "lion"], "optimizers = 'lion' must be one of adamw"),
        (["--preset=slow"], "must be one of quick, full"),
        (["--preset", "slow"], "must be one of quick, full"),
        (["--seeds", "100"], "overlap"),
        (["--widths", "100"], "even number times heads"),
        (["--max_steps", "300"], "more than sustain_steps"),
        (["--lrs=4"], "must be <= 3"),
        (["--losses"], "--losses has no value"),
        (["--seeds", "1", "1"], "each once"),
        (["--attentions", "softmax", "softmax"], "each once"),
        (["--max_steps", "305"], "multiple of 10"),
        (["--heads=0"], "must be >= 1"),
        (["--depth=-1"], "must be >= 1"),
        (["--widths", "0"], "must be >= 2"),
        (["--jobs=-1"], "must be >= 0"),
        (["--adam_lr=nan"], "must be >= 0"),
        (["--seeds", str(2**64)], "must be <= 4611686018427387904"),
        (["--draw", "nothing.json"], "nothing.json"),
        (["--draw", str(ROOT / "experiments/results/row_norms.json")], "not a result of this experiment"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    arguments: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert grokking.main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and told in errors and errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_plan_is_told_and_not_started_without_a_yes(
    in_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [word for word in SMALL if word != "--yes"]
    assert grokking.main([*command, f"--out={tmp_path}"]) == 2
    errors = capsys.readouterr().err
    assert "4 runs to tune 2 optimizers and settings, 4 runs to report; 0 are done" in errors
    assert "at most" in errors and "--yes" in errors
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    assert grokking.main([*SMALL, f"--out={tmp_path}"]) == 2
    assert "runs.jsonl line 1 is no run of this" in capsys.readouterr().err
