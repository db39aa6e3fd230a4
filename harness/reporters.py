"""A run's metrics for TensorBoard or Weights & Biases as well, which are optional packages (`report_to`).

Each number of metrics.jsonl goes there under its name, those inside others as extra/grad_norm or tasks/piqa/acc, by
step. TensorBoard's files lie in the run directory (tensorboard --logdir=runs). Weights & Biases writes there offline,
to be sent by `wandb sync`, unless WANDB_MODE says online.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from data.console import first_line

Service = Literal["tensorboard", "wandb"]


class Reporter(Protocol):
    def write(self, numbers: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory))
        self.writer.add_text("config", "\n".join(f"    {key} = {value!r}" for key, value in config.items()))

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _WandB:
    def __init__(self, directory: Path, config: Mapping[str, Any]) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self.run: Any = wandb.init(
            project="nanogpt-aurora", name=directory.name, dir=directory, config=dict(config), mode=mode
        )  # fmt: skip

        self.run.define_metric("*", step_metric="step")  # its own count is of calls

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log({**numbers, "step": step})

    def close(self) -> None:
        self.run.finish()


SERVICES: dict[str, type[_TensorBoard | _WandB]] = {"tensorboard": _TensorBoard, "wandb": _WandB}


def check_reporters(services: Sequence[Service]) -> None:
    """Raises ValueError where the package of one is missing."""
    for name in services:
        if find_spec(name) is None:
            raise ValueError(f"report_to = {name!r} needs a package: pip install {name}; or leave report_to out")


def open_reporters(services: Sequence[Service], directory: Path, config: Mapping[str, Any]) -> list[Reporter]:
    """Raises ValueError where one does not start."""
    found: list[Reporter] = []
    for name in services:
        try:
            found.append(SERVICES[name](directory, config))
        except Exception as error:  # whatever the package raises
            why = first_line(error)
            raise ValueError(f"report_to = {name!r} does not start ({why}); leave it out, or mend that") from None
    return found


def numbers_in(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number inside, by the path of its keys."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers_in(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{key}", value
