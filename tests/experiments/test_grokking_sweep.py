"""The grokking experiment as a whole: equal sweeps, a fair choice, runs that survive a kill, and what is reported."""

import errno
import fcntl
import json
import math
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
from experiments.grokking import findings, pool, protocol
from experiments.grokking.protocol import PARTS
from experiments.grokking.survival import Ratio
from experiments.grokking.train import Settings
from harness.machine import git_commit
from tests.conftest import ROOT

SMALL = ["--preset=full", "--parts", "main", "--tasks", "parity", "--optimizers", "adamw", "muon", "--seeds", "0", "1",
         "--candidates=2", "--max_steps=20", "--jobs=1", "--yes"]  # fmt: skip
TINY = protocol.Part("tiny", ("parity",), ("parity",), changes=dict(width=16, heads=2, batch_size=16))
SHORT = """  # the command, with the protocol of these tests
import sys
from experiments.grokking import __main__ as grokking, protocol
protocol.RUNGS = grokking.RUNGS = (4, 8, 12)
changes = dict(width=16, heads=2, batch_size=16)
protocol.PARTS["main"] = protocol.Part("tiny", ("parity",), ("parity",), changes=changes)
sys.exit(grokking.main(sys.argv[1:]))
"""
NUM_TUNING, NUM_REPORTED = 2 * (2 + 1 + 1), 2 * 2  # optimizers x (settings in three rounds), optimizers x seeds


