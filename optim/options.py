"""Options: what an update rule, or the trainer, lets its user choose. Each is declared once, where it acts.

    class Aurora(MatrixOptimizer):
        options = {"beta": Option(0.5, "strength of the row correction", (">= 0", "<= 1"))}

A bound is a comparison with a number, written as its reader would: ">= 0", "< 1". Infinity and NaN are refused
without any.
"""

import difflib
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

COMPARISONS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
KINDS: dict[type, str] = {float: "a real number", int: "an integer", bool: "True or False", str: "a string"}


@dataclass(frozen=True, eq=False)  # an option of two rules is one option: the same object
class Option:
    default: Any
    help: str
    bounds: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()  # of a string; none: any
    kind: type | None = None  # where the default does not tell it: of None, which is then a value too

    @property
    def value_type(self) -> type:
        return self.kind or type(self.default)


def check_options(who: str, values: Mapping[str, Any], options: Mapping[str, Option]) -> None:
    """ValueError for the first of `values` that its option does not allow; values without an option are not checked."""
    for name, option in options.items():
        if name not in values or (values[name] is None and option.default is None):
            continue
        value, kind = values[name], option.value_type
        if not is_of_type(value, kind):
            or_none = " or None" if option.default is None else ""
            raise ValueError(
                f"{who}: {name} = {value!r} is of type {type(value).__name__}; it must be "
                f"{KINDS.get(kind, kind.__name__)}{or_none}, for example {name} = {option.default!r}"
            )
        if option.choices and value not in option.choices:
            raise ValueError(f"{who}: {name} = {value!r} is unknown; choose one of {', '.join(option.choices)}")
        if option.bounds and broken_bound(value, option.bounds):
            raise ValueError(
                f"{who}: {name} = {value} must be {' and '.join(option.bounds)}; {option.default!r}, the default, works"
            )


def is_of_type(value: Any, kind: type) -> bool:
    """Whether `value` can stand for one of `kind`: numbers may be NumPy's, and real ones a tensor of one element, as
    torch's capturable learning rates are."""
    if kind is float and isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    if kind in (float, int):
        return isinstance(value, Real if kind is float else Integral) and not isinstance(value, bool)
    return isinstance(value, kind)


def broken_bound(value: float, bounds: Iterable[str]) -> str:
    """The first of these bounds that `value` breaks; empty if it keeps them all."""
    for bound in bounds:
        symbol, number = bound.split()
        if not COMPARISONS[symbol](value, float(number)):
            return bound
    return "" if math.isfinite(value) else "finite"


def check_names(who: str, names: Iterable[str], options: Mapping[str, Option]) -> None:
    """TypeError for a name that is no option."""
    for name in names:
        if name not in options:
            near = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"its options are {', '.join(options)}"
            raise TypeError(f"{who} has no option {name}; {hint}")


def signature_with(options: Mapping[str, Option], constructor: Callable[..., None]) -> inspect.Signature:
    """The signature of a class whose constructor takes `lr` and **options, each option shown with its default."""
    _, *shown = inspect.signature(constructor).parameters.values()
    named = {parameter.name for parameter in shown}
    if shown[-1].kind is inspect.Parameter.VAR_KEYWORD:
        shown[-1:] = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default)
            for name, option in options.items()
            if name not in named
        ]
    return inspect.Signature([p.replace(default=options["lr"].default) if p.name == "lr" else p for p in shown])
