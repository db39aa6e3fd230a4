"""Every update rule of optim/ with one schedule, equal tuning and the same seeds: how many steps to the target?

    ./run.sh league --jobs 2                                         everything (about five hours on two cores)
    ./run.sh league --arms muon aurora adamw --jobs 2                some rules
    ./run.sh league --draw experiments/results/league.json           run nothing: its table, and its figure beside it

1. For each rule the best of `./run.sh rules` with 150 steps, twice and half that learning rate, on a seed that is not
   reported; while the best is at an end, a factor of two beyond it, up to six rates. Then two weight decays beside none
   at the best rate, but for what keeps norms or has a floor. Variants and most of what is put around a rule (SAME_AS)
   take that rule's.
2. Five seeds at the best of these.
3. One curve: Muon's loss at the end of schedules of several lengths. A rule that ends a schedule of STEPS with a loss
   that Muon has after T steps would reach the target in STEPS / T of Muon's steps, if the factor is the same at every
   length. A loss is first taken relative to Muon's with the same seed, which meets the same text;
   the interval of a rule's steps is of that, with Muon's own steps as given.
4. Some rules (LENGTHS) with schedules between which their own losses cross the target, at the same seeds, and with the
   rates of STEPS: a second table, which takes for granted that log(steps) is linear in the loss between two lengths.

Differences from Muon are of runs with the same seed; p is Holm's, over all other rules. Beside each rule stand the
steps that others have published for it on the GPU optimization track, where the rule stands alone there.

OUT/result.json is written whenever a part is done and holds every run: another machine goes on from a copy of it. All
runs are in float32; those of before this rule that were not are run again.
OUT/result.png is the figure.
"""

import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from scipy import stats

from data.files import check_writable, user_path, write_json
from experiments import arms
from experiments.comparisons import against
from experiments.rules import FROM_NOISE, OWN_SETTINGS, loss_of
from experiments.sweep import Cell, Result, cell_name, load_sweep
from harness.figures import pyplot, save
from harness.settings import parse_settings
from harness.tables import Row, mean_and_sd, table
from optim import RULES, TORCH_OPTIMIZERS

FACTORS = (0.5, 1.0, 2.0)  # of the unit: the rates that are tried first
MOST_RATES = 6
DECAYS = (0.025, 0.1)
TUNING_SEED = 100
DTYPE = "torch.float32"  # of all runs: some CPUs would take bfloat16 and others not
REFERENCE = "muon"  # of differences, and whose curve turns losses into steps
LENGTHS = {  # of schedules beside STEPS: of the curve, and of rules whose losses are to cross the target
    REFERENCE: (250, 500, 600), "aurora": (520,), "soap_muon": (520,), "adamw": (1050,),
}  # fmt: skip
H = {"hyperball": "true", **FROM_NOISE}
ARMS: dict[str, dict[str, str]] = {
    **{rule: {"matrix_optimizer": rule, **OWN_SETTINGS.get(rule, {})} for rule in (*RULES, *TORCH_OPTIMIZERS)},
    "aurora warm": {"matrix_optimizer": "aurora", "aurora_variant": "warm"},
    "normuon long": {"matrix_optimizer": "normuon", "normuon_axis": "long"},
    "muonh": {"matrix_optimizer": "muon", **H},
    "soaph": {"matrix_optimizer": "soap", **H},
    "muon floor": {"matrix_optimizer": "muon", "update_floor": "0.35"},
    "muon brake": {"matrix_optimizer": "muon", "radial_brake": "0.5"},
    "muon look-ahead": {"matrix_optimizer": "muon", "lookahead": "0.3"},
    "muon average": {"matrix_optimizer": "muon", "average_steps": "15", "average_start": "300"},
}
# The best rates with 150 steps (experiments/results/rules_rules.json), or that of the rule underneath; sgd, rmsprop and
# soaph by a few trial runs
UNITS = {
    "muon": 0.02, "aurora": 0.08, "normuon": 0.04, "unormuon": 0.04, "muon_squared": 0.04, "soap": 0.016,
    "soap_muon": 0.04, "muown": 0.005, "adamh": 0.02, "muon_eq": 0.04, "muon_plus": 0.02, "adamuon": 0.005,
    "polar_grad": 2.0, "adamw": 0.002, "sgd": 0.1, "rmsprop": 0.0001, "muonh": 0.16, "soaph": 0.08,
    "muon floor": 0.02,
}  # fmt: skip
SAME_AS = {
    "riemannian_aurora": "aurora", "aurora warm": "aurora", "normuon long": "normuon", "muon brake": "muon",
    "muon look-ahead": "muon", "muon average": "muon",
}  # fmt: skip
# Steps to 3.28 of modded-nanogpt's optimization track at f411b3d; where it has several results, the latest.
PUBLISHED = {
    "adamw": 5625, "muon": 3250, "normuon long": 3250, "adamh": 4875, "muonh": 3250, "muon_squared": 3325,
    "soaph": 3125, "muown": 3075, "muon look-ahead": 3125,
}  # fmt: skip

