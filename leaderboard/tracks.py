"""Tracks: tracks.toml, read."""

import ast
import hashlib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

TRACKS = Path(__file__).with_name("tracks.toml")
SIGNIFICANCE = 0.01  # a record's one-sided p that its mean loss is below the target has to be less


@dataclass(frozen=True)
class Track:
    name: str
    declared_from: str  # day; runs from then on declare how many they are (num_seeds), and their seeds are given
    first_seed: int  # the others follow it
    stream: dict[str, list[str]]  # what feeds the token stream: place of the source -> accepted sha256
    target_loss: float  # nats per token
    val_tokens: int
    tokenizer: str
    val_fingerprint: str  # of the first val_tokens validation tokens; empty: not known yet
    train_fingerprint: str  # of all training shards; empty: any
    about: str = ""  # the data and what is free, a sentence or two for the page
    val_source: str = ""  # the published file that begins with them, owner/data set/name on the Hugging Face Hub
    data_start: str = "first"  # of declared runs
    shard_tail: str = "keep"
    dtype: str = ""  # of matrix products; empty: any
    sigma: float = 0.0  # known standard deviation of a run's final loss; 0: not known
    step_threshold: float = 0.0  # nats; 0: the track has no rule for steps
    nats_per_100_steps: float = 0.0
    ranked_by: Literal["time", "steps"] = "time"
    val_bytes: int = 0  # of text that its validation tokens stand for; 0: not entered
    # Of tracks by steps; without `fixed` there is none of these
    fixed: dict[str, Any] = field(default_factory=dict)  # setting -> the value that all runs have
    num_params: int = 0  # of the model, as each run counts them
    free: tuple[str, ...] = ()  # settings of the model that may differ; others that are not fixed are as by default
    step: dict[str, list[str]] = field(default_factory=dict)  # what a step computes: as `stream`


def load_tracks() -> dict[str, Track]:
    """The tracks by name."""
    return _load(TRACKS)


@cache
def _load(path: Path) -> dict[str, Track]:
    tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    of_all = {**tables.pop("entries"), "stream": tables.pop("stream")}
    of_steps = {"step": tables.pop("step")}
    return {
        name: Track(name, **(of_all | (of_steps if "fixed" in table else {}) | table)) for name, table in tables.items()
    }


def find_track(name: str) -> Track:
    """Raises ValueError for a track that is not in tracks.toml."""
    tracks = load_tracks()
    if name not in tracks:
        raise ValueError(f"track {name!r} is not one of {', '.join(tracks)}; add it to leaderboard/tracks.toml")
    return tracks[name]


def source_hash(source: str) -> str:
    """sha256 of a source text, its last newline left aside."""
    return hashlib.sha256(source.rstrip("\n").encode()).hexdigest()


def hash_at(sources: Mapping[str, str], place: str) -> str | None:
    """`source_hash` of a file, or of a function or class in it (`train_gpt.py: train_step`, `train_gpt.py: Run.batch`)
    with its decorators. None without the file, or where the name is not bound exactly once."""
    path, _, name = place.partition(": ")
    if path not in sources:
        return None
    return _function_hash(sources[path], name) if name else source_hash(sources[path])


def imported(path: str, sources: Mapping[str, str]) -> bool:
    """Whether one of the sources imports the module at `path` by its name."""
    package, _, name = path.removesuffix(".py").replace("/", ".").rpartition(".")
    form = rf"^\s*(from|import)\s+{re.escape(f'{package}.{name}' if package else name)}\b"
    if package:
        form += rf"|^\s*from\s+{re.escape(package)}\s+import\b.*\b{name}\b"
    return any(re.search(form, source, re.MULTILINE) for source in sources.values())


def patches(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Path -> what that file assigns in what it imports from the others, such as model.GPT.forward: a function that is
    not the one at its place then runs. Only what is written out as an assignment or a setattr can be seen."""
    own = frozenset(path.removesuffix(".py").partition("/")[0] for path in sources)
    return {path: found for path, source in sources.items() if (found := _patches(source, own))}


@cache
def _patches(source: str, own: frozenset[str]) -> list[str]:
    """own: names that modules and packages of this repository begin with."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    imported = {"sys.modules"}
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {name.asname or name.name.partition(".")[0] for name in node.names
                         if name.name.partition(".")[0] in own}  # fmt: skip
        elif isinstance(node, ast.ImportFrom) and (node.level or str(node.module).partition(".")[0] in own):
            imported |= {name.asname or name.name for name in node.names}
    found = []
    for node in nodes:
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            owner: ast.AST = node.value
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setattr" and node.args:
            owner = node.args[0]
        else:
            continue
        while isinstance(owner, ast.Attribute | ast.Subscript) and ast.unparse(owner) != "sys.modules":
            owner = owner.value
        if ast.unparse(owner) in imported:
            found.append(ast.unparse(node)[:100])
    return found


@cache  # all seeds of a record, and most records, have the same source
def _function_hash(source: str, name: str) -> str | None:
    try:
        node: ast.AST = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    for part in name.split("."):
        bound = [each for each in ast.walk(node) if part in (getattr(each, "name", None), _assigned(each))]
        if len(bound) != 1:
            return None
        node = bound[0]
    if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        return None
    return source_hash("\n".join(str(ast.get_source_segment(source, each)) for each in (*node.decorator_list, node)))


def _assigned(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else None
