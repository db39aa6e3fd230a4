"""Settings: a flat dataclass filled from a TOML file and then from --key=value, with errors of one line.

tyro does the typing and --help (each field's inline comment is its text). Here its framed errors become one line,
unknown keys get a suggestion, and what a shell user types (`--flag`, `--flag=true`, `--key value`) is accepted.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import tomllib
from pathlib import Path
from typing import TypeVar

import tyro

Settings = TypeVar("Settings")


def parse_settings(
    kind: type[Settings], argv: list[str], description: str | None = None, default: Settings | None = None
) -> Settings:
    """The defaults (`default`, or else those of dataclass `kind`), then the TOML file named first (if one is), then the
    command line.

    Raises ValueError naming the source, the key and what would work; SystemExit(0) after --help.
    """
    settings, arguments = default or kind(), list(argv)
    if arguments and not arguments[0].startswith("-"):
        path = Path(arguments.pop(0))
        settings = _parse(kind, _toml_arguments(path), settings, str(path), description)
    return _parse(kind, arguments, settings, "command line", description)


def _toml_arguments(path: Path) -> list[str]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} cannot be read ({error}); try configs/sotu_cpu.toml") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config {path} is not valid TOML ({error}); write one `key = value` a line") from None
    arguments = []
    for key, value in values.items():
        arguments += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def _parse(
    kind: type[Settings], arguments: list[str], default: Settings, source: str, description: str | None
) -> Settings:
    frame = io.StringIO()
    try:
        with contextlib.redirect_stderr(frame):
            return tyro.cli(
                kind, args=_tidy(kind, arguments, source), default=default, description=description,
                use_underscores=True, config=(tyro.conf.FlagConversionOff,),
            )  # fmt: skip
    except SystemExit as stop:
        if not stop.code:
            raise
    lines = [line.strip("│ ") for line in frame.getvalue().splitlines()[1:]]
    end_of_reason = next(i for i, line in enumerate(lines) if line.startswith(("─", "╰")))
    reason = " ".join(lines[:end_of_reason])
    raise ValueError(f"{source}: {reason[:1].lower()}{reason[1:]}")


def _tidy(kind: type, arguments: list[str], source: str) -> list[str]:
    """Arguments in the one form tyro takes, `--key value` with True and False; refuses unknown keys."""
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    tidy: list[str] = []
    for argument, follower in itertools.zip_longest(arguments, arguments[1:], fillvalue="--"):
        if not argument.startswith("--"):
            tidy.append(argument.capitalize() if argument in ("true", "false") else argument)
            continue
        key, equals, value = argument[2:].partition("=")
        if key not in types and key != "help":
            near = difflib.get_close_matches(key, types, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "--help lists them all"
            raise ValueError(f"{source}: {key} is not a setting; {hint}")
        tidy.append(f"--{key}")
        if equals:
            tidy.append(value.capitalize() if value in ("true", "false") else value)
        elif types.get(key) is bool and follower.startswith("--"):
            tidy.append("True")
    return tidy
