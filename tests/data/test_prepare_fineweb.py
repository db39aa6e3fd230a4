"""FineWeb: downloaded, or tokenized here."""

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from data import prepare, sets
from data.prepare import fineweb_shards, main
from data.sets import Settings, save_progress, write_set
from data.shards import DataError, open_shard, write_shard
from data.tokenizer import get_tokenizer
from tests.data.hub import Hub, serve
from tests.data.prepared import shards_of, some_documents


@pytest.mark.parametrize("tokenize", [[], ["--tokenize"]], ids=["download", "tokenize"])
@pytest.mark.parametrize("why", ["no answer", "HF_HUB_OFFLINE is set"])
def test_fineweb_without_a_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tokenize: list[str], why: str
) -> None:
    """Said before the Hub's own clients are asked, which would try again and again."""
    out = tmp_path / "fineweb10B"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", "OFFLINE" in why)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
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
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    files = {}
    for index in range(5):
        name = f"fineweb_{'train' if index else 'val'}_{index:06d}.bin"
        write_shard(tmp_path / name, np.arange(1000 + index, dtype=np.uint16))
        files[name] = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink()
    with serve(files) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(prepare, "FINEWEB_SHARD_TOKENS", 1000)
        yield server


def test_fineweb_download_fetches_what_is_missing(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    names = list(hub.files)

    def download(shards: int) -> list[str]:
        hub.sent.clear()
        assert main(["fineweb", f"--shards={shards}", f"--out={out}"]) == 0
        return [name for name, _ in hub.sent]

    assert download(2) == names[:3]
    told = capsys.readouterr().out.splitlines()
    assert (
        told[0].startswith(f"{out}: fetching 3 shards, 0.0 GB, from {hub.url} (")
        and "the same command goes on" in told[0]
    )
    assert told[1:3] == [f"{out / names[0]}: 1 of 3", f"{out / names[1]}: 2 of 3"]
    assert download(2) == []
    date = (out / names[1]).stat().st_mtime
    os.truncate(out / names[1], 1500)
    os.utime(out / names[1], (date, date))  # the Hub's client would take it for whole
    (out / names[0]).unlink()
    assert download(3) == [names[0], names[1], names[3]]
    assert shards_of(out) == {name: hub.files[name] for name in sorted(names[:4])}
    assert (out / f"{names[1]}.unusable").stat().st_size == 1500  # it may have been someone's own


def test_a_connection_that_breaks_costs_no_whole_shard(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The client tries again by itself, from where it was; then the same command goes on with the shard that broke."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    out, names = tmp_path / "out", list(hub.files)
    hub.cut_at[names[2]] = 2500
    assert main(["fineweb", "--shards=3", f"--out={out}"]) == 2
    assert f"error: {out / names[2]}: the download broke off (" in capsys.readouterr().err
    assert hub.sent[:4] == [(names[0], 0), (names[1], 0), (names[2], 0), (names[2], 2000)]
    assert list(shards_of(out)) == sorted(names[:2])
    assert not sets.is_complete(out)
    hub.cut_at.clear()
    hub.sent.clear()
    assert main(["fineweb", "--shards=3", f"--out={out}"]) == 0
    assert [name for name, _ in hub.sent] == names[2:4]
    assert shards_of(out) == {name: hub.files[name] for name in sorted(names[:4])}
    assert sets.is_complete(out)


@pytest.mark.parametrize("tokenize", [[], ["--tokenize"]], ids=["download", "tokenize"])
def test_a_disk_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokenize: list[str]
) -> None:
    """Said before anything is fetched; what is whole needs no room again."""
    monkeypatch.setattr(prepare, "_check_hub", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1_900_000_000))
    monkeypatch.setitem(sys.modules, "datasets", None)
    out = tmp_path / "new" / "fineweb10B"
    for there, expected in ((0, "2.2 GB for the 11"), (1, "2.0 GB for the 10")):
        if there:
            out.mkdir(parents=True, exist_ok=True)
            write_shard(out / "fineweb_val_000000.bin", [50256])
        assert main(["fineweb", *tokenize, f"--out={out}"]) == 2
        assert f"{out}: found 1.9 GB free, expected {expected} shards that are missing" in capsys.readouterr().err
        assert not (out / "progress.json").exists()


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


def test_fineweb_download_checks_what_came(tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.files["fineweb_train_000001.bin"] = hub.files["fineweb_train_000001.bin"][:-2]
    assert main(["fineweb", "--shards=1", f"--out={tmp_path}"]) == 2
    assert "fineweb_train_000001.bin: size (truncated): found 1000 tokens" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("why", ["no such file", "status 503"])
def test_fineweb_download_that_breaks_off_is_one_line(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], why: str
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's attempts
    if why == "no such file":
        del hub.files["fineweb_train_000001.bin"]
    else:
        hub.status = 503
    assert main(["fineweb", "--shards=1", f"--out={tmp_path}"]) == 2
    name = "fineweb_train_000001.bin" if why == "no such file" else "fineweb_val_000000.bin"
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {tmp_path / name}: the download broke off (")


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


def test_shards_that_a_run_takes() -> None:
    """The last token needs a target; without the tails a shard has 190 batches of 524,288 tokens."""
    assert [fineweb_shards(tokens) for tokens in (1, 10**8 - 1, 10**8, 10**12)] == [1, 1, 2, 103]
    batch = 524288
    assert [fineweb_shards(steps * batch, batch) for steps in (1, 190, 191, 3230, 3240, 3250)] == [1, 1, 2, 17, 18, 18]
