"""One HTML page of all verified records: tables to sort and filter, figures, duels, each record's changes and logs. No
network, no library.

Pages are filled into page_template.html, where styles and script stand. Every track and record has an anchor, its name.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from harness.log_format import RULER
from harness.tables import Row
from leaderboard import plots, rank
from leaderboard.changes import changes
from leaderboard.duel import Ratio
from leaderboard.records import Record
from leaderboard.tracks import Track, find_track

PAGE = Path(__file__).with_name("page_template.html")
AS_NUMBERS = {"rank", "steps", "tokens", "n", "p"}


def render(records: Sequence[Record], duels: Sequence[dict[str, Any]] = ()) -> str:
    """The whole document."""
    table, by_name = rank.rows(records, duels), {record.name: record for record in records}
    before = {name: by_name[other] for name, other in rank.predecessors(table).items()}
    leads, sections = dict[str, str](), []
    for name, group in groupby(table, key=lambda row: row["track"]):
        rows = list(group)
        leads[name] = lead(rows, find_track(name))
        sections.append(
            f'<section id="{escape(name)}"><h2>{escape(name)}</h2><p class="lead">{escape(leads[name])}</p>'
            + _figure(plots.ideas(rows), "By idea: each record and how much less it takes than the one above it.")
            + "".join(_board(heading, of_class, by_name) for heading, of_class in rank.classes(rows))
            + _figures(rows, by_name)
            + _duels([duel for duel in duels if duel["track"] == name])
            + "<h3>What each record changed, and its logs</h3>"
            + "".join(_record(by_name[f"{name}/{row['name']}"], before) for row in rows)
            + "</section>"
        )
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        summary=escape(next(iter(leads.values()), "No record yet.")),
        tracks="".join(f'<li><a href="#{escape(name)}">{escape(name)}</a></li>' for name in leads),
        sections="\n".join(sections) or "<p>No record yet.</p>",
    )


def lead(rows: Sequence[Row], track: Track) -> str:
    """What the track asks for, its record and how much that gained on the first of the same table, in words."""
    by_steps, unit, best = track.ranked_by == "steps", "byte" if track.tokenizer == "byte" else "token", rows[0]

    def takes(row: Row) -> float:
        return row["steps"] if by_steps else row["relative"].estimate if row["relative"] else row["time_s"]["mean"]

    least = "fewest steps" if by_steps else "least training time"
    taken = f"{best['steps']:,} steps" if by_steps else f"{best['time_s']['mean']:.3g} s on {best['hardware']}"
    said = f"The goal is a validation loss below {track.target_loss:g} nats per {unit} in the {least}. "
    said += f"The record is {best['name']} by {best['author']}: {taken}"
    of_class = [row for row in rows if row["machine"] == best["machine"]]
    first = min(of_class, key=lambda row: (row["date"], -takes(row)))
    if first is not best:
        factor, how = takes(first) / takes(best), "by duels" if best["relative"] else "as measured"
        faster = f", {factor:.3g} times as fast as {first['name']}, the slowest of the first day ({how})"
        said += f"; {first['name']}, the slowest of the first day, took {first['steps']:,}" if by_steps else faster
    return f"{track.about} {said}.".strip()


def _figure(figure: Figure, caption: str) -> str:
    kind = "wide" if figure.get_figwidth() > 8 else "narrow"
    return f"<figure class={kind}>{plots.svg(figure)}<figcaption>{escape(caption)}</figcaption></figure>"


def _figures(rows: Sequence[Row], by_name: Mapping[str, Record]) -> str:
    """The history and the curves of those that ran on one hardware."""
    track, figures = find_track(rows[0]["track"]), ""
    for hardware, group in rank.by_hardware(rows):
        shown = [by_name[f"{track.name}/{row['name']}"] for row in group]
        if len({record.summary["date"] for record in shown}) > 1:
            figures += _figure(plots.history(shown, track.ranked_by == "steps"), f"By date, on {hardware}.")
        figures += _figure(plots.curves(shown, track.target_loss), f"Mean loss of the seeds, on {hardware}.")
    return figures


def _board(heading: str, group: Sequence[Row], by_name: Mapping[str, Record]) -> str:
    """A table of records to sort and filter."""
    columns = rank.columns_of(group)
    headings = "".join(f'<th><button type="button">{escape(name)}</button></th>' for name in columns.values())
    lines = ""
    for row in group:
        record = by_name[f"{row['track']}/{row['name']}"]
        lines += f"<tr>{''.join(_cell(key, rank.cells(row)[key], row, record) for key in columns)}</tr>"
    return (
        f'<div class="board"><h3>{escape(heading)}</h3><div class="wide"><table><thead><tr>{headings}</tr></thead>'
        f'<tbody>{lines}</tbody></table></div><p class="none" hidden>No record matches.</p></div>'
    )


def _cell(key: str, text: str, row: Row, record: Record) -> str:
    """A cell; `data-value` is what it is sorted by where that is not its text."""
    time_s, values = row["time_s"], {key: row[key] for key in AS_NUMBERS}
    values |= dict(time_s=time_s["mean"], interval=time_s["low"], median_s=time_s["median"])
    values["val_loss"] = row["val_loss"]["mean"]
    values |= {key: row[key].estimate for key in ("relative", "gain") if row[key]}
    value = f" data-value='{escape(json.dumps(values[key]))}'" if key in values else ""
    return f"<td{value}>{_link(record.name, text) if key == 'name' else escape(text)}</td>"


def _link(record: str, text: str) -> str:
    return f'<a href="#{escape(record)}">{escape(text)}</a>'


def _duels(duels: Sequence[dict[str, Any]]) -> str:
    """The table of a track's duels, in their order."""
    lines = []
    for duel in sorted(duels, key=lambda duel: duel["start_utc"]):
        result, names = duel["results"][duel["decides"]], (duel["a"]["name"], duel["b"]["name"])
        ratio = rank.ratio_in_words(Ratio(result["estimate"], result["low"], result["high"]))
        sides = [_link(f"{duel['track']}/{name}", name) for name in names]
        lines.append([*sides, ratio, escape(duel["hardware"]), escape(duel["start_utc"][:10])])
    if not lines:
        return ""
    return "<h3>Duels</h3>" + _table(("A", "B", "time of A over that of B (95% CI)", "on", "date"), lines)


