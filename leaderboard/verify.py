"""Does a record hold? Every reason why not, worked out from its logs and metrics; summaries are only compared.

`reasons(record)` looks at one record, `shared_runs(records)` for a run that stands in two. What no reading of files can
tell, a log written by hand in all its parts, `reproduce` can: it runs the logged source again.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from leaderboard import stats
from leaderboard.records import MAX_BYTES, Record, config_toml, describe, shared_config
from leaderboard.runs import Line, Run
from leaderboard.tracks import SIGNIFICANCE, Track, find_track, load_tracks, source_hash

LEAST_SHARE = 0.1  # of its run's median: a step that took less is time cut out of the log
SAME = 1e-6  # relative difference of numbers worked out twice
FACTS = [
    "start_utc",
    "git_commit",
    "track",
    "world_size",
    "device",
    "dtype",
    "versions",
    "train_fingerprint",
    "val_fingerprint",
    "config",
]


def reasons(record: Record) -> list[str]:
    """Why the record does not hold, none if it does; each says where and what."""
    found = [*record.broken]
    if not record.runs or not record.summary:
        return found or ["there is no run in it"]
    try:
        track = find_track(record.path.parent.name)
    except ValueError as error:
        return [*found, str(error)]
    for run in record.runs:
        checks = [of_log(run)] if record.is_foreign else [of_log(run), of_files(run), of_track(run, track)]
        found += [f"{run.name}: {reason}" for check in checks for reason in _all_of(check)]
    if record.is_foreign and any(run.log.facts or not run.is_foreign for run in record.runs):
        found.append("it is called foreign, and its logs have facts of this repository's trainer")
    return [*found, *_all_of(of_seeds(record, track)), *_all_of(of_summary(record, track))]


def _all_of(check: Iterator[str]) -> Iterator[str]:
    """Its reasons; one more where the files hold something that it cannot make sense of."""
    try:
        yield from check
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        yield f"it cannot be checked further: something is not what it should be ({type(error).__name__}: {error})"


# One run


def of_log(run: Run) -> Iterator[str]:
    """Its step lines: whole, in order, of one clock."""
    log = run.log
    yield from run.broken
    yield from (f"log.txt: {line!r} is not a step line" for line in log.unreadable)
    if not run.validations:
        yield "there is no validation in it"
        return
    order = [(line.step, line.kind == "val") for line in log.lines]
    for (step, _), (after, _) in itertools.pairwise(order):
        if after < step:
            yield f"log.txt is out of order: step {after} comes after step {step}"
    for step, is_val in sorted({place for place in order if order.count(place) > 1}):
        yield f"log.txt has the {'validation' if is_val else 'training'} line of step {step} more than once"
    if len({line.planned for line in log.lines}) > 1:
        yield f"log.txt counts towards different ends: {sorted({line.planned for line in log.lines})} steps"
    for line in log.lines:
        if not math.isfinite(line.loss):
            yield f"the {line.kind} loss of step {line.step} is {line.loss}"
    yield from of_clock(log.lines)


def of_clock(lines: Sequence[Line]) -> Iterator[str]:
    """Time goes forward, at a rate that a machine can have."""
    for before, line in itertools.pairwise(lines):
        if line.time_s < before.time_s:
            yield (
                f"the clock goes backwards: {before.time_s:.3f} s at step {before.step}, then {line.time_s:.3f} s at "
                f"step {line.step}"
            )
    spans = [(a.step, b.step, (b.time_s - a.time_s) / (b.step - a.step)) for a, b in itertools.pairwise(lines)
             if b.step > a.step]  # fmt: skip
    usual = statistics.median([span for *_, span in spans]) if spans else 0.0
    for start, end, span in spans:
        if 0 <= span < LEAST_SHARE * usual:
            yield (
                f"steps {start} to {end} took {1000 * span:.3g} ms each, a tenth or less of the run's usual "
                f"{1000 * usual:.3g} ms: time is missing"
            )


def of_files(run: Run) -> Iterator[str]:
    """Log, metrics and summary of this repository's trainer: complete, and of one mind."""
    log, config, summary = run.log, run.config, run.summary
    missing = [name for name, text in run.texts.items() if not text] + sorted(
        {"log.txt", "metrics.jsonl", "summary.json"} - set(run.texts)
    )
    if missing:
        yield f"{', '.join(missing)} is missing"
    absent = [key for key in FACTS if key not in log.facts]
    if absent or not log.sources:
        yield f"log.txt does not open with the sources and facts of a run ({', '.join(absent) or 'no sources'} missing)"
        return
    if not log.ending:
        yield "log.txt is cut off: the block after --- is missing"
    elif log.ending.get("run") not in ("finished", "stopped at target"):
        yield f"the run did not come to its end: {log.ending.get('run')}"
    if (
        config.get("resume")
        or any(note.startswith("resumed from") for note in log.notes)
        or summary.get("resumed_from")
    ):
        yield "the run was resumed: what ran before is not in this log; a record's runs go through in one piece"
    yield from _complete(run)
    yield from _log_against_metrics(run)
    for key in FACTS:
        if summary.get(key) != log.facts[key]:
            yield f"summary.json says {key} = {_short(summary.get(key))}, log.txt {_short(log.facts[key])}"
    for key, value in _recomputed(run).items():
        if not _same(summary.get(key), value):
            yield f"summary.json says {key} = {summary.get(key)}, the metrics {value}"
    phases = summary.get("phase_s")
    if isinstance(phases, dict) and not _same(phases.get("train"), summary.get("train_time_s")):
        yield f"summary.json says train_time_s = {summary.get('train_time_s')} and {phases.get('train')} s of training"
    stated = dict(part.rsplit(" ", 1) for part in log.ending.get("seconds", "").split(", ") if " " in part)
    if run.validations and abs(float(stated.get("train", "nan")) - run.last.time_s) > 0.06:
        yield f"log.txt ends with {stated.get('train')} s of training, the metrics with {run.last.time_s:.3f} s"


