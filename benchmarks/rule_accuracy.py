"""How far the update rules are from their definitions: 50 steps in float64 beside a transcription in numpy.

    python -m benchmarks.rule_accuracy

The transcriptions (tests/optim/definitions.py) follow the papers a line at a time with an exact polar factor. A row has
the largest difference of any weight in any step, for matrices of 14 x 5, 5 x 14 and 6 x 6 with weights of about 1.
"""

import warnings
from dataclasses import dataclass

from harness.results import command, report
from harness.tables import Row
from tests.optim.definitions import DEFINITIONS, SHAPES, largest_difference


@dataclass(frozen=True)
class Args:
    rules: tuple[str, ...] = DEFINITIONS  # of tests/optim/definitions.py
    steps: int = 50


def main(args: Args) -> None:
    if unknown := [rule for rule in args.rules if rule not in DEFINITIONS]:
        raise ValueError(f"rules = {unknown[0]!r} has no definition; choose from {', '.join(DEFINITIONS)}")
    rows: list[Row] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a rule that is not scale-free
        for rule in args.rules:
            found = {kind: largest_difference(rule, shape, args.steps) for kind, shape in SHAPES.items()}
            rows.append({"rule": rule} | {kind: f"{difference:.1e}" for kind, difference in found.items()})
    report("rule_accuracy", rows, "cpu", steps=args.steps)


if __name__ == "__main__":
    command(main, Args, __doc__)
