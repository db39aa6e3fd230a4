"""Does one run hold? Its log, metrics and summary against each other, against its settings, and against the track.

Each check yields its reasons against the run. Run (runs.py) has seen to it that numbers are numbers.
"""

import dataclasses
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from harness.log_format import Line, bits_per_byte, ending, step_line
from leaderboard.runs import FACTS, FILES, Run, short
from leaderboard.tracks import Track, hash_at, imported, patches

LEAST_SHARE = 0.1  # of its run's median: a step that took less is time cut out of the log
SAME = 1e-6  # relative difference of numbers worked out twice


def of_log(run: Run) -> Iterator[str]:
    """Its step lines: whole, in order, of one clock."""
    log = run.log
    yield from run.broken
    if not run.validations:
        yield "there is no validation in it"
        return
    places = [(line.step, line.kind == "val") for line in log.lines]
    for (step, _), (after, _) in itertools.pairwise(places):
        if after < step:
            yield f"log.txt is out of order: step {after} comes after step {step}"
    for (step, is_val), count in sorted(Counter(places).items()):
        if count > 1:
            yield f"log.txt has the {'validation' if is_val else 'training'} line of step {step} more than once"
    if len({line.planned for line in log.lines}) > 1:
        yield f"log.txt counts towards different ends: {sorted({line.planned for line in log.lines})} steps"
    for line in log.lines:
        if not 0 <= line.loss < math.inf:
            yield f"the {line.kind} loss of step {line.step} is {line.loss}"
    if not run.last.time_s > 0:
        yield f"its clock shows {run.last.time_s} s at the end"
    yield from _of_clock(log.lines)


def _of_clock(lines: Sequence[Line]) -> Iterator[str]:
    """Time goes forward, at a rate that a machine can have."""
    for before, line in itertools.pairwise(lines):
        if line.time_s < before.time_s:
            back = f"{before.time_s:.3f} s at step {before.step}, then {line.time_s:.3f} s at step {line.step}"
            yield f"the clock goes backwards: {back}"
    spans = [
        (a.step, b.step, (b.time_s - a.time_s) / (b.step - a.step), 2 * b.half_digit_s / (b.step - a.step))
        for a, b in itertools.pairwise(lines)
        if b.step > a.step
    ]
    usual = statistics.median([span for _, _, span, _ in spans]) if spans else 0.0
    for start, end, span, rounding in spans:
        if 0 <= span < LEAST_SHARE * usual - rounding:
            rule = f"a tenth or less of the run's usual {1000 * usual:.3g} ms: time is missing"
            yield f"steps {start} to {end} took {1000 * span:.3g} ms each, {rule}"


def of_foreign_log(run: Run) -> Iterator[str]:
    """What holds for another speedrun's log alone; some count their average without the first ten steps or so."""
    if run.log.facts or not run.is_foreign or "train_gpt.py" in run.log.sources:
        yield "it is called foreign, and its log is of this repository's trainer"
    for line in run.log.lines:
        if line.step_avg_ms and line.step > 20:
            counted = 1000 * line.time_s / line.step_avg_ms
            rounding = counted * (0.0051 / line.step_avg_ms + line.half_digit_s / max(line.time_s, 1e-9))
            if not line.step - 12 - rounding <= counted <= line.step + 1 + rounding:
                yield f"{line.text[:120]!r}: time and average do not belong to step {line.step}"


def of_files(run: Run) -> Iterator[str]:
    """Log, metrics and summary of this repository's trainer: complete, and of one mind."""
    log, summary, facts = run.log, run.summary, run.log.facts
    if missing := [name for name in FILES if not run.texts.get(name)]:
        yield f"{', '.join(missing)} is missing"
    if log.rulers != 2:
        yield f"log.txt has {log.rulers} rulers of 100 =, and two are meant"
    if not facts or not log.sources:
        yield "log.txt does not open with the sources and the facts of a run"
        return
    python = facts["versions"].get("python")
    told = [line for line in log.machine if line.startswith((f"python {python} ", f"git {facts['git_commit']}"))]
    if len(told) < 2 or run.hardware not in log.machine:
        yield "what log.txt says of python, git and hardware before its facts are other ones"
    notes, lineage = " ".join(log.notes), summary.get("lineage")
    if "resumed from" in notes or summary.get("resumed_from") or not isinstance(lineage, list) or len(lineage) != 1:
        yield "the run was resumed: what ran before is not in this log; a record's runs go through in one piece"
    if path := facts["config"].get("init_from"):
        yield f"the run began with the weights of another (init_from = {short(path)}); a record's begins with its own"
    if f"{summary.get('num_params'):,} parameters" not in notes:
        yield f"summary.json says {summary.get('num_params'):,} parameters, and log.txt does not"
    if isinstance(run.schedule, str):
        yield f"the settings have no schedule: {run.schedule}"
        return
    yield from _complete(run)
    yield from _log_against_metrics(run)
    for key in FACTS:
        if summary.get(key) != facts[key]:
            yield f"summary.json says {key} = {short(summary.get(key))}, log.txt {short(facts[key])}"
    for key, value in _recomputed(run).items():
        if not same(summary.get(key), value):
            yield f"summary.json says {key} = {short(summary.get(key))}, the metrics {value}"
    phases = summary.get("phase_s")
    if not isinstance(phases, dict) or not same(phases.get("train"), run.last.time_s):
        yield f"summary.json says phase_s = {short(phases)}, the metrics {run.last.time_s} s of training"
    yield from _ending(run)


