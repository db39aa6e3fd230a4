"""Records of speedruns, checked, ranked, compared and drawn.

    ./run.sh leaderboard add runs/<seed 0> runs/<seed 1> ... --name=muon_550      make a record of n seeds' runs
    ./run.sh leaderboard verify                                                   does every record hold?
    ./run.sh leaderboard rank sotu-byte --format=markdown                         tables
    ./run.sh leaderboard duel sotu-byte/2026-11-22_aurora sotu-byte/2026-11-22_muon --keep      steps take turns
    ./run.sh leaderboard compare sotu-byte/2026-11-22_aurora sotu-byte/2026-11-22_muon
    ./run.sh leaderboard diff sotu-byte/2026-11-22_muon sotu-byte/2026-11-22_aurora      settings and sources
    ./run.sh leaderboard check sotu-byte/2026-11-22_aurora                        a proposal: all of the above
    ./run.sh leaderboard publish                                                  tables of documents, figures, a page
    ./run.sh leaderboard fingerprint fineweb-3.28 data/fineweb10B/fineweb_val_000000.bin      once, before records

A record is named by its folder or by track/date_name. Exit status: 0 done, 1 a record does not hold, was not reproduced
or (check) is not the fastest, 2 a mistake in what was asked for.
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import tyro
from tyro.conf import Positional

from data import console
from data.files import check_writable, user_path, user_text, whole_file, write_json
from harness.tables import Row, slug
from leaderboard import changes, check, duel, page, plots, rank, verify_duel
from leaderboard.compare import compare
from leaderboard.fingerprint import enter_fingerprint
from leaderboard.records import RECORDS, Record, find_records, load_record, make_record, read_foreign, read_runs
from leaderboard.tracks import find_track
from leaderboard.verify import verify_all

REPORT = Path(__file__).with_name("all_records.html")
Places = Positional[tuple[Path, ...]]


def add(
    runs: Places, /, name: str = "", author: str = "", description: str = "", into: Path = RECORDS,
    foreign: bool = False, track: str = "", hardware: str = "", source: str = "", date: str = "", batch_tokens: int = 0,
) -> int:  # fmt: skip
    """Make a record from run directories, one for each seed. What does not hold is not kept.

    Args:
        runs: run directories; with --foreign, log files.
        name: of the record; default: the runs' name.
        author: whose it is; default: the runs' author.
        description: what is new about it; default: the runs' description.
        into: folder of the records.
        foreign: logs of another speedrun on the same shards; the five settings below are what logs do not say.
        track: the track they ran on.
        hardware: such as "8 x NVIDIA H100 80GB HBM3", as records of this repository name it.
        source: where the logs are published.
        date: day of the runs.
        batch_tokens: tokens per step; 0: not known.
    """
    into = user_path(into)
    check_writable(into, "choose another folder, such as --into=/tmp/records")
    if foreign:
        required = dict(name=name, track=track, hardware=hardware, source=source, date=date)
        if absent := [key for key, value in required.items() if not value]:
            raise ValueError(f"a foreign record needs --{' --'.join(absent)} as well: its logs do not say")
        about = dict(hardware=hardware, source=source, batch_tokens=batch_tokens or None)
        path = make_record(read_foreign(runs), into, name, author, description, date, track, about)
    elif track or hardware or source or date or batch_tokens:
        raise ValueError("track, hardware, source, date and batch_tokens are in a run's own log; leave them out")
    else:
        path = make_record(read_runs(runs), into, name, author, description)
    try:
        others = [other for other in find_records([path.parent]) if other != path.resolve()]
        reasons = verify_all([load_record(other) for other in [*others, path]])[path.resolve()]
    except BaseException:
        shutil.rmtree(path)
        raise
    if reasons:
        shutil.rmtree(path)
        print(f"not added: {path.parent.name}/{path.name} does not hold", *reasons, sep="\n  ", file=sys.stderr)
        return 1
    print(f"added {path}; say more in its README.md, then commit it")
    return 0


def _verify(paths: Sequence[Path]) -> dict[Path, list[str]]:
    """Reasons by record; the other records of their tracks are checked for runs that stand in both."""
    named = [path.resolve() for path in paths]
    beside = {other for path in named for other in find_records([path.parent])}
    found = verify_all([load_record(path) for path in sorted({*named, *beside}, key=lambda path: path.name)])
    return {path: found[path] for path in named}


def verify(records: Places = (), /) -> int:
    """Work out every number of the records, and of all duels, from their logs again and list all that does not hold.

    Args:
        records: records or tracks; default: all.
    """
    found = _verify(find_records(records))
    duels = _verify_duels([load_record(path) for path, reasons in found.items() if not reasons]) if not records else {}
    return 0 if _all_hold(found, duels) else 1


def _all_hold(records: dict[Path, list[str]], duels: dict[Path, list[str]]) -> bool:
    """Prints the reasons."""
    for path, reasons in [*records.items(), *duels.items()]:
        print(f"{path.parent.name}/{path.name}: {'holds' if not reasons else f'{len(reasons)} reasons against it'}")
        for reason in reasons:
            print(f"  {reason}")
    for kind, reasons_by_path in dict(records=records, duels=duels).items():
        if reasons_by_path:
            print(
                f"{len(reasons_by_path)} {kind}, {sum(map(bool, reasons_by_path.values())) or 'none'} that do not hold"
            )
    if not records:
        print("there is no record yet")
    return not any([*records.values(), *duels.values()])


def _verify_duels(records: Sequence[Record]) -> dict[Path, list[str]]:
    """Reasons by duel; records: those that hold."""
    return verify_duel.verify_all({record.name: record for record in records})


def _holding_duels(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Those of the duels that hold, between these records; others are named."""
    found = []
    for path, reasons in _verify_duels(records).items():
        if reasons:
            print(f"left out: duel {path.name}: {reasons[0]}", file=sys.stderr)
        else:
            found.append(verify_duel.load_duel(path))
    return found


