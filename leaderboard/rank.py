"""Tables of verified records: on a track by steps the fewest first. On one by time those that duels connect, in the
order of these; for each hardware the others, the fastest first."""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

from harness import tables
from harness.tables import Row, align, slug, with_section
from leaderboard import plots
from leaderboard.duel import Ratio
from leaderboard.records import Record
from leaderboard.standings import standings
from leaderboard.tracks import find_track

README = Path(__file__).resolve().parent.parent / "README.md"
ALL_RECORDS = README.parent / "docs/leaderboard.md"
PLOTS = Path(__file__).with_name("plots")
COLUMNS = {
    "rank": "#", "name": "record", "description": "what changed", "relative": "time by duels",
    "gain": "of the one below", "time_s": "measured time (s)", "interval": "95% CI", "median_s": "median (s)",
    "hardware": "measured on", "steps": "steps", "tokens": "tokens", "val_loss": "loss", "n": "n", "p": "p",
    "date": "date", "author": "author",
}  # fmt: skip
FROM_SUMMARY = ("foreign", "time_s", "steps", "tokens", "val_loss", "n", "p", "date", "author", "description")
AS_TEXT = ("name", "description", "date", "author")  # columns that begin at one place
LEFT_OUT = ("median_s", "author")  # of tables in documents, to fit a page
NONE_YET = "No record yet.\n"
SHOWN = 5  # records of each of the README's tables


def rows(records: Sequence[Record], duels: Sequence[dict[str, Any]] = ()) -> list[Row]:
    """One row per record, numbers as they are, with its rank: by track, first those that duels connect, then the others
    by hardware and mean time. duels: those that hold."""
    table: list[Row] = []
    by_track = sorted(records, key=lambda record: record.path.parent.name)
    for track, group in groupby(by_track, key=lambda record: record.path.parent.name):
        of_track = list(group)
        by_steps = find_track(track).ranked_by == "steps"
        of_duels = [] if by_steps else [duel for duel in duels if duel["track"] == track]
        order = standings(of_duels, [record.path.name for record in of_track])
        places = {name: place for place, name in enumerate(order.relative)}

        def standing(record: Record, by_steps: bool = by_steps, places: dict[str, int] = places) -> tuple[Any, ...]:
            if by_steps:
                return record.steps, record.summary["val_loss"]["mean"]
            place = places.get(record.path.name)
            return (0, place) if place is not None else (1, record.hardware, record.summary["time_s"]["mean"])

        rank = Counter[str]()
        for record in sorted(of_track, key=standing):
            name = record.path.name
            machine = f"by duels on {order.hardware}" if name in places else f"on {record.hardware}"
            machine = "by steps" if by_steps else machine
            rank[machine] += 1
            relative = dict(relative=order.relative.get(name), gain=order.gain.get(name))
            place = dict(track=track, machine=machine, hardware=record.hardware, rank=rank[machine], name=name)
            table.append(place | relative | {key: record.summary[key] for key in FROM_SUMMARY})
    return table


def cells(row: Row) -> dict[str, str]:
    """A row in words; a dagger marks what other code than this repository's has run."""
    times, losses = row["time_s"], row["val_loss"]
    return dict(
        relative=ratio_in_words(row["relative"]), gain=ratio_in_words(row["gain"]), hardware=row["hardware"],
        rank=str(row["rank"]), name=row["name"] + ("†" if row["foreign"] else ""), time_s=f"{times['mean']:.2f}",
        interval=f"{times['low']:.2f} to {times['high']:.2f}", median_s=f"{times['median']:.2f}",
        steps=f"{row['steps']:,}", tokens=f"{row['tokens']:,}" if row["tokens"] else "?",
        val_loss=f"{losses['mean']:.4f}" + (f" ± {losses['sd']:.4f}" if losses["sd"] is not None else ""),
        n=str(row["n"]), p=f"{row['p']:.1e}", date=row["date"], author=row["author"], description=row["description"],
    )  # fmt: skip


