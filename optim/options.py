"""Options: what an update rule, or the trainer, lets its user choose. Each is declared once, where it acts.

    class Aurora(MatrixOptimizer):
        options = {"beta": Option(0.5, "strength of the row correction", (">= 0", "<= 1"))}

A bound is a comparison with a number, written as its reader would: ">= 0", "< 1". Infinity and NaN are refused
without any.
"""

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclass(frozen=True, eq=False)  # an option of two rules is one option: the same object
class Option:
    default: Any
    help: str
    bounds: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()  # of a string; none: any
    kind: type | None = None  # where the default does not tell it: of None, which is then a value too


def broken_bound(value: float, bounds: Iterable[str]) -> str:
    """The first of these bounds that `value` breaks; empty if it keeps them all."""
    for bound in bounds:
        symbol, number = bound.split()
        if not COMPARISONS[symbol](value, float(number)):
            return bound
    return "" if math.isfinite(value) else "finite"
