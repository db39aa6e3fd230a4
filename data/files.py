"""Files on any file system: whole or absent, locked where that is possible, found where their user means them. A leaf.

Some network file systems have no locks and cannot flush a folder. What needs no lock to be right goes on without one;
what cannot be known there is said to be unknown.
"""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file to write, text in UTF-8 or bytes (`mode` "wb"), that gets its name when the block ends well, whole and on
    the disk; until then, and for good after an error, `path` is as it was. A device or a pipe is written as it is."""
    path = path.resolve()  # a link stays one, to the new content
    if path.exists() and not path.is_file():
        with path.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # where there are no locks, another may write it too
    try:
        with naming(path), temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, content: Any, **options: Any) -> None:
    """A whole file of one JSON value; `options` are json.dumps's."""
    with whole_file(path) as file:
        file.write(json.dumps(content, **options) + "\n")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError that names no file, as that of a full disk, names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Make names given in `folder` survive a power cut, where its file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_writable(folder: Path, instead: str) -> None:
    """Raises ValueError, which ends with `instead`, if nothing can be written into `folder`, made or not yet: asked
    before the work whose results go there."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); {instead}") from None


def try_lock(file: IO[Any], shared: bool = False) -> bool | None:
    """Lock an open file until it is closed, without waiting: True if that was done, False if another process holds it,
    None if its file system has no locks, so that nobody can tell."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def wait_for_lock(file: IO[Any]) -> bool:
    """Lock an open file until it is closed, once no other process holds it. False without locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def is_file(name: str) -> bool:
    """Whether a word is the name of a file; of one that can be none, it is not."""
    with contextlib.suppress(OSError, ValueError):
        return Path(name).is_file()
    return False


def user_path(path: str | Path) -> Path:
    """A path as its user means it: ~ is the home folder, ~name that of another; a name that the locale cannot express
    is in UTF-8, as files and arguments are."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        path = os.fsdecode(str(path).encode("utf-8", "surrogateescape"))
    try:
        return Path(path).expanduser()
    except RuntimeError:  # no such user, or no home: then it is a name like any other
        return Path(path)


def path_as_meant(path: str) -> str:
    """`user_path`'s, or the path itself, letter by letter, where that is the same one."""
    meant = user_path(path)
    return path if meant == Path(path) else str(meant)


def user_text(argument: str) -> str:
    """A word of the command line as its user wrote it, in UTF-8 where the locale could not read it."""
    return argument.encode("utf-8", "surrogateescape").decode("utf-8", "surrogateescape")
