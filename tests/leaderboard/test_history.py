"""The history of records: what each changed against the one before, by date, by idea, and in words."""

import copy
import dataclasses
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import leaderboard.__main__ as cli
from leaderboard import changes, page, plots, rank
from leaderboard.records import Record, load_record
from leaderboard.runs import Run
from tests.leaderboard.test_duel import met

START = "2026-11-01_start"
SLOWEST = f"{START}, the slowest of the first day"


def variant(record: Record, name: str, seconds: float, steps: int = 40, **summary: Any) -> Record:
    """The same runs under another name and with another time."""
    about = copy.deepcopy(record.summary) | dict(name=name[11:], date=name[:10], steps=steps) | summary
    about["time_s"] = dict(mean=seconds, median=seconds, low=0.9 * seconds, high=1.1 * seconds)
    return dataclasses.replace(record, path=record.path.with_name(name), summary=about)


def altered(record: Record, change: dict[str, Any], sources: dict[str, str]) -> Record:
    """With other settings and sources in the log of its first run."""
    run = Run("seed 0", record.runs[0].texts)
    run.log.facts["config"] = {key: value for key, value in (run.config | change).items() if value != "left out"}
    run.log.sources |= sources
    return dataclasses.replace(record, path=record.path.with_name("2026-11-02_new"), runs=[run])


@pytest.fixture
def record(honest: Path) -> Record:
    return load_record(honest)


# Changes


def test_changes_are_settings_and_lines(record: Record) -> None:
    model = record.runs[0].log.sources["model.py"]
    new = altered(record, {"matrix_lr": 0.5, "description": "b"}, {"model.py": "# one\n" + model, "mine.py": "a\nb\n"})
    found = changes.changes(record, new)
    assert list(found.settings) == ["matrix_lr"] and found.settings["matrix_lr"][1] == "0.5"
    assert [(file.path, file.added, file.removed) for file in found.files] == [("mine.py", 2, 0), ("model.py", 1, 0)]
    assert found.diff().startswith("--- /dev/null\n+++ b/mine.py\n@@ -0,0 +1,2 @@\n+a\n+b\n--- a/model.py\n")
    assert not found.diff(5)
    back = changes.changes(new, record)
    assert [(file.added, file.removed) for file in back.files] == [(0, 2), (0, 1)]


def test_a_setting_that_an_older_source_lacks_is_as_by_default(record: Record) -> None:
    old = altered(record, {"activation": "left out", "head_betas": None, "gone": 1}, {})
    assert changes.changes(old, record).settings == {"gone": ("1", "unset")}
    new = altered(record, {"activation": "squared_relu"}, {})
    assert changes.changes(old, new).settings["activation"] == ('"swiglu"', '"squared_relu"')


def test_a_long_diff_is_counted_and_a_short_one_folded_away(record: Record) -> None:
    short, long = (altered(record, {}, {"mine.py": "<b>\n" * lines}) for lines in (397, 398))
    shown = page._changes(record, short)
    assert "<details><summary>Diff of the sources</summary>" in shown
    assert shown.count("<ins>+&lt;b&gt;</ins>") == 397 and "<td>+397</td><td>-0</td>" in shown
    assert "<details>" not in page._changes(record, long) and "<td>+398</td>" in page._changes(record, long)


def test_two_records_differences_are_printed(record: Record, capsys: pytest.CaptureFixture[str]) -> None:
    new = altered(record, {"matrix_lr": 0.5}, {"mine.py": "a\n"})
    text = changes.as_text(record, new)
    assert text.startswith(f"From {record.name} to {new.name}\n") and " -> 0.5\n" in text
    assert "  mine.py: +1 -0\n" in text and text.endswith("+a\n")
    assert "--max_lines=100000 prints it" in changes.as_text(record, new, 3)
    capsys.readouterr()
    assert cli.main(["diff", record.name, record.name]) == 0
    assert capsys.readouterr().out.endswith("Settings: the same\nSource files: the same\n")


# What is before what


@pytest.mark.parametrize(("day", "of_the_slowest"), [("01", {"start": "oldest"}), ("04", {})])
def test_a_record_s_predecessor_is_the_next_slower_one_of_the_duels_else_of_the_day_before(
    day: str, of_the_slowest: dict[str, str], record: Record
) -> None:
    """By the duels c is faster than b, though it came first."""
    names = [f"2026-11-{day}_start", "2026-11-03_b", "2026-11-02_c"]
    of_duels = [met(names[1], names[0], 0.8), met(names[2], names[1], 0.5)]
    records = [variant(record, name, 10) for name in [*names, "2026-10-01_oldest", "2026-11-05_last"]]
    records.append(variant(record, "2026-11-04_foreign", 5, foreign=dict(hardware="1 x X"), hardware="1 x X"))
    table = rank.rows(records, [dict(each, track="tiny") for each in of_duels])
    found = {key[16:]: value[16:] for key, value in rank.predecessors(table).items()}
    latest = "start" if day == "04" else "b"
    assert found == {"b": "start", "c": "b", "last": latest, **of_the_slowest}


# Figures


