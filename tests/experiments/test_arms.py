"""What the experiments share: nothing costly starts unasked, and choices are made alike."""

import errno
import sys
from pathlib import Path
from unittest import mock

import pytest

from data import console
from experiments import arms
from experiments.arms import confirm


@pytest.mark.parametrize("error", [EOFError(), OSError(errno.EIO, "Input/output error"), None], ids=str)
def test_only_a_yes_starts_what_was_asked_for(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-D, a terminal that went away, and a closed stdin that prepare() has replaced."""
    if error is None:
        monkeypatch.setattr(sys, "stdin", None)
        console.prepare()
        with pytest.raises(ValueError, match="there is no terminal to confirm this in; add --yes"):
            confirm(["a plan"], yes=False)
        return
    monkeypatch.setattr(sys, "stdin", mock.Mock(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", mock.Mock(side_effect=error))
    with pytest.raises(KeyboardInterrupt):
        confirm(["a plan"], yes=False)
    monkeypatch.setattr("builtins.input", lambda: "Yes ")
    confirm(["a plan"], yes=False)


def test_a_crash_is_status_1_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def work(_: list[str]) -> None:
        raise arms.RunCrashedError("2 runs crashed, see output.txt")

    assert arms.command(work)([]) == 1
    assert capsys.readouterr().err == "error: 2 runs crashed, see output.txt\n"


def test_the_best_is_the_first_with_the_lowest_score_and_an_end_is_one_of_several() -> None:
    assert arms.best({"a": (2, 0), "b": (1, 5), "c": (1, 5)}) == "b"
    assert [arms.at_edge(value, (3, 1, 2)) for value in (1, 2, 3)] == [True, False, True]
    assert not arms.at_edge(1, (1, 1))


def test_origins_name_all_there_are() -> None:
    runs = [dict(device="b", git_commit=""), dict(device="a", git_commit="c0ffee"), dict(device="b", git_commit="")]
    assert arms.origins(runs) == dict(device="a, b", git_commit="c0ffee, unknown")


def test_a_file_of_another_kind_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"other.json is not a result of this experiment, .* \(TypeError"):
        arms.read_result(path, lambda result: result["runs"])
