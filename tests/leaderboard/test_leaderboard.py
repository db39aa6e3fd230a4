"""Records of real runs: read, added, ranked, compared, drawn and run again."""

import cProfile
import errno
import json
import lzma
import pstats
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import leaderboard.__main__ as cli
from leaderboard import plots, rank, verify_duel
from leaderboard.records import find_records, load_record
from leaderboard.runs import parse_log, read_run
from leaderboard.verify import reasons, verify_all
from tests.conftest import ROOT
from tests.record_fixtures import ALL, SEEDS, edit_summary, pack_as, read_texts, set_facts, set_rows, write_texts

# Reading


def test_a_log_gives_back_its_sources_and_lines(tiny_runs: list[Path]) -> None:
    run = read_run(tiny_runs[2])
    for path in ("train_gpt.py", "data/loader.py", "optim/aurora.py"):
        assert run.log.sources[path] == (ROOT / path).read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (tiny_runs[2] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line.step, line.kind) for line in run.log.lines] == [
        (row["step"], "val" if "val_loss" in row else "train") for row in rows
    ]
    assert run.last == (40, rows[-1]["train_time_s"], rows[-1]["val_loss"])
    assert run.seed == 2
    assert run.log.ending["run"] == "finished"
    assert not run.broken


@pytest.mark.parametrize(
    ("line", "time_s", "step_avg_ms"),
    [
        ("step:125/3250 val_loss:4.58616 train_time:66.065s step_avg:528.52ms", 66.065, 528.52),
        ("step:125/1390 val_loss:4.5861 train_time:7930ms step_avg:63.44ms", 7.93, 63.44),
        ("step:0/1390 val_loss:10.8258 train_time:0ms step_avg:nanms", 0.0, float("nan")),
        ("step:125/3250 val_loss:4.5862 train_time:66.065s", 66.065, None),
    ],
)
def test_both_forms_of_other_speedruns_lines(line: str, time_s: float, step_avg_ms: float | None) -> None:
    ruler = "=" * 100
    log = parse_log(
        f"import torch\n{ruler}\nRunning on 8 GPUs\n{ruler}\nwarming up\n{line}\nstep:126/3250 train_time:8000ms\n"
    )
    assert log.sources == {"script": "import torch"}
    (only,) = log.validations
    assert only.time_s == pytest.approx(time_s)
    assert log.lines[0].step_avg_ms == pytest.approx(step_avg_ms, nan_ok=True)


# Adding