def _holding(places: Sequence[Path] = ()) -> list[Record]:
    """Those of the records that hold; the others are named."""
    records = [load_record(path) for path in find_records(places)]
    found = verify_all(records)
    for record in records:
        if found[record.path]:
            print(f"left out: {record.name} does not hold; `verify` says why", file=sys.stderr)
    return [record for record in records if not found[record.path]]


def rank_table(
    track: Positional[str] = "", /, format: Literal["terminal", "markdown", "json"] = "terminal", out: str = ""
) -> int:
    """Print the tables of the records that hold: of each track those that duels connect, in the order of these; the
    others for each hardware, the fastest first.

    Args:
        track: only this one.
        format: of the table.
        out: write it into this file instead.
    """
    if track:
        find_track(track)
    records = _holding()
    table = [row for row in rank.rows(records, _holding_duels(records)) if not track or row["track"] == track]
    if format == "json":
        written = json.dumps(table, indent=1) + "\n"
    else:
        written = rank.markdown(table) if format == "markdown" else rank.terminal(table)
    if not table:
        print("there is no record yet", file=sys.stderr)
    if out:
        user_path(out).parent.mkdir(parents=True, exist_ok=True)
        with whole_file(user_path(out)) as file:
            file.write(written)
    else:
        print(written, end="")
    return 0


