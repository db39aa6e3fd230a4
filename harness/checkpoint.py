"""Checkpoints: everything a run needs to go on, in one file that is either whole or absent.

A file is written under a temporary name, flushed to the disk and renamed. torch.save makes a zip archive with a
checksum for each tensor, so a file that was cut or changed since is noticed when it is read.
"""

import contextlib
import copy
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from data.files import whole_file
from harness.machine import Machine
from optim.averages import averaged
from optim.shards import gathered, local, shard_like

State = dict[str, Any]
DAMAGE = (
    OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, pickle.UnpicklingError,
    zipfile.BadZipFile,
)  # fmt: skip
NAME, TEMPORARY = re.compile(r"checkpoint_\d+\.pt"), re.compile(r"checkpoint_\d+(\.pt)?(\.\d+)?\.tmp")


class CheckpointWriter:
    """Writes a run's checkpoints and keeps the last few. `newest` is the path of the last one that is on the disk.

    Every rank makes one and calls `save` and `settle` at the same steps; the first rank writes.
    in_thread: tensors are copied to host memory at once and a thread writes them while training goes on.
    earlier: checkpoints of the same run in older run directories, oldest first, that count and are deleted in turn.
    A write that fails raises OSError on every rank: at once, or in a thread at the next `save` or `settle`.
    """

    def __init__(
        self, directory: Path, keep: int, in_thread: bool, machine: Machine, earlier: Sequence[Path] = (),
        newest: str = "none",
    ) -> None:  # fmt: skip
        self.directory, self.keep, self.in_thread, self.machine = directory, keep, in_thread, machine
        self.earlier, self.newest = list(earlier), newest
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._write: Future[None] | None = None
        self._path = directory

    def save(self, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], **extra: Any) -> None:
        """Write `checkpoint_<step>.pt`. `extra` holds plain values and tensors.

        Raises FloatingPointError, and writes nothing, if a weight is not finite.
        """
        bad = next((name for name, p in model.named_parameters() if not local(p).isfinite().all()), None)
        if bad := self.machine.share(bad):
            raise FloatingPointError(f"{bad} holds NaN or infinity, so no checkpoint was written")
        is_writer = self.machine.rank == 0
        # On every rank: it gathers what is in shards. The others keep none, and hold one optimizer's state at a time.
        states = [gathered(optimizer.state_dict(), is_kept=is_writer) for optimizer in optimizers]
        weights, extra = (gathered(each, is_kept=is_writer) for each in (dict(model.state_dict()), extra))
        self.settle()
        self._path = self.directory / f"checkpoint_{step:06d}.pt"
        if is_writer:
            # torch's generators; every rank draws the same numbers, so the first rank's are everyone's
            gpu = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
            rng = dict(cpu=torch.get_rng_state(), cuda=gpu)
            state = dict(step=step, model=weights, optimizers=states, rng=rng, **extra)
            self._write = self._thread.submit(self._write_file, self._path, to_host(state) if self.in_thread else state)
        if not self.in_thread:
            self.settle()

    def settle(self) -> None:
        """Wait for the write under way, if there is one. Its failure is raised here, on every rank."""
        failure = self.machine.share(self.wait())
        if failure:
            raise OSError(failure)

    def wait(self) -> str | None:
        """As `settle` for this rank alone, for a run that ends early: returns why the write failed, or None."""
        write, self._write = self._write, None
        try:
            if write:
                write.result()
            self._thread.submit(int).result()  # also one that a stop kept from being noted above
        except OSError as error:
            rest = "older checkpoints are as they were; make room, or choose another run_dir"
            return f"{self._path} could not be written ({error.strerror or error}); {rest}"
        if self._path.is_file():
            self.newest = str(self._path)
        return None

    def _write_file(self, path: Path, state: State) -> None:
        try:
            with whole_file(path, "wb") as file:
                torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch's writer trips over what the disk had said
                raise error.__context__ from None
            raise
        self._delete_old()

    def _delete_old(self) -> None:
        """As far as that can be done: what cannot be deleted takes up room, and that is all."""
        with contextlib.suppress(OSError):
            kept = [*self.earlier, *checkpoints_in(self.directory)][-self.keep :]
            for folder in dict.fromkeys([self.directory, *(old.parent for old in self.earlier)]):
                half_written = (path for path in folder.iterdir() if TEMPORARY.fullmatch(path.name))
                for old in {*checkpoints_in(folder), *half_written} - {*kept}:
                    with contextlib.suppress(OSError):
                        old.unlink()


