"""Duels: turns are fair, the interval covers, records are put in order by them, and what was forged is refused."""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

import leaderboard.__main__ as cli
from leaderboard import duel, rank, verify_duel
from leaderboard.duel import LEAST_ROUNDS, ROUNDS, SITTINGS, Turn, order, ratio, results
from leaderboard.records import Record, load_record
from leaderboard.standings import standings

Duel = dict[str, Any]


def autocorrelated(rng: np.random.Generator, rho: float, sd: float, shape: tuple[int, int]) -> np.ndarray:
    noise = rng.normal(size=shape) * sd
    for i in range(1, shape[1]):
        noise[:, i] = rho * noise[:, i - 1] + (1 - rho**2) ** 0.5 * noise[:, i]
    return noise


@pytest.mark.parametrize(("rho", "least"), [(0.0, 0.93), (0.5, 0.93), (0.8, 0.91), (0.95, 0.82)])
def test_the_interval_covers_although_times_hang_together(rho: float, least: float) -> None:
    """2% of noise of the ratio itself, correlated from round to round; 0.4% that the two processes of a sitting have
    for good; and one step in twenty disturbed."""
    rng, duels, truth = np.random.default_rng(0), 300, 0.057
    rounds = SITTINGS * ROUNDS
    logs = truth + autocorrelated(rng, rho, 0.02, (duels, rounds))
    logs += (rng.random((duels, rounds)) < 0.05) * rng.exponential(0.5, (duels, rounds)) * rng.choice([-1, 1], rounds)
    logs = logs.reshape(duels, SITTINGS, ROUNDS)[:, :, 2::2] + 0.004 * rng.normal(size=(duels, SITTINGS, 1))
    intervals = [ratio(each.tolist()) for each in logs]
    covered = np.mean([each.low <= np.exp(truth) <= each.high for each in intervals])
    assert covered >= least, covered
    assert np.median([each.estimate for each in intervals]) == pytest.approx(np.exp(truth), abs=0.002)


def test_what_is_constant_has_no_width() -> None:
    assert ratio([[np.log(2)] * 8] * 6) == pytest.approx((2, 2, 2))


def test_a_process_that_is_slow_for_good_widens_the_interval() -> None:
    """Many rounds of few sittings would make it as narrow as one likes."""
    steady = ratio([[0.01 * (-1) ** sitting] * 1000 for sitting in range(6)])
    assert steady.low < 1 < steady.high
    assert np.log(steady.high / steady.low) > 0.02


def test_sides_take_turns_and_begin_in_turns() -> None:
    assert order(0, dict(a=2, b=1)) == [("a", 0), ("a", 1), ("b", 0)]
    assert order(1, dict(a=2, b=1)) == [("b", 0), ("a", 0), ("a", 1)]


def turns_of(a: list[float], b: list[float], rounds: int = SITTINGS * LEAST_ROUNDS, busy: float = 0.0) -> list[Turn]:
    """Of steps of these times; CPU time is half of it. busy: each round takes longer by that share than the last."""
    clock, turns = 0.0, []
    for index in range(rounds):
        for side, kind in order(index, dict(a=len(a), b=len(b))):
            wall = dict(a=a, b=b)[side][kind] * (1 + busy) ** index
            turns.append(Turn(side, kind, round(clock, 6), round(wall, 6), round(wall / 2, 6)))
            clock += wall + 1e-4
    return turns


def test_a_side_s_time_is_that_of_all_its_steps() -> None:
    found = results(turns_of([0.1, 0.2], [0.3], busy=0.05), dict(a=[10, 20], b=[10]))
    assert found["wall"]["estimate"] == pytest.approx(5 / 3, rel=1e-4)
    assert found["wall"]["a_s"] / found["wall"]["b_s"] == pytest.approx(5 / 3, rel=0.01)
    assert found["cpu"]["estimate"] == pytest.approx(5 / 3, rel=1e-4)
    turns = turns_of([0.1, 0.2], [0.3])
    after_the_other_s = [i > 0 and turn.side != turns[i - 1].side for i, turn in enumerate(turns)]
    slowed = [turn._replace(wall_s=2 * turn.wall_s) if is_first else turn
              for turn, is_first in zip(turns, after_the_other_s, strict=True)]  # fmt: skip
    exact = results(slowed, dict(a=[10, 20], b=[10]))  # they do not count
    assert exact["wall"]["high"] == pytest.approx(5 / 3, rel=1e-4)
    assert [exact["wall"]["a_s"], exact["cpu"]["b_s"]] == pytest.approx([5, 1.5])


