"""Token shards: the .bin files that training reads.

A shard is a header of 256 little-endian int32 (magic 20240520, version 1, number of tokens, zeros) followed by
that many little-endian uint16 tokens: the format of llm.c and modded-nanogpt.

Check whole files, every token included:

    python -m data.shards 'data/sotu_byte/*.bin' --vocab_size 257
"""

import contextlib
import glob
import hashlib
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data import console
from data.files import naming, sync_folder, user_path
from data.formats import interpreter, shard_advice

Tokens = npt.NDArray[np.uint16]

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_BYTES = 2
MAX_SHARD_TOKENS = 2**31 - 1  # the header's count is an int32
FINGERPRINT_EDGE = 4096  # tokens at each end of a shard that identify it

# The folders that data.prepare knows how to fill, and its arguments that do so.
KNOWN_SETS = {
    "sotu_byte": "sotu --encoding byte",
    "sotu_gpt2": "sotu --encoding gpt2",
    "fineweb10B": "fineweb --shards 10",
}


class DataError(ValueError):
    """The data, or what was asked of it, is wrong. The message is one line for the user: file, field, what was
    found, what was expected, what to do."""


# ---------------------------------------------------------------------------------------------------------
# Reading


def match_shards(pattern: str) -> list[Path]:
    """The files matching a glob pattern, absolute or relative, sorted by name; maybe none. A folder that exists is
    no pattern, whatever its name, and a bracket is none where it matches nothing."""
    path = user_path(pattern)
    folder = next((folder for folder in path.parents if folder.is_dir()), Path())
    rest = str(path.relative_to(folder))
    for tail in (rest, rest.replace("[", "[[]")):
        names = glob.glob(tail, root_dir=folder)  # noqa: PTH207 (Path.glob follows no links to folders)
        if paths := sorted(folder / name for name in names if not (folder / name).is_dir()):
            return paths
    return []


def find_shards(pattern: str) -> list[Path]:
    """As `match_shards`, but DataError when there are none."""
    paths = match_shards(pattern)
    if not paths:
        raise DataError(f"shards {pattern!r}: found no file, expected at least one; {how_to_get(pattern)}")
    return paths


def how_to_get(pattern: str) -> str:
    """What the user can do to have files that match `pattern`."""
    path = user_path(pattern)
    folder = path if path.is_dir() else path.parent
    patterns = {re.sub(r"\d+\.bin$", "*.bin", str(each)) for each in match_shards(f"{folder}/*.bin")}
    there = f"correct the pattern (there are {' and '.join(sorted(patterns)[:4])}), or " if patterns else ""
    if folder.name in KNOWN_SETS:
        elsewhere = "" if folder == Path("data", folder.name) else f" --out {shlex.quote(str(folder))}"
        return f"{there}make them: {interpreter()} -m data.prepare {KNOWN_SETS[folder.name]}{elsewhere}"
    there = there or "correct the pattern, or "
    return f"{there}make shards of your own text: {interpreter()} -m data.prepare files --help"


def refuse_overlap(train_files: Sequence[Path], val_files: Sequence[Path]) -> None:
    """DataError if a shard, by whatever name or as a copy, is both trained on and validated on: the loss would mean
    nothing. Shards are told apart as `set_fingerprint` does it."""
    trained_on = {set_fingerprint([open_shard(path)]): path for path in train_files}
    for path in val_files:
        if other := trained_on.get(set_fingerprint([open_shard(path)])):
            alias = "" if other == path else f", which holds the same as {path},"
            raise DataError(
                f"train_files and val_files: found {other}{alias} in both, expected no shard to be in both; use "
                "patterns that part them, as *_train_*.bin and *_val_*.bin do"
            )


def open_shard(path: str | Path) -> np.memmap:
    """Map a shard's tokens, uint16 [num_tokens]. Checks all that is cheap: the header, and the file's size
    against it. Token values are checked where they are read, by `check_tokens`."""
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise DataError(f"{path}: found {found}, expected a shard; check the path")
    size = path.stat().st_size
    if size < HEADER_BYTES:
        raise _broken(path, "size", f"{size} bytes", f"a header of {HEADER_BYTES} bytes, then the tokens")
    magic, version, num_tokens = (int(value) for value in np.fromfile(path, dtype="<i4", count=3))
    if magic != MAGIC:
        raise _broken(path, "magic", str(magic), f"{MAGIC}, a shard of uint16 tokens")
    if version != VERSION:
        raise _broken(path, "version", str(version), str(VERSION))
    if num_tokens < 1:
        raise _broken(path, "number of tokens", str(num_tokens), "at least 1")
    body = size - HEADER_BYTES
    if body % TOKEN_BYTES:
        raise _broken(path, "size", f"{body} bytes after the header, an odd number", "two bytes a token")
    if body != num_tokens * TOKEN_BYTES:
        state = "truncated" if body < num_tokens * TOKEN_BYTES else "longer than its header says"
        raise _broken(path, f"size ({state})", f"{body // TOKEN_BYTES} tokens", f"{num_tokens} by the header")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(num_tokens,))


