"""Start the trainer on this node: missing data first, then torchrun with one process a GPU (one on a CPU machine).

    python launch.py configs/fineweb_124m_aurora.toml --matrix_lr=0.03

Differs from calling torchrun in three ways: whatever is wrong with the settings or the data is said in one line before
any process starts, the exit status is the trainer's own (see train_gpt.py) instead of 1, and when a rank or a node was
lost (status 4) the last line says what to do.

From the environment, as torchrun names them: NPROC_PER_NODE (default: the GPUs of this node, else 1), MAX_RESTARTS
(default 0: times that the ranks are started again, from their last checkpoint, when one of them fails), and for
several nodes NNODES and RDZV_ENDPOINT=host:port, the same on every node (torchrun numbers the nodes itself).
"""

import os
import signal
import sys
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import parse_args, run

from data.loader import tokens_before
from data.prepare import ensure
from machine import check_device
from runlog import ROOT
from train_gpt import Config, load_config


def torchrun_arguments(config: Config, environment: dict[str, str]) -> list[str]:
    """torchrun's options for this node. Raises ValueError for a variable that is no number or a missing endpoint."""
    default = torch.cuda.device_count() if config.device != "cpu" else 0
    numbers = {"NPROC_PER_NODE": max(1, default), "NNODES": 1, "MAX_RESTARTS": 0}
    for name in numbers:
        value = environment.get(name, str(numbers[name]))
        if not value.isdigit() or (int(value) < 1 and name in ("NPROC_PER_NODE", "NNODES")):
            raise ValueError(f"{name} = {value!r} must be a whole number, such as {numbers[name]}")
        numbers[name] = int(value)
    arguments = [f"--nproc_per_node={numbers['NPROC_PER_NODE']}", f"--max_restarts={numbers['MAX_RESTARTS']}"]
    if numbers["NNODES"] == 1:
        return [*arguments, "--standalone"]
    if ":" not in environment.get("RDZV_ENDPOINT", ""):
        raise ValueError(f"NNODES = {numbers['NNODES']} needs RDZV_ENDPOINT=host:port, the same on every node")
    arguments += [f"--nnodes={numbers['NNODES']}", "--rdzv_backend=c10d"]
    return [*arguments, f"--rdzv_endpoint={environment['RDZV_ENDPOINT']}", "--rdzv_id=nanogpt-aurora"]


def first_cause(failures: Iterable[ProcessFailure]) -> ProcessFailure:
    """The failure that the others followed from; torchrun orders them by whole seconds alone.

    When a rank is gone, the rest end with 4 as they notice, or are stopped by torchrun (130, or SIGTERM).
    """
    followed = (4, 130, -signal.SIGTERM)
    return min(failures, key=lambda failure: (failure.exitcode in followed, failure.exitcode != 4, failure.timestamp))


def main(argv: list[str]) -> int:
    try:
        config = load_config(argv)
        check_device(config.device, config.dtype)
        arguments = torchrun_arguments(config, dict(os.environ))
        ensure(
            config.train_files,
            config.val_files,
            tokens_before(config.train_steps, config.batch_tokens, config.small_batch_steps) + 1,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what data there is", file=sys.stderr)
        return 130
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # a store for each attempt; see fresh_store in machine.py
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
    everywhere = " on every node" if int(os.environ.get("NNODES", 1)) > 1 else ""
    print(f"error: {cause}; start the same command again{everywhere} {again}", file=sys.stderr)
    return 4


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
