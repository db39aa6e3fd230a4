"""The model through torch.compile: block by block, or as one graph.

    compiled = compile_model(model, by_block=True)
    loss = compiled(inputs_BT, targets_BT, window)

One graph hands out all gradients at its end. Block by block, each block's are final as soon as backward has left it, so
that their reductions over the ranks travel while the blocks before it are still computed; and equal blocks share what
was compiled for the first of them. Hooks on blocks, such as those of torch's `fully_shard`, run between the graphs.
"""

import contextlib
import os
import tempfile
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.machine import ROOT
from model import GPT

# torch.compile gives up, quietly, after a few variants of one function, and runs the next as it is: not with these.
NEVER_EAGER: dict[str, Any] = {"recompile_limit": 256, "fail_on_recompile_limit_hit": True}


def compile_model(model: GPT, by_block: bool, **options: Any) -> Callable[..., Tensor]:
    """A function of the model's arguments. By block each block, the head with its loss, and what comes before the first
    block are graphs of their own. `options` are torch.compile's.

    The model itself stays as it was for everybody else: names of parameters, classes, and what it does when it is
    called directly. By block its methods are replaced for the length of a call alone; `fully_shard` may come before or
    after. (Activation checkpointing goes into a block, not around it: backward would make the block again uncompiled.)
    """
    prepare_compiler()
    if not by_block:
        return torch.compile(model, dynamic=False, **options)
    units: list[tuple[torch.nn.Module, str]] = [(model, "enter"), (model, "loss")]
    units += [(block, "forward") for block in model.blocks]
    graphs = [torch.compile(getattr(owner, name), dynamic=False, **options) for owner, name in units]

    def compiled(*arguments: Any) -> Any:
        with contextlib.ExitStack() as stack:
            for (owner, name), graph in zip(units, graphs, strict=True):
                setattr(owner, name, graph)  # hides the class's
                stack.callback(delattr, owner, name)
            return model(*arguments)

    return compiled


def prepare_compiler() -> None:
    """Have torch.compile keep what it makes where the next run finds it, and refuse to fall back to eager mode, which
    it does quietly after some number of shapes and windows."""
    chosen, folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", ""), ROOT / ".cache/inductor"
    default = f"{tempfile.gettempdir()}/torchinductor_"  # torch's, which it names when it is imported, begins so
    if not chosen or chosen.startswith(default):
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):  # else, in a checkout that is not ours to write, torch's default
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    for option, value in NEVER_EAGER.items():
        setattr(torch._dynamo.config, option, value)


def first_of_each(shape: Callable[[int], Any], steps: range) -> list[int]:
    """The first step of each shape, all of which are compiled beforehand; by bisection, as no shape comes back."""
    found = []
    while steps:
        now = shape(steps.start)
        found.append(steps.start)
        steps = steps[bisect_left(steps, True, key=lambda step: shape(step) != now) :]
    return found
