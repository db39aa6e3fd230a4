"""The loader's benchmark at toy size: what it writes, and that it times nothing that is wrong."""

import json
from pathlib import Path

import pytest

from benchmarks import loader_speed
from data.loader import TokenStream

ARGS = loader_speed.Args(seq_len=8, batch_tokens=(64, 128), shard_tokens=(501, 333), passes=1)


def test_loader_benchmark_saves_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    loader_speed.main(ARGS)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["device"] and content["versions"]["torch"]
    assert content["settings"]["shard_tokens"] == [501, 333]
    assert [row["batch_tokens"] for row in content["rows"]] == [64, 128]
    assert all(row["loader_Mtokens_per_s"] > 0 for row in content["rows"])
    header, *table, arrow = capsys.readouterr().out.splitlines()
    assert content["device"] in header and str(path) in arrow
    assert [line.split()[0] for line in table] == ["batch_tokens", "64", "128"]


def test_wrong_batches_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = TokenStream.read
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    monkeypatch.setattr(TokenStream, "read", lambda stream, start, count: read(stream, start + (start > 200), count))
    with pytest.raises(SystemExit, match="step 4: the loader's batch is wrong; nothing was timed"):
        loader_speed.main(ARGS)
    assert not list(tmp_path.iterdir())