def _table(headings: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """Cells are HTML."""
    rows = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _record(record: Record, before: Mapping[str, Record]) -> str:
    """What it changed against the one before, and its step lines seed by seed, all folded away."""
    about, logs = record.summary, ""
    for run in record.runs:
        printed = run.texts["log.txt"].rpartition(RULER)[2].strip()  # what follows its sources
        logs += f"<details><summary>Log of {escape(run.name)}</summary><pre>{escape(printed)}</pre></details>"
    archive = f"leaderboard/records/{record.name}/runs.tar.xz"
    return (
        f'<details class="record" id="{escape(record.name)}"><summary><strong>{escape(record.path.name)}</strong> '
        f"{escape(about['description'])}</summary>"
        f"<p>{escape(about['author'])}, {escape(about['date'])}, {escape(record.hardware)}</p>"
        + (_changes(before[record.name], record) if record.name in before else "")
        + f"{logs}<p>Whole, with every source file: <code>{escape(archive)}</code></p></details>"
    )


def _changes(old: Record, new: Record) -> str:
    found = changes(old, new)
    parts = [f"<h4>Against {_link(old.name, old.path.name)}</h4>"]
    if found.settings:
        lines = [[escape(word) for word in (key, *values)] for key, values in found.settings.items()]
        parts.append(_table(("setting", "before", "now"), lines))
    if found.files:
        files = [[escape(file.path), f"+{file.added}", f"-{file.removed}"] for file in found.files]
        parts.append(_table(("source file", "lines added", "removed"), files))
    if diff := found.diff():
        lines_of_diff = "\n".join(map(_diff_line, diff.splitlines()))
        parts.append(f"<details><summary>Diff of the sources</summary><pre>{lines_of_diff}</pre></details>")
    if not found.settings and not found.files:
        parts.append("<p>The same settings and sources.</p>")
    return "".join(parts)


def _diff_line(line: str) -> str:
    tag = {"+": "ins", "-": "del"}.get(line[:1])
    return f"<{tag}>{escape(line)}</{tag}>" if tag else escape(line)