def words(figure: plots.Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_ideas_stand_in_the_order_they_came(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [START, "2026-11-01_b", "2026-11-01_c"]
    records = [variant(record, *each) for each in zip(names, (8, 4, 5), (9, 3, 6), strict=True)]
    of_duels = [met(names[1], names[0], 0.8), met(names[2], names[1], 0.5)]

    def drawn(table: list[rank.Row]) -> tuple[list[float], list[str], str]:
        figure = plots.ideas(table)
        (line,) = (container.lines[0] for container in figure.axes[0].containers if hasattr(container, "has_xerr"))
        return list(line.get_xdata()), words(figure), figure.axes[0].get_xlabel()

    xs, texts, label = drawn(rank.rows(records, [dict(each, track="tiny") for each in of_duels]))
    assert xs == pytest.approx([2.5, 2, 1])
    assert texts == ["start: as it is", "b: as it is", "-20%", "c: as it is", "-50%"]
    assert "by duels" in label
    xs, texts, label = drawn(rank.rows(records))
    assert xs == [8, 5, 4] and "seconds" in label and texts[1] == "c: as it is"
    track = dataclasses.replace(page.find_track("tiny"), ranked_by="steps")
    monkeypatch.setattr(rank, "find_track", lambda name: track)
    xs, _, label = drawn(rank.rows(records))
    assert xs == [9, 6, 3] and label == "steps to the target"


def test_of_many_records_of_a_day_the_best_is_named(record: Record) -> None:
    few = [variant(record, f"2026-11-0{day}_n{i}", 20 - i) for day in (1, 2) for i in range(2)]
    assert sorted(words(plots.history(few))) == ["n0", "n0", "n1", "n1"]
    many = [variant(record, f"2026-11-0{day}_d{day}n{i}", 50 / day - i) for day in (1, 2) for i in range(4)]
    assert words(plots.history(many)) == ["d1n3", "d2n3"]
    legend = plots.curves(many, 3.2).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [each.path.name for each in many]


def test_the_tokens_of_a_curve_are_those_of_a_growing_batch(record: Record) -> None:
    half = altered(record, {"small_batch_steps": 20}, {})
    assert plots._million_tokens(half, [10, 20, 40]) == pytest.approx([960e-6, 1920e-6, 5760e-6])


def test_the_readme_shows_the_ideas_of_a_track_with_many_records(record: Record) -> None:
    records = [variant(record, f"2026-11-01_n{i}", 10 + i) for i in range(6)]
    assert "tiny_ideas.png" not in rank.readme_section(rank.rows(records[:5]))
    section = rank.readme_section(rank.rows(records))
    assert section.count("![") == 1 and "](leaderboard/plots/tiny_ideas.png)" in section


def test_the_readme_shows_the_first_records_of_a_table(record: Record) -> None:
    records = [variant(record, f"2026-11-01_n{i}", 10 + i) for i in range(rank.SHOWN + 2)]
    assert " more: [" not in rank.readme_section(rank.rows(records[: rank.SHOWN]))
    section = rank.readme_section(rank.rows(records))
    assert section.count("](leaderboard/records/") == rank.SHOWN
    assert "2 more: [docs/leaderboard.md](docs/leaderboard.md#all-records)" in section
    assert rank.all_records(rank.rows(records)).count("](../leaderboard/records/") == len(records)


# Words, and the whole page


def test_a_track_s_lead_says_what_it_asks_for_and_what_was_gained(record: Record) -> None:
    records = [variant(record, START, 80), variant(record, "2026-11-02_new", 10)]
    track = dataclasses.replace(page.find_track("tiny"), about="Tiny data.")
    hardware = record.hardware
    assert page.lead(rank.rows(records), track) == (
        "Tiny data. The goal is a validation loss below 3.2 nats per token in the least training time. The record is "
        f"2026-11-02_new by A. Tester: 10 s on {hardware}, 8 times as fast as {SLOWEST} (as measured)."
    )
    of_duel = [dict(met("2026-11-02_new", START, 0.25), track="tiny")]
    assert page.lead(rank.rows(records, of_duel), track).endswith(f"4 times as fast as {SLOWEST} (by duels).")
    by_steps = dataclasses.replace(track, ranked_by="steps")
    for each, steps in zip(records, (90, 30), strict=True):
        each.summary["steps"] = steps
    assert page.lead(rank.rows(records[::-1]), by_steps).endswith(f": 30 steps; {SLOWEST}, took 90.")
    assert page.lead(rank.rows(records[1:]), track).endswith(f": 10 s on {hardware}.")


def test_a_page_of_fifteen_records_is_small_and_its_links_lead_somewhere(record: Record) -> None:
    names = [f"2026-11-01_n{i}" for i in range(15)]
    records = [variant(record, name, 70 * 0.8**i, description=r"<b> & $\no}formula$") for i, name in enumerate(names)]
    duels = [dict(met(new, old, 0.8), track="tiny") for old, new in pairwise(names)]
    document = page.render(records, duels)
    assert len(document.encode()) < 1_500_000
    ids = re.findall(r' id="([^"]+)"', re.sub(r"<defs>.*?</defs>", "", document, flags=re.DOTALL))
    assert len(ids) == len(set(ids)) and {f"tiny/{name}" for name in names} < {*ids}
    assert {*re.findall(r'<a href="#([^"]+)"', document)} <= {*ids}
    assert "<b>" not in document and r"&lt;b&gt; &amp; $\no}formula$" in document
    assert "<td>0.800 (0.792 to 0.808)</td><td>1 x X</td><td>2026-11-26</td>" in document
    assert document.count("The same settings and sources.") == 14
