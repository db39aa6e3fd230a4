"""The way of a FineWeb record on synthetic shards: fingerprint, runs of a committed recipe, add, verify, rank,
compare, page."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

import leaderboard.__main__ as cli
from data.shards import write_shard
from leaderboard import fingerprint, tracks
from leaderboard.runs import FILES
from leaderboard.tracks import find_track
from tests.conftest import ROOT, python
from tests.record_fixtures import add, set_facts, set_rows, several

SEEDS = 2
VAL_TOKENS = 64
SMALL = (
    "device=cpu compile=false dtype=float32 num_layers=1 num_heads=1 head_dim=8 model_dim=8 seq_len=16 train_steps=14 "
    f"batch_tokens=32 micro_batch_tokens=32 val_tokens={VAL_TOKENS} val_every=14 log_every=7 checkpoint_every=0 "
    f"momentum_warmup_steps=0 embed_lr=0.3 head_lr=0.2 num_seeds={SEEDS}"
).split()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FineWeb's names and vocabulary; few different tokens, whose frequencies are learnt in a few steps."""
    folder = tmp_path_factory.mktemp("data") / "fineweb10B"
    folder.mkdir()
    tokens = np.random.default_rng(0).choice([50256, 11, 13, 262, 50000], size=6000, p=[0.1, 0.3, 0.3, 0.2, 0.1])
    tokens[0] = 50256
    for index, part in enumerate(np.split(tokens, [1000, 3500])):
        write_shard(folder / f"fineweb_{'train' if index else 'val'}_{index:06d}.bin", part)
    return folder


@pytest.fixture(scope="module")
def runs(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Run directories of a committed recipe at toy size."""
    folder = tmp_path_factory.mktemp("runs")
    data = [f"{kind}_files={shards}/fineweb_{kind}_*.bin" for kind in ("train", "val")]
    told = [f"--{setting}" for setting in (*SMALL, *data, f"run_dir={folder}", "name=quick", "author=A. Tester")]
    result = python(several(1000, SEEDS), ROOT / "configs/fineweb_124m_muon.toml", *told)
    assert result.returncode == 0, result.stderr
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def slower_runs(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same with clocks that show half as much again."""
    folder = tmp_path_factory.mktemp("slower_runs")
    for run in runs:
        files = {name: (run / name).read_text(encoding="utf-8") for name in FILES}
        set_facts(files, lambda facts: facts["config"].update(name="slower"))
        set_rows(files, lambda rows: [row | dict(train_time_s=1.5 * row["train_time_s"]) for row in rows])
        (folder / run.name).mkdir()
        for name, text in files.items():
            (folder / run.name / name).write_text(text, encoding="utf-8")
    return sorted(folder.iterdir())


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of records, and the repository's tracks with few validation tokens and no fingerprint."""
    text = tracks.TRACKS.read_text(encoding="utf-8").replace("val_tokens = 10485760", f"val_tokens = {VAL_TOKENS}")
    text = re.sub(r"(?<=\n)(val_source = .*\nval_fingerprint = ).*", r'\1""', text)
    (tmp_path / "tracks.toml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(tracks, "TRACKS", tmp_path / "tracks.toml")
    monkeypatch.setattr(fingerprint, "SHARD_TOKENS", 1000)
    monkeypatch.setattr(cli, "RECORDS", tmp_path / "records")
    monkeypatch.setattr("leaderboard.records.RECORDS", tmp_path / "records")
    return tmp_path / "records"


def test_the_way_of_a_record(
    shards: Path, runs: list[Path], slower_runs: list[Path], board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Before somebody has entered the fingerprint no record holds, and what to do is said
    assert cli.main(["add", *map(str, runs), f"--into={board}"]) == 1
    to_do = "enter it: ./run.sh leaderboard fingerprint fineweb-3.28 PATH/fineweb_val_000000.bin"
    assert to_do in capsys.readouterr().err

    shard = shards / "fineweb_val_000000.bin"
    sha256 = hashlib.sha256(shard.read_bytes()).hexdigest()
    assert cli.main(["fingerprint", "fineweb-3.28", str(shard), f"--sha256={sha256}"]) == 0
    summary = json.loads((runs[0] / "summary.json").read_text(encoding="utf-8"))
    assert find_track("fineweb-3.28").val_fingerprint == summary["val_fingerprint"]

    quick, slower = (add(each, board).relative_to(board) for each in (runs, slower_runs))
    assert cli.main(["verify"]) == 0
    assert "2 records, none that do not hold" in capsys.readouterr().out
    assert cli.main(["rank", "fineweb-3.28", "--format=json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [quick.name, slower.name]
    assert cli.main(["compare", str(quick), str(slower)]) == 0
    compared = capsys.readouterr().out
    assert f"{quick.name} is 33.3% faster than {slower.name}" in compared
    assert f"{quick.name} does not beat {slower.name} by the track's rule" in compared
    assert cli.main(["report", f"--out={board / 'page.html'}"]) == 0
    page = (board / "page.html").read_text(encoding="utf-8")
    assert quick.name in page and slower.name in page

    # From now on runs on other validation tokens are refused
    found, other = summary["val_fingerprint"], "0123456789abcdef"
    text = tracks.TRACKS.read_text(encoding="utf-8")
    tracks.TRACKS.write_text(text.replace(found, other), encoding="utf-8")
    tracks._load.cache_clear()
    capsys.readouterr()
    assert cli.main(["verify"]) == 1
    told = f"the validation data is not the track's: fingerprint {found}, the track's is {other}"
    assert told in capsys.readouterr().out