def _complete(run: Run) -> Iterator[str]:
    """Every line that the settings promise, up to the last validation, and no other."""
    config, last = run.config, run.last.step
    try:
        val_every, log_every, planned = (int(config[key]) for key in ("val_every", "log_every", "train_steps"))
    except (KeyError, TypeError, ValueError):
        yield "the logged config has no val_every, log_every and train_steps"
        return
    if not 0 <= last <= planned <= 10**8:
        yield f"it ends at step {last} of {planned}"
        return
    expected: set[tuple[Any, str]] = {(step, "val") for step in range(0, last + 1, val_every)} | {(last, "val")}
    expected |= {(step, "train") for step in range(log_every, last + 1, log_every)}
    for source, rows in (
        ("log.txt", {(line.step, line.kind) for line in run.log.lines}),
        ("metrics.jsonl", {(row.get("step"), "val" if "val_loss" in row else "train") for row in run.metrics}),
    ):
        for step, kind in sorted(expected - rows)[:20]:
            yield f"{source} has no {kind} line of step {step}"
        for step, kind in sorted(rows - expected, key=str)[:20]:
            yield f"{source} has a {kind} line of step {step}, which the settings do not"
    if last < planned and not (config.get("stop_at_target") and run.last.loss <= config.get("target_loss", 0)):
        yield f"it ends at step {last} of {planned} without having reached its target"
    for line in run.log.lines:
        if line.planned != planned:
            yield f"log.txt counts to {line.planned} steps, its config to {planned}"
            break


def _log_against_metrics(run: Run) -> Iterator[str]:
    if len(run.log.lines) != len(run.metrics):
        yield f"log.txt has {len(run.log.lines)} step lines, metrics.jsonl {len(run.metrics)}"
        return
    batch_tokens = run.config.get("batch_tokens")
    for line, row in zip(run.log.lines, run.metrics, strict=True):
        loss, time_s, where = row.get(f"{line.kind}_loss"), row.get("train_time_s"), f"{line.kind} step {line.step}"
        if row.get("step") != line.step or not isinstance(loss, float) or not isinstance(time_s, float):
            yield f"log.txt has {where} where metrics.jsonl has {_short(row)}"
            return
        if not abs(loss - line.loss) < 0.6e-5:
            yield f"{where}: loss {line.loss:.5f} in log.txt, {loss:.5f} in metrics.jsonl"
        if not abs(time_s - line.time_s) <= line.half_digit_s * 1.01:
            yield f"{where}: {line.time_s:.3f} s in log.txt, {time_s:.3f} s in metrics.jsonl"
        average_ms = 1000 * time_s / max(1, line.step)
        if line.step_avg_ms is None or abs(line.step_avg_ms - average_ms) > 0.0051:
            yield f"{where}: step_avg:{line.step_avg_ms}ms in log.txt, {average_ms:.2f} ms by its time"
        if row.get("tokens") != line.step * (batch_tokens or 0):
            yield f"{where}: metrics.jsonl has {row.get('tokens')} tokens, not {line.step} x {batch_tokens}"
        if "lr_scale" in row and not math.isfinite(row["lr_scale"]):
            yield f"{where}: metrics.jsonl has lr_scale {row['lr_scale']}"


