"""Tables of verified records: for each track and hardware the fastest first."""

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from harness import tables
from harness.tables import Row, align, slug, with_section
from leaderboard.records import Record
from leaderboard.tracks import find_track

README = Path(__file__).resolve().parent.parent / "README.md"
SECTION = "leaderboard"  # of the README, between <!-- leaderboard --> and <!-- /leaderboard -->
PLOTS = Path(__file__).with_name("plots")
COLUMNS = {
    "rank": "#", "name": "record", "time_s": "time to target (s)", "interval": "95% CI", "median_s": "median (s)",
    "steps": "steps", "tokens": "tokens", "val_loss": "loss", "n": "n", "p": "p", "date": "date",
    "author": "author", "description": "what changed",
}  # fmt: skip
FROM_SUMMARY = ("foreign", "time_s", "steps", "tokens", "val_loss", "n", "p", "date", "author", "description")
LEFT_OUT = ("median_s", "author")  # of the README's table, to fit a page


def rows(records: Sequence[Record]) -> list[Row]:
    """One row per record, numbers as they are; ordered by track, hardware and mean time, with its rank among those."""
    ordered = sorted(records, key=lambda record: (*_class(record), record.summary["time_s"]["mean"]))
    table = []
    for (track, hardware), group in groupby(ordered, key=_class):
        for rank, record in enumerate(group, start=1):
            row = {key: record.summary[key] for key in FROM_SUMMARY}
            table.append(dict(track=track, hardware=hardware, rank=rank, name=record.path.name) | row)
    return table


def _class(record: Record) -> tuple[str, str]:
    return record.path.parent.name, record.hardware


def cells(row: Row) -> dict[str, str]:
    """A row in words; a dagger marks what other code than this repository's has run."""
    times, losses = row["time_s"], row["val_loss"]
    return dict(
        rank=str(row["rank"]), name=row["name"] + ("†" if row["foreign"] else ""), time_s=f"{times['mean']:.2f}",
        interval=f"{times['low']:.2f} to {times['high']:.2f}", median_s=f"{times['median']:.2f}",
        steps=f"{row['steps']:,}", tokens=f"{row['tokens']:,}" if row["tokens"] else "?",
        val_loss=f"{losses['mean']:.4f}" + (f" ± {losses['sd']:.4f}" if losses["sd"] is not None else ""),
        n=str(row["n"]), p=f"{row['p']:.1e}", date=row["date"], author=row["author"], description=row["description"],
    )  # fmt: skip


def classes(table: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """(heading, hardware, rows) for each track and hardware."""
    found = []
    for (track, hardware), group in groupby(table, key=lambda row: (row["track"], row["hardware"])):
        known = find_track(track)
        found.append((f"{track} (loss below {known.target_loss:g}) on {hardware}", hardware, list(group)))
    return found


def terminal(table: Sequence[Row]) -> str:
    parts = []
    for heading, _, group in classes(table):
        columns = [[name, *(cells(row)[key] for row in group)] for key, name in COLUMNS.items()]
        for words in columns[-3:]:  # date, author, what changed
            words[:] = [word.ljust(max(map(len, words))) for word in words]
        lines = align(list(zip(*columns, strict=True))).splitlines()
        parts.append("".join(f"{line.rstrip()}\n" for line in (heading, *lines)))
    return "\n".join(parts) + _dagger(table)


def _dagger(table: Sequence[Row]) -> str:
    return "\n† other code's run, from its log\n" if any(row["foreign"] for row in table) else ""


def markdown(table: Sequence[Row], base: str = "", left_out: Sequence[str] = ()) -> str:
    """Tables for a page, without some columns; `base` is the way from it to leaderboard/."""
    shown, parts = {key: name for key, name in COLUMNS.items() if key not in left_out}, []
    for heading, _, group in classes(table):
        lines = [{key: _escaped(text) for key, text in cells(row).items()} for row in group]
        for line, row in zip(lines, group, strict=True):
            line["name"] = f"[{cells(row)['name']}]({base}records/{row['track']}/{row['name']})"
        parts.append(f"**{_escaped(heading)}**\n\n{tables.markdown(lines, shown)}")
    return "\n".join(parts) + _dagger(table)


def _escaped(text: str) -> str:
    """Words as words: no Markdown and no HTML in them."""
    return re.sub(r"([\\|\[\]`*_])", r"\\\1", text).replace("<", "&lt;")


def readme_section(table: Sequence[Row]) -> str:
    """The README's part: each class's table with its figure."""
    parts = []
    for heading, hardware, group in classes(table):
        figure = f"leaderboard/plots/{slug(group[0]['track'])}_{slug(hardware)}.png"
        caption = f"Loss against time, steps and tokens: {_escaped(heading)}"
        parts.append(f"{markdown(group, 'leaderboard/', LEFT_OUT)}\n![{caption}]({figure})\n")
    return "\n".join(parts) or "No record yet.\n"


def with_leaderboard(document: str, table: Sequence[Row]) -> str:
    """The README with its leaderboard as the records say."""
    return with_section(document, SECTION, readme_section(table))