def check_tokens(tokens: Tokens, vocab_size: int, path: str | Path, offset: int = 0) -> None:
    """DataError if any token is not below `vocab_size`. `offset` is where in the shard `tokens` begins."""
    if tokens.size and tokens.max() >= vocab_size:
        position = int(np.argmax(tokens >= vocab_size))
        raise DataError(
            f"{path}: token {offset + position}: found {tokens[position]}, expected less than vocab_size "
            f"{vocab_size}; use the vocab_size of the tokenizer that made the shard"
        )


def _broken(path: Path, field: str, found: str, expected: str) -> DataError:
    return DataError(f"{path}: {field}: found {found}, expected {expected}; {shard_advice(path, MAGIC)}")


# ---------------------------------------------------------------------------------------------------------
# Writing


class ShardWriter:
    """Writes one shard piece by piece. Until `finish` the file has a temporary name and no valid header, so
    that a partly written one can never pass for a shard; leaving the block early deletes it.

    with ShardWriter("data/mine/mine_train_000001.bin") as shard:
        shard.write(tokens)
        shard.finish()
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.num_tokens = 0
        self._temporary = self.path.with_name(self.path.name + ".tmp")
        self._file = self._temporary.open("wb")
        self._file.write(bytes(HEADER_BYTES))

    def write(self, tokens: npt.ArrayLike) -> None:
        array = np.asarray(tokens)
        if array.dtype != np.uint16:
            if array.dtype.kind not in "iu":
                raise DataError(f"{self.path}: tokens: found dtype {array.dtype}, expected integers")
            if array.size and (array.min() < 0 or array.max() > 65535):
                value = array.min() if array.min() < 0 else array.max()
                raise DataError(f"{self.path}: tokens: found {value}, expected 0 to 65535 (uint16)")
        with naming(self.path):
            self._file.write(np.ascontiguousarray(array, dtype="<u2").data)
        self.num_tokens += array.size

    def finish(self) -> None:
        """Write the header, flush everything to the disk, then give the file its name."""
        if not 1 <= self.num_tokens <= MAX_SHARD_TOKENS:
            raise DataError(f"{self.path}: number of tokens: found {self.num_tokens}, expected 1 to {MAX_SHARD_TOKENS}")
        with naming(self.path):
            self._file.seek(0)
            self._file.write(np.array([MAGIC, VERSION, self.num_tokens], dtype="<i4").data)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what a full disk does not take is of no use any more
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def write_shard(path: str | Path, tokens: npt.ArrayLike) -> None:
    """Write a whole shard; `path` either becomes a complete shard or is left alone."""
    with ShardWriter(path) as shard:
        shard.write(tokens)
        shard.finish()


# ---------------------------------------------------------------------------------------------------------
# Identity


def head_fingerprint(shards: Sequence[Tokens], num_tokens: int) -> str:
    """Identifies the first `num_tokens` tokens of a stream, however it is cut into shards: 16 hex digits of
    SHA-256. Two validation losses are comparable only when this agrees."""
    digest, missing = hashlib.sha256(), num_tokens
    for shard in shards:
        piece = shard[:missing]
        digest.update(np.ascontiguousarray(piece, dtype="<u2").data)
        missing -= len(piece)
    if missing:
        raise DataError(f"fingerprint: found {num_tokens - missing} tokens, expected at least {num_tokens}")
    return digest.hexdigest()[:16]


def set_fingerprint(shards: Sequence[Tokens]) -> str:
    """Identifies a large set without reading it: 16 hex digits of SHA-256 over each shard's length and its
    first and last few thousand tokens. File names do not count, their order does."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{len(shard)};".encode())
        for edge in (shard[:FINGERPRINT_EDGE], shard[-FINGERPRINT_EDGE:]):
            digest.update(np.ascontiguousarray(edge, dtype="<u2").data)
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------
# Command line


def verify(pattern: str, vocab_size: int) -> None:
    """Read every shard that matches and print a table; DataError at the first fault."""
    paths = find_shards(pattern)
    shards = [open_shard(path) for path in paths]
    width = max(len(str(path)) for path in paths)
    print(f"{'shard':<{width}} {'tokens':>14} {'largest':>8}")
    for path, shard in zip(paths, shards, strict=True):
        check_tokens(shard, vocab_size, path)
        print(f"{path!s:<{width}} {len(shard):>14,} {shard.max():>8}")
    total = sum(len(shard) for shard in shards)
    print(f"{len(shards)} shards, {total:,} tokens below {vocab_size}, set {set_fingerprint(shards)}")


def main(argv: Sequence[str] | None = None) -> int:
    console.prepare()
    import tyro

    def check(pattern: tyro.conf.Positional[str], vocab_size: int) -> tuple[str, int]:
        """Check whole token shards: headers, sizes and that every token is below the vocabulary's size.

        Args:
            pattern: Glob pattern of the shards, quoted.
            vocab_size: Number of tokens in the vocabulary: 257 for byte, 50257 for gpt2.
        """
        return pattern, vocab_size

    try:
        verify(*tyro.cli(check, prog="python -m data.shards", args=argv, use_underscores=True))
    except (DataError, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        console.ignore_stops()
        print("error: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