def _complete(run: Run) -> Iterator[str]:
    """Every line that the settings promise, up to the last validation, and no other."""
    config, last = run.config, run.last.step
    val_every, log_every, planned = (config[key] for key in ("val_every", "log_every", "train_steps"))
    if not 0 <= last <= planned or min(val_every, log_every, config["batch_tokens"]) < 1:
        yield f"it ends at step {last} of {planned}, with val_every = {val_every} and log_every = {log_every}"
        return
    small = config.get("small_batch_steps", 0)
    if not 0 <= small <= planned:
        yield f"small_batch_steps = {small} is no number of its {planned} steps"
        return
    promised = last // val_every + 1 + (last % val_every > 0) + last // log_every
    if abs(promised - len(run.metrics)) > 20:  # before there is a set of as many
        yield f"metrics.jsonl has {len(run.metrics)} lines, and the settings promise {promised}"
        return
    expected = {(step, "val") for step in range(0, last + 1, val_every)} | {(last, "val")}
    expected |= {(step, "train") for step in range(log_every, last + 1, log_every)}
    for source, rows in (
        ("log.txt", {(line.step, line.kind) for line in run.log.lines}),
        ("metrics.jsonl", {(row["step"], "val" if "val_loss" in row else "train") for row in run.metrics}),
    ):
        for step, kind in sorted(expected - rows):
            yield f"{source} has no {kind} line of step {step}"
        for step, kind in sorted(rows - expected):
            yield f"{source} has a {kind} line of step {step}, which the settings do not"
    first = run.validations[0]
    if first.step == 0 and first.loss < 0.8 * math.log(max(2, config["vocab_size"])):
        yield f"the model was not a new one at step 0: loss {first.loss:.3f}, of {config['vocab_size']} tokens"


def _log_against_metrics(run: Run) -> Iterator[str]:
    """Each line of log.txt is what the trainer writes for its row of metrics.jsonl."""
    if len(run.log.lines) != len(run.metrics):
        yield f"log.txt has {len(run.log.lines)} step lines, metrics.jsonl {len(run.metrics)}"
        return
    planned = run.config["train_steps"]
    for line, row in zip(run.log.lines, run.metrics, strict=True):
        kind, step, time_s = "val" if "val_loss" in row else "train", row["step"], row["train_time_s"]
        expected = step_line(kind, step, planned, row[f"{kind}_loss"], time_s)
        if line.text != expected and not ("extra" in row and line.text.startswith(f"{expected} ")):
            yield f"log.txt has {line.text[:120]!r} where metrics.jsonl has {expected!r}"
        if "bits_per_byte" in row and row["bits_per_byte"] != (bits := _in_bits_per_byte(run, row["val_loss"])):
            yield f"val step {step}: metrics.jsonl has {short(row['bits_per_byte'])} bits per byte, its loss is {bits}"
        if row["tokens"] != run.tokens_at(step):
            yield f"{kind} step {step}: metrics.jsonl has {row['tokens']} tokens, the settings {run.tokens_at(step)}"


def _in_bits_per_byte(run: Run, loss: float) -> float | None:
    num_bytes = run.summary.get("val_bytes")
    is_size = isinstance(num_bytes, int) and 0 < num_bytes < 2**50
    return bits_per_byte(loss, run.config["val_tokens"], num_bytes) if is_size else None


def _recomputed(run: Run) -> dict[str, Any]:
    """What of a summary follows from metrics and settings."""
    config, last = run.config, run.last
    hit = next((validation for validation in run.validations if validation.loss <= config["target_loss"]), None)
    status = "finished"
    if config["stop_at_target"] and hit:
        status = "stopped at target" if hit == last else f"not one that ends at step {last.step}"
    elif last.step < config["train_steps"]:
        status = f"not one that ends at step {last.step}"
    return dict(
        status=status,
        bits_per_byte=_in_bits_per_byte(run, last.loss),
        val_loss=last.loss, val_step=last.step, steps=last.step, train_time_s=last.time_s,
        tokens=run.tokens_at(last.step), time_to_target_s=hit.time_s if hit else None,
        steps_to_target=hit.step if hit else None,
        tokens_to_target=run.tokens_at(hit.step) if hit else None,
        tokens_per_s=run.tokens_at(last.step) / last.time_s if last.time_s else 0.0,
    )  # fmt: skip


