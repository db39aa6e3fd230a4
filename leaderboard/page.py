"""One HTML page of all verified records: tables to sort and filter, figures, each run's log. No network, no library.

Pages are filled into page_template.html, where styles and script stand.
"""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from harness.log_format import RULER
from harness.tables import Row
from leaderboard import plots
from leaderboard.rank import by_hardware, cells, classes, columns_of, rows
from leaderboard.records import Record
from leaderboard.tracks import find_track

PAGE = Path(__file__).with_name("page_template.html")
AS_NUMBERS = {"rank", "steps", "tokens", "n", "p"}


def render(records: Sequence[Record], duels: Sequence[dict[str, Any]] = ()) -> str:
    """The whole document."""
    table = rows(records, duels)
    by_name = {record.name: record for record in records}
    sections = []
    for heading, group in classes(table):
        columns = columns_of(group)
        of_class = [by_name[f"{row['track']}/{row['name']}"] for row in group]
        lines = [
            "<tr>" + "".join(_cell(key, cells(row)[key], row, record) for key in columns) + "</tr>"
            for row, record in zip(group, of_class, strict=True)
        ]
        headings = "".join(f'<th><button type="button">{escape(name)}</button></th>' for name in columns.values())
        target, figures = find_track(group[0]["track"]).target_loss, list[Figure]()
        for _, of_figure in by_hardware(group):
            shown = [by_name[f"{row['track']}/{row['name']}"] for row in of_figure]
            figures += plots.curves(shown, target), plots.history(shown)
        sections.append(
            f'<section><h2>{escape(heading)}</h2><div class="wide"><table><thead><tr>{headings}</tr></thead>'
            f'<tbody>{"".join(lines)}</tbody></table></div><p class="none" hidden>No record matches.</p>'
            + "".join(f"<figure>{plots.svg(figure)}</figure>" for figure in figures)
            + "".join(_logs(record) for record in of_class)
            + "</section>"
        )
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        sections="\n".join(sections) or "<p>No record yet.</p>"
    )


def _cell(key: str, text: str, row: Row, record: Record) -> str:
    """A cell; `data-value` is what it is sorted by where that is not its text."""
    time_s, values = row["time_s"], {key: row[key] for key in AS_NUMBERS}
    values |= dict(time_s=time_s["mean"], interval=time_s["low"], median_s=time_s["median"])
    values["val_loss"] = row["val_loss"]["mean"]
    values |= {key: row[key].estimate for key in ("relative", "ahead") if row[key]}
    value = f" data-value='{escape(json.dumps(values[key]))}'" if key in values else ""
    shown = f'<a href="#logs-{record.name}">{escape(text)}</a>' if key == "name" else escape(text)
    return f"<td{value}>{shown}</td>"


def _logs(record: Record) -> str:
    """A record's step lines, seed by seed, folded away; its sources stay in the archive."""
    runs = ""
    for run in record.runs:
        printed = run.texts["log.txt"].rpartition(RULER)[2].strip()  # what follows its sources
        runs += f"<details><summary>{escape(run.name)}</summary><pre>{escape(printed)}</pre></details>"
    where = f"leaderboard/records/{record.name}"
    return (
        f'<details class="logs" id="logs-{record.name}"><summary>Logs of {escape(record.path.name)}</summary>'
        f"<p>Whole, with every source file: <code>{escape(where)}/runs.tar.xz</code></p>{runs}</details>"
    )
