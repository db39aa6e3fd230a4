"""Start the trainer on this node: missing data first, then torchrun with one process per GPU (one on a CPU machine).

    python -m harness.launch configs/fineweb_124m_aurora.toml --matrix_lr=0.03

Differs from calling torchrun in five ways: whatever is wrong with the settings or the data is said in one line before
any process starts, the exit status is the trainer's own (see train_gpt.py) instead of 1, when a rank or a node was
lost (status 4) the last line says what to do, a signal that the parent ignores (nohup) stays ignored, and what other
launchers left in the environment is not obeyed.

From the environment, as torchrun names them: NPROC_PER_NODE (default: the GPUs of this node, else 1), MAX_RESTARTS
(default 0: times that the ranks are started again, from their last checkpoint, when one of them fails), and for
several nodes NNODES and RDZV_ENDPOINT=host:port, the same on every node (torchrun numbers the nodes itself). One
node asks no name service for its own name, and has torchrun's own log only with LOGLEVEL=WARNING or MAX_RESTARTS.
"""

import logging
import os
import re
import signal
import socket
import sys
import uuid
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

from data import console
from data.prepare import ensure
from harness.machine import ROOT, check_device
from train_gpt import Config, load_config, plan_step
from train_gpt import main as train

# How launchers tell a process its place, and torchrun its options, its program and its folder for errors.
OF_LAUNCHERS = re.compile(
    r"PET_.*|TORCHELASTIC_.*|MASTER_(ADDR|PORT)|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|PYTHON_EXEC"
)


def torchrun_arguments(config: Config, environment: dict[str, str]) -> list[str]:
    """torchrun's options for this node. Raises ValueError for a variable that is no number or no endpoint.

    An empty variable is one that is not set.
    """
    default = torch.cuda.device_count() if config.device != "cpu" else 0
    numbers = {"NPROC_PER_NODE": max(1, default), "NNODES": 1, "MAX_RESTARTS": 0}
    for name, usual in numbers.items():
        value = environment.get(name) or str(usual)
        if not value.isdecimal() or (int(value) < 1 and name != "MAX_RESTARTS"):
            raise ValueError(f"{name} = {value!r} must be a whole number, such as {usual}")
        numbers[name] = int(value)
    arguments = [f"--nproc_per_node={numbers['NPROC_PER_NODE']}", f"--max_restarts={numbers['MAX_RESTARTS']}"]
    arguments += ["--rdzv_backend=c10d"]
    if numbers["NNODES"] == 1:  # as --standalone has it, but for looking up this machine's name
        return [*arguments, "--rdzv_endpoint=127.0.0.1:0", "--local_addr=127.0.0.1", f"--rdzv_id={uuid.uuid4()}"]
    endpoint = environment.get("RDZV_ENDPOINT", "")
    found = re.fullmatch(r".+:([0-9]+)", endpoint)
    if not found or not 1 <= int(found[1]) <= 65535:
        rule = "the same on every node, with a port from 1 to 65535, such as node0:29500"
        raise ValueError(f"NNODES = {numbers['NNODES']} needs RDZV_ENDPOINT=host:port, {rule}; it is {endpoint!r}")
    return [*arguments, f"--nnodes={numbers['NNODES']}", f"--rdzv_endpoint={endpoint}", "--rdzv_id=nanogpt-aurora"]


def quieten(package: str) -> None:
    """Take the log of a package away: torchrun's repeats what a rank has said, or the last line here will say."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(package):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def first_cause(failures: Iterable[ProcessFailure]) -> ProcessFailure:
    """The failure that the others followed from; torchrun orders them by whole seconds alone.

    When a rank is gone, the rest end with 4 as they notice, or are stopped by torchrun (130, or SIGTERM).
    """
    followed = (4, 130, -signal.SIGTERM)
    return min(failures, key=lambda failure: (failure.exitcode in followed, failure.exitcode != 4, failure.timestamp))


def main(argv: list[str]) -> int:
    return console.run(lambda: _main(argv), "the same command goes on with what data there is")


def _main(argv: list[str]) -> int:
    config = load_config(argv)
    if config.dry_run:  # in this process, and without data
        return train(argv)
    check_device(config.device, config.dtype)
    arguments = torchrun_arguments(config, dict(os.environ))
    unit = config.batch_tokens if config.shard_tail == "drop" else 0
    ensure(config.train_files, config.val_files, plan_step(config, config.train_steps).first_token, unit)
    if names := sorted(name for name in os.environ if OF_LAUNCHERS.fullmatch(name)):
        told = f"not obeyed, as they are of another launcher: {' '.join(names)}"
        print(f"{told} (see harness/launch.py)", file=sys.stderr)
    for name in names:
        del os.environ[name]
    is_alone = int(os.environ.get("NNODES") or 1) == 1
    if is_alone:  # torchrun looks the name up for every rank, which takes long where nobody knows it
        socket.getfqdn = lambda name="": name or socket.gethostname()
    if is_alone and "--max_restarts=0" in arguments and not os.environ.get("LOGLEVEL"):
        quieten("torch.distributed.elastic")
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # a store for each attempt, see machine.fresh_store
    # torchrun takes over the signals named here, also those that its parent ignores; no signal is no list
    stops = [stop.name for stop in console.STOPS if signal.getsignal(stop) != signal.SIG_IGN]
    os.environ["PET_SIGNALS_TO_HANDLE"] = ",".join(stops or ["SIGUSR2"])
    try:
        run(parse_args([*arguments, str(ROOT / "train_gpt.py"), *argv]))
        return 0
    except ChildFailedError as error:
        failure = first_cause(error.failures.values())
        if failure.exitcode >= 0 and failure.exitcode != 4:
            return failure.exitcode
        cause = "another node or rank was lost" if failure.exitcode == 4 else f"a rank died of {failure.signal_name()}"
    except (RendezvousError, dist.DistError) as error:
        cause = f"the node that holds RDZV_ENDPOINT, or too many others, cannot be reached ({type(error).__name__})"
    except (SignalException, KeyboardInterrupt):
        return 130
    again = "with --resume=auto" if config.checkpoint_every else "(without checkpoints, from the start)"
    everywhere = "" if is_alone else " on every node"
    print(f"error: {cause}; start the same command again{everywhere} {again}", file=sys.stderr)
    return 4


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