def checkpoints_in(directory: Path) -> list[Path]:
    """The checkpoints that a run has written there, oldest first; copies by other names are their makers'."""
    return sorted((path for path in directory.glob("checkpoint_*.pt") if NAME.fullmatch(path.name)), key=step_of)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("checkpoint_"))


def read_checkpoint(path: Path | str, mapped: bool = True) -> State:
    """All that a checkpoint holds, on the CPU; mapped: tensors are read from the file when they are used.

    Raises ValueError with the reason if it cannot be read; checksums are looked at by `verify` alone. A name that the
    locale cannot express is no damage: OSError.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:  # torch maps the file whose name these letters are in UTF-8, which is not this one
        mapped = False
    try:
        state: State = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
        _ = state["step"], state["model"]
    except UnicodeEncodeError as error:
        raise OSError(f"{path} cannot be opened ({error})") from None
    except DAMAGE as error:
        raise ValueError(_reason(error)) from None
    return state


def _reason(error: BaseException) -> str:
    """What a library said, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def verify(path: Path | str) -> None:
    """Read the whole file. Raises ValueError with the reason if any part differs from what was written."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except DAMAGE as error:
        raise ValueError(_reason(error)) from None
    if damaged:
        raise ValueError(f"checksum of {damaged} is wrong")


def load_checkpoint(
    path: str, model: nn.Module, optimizers: list[torch.optim.Optimizer], device: torch.device
) -> State:
    """Put a checkpoint into model, optimizers and random state; returns the rest of it.

    Hyperparameters stay those of `optimizers`, so that a run can go on with others. Raises ValueError when it does
    not fit.
    """
    asked = [[dict(group) for group in optimizer.param_groups] for optimizer in optimizers]
    try:
        state = read_checkpoint(path, mapped=device.type == "cuda")  # elsewhere optimizers may keep these very tensors
        own = model.state_dict()
        model.load_state_dict({name: shard_like(value, own.get(name)) for name, value in state.pop("model").items()})
        for optimizer, saved in zip(optimizers, state.pop("optimizers"), strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"]["cpu"])
        if device.type == "cuda" and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"], device)
    except DAMAGE as error:
        problem = f"not a checkpoint of this model and optimizer ({_reason(error)})"
        raise ValueError(f"resume = {path!r}: {problem}") from None
    for optimizer, groups in zip(optimizers, asked, strict=True):
        for group, values in zip(optimizer.param_groups, groups, strict=True):
            group.update(values)
    return state


def evaluated_weights(state: State) -> dict[str, Tensor]:
    """The weights of a checkpoint whose loss its run has validated, as the model's state dict: averaged ones where it
    has an average. To go on training takes state["model"]."""
    weights, share = state["model"], state.get("config", {}).get("average_share")
    return weights | {name: averaged(weights[name], mean, share) for name, mean in state.get("average", {}).items()}


class Stateful(Protocol):
    """An optimizer, or what else has a state."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


@contextlib.contextmanager
def unchanged(model: nn.Module, others: Sequence[Stateful], device: torch.device) -> Iterator[None]:
    """A block that leaves no trace in model, optimizers and what else is trained, and random state."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    states = [copy.deepcopy(each.state_dict()) for each in others]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    model.load_state_dict(weights)
    for each, before in zip(others, states, strict=True):
        each.load_state_dict(before)


def to_host(value: Any) -> Any:
    """The same tree with every tensor copied to host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: to_host(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(to_host, value))
    return value
