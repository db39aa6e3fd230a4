"""The experiment on dead neurons: equal tuning, restarts that change nothing, tables from runs with known numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments import neuron_report, neurons, sweep
from experiments.neurons import FULL, best_rate, groups, main, rates_of
from tests.conftest import ROOT, Trainer
from tests.harness.test_neuron_stats import strict_json
from tests.test_train import metrics, only_run

# Stands in for the trainer: losses that follow from the settings, lowest at a rate of 0.02 for muon and 0.04 for aurora
FAKE_TRAINER = """
import json, math, pathlib, sys
words = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
rule, rate, seed = words.get("matrix_optimizer"), float(words.get("matrix_lr", 0)), int(words.get("seed", 0))
best = dict(muon=0.02, aurora=0.04, adamw=0.004).get(rule, 0.02)
loss = 2 + abs(math.log(rate / best)) + 0.1 * (seed % 3) if rate else 0
directory = pathlib.Path(words.get("run_dir", "."), "fake")
if rate:
    directory.mkdir()
    status = "diverged by step 3" if words.get("mlp_hidden") == "128" and rate > 0.02 else "finished"
    summary = dict(status=status, val_loss=loss, device="a device", git_commit="abc", steps_to_target=None)
    shares = lambda share: {measure: {t: [share, 2 * share] for t in ("0.3", "0.1", "0.03", "0.01")}
                            for measure in ("mean", "peak")}
    rows = []
    for step in range(10, 41, 10) if "neuron_stats" in words and status == "finished" else ():
        dead = shares(0.01 * step / 40 * (1 + seed))
        look = {name: dict(update_cv=[None, 0.5], least_moved_share=[0.05, 0.07]) for name in ("gate", "up", "down")}
        look |= dict(median=dict(mean=[1.0, 2.0]), dead=dead, ever_dead=dead, revived=dead, dead_since=dict(mean=20.0))
        rows.append(dict(step=step, neurons=look))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    (directory / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def fake_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fake_trainer.py"
    path.write_text(FAKE_TRAINER, encoding="utf-8")
    monkeypatch.setattr(sweep, "TRAINER", path)


def command(recipe: Path, out: Path, *arguments: str) -> list[str]:
    asked = ["--preset=full", "--yes", "--arms", "muon", "aurora", "--expansions", "8/3", "8", "--rates_tried=3"]
    return [*asked, "--steps=40", "--every=10", "--jobs=4", f"--recipe={recipe}", f"--out={out}", *arguments]


def test_tuning_is_equal_and_apart_from_what_is_reported(
    fake_trainer: None, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tiny_recipe, tmp_path / "whole")) == 0
    record = strict_json((tmp_path / "whole.json").read_text(encoding="utf-8"))
    assert [len(entry["tried"]) for entry in record["tuning"]] == [3] * 4
    tuned = json.loads((tmp_path / "whole/tuning/sweep.json").read_text(encoding="utf-8"))
    assert {run["seed"] for run in tuned["runs"]} == {100}
    found = {(run["expansion"], run["arm"]): (run["rate"], run["at_edge"]) for run in record["runs"]}
    assert found == {
        ("8/3", "muon"): (0.02, False), ("8/3", "aurora"): (0.04, True),
        ("8", "muon"): (0.02, False), ("8", "aurora"): (0.02, False),  # 0.04 diverged there
    }  # fmt: skip
    assert [(run["seed"], run["mlp_hidden"]) for run in record["runs"]] == [
        (seed, hidden) for seed in (0, 1, 2) for hidden in (64, 64, 128, 128)
    ]
    captured = capsys.readouterr()
    assert "24 runs of 40 steps (12 of them to tune), 0 done" in captured.err
    assert "0.04*" in captured.out
    assert "a rate beyond it may be better" in captured.out
    figure = tmp_path / "whole.png"
    figure.unlink()
    assert main([f"--draw={tmp_path / 'whole.json'}"]) == 0
    assert capsys.readouterr().out == captured.out
    assert figure.read_bytes().startswith(b"\x89PNG")

    again = main(command(tiny_recipe, tmp_path / "whole"))
    assert again == 0
    assert "24 runs" not in capsys.readouterr().err  # nothing is left to be timed or asked for


