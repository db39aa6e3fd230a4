"""The league: what is tried and run, what is not run twice, and how losses become steps."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import arms, league
from experiments.league import (
    ARMS,
    DECAYS,
    FACTORS,
    LENGTHS,
    MOST_RATES,
    PUBLISHED,
    SAME_AS,
    TUNING_SEED,
    UNITS,
    best_of,
    completed,
    correlation,
    crossings,
    decays_of,
    main,
    rate_beyond,
    steps_at,
    summary,
)  # fmt: skip
from experiments.sweep import Cell, Result, Sweep
from optim import RULES, TORCH_OPTIMIZERS
from train_gpt import load_config


def test_every_rule_is_an_arm_that_the_trainer_takes() -> None:
    assert {*RULES, *TORCH_OPTIMIZERS} <= ARMS.keys()
    assert UNITS.keys() | SAME_AS.keys() == ARMS.keys()
    assert PUBLISHED.keys() <= ARMS.keys()
    for arm in ARMS:
        for decay in (0.0, *decays_of(arm)):
            words = league.cell(arm, 0.01, decay)
            load_config(["configs/sotu_steps.toml", *(f"--{key}={value}" for key, value in words.items())])


def loss(sets: Cell, steps: int, seed: int) -> float:
    """Lower with more steps; Aurora is twice as fast as Muon, and best at 0.32 and a decay of 0.1."""
    speed = 2.0 if sets["matrix_optimizer"] == "aurora" else 1.0
    off = abs(math.log2(float(sets["matrix_lr"]) / (0.32 if speed == 2 else 0.02))) / 10
    decay = float(sets.get("matrix_weight_decay", 0)) / 100
    return 3.0 - 0.3 * math.log(speed * steps) + 0.001 * (seed % 7) ** speed + off - decay


Calls = list[tuple[Cell, int, int]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """No runs: results appear as if they had been."""
    calls, results = Calls(), dict[Path, dict[str, Result]]()

    def sweep(recipe: str, cells: list[Cell], seeds: list[int], out: Path, jobs: int, fixed: Cell) -> list[Result]:
        out.mkdir(parents=True, exist_ok=True)
        (out / "sweep.json").touch()
        for seed, sets in itertools.product(seeds, cells):
            calls.append((sets, int(fixed["train_steps"]), seed))
            found = loss(sets, int(fixed["train_steps"]), seed)
            told = dict(status="finished", val_loss=found, device="a machine", dtype="torch.float32", git_commit="abc")
            run = Result(sets, seed, 1, 1, "somewhere", told)
            results.setdefault(out, {})[run.name] = run
        return list(results[out].values())

    monkeypatch.setattr(arms, "sweep", sweep)
    monkeypatch.setattr(league, "load_sweep", lambda out: Sweep(out, {}, results[out]))
    monkeypatch.setattr("experiments.sweep.is_complete", lambda summary: bool(summary))
    return calls


def run(out: Path, *words: str) -> dict[str, Any]:
    assert main([f"--out={out}", "--yes=true", *words]) == 0
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def test_tuning_then_seeds_then_the_curve(fake: Calls, tmp_path: Path) -> None:
    result = run(tmp_path, "--arms", "aurora", "riemannian_aurora", "--seeds", "1000", "1001", "1002")
    entries = {entry["arm"]: entry for entry in result["entries"]}
    assert list(entries) == ["muon", "aurora", "riemannian_aurora"]
    assert (entries["aurora"]["rate"], entries["aurora"]["decay"]) == (0.32, 0.1)
    assert (entries["riemannian_aurora"]["rate"], entries["riemannian_aurora"]["tried"]) == (0.32, [])
    assert [rate for rate, decay, _ in entries["aurora"]["tried"] if not decay] == [0.04, 0.08, 0.16, 0.32, 0.64]
    assert len(entries["muon"]["tried"]) == len(FACTORS) + len(DECAYS)
    assert {seed for _, steps, seed in fake if steps != 400} == {1000, 1001, 1002}
    assert {steps for _, steps, _ in fake} == {400, *LENGTHS["muon"], *LENGTHS["aurora"]}
    assert sum(seed == TUNING_SEED for _, _, seed in fake) == 2 * (len(FACTORS) + len(DECAYS)) + 2
    assert len({(str(sets), steps, seed) for sets, steps, seed in fake}) == len(fake)  # none twice

    rows = {row["rule"]: row for row in summary(result)}
    needed = {rule: float(row["steps"].split()[0]) for rule, row in rows.items()}
    assert needed["muon"] / needed["aurora"] == pytest.approx(2, rel=0.1)
    assert next(iter(rows)) == "aurora"
    assert rows["muon"]["from muon"] == ""
    assert rows["aurora"]["published"] == ""
    assert rows["muon"]["published"] == "3,250"
    assert rows["riemannian_aurora"]["tried"] == 0
    assert {arm: [steps for steps, _ in curve] for arm, curve in result["curves"].items()} == {
        "muon": [250, 400, 500, 600], "aurora": [400, 520]}  # fmt: skip
    assert [len(losses) for curve in result["curves"].values() for _, losses in curve] == [3] * 6
    assert result["curves"]["muon"][1][1] == entries["muon"]["val_loss"]


def test_another_machine_goes_on_from_the_results(fake: Calls, tmp_path: Path) -> None:
    first = run(tmp_path / "one", "--arms", "aurora", "--seeds", "1000", "1001")
    before = len(fake)
    (tmp_path / "two").mkdir()
    first["runs"] = {name: told for name, told in first["runs"].items() if "seed=1001" not in name}
    (tmp_path / "two/result.json").write_text(json.dumps(first), encoding="utf-8")
    again = run(tmp_path / "two", "--arms", "aurora", "--seeds", "1000", "1001")
    assert {seed for _, _, seed in fake[before:]} == {1001}
    assert summary(again) == summary(run(tmp_path / "one", "--arms", "aurora", "--seeds", "1000", "1001"))


def test_a_stop_keeps_what_has_ended(fake: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = arms.sweep

    def stopped(recipe: str, cells: list[Cell], *rest: Any) -> list[Result]:
        sweep(recipe, cells[:3], *rest)
        raise KeyboardInterrupt

    monkeypatch.setattr(arms, "sweep", stopped)
    assert main([f"--out={tmp_path}", "--yes=true"]) == 130
    assert len(json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["runs"]) == 3


def test_a_rate_that_diverged_never_wins() -> None:
    assert best_of([(0.1, 0.0, None), (0.2, 0.0, 5.0), (0.4, 0.0, None)]) == (0.2, 0.0)


def test_the_search_goes_on_while_the_best_rate_is_at_an_end() -> None:
    assert rate_beyond([(1.0, 0.0, 3.0), (2.0, 0.0, 2.0), (0.5, 0.0, 4.0)]) == 4.0
    assert rate_beyond([(1.0, 0.0, 3.0), (2.0, 0.0, None), (0.5, 0.0, 2.0)]) == 0.25
    assert rate_beyond([(1.0, 0.0, 3.0), (2.0, 0.0, 4.0), (0.5, 0.0, 4.0)]) is None
    assert rate_beyond([(2.0**i, 0.0, 3.0 - i) for i in range(MOST_RATES)]) is None


def test_steps_come_from_the_curve_within_and_beyond_it() -> None:
    curve = [(steps, [3 - 0.3 * math.log(steps)]) for steps in (100, 200, 400)]
    for steps in (50, 100, 141, 350, 400, 900):
        assert steps_at(3 - 0.3 * math.log(steps), curve) == pytest.approx(steps)


def curve_of(speed: float, shifts: Sequence[float], lengths: Sequence[int]) -> list[tuple[int, list[float]]]:
    return [(steps, [3 - 0.3 * math.log(speed * steps) + shift for shift in shifts]) for steps in lengths]


def test_steps_are_relative_to_muon_s_at_the_same_seed() -> None:
    """What a seed's text does to both makes no difference."""
    curve = curve_of(1, (0.0, 0.1), (250, 400, 600))
    muon = curve[1][1]
    faster = [loss - 0.3 * math.log(2) for loss in muon]
    entries = [dict(arm=arm, val_loss=losses, tried=[], rate=0.1, decay=0.0)
               for arm, losses in (("muon", muon), ("aurora", faster))]  # fmt: skip
    rows = summary(dict(curves=dict(muon=curve), steps=400, target=3.05 - 0.3 * math.log(500), entries=entries))
    assert {row["rule"]: row["steps"] for row in rows} == {"aurora": "250 ± 0", "muon": "500"}


