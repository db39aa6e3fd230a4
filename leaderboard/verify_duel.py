"""Does a duel that was kept hold? Worked out again from its turns and from the two records; no reading can tell turns
that were invented whole, with every second of them. A duel on another machine can."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from leaderboard.duel import DECIDES, LEAST_ROUNDS, SITTINGS, Turn, duels_folder, file_name, fingerprint, order, results
from leaderboard.records import MAX_BYTES, Record
from leaderboard.runs import short
from leaderboard.verify_run import same

KEYS = {"start_utc", "hardware", "dtype", "versions", "threads", "a", "b", "decides", "results", "turns"}
TICK_S = 0.011  # CPU time may come in ticks of 10 ms
LONGER, GAP_S = 3, 0.001  # of the pauses after the turns of one side, which the turns' lengths do not touch


def find_duels() -> list[Path]:
    return sorted(duels_folder().glob("*/[!.]*.json"))


def load_duel(path: Path) -> dict[str, Any]:
    """The file as it is, and the track in whose folder it lies: names of records are a track's own. ValueError for one
    that is no JSON object with the keys of a duel."""
    if path.stat().st_size >= MAX_BYTES:
        raise ValueError(f"it has {path.stat().st_size:,} bytes; less than {MAX_BYTES:,} can be committed")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it cannot be read as JSON ({error})") from None
    if not isinstance(found, dict) or found.keys() != KEYS:
        raise ValueError(f"it has to be an object with {', '.join(sorted(KEYS))}")
    return dict(found, track=path.parent.name)


def reasons(path: Path, records: Mapping[str, Record]) -> list[str]:
    """Why the duel in this file does not hold; records: those that hold, by track/name."""
    try:
        found = load_duel(path)
        problems = [*_of_sides(found, records), *_of_turns(found)]
        return problems or list(_of_results(found, path))
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        return [f"it cannot be checked: something is not what it should be ({type(error).__name__}: {error})"]


def verify_all(records: Mapping[str, Record]) -> dict[Path, list[str]]:
    """The reasons of each duel that was kept. The later copy of one does not hold: it would count twice."""
    found, owners = dict[Path, list[str]](), dict[Path, set[tuple[float, ...]]]()
    for path in find_duels():
        found[path] = reasons(path, records)
        if not found[path]:
            turns = {tuple(turn[3:]) for turn in load_duel(path)["turns"]}
            copied = [other.name for other, theirs in owners.items() if len(turns & theirs) > len(turns) / 2]
            found[path] += [f"most of its turns are those of {other} to the last digit" for other in copied]
            owners[path] = turns
    return found


def _of_sides(found: dict[str, Any], records: Mapping[str, Record]) -> Iterator[str]:
    """Each side is a record's source and settings, with all of its steps."""
    track = found["track"]
    for key in ("a", "b"):
        said = found[key]
        record = records.get(f"{track}/{said['name']}")
        if record is None:
            yield f"{short(said['name'])} is no record of {track} that holds"
            continue
        run = record.runs[0]
        if said["fingerprint"] != fingerprint(run):
            yield f"{said['name']} duelled with another source or other settings than the record has in its log"
        if not all(
            type(kind[what]) is int and kind[what] > 0 for kind in said["kinds"] for what in ("steps", "tokens")
        ):
            yield f"{said['name']}: every kind of step has a number of steps and of tokens"
            continue
        steps = sum(kind["steps"] for kind in said["kinds"])
        taken, meant = Counter[int](), Counter[int]()
        for kind in said["kinds"]:
            taken[kind["tokens"]] += kind["steps"]
        for step in range(record.steps):
            meant[run.tokens_at(step + 1) - run.tokens_at(step)] += 1
        if {said["steps"], steps} != {record.steps}:
            yield f"{said['name']} has {record.steps} steps, and its kinds of step {steps} of {said['steps']}"
        elif taken != meant:
            right, wrong = (
                " and ".join(f"{n} x {tokens:,}" for tokens, n in sorted(each.items())) for each in (meant, taken)
            )
            yield f"{said['name']} has steps of {right} tokens, and its kinds of step {wrong}"
    if found["a"]["name"] == found["b"]["name"]:
        yield f"{short(found['a']['name'])} stands on both sides"


def _of_turns(found: dict[str, Any]) -> Iterator[str]:
    """The same number of turns for both in the order that is meant, one after the other, of times that can be."""
    kinds = {side: len(found[side]["kinds"]) for side in ("a", "b")}
    turns, rounds = found["turns"], len(found["turns"]) / sum(kinds.values()) / SITTINGS
    if rounds < LEAST_ROUNDS or rounds % 2:
        rule = f"an even number of at least {LEAST_ROUNDS} is needed"
        yield f"{len(turns)} turns are {rounds:g} rounds in each of {SITTINGS} sittings; {rule}"
        return
    if not all(len(turn) == 5 and all(type(s) is float and math.isfinite(s) for s in turn[2:]) for turn in turns):
        yield "a turn is a side, a kind, and three times in seconds"
        return
    meant = SITTINGS * [turn for index in range(int(rounds)) for turn in order(index, kinds)]
    for index, (turn, place) in enumerate(zip(turns, meant, strict=True)):
        side, kind, start, wall, cpu = turn
        if (side, kind) != place:
            yield f"turn {index} is {side}'s, kind {kind}, and {place[0]}'s, kind {place[1]}, was due"
        if not (wall > 0 and 0 <= cpu <= wall * found["threads"] + TICK_S):
            yield f"turn {index}: {cpu} s of CPU in {wall} s of wall time cannot be with {found['threads']} threads"
        if index and start < turns[index - 1][2] + turns[index - 1][3] - 2e-6:
            yield f"turn {index} began before turn {index - 1} had ended"
    gaps: dict[str, list[float]] = dict(a=[], b=[])
    for (side, _, start, wall, _), after in pairwise(turns):
        gaps[side].append(after[2] - start - wall)
    (less, _), (more, side) = sorted((median(times), side) for side, times in gaps.items())
    if more > LONGER * less + GAP_S:
        told = f"{1000 * more:.2f} ms go by after {side}'s turns, {1000 * less:.2f} ms after the other's"
        yield f"until the next one begins {told}: turns were shortened"


def _of_results(found: dict[str, Any], path: Path) -> Iterator[str]:
    turns = [Turn(*turn) for turn in found["turns"]]
    counts = {side: [kind["steps"] for kind in found[side]["kinds"]] for side in ("a", "b")}
    expected = results(turns, counts)
    if found["decides"] != DECIDES:
        yield f"decides = {short(found['decides'])}, and {DECIDES} time does"
    if not same(found["results"], expected):
        yield f"results = {short(found['results'])}; its turns say {expected}"
    if not (isinstance(found["hardware"], str) and re.fullmatch(r"\d+ x [ -~]{1,100}", found["hardware"])):
        yield f"hardware = {short(found['hardware'])} has to be such as '1 x AMD EPYC, 2 threads'"
    if path.name != file_name(found):
        yield f"the file is not named {file_name(found)}"
    if datetime.fromisoformat(found["start_utc"]) > datetime.now(UTC) + timedelta(hours=1):
        yield f"it is from the future: {found['start_utc']}"
