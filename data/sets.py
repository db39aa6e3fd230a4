"""A tokenized set in a folder: documents in, shards out, resumable after a kill at any moment.

A shard gets its name only when it is whole, and progress.json notes in which document, and after how many of its
tokens, the next one begins: a run that was killed goes on from there and ends with the same bytes.
"""

import glob
import hashlib
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.files import try_lock, wait_for_lock, write_json
from data.processes import is_alive, pid_scope, start_ticks
from data.shards import DataError, ShardWriter, Tokens, open_shard

PROGRESS = "progress.json"
CLAIM = ".claim"  # who writes, where there are no locks
LAST_SHARD = 999_999  # six digits in a name

Source = Callable[[int], Iterator[str]]  # the documents from a given index on


@dataclass(frozen=True)
class Settings:
    """What determines the bytes of a set."""

    name: str
    encoding: str
    val_tokens: int
    shard_tokens: int
    sources: str  # identifies the text


def write_set(folder: Path, settings: Settings, source: Source, train_shards: int | None = None) -> None:
    """Tokenize the documents: `val_tokens` tokens into shard 0, then `shard_tokens` into each training shard, all
    of the text or at most `train_shards` of them. Resumes what a run with the same settings left unfinished and
    refuses to mix with anything else."""
    from data.tokenizer import get_tokenizer

    get_tokenizer(settings.encoding)  # a vocabulary that is missing is found before anything is written

    def finished() -> tuple[list[dict[str, Any]], bool]:
        shards, complete = _finished_shards(folder, settings)
        return shards, complete and (train_shards is None or len(shards) > train_shards)

    shards, enough = finished()
    if not enough:  # else the folder may be read-only
        with sole_writer(folder):
            shards, enough = finished()
            if not enough:
                save_progress(folder, settings, shards, complete=False)
                _write_shards(folder, settings, source, shards, train_shards or LAST_SHARD)
                save_progress(folder, settings, shards, complete=True)
    if enough:
        print(f"{folder}: nothing to do")
    val, *train = (shard["tokens"] for shard in shards)
    print(f"{folder}: {val:,} validation and {sum(train):,} training tokens, {settings.encoding} encoding")


def _write_shards(
    folder: Path, settings: Settings, source: Source, shards: list[dict[str, Any]], last_shard: int
) -> None:
    """Write the missing shards, adding each to `shards` and to the progress file."""
    import numpy as np
    from tqdm import tqdm

    from data.tokenizer import encode_documents, end_of_text

    # Written so far: every document before `document`, and `offset` tokens of that one.
    document, offset = (shards[-1]["document"], shards[-1]["offset"]) if shards else (-1, 0)
    encoded = encode_documents(source(max(document, 0)), settings.encoding, threads=os.cpu_count() or 1)
    with closing(encoded), tqdm(unit=" tokens", unit_scale=True, disable=None) as bar:
        stream = _drop(encoded, offset)
        for index in range(len(shards), last_shard + 1):
            size = settings.shard_tokens if index else settings.val_tokens
            with ShardWriter(folder / shard_name(settings.name, index)) as shard:
                for tokens in stream:
                    part, rest = np.split(tokens, [size - shard.num_tokens])
                    starts = np.flatnonzero(part == end_of_text(settings.encoding))
                    document += len(starts)
                    offset = len(part) - int(starts[-1]) if len(starts) else offset + len(part)
                    shard.write(part)
                    bar.update(len(part))
                    if shard.num_tokens == size:
                        stream = itertools.chain([rest], stream)
                        break
                if shard.num_tokens == 0 or (index == 0 and shard.num_tokens < size):
                    break  # the text has ended; unfinished, this shard vanishes
                shard.finish()
            shards.append({"file": shard.path.name, "tokens": shard.num_tokens, "document": document, "offset": offset})
            save_progress(folder, settings, shards, complete=False)
    if len(shards) < 2:  # without training tokens a set is of no use
        for path in [*(folder / shard["file"] for shard in shards), folder / PROGRESS]:
            path.unlink()
        found = shards[0]["tokens"] if shards else shard.num_tokens
        if found < 2:
            raise DataError(f"{folder}: found {found} tokens in all of the text, expected 2 or more; give more text")
        raise DataError(
            f"--val_tokens: found {settings.val_tokens}, expected less than the {found} tokens of the text; "
            f"{max(1, found // 10)} works"
        )


def _drop(stream: Iterator[Tokens], count: int) -> Iterator[Tokens]:
    """The stream without its first `count` tokens."""
    for tokens in stream:
        yield tokens[count:]
        count = max(0, count - len(tokens))