def test_an_honest_record_holds_and_is_small(
    honest: Path, tiny_runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Hardly larger than the source of one run, compressed: all of its runs have the same."""
    assert reasons(load_record(honest)) == []
    assert honest.parent.name == "tiny"
    assert sorted(path.name for path in honest.iterdir()) == ["README.md", "config.toml", "runs.tar.xz", "summary.json"]
    source = len(lzma.compress((tiny_runs[0] / "log.txt").read_bytes()))
    assert sum(path.stat().st_size for path in honest.iterdir()) < source + 20_000 < 200_000
    capsys.readouterr()
    assert cli.main(["verify"]) == 0
    assert "1 records, none that do not hold" in capsys.readouterr().out


def test_a_summary_says_what_the_runs_say(honest: Path, tiny_runs: list[Path]) -> None:
    summary = json.loads((honest / "summary.json").read_text(encoding="utf-8"))
    of_runs = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in tiny_runs]
    times, losses = ([run[key] for run in of_runs] for key in ("train_time_s", "val_loss"))
    assert [run["time_s"] for run in summary["runs"]] == times
    assert summary["time_s"]["mean"] == pytest.approx(sum(times) / SEEDS)
    assert summary["val_loss"]["mean"] == pytest.approx(sum(losses) / SEEDS)
    assert (summary["n"], summary["steps"], summary["tokens"]) == (SEEDS, 40, 40 * 192)
    assert 0 < summary["p"] < 0.01


def test_the_archive_has_the_runs_to_the_byte_and_comes_out_the_same(honest: Path, tiny_runs: list[Path]) -> None:
    texts = read_texts(honest)
    for seed, run in enumerate(tiny_runs):
        for name, content in texts[f"seed_{seed}"].items():
            assert content == (run / name).read_text(encoding="utf-8")
    assert pack_as(texts) == (honest / "runs.tar.xz").read_bytes()


def test_a_record_that_does_not_hold_is_not_kept(
    board: Path, tiny_runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["add", *map(str, tiny_runs[1:]), "--name=no_zero", "--into", str(board)]) == 1
    error = capsys.readouterr().err
    assert "not added" in error and "the seeds are [1, 2, 3]" in error
    assert not list(board.glob("*/*"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "name the run directories"),
        (["configs"], "is not the directory of a run that ended: it has no log.txt"),
        (["RUN", "RUN"], "each has to come once"),
        (["RUN", "--name=Mine!"], "has to be of small letters"),
        (["RUN", "--hardware=8 x H100"], "are in a run's own log; leave them out"),
        (["RUN", "--foreign", "--track=tiny"], "needs --name --hardware --source --date as well"),
    ],
)
def test_what_cannot_be_added_is_said_in_one_line(
    arguments: list[str], reason: str, board: Path, tiny_runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tiny_runs[0]) if word == "RUN" else word for word in arguments]
    assert cli.main(["add", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert reason in error
    assert not board.exists()


def test_the_same_record_is_not_added_twice(
    honest: Path, tiny_runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["add", *map(str, tiny_runs), "--name=honest", "--into", str(honest.parent.parent)]) == 2
    assert "exists; choose another --name" in capsys.readouterr().err


def test_an_interrupted_run_is_named_before_anything_is_compared(
    board: Path, tiny_runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = shutil.copytree(tiny_runs[0], tmp_path / "cut")
    summary = json.loads((cut / "summary.json").read_text(encoding="utf-8"))
    (cut / "summary.json").write_text(json.dumps(summary | dict(status="interrupted")), encoding="utf-8")
    assert cli.main(["add", str(cut), *map(str, tiny_runs[1:]), "--into", str(board)]) == 2
    assert (
        f"{cut} was interrupted; remove it and run its seed {summary['config']['seed']} again"
        in capsys.readouterr().err
    )


# The user's words and places


def test_words_beyond_ascii_are_kept_from_any_locale(
    board: Path, tiny_runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As an ASCII locale reads them, in UTF-8 all the same; the emoji is two and what joins them."""
    words = ["--author=Jos\udcc3\udca9", "--description=sch\udcc3\udcb6n \U0001f469\u200d\U0001f680", "--name=words"]
    assert cli.main(["add", *map(str, tiny_runs), *words, "--into", str(board)]) == 0
    (path,) = board.glob("tiny/*_words")
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    assert (summary["author"], summary["description"]) == ("José", "schön \U0001f469\u200d\U0001f680")
    assert "José, " in (path / "README.md").read_text(encoding="utf-8")
    assert cli.main(["rank", f"--out={board}/table.txt"]) == 0
    assert {"José", "schön", "\U0001f469\u200d\U0001f680"} <= {
        *(board / "table.txt").read_text(encoding="utf-8").split()
    }
    assert cli.main(["report", f"--out={board}/page.html"]) == 0
    assert "<td>José</td>" in (board / "page.html").read_text(encoding="utf-8")


def test_places_may_be_in_the_home_folder(
    honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    assert cli.main(["verify", f"~/records/tiny/{honest.name}"]) == 0
    assert cli.main(["rank", "--format=json", "--out=~/new/table.json"]) == 0
    assert cli.main(["report", "--out", "~/newer/page.html"]) == 0
    assert (tmp_path / "new/table.json").exists() and (tmp_path / "newer/page.html").exists()
    assert cli.main(["add", "~/none", "--into=~/more"]) == 2
    assert f"error: {tmp_path}/none is not the directory of a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (["add", "RUN", "--into=FILE/x"], "choose another folder, such as --into=/tmp/records"),
        (["plot", "--out=FILE/x"], "choose another folder, such as --out=/tmp/plots"),
        (["report", "--out=FILE/x.html"], "choose another file, such as --out=/tmp/records.html"),
        (["publish"], "publish writes into the checkout; rank, plot and report have --out"),
        (["reproduce", "RECORD", "--keep"], "leave out --keep"),
    ],
)
def test_a_place_that_cannot_be_written_is_said_before_the_work(
    words: list[str], instead: str, honest: Path, tiny_runs: list[Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    monkeypatch.setattr(cli.check.reproduce, "run_again", pytest.fail)
    places = {"RUN": str(tiny_runs[0]), "RECORD": str(honest)}
    assert cli.main([places.get(word, word.replace("FILE", str(tmp_path))) for word in words]) == 2
    errors = capsys.readouterr().err
    assert "cannot be written (Read-only file system); " in errors and errors.endswith(f"{instead}\n")


# Other speedruns' logs


def foreign_log(seed: int, unit: str, final: float) -> str:
    lines = []
    for step in range(0, 3201, 100):
        loss = final + 0.05 * (1 - step / 3200) + 0.0001 * seed * (step != 0)
        time_s = 0.08 * step * (1 + seed / 100)
        clock = f"{time_s:.3f}s" if unit == "s" else f"{1000 * time_s:.0f}ms"
        lines.append(
            f"step:{step}/3200 val_loss:{loss:.4f} train_time:{clock} step_avg:{1000 * time_s / max(step, 1):.2f}ms"
        )
    ruler = "=" * 100
    return f"import torch\n{ruler}\nRunning PyTorch on NVIDIA H100\n{ruler}\n" + "\n".join(lines) + "\npeak memory\n"


@pytest.fixture
def foreign(board: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Words of an `add --foreign` of five logs, in one of the two forms."""

    def words(unit: str, name: str) -> list[str]:
        logs = [tmp_path / f"{name}_{seed}.txt" for seed in range(5)]
        for seed, log in enumerate(logs):
            log.write_text(foreign_log(seed, unit, 3.2785 + 0.0001 * len(name)), encoding="utf-8")
        about = ["--foreign", f"--name={name}", "--author=P. Eer", "--description=their recipe", "--date=2026-01-02"]
        about += ["--track=fineweb-3.28", "--hardware=8 x NVIDIA H100", "--source=https://example.org/log"]
        return ["add", *map(str, logs), *about, "--into", str(board)]

    return words


@pytest.mark.parametrize("unit", ["s", "ms"])
def test_foreign_logs_stand_in_the_table_marked(
    unit: str, foreign: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*foreign(unit, "peer"), "--batch_tokens=524288"]) == 0
    assert cli.main(["rank", "fineweb-3.28", "--format=json"]) == 0
    output = capsys.readouterr().out
    (row,) = json.loads(output[output.index("[") :])
    assert row["time_s"]["mean"] == pytest.approx(0.08 * 3200 * 1.02)
    assert (row["steps"], row["tokens"], row["n"]) == (3200, 3200 * 524288, 5)
    assert cli.main(["rank"]) == 0
    table = capsys.readouterr().out
    assert "2026-01-02_peer†" in table and "† other code's run" in table


def test_a_foreign_log_may_come_from_another_system(foreign: Callable[..., list[str]], tmp_path: Path) -> None:
    """With a byte-order mark and its lines' ends; it is kept to the byte."""
    words = foreign("s", "peer")
    for log in tmp_path.glob("peer_*.txt"):
        log.write_bytes(b"\xef\xbb\xbf" + log.read_bytes().replace(b"\n", b"\r\n"))
    assert cli.main(words) == 0
    (record,) = map(load_record, find_records([tmp_path / "records"]))
    assert [run.log.sources for run in record.runs] == [{"script": "import torch"}] * 5
    assert record.runs[0].texts["log.txt"].encode() == (tmp_path / "peer_0.txt").read_bytes()


def test_a_foreign_log_is_held_to_what_it_can_be_held_to(
    foreign: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = foreign("s", "peer")
    log = tmp_path / "peer_3.txt"
    log.write_text(
        log.read_text(encoding="utf-8").replace("step:3200/3200 val", "step:3100/3200 val"), encoding="utf-8"
    )
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert "log 3: log.txt has the validation line of step 3100 more than once" in error
    assert "the seeds stop at different steps, [3200, 3200, 3200, 3100, 3200]" in error


def test_a_foreign_logs_averages_belong_to_its_times(
    foreign: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = foreign("s", "peer")
    for log in tmp_path.glob("peer_*.txt"):
        log.write_text(
            re.sub(
                r"train_time:(\d+)", lambda found: f"train_time:{int(found[1]) // 2}", log.read_text(encoding="utf-8")
            ),
            encoding="utf-8",
        )
    assert cli.main(words) == 1
    assert "log 0: 'step:100/3200 val_loss:" in capsys.readouterr().err


def test_a_run_of_this_repository_is_not_foreign(
    board: Path, tiny_runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    about = ["--foreign", "--name=faster", "--author=N. Obody", "--description=no facts", "--date=2026-01-02"]
    about += ["--track=tiny", "--hardware=1 x H100", "--source=https://example.org/log", "--into", str(board)]
    assert cli.main(["add", *(str(run / "log.txt") for run in tiny_runs), *about]) == 1
    assert "log 0: it is called foreign, and its log is of this repository's trainer" in capsys.readouterr().err


def test_steps_shorter_than_a_clocks_digits_are_no_missing_time(
    foreign: Callable[..., list[str]], tmp_path: Path
) -> None:
    words = foreign("ms", "peer")
    for seed, log in enumerate(sorted(tmp_path.glob("peer_*.txt"))):
        lines = [f"step:{step}/40 val_loss:{3 - 0.01 * step - 0.001 * seed:.4f} train_time:{0.7 * step:.0f}ms"
                 for step in range(41)]  # fmt: skip
        log.write_text("\n".join(lines), encoding="utf-8")
    assert cli.main(words) == 0


# Tables, comparisons, figures


def second(honest: Path) -> Path:
    """Another record of the track: AdamW's, with losses a little higher."""
    texts = read_texts(honest)
    for index, folder in enumerate(ALL):
        set_facts(texts[folder], lambda facts: facts["config"].update(matrix_optimizer="adamw"))
        set_rows(texts[folder], lambda rows, index=index: [
            row | dict(train_time_s=row["train_time_s"] * (1.4 + 0.001 * index))
            | {key: row[key] + 0.05 + 0.001 * index for key in ("train_loss", "val_loss") if key in row}
            for row in rows
        ])  # fmt: skip
    path = honest.with_name(honest.name.replace("honest", "slower"))
    shutil.copytree(honest, path)
    edit_summary(path, name="slower", description="AdamW | all of it")
    write_texts(path, texts)
    return path


@pytest.fixture
def two_records(honest: Path) -> tuple[Path, Path]:
    return honest, second(honest)


def test_records_are_ranked_by_time_in_three_forms(
    two_records: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert cli.main(["rank", "tiny", "--format=json"]) == 0
    first, last = json.loads(capsys.readouterr().out)
    assert [(row["rank"], row["name"]) for row in (first, last)] == [(1, two_records[0].name), (2, two_records[1].name)]
    assert cli.main(["rank", "tiny"]) == 0
    title, header, one, other = capsys.readouterr().out.strip().splitlines()
    assert title.startswith("tiny (loss below 3.2) on 1 x ")
    assert header.split()[:2] == ["#", "record"]
    assert f"{first['time_s']['mean']:.2f}" in one and f"{last['time_s']['mean']:.2f}" in other
    out = tmp_path / "table.md"
    assert cli.main(["rank", "tiny", "--format=markdown", "--out", str(out)]) == 0
    table = [line for line in out.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert all(line.replace("\\|", "").count("|") == table[0].count("|") for line in table)  # a | in words is escaped


def test_a_record_that_does_not_hold_is_not_ranked(
    two_records: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    edit_summary(two_records[0], p=1e-9)
    capsys.readouterr()
    assert cli.main(["rank", "--format=json"]) == 0
    output = capsys.readouterr()
    assert [row["name"] for row in json.loads(output.out)] == [two_records[1].name]
    assert f"left out: tiny/{two_records[0].name} does not hold" in output.err


def test_two_records_are_compared(two_records: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["compare", *(f"tiny/{path.name}" for path in two_records)]) == 0
    output = capsys.readouterr().out
    assert f"{two_records[0].name} {'comes out' if 'cannot tell' in output else 'is'} " in output
    assert f"faster than {two_records[1].name} (95% CI " in output
    assert (
        f"Loss at step 40: {two_records[0].name}'s loss is lower than {two_records[1].name}'s by 0.0515 (95% CI "
        in output
    )
    assert "Welch's t of the logarithms" in output
    assert "Paired t of losses by seed" in output  # their seeds began in the same places of the data
    assert 'Settings that differ: matrix_optimizer "aurora" / "adamw"' in output
    assert "Source files that differ: none" in output
    assert cli.main(["compare", f"tiny/{two_records[0].name}", "tiny/none"]) == 2
    assert "there is no record at tiny/none" in capsys.readouterr().err


def test_figures_show_the_records_and_come_out_the_same(two_records: tuple[Path, Path], tmp_path: Path) -> None:
    loaded = [load_record(path) for path in two_records]
    figure = plots.curves(loaded, 3.2)
    for axis, scale in zip(figure.axes[1:], (1, 192 / 1e6), strict=True):
        for line, record in zip(axis.get_lines(), loaded, strict=False):
            xs, ys = line.get_data()
            assert list(xs) == pytest.approx([step * scale for step in (10, 20, 30, 40)])
            assert ys[-1] == pytest.approx(sum(record.losses) / SEEDS)
    assert cli.main(["plot", "--out", str(tmp_path / "one")]) == 0
    assert cli.main(["plot", "--out", str(tmp_path / "two")]) == 0
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    assert sorted(path.suffix for path in (tmp_path / "one").iterdir()) == [".png"] * 3 + [".svg"] * 3


# Reproduction


@pytest.mark.slow
def test_a_record_is_reproduced_from_its_own_log(honest: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", str(honest), "--seed=1", "--keep"]) == 0
    output = capfd.readouterr().out
    assert "seed 1: every validation loss is the record's to the last digit" in output
    assert "a further run of the record is expected to take" in output
    assert output.strip().endswith(f"the losses of {load_record(honest).name} are what its source gives here")
    assert json.loads((honest / "reproduced.json").read_text(encoding="utf-8"))["consistent"] is True
    assert reasons(load_record(honest)) == []


@pytest.mark.slow
def test_losses_that_nobody_trained_are_not_reproduced(honest: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The log is in order and the record holds; but its losses are lower than its source gives."""
    texts = read_texts(honest)
    for folder in ALL:
        set_rows(texts[folder], lambda rows: [
            row | {key: row[key] * 0.95 for key in ("train_loss", "val_loss") if key in row} for row in rows
        ])  # fmt: skip
    write_texts(honest, texts)
    assert reasons(load_record(honest)) == []
    assert cli.main(["reproduce", str(honest)]) == 1
    assert "are not what its source gives here" in capfd.readouterr().out


# The committed records


def test_the_committed_records_hold_and_the_readme_has_them() -> None:
    paths = find_records()
    assert len(paths) >= 3
    found = verify_all([load_record(path) for path in paths])
    assert not any(found.values()), found
    records = [load_record(path) for path in paths]
    by_name = {record.name: record for record in records}
    assert not any(verify_duel.reasons(path, by_name) for path in verify_duel.find_duels())
    duels = [verify_duel.load_duel(path) for path in verify_duel.find_duels()]
    for path, document in rank.with_leaderboard(rank.rows(records, duels)).items():
        assert document == path.read_text(encoding="utf-8")


def test_verifying_takes_a_few_calls_a_line_and_grows_with_the_records_alone() -> None:
    """Counted, not timed: a record of five runs is 20,000 lines of text, and a hundred take a hundred times as long."""

    def calls(number: int) -> int:
        profile = cProfile.Profile()
        profile.enable()
        verify_all([load_record(paths[index % len(paths)]) for index in range(number)])
        profile.disable()
        return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]

    paths = find_records()
    once, lines = calls(len(paths)), 0  # and what is kept from now on is known to both
    for path in paths:
        lines += sum(text.count("\n") for run in load_record(path).runs for text in run.texts.values())
    assert calls(len(paths)) <= once < 3 * lines
    assert calls(8 * len(paths)) < 8.5 * once