Tried = tuple[float, float, float | None]  # learning rate, weight decay, loss; None if the run diverged
Curve = Sequence[tuple[int, Sequence[float]]]  # steps of a schedule, and the loss of every seed at its end


@dataclass(frozen=True)
class Options:
    recipe: str = "configs/sotu_steps.toml"  # model, data and batch
    arms: tuple[str, ...] = ()  # some rules; empty: all; muon is always among them
    seeds: tuple[int, ...] = (1000, 1001, 1002, 1003, 1004)  # reported ones
    steps: Annotated[int, ">= 1"] = 400  # of the schedule
    target: Annotated[float, "> 0"] = 1.3  # loss to which steps are counted
    jobs: Annotated[int, ">= 1"] = 1  # runs at once, of one thread each on two cores
    out: str = "runs/league"  # folder of the runs and of result.json
    draw: str = ""  # run nothing: print the table of this result.json, and draw its figure beside it
    yes: bool = False  # do not ask before starting


class Runs:
    """Runs by name, those of earlier starts and of other machines included; result.json has them all."""

    def __init__(self, options: Options) -> None:
        self.options, self.path = options, Path(options.out) / "result.json"
        check_writable(self.path.parent, "choose another folder, such as --out=/tmp/league")
        self.outcome: dict[str, Any] = {}  # what the runs amount to, as far as they go
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {"runs": {}}
        self.found: dict[str, dict[str, Any]] = {
            name: told for name, told in known["runs"].items() if told["dtype"] == DTYPE
        }

    def losses(self, cells: Sequence[Cell], seeds: Sequence[int], steps: int) -> dict[tuple[int, int], float | None]:
        """{(index of the cell, seed): final loss, None for a diverged run}; what is not known is run."""
        names = {(i, seed): run_name(cell, steps, seed) for i, cell in enumerate(cells) for seed in seeds}
        alike: dict[tuple[int, ...], list[int]] = {}  # seeds by what is missing of them: a sweep each, for all its jobs
        for seed in seeds:
            missing = tuple(i for i in range(len(cells)) if names[i, seed] not in self.found)
            alike.setdefault(missing, []).append(seed)
        for missing, of_seeds in alike.items():
            if missing:
                self.run([cells[i] for i in missing], of_seeds, steps)
        return {place: self.found[name]["val_loss"] for place, name in names.items()}

    def run(self, cells: Sequence[Cell], seeds: Sequence[int], steps: int) -> None:
        out = Path(self.options.out) / f"{steps}_steps"
        fixed = dict(
            train_steps=str(steps), val_every=str(steps), stop_at_target="false", target_loss="0", dtype="float32"
        )
        try:
            arms.sweep(self.options.recipe, cells, seeds, out, self.options.jobs, fixed)
        finally:  # a stop keeps what has ended
            if (out / "sweep.json").exists():
                self.take(load_sweep(out).results.values(), steps)

    def take(self, results: Iterable[Result], steps: int) -> None:
        for result in results:
            if result.ended:
                told = {key: result.summary.get(key) for key in ("device", "dtype", "git_commit")}
                self.found[run_name(result.overrides, steps, result.seed)] = dict(val_loss=loss_of(result), **told)
        self.save()

    def save(self, **outcome: Any) -> None:
        self.outcome |= outcome
        self.path.parent.mkdir(parents=True, exist_ok=True)
        options = {key: getattr(self.options, key) for key in ("recipe", "seeds", "steps", "target")}
        write_json(self.path, dict(options, **self.outcome, runs=dict(sorted(self.found.items()))), indent=1)


def run_name(cell: Cell, steps: int, seed: int) -> str:
    return f"{cell_name(cell)} steps={steps} seed={seed}"


