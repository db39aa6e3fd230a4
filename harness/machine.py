"""The machine a process runs on: its rank, its device, the dtype it multiplies in, and the clock of its run."""

import contextlib
import hashlib
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data.processes import start_ticks
from optim.polar import fast_half_dtype

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]

# Dense bfloat16 FLOP/s with float32 accumulation, from the vendor's data sheets (sparsity not counted); the first
# name that the device's name contains. A device that is not here has no MFU.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "RTX 5090": 209e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of matrix products
    notes: tuple[str, ...]  # decisions that a reader of the log should know
    restarts: int = 0  # times that torchrun has started this job's ranks anew
    job: tuple[str, ...] = ()  # torchrun's agents, the same over its restarts; none without torchrun

    @property
    def name(self) -> str:
        return device_name(self.device)

    @property
    def peak_flops(self) -> float | None:
        """bfloat16 FLOP/s of one device, None where it is not known."""
        if self.device.type != "cuda":
            return None
        return next((peak for name, peak in PEAK_FLOPS.items() if name in self.name), None)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(value)
        return value

    def share(self, value: T | None) -> T | None:
        """What one rank knows, known to all: the first value that is not None, in the order of the ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return next((known for known in values if known is not None), None)

    def least(self, value: int) -> int:
        """The smallest of the ranks' values, known to all."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return min(values)

    def raise_together(self, problem: str | None) -> None:
        """ValueError on every rank if there is a problem on one; to be called by all."""
        if shared := self.share(problem):
            raise ValueError(shared)


def check_device(device: str, dtype: str) -> None:
    """ValueError unless this machine has what the settings `device` and `dtype` ask for."""
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"device = {device!r} is unknown; choose auto, cuda or cpu")
    if dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"dtype = {dtype!r} is unknown; choose auto, bfloat16 or float32")
    if device == "cuda" and not torch.cuda.is_available():
        instead = "train on a machine with one, or on this CPU, which is many times slower, with --device=cpu"
        raise ValueError(f"device = 'cuda', but {why_no_gpu()}; {instead}")


def why_no_gpu() -> str:
    """What keeps torch from a CUDA GPU, as far as that can be told."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this build of torch ({torch.__version__}) is for CPUs alone"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "torch finds no CUDA GPU" + ("" if hidden is None else f" with CUDA_VISIBLE_DEVICES={hidden!r}")


def place_among_ranks() -> tuple[int, int, int] | None:
    """(rank, world size, rank on this node) as torchrun's variables tell them; None for a process that is alone.

    Raises ValueError if RANK and WORLD_SIZE tell of other ranks, but not how to find them.
    """
    numbers = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")]
    if all(number.isdecimal() for number in numbers) and os.environ.get("MASTER_ADDR"):
        rank, world_size, local_rank, port = map(int, numbers)
        if rank < world_size and 1 <= port <= 65535:
            return rank, world_size, local_rank
    elif "" in numbers[:2] or numbers[:2] == ["0", "1"]:
        return None
    raise ValueError(
        f"RANK={numbers[0]} and WORLD_SIZE={numbers[1]} in the environment tell of other processes, but all of RANK, "
        "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are needed, RANK below WORLD_SIZE, MASTER_PORT from 1 to "
        "65535; start with ./run.sh or torchrun, which set them, or unset RANK WORLD_SIZE to train in one process"
    )


def find_machine(device: str, dtype: str) -> Machine:
    """This process's place by torchrun's variables (alone without them); joins the other ranks.

    device: auto, cuda or cpu; dtype: auto, bfloat16 or float32. Raises ValueError for what is not there.
    """
    check_device(device, dtype)
    notes = []
    launched_as = place_among_ranks()
    rank, world_size, local_rank = launched_as or (0, 1, 0)
    if not launched_as and (left := [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if os.environ.get(name)]):
        notes.append(f"one process alone: {' '.join(left)} of the environment, without the rest, not obeyed")
    if device != "cpu" and torch.cuda.is_available():
        num_gpus = torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise ValueError(f"a rank has no GPU of its own; set NPROC_PER_NODE={num_gpus} or less")
        place = torch.device("cuda", local_rank)
        torch.cuda.set_device(place)
    else:
        place = torch.device("cpu")
        if device == "auto" and shutil.which("nvidia-smi"):
            notes.append(f"device = 'auto' is the CPU, as {why_no_gpu()}")
    fastest = fast_half_dtype(place.type)
    chosen = fastest if dtype == "auto" else getattr(torch, dtype)
    if chosen == torch.bfloat16 and fastest == torch.float32:
        chosen = torch.float32
        notes.append(f"dtype = 'bfloat16' was asked for, but this {place.type} has no bfloat16 units")
    notes.append(f"matrix products in {chosen}, parameters in torch.float32".replace("torch.", ""))
    if world_size > 1:
        if os.environ.get("LOCAL_WORLD_SIZE") == str(world_size):  # one machine: gloo need not look its name up
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        on_gpu = place.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=fresh_store(world_size), rank=rank, world_size=world_size,
            device_id=place if on_gpu else None,
        )  # fmt: skip
    launched = [(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), launcher()) if launched_as else (0, "")]
    if world_size > 1:  # a node that came back counts from 0 again, and not every node has the first rank's agent
        launched *= world_size
        dist.all_gather_object(launched, launched[0])
    job = sorted({agent for _, agent in launched if agent})
    return Machine(rank, world_size, place, chosen, tuple(notes), max(count for count, _ in launched), tuple(job))


def fresh_store(world_size: int) -> Any:
    """Where ranks find each other, without what an earlier attempt left; None: torch's own, which is fresh then.

    torchrun's agent shares one store with all attempts of its ranks, so that a second restart would find addresses of
    the first's. This helps where every node has restarted as often; harness/launch.py avoids that store altogether.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, world_size, is_master=False)  # type: ignore[attr-defined]
    attempt = f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    return dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]