@pytest.fixture(autouse=True)
def small_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of a few steps of a small model."""
    monkeypatch.setitem(PARTS, "main", TINY)
    monkeypatch.setattr(protocol, "RUNGS", (4, 8, 12))
    monkeypatch.setattr(protocol, "LATER_TASKS", ("parity",))
    monkeypatch.setattr(protocol, "LATER_STEPS", 20)
    monkeypatch.setattr(grokking, "RUNGS", protocol.RUNGS)


class HerePool:
    """Stands in for the pool of processes: runs everything at once and in this one."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> "HerePool":
        return self

    def __exit__(self, *_: object) -> None: ...

    def shutdown(self, **_: Any) -> None: ...

    def submit(self, function: Any, stack: list[Settings]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(function(stack))
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
    for run in result["runs"]:
        run.pop("seconds_per_step")
    return result


def test_a_resumed_experiment_is_the_uninterrupted_one(in_process: None, tmp_path: Path) -> None:
    assert grokking.main([*SMALL, f"--out={tmp_path / 'whole'}"]) == 0
    whole = what_came_out(tmp_path / "whole")
    lines = (tmp_path / "whole/runs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == NUM_TUNING + NUM_REPORTED
    assert (len(whole["tuning"]), len(whole["runs"])) == (NUM_TUNING, NUM_REPORTED)
    for kept in (1, 3, NUM_TUNING, NUM_TUNING + 1):  # within a stack and between two, in the choice and after it
        out = tmp_path / f"cut_{kept}"
        out.mkdir()
        cut = "".join(lines[:kept]) + lines[kept][:200]  # killed while it wrote a line
        (out / "runs.jsonl").write_text(cut, encoding="utf-8")
        assert grokking.main([*SMALL, f"--out={out}"]) == 0
        assert what_came_out(out) == whole
        assert (out / "runs.jsonl").read_text(encoding="utf-8").startswith("".join(lines[:kept]))
    settings = [json.loads(line)["settings"] for line in lines]
    assert [each["seed"] for each in settings[:NUM_TUNING]] == [100] * NUM_TUNING
    assert {each["seed"] for each in settings[NUM_TUNING:]} == {0, 1}
    assert (whole["git_commit"], whole["device"]) == (git_commit(), pool.machine_name())


def test_what_is_reported_is_what_was_chosen(in_process: None, tmp_path: Path) -> None:
    assert grokking.main([*SMALL, "--parts", "main", "later", f"--out={tmp_path}"]) == 0
    result = what_came_out(tmp_path)
    last = [row for row in result["tuning"] if row["max_steps"] == protocol.RUNGS[-1]]
    assert {row["optimizer"]: {key: row[key] for key in protocol.TUNED} for row in last} == result["chosen"]["main"]
    for run in result["runs"]:
        settings = findings.settings_of(run)
        chosen = result["chosen"]["main"][settings.optimizer]
        near = {chosen["weight_decay"] * factor for factor in (1 / 3, 1, 3)} if run["part"] == "later" else None
        assert settings.adam_weight_decay == chosen["adam_weight_decay"]
        assert settings.weight_decay in [pytest.approx(each, rel=0.06) for each in near or {chosen["weight_decay"]}]
    assert len([run for run in result["runs"] if run["part"] == "later"]) == 27
    assert len(findings.later_rows(result)) == 3


def test_a_finished_experiment_runs_nothing_again(
    in_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*SMALL, f"--out={tmp_path}"]
    assert grokking.main(command) == 0
    first = capsys.readouterr().out
    assert (tmp_path / "result.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(pool, "train", lambda stack: pytest.fail("ran again"))
    written = (tmp_path / "result.json").stat().st_mtime_ns
    with pool.Store(tmp_path):  # as while it goes on
        assert grokking.main([*command, "--table"]) == 0
    assert grokking.main(["--draw", str(tmp_path / "result.json")]) == 0
    assert (tmp_path / "result.json").stat().st_mtime_ns == written
    table, _, _ = first.rpartition(f"{NUM_REPORTED} runs -> ")
    assert capsys.readouterr().out == table * 2
    assert grokking.main(command) == 0
    assert f"{NUM_REPORTED} runs to report; {NUM_TUNING + NUM_REPORTED} are done\n" in capsys.readouterr().err
    assert grokking.main([*SMALL, "--table", f"--out={tmp_path / 'new'}"]) == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_killed_sweep_leaves_no_process_and_goes_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SHORT, *SMALL, f"--out={tmp_path}"]
    command += ["--candidates=999"]  # far more than will be run
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
    assert all(run["steps"] == 4 for run in kept.runs.values())


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


def test_where_there_is_no_commit_the_result_says_so() -> None:
    runs = [{**run_of(), "device": "a", "git_commit": commit} for commit in ("", "c0ffee-dirty")]
    result = grokking.collect(grokking.QUICK, [], {"main": runs}, {})
    assert result["git_commit"] == "c0ffee-dirty, unknown"


# ------------------------------------------------------------------------------------------------------------
# The protocol


def test_the_full_preset_is_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    options, any_choice = grokking.Options(), dict.fromkeys(protocol.TUNED, 0.1)
    chosen = {name: dict.fromkeys(part.optimizers, any_choice) for name, part in PARTS.items()}
    found = {name: len(set(runs)) for name, runs in grokking.reported(options, chosen).items()}
    assert found["main"] == 7 * 6 * 6
    assert (found["published"], found["held"], found["zero"], found["full_batch"]) == (72, 36, 24, 12)
    assert found.keys() == {*PARTS, "later"} and found["later"] == 27
    grokking.check(options)
    grokking.check(grokking.QUICK)


def test_published_shares_are_published() -> None:
    found = {task: PARTS["published"].settings(task, "muon").train_share for task in PARTS["published"].tasks}
    assert found == {"add": 0.8, "mul": 0.5, "div": 0.8, "exp": 0.7, "gcd": 0.5, "parity": 0.5}
    assert PARTS["full_batch"].settings("add", "muon").train_share == 0.3


def test_parts_have_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    options = grokking.Options(tasks=("add", "div"), optimizers=("muon", "sgd"), parts=("main", "held", "batch"))
    found = grokking.parts_of(options)
    assert {name: (part.tasks, part.optimizers) for name, part in found.items()} == {
        "main": (("add", "div"), ("muon", "sgd")), "held": (("add", "div"), ("muon",))
    }  # fmt: skip
    assert found["main"].tuned_on == ("add", "mul")


def test_a_part_may_take_the_choice_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    options = grokking.Options(parts=("full_batch",), optimizers=("muon", "sgd"), seeds=(1,))
    assert [(name, optimizer) for name, _, optimizer in grokking.choosing(options)] == [("width", "muon")]
    (run,) = grokking.reported(options, {"width": {"muon": dict.fromkeys(protocol.TUNED, 0.7)}})["full_batch"]
    assert (run.task, run.batch_size, run.width, run.lr) == ("add", 0, 128, 0.7)


def run_of(
    optimizer: str = "muon", crossed: int | None = None, seed: int = 100, part: str = "main", task: str = "parity",
    **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """A run as it is kept, made by hand."""
    chosen = asdict(Settings(task, optimizer, seed=seed, max_steps=1000, **settings))
    curves = dict(train_accuracy=[0.0, 1.0], val_accuracy=[0.0, 0.5])
    return dict(
        part=part, settings=chosen, status="ended", steps=1000, seconds_per_step=0.01, memorised=100,
        collapsed=False, crossed=crossed, held=None if crossed is None else crossed + 50, val_when_memorised=0.1,
        best_val_accuracy=0.5, lowest_after=None if crossed is None else 0.9, curves=curves,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# The report


@pytest.fixture
def result() -> dict[str, Any]:
    """Muon at 100 to 500 steps; AdamW at 600 to 800, and twice never."""
    steps = {"adamw": (600, 700, 800, None, None), "muon": (100, 200, 300, 400, 500)}
    runs = [run_of(name, crossed, seed) for name, of_seeds in steps.items() for seed, crossed in enumerate(of_seeds)]
    chosen = {"adamw": dict(lr=0.05, weight_decay=0.3, adam_weight_decay=0.1)}
    chosen["muon"] = dict(lr=0.02, weight_decay=0.3, adam_weight_decay=0.1)
    options = asdict(grokking.Options(max_steps=1000, seeds=(0, 1, 2, 3, 4)))
    return dict(options=options, device="none", tuning=[], chosen={"main": chosen}, runs=runs)


def test_the_table_says_what_the_runs_do(result: dict[str, Any]) -> None:
    (row,) = findings.rows(result)
    assert row == {
        "task": "parity", "adamw": "100 / 800 / 850 (3 of 5)", "muon": "100 / 300 / 350",
        "muon / adamw": "0.17 to 0.38", "interval": "to 0.69", "p (Holm)": "0.0079",
    }  # fmt: skip
    told = "\n".join(findings.remarks(result))
    assert "muon, tiny, parity: before adamw in 1, after it in 0; common ratio 0." in told
    assert "covers 97% or more" in told


def test_a_choice_with_little_beyond_it_is_told() -> None:
    rates = [0.001, 0.002, 0.003, 0.004, 0.005]
    tuning = [
        dict(part="main", optimizer=name, lr=rate, weight_decay=decay, adam_weight_decay=0.1 + rate)
        for name in ("adamw", "muon")
        for rate, decay in zip(rates, (1, 2, 3, 4, 5), strict=True)
    ]
    chosen = {"adamw": dict(lr=0.004, weight_decay=3, adam_weight_decay=0.101)}
    chosen["muon"] = dict(lr=0.003, weight_decay=3, adam_weight_decay=0.103)
    told = findings.edges(dict(chosen={"main": chosen}, tuning=tuning))
    assert told == ["main, adamw: lr 0.004", "main, adamw: adam_weight_decay 0.101"]


def test_a_part_may_count_to_another_milestone(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for run in result["runs"]:
        if run["settings"]["optimizer"] == "muon":
            run["held"] = 400
    plain = findings.verdicts(result, "muon")["main", "parity"]
    monkeypatch.setitem(PARTS, "main", protocol.Part("tiny", milestone="held"))
    held = findings.verdicts(result, "muon")["main", "parity"]
    assert held.ratio.high == pytest.approx(400 / 630) and plain.ratio.high != held.ratio.high
    assert held.ratio.low == 0 and held.ratio.most == pytest.approx(400 / 700)  # cut off: not held from 700 on


def test_p_values_are_adjusted_over_the_tasks_of_a_part(result: dict[str, Any]) -> None:
    for run in list(result["runs"]):
        for part, task in (("main", "add"), ("zero", "add")):
            settings = {**run["settings"], "task": task}
            result["runs"].append({**run, "part": part, "settings": settings})
    found = findings.verdicts(result, "muon")
    adjusted = [found[arm].adjusted for arm in (("main", "parity"), ("main", "add"), ("zero", "add"))]
    assert adjusted == pytest.approx([2 / 126, 2 / 126, 1 / 126])
    total = findings.overall(result, "muon")
    assert total is not None
    assert (total.tasks, total.before, total.after) == (("parity", "add"), 2, 0)
    assert total.low < total.ratio < total.high < 1
    assert total.p == pytest.approx(2 / 126**2, abs=2e-4)
    assert [row["task"] for row in findings.rows(result)] == ["parity", "add", f"add, {PARTS['zero'].text}"]


def test_tasks_that_no_optimizer_learns_say_nothing(result: dict[str, Any]) -> None:
    """One run in five that does is no ratio."""
    known = findings.overall(result, "muon")
    result["runs"] += [run_of("adamw", 900 if seed == 1 else None, seed, task="exp") for seed in range(5)]
    result["runs"] += [run_of("muon", None, seed, task="exp") for seed in range(5)]
    assert findings.overall(result, "muon") == known
    assert findings.overall(result, "sgd") is findings.overall(result, "muon", "published") is None
    assert findings.overall(result, "muon", tasks=("exp",)) is None


@pytest.mark.parametrize(
    ("bounds", "ratio", "interval"),
    [
        ((0.5, 0.5, 0.4, 0.6), "0.50", "0.40 to 0.60"),
        ((0, 0.3, 0, 0.4), "< 0.30", "to 0.40"),
        ((3, math.inf, 2, math.inf), "> 3.00", "from 2.00"),
        ((0.2, 0.3, 0, 0.4), "0.20 to 0.30", "to 0.40"),
        ((0, math.inf, 0, math.inf), "?", "?"),
    ],
)
def test_what_is_not_known_is_not_told(bounds: tuple[float, ...], ratio: str, interval: str) -> None:
    found = Ratio(*bounds, coverage=0.95)
    assert (findings.ratio_in_words(found), findings.interval_in_words(found)) == (ratio, interval)


def test_what_became_of_generalised_runs(result: dict[str, Any]) -> None:
    ended = ((0.99, 0.99, 100), (0.9, 0.96, 100), (0.3, 0.4, 100), (None, 0.2, None), (0.97, 0.97, 100))
    for index, (lowest, last, crossed) in enumerate(ended):
        run = run_of("muon", crossed, part="later", is_frozen=True)
        run |= {"lowest_after": lowest, "curves": dict(train_accuracy=[1], val_accuracy=[last])}
        result["runs"].append({**run, "status": "diverged" if index == 4 else "ended"})
    (row,) = findings.later_rows(result)
    assert list(row.values()) == ["muon", "parity", "frozen", "5", "4", "3", "2", "2"]
    assert len(findings.rows(result)) == 1  # those are of other steps


def test_a_kept_run_is_the_run_with_half_of_its_curve() -> None:
    run = {**run_of("sgd", 300, seed=3, width=32), "device": "a", "git_commit": "b"}
    run["curves"] = dict(train_accuracy=[0.12345, 0.2, 0.3], val_accuracy=[0.5, 0.6, 0.7])
    kept = findings.thinned(run)
    assert kept["curves"] == dict(train_accuracy=[0.123, 0.3], val_accuracy=[0.5, 0.7])
    assert kept == {**run_of("sgd", 300, seed=3, width=32), "curves": kept["curves"]}


def test_a_run_that_is_known_is_not_replaced(tmp_path: Path) -> None:
    """A stack is trained whole, and known runs in it come out with other last digits."""
    with pool.Store(tmp_path) as store:
        store.add(run_of(crossed=100))
        store.add(run_of(crossed=120))
    (run,) = pool.read_runs(tmp_path).values()
    assert run["crossed"] == 100


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tasks", "pow"], "tasks = 'pow' must be one of add, sub"),
        (["--parts", "half"], "parts = 'half' must be one of main, published"),
        (["--optimizers", "lion"], "optimizers = 'lion' must be one of adamw"),
        (["--preset=slow"], "must be one of quick, full"),
        (["--preset", "slow"], "must be one of quick, full"),
        (["--seeds", "100"], "have the tuning_seed"),
        (["--seeds"], "--seeds has no value"),
        (["--seeds", "1", "1"], "each once"),
        (["--parts", "main", "main"], "each once"),
        (["--max_steps", "305"], "multiple of 20"),
        (["--candidates=0"], "must be >= 1"),
        (["--jobs=-1"], "must be >= 0"),
        (["--seeds", str(2**64)], "must be <= 4611686018427387904"),
        (["--preset=full", "--parts", "later"], "goes on from what main chose"),
        (["--preset=full", "--parts", "main", "later", "--optimizers", "muon"], "goes on from what main chose"),
        (["--preset=full", "--parts", "main", "later", "--tasks", "div"], "later is of parity alone"),
        (["--preset=full", "--parts", "batch", "--tasks", "add"], "no part that was named has any"),
        (["--preset=full", "--parts", "batch", "--optimizers", "sgd"], "no part that was named has any"),
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
    told = f"{NUM_TUNING} runs to choose settings in 3 rounds, {NUM_REPORTED} runs to report; 0 are done"
    assert told in errors
    assert "at most" in errors and "--yes" in errors
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    assert grokking.main([*SMALL, f"--out={tmp_path}"]) == 2
    assert "runs.jsonl line 1 is no run of this" in capsys.readouterr().err
