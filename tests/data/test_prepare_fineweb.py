"""FineWeb: downloaded, or tokenized here."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data import prepare
from data.prepare import main
from data.sets import Settings, save_progress, write_set
from data.shards import DataError, open_shard, write_shard
from data.tokenizer import get_tokenizer
from tests.data.hub import Hub, serve
from tests.data.prepared import run, shards_of, some_documents


@pytest.mark.parametrize("tokenize", [[], ["--tokenize"]], ids=["download", "tokenize"])
@pytest.mark.parametrize("why", ["no answer", "HF_HUB_OFFLINE is set"])
def test_fineweb_without_a_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tokenize: list[str], why: str
) -> None:
    """Said before the Hub's own clients are asked, which would try again and again."""
    out = tmp_path / "fineweb10B"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", "OFFLINE" in why)
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # without listening: connections are refused
        dead_end = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", dead_end)
        assert main(["fineweb", "--shards=2", *tokenize, f"--out={out}"]) == 2
    assert capsys.readouterr().err == (
        f"error: {dead_end}: found {why}, expected the Hugging Face Hub; connect to a network (or set HF_ENDPOINT to a "
        "mirror), copy the shards here by hand, or train on the sample: ./run.sh\n"
    )
    assert not out.exists()


@pytest.mark.parametrize("shards", [0, 104])
def test_fineweb_has_103_training_shards(capsys: pytest.CaptureFixture[str], shards: int) -> None:
    assert main(["fineweb", "--shards", str(shards)]) == 2
    assert f"--shards: found {shards}, expected 1 to 103" in capsys.readouterr().err


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    files = {}
    for index in range(5):
        name = f"fineweb_{'train' if index else 'val'}_{index:06d}.bin"
        write_shard(tmp_path / name, np.arange(1000 + index, dtype=np.uint16))
        files[name] = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
    with serve(files) as server:
        yield server


def test_fineweb_download_fetches_what_is_missing(tmp_path: Path, hub: Hub) -> None:
    out = tmp_path / "out"
    names = list(hub.files)

    def download(shards: int) -> list[str]:
        hub.sent.clear()
        result = run("fineweb", f"--shards={shards}", f"--out={out}", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
        assert result.returncode == 0, result.stderr
        return sorted(name for name, _ in hub.sent)

    assert download(2) == sorted(names[:3])
    assert download(2) == []
    date = (out / names[1]).stat().st_mtime
    os.truncate(out / names[1], 1500)
    os.utime(out / names[1], (date, date))  # the Hub's client would take it for whole
    (out / names[0]).unlink()
    assert download(3) == sorted([names[0], names[1], names[3]])
    assert shards_of(out) == {name: hub.files[name] for name in sorted(names[:4])}
    assert (out / f"{names[1]}.unusable").stat().st_size == 1500  # it may have been someone's own


def test_a_download_is_not_mixed_into_a_set_tokenized_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "_check_hub", lambda: None)
    write_set(tmp_path, Settings("fineweb", "byte", 3, 5, "test"), lambda _: iter(["a" * 20]))
    before = shards_of(tmp_path)
    assert main(["fineweb", "--shards=9", f"--out={tmp_path}"]) == 2
    assert "progress.json: found a set that was tokenized here" in capsys.readouterr().err
    assert shards_of(tmp_path) == before


def test_text_is_not_mixed_into_a_download(tmp_path: Path) -> None:
    save_progress(tmp_path, None, [], complete=True)
    write_shard(tmp_path / "fineweb_val_000000.bin", [1])
    with pytest.raises(DataError, match=r"fineweb_val_000000.bin: found a shard that progress.json does not list"):
        write_set(tmp_path, Settings("fineweb", "byte", 3, 5, "test"), lambda _: iter(["a" * 20]))
    assert open_shard(tmp_path / "fineweb_val_000000.bin").tolist() == [1]


def test_a_stream_that_breaks_off_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    class Raw:
        def skip(self, start: int) -> Iterator[dict[str, str]]:
            yield {"text": "a"}
            raise RuntimeError("of\na library")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Raw())
    monkeypatch.setattr(prepare, "_check_hub", lambda: None)
    monkeypatch.setattr("data.tokenizer.get_tokenizer", lambda _: None)
    assert main(["fineweb", "--tokenize", f"--out={tmp_path}"]) == 2
    assert "after row 0: the stream broke off (of a library); the same command" in capsys.readouterr().err


def test_fineweb_download_checks_what_came(tmp_path: Path, hub: Hub) -> None:
    hub.files["fineweb_train_000001.bin"] = hub.files["fineweb_train_000001.bin"][:-2]
    result = run("fineweb", "--shards=1", f"--out={tmp_path}", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    assert result.returncode == 2
    assert "fineweb_train_000001.bin: size (truncated): found 1000 tokens" in result.stderr.splitlines()[-1]


def test_fineweb_download_that_breaks_off_is_one_line(tmp_path: Path, hub: Hub) -> None:
    del hub.files["fineweb_train_000001.bin"]
    result = run("fineweb", "--shards=1", f"--out={tmp_path}", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "hf"))
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ")


def test_fineweb_tokenize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpt2_vocabulary: Path) -> None:
    """The raw set is replaced by a local parquet streamed by the same library; more shards later go on."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    documents = some_documents(400)
    parquet.write_table(pyarrow.table({"text": documents, "id": range(400)}), tmp_path / "raw.parquet")
    load = datasets.load_dataset

    def load_local(name: str, config: str, split: str, streaming: bool):
        assert (name, config) == ("HuggingFaceFW/fineweb", "sample-10BT")
        raw, cache = str(tmp_path / "raw.parquet"), str(tmp_path / "cache")  # there may be no home for a cache
        return load("parquet", data_files=raw, split=split, streaming=streaming, cache_dir=cache)

    monkeypatch.setattr(datasets, "load_dataset", load_local)
    monkeypatch.setattr(prepare, "_check_hub", lambda: None)
    monkeypatch.setattr(prepare, "FINEWEB_SHARD_TOKENS", 5000)
    out = tmp_path / "out"
    for shards in (1, 3):
        assert main(["fineweb", "--tokenize", f"--shards={shards}", f"--out={out}"]) == 0
        assert len(shards_of(out)) == shards + 1
    encoding = get_tokenizer("gpt2")
    expected = [token for text in documents for token in (50256, *encoding.encode_ordinary(text))]
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{index:06d}.bin" for index in (1, 2, 3))]
    np.testing.assert_array_equal(np.concatenate([open_shard(out / name) for name in names]), expected[:20_000])
