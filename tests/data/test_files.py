"""Files on file systems that lack locks, or cannot flush a folder, or are full."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from data.files import naming, sync_folder, try_lock, user_path, wait_for_lock, whole_file


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_file_gets_its_name_when_it_is_whole(tmp_path: Path, mode: str) -> None:
    path, content = tmp_path / "a", "é\n" if mode == "w" else "é\n".encode()
    with whole_file(path, mode) as file:
        file.write(content)
        assert not path.exists()
    assert path.read_bytes() == "é\n".encode()
    with pytest.raises(KeyboardInterrupt), whole_file(path, mode) as file:
        file.write(content * 2)
        raise KeyboardInterrupt
    assert path.read_bytes() == "é\n".encode()
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_is_named_and_spares_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old", encoding="utf-8")
    (tmp_path / f"a.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=f"No space left on device: '{path}'"), whole_file(path) as file:
        file.write("new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_only_what_has_a_number_and_no_name_is_named() -> None:
    for error, words in ((OSError("the network"), "the network"), (OSError(5, "Input", "b"), "[Errno 5] Input: 'b'")):
        with pytest.raises(OSError) as caught, naming(Path("a")):
            raise error
        assert str(caught.value) == words


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES])
def test_a_folder_that_cannot_be_flushed_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync" if number == errno.EINVAL else "open", refuse)
    sync_folder(tmp_path)


def test_locks_are_had_by_one_or_shared(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with path.open("w", encoding="utf-8") as first, path.open(encoding="utf-8") as second:
        assert try_lock(first) is True
        assert try_lock(second) is try_lock(second, shared=True) is False
        first.close()
        assert try_lock(second, shared=True) is True
        with path.open(encoding="utf-8") as third:
            assert try_lock(third) is False
            assert try_lock(third, shared=True) is True


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_without_locks_nobody_can_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (tmp_path / "lock").open("w", encoding="utf-8") as file:
        assert try_lock(file) is None
        wait_for_lock(file)


def test_paths_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/a b") == Path("/home/me/a b")
    assert user_path("~nobody.at.all/a") == Path("~nobody.at.all/a")
    assert user_path("a/~b") == Path("a/~b")
