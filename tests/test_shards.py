"""The shard format against a byte-level reading of it, and every fault a shard can have."""

import hashlib
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from data.shards import (
    DataError,
    ShardWriter,
    check_tokens,
    find_shards,
    head_fingerprint,
    main,
    open_shard,
    set_fingerprint,
    write_shard,
)

ROOT = Path(__file__).resolve().parents[1]


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


def test_find_shards_sorts(tmp_path: Path) -> None:
    for name in ("x_2.bin", "x_0.bin", "x_1.bin", "y_0.bin"):
        write_shard(tmp_path / name, [1])
    assert [path.name for path in find_shards(f"{tmp_path}/x_*.bin")] == ["x_0.bin", "x_1.bin", "x_2.bin"]


@pytest.mark.parametrize(
    ("pattern", "advice"),
    [
        ("", "data.prepare files --help"),
        ("data/sotu_byte/nothing_*.bin", "python -m data.prepare sotu --encoding byte"),
        ("data/sotu_gpt2/nothing_*.bin", "python -m data.prepare sotu --encoding gpt2"),
        ("data/fineweb10B/nothing_*.bin", "python -m data.prepare fineweb --shards 10"),
        ("/elsewhere/fineweb10B/*.bin", "python -m data.prepare fineweb --shards 10 --out /elsewhere/fineweb10B"),
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
