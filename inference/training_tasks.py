"""Tasks while a model trains: `eval_every`, off the clock."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

from data.tokenizer import get_tokenizer
from harness.fsdp import unsharded
from harness.machine import Machine
from harness.runlog import RunLog
from inference.load import Loaded
from inference.tasks import Outcome, Task, run_task, tasks_of


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
    """The tasks of a trainer's Config. Raises ValueError, on every rank, for what is none, and for a model that writes
    no text."""

    def __init__(self, config: Any, machine: Machine) -> None:
        self.tasks: list[Task] = []
        problem = None
        try:
            self._read(config)
        except ValueError as error:
            problem = str(error)
        machine.raise_together(problem)

    def _read(self, config: Any) -> None:
        if config.tokenizer == "none" or config.objective != "causal":
            found = f"tokenizer = {config.tokenizer!r}, objective = {config.objective!r}"
            raise ValueError(f"eval_every needs a model of the next token of a text, not {found}; set eval_every = 0")
        get_tokenizer(config.tokenizer)  # or DataError, where its files cannot be had
        self.tasks = tasks_of(config.eval_tasks, config.eval_limit)
        names = [task.name for task in self.tasks]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"eval_tasks has two tasks called {twice!r}, whose results would be one; rename a file")

    def measure(self, run: Any, log: RunLog, step: int, tokens: int) -> None:
        """Score the weights that the run validates; write a line of metrics, and one of the log for each task. Every
        rank takes its share of the batches. run: the trainer's Run."""
        with run.averages.tail.in_place(), unsharded(run.model):
            loaded = Loaded(run.model, run.config.tokenizer, run.machine, log.directory)
            outcomes = [run_task(loaded, task, run.config.micro_batch_tokens, run.window) for task in self.tasks]
        found = {outcome.name: numbers(outcome) for outcome in outcomes}
        run.summary.update(tasks=found, tasks_step=step)
        log.metric(step=step, tokens=tokens, train_time_s=run.clock.seconds["train"], tasks=found)
        for name, values in found.items():
            told = " ".join(f"{key}:{math.inf if value is None else value:.4g}" for key, value in values.items())
            log.line(f"step:{step}/{run.config.train_steps} {name} {told}")


def numbers(outcome: Outcome) -> dict[str, float | None]:
    """Of one task: acc, acc_norm and perplexity (None: infinite), as far as it has them; the accuracy of guessing."""
    found: dict[str, float | None] = {"acc": outcome.acc}
    if outcome.right_norm:
        found["acc_norm"] = outcome.acc_norm
    if outcome.perplexity:
        found["perplexity"] = outcome.perplexity[0] if math.isfinite(outcome.perplexity[0]) else None
    return found | ({"chance": outcome.chance} if outcome.chance else {})