def _ending(run: Run) -> Iterator[str]:
    """The block after ---, which the summary repeats."""
    if not run.log.ending:
        yield "log.txt is cut off: the block after --- is missing"
        return
    stamp = "-" + run.log.facts["start_utc"].replace("-", "").replace(":", "") + "-"
    if stamp not in run.log.ending.get("directory", ""):
        yield f"log.txt ends with directory = {short(run.log.ending.get('directory'))}, and {stamp!r} is meant"
    for word, text in ending(run.summary | _recomputed(run), run.config["target_loss"]).items():
        if run.log.ending.get(word) != text:
            yield f"log.txt ends with {word} = {short(run.log.ending.get(word))}, and {text!r} is meant"


def of_track(run: Run, track: Track) -> Iterator[str]:
    """The track's data, validation tokens and target; tokens in the order that the loader gives them."""
    facts, config = run.log.facts, run.config
    if not facts:
        return
    if {facts["track"], config["track"]} != {track.name}:
        yield f"track = {facts['track']!r} is not {track.name!r}, in whose folder the record is"
    for key in ("target_loss", "val_tokens", "tokenizer"):
        if config[key] != getattr(track, key):
            yield f"{key} = {config[key]!r}, the track's is {getattr(track, key)!r}"
    if (tail := config.get("shard_tail", "keep")) != track.shard_tail:  # older sources know no other
        yield f"shard_tail = {tail!r}, the track's is {track.shard_tail!r}"
    if (objective := config.get("objective", "causal")) != "causal":
        yield f"objective = {objective!r}, and a track's target is a loss of the next token: objective = 'causal'"
    if track.dtype and facts["dtype"] != track.dtype:
        yield f"dtype = {facts['dtype']!r}, the track's is {track.dtype!r}"
    if track.val_bytes and (num_bytes := run.summary.get("val_bytes")) not in (None, track.val_bytes):
        yield f"val_bytes = {short(num_bytes)}, the track's validation tokens are {track.val_bytes:,} bytes of text"
    found = facts["val_fingerprint"]
    if not track.val_fingerprint:
        file = f"PATH/{track.val_source.rpartition('/')[2]}"
        to_do = f"enter it: ./run.sh leaderboard fingerprint {track.name} {file}"
        yield f"the track has no val_fingerprint, so nothing tells whether {found} is of the published shard; {to_do}"
    for key, what in (("val_fingerprint", "validation"), ("train_fingerprint", "training")):
        known = getattr(track, key)
        if known and facts[key] != known:
            yield f"the {what} data is not the track's: fingerprint {facts[key]}, the track's is {known}"
    for what, known_versions in (("the data stream", track.stream), ("what a step computes", track.step)):
        for place, versions in known_versions.items():
            if (path := place.partition(": ")[0]) not in run.log.sources:
                if imported(path, run.log.sources):  # or else it has come since
                    yield f"{what} may be modified: the log has no source of {place}"
            elif hash_at(run.log.sources, place) not in versions:
                yield f"{what} may be modified: {place} is no version that tracks.toml knows"
    for path, targets in patches(run.log.sources).items():
        yield f"what runs may not be what its source says: {path} changes what it imports: {', '.join(targets)}"
    if track.fixed:
        if run.summary.get("num_params") != track.num_params:
            yield f"num_params = {short(run.summary.get('num_params'))}, the track's model has {track.num_params:,}"
        yield from _of_fixed_settings(run, track)


def _of_fixed_settings(run: Run, track: Track) -> Iterator[str]:
    """Settings that the track holds fixed; of the model also those that it does not name, at their defaults."""
    from model import ModelConfig  # brings torch along, which reading a log does without

    defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig) if field.name not in track.free}
    for key, value in (defaults | track.fixed).items():
        value = list(value) if isinstance(value, tuple) else value  # as a log has it
        found = run.config.get(key, None if key in track.fixed else value)  # an older source lacks what has come since
        if found != value:
            yield f"{key} = {found!r}, and the track holds it fixed at {value!r}"


def same(one: Any, other: Any) -> bool:
    """Equal, numbers up to the last digits of a float."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return one == other or abs(one - other) <= SAME * max(abs(one), abs(other))
    return bool(one == other)
