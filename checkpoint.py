"""Checkpoints: everything a run needs to go on, in one file that is either whole or absent."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

KEPT = 2  # newest checkpoints left in a run directory


def save_checkpoint(
    directory: Path, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], **extra: Any
) -> Path:
    """Write `checkpoint_<step>.pt` under a temporary name, flush it to the disk, rename it, delete older ones.

    `extra` holds plain values and tensors. Raises FloatingPointError, and writes nothing, if a weight is not finite.
    """
    for name, p in model.named_parameters():
        if not p.isfinite().all():
            raise FloatingPointError(f"{name} holds NaN or infinity, so no checkpoint was written")
    states = [optimizer.state_dict() for optimizer in optimizers]
    path = directory / f"checkpoint_{step:06d}.pt"
    with path.with_suffix(".tmp").open("wb") as file:
        torch.save(dict(step=step, model=model.state_dict(), optimizers=states, **extra), file)
        file.flush()
        os.fsync(file.fileno())
    path.with_suffix(".tmp").rename(path)
    for old in sorted(directory.glob("checkpoint_*.pt"))[:-KEPT]:
        old.unlink()
    return path


def load_checkpoint(
    path: str, model: nn.Module, optimizers: list[torch.optim.Optimizer], device: torch.device
) -> dict[str, Any]:
    """Put a checkpoint into model and optimizers; returns all it holds. Raises ValueError when it does not fit."""
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"resume = {path!r}: not a checkpoint of this model and optimizer ({reason})") from None
    return state
