"""Tables as text: aligned for a terminal, Markdown for a page, and a page's generated sections. No torch in here."""

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]


def align(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as a table, each column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def cell(value: Any) -> str:
    """Three digits of a float, whole numbers from 100 on; anything else as it is."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def table(rows: Sequence[Row], as_markdown: bool = False) -> str:
    """Rows with the same keys, which are the headings: aligned, or as Markdown."""
    if as_markdown:
        return markdown(rows, {key: key for key in rows[0]})
    return align([list(rows[0]), *([cell(value) for value in row.values()] for row in rows)])


def markdown(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """A Markdown table of the columns {key in a row: heading}; absent values are a dash."""
    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[cell(row[key]) if row.get(key, "") != "" else "-" for key in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def mean_and_sd(values: Iterable[float | None], digits: int) -> str:
    """Mean ± sample standard deviation of the values that are known; a dash for none, no ± for one."""
    known = [value for value in values if value is not None]
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{digits}f}{spread}" if known else "-"


def slug(name: str) -> str:
    """The name of a device, say, as part of a file's name."""
    return re.sub(r"(\((r|tm)\)|[^a-z0-9])+", "-", name.lower()).strip("-")


def with_section(document: str, name: str, content: str) -> str:
    """The document with `content` between the lines <!-- name --> and <!-- /name -->; ValueError without them."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if start not in document or end not in document:
        raise ValueError(f"the document has no section between {start.strip()} and {end}; add both lines")
    before, rest = document.split(start, 1)
    return before + start + content + end + rest.split(end, 1)[1]