def ratio_in_words(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    if ratio.low == ratio.high:
        return "1"
    return f"{ratio.estimate:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"


def classes(table: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """(heading, rows) of each table: those ranked by one machine's duels, or by measured times on one hardware."""
    found = []
    for (track, machine), group in groupby(table, key=lambda row: (row["track"], row["machine"])):
        found.append((f"{track} (loss below {find_track(track).target_loss:g}) {machine}", list(group)))
    return found


def columns_of(group: Sequence[Row], left_out: Sequence[str] = ()) -> dict[str, str]:
    """COLUMNS without what says nothing in this table: on a track by steps runs may share a machine."""
    unsaid = {*left_out}
    if not any(row["relative"] for row in group):
        unsaid |= {"relative", "gain"}
    if group[0]["machine"].startswith("on "):
        unsaid.add("hardware")
    if group[0]["machine"] == "by steps":
        unsaid |= {"time_s", "interval", "median_s"}
    return {key: name for key, name in COLUMNS.items() if key not in unsaid}


def by_hardware(group: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Rows whose measured times compare, for figures: (hardware, rows)."""
    ordered = sorted(group, key=lambda row: row["hardware"])
    return [(hardware, list(rows)) for hardware, rows in groupby(ordered, key=lambda row: row["hardware"])]


def terminal(table: Sequence[Row]) -> str:
    parts = []
    for heading, group in classes(table):
        columns = []
        for key, name in columns_of(group).items():
            words = [name, *(cells(row)[key] for row in group)]
            width = max(map(len, words)) if key in AS_TEXT else 0
            columns.append([word.ljust(width) for word in words])
        lines = align(list(zip(*columns, strict=True))).splitlines()
        parts.append("".join(f"{line.rstrip()}\n" for line in (heading, *lines)))
    return "\n".join(parts) + _dagger(table)


def _dagger(table: Sequence[Row]) -> str:
    return "\n† other code's run, from its log\n" if any(row["foreign"] for row in table) else ""


def markdown(table: Sequence[Row], base: str = "", left_out: Sequence[str] = ()) -> str:
    """Tables for a page, without some columns; `base` is the way from it to leaderboard/."""
    parts = []
    for heading, group in classes(table):
        lines = [{key: _escaped(text) for key, text in cells(row).items()} for row in group]
        for line, row in zip(lines, group, strict=True):
            line["name"] = f"[{cells(row)['name']}]({base}records/{row['track']}/{row['name']})"
        parts.append(f"**{_escaped(heading)}**\n\n{tables.markdown(lines, columns_of(group, left_out))}")
    return "\n".join(parts) + _dagger(table)


def _escaped(text: str) -> str:
    """Words as words: no Markdown and no HTML in them."""
    return re.sub(r"([\\|\[\]`*_])", r"\\\1", text).replace("<", "&lt;")


def predecessors(table: Sequence[Row]) -> dict[str, str]:
    """Record -> the one it improves on, both as track/name: the next slower one where duels or steps rank them, else
    the one before it by date. Logs of other speedruns have none, and are none."""
    own, found = [row for row in table if not row["foreign"]], dict[str, str]()
    for track, group in groupby(own, key=lambda row: row["track"]):
        rows = list(group)
        dated = sorted(rows, key=lambda row: (row["date"], -row["time_s"]["mean"]))
        ranked = [row for row in rows[::-1] if row["machine"].startswith("by ")]
        by_date = [(before, row) for before, row in pairwise(dated) if before not in ranked or row not in ranked]
        for before, row in [*by_date, *pairwise(ranked)]:
            found[f"{track}/{row['name']}"] = f"{track}/{before['name']}"
    return found


def readme_section(table: Sequence[Row]) -> str:
    """The README's part: the first records of each class, and the track's ideas where steps rank or it has many
    records, else the loss curves."""
    parts = []
    for _, group in classes(table):
        part = markdown(group[:SHOWN], "leaderboard/", LEFT_OUT)
        if len(group) > SHOWN:
            where = ALL_RECORDS.relative_to(README.parent).as_posix()
            part += f"\n{len(group) - SHOWN} more: [{where}]({where}#all-records)\n"
        parts.append(part)
        track, by_steps = group[0]["track"], group[0]["machine"] == "by steps"
        if by_steps or sum(row["track"] == track for row in table) > plots.MANY:
            parts.append(_image(f"What each record of {_escaped(track)} gained", f"{slug(track)}_ideas"))
            continue
        for hardware, _ in by_hardware(group):
            caption = f"Loss against time, steps and tokens: {_escaped(track)} on {_escaped(hardware)}"
            parts.append(_image(caption, f"{slug(track)}_{slug(hardware)}"))
    return "\n".join(dict.fromkeys(parts)) or NONE_YET


def _image(caption: str, stem: str) -> str:
    return f"![{caption}](leaderboard/plots/{stem}.png)\n"


def all_records(table: Sequence[Row]) -> str:
    """The whole tables, for docs/leaderboard.md."""
    return markdown(table, "../leaderboard/", LEFT_OUT) or NONE_YET


# What stands between <!-- name --> and <!-- /name --> of a document
SECTIONS = {"leaderboard": (README, readme_section), "records": (ALL_RECORDS, all_records)}


def with_leaderboard(table: Sequence[Row]) -> dict[Path, str]:
    """The documents, by path, with their records as `table` says."""
    return {path: with_section(path.read_text(encoding="utf-8"), name, section(table))
            for name, (path, section) in SECTIONS.items()}  # fmt: skip
