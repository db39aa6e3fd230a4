"""Tasks while a model trains: `eval_every`, off the clock."""

from dataclasses import dataclass
from typing import Annotated, Any

from harness.fsdp import unsharded
from harness.runlog import RunLog
from inference.load import Loaded
from inference.tasks import Outcome, run_task, tasks_of


@dataclass(frozen=True)
class TasksConfig:
    # Tasks
    eval_every: Annotated[int, ">= 0"] = 0  # steps between evaluations on eval_tasks, off the clock; 0: none
    eval_tasks: tuple[str, ...] = ()  # files of tasks or hub:NAME, as of ./run.sh evaluate
    eval_limit: Annotated[int, ">= 0"] = 0  # first items of each task; 0: all

    def check_tasks(self) -> None:
        """Raises ValueError for tasks that are never looked at, or none to look at."""
        if bool(self.eval_every) != bool(self.eval_tasks):
            found = f"eval_every = {self.eval_every}, eval_tasks = {','.join(self.eval_tasks)!r}"
            raise ValueError(f"{found}: set both, such as --eval_every=500 --eval_tasks=piqa.jsonl, or neither")


class TrainingTasks:
    """Raises ValueError or OSError for files that are none of tasks, and for a model that writes no text."""

    def __init__(self, config: Any) -> None:
        if config.tokenizer == "none" or config.objective != "causal":
            found = f"tokenizer = {config.tokenizer!r}, objective = {config.objective!r}"
            raise ValueError(f"eval_every needs a model of the next token of a text, not {found}; set eval_every = 0")
        self.tasks = tasks_of(config.eval_tasks, config.eval_limit)

    def measure(self, run: Any, log: RunLog, step: int, tokens: int) -> None:
        """Score the weights that the run validates; write a line of metrics, and one of the log for each task. Every
        rank takes its share of the batches. run: the trainer's Run."""
        with run.averages.tail.in_place(), unsharded(run.model):
            loaded = Loaded(run.model, run.config.tokenizer, run.machine, log.directory)
            outcomes = [run_task(loaded, task, run.config.micro_batch_tokens, run.window) for task in self.tasks]
        found = run.summary["tasks"] = {outcome.name: numbers(outcome) for outcome in outcomes}
        log.metric(step=step, tokens=tokens, train_time_s=run.clock.seconds["train"], tasks=found)
        for name, values in found.items():
            told = " ".join(f"{key}:{value:.4g}" for key, value in values.items())
            log.line(f"step:{step} {name} {told}")


def numbers(outcome: Outcome) -> dict[str, float]:
    """Of one task: acc, acc_norm and perplexity, as far as it has them, and the accuracy of guessing."""
    found = {"acc": outcome.acc}
    if outcome.right_norm:
        found["acc_norm"] = outcome.acc_norm
    if outcome.perplexity:
        found["perplexity"] = outcome.perplexity[0]
    return found | ({"chance": outcome.chance} if outcome.chance else {})
