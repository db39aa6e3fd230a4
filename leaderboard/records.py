"""A record: a folder records/<track>/<date>_<name>/ small enough to commit, made of the runs of one recipe.

runs.tar.xz     of every seed log.txt, metrics.jsonl and summary.json, to the byte as the trainer wrote them
summary.json    what they amount to: `describe`, which verify works out again
config.toml     the recipe, to run as it is or with another seed
README.md       for the reader; made once, then its author's
"""

import io
import json
import lzma
import re
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.files import user_path
from leaderboard import stats
from leaderboard.runs import FILES, Run, read_run, read_text, short
from leaderboard.tracks import Track, find_track

RECORDS = Path(__file__).with_name("records")
MAX_BYTES = 2**20  # of a record
MAX_UNPACKED = 2**26  # of its archive: what it may make this program read
JOINER = "\u200d"  # between the characters of one emoji
OF_ONE_RUN = ("seed", "run_dir")  # settings in which the seeds of a record differ


@dataclass
class Record:
    path: Path
    runs: list[Run] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)  # what cannot be read, and why

    @property
    def name(self) -> str:
        return f"{self.path.parent.name}/{self.path.name}"

    @property
    def is_foreign(self) -> bool:
        return bool(self.summary.get("foreign"))

    @property
    def hardware(self) -> str:
        return str(self.summary.get("hardware"))

    @property
    def times(self) -> list[float]:
        """Seconds on the clock of each seed where the record stops."""
        return [run.last.time_s for run in self.runs]

    @property
    def losses(self) -> list[float]:
        return [run.last.loss for run in self.runs]

    @property
    def steps(self) -> int:
        return self.runs[0].last.step