def check_record(record: Positional[Path], /, rounds: int = duel.ROUNDS) -> int:
    """Check a proposed record: do all records and duels hold, does its source give its losses here, and is it faster
    than the best other one of its track, by a duel on this machine or by steps? The last line is the verdict.

    Args:
        record: the record. Its code runs here: read a stranger's first, or leave it to a machine of no importance.
        rounds: of each sitting of the duel.
    """
    path = _one_path(record)
    records = [load_record(each) for each in sorted({*find_records(), path}, key=lambda each: each.name)]
    found = verify_all(records)
    holding = {each.path: each for each in records if not found[each.path]}
    duels = _verify_duels([*holding.values()])
    against = [] if _all_hold(found, duels) else ["a record or a duel does not hold"]
    if path in holding:
        of_duels = [verify_duel.load_duel(each) for each, reasons in duels.items() if not reasons]
        best = check.best_other(holding[path], [*holding.values()], of_duels)
        against += check.check(holding[path], best, rounds)
        good = f"was reproduced and is {f'faster than {best.name}' if best else 'the first of its track'}"
    name = f"{path.parent.name}/{path.name}"
    print("---", f"no: {name}: {'; '.join(against)}" if against else f"yes: {name} holds, {good}", sep="\n")
    return 1 if against else 0


def diff(a: Positional[Path], b: Positional[Path], /, max_lines: int = changes.MAX_LINES) -> int:
    """Print what a record changed against another: settings, source files, and the diff of these unless it is long.

    Args:
        a: the old record.
        b: the new one.
        max_lines: of the diff.
    """
    print(changes.as_text(_one_record(a), _one_record(b), max_lines), end="")
    return 0


def compare_records(a: Positional[Path], b: Positional[Path], /) -> int:
    """Which of two records is faster, whose loss is lower, and whether the data can tell.

    Args:
        a: a record.
        b: another one of the same track.
    """
    one, other = _one_record(a), _one_record(b)
    if one.path == other.path:
        raise ValueError(f"{a} and {b} are the same record; name two")
    print(compare(one, other), end="")
    return 0


def _one_path(place: Path) -> Path:
    paths = find_records([place])
    if len(paths) > 1:
        raise ValueError(f"{place} has {len(paths)} records; name one, such as {paths[0].parent.name}/{paths[0].name}")
    return paths[0]


def _one_record(place: Path) -> Record:
    """The record named, which has to hold. Raises ValueError otherwise."""
    path = _one_path(place)
    if _verify([path])[path]:
        raise ValueError(f"{place} does not hold; `verify` says why")
    return load_record(path)


def plot(records: Places = (), /, out: Path = rank.PLOTS) -> int:
    """Draw for each track its records by idea and, for each hardware, loss against time, steps and tokens, and the
    history by date. PNG and SVG.

    Args:
        records: records or tracks; default: all.
        out: folder of the figures.
    """
    check_writable(user_path(out), "choose another folder, such as --out=/tmp/plots")
    shown = _holding(records)
    for path in _plot(shown, rank.rows(shown, _holding_duels(shown) if not records else ()), user_path(out)):
        print(path)
    return 0


def _plot(records: Sequence[Record], table: Sequence[Row], out: Path) -> list[Path]:
    by_name, written = {record.name: record for record in records}, []
    for name, group in groupby(table, key=lambda row: row["track"]):
        track, rows = find_track(name), list(group)
        written += plots.save(plots.ideas(rows), out / f"{slug(name)}_ideas")
        for hardware, of_hardware in rank.by_hardware(rows):
            shown = [by_name[f"{name}/{row['name']}"] for row in of_hardware]
            stem = out / f"{slug(name)}_{slug(hardware)}"
            written += plots.save(plots.curves(shown, track.target_loss), stem)
            history = plots.history(shown, track.ranked_by == "steps")
            written += plots.save(history, stem.with_name(f"{stem.name}_history"))
    return written


def write_report(records: Places = (), /, out: Path = REPORT) -> int:
    """Write one HTML page with tables to sort and filter, figures and logs; it needs no network.

    Args:
        records: records or tracks; default: all.
        out: the file.
    """
    out = user_path(out)
    check_writable(out.parent, "choose another file, such as --out=/tmp/records.html")
    shown = _holding(records)
    document = page.render(shown, _holding_duels(shown) if not records else ())
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as file:
        file.write(document)
    print(out)
    return 0


