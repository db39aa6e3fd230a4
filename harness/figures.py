"""Figures as files. matplotlib is imported when a figure is drawn: the trainer does without it."""

from pathlib import Path
from typing import Any

from data.files import whole_file


def pyplot() -> Any:
    """matplotlib.pyplot, which needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write the figure, whole or not at all, and free it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path, "wb") as file:
        figure.savefig(file, dpi=dpi)
    pyplot().close(figure)
