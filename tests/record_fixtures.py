"""Records for tests: fixtures with runs of the tiny recipe, and means to change a run's files in a consistent way."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import leaderboard.__main__ as cli
from harness.log_format import ending
from leaderboard import records, tracks
from leaderboard.records import config_toml, describe, pack, unpack
from leaderboard.runs import Run, parse_log
from leaderboard.tracks import TRACKS, find_track
from tests.conftest import python

Rows = list[dict[str, Any]]
SEEDS = 4
ALL = [f"seed_{seed}" for seed in range(SEEDS)]
Texts = dict[str, dict[str, str]]  # folder -> file name -> content


def several(first_seed: int, count: int) -> list[str]:
    """For `python`: runs of so many seeds in a row. Their clock does not depend on the machine: between two looks at it
    1/10 s pass, give or take a tenth of that."""
    return ["-c", f"""
import itertools, random, sys, time, train_gpt
random.seed(0)
ticks = itertools.accumulate(random.uniform(0.09, 0.11) for _ in itertools.count())
time.perf_counter = lambda: next(ticks)
seeds = range({first_seed}, {first_seed + count})
sys.exit(max(train_gpt.main([*sys.argv[1:], f"--seed={{seed}}"]) for seed in seeds))
"""]  # fmt: skip


def read_texts(path: Path) -> Texts:
    return unpack((path / "runs.tar.xz").read_bytes())


def as_runs(texts: Texts) -> list[Run]:
    return [Run(folder.replace("_", " "), files) for folder, files in texts.items()]


def write_texts(path: Path, texts: Texts, honest_summary: bool = True) -> None:
    """Put these files in a record's archive; a careful forger brings summary.json and config.toml along."""
    runs = as_runs(texts)
    (path / "runs.tar.xz").write_bytes(pack_as(texts))
    if honest_summary:
        old = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        kept = {key: old[key] for key in ("name", "date", "author", "description", "foreign")}
        summary = describe(runs, find_track(path.parent.name), **kept)
        (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        (path / "config.toml").write_text(config_toml(runs[0]), encoding="utf-8")


def pack_as(texts: Texts) -> bytes:
    """`pack`, with the folders as they are named here."""
    runs = as_runs(texts)
    for (folder, _), run in zip(texts.items(), runs, strict=True):
        run.log.facts = {"config": {"seed": int(folder.partition("_")[2])}}
    return pack(runs)


def set_facts(files: dict[str, str], change: Callable[[dict[str, Any]], None]) -> None:
    """Change what log and summary say a run was, in both alike."""
    facts = dict(parse_log(files["log.txt"]).facts)
    before = json.dumps(facts, indent=1)
    change(facts)
    assert before in files["log.txt"]
    files["log.txt"] = files["log.txt"].replace(before, json.dumps(facts, indent=1))
    files["summary.json"] = json.dumps(json.loads(files["summary.json"]) | facts)


def set_rows(files: dict[str, str], change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Change a run's metrics, and its log and summary so that they agree with them to the last digit."""
    rows = change([json.loads(line) for line in files["metrics.jsonl"].splitlines()])
    files["metrics.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    log = parse_log(files["log.txt"])
    planned, batch, target = (log.facts["config"][key] for key in ("train_steps", "batch_tokens", "target_loss"))
    lines = []
    for row in rows:
        kind = "val" if "val_loss" in row else "train"
        step, time_s = row["step"], row["train_time_s"]
        average = f"train_time:{time_s:.3f}s step_avg:{1000 * time_s / max(1, step):.2f}ms"
        lines.append(f"step:{step}/{planned} {kind}_loss:{row[f'{kind}_loss']:.5f} {average}")
    head, _, rest = files["log.txt"].rpartition("=" * 100 + "\n")
    body, _, end = rest.partition("\n---\n")
    others = [line for line in body.splitlines() if not line.startswith("step:")]
    last = [row for row in rows if "val_loss" in row][-1]
    hit = next((row for row in rows if row.get("val_loss", target + 1) <= target), None)
    summary = json.loads(files["summary.json"])
    tokens, time_s = last["step"] * batch, last["train_time_s"]
    summary.update(
        val_loss=last["val_loss"], val_step=last["step"], steps=last["step"], train_time_s=time_s, tokens=tokens,
        tokens_per_s=tokens / time_s, time_to_target_s=hit and hit["train_time_s"], steps_to_target=hit and hit["step"],
        tokens_to_target=hit and hit["step"] * batch,
    )  # fmt: skip
    summary["phase_s"]["train"] = time_s
    files["summary.json"] = json.dumps(summary)
    for word, text in ending(summary, target).items():
        end = re.sub(rf"^{word} .*$", f"{word:<12} {text}", end, flags=re.M)
    files["log.txt"] = head + "=" * 100 + "\n" + "\n".join([*others, *lines, "---", end])


@pytest.fixture(scope="session")
def tiny_runs(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Run directories of seeds 0 to 3 of the tiny recipe, which fall below 3.2 nats."""
    folder = tmp_path_factory.mktemp("tiny_runs")
    told = ["--track=tiny", "--target_loss=3.2", "--author=A. Tester", "--description=as it is"]
    told += [f"--num_seeds={SEEDS}", "--data_start=seed"]
    result = python(several(0, SEEDS), tiny_recipe, *told, f"--run_dir={folder}")
    assert result.returncode == 0, result.stderr
    return sorted(
        folder.iterdir(),
        key=lambda path: json.loads((path / "summary.json").read_text(encoding="utf-8"))["config"]["seed"],
    )


@pytest.fixture(scope="session")
def tiny_track(tiny_runs: list[Path]) -> str:
    """tracks.toml with a track of the tiny data beside the real ones."""
    summary = json.loads((tiny_runs[0] / "summary.json").read_text(encoding="utf-8"))
    settings = dict(
        target_loss=3.2, val_tokens=3840, tokenizer="none", val_fingerprint=summary["val_fingerprint"],
        train_fingerprint=summary["train_fingerprint"], data_start="seed", first_seed=0,
        declared_from="2000-01-01",
    )  # fmt: skip
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
    return TRACKS.read_text(encoding="utf-8") + "\n[tiny]\n" + "".join(lines)


@pytest.fixture
def board(tiny_track: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of records, and the tiny track."""
    (tmp_path / "tracks.toml").write_text(tiny_track, encoding="utf-8")
    monkeypatch.setattr(tracks, "TRACKS", tmp_path / "tracks.toml")
    for module in (records, cli):
        monkeypatch.setattr(module, "RECORDS", tmp_path / "records")
    return tmp_path / "records"


def add(runs: list[Path], board: Path, *arguments: str) -> Path:
    before = set(board.glob("*/*"))
    assert cli.main(["add", *map(str, runs), "--into", str(board), *arguments]) == 0
    (path,) = set(board.glob("*/*")) - before
    return path


@pytest.fixture(scope="session")
def honest_record(tiny_runs: list[Path], tiny_track: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of the tiny runs, for `honest` to copy."""
    folder = tmp_path_factory.mktemp("honest")
    (folder / "tracks.toml").write_text(tiny_track, encoding="utf-8")
    with mock.patch.object(tracks, "TRACKS", folder / "tracks.toml"):
        return add(tiny_runs, folder / "records", "--name=honest")


@pytest.fixture
def honest(board: Path, honest_record: Path) -> Path:
    return shutil.copytree(honest_record, board / "tiny" / honest_record.name)


def edit_summary(path: Path, **changes: Any) -> None:
    """Change what a record's summary.json says."""
    (path / "summary.json").write_text(
        json.dumps(json.loads((path / "summary.json").read_text(encoding="utf-8")) | changes), encoding="utf-8"
    )
