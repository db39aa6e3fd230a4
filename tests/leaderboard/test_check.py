"""`check`: what it runs, its verdict and its exit status, with the runs and duels replaced."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import leaderboard.__main__ as cli
from leaderboard import check
from leaderboard.records import Record, load_record
from tests.leaderboard.test_duel import met
from tests.leaderboard.test_history import variant
from tests.leaderboard.test_leaderboard import second
from tests.record_fixtures import edit_summary


@pytest.fixture
def pair(honest: Path) -> tuple[Path, Path]:
    """Two records of the track, the first of them new and faster."""
    return honest, second(honest)


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Lets runs and duels come out as told; returns the list of what was asked for."""

    def replace(is_consistent: bool = True, high: float = 0.95) -> list[str]:
        asked = list[str]()

        def run_again(record: Record, seed: int | None, tree: Path) -> Any:
            asked.append(f"run {record.path.name}")
            return SimpleNamespace(log=SimpleNamespace(facts={}))

        def take_turns(a: Record, b: Record, rounds: int) -> dict[str, Any]:
            asked.append(f"duel {a.path.name} {b.path.name} {rounds}")
            return dict(decides="wall", results=dict(wall=dict(high=high)))

        monkeypatch.setattr(check.reproduce, "run_again", run_again)
        monkeypatch.setattr(check.reproduce, "judge", lambda record, again: (is_consistent, ["as judged"]))
        monkeypatch.setattr(check.duel, "duel", take_turns)
        monkeypatch.setattr(check.duel, "sentences", lambda found: ["as they took turns"])
        return asked

    return replace


def verdict(path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    status = cli.main(["check", f"tiny/{path.name}", "--rounds=8"])
    return status, capsys.readouterr().out.splitlines()[-1]


def test_a_record_that_was_reproduced_and_is_faster_passes(
    pair: tuple[Path, Path], replaced: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    new, old = pair
    asked = replaced()
    assert cli.main(["check", f"tiny/{new.name}"]) == 0
    output = capsys.readouterr().out
    places = [output.index(said) for said in ("2 records, none", "as judged", "Time to target: ", "as they took turns")]
    assert places == sorted(places)
    last = f"yes: tiny/{new.name} holds, was reproduced and is faster than tiny/{old.name}"
    assert output.splitlines()[-1] == last
    assert asked == [f"run {new.name}", f"duel {new.name} {old.name} {check.duel.ROUNDS}"]


@pytest.mark.parametrize(
    ("comes_out", "against"),
    [
        (dict(is_consistent=False), "it was not reproduced"),
        (dict(high=1.01), "it is not faster than tiny/OLD"),
        (dict(is_consistent=False, high=1.01), "it was not reproduced; it is not faster than tiny/OLD"),
    ],
)
def test_what_speaks_against_a_record_is_its_verdict(
    comes_out: dict[str, Any], against: str, pair: tuple[Path, Path], replaced: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    new, old = pair
    replaced(**comes_out)
    assert verdict(new, capsys) == (1, f"no: tiny/{new.name}: {against.replace('OLD', old.name)}")


def test_a_record_that_does_not_hold_is_not_run(
    pair: tuple[Path, Path], replaced: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    new, old = pair
    asked = replaced()
    edit_summary(new, p=1e-9)
    assert verdict(new, capsys) == (1, f"no: tiny/{new.name}: a record or a duel does not hold")
    assert not asked
    assert verdict(old, capsys) == (1, f"no: tiny/{old.name}: a record or a duel does not hold")
    assert asked == [f"run {old.name}"]  # nothing holds that it could be put against


def test_the_first_of_a_track_needs_no_other(
    honest: Path, replaced: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    replaced()
    assert verdict(honest, capsys) == (
        0,
        f"yes: tiny/{honest.name} holds, was reproduced and is the first of its track",
    )


def test_where_steps_rank_there_is_no_duel(
    pair: tuple[Path, Path], replaced: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, new, old = replaced(), load_record(pair[0]), load_record(pair[1])
    track = check.find_track("tiny")
    monkeypatch.setattr(check, "find_track", lambda name: SimpleNamespace(**{**vars(track), "ranked_by": "steps"}))
    assert check.check(new, old) == [f"it is not faster than {old.name}"]
    monkeypatch.setattr(Record, "steps", property(lambda record: 30 if record is new else 40))
    assert check.check(new, old) == []
    assert asked == [f"run {new.path.name}"] * 2


def test_a_mistake_in_the_call_is_one_line(
    pair: tuple[Path, Path], replaced: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = replaced()
    for place, error in (("tiny/none", "there is no record at tiny/none"), ("tiny", "tiny has 2 records; name one")):
        assert cli.main(["check", place]) == 2
        assert error in capsys.readouterr().err
    assert not asked


def test_the_best_other_is_the_fastest_by_duels_then_by_time(honest: Path) -> None:
    record = load_record(honest)
    names = ["2026-11-01_a", "2026-11-02_b", "2026-11-03_c", "2026-11-04_foreign"]
    others = [variant(record, name, 10 + i) for i, name in enumerate(names[:3])]
    others.append(variant(record, names[3], 1, foreign=dict(hardware="1 x X"), hardware="1 x X"))
    others.append(variant(record, "2026-11-05_z", 0.5, hardware="9 x Z"))

    def best(*duels: Any) -> str:
        found = check.best_other(record, [record, *others], [dict(duel, track="tiny") for duel in duels])
        return found.path.name if found else ""

    assert best() == "2026-11-05_z"
    assert best(met(names[2], names[1], 0.5)) == names[2]
    assert best(met(names[2], names[1], 0.5), met(honest.name, names[2], 0.5)) == names[2]
    assert check.best_other(record, [record], []) is None