def shard_name(name: str, index: int) -> str:
    return f"{name}_{'train' if index else 'val'}_{index:06d}.bin"


# ---------------------------------------------------------------------------------------------------------
# Progress


def is_complete(folder: Path) -> bool:
    """False while a set that this module makes is unfinished; shards from elsewhere have no progress file."""
    progress = read_progress(folder)
    return progress is None or bool(progress["complete"])


def _finished_shards(folder: Path, settings: Settings) -> tuple[list[dict[str, Any]], bool]:
    """The records of the shards that a run with the same settings finished, up to the first that is no longer
    whole, and whether that is all of a complete set."""
    progress = read_progress(folder)
    if progress is None or (not progress["shards"] and progress["settings"] != asdict(settings)):
        if strangers := sorted(folder.glob(f"{glob.escape(settings.name)}_*.bin")):
            state = f"that {PROGRESS} does not list" if progress else f"without a {PROGRESS} beside it"
            raise DataError(
                f"{strangers[0]}: found a shard {state}, expected an empty folder or one that this command made; "
                "move it elsewhere or choose another --out"
            )
        return [], False
    for field, expected in asdict(settings).items():
        if (found := progress["settings"].get(field)) != expected:
            raise DataError(
                f"{folder / PROGRESS}: {field}: found {found!r} from an earlier run, expected {expected!r} as asked "
                f"now; choose another --out, or to start over delete the shards that {PROGRESS} lists, then {PROGRESS}"
            )
    shards = list(itertools.takewhile(lambda shard: is_whole(folder / shard["file"]), progress["shards"]))
    return shards, progress["complete"] and len(shards) == len(progress["shards"])


def is_whole(path: Path) -> bool:
    try:
        open_shard(path)
    except DataError:
        return False
    return True


def save_progress(folder: Path, settings: Settings | None, shards: list[dict[str, Any]], complete: bool) -> None:
    content = {"complete": complete, "settings": asdict(settings) if settings else {}, "shards": shards}
    write_json(folder / PROGRESS, content, indent=1)


def read_progress(folder: Path) -> dict[str, Any] | None:
    """What `save_progress` last wrote in the folder; None if it never did."""
    path = folder / PROGRESS
    try:
        progress = dict(json.loads(path.read_text(encoding="utf-8")))
        if progress.keys() != {"complete", "settings", "shards"}:
            raise ValueError("with the fields of another program")
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: found invalid JSON ({error}), expected data.prepare's; move it elsewhere") from None
    return progress


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Makes the folder and waits until no other process prepares it: nodes may share a file system."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w", encoding="utf-8") as lock:
        locked = try_lock(lock)
        if locked is False:
            print(f"{folder}: waiting for another data.prepare", file=sys.stderr)
            wait_for_lock(lock)
        with nullcontext() if locked is not None else _claim(folder / CLAIM):
            yield


@contextmanager
def _claim(path: Path) -> Iterator[None]:
    """Where there are no locks, a file that only one process can make says who writes. One of this machine that is
    gone has lost its claim; whether one of another machine lives cannot be known, so its claim is waited for."""
    scope, seen = pid_scope() or platform.node(), None
    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(f"{os.getpid()} {start_ticks(os.getpid())} {scope}")
            break
        except FileExistsError:
            with suppress(FileNotFoundError):  # it was given up just now
                owner = path.read_text(encoding="utf-8")
                pid, ticks, its_scope = (owner.split(" ", 2) + [""] * 3)[:3]
                if its_scope == scope and not is_alive(int(pid), ticks) and _remove_stale(path, owner):
                    continue
                if owner != seen:
                    seen = owner
                    other = f"process {pid} on {its_scope.partition('/')[0]}" if its_scope else "another process"
                    print(f"{path}: waiting for {other}; if that is gone, delete this file", file=sys.stderr)
                time.sleep(0.1)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _remove_stale(path: Path, owner: str) -> bool:
    """Remove the claim of a process that is gone; False while another waiter does. That one alone may, and only while
    the claim is still `owner`'s: what has been made in its place meanwhile stays."""
    remover = path.with_name(f"{path.name}_{hashlib.sha256(owner.encode()).hexdigest()[:16]}")
    try:
        remover.touch(exist_ok=False)
    except FileExistsError:
        return False
    try:
        if path.read_text(encoding="utf-8") == owner:
            path.unlink()
    finally:
        remover.unlink()
    return True
