"""What the experiment on neurons runs: its arms, the variants that change one thing, rates and seeds. It was written
before any reported run.

Every arm, a rule for the hidden matrices, trains the recipe's model to the end of a schedule of 500 steps, all else
alike: that is the variant `base` (MLPs 8/3 as wide as the model, rounded up to a multiple of 64, which makes 3 here;
outputs starting at zero, no weight decay). Tuning is equal: each arm takes the same four learning rates on seed 100,
which is not reported; the lowest final validation loss wins, and a winner at an end of those tried is marked (SWITCHED
take Muon's). Then seeds 0, 1 and 2 with that rate (FEWER_SEEDS: what is slow takes the first). The other variants
change one thing for FACTOR_ARMS, at the rates that won in `base`. Losses are over all of the recipe's validation
tokens; they are compared with Muon's, paired by seed, with p Holm-adjusted over the arms of a variant.

What is measured (harness/neuron_stats.py): idle are rows of gate and up whose leverage is below a quarter of the mean,
in the rule's own update and in the plain polar factor of its momentum, or whose squared norm is in the update as it was
(added after a trial run, in which the two differed); how many neurons contribute (mean activation times norm of the
column of down, participation ratio); by how much the final loss over the first 32,768 validation tokens rises without
the tenth to half of each layer's neurons that contribute least; dead is a mean activation below 0.1 of the layer's
median.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from experiments import arms
from model import multiple_of_64

Cell = dict[str, str]
Key = tuple[frozenset[tuple[str, str]], int]  # of a run: what it sets, and its seed
Losses = dict[float, float | None]  # by learning rate; None: diverged

ARMS = {
    "muon": {"matrix_optimizer": "muon"},  # what all others are compared with
    "aurora": {"matrix_optimizer": "aurora"},
    "adamw": {"matrix_optimizer": "adamw"},
    "normuon": {"matrix_optimizer": "normuon"},
    "unormuon": {"matrix_optimizer": "unormuon"},
    "muon_eq": {"matrix_optimizer": "muon_eq"},
    "aurora_tall": {"matrix_optimizer": "aurora", "aurora_sides": "tall"},
    "aurora_warm": {"matrix_optimizer": "aurora", "aurora_variant": "warm"},
    "riemannian_aurora": {"matrix_optimizer": "riemannian_aurora"},
}
# Muon for a share of the schedule and Aurora for the rest, or the reverse, to see whether and when leverage matters; by
# name, the first one and its share. They take Muon's rate.
SWITCHED = {
    "muon_first_fifth": ("muon", Fraction(1, 5)),
    "muon_first_half": ("muon", Fraction(1, 2)),
    "aurora_first_fifth": ("aurora", Fraction(1, 5)),
    "aurora_first_half": ("aurora", Fraction(1, 2)),
}
ALL_ARMS = (*ARMS, *SWITCHED)
RATES = (0.02, 0.04, 0.01, 0.005)  # for all but adamw, whose are a tenth; --rates_tried takes the first so many
DEFAULT_RATE = 0.02  # without tuning
TUNING_SEED = 100
FACTOR_ARMS = ("muon", "unormuon", "aurora")  # that the variants are about
FEWER_SEEDS = {"riemannian_aurora": 1}


@dataclass(frozen=True)
class Variant:
    """What differs from the recipe's model and `base`."""

    expansion: Fraction = Fraction(8, 3)  # hidden width of the MLP over model width
    width: int = 1  # times the recipe's model width and heads
    rate: float | None = None  # of every arm; none: the one that won in `base`
    settings: Mapping[str, str] = field(default_factory=dict)


BASE = "base"
VARIANTS = {
    BASE: Variant(),
    "mlp_4": Variant(Fraction(4)),
    "mlp_8": Variant(Fraction(8)),
    "normal_start": Variant(settings={"init_out": "0.02", "init_down": "0.02", "init_head": "0.02"}),
    "decay_0.025": Variant(settings={"matrix_weight_decay": "0.025"}),
    "width_doubled": Variant(width=2),
    "rate_0.05": Variant(rate=0.05),
}


@dataclass(frozen=True, eq=False)
class Group:
    """An arm in a variant: runs of several seeds."""

    arm: str
    variant: str
    settings: Cell  # without the learning rate

    def cell(self, rate: float) -> Cell:
        return {**self.settings, "matrix_lr": f"{rate:g}"}


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """A run to report; at_edge: whether its rate is at an end of those tried."""

    group: Group
    seed: int
    rate: float
    at_edge: bool

    @property
    def cell(self) -> Cell:
        return self.group.cell(self.rate)

    @property
    def key(self) -> Key:
        return key_of(self.cell, self.seed)


def settings_of(arm: str, variant: str, steps: int, model_dim: int, num_heads: int) -> Cell:
    """What the runs of an arm in a variant set, for so many steps and a recipe of this width; without the learning
    rate."""
    of_variant = VARIANTS[variant]
    width = of_variant.width * model_dim
    wider = {"model_dim": str(width), "num_heads": str(of_variant.width * num_heads)} if of_variant.width > 1 else {}
    hidden = multiple_of_64(float(of_variant.expansion * width))
    if arm in SWITCHED:
        first, share = SWITCHED[arm]
        rule = {"matrix_optimizer": "experiments.switching:Switching", "switching_first": first}
        of_arm = {**rule, "switching_after": str(round(share * steps))}
    else:
        of_arm = ARMS[arm]
    return {**of_arm, **of_variant.settings, **wider, "mlp_hidden": str(hidden)}


def groups(
    of_arms: Collection[str], variants: Iterable[str], steps: int, model_dim: int, num_heads: int
) -> list[Group]:
    """What is reported, variant by variant."""
    return [
        Group(arm, variant, settings_of(arm, variant, steps, model_dim, num_heads))
        for variant in variants
        for arm in of_arms
        if variant == BASE or arm in FACTOR_ARMS
    ]


def rates_of(arm: str, count: int) -> tuple[float, ...]:
    """The first `count` rates, ascending; the default alone for 0."""
    tried = sorted(RATES[:count]) or [DEFAULT_RATE]
    return tuple(rate / 10 if arm == "adamw" else rate for rate in tried)


def seeds_of(arm: str, seeds: Sequence[int]) -> Sequence[int]:
    """Those of `seeds` that an arm reports."""
    return seeds[: FEWER_SEEDS.get(arm)]


def key_of(cell: Mapping[str, str], seed: int) -> Key:
    return frozenset(cell.items()), seed


def best_rate(tried: Losses) -> tuple[float, bool]:
    """The rate of the lowest loss, the lowest rate if all diverged; whether it is at an end of those tried."""
    rate = arms.best({rate: math.inf if loss is None else loss for rate, loss in sorted(tried.items())})
    return rate, arms.at_edge(rate, tried)


def reported(of_all: Iterable[Group], tried: Mapping[str, Losses], seeds: Sequence[int]) -> list[ReportedRun]:
    """The runs to report, in the order of their groups and seeds; `tried` is what tuning found for each arm."""
    chosen = {arm: best_rate(losses) if losses else (rates_of(arm, 0)[0], False) for arm, losses in tried.items()}
    chosen |= {arm: chosen["muon"] for arm in SWITCHED if "muon" in chosen}
    runs = []
    for group in of_all:
        rate, at_edge = chosen[group.arm] if (own := VARIANTS[group.variant].rate) is None else (own, False)
        runs += [ReportedRun(group, seed, rate, at_edge) for seed in seeds_of(group.arm, seeds)]
    return runs