def completed(options: Options) -> Options:
    """Options with everything filled in. Raises ValueError for what no run can be made of."""
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        raise ValueError(f"arms: {unknown[0]!r} is unknown; choose from {', '.join(ARMS)}")
    if len(options.seeds) < 2 or TUNING_SEED in options.seeds:
        raise ValueError(f"seeds: name two or more and not {TUNING_SEED}, which is for tuning; 1000 1001 1002 is usual")
    named = options.arms or tuple(ARMS)
    needed = {REFERENCE, *(SAME_AS[arm] for arm in named if arm in SAME_AS)}
    ordered = tuple(arm for arm in ARMS if arm in named or arm in needed)
    recipe, out = str(user_path(options.recipe)), str(user_path(options.out))
    return dataclasses.replace(options, arms=ordered, recipe=recipe, out=out)


def cell(arm: str, rate: float, decay: float = 0.0) -> dict[str, str]:
    decayed = {"matrix_weight_decay": f"{decay:g}"} if decay else {}
    return {**ARMS[arm], "matrix_lr": f"{rate:g}", **decayed}


def decays_of(arm: str) -> tuple[float, ...]:
    """Those that are tried: what keeps weights' norms, or steps by a share of them, goes without."""
    keeps = {"hyperball", "update_floor"} & ARMS[arm].keys() or ARMS[arm]["matrix_optimizer"] == "adamh"
    return () if keeps or ARMS[arm]["matrix_optimizer"] in ("sgd", "rmsprop") else DECAYS


def tune(runs: Runs) -> dict[str, dict[str, Any]]:
    """{arm: rate, decay, and every (rate, decay, loss) that was tried}."""
    searched = [arm for arm in runs.options.arms if arm not in SAME_AS]
    tried: dict[str, list[Tried]] = {arm: [] for arm in searched}

    def run(wanted: Sequence[tuple[str, float, float]]) -> None:
        losses = runs.losses([cell(*each) for each in wanted], [TUNING_SEED], runs.options.steps)
        for i, (arm, rate, decay) in enumerate(wanted):
            tried[arm].append((rate, decay, losses[i, TUNING_SEED]))

    wanted = [(arm, UNITS[arm] * factor, 0.0) for arm in searched for factor in FACTORS]
    while wanted:
        run(wanted)
        wanted = [(arm, rate, 0.0) for arm in searched if (rate := rate_beyond(tried[arm]))]
    run([(arm, best_of(tried[arm])[0], decay) for arm in searched for decay in decays_of(arm)])
    chosen: dict[str, dict[str, Any]] = {}
    for arm in runs.options.arms:
        rate, decay = best_of(tried[SAME_AS.get(arm, arm)])
        chosen[arm] = dict(rate=rate, decay=decay, tried=tried.get(arm, []))
    return chosen


def rate_beyond(tried: Sequence[Tried]) -> float | None:
    """The next rate to try: a factor of two beyond the best where that is at an end; None once it is within."""
    rates, (best, _) = sorted({rate for rate, _, _ in tried}), best_of(tried)
    if len(rates) >= MOST_RATES or not arms.at_edge(best, rates):
        return None
    return best / 2 if best == rates[0] else best * 2


def best_of(tried: Sequence[Tried]) -> tuple[float, float]:
    """Rate and decay of the lowest loss; a run that diverged never wins."""
    rate, decay, _ = min(tried, key=lambda each: math.inf if each[2] is None else each[2])
    return rate, decay


def experiment(options: Options) -> dict[str, Any]:
    """Confirm, tune, run, measure the curve; the content of result.json."""
    searched = sum(arm not in SAME_AS for arm in options.arms)
    most = searched * (MOST_RATES + len(DECAYS)) + len(options.arms) * len(options.seeds)
    most += sum(len(LENGTHS.get(arm, ())) for arm in options.arms) * len(options.seeds)
    runs = Runs(options)
    arms.confirm([f"up to {most} runs of about {options.steps} steps, {options.jobs} at a time; "
                  f"{len(runs.found)} are known"], options.yes)  # fmt: skip
    chosen = tune(runs)
    cells = [cell(arm, chosen[arm]["rate"], chosen[arm]["decay"]) for arm in options.arms]
    losses = runs.losses(cells, options.seeds, options.steps)
    entries = [dict(arm=arm, sets=ARMS[arm], **chosen[arm],
                    val_loss=[losses[i, seed] for seed in options.seeds])
               for i, arm in enumerate(options.arms)]  # fmt: skip
    curves = {entry["arm"]: {options.steps: entry["val_loss"]} for entry in entries if entry["arm"] in LENGTHS}
    for steps in sorted({steps for arm in curves for steps in LENGTHS[arm]}):
        having = [arm for arm in curves if steps in LENGTHS[arm]]
        found = runs.losses([cells[options.arms.index(arm)] for arm in having], options.seeds, steps)
        for i, arm in enumerate(having):
            curves[arm][steps] = [found[i, seed] for seed in options.seeds]
        runs.save(curves={arm: sorted(of_steps.items()) for arm, of_steps in curves.items()}, entries=entries)
    return json.loads(runs.path.read_text(encoding="utf-8"))