def _recomputed(run: Run) -> dict[str, Any]:
    """What of a summary follows from metrics and config."""
    target, batch_tokens, last = run.config.get("target_loss") or 0.0, run.config.get("batch_tokens") or 0, run.last
    hit = next((validation for validation in run.validations if validation.loss <= target), None)
    return dict(
        status=run.log.ending.get("run"), val_loss=last.loss, val_step=last.step, steps=last.step,
        train_time_s=last.time_s, tokens=last.step * batch_tokens,
        time_to_target_s=hit.time_s if hit else None, steps_to_target=hit.step if hit else None,
        tokens_to_target=hit.step * batch_tokens if hit else None,
        tokens_per_s=last.step * batch_tokens / last.time_s if last.time_s else 0.0,
    )  # fmt: skip


def of_track(run: Run, track: Track) -> Iterator[str]:
    """The track's data, validation tokens and target; tokens in the order that the loader gives them."""
    facts, config = run.log.facts, run.config
    if not config:
        return
    for key, value in (("track", facts.get("track")), ("track", config.get("track"))):
        if value != track.name:
            yield f"{key} = {value!r} is not {track.name!r}, in whose folder the record is"
            break
    for key in ("target_loss", "val_tokens", "tokenizer"):
        if config.get(key) != getattr(track, key):
            yield f"{key} = {config.get(key)!r}, the track's is {getattr(track, key)!r}"
    found = facts.get("val_fingerprint")
    if not track.val_fingerprint:
        yield (
            f"the track has no val_fingerprint yet, so nothing tells whether {found} is of the published shard; check "
            "it against the source and add it to tracks.toml"
        )
    elif found != track.val_fingerprint:
        yield f"the validation data is not the track's: fingerprint {found}, the track's is {track.val_fingerprint}"
    if track.train_fingerprint and facts.get("train_fingerprint") != track.train_fingerprint:
        yield (
            f"the training data is not the track's: fingerprint {facts.get('train_fingerprint')}, the track's is "
            f"{track.train_fingerprint}"
        )
    for path, known in load_tracks()[1].items():
        source = run.log.sources.get(path)
        if source is None:
            yield f"the data stream may be modified: the log has no source of {path}"
        elif source_hash(source) not in known:
            yield f"the data stream may be modified: {path} is no version that tracks.toml knows"


# All seeds of a record


def of_seeds(record: Record, track: Track) -> Iterator[str]:
    runs, first = record.runs, record.runs[0]
    for run in runs[1:]:
        changed = sorted(path for path in {*run.log.sources, *first.log.sources}
                         if run.log.sources.get(path) != first.log.sources.get(path))  # fmt: skip
        if changed:
            yield f"{run.name} ran another source than {first.name}: {', '.join(changed)} differ"
        if not record.is_foreign:
            yield from _differs("settings", shared_config(run), shared_config(first), run.name, first.name)
            for key in ("device", "world_size", "dtype", "versions", "git_commit"):
                of_both = run.log.facts.get(key), first.log.facts.get(key)
                what = "hardware" if key in ("device", "world_size") else key
                yield from _differs(what, *of_both, run.name, first.name)
    if not record.is_foreign:
        seeds = [run.seed for run in runs]
        if seeds != list(range(len(runs))):
            yield f"the seeds are {seeds}; a record has 0 to n - 1, each once, so that none is picked or left out"
        for run in runs:
            if run.name != f"seed {run.seed}":
                yield f"{run.name} is a run of seed {run.seed}"
    for one, other in itertools.combinations(runs, 2):
        if _curve(one) == _curve(other):
            yield f"{one.name} and {other.name} have the same losses to the last digit: one run twice"
    steps = [run.last.step for run in runs]
    if len(set(steps)) > 1:
        yield (
            f"the seeds stop at different steps, {steps}: stopping each where it looks good makes losses look better; "
            "run all with one train_steps and --stop_at_target=false"
        )
    losses = record.losses
    p = stats.p_below(losses, track.target_loss) if all(map(math.isfinite, losses)) else 1.0
    if not p < SIGNIFICANCE:
        yield (
            f"{len(runs)} seeds with mean loss {statistics.mean(losses):.5f} do not show that it is below "
            f"{track.target_loss:g}: one-sided p = {p:.2g}, less than {SIGNIFICANCE:g} is needed; add seeds or steps"
        )


