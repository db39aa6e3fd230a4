"""The shard format against a byte-level reading of it, and every fault a shard can have."""

import errno
import gzip
import hashlib
import io
import os
import re
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from data.formats import interpreter
from data.shards import (
    DataError,
    ShardWriter,
    check_tokens,
    find_shards,
    head_fingerprint,
    main,
    match_shards,
    open_shard,
    refuse_overlap,
    set_fingerprint,
    write_shard,
)

ROOT = Path(__file__).resolve().parents[2]


def test_file_is_header_then_tokens_little_endian(tmp_path: Path) -> None:
    tokens = [0, 1, 258, 50256, 65535]
    write_shard(tmp_path / "a.bin", tokens)
    expected = struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + struct.pack("<5H", *tokens)
    assert (tmp_path / "a.bin").read_bytes() == expected
    np.testing.assert_array_equal(open_shard(tmp_path / "a.bin"), np.array(tokens, dtype=np.uint16))


def test_pieces_of_any_integer_type_make_one_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "a.bin") as shard:
        shard.write(np.arange(10, dtype=np.int64)[::2])
        shard.write(np.array([], dtype=np.uint16))
        shard.write(np.array([7], dtype=np.uint8))
        shard.finish()
    assert open_shard(tmp_path / "a.bin").tolist() == [0, 2, 4, 6, 8, 7]


def shard_bytes(magic: int = 20240520, version: int = 1, count: int = 4, body: bytes = bytes(8)) -> bytes:
    return struct.pack("<256i", magic, version, count, *[0] * 253) + body


@pytest.mark.parametrize(
    ("content", "field", "found", "expected"),
    [
        pytest.param(b"", "size", "0 bytes", "1024", id="empty"),
        pytest.param(shard_bytes()[:1023], "size", "1023 bytes", "1024", id="shorter than a header"),
        pytest.param(shard_bytes(magic=20240801), "magic", "20240801", "20240520", id="magic"),
        pytest.param(shard_bytes(version=2), "version", "found 2", "expected 1", id="version"),
        pytest.param(shard_bytes(count=0, body=b""), "number of tokens", "found 0", "at least 1", id="no tokens"),
        pytest.param(shard_bytes(count=-4), "number of tokens", "found -4", "at least 1", id="negative count"),
        pytest.param(shard_bytes(body=bytes(7)), "size", "7 bytes", "two bytes a token", id="odd length"),
        pytest.param(shard_bytes(body=bytes(6)), "size (truncated)", "3 tokens", "4 by the header", id="truncated"),
        pytest.param(
            shard_bytes(body=bytes(10)),
            "size (longer than its header says)",
            "5 tokens",
            "4 by the header",
            id="too long",
        ),
    ],
)
def test_broken_shard(tmp_path: Path, content: bytes, field: str, found: str, expected: str) -> None:
    path = tmp_path / "broken.bin"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        open_shard(path)
    message = str(error.value)
    assert message.startswith(f"{path}: {field}")
    assert found in message and expected in message and "delete" not in message
    assert "\n" not in message