def launcher() -> str:
    """torchrun's agent, which is our parent and outlives its ranks: run id, host, pid and start. Empty without one.

    The run id alone will not do: on several nodes it is the same for every job, unless its user thought of that.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    parent = os.getppid()
    return "/".join([os.environ["TORCHELASTIC_RUN_ID"], platform.node(), str(parent), start_ticks(parent)])


def lost_rank(error: BaseException) -> str:
    """The reason in few words if a collective failed because another rank is gone; empty for any other error.

    gloo has no type of its own for that: a RuntimeError that begins with the place in gloo's source.
    """
    text = " ".join(str(error).split())
    if not isinstance(error, dist.DistError) and "/gloo/" not in text:
        return ""
    return re.sub(r"^\[[^]]*gloo[^]]*\] ", "", text).split(". This is typically")[0][:200]


def print_error(text: str, event: str = "") -> None:
    """Print one line that begins with `error:`, unless another rank of this node has done so in this attempt.

    Ranks that end of the same thing have the same text, or name the same `event`. torchrun gives every attempt of its
    ranks, which are its children, a folder; without one, or where another process left it, each speaks for itself.
    """
    try:
        if place_among_ranks() and (file := os.environ.get("TORCHELASTIC_ERROR_FILE")):
            said = f"{os.getppid()} {event or text}".encode(errors="surrogateescape")
            (Path(file).parent.parent / f"said_{hashlib.sha256(said).hexdigest()}").touch(exist_ok=False)
    except FileExistsError:
        return
    except (ValueError, OSError):  # no place among ranks; no such folder: an outer launcher's
        pass
    print(f"error: {text}", file=sys.stderr)


class Clock:
    """Wall-clock seconds by phase; exactly one phase runs at a time. Only `train` counts towards a target."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.phase, self.seconds = device, "setup", defaultdict[str, float](float)
        self._start = time.perf_counter()

    def switch(self, phase: str) -> None:
        """Wait for the device, book the time since the last switch to the phase that ends, enter another. From a phase
        into itself it does nothing: step after step of training, the device is never waited for."""
        if phase == self.phase:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[self.phase] += now - self._start
        self.phase, self._start = phase, now


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what is computed."""
    result = {"python": platform.python_version(), **dict.fromkeys(("torch", "triton", "numpy", "tiktoken"), "none")}
    for package in [*result][1:]:
        with contextlib.suppress(PackageNotFoundError):
            result[package] = version(package)
    return result


def output_of(*command: str) -> str:
    """What a command prints; empty if it is missing or fails."""
    return _call(*command)[0]


def git_commit() -> str:
    """The commit this was run from, ending in -dirty when files have changed since; empty where there is none."""
    return git_state()[0]


def git_state() -> tuple[str, str]:
    """(commit, "") as `git_commit` says it, or ("", why there is none): only a checkout of its own has one."""
    top, problem = _call("git", "rev-parse", "--show-toplevel")
    if not problem and Path(top).resolve() != ROOT:
        problem = f"{ROOT} is no checkout of its own, it lies in that of {top}"
    if not problem and _call("git", "cat-file", "-e", "HEAD:train_gpt.py")[1]:
        problem = f"the git repository in {ROOT} has no commit of these files"
    if problem:
        return "", problem
    return _call("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _call(*command: str) -> tuple[str, str]:
    """What a command prints, run in the checkout, and why it prints nothing, each empty in the other's case.

    git looks at the checkout, whatever its variables name (in a hook of another repository, say), and writes nothing.
    """
    misleading = [key for key in os.environ if key.startswith("GIT_") and not key.startswith("GIT_CONFIG")]
    variables = {key: value for key, value in os.environ.items() if key not in misleading}
    try:
        result = subprocess.run(
            command, cwd=ROOT, env={**variables, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, encoding="utf-8", errors="replace", check=False,
        )  # fmt: skip
    except OSError as error:
        return "", f"{command[0]} cannot be started ({error.strerror})"
    if result.returncode:
        return "", " ".join(result.stderr.removeprefix("fatal: ").split()) or f"{command[0]} failed"
    return result.stdout.strip(), ""


def peak_memory_mib(device: torch.device) -> float:
    """Most memory this process has held: on the GPU, or resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there and in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