@pytest.mark.parametrize("stopped_at", [3, 7], ids=["in the tuning", "in the runs"])
def test_an_interrupted_experiment_goes_on_to_the_same_result(
    fake_trainer: None, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    less = ["--expansions", "4", "--rates_tried=2", "--seeds", "0", "1"]  # 4 runs to tune, then 4
    genuine, starts = sweep._start, []

    def start(*arguments: Any) -> Any:
        starts.append(arguments[1].name)
        if len(starts) == stopped_at:
            raise KeyboardInterrupt
        return genuine(*arguments)

    monkeypatch.setattr(neurons, "plan", lambda *_: ["a plan"])
    monkeypatch.setattr(sweep, "_start", start)
    assert main(command(tiny_recipe, tmp_path / "out", *less, "--jobs=1")) == 130
    assert not (tmp_path / "out.json").exists()
    assert main(command(tiny_recipe, tmp_path / "out", *less, "--jobs=1")) == 0
    assert len(starts) == 8 + 1  # one twice: the one that was stopped
    assert main(command(tiny_recipe, tmp_path / "whole", *less)) == 0
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == (tmp_path / "whole.json").read_text(encoding="utf-8")


def test_a_real_run_is_kept_as_it_was_measured(
    tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neurons, "plan", lambda *_: [])
    asked = [f"--recipe={tiny_recipe}", "--arms", "muon", "--seeds", "0", "--steps=12", "--every=4"]
    assert main([*asked, f"--out={tmp_path / 'out'}", "--set", "batch_tokens=96", "micro_batch_tokens=96"]) == 0
    (run,) = strict_json((tmp_path / "out.json").read_text(encoding="utf-8"))["runs"]
    (directory,) = (tmp_path / "out").glob("runs/runs/*/*/*/")
    looks = metrics(directory, "neurons")
    assert list(looks) == run["looks"]["steps"] == [4, 8, 12]
    assert run["last"] == looks[12]
    for step, cv, dead in zip(looks, run["looks"]["update_cv"]["up"], run["looks"]["dead"]["peak"]["0.3"], strict=True):
        assert cv == pytest.approx(np.mean(looks[step]["up"]["update_cv"]), rel=5e-3)
        assert dead == pytest.approx(np.mean(looks[step]["dead"]["peak"]["0.3"]), rel=5e-3)
    assert run["val_loss"] == round(metrics(directory, "val_loss")[12], 4)
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    assert (summary["config"]["matrix_lr"], summary["config"]["stop_at_target"]) == (0.02, False)
    assert "rates were not tuned here" in capsys.readouterr().out


def run(arm: str, seed: int, loss: float | None, dead: float, **changes: Any) -> dict[str, Any]:
    """One run as the JSON keeps it: two layers, of which the first has no dead neuron."""
    shares = {measure: {f"{t:g}": [0.0, 2 * dead * t] for t in (0.3, 0.1, 0.03, 0.01)} for measure in ("mean", "peak")}
    last = {name: dict(least_moved_share=[0.04, 0.06]) for name in ("gate", "up", "down")}
    last |= dict(dead=shares, ever_dead=shares, revived=shares, dead_since=dict(mean=100 if dead else None))
    cv = dict(gate=[None, 0.2, 0.4], up=[None, 0.4, 0.6], down=[0.1, 0.1, 0.1])
    curves = {measure: {t: [0.0, 0.0, dead] for t in ("0.3", "0.1", "0.03", "0.01")} for measure in ("mean", "peak")}
    looks = dict(steps=[1, 2, 3], dead=curves, update_cv=cv)
    kept = dict(arm=arm, expansion="4", seed=seed, rate=0.01, at_edge=False, status="finished", val_loss=loss)
    return kept | dict(looks=looks, last=last) | changes


def record(*runs: dict[str, Any]) -> dict[str, Any]:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    return dict(device="a device", recipe="a recipe", steps=3, seeds=[0, 1], arms=arms, expansions=["4"], tuning=[1],
                runs=list(runs))  # fmt: skip


def test_table_of_hand_made_runs() -> None:
    diverged = run("adamw", 1, None, 0.0, status="diverged by step 2", last=None)
    diverged["looks"] = dict(steps=[], dead={}, update_cv=dict(gate=[], up=[], down=[]))
    made = record(run("muon", 0, 1.0, 0.5), run("muon", 1, 1.2, 0.7), run("adamw", 0, 1.5, 0.0), diverged)
    muon, adamw = neuron_report.summary(made)
    assert muon == {
        "MLP": "4", "arm": "muon", "rate": "0.01", "final loss": "1.1000 ± 0.1414", "diverged": "0/2",
        "dead % < 0.3": "18.00 ± 4.24", "dead % < 0.1": "6.00 ± 1.41", "dead % < 0.03": "1.80 ± 0.42",
        "dead % < 0.01": "0.60 ± 0.14", "by peak % < 0.3": "18.00 ± 4.24", "half dead by": "100 ± 0",
        "ever dead %": "6.00 ± 1.41", "revived %": "6.00 ± 1.41", "CV gate, up": "0.400 ± 0.000",
        "CV down": "0.100 ± 0.000", "least moved %": "5.00 ± 0.00",
    }  # fmt: skip
    assert (adamw["final loss"], adamw["diverged"], adamw["half dead by"]) == ("1.5000", "1/2", "-")
    muon, _ = neuron_report.sensitivity(made)
    assert (muon["mean < 0.3"], muon["peak < 0.03"]) == ("18.00", "1.80")


def test_correlation_is_scipys_and_within_arms_without_their_means(tmp_path: Path) -> None:
    losses, dead = [1.0, 1.1, 1.3, 2.0, 2.2, 2.1], [0.3, 0.2, 0.1, 0.9, 0.8, 0.85]
    arms = ["muon"] * 3 + ["adamw"] * 3
    made = record(*map(run, arms, range(6), losses, dead))
    by_mean, by_peak = neuron_report.correlation(made)
    expected = stats.spearmanr(dead, losses)
    assert (by_mean["rho"], by_mean["p"]) == (f"{expected.statistic:.2f}", f"{expected.pvalue:.2g}")
    assert float(by_mean["rho within arms"]) < 0 < float(by_mean["rho"])
    assert by_peak | {"dead by": "mean"} == by_mean
    assert neuron_report.spearman([(0, 1), (0, 2), (0, 3)]) == ("-", "-")
    neuron_report.draw(made, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_every_arm_gets_the_same_rates_and_an_end_is_noticed() -> None:
    assert rates_of("muon", 0) == rates_of("aurora_warm", 0) == (0.02,)
    assert rates_of("adamw", 0) == (0.002,)
    assert rates_of("adamw", 4) == (0.0005, 0.001, 0.002, 0.004)
    assert rates_of("muon", 2) == rates_of("aurora", 2) == (0.02, 0.04)
    assert rates_of("adamw", 2) == (0.002, 0.004)
    assert best_rate({0.1: 2.0, 0.2: 1.0, 0.4: None}) == (0.2, False)
    assert best_rate({0.1: None, 0.2: None}) == (0.1, True)


def test_hidden_widths_are_multiples_of_64() -> None:
    assert [group.settings["mlp_hidden"] for group in groups(FULL, 128)[::7]] == ["384", "512", "1024"]
    assert [group.settings["mlp_hidden"] for group in groups(FULL, 768)[::7]] == ["2048", "3072", "6144"]
    assert len(groups(FULL, 128)) == 21


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arms", "muon", "moon"], ["muon,moon", "one of adamw, muon"]),
        (["--seeds", "0", "0"], ["seeds = 0 0", "each once"]),
        (["--rates_tried=1"], ["rates_tried = 1", "2 to 4"]),
        (["--rates_tried=2", "--seeds", "100"], ["100 is for tuning"]),
        (["--every=0"], ["every = 0"]),
        (["--steps=20"], ["every = 25 must divide steps = 20"]),
        (["--expansions", "8/0"], ["'8/0'", "try 8/3 4 8"]),
        (["--expansions", "8/3", "4"], ["8/3 and 4 are both mlp_hidden = 64"]),
        (["--set", "mlp_hidden=3"], ["--set: mlp_hidden is set by this command itself"]),
        (["--set", "train_steps=3"], ["--set: train_steps is set by this command itself"]),
        ([f"--draw={ROOT / 'experiments/results/sotu_tuning.json'}"], ["not a result of this experiment"]),
        (["--preset=full", "--expansions", "4", "--arms", "muon"], ["nothing was started", "--yes"]),
        (["--draw=none.json"], ["none.json"]),
        (["--preset=fast"], ["fast"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_a_mistake_is_one_line(
    tiny_recipe: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.setattr(neurons, "plan", lambda *_: ["a plan"])
    assert main([f"--recipe={tiny_recipe}", f"--out={tmp_path / 'out'}", *arguments]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert all(word in error for word in words), error
    assert not (tmp_path / "out/runs").exists() or not list((tmp_path / "out").glob("runs/runs/*"))


def test_one_run_is_drawn(trainer: Trainer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert trainer("--train_steps=8", "--neuron_stats=4").returncode == 0
    directory = only_run(tmp_path)
    assert main([f"--run={directory}"]) == 0
    assert "2 measurements" in capfd.readouterr().out
    assert (directory / "neurons.png").read_bytes().startswith(b"\x89PNG")
    (directory / "metrics.jsonl").write_text("", encoding="utf-8")
    assert main([f"--run={directory}"]) == 2
    assert "train with --neuron_stats" in capfd.readouterr().err