def describe(
    runs: Sequence[Run], track: Track, name: str, date: str, author: str, description: str,
    foreign: dict[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What the runs amount to, from their logs and metrics alone; seconds, nats, tokens; None for nan and infinity.

    foreign: for logs of another speedrun, what they do not say: `hardware`, `source`, `batch_tokens` (None: unknown).
    """
    first, last = runs[0], runs[0].last
    times, losses = [run.last.time_s for run in runs], [run.last.loss for run in runs]
    tokens = first.tokens_at(last.step) if first.config else None
    if foreign:
        tokens = last.step * foreign["batch_tokens"] if foreign["batch_tokens"] else None
    low, high = stats.mean_interval(times)
    summary = dict(
        name=name, track=track.name, date=date, author=author, description=description, foreign=foreign,
        hardware=foreign["hardware"] if foreign else first.hardware, versions=first.log.facts.get("versions"),
        git_commit=first.log.facts.get("git_commit"), target_loss=track.target_loss, steps=last.step,
        tokens=tokens, n=len(runs),
        time_s=dict(mean=float(np.mean(times)), median=float(np.median(times)), low=low, high=high),
        val_loss=dict(mean=float(np.mean(losses)), sd=float(np.std(losses, ddof=1)) if len(runs) > 1 else None),
        p=stats.p_below(losses, track.target_loss),
        runs=[dict(seed=run.seed, time_s=run.last.time_s, val_loss=run.last.loss) for run in runs],
    )  # fmt: skip
    if track.sigma:
        z, p = stats.z_below(losses, track.target_loss, track.sigma)
        summary["known_sigma"] = dict(z=z, p=p, step_rule=stats.step_rule(losses, track.target_loss))
    return json.loads(json.dumps(summary), parse_constant=lambda name: None)  # nan and inf as null, which JSON has


def shared_config(run: Run) -> dict[str, Any]:
    """The settings that a record's runs share. None, which TOML lacks, is the default where a setting may be none."""
    return {key: value for key, value in run.config.items() if key not in OF_ONE_RUN and value is not None}


def config_toml(run: Run) -> str:
    """The recipe as ./run.sh takes it. JSON's strings, numbers, booleans and flat lists are TOML's."""
    lines = [f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in shared_config(run).items()]
    return "# The recipe of this record, as its runs logged it.\n" + "".join(lines)


def wrong_words(summary: dict[str, Any]) -> list[str]:
    """What of a record's own words cannot stand in a table or in a file's name, and why."""
    foreign = summary.get("foreign")
    words = {key: summary.get(key) for key in ("name", "date", "author", "description", "hardware")}
    if foreign is not None:
        if not isinstance(foreign, dict) or foreign.keys() != {"hardware", "source", "batch_tokens"}:
            return [f"foreign = {short(foreign)} has to say hardware, source and batch_tokens"]
        words |= {"source": foreign["source"], "hardware": foreign["hardware"]}
        batch = foreign["batch_tokens"]
        if batch is not None and not (type(batch) is int and 0 < batch < 2**40):
            return [f"batch_tokens = {short(batch)} has to be a number of tokens; leave it out where it is not known"]
    found = [
        f"{key} = {short(value)} has to be one line of 1 to 200 characters"
        for key, value in words.items()
        if not (isinstance(value, str) and value.replace(JOINER, "").isprintable() and 0 < len(value.strip()) <= 200)
    ]
    if not found and not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", summary["name"]):
        found.append(f"name = {words['name']!r} has to be of small letters, digits, - _ and . only; such as aurora_460")
    if not found and not re.fullmatch(r"\d{4}-\d{2}-\d{2}", summary["date"]):
        found.append(f"date = {words['date']!r} has to be the day of the runs, such as 2026-11-22")
    return found


def pack(runs: Sequence[Run]) -> bytes:
    """The archive, the same bytes for the same runs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for index, run in enumerate(runs):
            folder = f"log_{index}" if run.is_foreign else f"seed_{run.seed}"
            for name in FILES:
                content = run.texts.get(name, "").encode()
                if content:
                    member = tarfile.TarInfo(f"{folder}/{name}")
                    member.size, member.mode = len(content), 0o644
                    archive.addfile(member, io.BytesIO(content))
    return lzma.compress(buffer.getvalue(), preset=6)


def unpack(content: bytes) -> dict[str, dict[str, str]]:
    """Folder -> file name -> text, read in memory. Raises ValueError for an archive that is broken, or is no such."""
    folders: dict[str, dict[str, str]] = {}
    try:
        decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=2**27)
        plain = decompressor.decompress(content, MAX_UNPACKED)
        if not decompressor.eof or decompressor.unused_data:
            raise ValueError(f"runs.tar.xz is not one xz stream that unpacks to less than {MAX_UNPACKED:,} bytes")
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as archive:
            for member in archive:
                found = re.fullmatch(r"((?:seed|log)_\d{1,6})/([a-z.]+)", member.name)
                is_plain = member.isreg() and not member.issparse() and 0 <= member.size <= MAX_UNPACKED
                if not found or not is_plain or found[2] not in FILES or found[2] in folders.get(found[1], {}):
                    raise ValueError(f"runs.tar.xz holds {member.name!r}; each of seed_<n>/ has {', '.join(FILES)}")
                file = archive.extractfile(member)
                folders.setdefault(found[1], {})[found[2]] = file.read().decode() if file else ""
    except (lzma.LZMAError, tarfile.TarError, EOFError, UnicodeDecodeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"runs.tar.xz cannot be read ({error})") from None
    return folders


def load_record(path: Path) -> Record:
    """The record in folder `path`, with what cannot be read in `broken`."""
    record = Record(path.resolve())
    entries = sorted(record.path.iterdir()) if record.path.is_dir() else []
    odd = [entry.name for entry in entries if entry.is_symlink() or not entry.is_file()]
    if odd or not entries:
        record.broken.append(f"a record is a folder of plain files, without {', '.join(odd) or 'none'}")
        return record
    size = sum(entry.stat().st_size for entry in entries)
    if size >= MAX_BYTES:
        record.broken.append(f"the record has {size:,} bytes; less than {MAX_BYTES:,} can be committed")
        return record
    try:
        folders = unpack((path / "runs.tar.xz").read_bytes())
        in_order = sorted(folders, key=lambda folder: int(folder.partition("_")[2]))
        record.runs = [Run(folder.replace("_", " "), folders[folder]) for folder in in_order]
    except (OSError, ValueError) as error:
        record.broken.append(str(error) if isinstance(error, ValueError) else f"runs.tar.xz: {error.strerror}")
    try:
        record.summary = json.loads((path / "summary.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        record.broken.append(f"summary.json cannot be read ({error})")
    if not isinstance(record.summary, dict):
        record.broken.append("summary.json is not a JSON object")
        record.summary = {}
    return record


def find_records(places: Sequence[Path] = ()) -> list[Path]:
    """Folders of the records named (a record, a track, or a name such as sotu-byte/2026-11-22_muon), or of all; a
    half-written one begins with a dot.

    Raises ValueError for a place where there is none.
    """
    if not places:
        return sorted(path for path in RECORDS.glob("*/[!.]*") if path.is_dir())
    found: list[Path] = []
    for named in map(user_path, places):
        place = named if named.exists() else RECORDS / named
        below = sorted(path for pattern in ("[!.]*", "*/[!.]*") for path in place.glob(pattern))
        here = [path for path in (place, *below)
                if (path / "runs.tar.xz").exists() or (path / "summary.json").exists()]  # fmt: skip
        if not here:
            known = ", ".join(f"{path.parent.name}/{path.name}" for path in find_records()) or "none yet"
            raise ValueError(f"there is no record at {named}; the records are: {known}")
        found += here
    return list(dict.fromkeys(path.resolve() for path in found))


def make_record(
    runs: Sequence[Run], into: Path, name: str = "", author: str = "", description: str = "", date: str = "",
    track_name: str = "", foreign: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write the record of these runs in folder `into`/<track>/<date>_<name>; returns it. It is not verified here.

    What is not given is the runs' own. Raises ValueError for what cannot be one record.
    """
    config = runs[0].config
    track = find_track(track_name or str(config.get("track", "")))
    name, author = name or str(config.get("name", "")), author or str(config.get("author", ""))
    description = description or str(config.get("description", ""))
    date = date or max(str(run.log.facts.get("start_utc", ""))[:10] for run in runs)
    if not author:
        raise ValueError("a record has an author; say --author='Your Name', or set author in the recipe")
    if not description:
        raise ValueError("a record says what is new about it; say --description='...', or set it in the recipe")
    seeds = [run.seed for run in runs]
    if not foreign and len(set(seeds)) < len(seeds):
        raise ValueError(f"the runs have seeds {seeds}; each has to come once")
    for run in runs:
        if run.broken:
            raise ValueError(f"{run.name}: {run.broken[0]}")
        if not run.validations:
            example = "step:125/3250 val_loss:4.58616 train_time:66.065s"
            raise ValueError(f"{run.name} has no line like {example}; nothing to add")
    path = into / track.name / f"{date}_{name}"
    if path.exists():
        raise ValueError(f"{path} exists; choose another --name, or remove it first")
    runs = runs if foreign else sorted(runs, key=lambda run: run.seed or 0)
    summary = describe(runs, track, name, date, author, description, foreign)
    for problem in wrong_words(summary):
        raise ValueError(problem)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=".new-", dir=path.parent))
    try:
        (half / "runs.tar.xz").write_bytes(pack(runs))
        (half / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        (half / "README.md").write_text(_readme(summary), encoding="utf-8")
        if not foreign:
            (half / "config.toml").write_text(config_toml(runs[0]), encoding="utf-8")
        half.chmod(0o755)
        half.rename(path)
    except BaseException:
        shutil.rmtree(half, ignore_errors=True)
        raise
    return path


def _readme(summary: dict[str, Any]) -> str:
    times, losses = summary["time_s"], summary["val_loss"]
    spread = f" ± {losses['sd']:.4f}" if losses["sd"] is not None else ""
    folder = f"{summary['track']}/{summary['date']}_{summary['name']}"
    again = source = ""
    seeds = [run["seed"] for run in summary["runs"]]
    if foreign := summary["foreign"]:
        source = f"From {foreign['source']}; not run by this repository.\n\n"
    else:
        again = f"    ./run.sh leaderboard/records/{folder}/config.toml --seed={max(seeds) + 1}\n"
        again += f"    ./run.sh leaderboard reproduce {folder}\n"
    return (
        f"# {summary['description']}\n\n{summary['author']}, {summary['date']}, track {summary['track']}, "
        f"{summary['hardware']}.\n\n{source}"
        f"{times['mean']:.2f} s (median {times['median']:.2f}) over {summary['steps']} steps to {losses['mean']:.4f}"
        f"{spread}, {summary['n']} seeds.\n\n"
        f"    ./run.sh leaderboard verify {folder}\n{again}"
    )


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Run directories as they are, for `make_record`. Raises ValueError, also for none."""
    if not directories:
        raise ValueError("name the run directories, one per seed: ./run.sh leaderboard add runs/<one> runs/<two> ...")
    runs = [read_run(user_path(directory)) for directory in directories]
    for run, directory in zip(runs, directories, strict=True):
        if run.summary.get("status") == "interrupted":
            raise ValueError(f"{directory} was interrupted; remove it and run its seed {run.seed} again")
    return runs


def read_foreign(files: Sequence[Path]) -> list[Run]:
    """Log files of another speedrun, one for each run. Raises ValueError for one that is not there."""
    files = [user_path(file) for file in files]
    if absent := [str(file) for file in files if not file.is_file()]:
        raise ValueError(f"{absent[0]} is not a file; with --foreign, name the logs, one for each run")
    return [Run(f"log {index}", {"log.txt": read_text(file)}) for index, file in enumerate(files)]
