"""What looks at the neurons cost: milliseconds of a training step and of a look, and the share at every 100 steps.

    python -m benchmarks.neuron_stats_cost configs/sotu_cpu.toml

Each training step has a look around it, so that both are timed in turn, on real updates. A look is the copy of the
weights before the step and all that `neuron_stats.NeuronStats.look` does after it, the validation batch included.
"""

import dataclasses
import statistics
import time
from dataclasses import dataclass

import torch
import tyro
from tqdm import tqdm

from benchmarks.bench import command, report
from data.files import user_path
from harness.machine import find_machine
from harness.neuron_stats import NeuronStats
from train_gpt import load_config, plan_step, set_up, train_step, validation, warm_up


@dataclass(frozen=True)
class Args:
    recipe: tyro.conf.Positional[str] = "configs/sotu_cpu.toml"
    """The model, batch and data to time."""
    steps: int = 40
    """Training steps, each with a look; the table has medians over them."""
    every: int = 100
    """Steps between looks for which the cost is given."""


def main(args: Args) -> None:
    config = load_config([str(user_path(args.recipe)), "--checkpoint_every=0", "--resume="])
    run = set_up(config, find_machine(config.device, config.dtype))
    stats, device = NeuronStats(run.model), run.machine.device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    warm_up(run)
    step_s, look_s = list[float](), list[float]()
    for step in tqdm(range(args.steps + 2), unit="step", leave=False, disable=None):
        run.follow(plan_step(config, step))
        batch = run.batch()
        start = now()
        stats.before_step()
        copied = now()
        train_step(run, *batch)
        trained = now()
        stats.measure(step + 1, *next(validation(config, run.machine, run.val_stream)))
        step_s.append(trained - copied)
        look_s.append(now() - trained + copied - start)
    run.loader.close()
    step_ms, look_ms = (1e3 * statistics.median(times[2:]) for times in (step_s, look_s))  # without the first updates
    row = {
        "recipe": args.recipe, "matrix_optimizer": config.matrix_optimizer, "step_ms": step_ms, "look_ms": look_ms,
        "look_over_step": look_ms / step_ms, "cost_%": 100 * look_ms / (step_ms * args.every),
    }  # fmt: skip
    report("neuron_stats", [row], str(device), **dataclasses.asdict(args), dtype=str(run.machine.dtype))


if __name__ == "__main__":
    command(main, Args, __doc__)
