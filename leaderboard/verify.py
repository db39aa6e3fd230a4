"""Does a record hold? Every reason why not, worked out from its logs and metrics; summaries are only compared.

`reasons(record)` checks one record, `verify_all(records)` also finds runs that stand in two. What no reading of files
can tell: numbers invented alike in all of them, and source that cheats, with a clock of its own, say. The source is in
the log; `compare` names the files in which two records differ, and `reproduce` runs it again.
"""

import itertools
import math
import tomllib
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from leaderboard import stats, verify_run
from leaderboard.records import Record, config_toml, describe, shared_config, wrong_words
from leaderboard.runs import Run, short
from leaderboard.tracks import SIGNIFICANCE, Track, find_track


def reasons(record: Record) -> list[str]:
    """Why the record does not hold, none if it does; each says where and what."""
    found = [*record.broken]
    if not record.runs or not record.summary:
        return found or ["there is no run in it"]
    try:
        track = find_track(record.path.parent.name)
    except ValueError as error:
        return [*found, str(error)]
    found += wrong_words(record.summary)
    for run in record.runs:
        checks = [verify_run.of_log(run)]
        if record.is_foreign:
            checks += [verify_run.of_foreign_log(run)]
            if track.fixed:
                found.append(f"{run.name}: a foreign log does not tell the settings and the source that are fixed here")
        else:
            checks += [verify_run.of_files(run), verify_run.of_track(run, track)]
        found += [f"{run.name}: {reason}" for check in checks for reason in _all_of(check)]
    return [*found, *_all_of(_of_seeds(record, track)), *_all_of(_of_summary(record, track))]


def _all_of(check: Iterator[str]) -> Iterator[str]:
    """Its reasons; one more where the files hold something that it cannot make sense of."""
    try:
        yield from check
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        yield f"it cannot be checked further: something is not what it should be ({type(error).__name__}: {error})"


def _of_seeds(record: Record, track: Track) -> Iterator[str]:
    """All seeds of a record: one source, one machine, each once, stopped alike, enough of them."""
    runs, first = record.runs, record.runs[0]
    for run in runs[1:]:
        changed = sorted(path for path in {*run.log.sources, *first.log.sources}
                         if run.log.sources.get(path) != first.log.sources.get(path))  # fmt: skip
        if changed:
            yield f"{run.name} ran another source than {first.name}: {', '.join(changed)} differ"
        if {line.planned for line in run.log.lines} != {line.planned for line in first.log.lines}:
            yield f"{run.name} counts towards another number of steps than {first.name}"
        if not record.is_foreign:
            yield from _differ("settings", _but_for_rounding(run), _but_for_rounding(first), run.name, first.name)
            for key in ("device", "world_size", "dtype", "versions", "train_fingerprint", "val_fingerprint"):
                what = "hardware" if key in ("device", "world_size") else key
                yield from _differ(what, run.log.facts.get(key), first.log.facts.get(key), run.name, first.name)
            if [row.get("lr_scale") for row in run.metrics] != [row.get("lr_scale") for row in first.metrics]:
                yield f"{run.name} had another learning-rate schedule than {first.name}"
    if not record.is_foreign:
        yield from _of_declaration(record, track)
        for run in runs:
            if run.name != f"seed {run.seed}":
                yield f"{run.name} is a run of seed {run.seed}"
    for one, other in itertools.combinations(runs, 2):
        losses = one.train_losses
        equal = sum(losses[step] == other.train_losses.get(step) for step in losses)
        if equal > len(losses) / 2:
            yield f"{one.name} and {other.name} have the same losses to the last digit: one run twice"
    steps = [run.last.step for run in runs]
    if len(set(steps)) > 1:
        rule = "run all with one train_steps and --stop_at_target=false"
        yield f"the seeds stop at different steps, {steps}: each may stop where its loss looks good; {rule}"
    if rule := lacking_proof(record.losses, track):
        found = f"{len(runs)} seeds with mean loss {np.mean(record.losses):.5f}"
        rule += "; take more steps (runs cannot be added)"
        yield f"{found} do not show that it is below {track.target_loss:g}: {rule}"


def _but_for_rounding(run: Run) -> dict[str, Any]:
    """The settings that a record's runs share, without what each may choose by the memory that is free."""
    return {key: value for key, value in shared_config(run).items() if key != "micro_batch_tokens"}


