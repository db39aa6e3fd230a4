"""Tables of verified records: for each track and hardware the fastest first."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from harness.tables import align, with_section
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
LEFT_OUT = ("median_s", "author")  # of the README's table, to fit a page


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a record, numbers as they are; ordered by track, hardware and mean time, with its rank among those."""
    ordered = sorted(records, key=lambda record: (*_class(record), record.summary["time_s"]["mean"]))
    table = []
    for (track, hardware), group in groupby(ordered, key=_class):
        for rank, record in enumerate(group, start=1):
            summary = record.summary
            table.append(dict(
                track=track, hardware=hardware, rank=rank, name=record.path.name, foreign=summary["foreign"],
                **{key: summary[key] for key in ("time_s", "steps", "tokens", "val_loss", "n", "p", "date", "author",
                                                 "description")},
            ))  # fmt: skip
    return table


def _class(record: Record) -> tuple[str, str]:
    return record.path.parent.name, record.hardware


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """A row in words; a dagger marks what other code than this repository's has run."""
    times, losses = row["time_s"], row["val_loss"]
    return dict(
        rank=str(row["rank"]), name=row["name"] + ("†" if row["foreign"] else ""), time_s=f"{times['mean']:.2f}",
        interval=f"{times['low']:.2f} to {times['high']:.2f}", median_s=f"{times['median']:.2f}",
        steps=f"{row['steps']:,}", tokens=f"{row['tokens']:,}" if row["tokens"] else "?",
        val_loss=f"{losses['mean']:.4f}" + (f" ± {losses['sd']:.4f}" if losses["sd"] is not None else ""),
        n=str(row["n"]), p=f"{row['p']:.1e}", date=row["date"], author=row["author"], description=row["description"],
    )  # fmt: skip


def classes(table: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """(heading, hardware, rows) for each track and hardware."""
    found = []
    for (track, hardware), group in groupby(table, key=lambda row: (row["track"], row["hardware"])):
        known = find_track(track)
        found.append((f"{track} (loss below {known.target_loss:g}) on {hardware}", hardware, list(group)))
    return found


def terminal(table: Sequence[Mapping[str, Any]]) -> str:
    parts: list[str] = []
    for heading, _, group in classes(table):
        lines = [list(COLUMNS.values())] + [[cells(row)[key] for key in COLUMNS] for row in group]
        *numbers, date, author, what = zip(*lines, strict=True)
        words = zip(*(_left(column) for column in (date, author, what)), strict=True)
        aligned = align(list(zip(*numbers, strict=True))).splitlines()
        parts.append("\n" * bool(parts) + "\n".join([heading, *(f"{line}  {'  '.join(rest)}".rstrip()
                                           for line, rest in zip(aligned, words, strict=True))]))  # fmt: skip
    return "".join(f"{part}\n" for part in parts) + _dagger(table)


def _dagger(table: Sequence[Mapping[str, Any]]) -> str:
    return "\n† other code's run, from its log\n" if any(row["foreign"] for row in table) else ""


def _left(column: Sequence[str]) -> list[str]:
    return [cell.ljust(max(map(len, column))) for cell in column]


def markdown(table: Sequence[Mapping[str, Any]], base: str = "", left_out: Sequence[str] = ()) -> str:
    """Tables for a page, without some columns; `base` is the way from it to leaderboard/."""
    parts = []
    for heading, _, group in classes(table):
        shown = {key: name for key, name in COLUMNS.items() if key not in left_out}
        lines = [f"**{_escaped(heading)}**", "", f"| {' | '.join(shown.values())} |", "|" + "---|" * len(shown)]
        for row in group:
            of_row = {key: _escaped(text) for key, text in cells(row).items()}
            of_row["name"] = f"[{cells(row)['name']}]({base}records/{row['track']}/{row['name']})"
            lines.append("| " + " | ".join(of_row[key] for key in shown) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts) + _dagger(table)


def _escaped(text: str) -> str:
    """Words as words: no Markdown and no HTML in them."""
    return re.sub(r"([\\|\[\]`*_])", r"\\\1", text).replace("<", "&lt;")


def to_json(table: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(list(table), indent=1) + "\n"


def slug(text: str) -> str:
    """A file name of a hardware's or a track's name."""
    return re.sub(r"(\((r|tm)\)|[^a-z0-9])+", "-", text.lower()).strip("-")


def readme_section(table: Sequence[Mapping[str, Any]]) -> str:
    """The README's part: each class's table with its figure."""
    parts = []
    for heading, hardware, group in classes(table):
        figure = f"leaderboard/plots/{slug(group[0]['track'])}_{slug(hardware)}.png"
        caption = f"Loss against time, steps and tokens: {_escaped(heading)}"
        parts.append(f"{markdown(group, 'leaderboard/', LEFT_OUT)}\n![{caption}]({figure})\n")
    return "\n".join(parts) or "No record yet.\n"


def with_leaderboard(document: str, table: Sequence[Mapping[str, Any]]) -> str:
    """The README with its leaderboard as the records say."""
    return with_section(document, SECTION, readme_section(table))