def test_crossings_are_by_a_rule_s_own_losses_seed_by_seed() -> None:
    shifts = (0.0, 0.1, -0.1)
    curves = dict(
        muon=curve_of(1, shifts, (250, 400, 600)),
        aurora=curve_of(1.25, shifts, (300, 500)),
        adamw=[(400, [2.0, None, 2.0])],
        soap=[(400, [1.2] * 3)],
        muown=[(400, [1.2] * 3), (500, [1.1, 1.1, 1.2])],
    )
    fast, slow = crossings(dict(curves=curves, target=3 - 0.3 * math.log(500), seeds=(1000, 1001, 1002)))
    assert (fast["rule"], slow["rule"]) == ("aurora", "muon")  # of the others one cannot say when they cross
    each = [500 * math.exp(shift / 0.3) for shift in shifts]
    told = f"{np.mean(each):.0f} ± {np.std(each, ddof=1):.0f}"
    assert slow["steps to the target"] == f"{told} (1 of 3 seeds beyond)"
    assert fast["steps to the target"].endswith(" (2 of 3 seeds beyond)")  # 287 and 558
    assert fast["of muon's"] == "0.800"
    assert fast["95% interval of muon's"] == "0.800 to 0.800"
    assert (slow["of muon's"], slow["of aurora's"], fast["of aurora's"]) == ("-", "1.250", "-")
    assert fast["final loss by steps"] == "300: 1.2219 ± 0.1000, 500: 1.0687 ± 0.1000"


def test_the_correlation_says_how_wide_it_is() -> None:
    def entries(order: int) -> dict[str, Any]:
        ranked = sorted(PUBLISHED, key=PUBLISHED.__getitem__)[::order]
        return dict(entries=[dict(arm=arm, val_loss=[float(place)] * 2) for place, arm in enumerate(ranked)])

    assert correlation(entries(1)).startswith("rank correlation with the published steps: 0.9")  # with ties
    assert "-0.9" in correlation(entries(-1))
    assert "9 rules" in correlation(entries(1))
    assert "too few" in correlation(dict(entries=entries(1)["entries"][:3]))


@pytest.mark.parametrize(
    ("words", "problem"),
    [(dict(arms=("none",)), "arms: 'none' is unknown"), (dict(seeds=(1000, 100)), "not 100, which is for tuning")],
)
def test_what_makes_no_league_is_said(words: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        completed(league.Options(**words))