def _differs(what: str, one: Any, other: Any, name_one: str, name_other: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key):
                yield f"{what} differ: {key} = {one.get(key)!r} in {name_one}, {other.get(key)!r} in {name_other}"
    elif one != other:
        yield f"{what} differs: {one!r} in {name_one}, {other!r} in {name_other}"


def _curve(run: Run) -> tuple[float, ...]:
    """What no two honest runs share: the training losses, or the validation losses where there is nothing else."""
    losses = [line.loss for line in run.log.lines if line.kind == "train"]
    return tuple(losses or [line.loss for line in run.log.lines])


def of_summary(record: Record, track: Track) -> Iterator[str]:
    """The folder's name, its size, summary.json and config.toml against what the runs say."""
    path, summary, now = record.path, record.summary, datetime.now(UTC)
    size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    if size >= MAX_BYTES:
        yield f"the record has {size:,} bytes; less than {MAX_BYTES:,} can be committed"
    texts = {key: str(summary.get(key) or "") for key in ("name", "date", "author", "description")}
    yield from (f"summary.json has no {key}" for key, value in texts.items() if not value)
    if path.name != f"{texts['date']}_{texts['name']}":
        yield f"the folder is not named {texts['date']}_{texts['name']}, as summary.json says"
    starts = [str(run.log.facts.get("start_utc")) for run in record.runs]
    if not record.is_foreign and texts["date"] != max(starts)[:10]:
        yield f"summary.json says date = {texts['date']}, the last run started {max(starts)}"
    for stated in {texts["date"] + "T00:00:00Z", *(starts if not record.is_foreign else ())}:
        try:
            is_future = datetime.fromisoformat(stated) > now + timedelta(hours=1)
        except ValueError:
            yield f"{stated!r} is not a time"
            continue
        if is_future:
            yield f"the record is from the future: {stated}, and now it is {now:%Y-%m-%dT%H:%M:%SZ}"
    expected = describe(record.runs, track, foreign=summary.get("foreign"), **texts)
    for key in {**expected, **summary}:
        if not _same(summary.get(key), expected.get(key)):
            yield f"summary.json says {key} = {_short(summary.get(key))}; its runs say {_short(expected.get(key))}"
    if not record.is_foreign:
        recipe = path / "config.toml"
        if not recipe.is_file() or recipe.read_text() != config_toml(record.runs[0]):
            yield "config.toml is not the recipe that the runs logged"
    if not (path / "README.md").is_file():
        yield "README.md is missing"


def shared_runs(records: Sequence[Record]) -> dict[Path, list[str]]:
    """For each record with a run that stands in an earlier one as well, the reasons."""
    seen: dict[tuple[float, ...], tuple[Record, Run]] = {}
    found: dict[Path, list[str]] = {}
    for record in records:
        for run in record.runs:
            earlier, other = seen.setdefault(_curve(run), (record, run))
            if earlier is not record:
                reason = f"{run.name} is {other.name} of {earlier.name}: the same losses to the last digit"
                found.setdefault(record.path, []).append(reason)
    return found


def verify_all(records: Sequence[Record]) -> dict[Path, list[str]]:
    """Each record's reasons, in their order."""
    shared = shared_runs(records)
    return {record.path: [*reasons(record), *shared.get(record.path, [])] for record in records}


def _same(one: Any, other: Any) -> bool:
    """Equal, numbers up to the last digits of a float."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other or abs(one - other) <= SAME * max(abs(one), abs(other))
    return bool(one == other)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