def publish() -> int:
    """Verify all records, then write the tables in README.md and docs/leaderboard.md, the figures and the page."""
    check_writable(rank.README.parent, "publish writes into the checkout; rank, plot and report have --out")
    if verify():
        return 1
    records = _holding()
    table = rank.rows(records, _holding_duels(records))
    documents = rank.with_leaderboard(table)
    for path, document in documents.items():
        with whole_file(path) as file:
            file.write(document)
    for path in [*documents, *_plot(records, table, rank.PLOTS)]:
        print(path)
    return write_report()


def reproduce_record(record: Positional[Path], /, seed: int | None = None, keep: bool = False) -> int:
    """Run a record's logged source and settings again on this machine and say whether it is consistent.

    Args:
        record: the record.
        seed: which of its runs; default: the first.
        keep: save what came out as reproduced.json beside it.
    """
    found = _one_record(record)
    if keep:
        check_writable(found.path, "leave out --keep")
    is_consistent, lines, facts = check.run_again(found, seed)
    if keep:
        kept = {key: facts[key] for key in ("start_utc", "device", "world_size", "versions")}
        write_json(found.path / "reproduced.json", dict(consistent=is_consistent, said=lines, **kept), indent=1)
    return 0 if is_consistent else 1


def duel_records(a: Positional[Path], b: Positional[Path], /, rounds: int = duel.ROUNDS, keep: bool = False) -> int:
    """Let the steps of two records, or of two recipes, take turns on this machine: the ratio of their times.

    Args:
        a: a record of one process; or a .toml file, for this checkout's source.
        b: another one.
        rounds: of each of six sittings, a step of each kind from both sides; an even number.
        keep: save it under leaderboard/duels, where `rank` finds it; of records.
    """
    one, other = _duelist(a), _duelist(b)
    track = ""
    if isinstance(one, Record) and isinstance(other, Record):
        track, today = one.path.parent.name, f"{datetime.now(UTC):%Y-%m-%d}"
        there = duel.place(track, dict(start_utc=today, a=dict(name=one.path.name), b=dict(name=other.path.name)))
        if keep and there.exists():
            raise ValueError(f"{there} exists; leave out --keep, or remove it first")
    if keep and not track:
        raise ValueError("only duels of two records are kept; leave out --keep")
    if keep:
        check_writable(duel.duels_folder() / track, "leave out --keep")
    found = duel.duel(one, other, rounds)
    print("---", *duel.sentences(found), sep="\n")
    if keep:
        print(duel.save(found, track))
    return 0


def fingerprint(track: Positional[str], shard: Positional[Path], /, sha256: str = "") -> int:
    """Enter the fingerprint of a track's published validation shard into tracks.toml; without it no record holds.

    Args:
        track: the track; others of the same validation tokens get it too.
        shard: the validation shard, compared with what the Hugging Face Hub publishes about it.
        sha256: without a network: the file's SHA256 as its page on the Hub shows it.
    """
    print(*enter_fingerprint(track, user_path(shard), sha256), sep="\n")
    return 0


def _duelist(place: Path) -> Record | Path:
    if place.suffix == ".toml":
        recipe = user_path(place)
        if not recipe.is_file():
            raise ValueError(f"{place} is not a file; name a recipe such as configs/sotu_cpu.toml, or a record")
        return recipe
    return _one_record(place)


COMMANDS: dict[str, Callable[..., Any]] = {
    "add": add, "verify": verify, "rank": rank_table, "compare": compare_records, "diff": diff,
    "duel": duel_records, "reproduce": reproduce_record, "check": check_record, "plot": plot, "report": write_report,
    "publish": publish, "fingerprint": fingerprint,
}  # fmt: skip


def main(argv: list[str]) -> int:
    def command() -> int:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS, args=[user_text(word) for word in argv], prog="leaderboard", description=__doc__,
            use_underscores=True,
        )  # fmt: skip

    return console.run(command, "the same command starts again")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
