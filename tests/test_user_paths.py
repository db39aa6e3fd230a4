"""Places and words that a user names: checked before the work, read as they were meant."""

import os
from pathlib import Path

import pytest

from data.files import check_writable, user_path, user_text, whole_file


def test_a_place_that_cannot_be_written_is_told_and_nothing_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "a/b", "never said")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/out cannot be written \(Not a directory\); choose another$"):
        check_writable(tmp_path / "file/out", "choose another")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    monkeypatch.chdir(tmp_path)
    check_writable(Path("new/folder"), "never said")


def test_a_name_beyond_ascii_is_the_file_of_that_name_in_any_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    as_read, as_meant = "Jos\udcc3\udca9", "José"  # in an ASCII locale, and in any with UTF-8
    assert user_text(as_read) == user_text(as_meant) == as_meant
    monkeypatch.setattr(os, "fsencode", lambda name: str(name).encode("ascii", "surrogateescape"))
    monkeypatch.setattr(os, "fsdecode", lambda name: name.decode("ascii", "surrogateescape"))
    assert str(user_path(as_meant)) == str(user_path(as_read)) == as_read


def test_a_pipe_is_written_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with whole_file(tmp_path / "pipe") as file:
        file.write("é")
    assert os.read(reader, 9) == "é".encode() and [path.name for path in tmp_path.iterdir()] == ["pipe"]
    os.close(reader)
