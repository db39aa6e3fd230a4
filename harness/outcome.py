"""How a run ends: the status and reason in its summary, and the process's exit status."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from data import console
from data.shards import DataError
from harness.checkpoint import CheckpointWriter
from harness.fsdp import unsharded
from harness.log_format import bits_per_byte
from harness.machine import lost_rank, peak_memory_mib, print_error
from harness.runlog import RunLog

FINISHED, STOPPED, DIVERGED = "finished", "stopped at target", "diverged"
INTERRUPTED, FAILED, LOST = "interrupted", "failed", "lost"  # lost: another rank was
EXIT_STATUS = {FINISHED: 0, STOPPED: 0, DIVERGED: 1, FAILED: 2, LOST: 4, INTERRUPTED: 130}
TARGET_MISSED = 3


def first_summary(run: Any, directory: Path) -> dict[str, Any]:
    """What is known before the first step, or of the steps before the checkpoint. run: the trainer's Run; directory:
    the run directory."""
    missed: dict[str, Any] = dict(time_to_target_s=None, steps_to_target=None, tokens_to_target=None)
    summary = dict(val_loss=None, val_step=None, val_bytes=None, steps=0, **missed)
    if run.resumed:
        summary |= run.resumed["summary"]
        summary["val_bytes"] = summary["val_bytes"] or None  # the tokenizer's files may have come
        if run.resumed["config"]["target_loss"] != run.config.target_loss:
            summary.update(missed, val_step=None)
    if not run.config.eval_every:  # the results would be of the steps before
        summary = {key: value for key, value in summary.items() if key not in ("tasks", "tasks_step")}
    return summary | dict(
        status=FINISHED, reason="", restarts=run.machine.restarts, resumed_from=run.start.path or None,
        job=run.machine.job, lineage=[*run.start.lineage, directory.name],
    )  # fmt: skip


@contextlib.contextmanager
def recorded_in(summary: dict[str, Any], checkpoints: CheckpointWriter, micro_batch_tokens: int) -> Iterator[None]:
    """A block whose early end, other than by a fault of ours, becomes the summary's status and reason."""
    try:
        yield
    except (DataError, OSError, FloatingPointError, RuntimeError, KeyboardInterrupt) as error:
        if lost_rank(error):
            console.ignore_stops()  # torchrun sends one to those that are left
        checkpoints.wait()
        status, reason = _outcome_of(error, micro_batch_tokens, checkpoints.newest)
        when = "by" if status == DIVERGED else "at"
        summary.update(status=status, reason=f"{when} step {summary['steps']}: {reason}" if reason else "")


def _outcome_of(error: BaseException, micro_batch_tokens: int, checkpoint: str) -> tuple[str, str]:
    """Status and reason; `checkpoint` is the newest, or "none". Raises the error itself if it is a fault of ours."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, ""
    if isinstance(error, FloatingPointError):
        return DIVERGED, f"{error}; last good checkpoint: {checkpoint}"
    if isinstance(error, (DataError, OSError)):
        return FAILED, str(error)
    if isinstance(error, torch.OutOfMemoryError):
        advice = "a smaller one changes neither the batch nor the loss, 0 takes what fits"
        return FAILED, f"out of memory with micro_batch_tokens = {micro_batch_tokens}; {advice}"
    if lost_rank(error):
        go_on = "" if checkpoint == "none" else f" with --resume=auto to go on from {checkpoint}"
        return LOST, f"another rank was lost ({lost_rank(error)}); start the same command again{go_on}"
    raise error


def exit_status(summary: dict[str, Any], require_target: bool) -> int:
    """0, 1, 2, 3, 4 or 130, as at the top of train_gpt.py. Tells why, in a line on stderr, where a run has failed."""
    status = summary["status"]
    if status in (FAILED, LOST):  # the ranks that see the loss of another one see it in different ways
        print_error(f"{status} {summary['reason']}", event=LOST if status == LOST else "")
    if EXIT_STATUS[status] == 0 and require_target and summary["steps_to_target"] is None:
        return TARGET_MISSED
    return EXIT_STATUS[status]


def finish(run: Any, log: RunLog, summary: dict[str, Any], tokens: int, sample: Callable[[], str]) -> None:
    """Complete and write the summary; end the terminal's output with what people look for, and a sample.

    run: the trainer's Run; tokens: how many it has trained on; sample: makes a text with the model it has trained.
    """
    run.clock.switch("summary")
    config, machine, seconds = run.config, run.machine, run.clock.seconds
    tokens_per_s = tokens / seconds["train"] if seconds["train"] else 0.0
    peak = machine.peak_flops if machine.dtype == torch.bfloat16 else None
    if config.window_start or config.short_row_steps:  # FLOPs per token that change over the run
        peak = None
    mfu = run.model.flops_per_token() * tokens_per_s / (peak * machine.world_size) if peak else None
    summary.update(
        bits_per_byte=bits_per_byte(summary["val_loss"], config.val_tokens, summary["val_bytes"]),
        train_time_s=seconds["train"], tokens=tokens, tokens_per_s=tokens_per_s, mfu=mfu,
        peak_memory_mib=peak_memory_mib(machine.device), phase_s=dict(seconds), num_params=run.model.num_params(),
        neurons=run.neurons and run.neurons.state["last"], **log.facts,
    )  # fmt: skip
    log.summary(summary)
    log.closing(summary)
    writes = config.tokenizer != "none" and config.objective == "causal"
    if (machine.rank == 0 or config.fsdp) and writes and summary["status"] in (FINISHED, STOPPED):
        with contextlib.suppress(DataError, KeyboardInterrupt):  # no files of the tokenizer; no patience
            try:
                console.accept_stops()
                with run.averages.tail.in_place(), unsharded(run.model):
                    log.line(f"sample       {sample()}")
            except RuntimeError as error:
                if not lost_rank(error):  # a rank that left, or was lost, takes its shards along: complete without
                    raise
            finally:
                console.ignore_stops()


def is_complete(summary: dict[str, Any]) -> bool:
    """Whether a run has ended by itself, for good or bad, and not been cut short. Older summaries have the reason in
    the status."""
    return str(summary.get("status", "")).startswith((FINISHED, STOPPED, DIVERGED))


def exit_status_before(error: BaseException) -> int:
    """The exit status of a process that `error` ended before there was a run, told in a line on stderr. Raises the
    error itself if it is a fault of ours."""
    if isinstance(error, KeyboardInterrupt):
        console.ignore_stops()
        return EXIT_STATUS[INTERRUPTED]
    if isinstance(error, (ValueError, OSError)):  # OSError: a full disk
        print_error(str(error))
        return EXIT_STATUS[FAILED]
    if lost_rank(error):
        print_error(f"another rank was lost before training began ({lost_rank(error)})", event=LOST)
        return EXIT_STATUS[LOST]
    raise error


def raise_if_cut_short(summary: dict[str, Any], what: str) -> None:
    """KeyboardInterrupt for a run that was stopped, of which the trainer made a status, and ValueError, which names the
    run as `what`, for one that failed or lost a rank. A run that finished or diverged is a result."""
    if summary["status"] == INTERRUPTED:
        raise KeyboardInterrupt
    if summary["status"] in (FAILED, LOST):
        raise ValueError(f"{what}: {summary['status']} {summary['reason']}; nothing is reported")
