"""What one record changed against another: settings, and source files with the lines that differ, from their logs."""

import dataclasses
import difflib
import json
from typing import NamedTuple

from leaderboard.records import Record, shared_config
from leaderboard.runs import Run

MAX_LINES = 400  # of a diff that is shown
WORDS = ("name", "author", "description")  # settings that change no run
UNSET = "unset"
EARLIER = {"fused": ["none"]}  # what a source did that has not the setting, where that is not today's default


class FileChange(NamedTuple):
    path: str
    added: int  # lines
    removed: int
    diff: str  # unified


class Changes(NamedTuple):
    settings: dict[str, tuple[str, str]]  # name -> old and new value, as JSON
    files: list[FileChange]

    def diff(self, max_lines: int = MAX_LINES) -> str:
        """Of all files; empty if it is longer."""
        lines = [line for file in self.files for line in file.diff.splitlines()]
        return "\n".join(lines) if len(lines) <= max_lines else ""


def changes(old: Record, new: Record) -> Changes:
    """By the first run of each. A foreign log tells no settings."""
    before, after = old.runs[0], new.runs[0]
    settings = dict[str, tuple[str, str]]()
    if before.config and after.config:
        one, other = _settings(before), _settings(after)
        values = {key: (one.get(key, UNSET), other.get(key, UNSET)) for key in {**one, **other}}
        settings = {key: (value, now) for key, (value, now) in values.items() if value != now}
    sources = before.log.sources, after.log.sources
    paths = sorted(path for path in {**sources[0], **sources[1]} if sources[0].get(path) != sources[1].get(path))
    return Changes(settings, [_file(path, *(each.get(path, "") for each in sources)) for path in paths])


def _settings(run: Run) -> dict[str, str]:
    """As JSON. What an older source does not have yet is as it is by default."""
    from train_gpt import Config  # brings torch along, which reading a log does without

    defaults = {key: value for key, value in dataclasses.asdict(Config()).items() if value is not None} | EARLIER
    shared = {key: value for key, value in (defaults | shared_config(run)).items() if key not in ("seed", "run_dir")}
    return {key: json.dumps(value, ensure_ascii=False) for key, value in shared.items() if key not in WORDS}


def _file(path: str, old: str, new: str) -> FileChange:
    names = (f"a/{path}" if old else "/dev/null"), (f"b/{path}" if new else "/dev/null")
    lines = list(difflib.unified_diff(old.splitlines(), new.splitlines(), *names, lineterm=""))
    added, removed = (sum(line.startswith(sign) for line in lines[2:]) for sign in "+-")
    return FileChange(path, added, removed, "\n".join(lines))


def as_text(old: Record, new: Record, max_lines: int = MAX_LINES) -> str:
    """For the terminal."""
    found = changes(old, new)
    lines = [f"From {old.name} to {new.name}", "", "Settings:" if found.settings else "Settings: the same"]
    lines += [f"  {key}: {before} -> {after}" for key, (before, after) in found.settings.items()]
    lines += ["Source files:" if found.files else "Source files: the same"]
    lines += [f"  {file.path}: +{file.added} -{file.removed}" for file in found.files]
    if diff := found.diff(max_lines):
        lines += ["", diff]
    elif found.files:
        lines += ["", f"The diff has more than {max_lines} lines; --max_lines=100000 prints it."]
    return "\n".join(lines) + "\n"
