"""Where a run begins: anew, from a checkpoint (--resume=auto or a path, torchrun's restart), or not, its job done.

Only the first rank looks; all then take what it found. A checkpoint that is damaged is passed over for the one before
it, except where its very file was named.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.files import user_path, user_text
from harness.checkpoint import State, checkpoints_in, load_checkpoint, read_checkpoint, step_of, verify
from harness.machine import Machine
from harness.outcome import is_complete
from harness.runlog import WRITER, is_running, read_json

# What --resume=auto lets differ: where a run is, how it computes the same thing, what is said about it. The data are
# compared by their fingerprints, not by their names.
FREE_TO_DIFFER = (
    "run_dir resume device fsdp compile compile_blocks kernels fused micro_batch_tokens log_every neuron_stats "
    "report_to eval_every eval_tasks eval_limit profile dry_run checkpoint_every checkpoint_keep checkpoint_async "
    "author description num_seeds require_target train_files val_files"
)
# What --resume=PATH may not change: the race that is run, and what a checkpoint is of.
FIXED = (
    "track tokenizer val_tokens matrix_optimizer vocab_size num_layers num_heads head_dim model_dim mlp_hidden seq_len "
    "architecture objective mask_share softcap activation value_embeds ngrams ngram_rows ngram_sparse embed_skip "
    "mask_padding tie_head_steps small_batch_steps data_start shard_tail"
)


@dataclass
class StartingPoint:
    """Where a run begins. `earlier`: checkpoints this run's own will replace, oldest first (see CheckpointWriter)."""

    path: str = ""  # the checkpoint to load; empty: anew
    earlier: list[Path] = field(default_factory=list)
    lineage: list[str] = field(default_factory=list)  # the run directories they are in, by name
    notes: list[str] = field(default_factory=list)  # for the log
    ended: dict[str, Any] | None = None  # summary of this job's earlier attempt, if that ended by itself


def find_start(settings: Any, data: dict[str, str], machine: Machine) -> StartingPoint:
    """The same on every rank. settings: the trainer's Config; data: fingerprints by setting.

    Raises ValueError, on every rank, for a named checkpoint that is damaged or of another kind of run.
    """
    start = problem = None
    if machine.rank == 0:
        try:
            start = _search(dataclasses.asdict(settings), dataclasses.asdict(type(settings)()), data, set(machine.job))
        except (ValueError, OSError) as error:
            problem = str(error)
    machine.raise_together(problem)
    start = machine.share(start)
    assert start is not None
    return start


def load_start(
    start: StartingPoint, model: nn.Module, optimizers: list[torch.optim.Optimizer], machine: Machine
) -> State:
    """Put the checkpoint found into model, optimizers and random state; the rest of it. Raises ValueError, on every
    rank, when it does not fit on one."""
    state = problem = None
    try:
        state = load_checkpoint(start.path, model, optimizers, machine.device)
    except ValueError as error:
        problem = f"{error}; every node has to see the same run_dir" if machine.world_size > 1 else str(error)
    machine.raise_together(problem)
    assert state is not None
    return state


def _search(config: dict[str, Any], defaults: dict[str, Any], data: dict[str, str], job: set[str]) -> StartingPoint:
    resume, start = config["resume"], StartingPoint()
    folder = user_path(config["run_dir"])
    directories = [path for path in folder.glob("*/") if user_text(path.name).startswith(config["name"] + "-")]
    summaries = {path: read_json(path / "summary.json") for path in directories}
    if job:
        start.ended = next((s for s in summaries.values() if job & _names(s, "job") and is_complete(s)), None)
        writers = {path: read_json(path / WRITER) for path in directories}
        of_job = [path for path, writer in writers.items() if not writer or job & _names(writer, "job")]
        if start.ended or _take_newest(
            start, _idle(of_job, job, start.notes), lambda state: bool(job & set(state["job"]))
        ):
            return start
    if resume == "auto":
        start.notes.clear()

        def is_same(settings: dict[str, Any]) -> bool:
            return not differences(defaults | settings, config).keys() - set(FREE_TO_DIFFER.split())

        complete = {path.name for path, values in summaries.items() if is_complete(values)}
        for values in summaries.values():  # what a complete run went on from is done too, unless it was a try at more
            if is_complete(values) and is_same(values.get("config", {})):
                complete |= _names(values, "lineage") | {Path(values.get("resumed_from") or ".").parent.name}
        idle = _idle([path for path in directories if path.name not in complete], job, start.notes)
        if not _take_newest(start, idle, lambda state: state["data"] == data and is_same(state["config"])):
            start.notes.append(f"resume: no checkpoint of an unfinished run with these settings in {folder}; anew")
    elif resume:
        _take_named(start, user_path(resume), config, defaults, data)
    return start