# The order of records


def met(a: str, b: str, ratio: float, half: float = 0.01, hardware: str = "1 x X", start: str = "2026-11-26") -> Duel:
    result = dict(estimate=ratio, low=ratio / (1 + half), high=ratio * (1 + half))
    return dict(a=dict(name=a), b=dict(name=b), hardware=hardware, decides="wall", start_utc=start,
                results=dict(wall=result, cpu={}))  # fmt: skip


def test_records_that_never_met_compare_through_others() -> None:
    found = standings([met("new", "old", 0.5), met("old", "oldest", 0.8)], ["oldest", "old", "new", "alone"])
    assert list(found.relative) == ["new", "old", "oldest"]
    assert found.relative["oldest"].estimate == pytest.approx(2.5)
    error = np.log(found.relative["oldest"].high / 2.5)
    narrower = stats.t.ppf(0.975, 10) / stats.t.ppf(0.975, 5)  # two errors are known better than one
    assert error == pytest.approx(2**0.5 * narrower * np.log(1.01), rel=1e-3)
    assert found.gain["old"].estimate == pytest.approx(0.8)
    assert list(found.gain) == ["new", "old"]
    assert found.hardware == "1 x X"


def test_both_orders_count_and_contradictions_widen() -> None:
    agreeing = standings([met("a", "b", 0.8), met("b", "a", 1.25)], "ab").relative["b"]
    assert agreeing.estimate == pytest.approx(1.25)
    narrower = stats.t.ppf(0.975, 10) / stats.t.ppf(0.975, 5)
    assert np.log(agreeing.high / 1.25) == pytest.approx(narrower * np.log(1.01) / 2**0.5, rel=1e-3)
    contradicting = standings([met("a", "b", 0.8), met("b", "a", 1.5)], "ab").relative["b"]
    assert contradicting.low < 1.28
    assert contradicting.high > 1.47


def test_the_interval_of_many_duels_covers() -> None:
    """Of ten whose six sittings differ by 1.2%; every third sat on a busy machine, twice as unsure."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        duels = []
        for index in range(10):
            sittings = rng.normal(0, 0.012 * (1 + (index % 3 == 2)), SITTINGS)
            half = stats.sem(sittings) * stats.t.ppf(0.975, SITTINGS - 1)
            duels.append(met("a", "b", np.exp(sittings.mean()), np.expm1(half)))
        _, slower = standings(duels, "ab").relative.values()
        covered += slower.low <= 1
    assert covered >= 0.91 * 200


def test_the_machine_that_connects_most_records_is_the_reference() -> None:
    few = met("a", "b", 2.0, hardware="1 x Y", start="2026-12-31")
    many = [met("a", "b", 0.5), met("c", "b", 3.0)]
    assert standings([few, *many], "abc").hardware == "1 x X"
    assert list(standings([few, *many], "abc").relative) == ["a", "b", "c"]
    assert list(standings([few, *many], "ab").relative) == ["b", "a"]  # of equals the latest
    assert standings([few], "a").relative == {}


def test_on_a_track_by_steps_the_fewest_steps_rank_first(
    pair: dict[str, Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever they were counted, and whatever duels say."""
    record, twin = pair.values()
    by_steps = dataclasses.replace(rank.find_track("tiny"), ranked_by="steps")
    monkeypatch.setattr(rank, "find_track", lambda name: by_steps)
    twin.summary = copy.deepcopy(record.summary) | {"steps": record.steps - 1, "hardware": "1 x Y"}
    monkeypatch.setattr(Record, "steps", property(lambda self: self.summary["steps"]))
    table = rank.rows([record, twin], [met(record.path.name, twin.path.name, 0.5)])
    assert [(row["rank"], row["name"]) for row in table] == [(1, twin.path.name), (2, record.path.name)]
    ((heading, group),) = rank.classes(table)
    assert heading == "tiny (loss below 3.2) by steps"
    assert "hardware" in rank.columns_of(group)
    assert not {"relative", "time_s", "interval", "median_s"} & rank.columns_of(group).keys()
    assert "tiny_ideas.png" in rank.readme_section(table)


# Duels that are kept


@pytest.fixture
def pair(honest: Path) -> dict[str, Record]:
    """The honest record, and the same under another name."""
    record = load_record(honest)
    twin = dataclasses.replace(record, path=record.path.with_name("2026-11-26_twin"))
    return {each.name: each for each in (record, twin)}