def npy_bytes(array: npt.NDArray[np.int64]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


IDS = np.arange(700)
FOREIGN = {
    "llm.c of 32 bits": (shard_bytes(20240801, 7, 700, IDS.astype("<u4").tobytes()), "32-bit tokens (Llama 3)"),
    "nanoGPT": (IDS.astype("<u2").tobytes(), "uint16 token ids alone, as nanoGPT"),
    "nanoGPT of 32 bits": (IDS.astype("<u4").tobytes(), "uint32 token ids alone, as nanoGPT"),
    "shorter than a header": (IDS[:9].astype("<u2").tobytes(), "uint16 token ids alone, as nanoGPT"),
    "big-endian": (struct.pack(">256i", 20240520, 1, 700, *[0] * 253) + IDS.astype(">u2").tobytes(), "big-endian"),
    "npy": (npy_bytes(IDS.reshape(2, 350)), "a .npy array"),
    "Megatron": (IDS.astype("<i4").tobytes(), "a Megatron set"),
    "gzip": (gzip.compress(shard_bytes(count=700, body=IDS.astype("<u2").tobytes())), "packed by gzip"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_shards_are_named_and_the_advice_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    content, name = FOREIGN[kind]
    folder = tmp_path / "its folder"
    folder.mkdir()
    path = folder / "x_train_000001.bin"
    path.write_bytes(content)
    if kind == "Megatron":
        path.with_suffix(".idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QB", 1, 4) + bytes(99))
    with pytest.raises(DataError) as error:
        open_shard(path)
    message = str(error.value)
    assert name in message and "delete" not in message and "\n" not in message
    assert ("ids above 65535 cannot be converted" in message) == (kind in FOREIGN_WIDE)
    command = message[message.index("mkdir -p") :].partition(" (ids above")[0].partition("; otherwise")[0]
    follow(command, monkeypatch)
    expected = IDS[:9] if kind == "shorter than a header" else IDS
    np.testing.assert_array_equal(open_shard(folder / "converted" / path.name), expected)
    assert path.read_bytes() == content


FOREIGN_WIDE = ("llm.c of 32 bits", "nanoGPT of 32 bits", "npy", "Megatron")


def follow(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Does what a shell would, but starts no Python: that takes a while."""
    words = shlex.split(command)
    if "-c" not in words:
        subprocess.run(["bash", "-c", command], check=True)
        return
    assert words[:2] == ["mkdir", "-p"] and words[3:6] == ["&&", *shlex.split(interpreter()), "-c"]
    Path(words[2]).mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(sys, "argv", ["-c", *words[7:]])
    exec(words[6], {})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html>\n<html>" + bytes(2000), "an HTML page, a server's answer in place of the file"),
        (b"\n <HTML>" + bytes(2000), "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer; git lfs pull"),
        (b"PAR1" + bytes(2000), "a parquet file, for data.prepare to tokenize"),
        (b"PK\x03\x04" + bytes(2000), "a zip archive, as torch.save"),
        (shard_bytes(magic=20240522), "multiple-choice questions of llm.c"),
        (b"It was the best of times, " * 99, "text, for data.prepare to tokenize"),
        ("\tL'été où naïve 漢字 ".encode() * 99, "text, for data.prepare to tokenize"),
        (("é" * 99).encode(), "text, for data.prepare to tokenize"),
        (("a" + "é" * 99).encode(), "text, for data.prepare to tokenize"),
        (bytes(3000), "data.prepare command that made it will make it again"),
    ],
    ids=[
        "html",
        "HTML",
        "lfs",
        "parquet",
        "zip",
        "questions",
        "text",
        "tabs and accents",
        "accents",
        "cut in a character",
        "zeros",
    ],
)
def test_what_is_no_shard_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DataError) as error:
        open_shard(tmp_path / "a.bin")
    assert words in str(error.value) and "delete" not in str(error.value)


def test_ids_that_do_not_fit_are_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.bin").write_bytes(shard_bytes(20240801, 7, 700, (IDS + 128_000).astype("<u4").tobytes()))
    with pytest.raises(DataError) as error:
        open_shard(tmp_path / "a.bin")
    command = re.search(r"mkdir.*(?= \(ids)", str(error.value))
    assert command
    with pytest.raises(DataError, match="found 128699, expected 0 to 65535"):
        follow(command[0], monkeypatch)


def test_missing_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.bin: found no such file, expected a shard"):
        open_shard(tmp_path / "gone.bin")


def test_token_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    tokens = np.array([5, 256, 257, 300], dtype=np.uint16)
    check_tokens(tokens[:2], 257, "a.bin")
    with pytest.raises(DataError, match=r"a\.bin: token 1002: found 257, expected less than vocab_size 257"):
        check_tokens(tokens, 257, "a.bin", offset=1000)


@pytest.mark.parametrize(
    ("tokens", "found"),
    [([1, 65536], "found 65536"), ([-1, 3], "found -1"), ([0.5], "found dtype float64"), (np.uint16([]), "found 0")],
    ids=["above uint16", "negative", "float", "none at all"],
)
def test_refused_tokens_leave_no_file_and_spare_the_old_one(tmp_path: Path, tokens: npt.ArrayLike, found: str) -> None:
    path = tmp_path / "a.bin"
    write_shard(path, [1, 2, 3])
    with pytest.raises(DataError, match=found) as error:
        write_shard(path, tokens)
    assert str(path) in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["a.bin"]
    assert open_shard(path).tolist() == [1, 2, 3]


def test_unfinished_file_never_passes_for_a_shard(tmp_path: Path) -> None:
    """At any moment before `finish` the file is under another name, and its header is not valid."""
    with ShardWriter(tmp_path / "a.bin") as shard:
        shard.write(np.arange(100_000, dtype=np.uint16) % 999)
        with pytest.raises(DataError, match="found no file"):
            find_shards(str(tmp_path / "*.bin"))
        (unfinished,) = tmp_path.iterdir()
        with pytest.raises(DataError, match="magic: found 0"):
            open_shard(unfinished)
    assert not list(tmp_path.iterdir())


def test_a_shard_is_written_where_folders_cannot_be_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync

    def of_files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    write_shard(tmp_path / "a.bin", [1, 2])
    assert open_shard(tmp_path / "a.bin").tolist() == [1, 2]


def test_a_full_disk_names_the_shard(tmp_path: Path) -> None:
    path = tmp_path / "full.bin"
    (tmp_path / "full.bin.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=re.escape(str(path))) as error:
        write_shard(path, np.zeros(10**5, dtype=np.uint16))
    assert error.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_find_shards_sorts(tmp_path: Path) -> None:
    for name in ("x_2.bin", "x_0.bin", "x_1.bin", "y_0.bin"):
        write_shard(tmp_path / name, [1])
    assert [path.name for path in find_shards(f"{tmp_path}/x_*.bin")] == ["x_0.bin", "x_1.bin", "x_2.bin"]


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [
        ("run[1]", "run[1]/x_*.bin"),
        ("a*b", "a*b/x_*.bin"),
        ("run[1]/deep/er", "run[1]/*/er/x_*.bin"),
        ("run1", "run[12]/x_*.bin"),
        ("two words", "two words/x_[ab].bin"),
        (".", "x_a.bin"),
        ("x[1]", "x[1]/x[1]_*.bin"),
    ],
)
def test_a_folder_that_exists_is_no_pattern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, pattern: str
) -> None:
    name = "x[1]_a.bin" if "x[1]_" in pattern else "x_a.bin"
    for each in (folder, "run9", "axb"):
        (tmp_path / each).mkdir(parents=True, exist_ok=True)
        write_shard(tmp_path / each / name, [1])
    assert match_shards(f"{tmp_path}/{pattern}") == [tmp_path / folder / name]
    monkeypatch.chdir(tmp_path)
    assert match_shards(pattern) == [Path(folder, name)]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert match_shards(f"~/{pattern}") == [tmp_path / folder / name]


def test_no_match_says_what_is_there(tmp_path: Path) -> None:
    write_shard(tmp_path / "mine_train_000001.bin", [1])
    write_shard(tmp_path / "mine_train_000002.bin", [1])
    for pattern in (f"{tmp_path}/mine_val_*.bin", str(tmp_path), f"{tmp_path}/"):
        with pytest.raises(DataError, match="found no file") as error:
            find_shards(pattern)
        works = re.search(r"there are (\S+)\)", str(error.value))
        assert works and len(find_shards(works[1])) == 2
    with pytest.raises(DataError, match="found a folder, expected a shard"):
        open_shard(tmp_path)


@pytest.mark.parametrize("alias", ["same", "symlink", "hard link", "copy"])
def test_a_shard_in_both_sets_is_refused(tmp_path: Path, alias: str) -> None:
    train, val = tmp_path / "x_train_1.bin", tmp_path / "x_val_0.bin"
    write_shard(train, [1, 2])
    write_shard(val, [1, 3])
    refuse_overlap([train], [val])
    other = val
    if alias != "same":
        other = tmp_path / "x_train_2.bin"
        {"symlink": os.symlink, "hard link": os.link, "copy": shutil.copy}[alias](val, other)
    with pytest.raises(DataError, match=rf"found {other}.* in both, .*_train_\*\.bin") as error:
        refuse_overlap([train, other], [val])
    assert str(val) in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("", "data.prepare files --help"),
        ("data/sotu_byte/nothing_*.bin", " -m data.prepare sotu --encoding byte"),
        ("data/sotu_gpt2/nothing_*.bin", " -m data.prepare sotu --encoding gpt2"),
        ("data/fineweb10B/nothing_*.bin", " -m data.prepare fineweb --shards 10"),
        ("/elsewhere/fineweb10B/*.bin", " -m data.prepare fineweb --shards 10 --out /elsewhere/fineweb10B"),
        ("data/mine/*.bin", "data.prepare files --help"),
    ],
)
def test_pattern_without_files_says_what_to_do(pattern: str, advice: str) -> None:
    with pytest.raises(DataError) as error:
        find_shards(pattern)
    message = str(error.value)
    assert repr(pattern) in message and "found no file, expected at least one" in message
    assert message.endswith(advice)


def test_head_fingerprint_is_sha256_of_the_tokens_however_they_are_cut() -> None:
    stream = np.random.default_rng(0).integers(0, 50257, 1000, dtype=np.uint16)
    expected = hashlib.sha256(stream[:700].astype("<u2").tobytes()).hexdigest()[:16]
    assert head_fingerprint([stream], 700) == expected
    assert head_fingerprint(np.split(stream, [1, 333, 699, 701]), 700) == expected
    other = stream.copy()
    other[699] ^= 1
    assert head_fingerprint([other], 700) != expected
    other = stream.copy()
    other[700] ^= 1
    assert head_fingerprint([other], 700) == expected
    with pytest.raises(DataError, match="found 1000 tokens, expected at least 1001"):
        head_fingerprint([stream], 1001)


def test_set_fingerprint_sees_lengths_order_and_both_ends() -> None:
    first, second = (np.random.default_rng(seed).integers(0, 50257, 20_000, dtype=np.uint16) for seed in (0, 1))
    changed_head, changed_tail = first.copy(), first.copy()
    changed_head[4095] ^= 1
    changed_tail[-4096] ^= 1
    sets = [
        [first, second],
        [second, first],
        [first],
        [first, second[:-1]],
        [changed_head, second],
        [changed_tail, second],
        [np.concatenate([first, second])],
    ]
    assert len({set_fingerprint(shards) for shards in sets}) == len(sets)
    assert set_fingerprint([first.copy(), second]) == set_fingerprint(sets[0])


def test_verify_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(tmp_path / "a_0.bin", [1, 2, 256])
    write_shard(tmp_path / "a_1.bin", [9] * 1234)
    assert main([f"{tmp_path}/*.bin", "--vocab_size", "257"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == [f"{tmp_path}/a_0.bin", "3", "256"]
    assert lines[2].split() == [f"{tmp_path}/a_1.bin", "1,234", "9"]
    assert lines[3].startswith("2 shards, 1,237 tokens below 257")


def test_verify_ends_with_one_line_and_status_2(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", [1, 2, 256])
    command = [sys.executable, "-m", "data.shards", f"{tmp_path}/*.bin", "--vocab_size", "256"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, encoding="utf-8")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        f"error: {tmp_path}/a.bin: token 2: found 256, expected less than vocab_size 256; "
        "use the vocab_size of the tokenizer that made the shard"
    ]


def test_verify_is_stopped_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr("data.shards.verify", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert main(["a.bin", "--vocab_size", "256"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"
