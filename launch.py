"""Start the trainer on this node: missing data first, then torchrun with one process a GPU (one on a CPU machine).

    python launch.py configs/fineweb_124m_aurora.toml --matrix_lr=0.03

Differs from calling torchrun in two ways: whatever is wrong with the settings or the data is said in one line before
any process starts, and the exit status is the trainer's own (see train_gpt.py) instead of 1.

From the environment, as torchrun names them: NPROC_PER_NODE (default: the GPUs of this node, else 1), and for
several nodes NNODES, NODE_RANK and RDZV_ENDPOINT=host:port, the same endpoint on every node.
"""

import os
import sys

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from data.prepare import ensure
from machine import check_device
from runlog import ROOT
from train_gpt import Config, load_config


def torchrun_arguments(config: Config, environment: dict[str, str]) -> list[str]:
    """torchrun's options for this node. Raises ValueError for a variable that is no number or a missing endpoint."""
    default = torch.cuda.device_count() if config.device != "cpu" else 0
    numbers = {"NPROC_PER_NODE": max(1, default), "NNODES": 1, "NODE_RANK": 0}
    for name in numbers:
        value = environment.get(name, str(numbers[name]))
        if not value.isdigit() or (int(value) < 1 and name != "NODE_RANK"):
            raise ValueError(f"{name} = {value!r} must be a whole number, such as {numbers[name]}")
        numbers[name] = int(value)
    arguments = [f"--nproc_per_node={numbers['NPROC_PER_NODE']}"]
    if numbers["NNODES"] == 1:
        return [*arguments, "--standalone"]
    if ":" not in environment.get("RDZV_ENDPOINT", ""):
        raise ValueError(f"NNODES = {numbers['NNODES']} needs RDZV_ENDPOINT=host:port, the same on every node")
    arguments += [f"--nnodes={numbers['NNODES']}", f"--node_rank={numbers['NODE_RANK']}", "--rdzv_backend=c10d"]
    return [*arguments, f"--rdzv_endpoint={environment['RDZV_ENDPOINT']}", "--rdzv_id=nanogpt-aurora"]


def main(argv: list[str]) -> int:
    try:
        config = load_config(argv)
        check_device(config.device, config.dtype)
        arguments = torchrun_arguments(config, dict(os.environ))
        ensure(config.train_files, config.val_files, config.train_steps * config.batch_tokens + 1)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what data there is", file=sys.stderr)
        return 130
    try:
        run(parse_args([*arguments, str(ROOT / "train_gpt.py"), *argv]))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except (SignalException, KeyboardInterrupt):
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
