"""What an experiment will take, said before it starts."""

import contextlib
import sys


def duration(seconds: float) -> str:
    """Two digits' worth of a time: 45 s, 12 min, 3.4 h, 2.1 days."""
    for least, unit_s, text in ((129_600, 86_400, "{:.1f} days"), (5_400, 3_600, "{:.1f} h"), (100, 60, "{:.0f} min")):
        if seconds >= least:
            return text.format(seconds / unit_s)
    return f"{seconds:.0f} s"


def confirm(lines: list[str], yes: bool) -> None:
    """Print the plan and its cost on stderr; ask whether to start unless `yes`.

    Raises KeyboardInterrupt for a no, ValueError where there is nobody to ask.
    """
    print("\n".join(lines), file=sys.stderr)
    if yes:
        return
    if not sys.stdin.isatty():
        raise ValueError("nothing was started: there is no terminal to confirm this in; add --yes to go ahead")
    print("Start? [y/N] ", end="", file=sys.stderr, flush=True)
    answer = ""
    with contextlib.suppress(EOFError, OSError, UnicodeError):  # Ctrl-D; the terminal went away; no word at all
        answer = input().strip().lower()
    if answer not in ("y", "yes"):
        raise KeyboardInterrupt