@pytest.fixture
def kept(pair: dict[str, Record]) -> Duel:
    """A duel of the two as `duel` makes one, with turns out of the air."""
    sides = {}
    for key, record in zip(("a", "b"), pair.values(), strict=True):
        tokens = record.runs[0].config["batch_tokens"]
        kinds = [dict(shape="(1, 2, 3)", plan=[], steps=record.steps, tokens=tokens)]
        prints = duel.fingerprint(record.runs[0])
        sides[key] = dict(name=record.path.name, fingerprint=prints, steps=record.steps, kinds=kinds)
    turns = turns_of([0.1], [0.11], busy=0.001)
    counts = {key: [kind["steps"] for kind in each["kinds"]] for key, each in sides.items()}
    return dict(
        start_utc="2026-11-26T10:00:00Z", hardware="1 x X, 2 threads", dtype="torch.float32", versions={}, threads=2,
        **sides, decides="wall", results=results(turns, counts), turns=turns,
    )  # fmt: skip


def verified(found: Duel, pair: dict[str, Record]) -> list[str]:
    return verify_duel.reasons(duel.save(found, "tiny"), pair)


def test_an_honest_duel_holds_and_ranks(kept: Duel, pair: dict[str, Record], honest: Path) -> None:
    assert verified(kept, pair) == []
    (path,) = verify_duel.find_duels()
    assert path.name == f"2026-11-26_{honest.name}_against_2026-11-26_twin.json"
    assert path.stat().st_size < 20_000
    found = standings([verify_duel.load_duel(path)], [record.path.name for record in pair.values()])
    assert list(found.relative) == [honest.name, "2026-11-26_twin"]
    assert found.gain[honest.name].estimate == pytest.approx(1 / 1.1, rel=1e-4)
    duels = [verify_duel.load_duel(path)]
    for track in ("tiny", "another"):  # where records may have the same names
        table = rank.rows(list(pair.values()), [duels[0] | dict(track=track)])
        assert [bool(row["relative"]) for row in table] == [track == "tiny"] * 2


def replace_turn(index: int, **changes: Any) -> Callable[[Duel], None]:
    def change(found: Duel) -> None:
        found["turns"][index] = found["turns"][index]._replace(**changes)

    return change


def swap(found: Duel) -> None:
    turns = found["turns"]
    turns[4], turns[5] = (Turn(*turns[i][:2], *turns[j][2:]) for i, j in ((5, 4), (4, 5)))


def give_more_turns(found: Duel) -> None:
    """Keep, of the other side, its slower turn of each four, and of one's own the faster."""
    for i in range(0, len(found["turns"]), 4):
        found["turns"][i : i + 4] = [found["turns"][i]] * 3 + [found["turns"][i + 1]]


def make_faster(found: Duel, by: float = 0.9) -> None:
    """Every turn of A, and what follows from it: only the clock tells."""
    found["turns"] = [t._replace(wall_s=round(t.wall_s / by, 6)) if t.side == "b" else t for t in found["turns"]]
    counts = {side: [kind["steps"] for kind in found[side]["kinds"]] for side in ("a", "b")}
    found["results"] = results(found["turns"], counts)


def shorten(found: Duel, by: float = 0.97) -> None:
    found["turns"] = [t._replace(wall_s=round(t.wall_s * by, 6)) if t.side == "a" else t for t in found["turns"]]
    counts = {side: [kind["steps"] for kind in found[side]["kinds"]] for side in ("a", "b")}
    found["results"] = results(found["turns"], counts)


def let_half_be_small(found: Duel) -> None:
    """The same number of steps and of tokens."""
    (kind,) = found["a"]["kinds"]
    steps, tokens = kind["steps"], kind["tokens"]
    found["a"]["kinds"] = [kind | dict(steps=steps - 1, tokens=tokens - 1),
                           kind | dict(steps=1, tokens=tokens + steps - 1)]  # fmt: skip