def steps_at(loss: float, curve: Curve) -> float:
    """The length of the schedule at whose end the mean is this loss: between measured lengths log(steps) is
    linear in the loss, beyond them the nearest two go on."""
    points = sorted((float(np.mean(losses)), math.log(steps)) for steps, losses in curve)
    x, y = np.array(points).T
    place = int(np.clip(np.searchsorted(x, loss), 1, len(x) - 1))
    slope = (y[place] - y[place - 1]) / (x[place] - x[place - 1])
    return math.exp(y[place - 1] + slope * (loss - x[place - 1]))


def loss_at(steps: int, curve: Curve) -> float:
    """The mean loss at the end of a schedule of that length; the inverse of `steps_at` within the curve."""
    return float(np.interp(math.log(steps), [math.log(n) for n, _ in curve], [np.mean(losses) for _, losses in curve]))


def steps_needed(result: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Steps to the target of each rule and half of their 95% interval, which for the reference itself is zero; both
    infinite for a rule with a run that diverged."""
    curve, steps = result["curves"][REFERENCE], result["steps"]
    known = {entry["arm"]: entry["val_loss"] for entry in result["entries"]}
    at_steps, to_target = loss_at(steps, curve), steps_at(result["target"], curve)
    found = {}
    for arm, losses in known.items():
        if None in losses:
            found[arm] = math.inf, math.inf
            continue
        relative = [at_steps + loss - other for loss, other in zip(losses, known[REFERENCE], strict=True)]
        needed = [steps * to_target / steps_at(loss, curve) for loss in relative]
        found[arm] = float(np.mean(needed)), float(stats.t.ppf(0.975, len(needed) - 1) * stats.sem(needed))
    return found


def summary(result: Mapping[str, Any]) -> list[Row]:
    """A row for each rule, the fewest steps first."""
    known = {entry["arm"]: entry for entry in result["entries"]}
    differences, adjusted = against({arm: entry["val_loss"] for arm, entry in known.items()}, REFERENCE)
    ranked = []
    needed_by = steps_needed(result)
    for arm, entry in known.items():
        losses, tried = entry["val_loss"], entry["tried"]
        row: Row = dict(rule=arm)
        edge = arms.EDGE if tried and arms.at_edge(entry["rate"], [rate for rate, _, _ in tried]) else ""
        row |= {"tried": len(tried), "rate": f"{entry['rate']:g}{edge}", "decay": f"{entry['decay']:g}"}
        row["published"] = f"{PUBLISHED[arm]:,}" if arm in PUBLISHED else ""
        if None in losses:
            ranked.append((math.inf, row | {"final loss": "diverged"}))
            continue
        needed, half = needed_by[arm]
        told = f"{needed:.0f}" + (f" ± {half:.0f}" if arm != REFERENCE else "")
        row |= {"final loss": mean_and_sd(losses, 4), "steps": told}
        if found := differences.get(arm):
            row |= zip((f"from {REFERENCE}", "95% interval"), found.told, strict=True)
            row["p (Holm)"] = f"{adjusted[arm]:.2g}"
        ranked.append((needed, row))
    order = ("rule", "tried", "rate", "decay", "final loss", f"from {REFERENCE}", "95% interval", "p (Holm)", "steps",
             "published")  # fmt: skip
    return [{key: row.get(key, "") for key in order} for _, row in sorted(ranked, key=lambda pair: pair[0])]


def crossings(result: Mapping[str, Any]) -> list[Row]:
    """After how many steps the rules with several lengths cross the target by their own losses, and the ratio to the
    reference's and to Aurora's, seed by seed; with the interval of each comparison alone, and p by Holm for all of a
    column. The fewest steps first; without a rule one of whose losses does not fall from length to length."""
    target, curves = result["target"], {arm: curve for arm, curve in result["curves"].items() if falls(curve)}
    crossed = {
        arm: [steps_at(target, [(steps, [loss]) for steps, loss in zip(lengths(curve), losses, strict=True)])
              for losses in zip(*(losses for _, losses in curve), strict=True)]
        for arm, curve in curves.items()
    }  # fmt: skip
    rows = {}
    for arm, steps in crossed.items():
        least, most = min(lengths(curves[arm])), max(lengths(curves[arm]))
        beyond = sum(not least <= each <= most for each in steps)
        by_steps = ", ".join(f"{n}: {mean_and_sd(losses, 4)}" for n, losses in curves[arm])
        told = mean_and_sd(steps, 0) + (f" ({beyond} of {len(steps)} seeds beyond)" if beyond else "")
        rows[arm] = {"rule": arm, "final loss by steps": by_steps, "steps to the target": told}
    for other in (REFERENCE, "aurora"):
        differences, adjusted = against({arm: np.log(steps).tolist() for arm, steps in crossed.items()}, other)
        for arm, row in rows.items():
            found = differences.get(arm)
            row[f"of {other}'s"] = f"{math.exp(found.mean):.3f}" if found else "-"
            interval = f"{math.exp(found.low):.3f} to {math.exp(found.high):.3f}" if found else "-"
            row[f"95% interval of {other}'s"] = interval
            row[f"p (Holm) of {other}'s"] = f"{adjusted[arm]:.2g}" if found else "-"
    return sorted(rows.values(), key=lambda row: float(np.mean(crossed[str(row["rule"])])))


def lengths(curve: Curve) -> list[int]:
    return [steps for steps, _ in curve]


def falls(curve: Curve) -> bool:
    """Whether there are two lengths or more, and the loss of every seed is lower at each than at the one before."""
    by_seed = zip(*(losses for _, losses in curve), strict=True)
    return len(curve) > 1 and all(
        None not in losses and all(a > b for a, b in itertools.pairwise(losses)) for losses in by_seed
    )


def correlation(result: Mapping[str, Any]) -> str:
    """Spearman's of our losses and the published steps, with Fisher's 95% interval (Bonett and Wright 2000)."""
    shared = [entry for entry in result["entries"] if entry["arm"] in PUBLISHED and None not in entry["val_loss"]]
    n = len(shared)
    if n < 4:
        return f"{n} rules are on both tracks: too few to correlate"
    rho = float(stats.spearmanr([np.mean(entry["val_loss"]) for entry in shared],
                                [PUBLISHED[entry["arm"]] for entry in shared]).statistic)  # fmt: skip
    half = stats.norm.ppf(0.975) * math.sqrt((1 + rho**2 / 2) / (n - 3))
    low, high = (math.tanh(math.atanh(min(0.999, max(-0.999, rho))) + sign * half) for sign in (-1, 1))
    return f"rank correlation with the published steps: {rho:.2f} (95% interval {low:.2f} to {high:.2f}, {n} rules)"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Steps to the target as shares of the reference's: of each rule here, with its interval, and as published."""
    needed = {arm: pair for arm, pair in steps_needed(result).items() if math.isfinite(pair[0])}
    order = sorted(needed, key=lambda arm: needed[arm][0], reverse=True)
    unit = needed[REFERENCE][0]
    figure = pyplot().figure(figsize=(7, 1.5 + 0.28 * len(order)), layout="constrained")
    axis = figure.subplots()
    shares, halves = ([needed[arm][i] / unit for arm in order] for i in (0, 1))
    axis.errorbar(shares, range(len(order)), xerr=halves, fmt="o", color="C0", label="here, with 95% interval")
    shared = [(PUBLISHED[arm] / PUBLISHED[REFERENCE], place) for place, arm in enumerate(order) if arm in PUBLISHED]
    axis.plot(*zip(*shared, strict=True), "D", color="C1", fillstyle="none", label="published, FineWeb on GPUs")
    axis.axvline(1, color="gray", linewidth=0.8)
    axis.set_yticks(range(len(order)), order, fontsize=8)
    axis.set_xscale("log")
    ticks = [tick for tick in (0.6, 0.8, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if tick < 1.2 * max(shares)]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False, fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel(f"steps to the target, as a share of {REFERENCE}'s", fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    save(figure, path)


@arms.command
def main(argv: list[str]) -> None:
    options = parse_settings(Options, argv, __doc__, leading="recipe")
    if options.draw:
        path = user_path(options.draw)
        result = arms.read_result(path, summary)
    else:
        options = completed(options)
        path = Path(options.out) / "result.json"
        result = experiment(options)
    draw(result, path.with_suffix(".png"))
    print(f"{path} -> {path.with_suffix('.png')}", file=sys.stderr)
    print(table(summary(result)))
    print(correlation(result))
    if rows := crossings(result):
        print(f"\n{table(rows)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