def lacking_proof(losses: Sequence[float], track: Track) -> str:
    """What is missing to show that the mean loss is below the track's target; empty if nothing is. On tracks by steps
    with a known spread their own rule is what counts."""
    is_finite = all(map(math.isfinite, losses))
    if track.ranked_by == "steps" and track.step_threshold:
        margin = stats.step_rule(losses, track.target_loss) if is_finite else -math.inf
        rule = f"(target - mean) * sqrt(n) = {margin:.5f}, {track.step_threshold:g} or more is needed"
        return "" if margin >= track.step_threshold else rule
    p = stats.p_below(losses, track.target_loss) if is_finite else 1.0
    return "" if p < SIGNIFICANCE else f"one-sided p = {p:.2g}, less than {SIGNIFICANCE:g} is needed"


def _of_declaration(record: Record, track: Track) -> Iterator[str]:
    """How many runs and which seeds, said before the first result: none is picked, left out, or added to lower p."""
    runs, first, n = record.runs, 0, len(record.runs)
    is_later = max(str(run.log.facts.get("start_utc")) for run in runs) >= track.declared_from
    if is_later or any("num_seeds" in run.config for run in runs):  # a clock set back does not free from it
        first = track.first_seed
        for run in runs:
            declared, start = run.config.get("num_seeds", 0), run.config.get("data_start", "first")
            if declared != n:
                rule = "a record is of as many as each run has declared beforehand"
                yield f"{run.name} declares num_seeds = {declared}, and there are {n} runs: {rule}"
            if start != track.data_start:
                yield f"{run.name} has data_start = {start!r}, the track's is {track.data_start!r}"
    if (seeds := [run.seed for run in runs]) != list(range(first, first + n)):
        rule = f"{n} runs have {first} to {first + n - 1}, each once, so that none is picked or left out"
        yield f"the seeds are {seeds}; {rule}"


def _differ(what: str, one: Any, other: Any, name_one: str, name_other: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}):
            if one.get(key) != other.get(key):
                yield f"{what} differ: {key} = {one.get(key)!r} in {name_one}, {other.get(key)!r} in {name_other}"
    elif one != other:
        yield f"{what} differs: {one!r} in {name_one}, {other!r} in {name_other}"


def _of_summary(record: Record, track: Track) -> Iterator[str]:
    """The folder's name, summary.json and config.toml against what the runs say."""
    path, summary, now = record.path, record.summary, datetime.now(UTC)
    if path.name != f"{summary['date']}_{summary['name']}":
        yield f"the folder is not named {summary['date']}_{summary['name']}, as summary.json says"
    starts = [] if record.is_foreign else [str(run.log.facts.get("start_utc")) for run in record.runs]
    if starts and summary["date"] != max(starts)[:10]:
        yield f"summary.json says date = {summary['date']}, the last run started {max(starts)}"
    for stated in {f"{summary['date']}T00:00:00Z", *starts}:
        if datetime.fromisoformat(stated) > now + timedelta(hours=1):
            yield f"the record is from the future: {stated}, and now it is {now:%Y-%m-%dT%H:%M:%SZ}"
    words = {key: summary[key] for key in ("name", "date", "author", "description")}
    expected = describe(record.runs, track, foreign=summary.get("foreign"), **words)
    for key in {**expected, **summary}:
        if not verify_run.same(summary.get(key), expected.get(key)):
            yield f"summary.json says {key} = {short(summary.get(key))}; its runs say {short(expected.get(key))}"
    if not (path / "README.md").is_file():
        yield "README.md is missing"
    if not record.is_foreign:
        recipe, expected_recipe = path / "config.toml", config_toml(record.runs[0])
        if not recipe.is_file() or recipe.read_bytes() != expected_recipe.encode():
            yield "config.toml is not the recipe that the runs logged"
        if tomllib.loads(expected_recipe) != shared_config(record.runs[0]):
            yield "the logged settings cannot be written as TOML"


def verify_all(records: Sequence[Record]) -> dict[Path, list[str]]:
    """Each record's reasons, in their order.

    A run that stands in two records, with losses and times alike, speaks against the later of them in `records`, or
    against the one that does not hold anyway: a broken copy of a record cannot push it out.
    """
    found = {record.path: reasons(record) for record in records}
    owners: dict[Any, tuple[Record, Run]] = {}
    for record in sorted(records, key=lambda record: bool(found[record.path])):
        for run in record.runs:
            print_of_run = tuple(run.train_losses.items()), tuple(run.validations)
            owner, other = owners.setdefault(print_of_run, (record, run))
            if owner is not record:
                reason = f"{run.name} is {other.name} of {owner.name}: the same losses and times to the last digit"
                found[record.path].append(reason)
    return found