def _idle(directories: list[Path], job: set[str], notes: list[str]) -> list[Path]:
    """Those that nobody writes, nor goes on from, for all that can be known; a note for each other with checkpoints."""
    running = {path: is_running(path, job) for path in directories}
    busy = {name: path for path in directories if running[path] is not False
            for name in _names(read_json(path / WRITER), "lineage")}  # fmt: skip
    idle = []
    for path in directories:
        checkpoints = checkpoints_in(path)
        if running[path] is False and path.name not in busy:
            idle.append(path)
        elif checkpoints and running[path]:
            notes.append(f"resume: {path} is still being written and left alone")
        elif checkpoints and path.name in busy:
            notes.append(f"resume: {path} is left alone, as {busy[path.name]} went on from it and is, or may be, alive")
        elif checkpoints:
            host = read_json(path / WRITER).get("pid_scope", "").partition("/")[0] or "some machine"
            why = f"its run may be alive on {host}: no lock here can tell"
            advice = f"if it is not, go on from it with --resume={checkpoints[-1]}"
            notes.append(f"resume: {path} is left alone, as {why}; {advice}")
    return idle


def _take_newest(start: StartingPoint, directories: list[Path], fits: Callable[[State], bool]) -> bool:
    """Take the newest checkpoint that fits and is whole, and its directories with it; False if there is none."""
    if not (found := _newest(directories, fits, start.notes)):
        return False
    path, state = found
    start.path, start.lineage = str(path), state["lineage"]
    files = [file for directory in directories if directory.name in start.lineage for file in checkpoints_in(directory)]
    start.earlier = sorted((file for file in files if step_of(file) <= state["step"]), key=_age)
    return True


def _take_named(
    start: StartingPoint, path: Path, config: dict[str, Any], defaults: dict[str, Any], data: dict[str, str]
) -> None:  # fmt: skip
    """Take the checkpoint at `path` or the newest whole one in that directory; it is never deleted."""
    named = f"resume = {str(path)!r}"
    if path.is_dir():
        found = _newest([path], lambda state: True, start.notes)
        if not found:
            if (path / "model.safetensors").exists():
                instead = f"begin with its weights by --init_from={path}, without --resume"
                raise ValueError(f"{named} is an export, with which no run goes on; {instead}")
            damaged = "; ".join(start.notes)
            raise ValueError(f"{named}: no whole checkpoint there{damaged and f' ({damaged})'}")
        path, state = found
        named = f"resume = {str(path)!r}"
    else:
        try:
            state = _read(path)
            verify(path)
        except ValueError as error:
            instead = "name another, or its directory for the newest that is whole"
            raise ValueError(f"{named}: not a checkpoint, or damaged ({error}); {instead}") from None
    changed = differences(defaults | state["config"], config)
    for key in [*FIXED.split(), *(["seed"] if config.get("data_start") == "seed" else [])]:
        if key in changed:
            then, now = changed[key]
            word = ",".join(map(str, then)) if isinstance(then, list | tuple) else then
            raise ValueError(f"{named}: {key} is {then!r} there and {now!r} here; set --{key}={word}")
    if config.get("init_from") and "init_from" in changed:
        rule = "which goes on with its own weights, not those of init_from; leave out one of the two"
        raise ValueError(f"{named} names a run, {rule}")
    for name, here in data.items():
        if (there := state["data"][name]) != here:
            then = f"they were {state['config'][name]!r} then"
            raise ValueError(f"{named}: the data of {name} have fingerprint {there} there and {here} here; {then}")
    if state["step"] >= (steps := config["train_steps"]):
        raise ValueError(f"{named} is at step {state['step']} of train_steps = {steps}: raise that")
    start.path = str(path)
    said = [f"{key} {then} -> {now}" for key, (then, now) in changed.items() if key not in ("resume", "run_dir")]
    if said:
        start.notes.append(f"settings that differ from the checkpoint: {', '.join(said)}")


def _newest(directories: list[Path], fits: Callable[[State], bool], notes: list[str]) -> tuple[Path, State] | None:
    files = sorted((file for directory in directories for file in checkpoints_in(directory)), key=_age, reverse=True)
    for path in files:
        try:
            state = _read(path)
            if fits(state):
                verify(path)
                return path, state
        except ValueError as error:
            notes.append(f"{path} is damaged ({error}); looking at the one before it")
    return None


def _read(path: Path) -> State:
    state = read_checkpoint(path)
    missing = [key for key in ("config", "data", "job", "lineage", "summary", "train_time_s") if key not in state]
    if missing:
        raise ValueError(f"it has no {', '.join(missing)}")
    return state


def differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, with both values. `then` has the defaults of those its version did not have yet."""
    return {key: (then[key], value) for key, value in now.items() if _as_tuples(then[key]) != _as_tuples(value)}


def _as_tuples(value: Any) -> Any:
    """A setting's value, whether a summary has it, as JSON's lists, or a checkpoint."""
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def _age(path: Path) -> tuple[int, str]:
    """Orders checkpoints: by step, then by the run directory's time."""
    return step_of(path), str(path)


def _names(values: dict[str, Any], key: str) -> set[str]:
    """The names in a list of a file that may be another program's."""
    names = values.get(key)
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