FORGED: dict[str, tuple[Callable[[Duel], Any], str]] = {
    "an edited turn": (replace_turn(7, wall_s=0.05), "its turns say"),
    "a longer turn": (replace_turn(7, wall_s=0.5), "turn 8 began before turn 7 had ended"),
    "turns edited with what follows": (make_faster, "began before turn"),
    "turns shortened with what follows": (shorten, "turns were shortened"),
    "steps of other sizes": (let_half_be_small, "tokens, and its kinds of step "),
    "other results": (lambda d: d["results"]["wall"].update(estimate=0.5, low=0.49, high=0.51), "its turns say"),
    "more CPU than there is": (replace_turn(3, cpu_s=5.0), "cannot be with 2 threads"),
    "CPU time decides": (lambda d: d.update(decides="cpu"), "wall time does"),
    "another source": (lambda d: d["a"].update(fingerprint="0" * 64), "another source or other settings"),
    "fewer steps": (lambda d: d["a"]["kinds"][0].update(steps=1), "and its kinds of step 1"),
    "smaller batches": (lambda d: d["b"]["kinds"][0].update(tokens=1), "tokens, and its kinds of step"),
    "no number of steps": (lambda d: d["b"]["kinds"][0].update(steps=-1), "every kind of step has a number"),
    "turns out of order": (swap, "was due"),
    "unequal turns": (give_more_turns, "was due"),
    "a turn left out": (lambda d: d["turns"].pop(), "an even number of at least 8 is needed"),
    "few rounds": (lambda d: d.update(turns=d["turns"][:72]), "an even number of at least 8 is needed"),
    "no number": (replace_turn(2, wall_s="fast"), "three times in seconds"),
    "nan": (replace_turn(2, wall_s=float("nan")), "three times in seconds"),
    "no record": (lambda d: d["a"].update(name="2026-11-26_none"), "is no record of tiny that holds"),
    "itself": (lambda d: d["b"].update(name=d["a"]["name"]), "stands on both sides"),
    "no machine": (lambda d: d.update(hardware="<b>fast</b>"), "hardware ="),
    "the future": (lambda d: d.update(start_utc="2999-01-01T00:00:00Z"), "from the future"),
    "a key more": (lambda d: d.update(note="trust me"), "it has to be an object with"),
    "nothing": (lambda d: d.update(a=None), "it cannot be checked"),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_duel_is_refused(name: str, kept: Duel, pair: dict[str, Record]) -> None:
    forge, reason = FORGED[name]
    named = duel.file_name(kept)
    forged = copy.deepcopy(kept)
    forge(forged)
    path = duel.save(dict(forged, a=forged["a"] or kept["a"]), "tiny")
    if forged["a"] is None:
        path.write_text(json.dumps(forged), encoding="utf-8")
    assert reason in "; ".join(verify_duel.reasons(path, pair)), named


def test_a_copied_duel_is_refused(kept: Duel, pair: dict[str, Record]) -> None:
    """It would count twice."""
    path, other = (duel.save(kept | dict(start_utc=f"2026-11-{day}T10:00:00Z"), "tiny") for day in (24, 25))
    copied = f"most of its turns are those of {path.name} to the last digit"
    assert verify_duel.verify_all(pair) == {path: [], other: [copied]}


def test_what_the_median_does_not_see_is_said(kept: Duel) -> None:
    assert "By means" not in duel.sentences(kept)[-1]
    kept["turns"] = [t._replace(wall_s=2 * t.wall_s) if t.side == "a" and i % 12 == 0 else t
                     for i, t in enumerate(kept["turns"])]  # fmt: skip
    counts = {side: [kind["steps"] for kind in kept[side]["kinds"]] for side in ("a", "b")}
    kept["results"] = results(kept["turns"], counts)
    assert "some steps do work that most do not" in duel.sentences(kept)[-1]


def test_both_sides_run_on_one_machine(pair: dict[str, Record], monkeypatch: pytest.MonkeyPatch) -> None:
    machines = iter(["1 x GPU", "1 x CPU"])

    @contextmanager
    def side(which: Record, files: dict[str, str]) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(run=SimpleNamespace(hardware=next(machines)))

    monkeypatch.setattr(duel, "side", side)
    monkeypatch.setattr(duel, "prepared", lambda which: {})
    with pytest.raises(ValueError, match="set one device in both recipes"):
        duel.duel(*pair.values(), rounds=8)


def test_a_duel_under_another_name_or_of_no_json_is_refused(kept: Duel, pair: dict[str, Record]) -> None:
    path = duel.save(kept, "tiny")
    other = path.rename(path.with_name("2026-11-25_a_against_b.json"))
    assert "the file is not named" in verify_duel.reasons(other, pair)[0]
    other.write_text("[" * 10_000, encoding="utf-8")
    assert "it cannot be" in verify_duel.reasons(other, pair)[0]


def test_verify_and_rank_know_duels(
    kept: Duel, honest: Path, tiny_runs: list[Path], board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept["a"]["fingerprint"] = "forged"
    duel.save(kept, "tiny")
    assert cli.main(["verify"]) == 1
    assert "1 records, none that do not hold\n1 duels, 1 that do not hold" in capsys.readouterr().out
    assert cli.main(["rank", "tiny"]) == 0
    printed = capsys.readouterr()
    assert "left out: duel 2026-11-26" in printed.err
    assert "time by duels" not in printed.out


# The real thing


@pytest.mark.slow
def test_a_record_and_this_checkout_take_turns(
    honest: Path, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duel, "SITTINGS", 2)  # for time
    recipe = tmp_path / "tiny twin.toml"
    more = "train_steps = 30\nsmall_batch_steps = 12\nshort_row_steps = 20\naverage_steps = 5\n"
    lines = [line for line in tiny_recipe.read_text(encoding="utf-8").splitlines(True) if "train_steps" not in line]
    recipe.write_text("".join(lines) + more, encoding="utf-8")
    record = load_record(honest)
    found = duel.duel(record, recipe, rounds=8)
    a, b = found["a"], found["b"]
    assert [kind["steps"] for kind in a["kinds"]] == [record.steps]
    batch = record.runs[0].config["batch_tokens"]
    assert (a["kinds"][0]["tokens"], a["steps"]) == (batch, record.steps)
    told = [(kind["steps"], kind["tokens"]) for kind in b["kinds"]]
    assert told == [(12, batch // 2), (8, batch), (10, batch)]
    assert len({kind["shape"] for kind in b["kinds"]}) == 3
    assert len(found["turns"]) == 2 * 8 * 4
    assert a["fingerprint"] == duel.fingerprint(record.runs[0]) != b["fingerprint"]
    assert found["results"]["wall"]["low"] < found["results"]["wall"]["estimate"] < found["results"]["wall"]["high"]
    # Not the last where a busy machine makes means and medians differ, which is then said, too
    assert any(sentence.endswith("(wall time decides).") for sentence in duel.sentences(found))


def test_records_of_two_tracks_of_others_or_of_several_ranks_are_refused(pair: dict[str, Record]) -> None:
    record, twin = pair.values()
    duel.check(record, twin)
    elsewhere = dataclasses.replace(twin, path=twin.path.parent.with_name("other") / twin.path.name)
    with pytest.raises(ValueError, match=r"honest and other/.* are of two tracks"):
        duel.check(record, elsewhere)
    foreign = dataclasses.replace(twin, summary=twin.summary | {"foreign": {"source": "a page"}})
    with pytest.raises(ValueError, match="twin is a foreign log"):
        duel.check(record, foreign)
    record.runs[0].log.facts["world_size"] = 2
    with pytest.raises(ValueError, match="honest ran on several ranks"):
        duel.check(record, Path("configs/sotu_cpu.toml"))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["tiny/{honest}", "tiny/{honest}"], "cannot duel with itself"),
        (["tiny/{honest}", "none.toml"], "none.toml is not a file"),
        (["tiny/{honest}", "configs/sotu_cpu.toml", "--rounds=9"], "rounds = 9 must be even and at least 8"),
        (["tiny/{honest}", "configs/sotu_cpu.toml", "--keep"], "only duels of two records are kept"),
        (["tiny/none", "configs/sotu_cpu.toml"], "there is no record at tiny/none"),
    ],
)
def test_what_cannot_duel_is_one_line(
    words: list[str], problem: str, honest: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["duel", *(word.format(honest=honest.name) for word in words)]) == 2
    assert problem in capsys.readouterr().err


def test_a_kept_duel_is_not_written_over(
    pair: dict[str, Record], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before the minutes that a duel takes, which nothing is lost by."""
    a, b = pair.values()
    monkeypatch.setattr(cli, "_one_record", lambda place: a if place.name == "a" else b)
    monkeypatch.setattr(cli.duel, "duel", pytest.fail)
    sides = dict(a=dict(name=a.path.name), b=dict(name=b.path.name))
    there = duel.place("tiny", dict(sides, start_utc=datetime.now(UTC).isoformat()))
    there.parent.mkdir(parents=True)
    there.touch()
    assert cli.main(["duel", "a", "b", "--keep"]) == 2
    assert f"{there} exists; leave out --keep" in capsys.readouterr().err


def test_a_recipe_s_data_are_looked_for_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('train_files = "data/none/x_*.bin"\nval_files = "data/none/y_*.bin"\n', encoding="utf-8")
    assert cli.main(["duel", str(recipe), str(recipe)]) == 2
    assert "_*.bin': found no file" in capsys.readouterr().err
    recipe.write_text("trian_steps = 3\n", encoding="utf-8")
    assert cli.main(["duel", str(recipe), str(recipe)]) == 2
    assert f"error: {recipe}: trian_steps is not a setting" in capsys.readouterr().err
