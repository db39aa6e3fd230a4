"""Tracks: tracks.toml, read."""

import hashlib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

TRACKS = Path(__file__).with_name("tracks.toml")
SIGNIFICANCE = 0.01  # a record's one-sided p that its mean loss is below the target has to be less


@dataclass(frozen=True)
class Track:
    name: str
    target_loss: float  # nats per token
    val_tokens: int
    tokenizer: str
    val_fingerprint: str  # of the first val_tokens validation tokens; empty: not known yet
    train_fingerprint: str  # of all training shards; empty: any
    sigma: float = 0.0  # known standard deviation of a run's final loss; 0: not known
    step_threshold: float = 0.0  # nats; 0: the track has no rule for steps
    nats_per_100_steps: float = 0.0


def load_tracks() -> tuple[dict[str, Track], dict[str, list[str]]]:
    """The tracks by name, and the accepted sha256 of each file that feeds the token stream."""
    return _load(TRACKS)


@cache
def _load(path: Path) -> tuple[dict[str, Track], dict[str, list[str]]]:
    tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    stream = tables.pop("stream")
    return {name: Track(name, **table) for name, table in tables.items()}, stream


def find_track(name: str) -> Track:
    """Raises ValueError for a track that is not in tracks.toml."""
    tracks, _ = load_tracks()
    if name not in tracks:
        raise ValueError(f"track {name!r} is not one of {', '.join(tracks)}; add it to leaderboard/tracks.toml")
    return tracks[name]


def source_hash(source: str) -> str:
    """sha256 of a source text, its last newline left aside."""
    return hashlib.sha256(source.rstrip("\n").encode()).hexdigest()
