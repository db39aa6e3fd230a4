"""Settings: a flat dataclass filled from a TOML file and the command line, with errors of one line.

    config = parse_settings(Config, ["configs/sotu_cpu.toml", "--matrix_lr=0.03"])

A field's type says what its values are: int (1e3 is one), float, bool, str, Literal["a", "b"], a tuple of those, or a
tuple of tuples, which grows each time the setting is given. Annotated adds bounds, such as ">= 0", or the Option of
optim/options.py that declares the setting. The comment on a field's line is its text in --help, a comment line of its
own a heading there.
"""

import contextlib
import dataclasses
import difflib
import inspect
import itertools
import json
import re
import shutil
import textwrap
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from data.files import is_file
from optim.options import Option, broken_bound

Settings = TypeVar("Settings")
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
NOW_FUSED = "write fused = 'auto', 'none' or some of 'norm,mlp,head,blocks' instead"
FORMER = {  # settings of older recipes, and what to do about them
    **dict.fromkeys(("attention", "fused_norm", "fused_mlp", "fused_head"), NOW_FUSED),
    **dict.fromkeys(("joint_matrices", "unet_skips"), "it has never paid and is gone (docs/options.md); leave it out"),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the values of a setting have to be."""

    kind: type  # int, float, bool or str, of each value
    bounds: tuple[str, ...]
    choices: tuple[str, ...]
    count: float  # values: 1, another number, or infinity
    is_tuple: bool
    is_appended: bool  # a tuple for each time that it is given
    is_optional: bool  # None is a value, too
    help: str = ""


def parse_settings(
    kind: type[Settings], argv: Sequence[str], description: str | None = None, default: Settings | None = None,
    leading: str = "",
) -> Settings:  # fmt: skip
    """The defaults (`default`, or else those of dataclass `kind`), then the TOML file that is named on the command
    line, then the settings on it: --key=value, --key value, --switch.

    leading: a setting whose name may be left out, usually first on the command line.
    Raises ValueError naming the source, the key and what would work; SystemExit(0) after --help.
    """
    settings, rules = default or kind(), rules_of(kind)
    if {"--help", "-h"} & set(argv):
        print(describe(settings, description or ""))
        raise SystemExit(0)
    if leading and argv and not argv[0].startswith("-"):
        argv = [f"--{leading}", *argv]
    files, values = _split(rules, argv)
    if leading and files and leading not in values:
        values[leading] = _as_toml(files.pop(0), rules[leading].kind)
    if leading and (extra := [word for word in files if not word.endswith(".toml")]):
        raise ValueError(f"command line: {extra[0]!r} is a word too many; all but the {leading} is written --key=value")
    if len(files) > 1:
        raise ValueError(
            f"command line: {files[0]} and {files[1]} are both taken for config files; settings are --key=value"
        )
    if files:
        settings = _replaced(settings, rules, _read_file(files[0]), files[0])
    return _replaced(settings, rules, values, "command line")


def peek(argv: Sequence[str], key: str) -> str:
    """The text of one setting on a command line, or else in the config file on it, before it is known which settings
    there are; empty if it is given in neither."""
    for word, follower in reversed(list(itertools.pairwise([*argv, ""]))):
        name, has_value, value = word.partition("=")
        if name.replace("-", "_") == f"__{key}":
            return value if has_value else follower
    files = [word for word in argv if not word.startswith("-") and is_file(word)]
    return next((str(values[key]) for values in map(_read_file, files) if key in values), "")


def rules_of(kind: type) -> dict[str, Rule]:
    """The rule of each field of a dataclass, by its type."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: _rule(hints[field.name]) for field in dataclasses.fields(kind)}


def _rule(hint: Any) -> Rule:
    extra: tuple[Any, ...] = ()
    if get_origin(hint) is Annotated:
        hint, *extra = get_args(hint)  # type: ignore[assignment]
    is_optional = type(None) in get_args(hint)
    if is_optional:
        (hint,) = set(get_args(hint)) - {type(None)}
    is_tuple, count = get_origin(hint) is tuple, 1.0
    is_appended = is_tuple and get_origin(get_args(hint)[0]) is tuple
    while get_origin(hint) is tuple:
        hint, *others = get_args(hint)
        count = float("inf") if Ellipsis in others else 1 + len(others)
    choices = get_args(hint) if get_origin(hint) is Literal else ()
    bounds, text = [each for each in extra if isinstance(each, str)], ""
    for option in (each for each in extra if isinstance(each, Option)):
        bounds, choices, text = [*bounds, *option.bounds], option.choices, option.help
    return Rule(str if choices else hint, tuple(bounds), choices, count, is_tuple, is_appended, is_optional, text)


def _split(rules: dict[str, Rule], argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """(words that belong to no setting, value of each setting) of a command line, values as TOML would have them."""
    files: list[str] = []
    values: dict[str, Any] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("-"):
            files.append(word)
            continue
        name, has_value, text = word.partition("=")
        if not name.startswith("--"):
            raise ValueError(f"command line: {word} is not a setting; settings are written --key=value")
        key = _known(rules, name[2:].replace("-", "_"), "command line")
        rule, texts = rules[key], [text]
        if not has_value:
            is_switch = rule.kind is bool and not (words and words[0].lower() in ("true", "false"))
            texts = ["true"] if is_switch else []
            while words and len(texts) < rule.count and not words[0].startswith("--"):
                if texts and rule.choices and words[0] not in rule.choices and is_file(words[0]):
                    break  # the config file
                texts.append(words.pop(0))
            if not texts:
                raise ValueError(f"command line: --{key} has no value; write --{key}=VALUE")
        if rule.is_tuple and not rule.is_appended and (has_value or rule.choices or rule.kind is not str):
            texts = [each for text in texts for each in text.split(",") if each]
        typed = [_as_toml(each, rule.kind) for each in texts]
        if rule.is_appended:
            values.setdefault(key, []).append(typed)
        else:
            values[key] = typed if rule.is_tuple else typed[0]
    return files, values


def _as_toml(text: str, kind: type) -> Any:
    """The value that text stands for where values of `kind` are asked for; text where it stands for none."""
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for number in (int, float) if kind in (int, float) else ():
        with contextlib.suppress(ValueError):
            return number(text)
    return text


def _read_file(path: str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"config {path} is not UTF-8 ({error}); save it as that") from None
    except OSError as error:
        works = f"--{path}" if "=" in path else f"configs/{Path(path).stem or 'sotu_cpu'}.toml"
        works = works if "=" in path or Path(works).exists() else "configs/sotu_cpu.toml"
        command = "" if "." in path or "=" in path else ", or ./run.sh --help if a command was meant"
        raise ValueError(f"config {path} cannot be read ({error.strerror}); try {works}{command}") from None
    except ValueError as error:  # TOMLDecodeError, or a number too long
        raise ValueError(f"config {path} is not valid TOML ({error}); write one `key = value` per line") from None


def _known(rules: dict[str, Rule], key: str, source: str) -> str:
    """`key` itself. Raises ValueError for the name of no setting, with what to write instead."""
    if key in rules:
        return key
    near = difflib.get_close_matches(key, rules, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else "--help lists them all"
    raise ValueError(f"{source}: {key} is not a setting; {FORMER.get(key, hint)}")


def _replaced(settings: Settings, rules: dict[str, Rule], values: dict[str, Any], source: str) -> Settings:
    """The settings with these values in place of theirs."""
    taken = {}
    for name, value in values.items():
        key = _known(rules, name, source)
        is_alone = rules[key].is_tuple and not isinstance(value, list)
        taken[key] = _typed([value] if is_alone else value, rules[key])
        if broken := _broken_rule(taken[key], rules[key]):
            raise ValueError(f"{source}: {_refusal(key, value, broken, getattr(settings, key), source)}")
    return dataclasses.replace(settings, **taken)  # type: ignore[type-var]


def check_settings(settings: Any) -> None:
    """ValueError for the first field that breaks its rule; for a dataclass's __post_init__."""
    for key, rule in rules_of(type(settings)).items():
        if broken := _broken_rule(getattr(settings, key), rule):
            raise ValueError(_refusal(key, getattr(settings, key), broken, getattr(type(settings), key)))


def _refusal(key: str, value: Any, rule: str, works: Any, source: str = "command line") -> str:
    is_typed = source == "command line"
    given = _shown(value) if is_typed and isinstance(value, list) else value
    example = _shown(works) if is_typed else json.dumps(works)
    instead = "; leaving it out works" if works is None else "" if works in ("", (), value) else f"; {example} works"
    return f"{key} = {given!r} must be {rule}{instead}"


def _shown(value: Any) -> str:
    """A value as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _typed(value: Any, rule: Rule) -> Any:
    """A TOML value, or list of them, as the type asked for; as it is where it is of another."""
    if isinstance(value, list):
        return tuple(_typed(each, rule) for each in value)
    if rule.kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return float(value) if rule.kind is float and type(value) is int and abs(value) < 1e300 else value


def _broken_rule(value: Any, rule: Rule) -> str:
    """What a value has to be and is not; empty if all is well."""
    if value is None and rule.is_optional:
        return ""
    values = value if isinstance(value, tuple) and rule.is_tuple else (value,)
    if isinstance(value, tuple) and rule.is_appended:
        values = tuple(each for group in value for each in group)
    elif rule.is_tuple and len(values) != rule.count < float("inf"):
        return f"{rule.count:g} values"
    for each in values:
        if type(each) is not rule.kind and (rule.kind, type(each)) != (float, int):
            return KINDS[rule.kind]
        if rule.choices and each not in rule.choices:
            return f"one of {', '.join(rule.choices)}"
        if isinstance(each, int | float) and (broken := broken_bound(each, rule.bounds)):
            return broken
    return ""


def describe(settings: Any, description: str) -> str:
    """All settings with type, value, rule and meaning, under the headings of their source."""
    width, kind = min(120, shutil.get_terminal_size((120, 24)).columns), type(settings)
    rules, lines = rules_of(kind), [description.strip()]
    texts: dict[str, str] = {}

    def show(key: str, text: str) -> None:
        rule, value, texts[key] = rules[key], getattr(settings, key), text
        value = "" if value is None else _shown(value)
        facts = [
            *([", ".join(rule.choices)] if rule.choices else rule.bounds),
            "" if value == "" else f"default {value}",
        ]
        told = f"{text} ({'; '.join(filter(None, facts))})".removesuffix(" ()")
        name = f"  --{key}={rule.kind.__name__}"
        lines.extend(textwrap.wrap(told, width, initial_indent=f"{name:33} ", subsequent_indent=" " * 34))

    heading: list[str] = []  # of the next field, if it has one
    for base in kind.__mro__:
        with contextlib.suppress(OSError, TypeError):  # a class without source: made by a function, or built in
            for line in inspect.getsource(base).splitlines():
                field = re.match(r"    (\w+): .*?  # (.*)", line)
                if comment := re.fullmatch(r"    # ([A-Z].*)", line):
                    heading = ["", comment[1]]
                elif field and field[1] in rules and field[1] not in texts:
                    lines += heading
                    heading = []
                    show(field[1], field[2])
    declared = [key for key in rules if key not in texts]  # by an Option
    lines += ["", "Options of single update rules"] if declared else []
    for key in declared:
        show(key, rules[key].help)
    return "\n".join(lines)
