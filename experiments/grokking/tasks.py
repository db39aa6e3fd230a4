"""The tasks: every row of a small table, part of it to learn from, the rest to be generalised to.

With p = 97 and operands a, b in 0 .. 96 a row is [a, op, b, =] and its target the token of the answer:

    add   a + b mod p       sub   a - b mod p       mul   a b mod p
    div   c with b c = a mod p; b = 0 is left out, so 9312 rows instead of 9409
    exp   a^b mod p, with 0^0 = 1                   gcd   gcd(a, b), with gcd(0, b) = b and gcd(0, 0) = 0

parity is ten bits and =, all 1024 of them; the answer is 1 if an odd number of bits is set.

Shares of the rows that are learnt from are those of Tveit, Remseth and Skogvold, arXiv 2504.16041; sub, which they do
not have, gets add's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

P = 97
NUM_BITS = 10
OP, EQUALS = P, P + 1  # tokens after the numbers; there is one operation a model, so one token will do
VOCAB_SIZE = P + 2
MAX_TOKENS = NUM_BITS + 1  # in a row


OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: (a + b) % P,
    "sub": lambda a, b: (a - b) % P,
    "mul": lambda a, b: a * b % P,
    "div": lambda a, b: a * pow(b, -1, P) % P,
    "exp": lambda a, b: pow(a, b, P),
    "gcd": math.gcd,
}
TRAIN_SHARES = {"add": 0.8, "sub": 0.8, "mul": 0.5, "div": 0.8, "exp": 0.7, "gcd": 0.5, "parity": 0.5}
TASKS = tuple(TRAIN_SHARES)


@dataclass(frozen=True)
class Rows:
    """inputs [N, T] and targets [N], int64; targets are below num_classes."""

    inputs: Tensor
    targets: Tensor
    num_classes: int

    def to(self, device: torch.device) -> "Rows":
        return Rows(self.inputs.to(device), self.targets.to(device), self.num_classes)


def table(task: str) -> Rows:
    """All rows of a task, in order. Raises ValueError for an unknown one."""
    if task == "parity":
        numbers = torch.arange(2**NUM_BITS)
        bits = numbers[:, None] >> torch.arange(NUM_BITS) & 1
        equals = torch.full((len(numbers), 1), EQUALS)
        return Rows(torch.cat((bits, equals), dim=1), bits.sum(1) % 2, 2)
    if task not in OPERATIONS:
        raise ValueError(f"task = {task!r} is unknown; choose from {', '.join(TASKS)}")
    pairs = [(a, b) for a in range(P) for b in range(task == "div", P)]
    answers = [OPERATIONS[task](a, b) for a, b in pairs]
    return Rows(torch.tensor([(a, OP, b, EQUALS) for a, b in pairs]), torch.tensor(answers), P)


def split(num_rows: int, train_share: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers of the training and of the validation rows, drawn at random: every row in exactly one of them."""
    order = torch.randperm(num_rows, generator=generator)
    num_train = round(train_share * num_rows)
    return order[:num_train], order[num_train:]
