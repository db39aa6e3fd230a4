"""What a proposed record is checked by beside `verify`: run again, and put against the best other one of its track."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.tables import Row
from leaderboard import duel, rank, reproduce
from leaderboard.compare import compare
from leaderboard.records import Record
from leaderboard.tracks import find_track


def best_other(record: Record, records: Sequence[Record], duels: Sequence[dict[str, Any]]) -> Record | None:
    """Of its track the best that is this repository's own: by steps, by duels, or, without these, by measured time."""
    beside = [other for other in records if other.path.parent == record.path.parent and other.path != record.path]
    others = {other.path.name: other for other in beside if not other.is_foreign}

    def standing(row: Row) -> tuple[bool, float]:
        is_dueled = row["relative"] is not None
        return not is_dueled, row["relative"].estimate if is_dueled else row["time_s"]["mean"]

    rows = rank.rows([*others.values()], duels)
    if rows and rows[0]["machine"] != "by steps":
        rows.sort(key=standing)
    return others[rows[0]["name"]] if rows else None


def check(record: Record, best: Record | None, rounds: int = duel.ROUNDS) -> list[str]:
    """What speaks against a record that holds, none if it was reproduced and is faster than `best`. Prints what is
    found. Raises ValueError for what cannot be run, if possible before the work."""
    by_steps = find_track(record.path.parent.name).ranked_by == "steps"
    if best and not by_steps:
        duel.check(record, best)
    against = [] if run_again(record)[0] else ["it was not reproduced"]
    if best is None:
        return against
    print("---", compare(record, best), sep="\n", end="")
    if by_steps:
        is_faster = record.steps < best.steps
    else:
        found = duel.duel(record, best, rounds)
        print("---", *duel.sentences(found), sep="\n")
        is_faster = found["results"][found["decides"]]["high"] < 1
    return against if is_faster else [*against, f"it is not faster than {best.name}"]


def run_again(record: Record, seed: int | None = None) -> tuple[bool, list[str], dict[str, Any]]:
    """Whether the record's own source gives its losses here, what to tell of it, which is printed, and the facts of the
    run."""
    print(f"running the source in the log of {record.name}: code by {record.summary['author']}", flush=True)
    with tempfile.TemporaryDirectory(prefix="reproduce-") as tree:
        again = reproduce.run_again(record, seed, Path(tree))
    is_consistent, lines = reproduce.judge(record, again)
    print("---", *lines, sep="\n")
    return is_consistent, lines, again.log.facts
