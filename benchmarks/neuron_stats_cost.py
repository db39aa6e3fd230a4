"""Cost of neuron statistics: milliseconds of a training step and of a measurement, and the share of a run's schedule.

    python -m benchmarks.neuron_stats_cost configs/sotu_base.toml

Each training step has a measurement around it, so that both are timed in turn, on real updates. A measurement is the
copy of the weights before the step and all that harness/neuron_stats.py does after it, the validation batch included;
the last one of a schedule also prunes.
"""

import dataclasses
from dataclasses import dataclass

from data.files import user_path
from harness.machine import find_machine
from harness.neuron_stats import NeuronStats
from harness.results import command, report
from harness.step_timer import median_seconds
from train_gpt import load_config, set_up, train_step, validation, warm_up


@dataclass(frozen=True)
class Args:
    recipe: str = "configs/sotu_base.toml"  # the model, batch and data to time
    steps: int = 40  # training steps, each with a measurement; the table has medians over them
    every: int = 100  # steps between measurements, for the cost of a whole schedule


def main(args: Args) -> None:
    config = load_config([str(user_path(args.recipe)), "--checkpoint_every=0", "--resume="])
    run = set_up(config, find_machine(config.device, config.dtype))
    stats, device = NeuronStats(run.model, run.optimizers, last_step=2), run.machine.device
    warm_up(run)
    batch = run.batch()

    def measure(step: int) -> None:
        stats.measure(step, *next(validation(config, run.machine, run.val_stream)))

    work = {
        "copy": stats.before_step,
        "step": lambda: train_step(run, *batch),
        "look": lambda: measure(1),
        "copy again": stats.before_step,
        "last": lambda: measure(2),
    }
    seconds = median_seconds(work, args.steps, warmups=2, device=device)  # the first updates are not as later ones
    run.loader.close()
    step_ms, copy_ms = (1e3 * seconds[name].wall for name in ("step", "copy"))
    look_ms, last_ms = (copy_ms + 1e3 * seconds[name].wall for name in ("look", "last"))
    num_before = max(0, config.train_steps // args.every - 1)
    row = {
        "recipe": args.recipe, "matrix_optimizer": config.matrix_optimizer, "step_ms": step_ms, "look_ms": look_ms,
        "last_look_ms": last_ms, "look_over_step": look_ms / step_ms, "train_steps": config.train_steps,
        "cost_%": 100 * (num_before * look_ms + last_ms) / (step_ms * config.train_steps),
    }  # fmt: skip
    report("neuron_stats", [row], str(device), **dataclasses.asdict(args), dtype=str(run.machine.dtype))


if __name__ == "__main__":
    command(main, Args, __doc__)
