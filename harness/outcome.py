"""How a run comes out: its summary, the status in it, and the process's exit status."""

from pathlib import Path
from typing import Any

import torch

from data.shards import DataError
from harness.machine import lost_rank


def first_summary(run: Any, directory: Path) -> dict[str, Any]:
    """What is known before the first step, or of the steps before the checkpoint. run: the trainer's Run; directory:
    the run directory."""
    missed: dict[str, Any] = dict(time_to_target_s=None, steps_to_target=None, tokens_to_target=None)
    summary = dict(status="finished", val_loss=None, val_step=None, steps=0, **missed)
    if run.resumed:
        summary = dict(run.resumed["summary"])
        if run.resumed["config"]["target_loss"] != run.config.target_loss:
            summary.update(missed, val_step=None)
    return summary | dict(
        restarts=run.machine.restarts, resumed_from=run.start.path or None, job=run.machine.job,
        lineage=[*run.start.lineage, directory.name],
    )  # fmt: skip


def status_after(error: BaseException, step: int, micro_batch_tokens: int, checkpoint: str) -> str:
    """The status of a run that `error` ended at `step`, its newest checkpoint being `checkpoint` or "none". Raises the
    error itself if it is a fault of ours."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, FloatingPointError):
        return f"diverged by step {step}: {error}; last good checkpoint: {checkpoint}"
    if isinstance(error, (DataError, OSError)):
        return f"failed at step {step}: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"failed at step {step}: out of memory with micro_batch_tokens = {micro_batch_tokens}; a smaller one "
            "changes neither the batch nor the loss"
        )
    if lost_rank(error):
        go_on = "" if checkpoint == "none" else f" with --resume=auto to go on from {checkpoint}"
        return f"failed at step {step}: another rank was lost ({lost_rank(error)}); start the same command again{go_on}"
    raise error


def exit_status(summary: dict[str, Any], config: Any) -> int:
    """0, 1, 2, 3, 4 or 130, as at the top of train_gpt.py."""
    if summary["status"] == "interrupted":
        return 130
    if summary["status"].startswith("diverged"):
        return 1
    if summary["status"].startswith("failed"):
        return 4 if "another rank was lost" in summary["status"] else 2
    return 3 if config.require_target and summary["steps_to_target"] is None else 0


def raise_if_cut_short(summary: dict[str, Any], what: str) -> None:
    """Refuse a summary that is no result: KeyboardInterrupt for a run that was stopped, of which the trainer made a
    status, ValueError, which names the run as `what`, for one that failed or lost a rank. One that finished or diverged
    passes."""
    status = summary["status"]
    if status == "interrupted":
        raise KeyboardInterrupt
    if status.split(" ")[0] in ("failed", "lost"):
        raise ValueError(f"{what}: {': '.join(filter(None, (status, summary.get('reason'))))}; nothing is reported")
