"""The experiment on dead neurons: equal tuning, restarts that change nothing, tables from runs with known numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments import neuron_protocol, neuron_report, neurons, sweep
from experiments.neuron_protocol import best_rate, groups, rates_of, seeds_of
from experiments.neurons import FULL, main
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
    summary |= dict(num_params=int(words.get("mlp_hidden", 0)), tokens=640)
    edges = ("0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1", "2", "4")
    rows = []
    for step in range(10, 41, 10) if "neuron_stats" in words and status == "finished" else ():
        share = 0.01 * step / 40 * (1 + seed)
        kind = dict(below=dict.fromkeys(edges, [share, 2 * share]), effective=[None, 0.5], persistence=[None, None])
        leverage = dict(leverage=dict(row_norms=kind, update=kind, momentum=kind))
        look = dict.fromkeys(("gate", "up", "down"), leverage)
        dead = {measure: {t: [share, share] for t in ("0.3", "0.1")} for measure in ("mean", "peak")}
        rows.append(dict(step=step, neurons=look | dict(contributing=[0.4, 0.6], dead=dead)))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    (directory / "summary.json").write_text(json.dumps(summary))
"""

RISES = {"0.1": 0.001, "0.2": 0.002, "0.3": 0.004, "0.4": 0.008, "0.5": 0.016}


@pytest.fixture
def fake_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fake_trainer.py"
    path.write_text(FAKE_TRAINER, encoding="utf-8")
    monkeypatch.setattr(sweep, "TRAINER", path)
    monkeypatch.setattr(neurons, "measured_pruning", lambda options, result: None if result.diverged else RISES)


def command(recipe: Path, out: Path, *arguments: str) -> list[str]:
    asked = ["--preset=full", "--yes", "--arms", "muon", "aurora", "--variants", "base", "mlp_8", "rate_0.05"]
    asked += ["--rates_tried=3"]
    return [*asked, "--steps=40", "--every=10", "--jobs=4", f"--recipe={recipe}", f"--out={out}", *arguments]


def test_tuning_is_equal_and_apart_from_what_is_reported(
    fake_trainer: None, tiny_recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tiny_recipe, tmp_path / "whole")) == 0
    record = strict_json((tmp_path / "whole.json").read_text(encoding="utf-8"))
    assert [(entry["arm"], len(entry["tried"])) for entry in record["tuning"]] == [("muon", 3), ("aurora", 3)]
    tuned = json.loads((tmp_path / "whole/tuning/sweep.json").read_text(encoding="utf-8"))
    assert {run["seed"] for run in tuned["runs"]} == {100}
    found = {(run["variant"], run["arm"]): (run["rate"], run["at_edge"]) for run in record["runs"]}
    assert found == {  # a variant takes the rates of the base
        ("base", "muon"): (0.02, False), ("base", "aurora"): (0.04, True),
        ("mlp_8", "muon"): (0.02, False), ("mlp_8", "aurora"): (0.04, True),
        ("rate_0.05", "muon"): (0.05, False), ("rate_0.05", "aurora"): (0.05, False),  # but for its own
    }  # fmt: skip
    assert [(run["variant"], run["arm"], run["seed"]) for run in record["runs"]] == [
        (variant, arm, seed)
        for variant in ("base", "mlp_8", "rate_0.05")
        for arm in ("muon", "aurora")
        for seed in (0, 1, 2)
    ]
    assert {(run["variant"], run["arm"]) for run in record["runs"] if run["val_loss"] is None} == {("mlp_8", "aurora")}
    by_hand = [2 + abs(np.log(0.05 / 0.04)) + 0.1 * seed for seed in range(3)]
    found = [run["val_loss"] for run in record["runs"] if (run["variant"], run["arm"]) == ("rate_0.05", "aurora")]
    assert found == pytest.approx(by_hand, abs=1e-4)
    captured = capsys.readouterr()
    assert "24 runs of 40 steps (6 of them to tune), 0 done" in captured.err
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
    less = ["--variants", "base", "--rates_tried=2", "--seeds", "0", "1"]  # 4 runs to tune, then 4
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
    assert main([*asked, f"--out={tmp_path / 'out'}", "--set", "val_tokens=192"]) == 0
    (run,) = strict_json((tmp_path / "out.json").read_text(encoding="utf-8"))["runs"]
    (directory,) = (tmp_path / "out").glob("runs/runs/*/*/*/")
    looks = metrics(directory, "neurons")
    assert list(looks) == run["looks"]["steps"] == [4, 8, 12]
    for kind in ("row_norms", "update", "momentum"):
        expected = [np.mean([looks[step][name]["leverage"][kind]["below"]["0.25"] for name in ("gate", "up")])
                    for step in looks]  # fmt: skip
        assert run["looks"]["idle"][kind] == pytest.approx(expected, rel=5e-3)
    assert run["looks"]["contributing"] == pytest.approx(
        [np.mean(look["contributing"]) for look in looks.values()], rel=5e-3
    )
    assert run["last"]["down"]["effective_rank"] == pytest.approx(
        np.mean(looks[12]["down"]["effective_rank"]), rel=5e-3
    )
    # Validation is one micro-batch here, so that the run's own pruning was of the same tokens
    assert run["pruning"] == pytest.approx(looks[12]["pruning"], abs=1e-6)
    assert max(map(abs, run["pruning"].values())) > 1e-5
    assert json.loads((directory / "pruning.json").read_text(encoding="utf-8"))["rises"] == run["pruning"]
    assert not list(directory.glob("*.pt"))
    assert run["val_loss"] == round(metrics(directory, "val_loss")[12], 4)
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    assert (summary["config"]["matrix_lr"], summary["config"]["stop_at_target"]) == (0.02, False)
    assert "rates were not tuned here" in capsys.readouterr().out

    more = [*asked, f"--out={tmp_path / 'out'}", "--set", "val_tokens=192"]
    assert main(more) == 0  # nothing is left to do, the checkpoint is not needed
    (directory / "pruning.json").unlink()
    assert main(more) == 2
    assert "checkpoint_000012.pt, which pruning is measured on, is gone; delete" in capsys.readouterr().err
    assert main([*more, "--every=6"]) == 2
    assert "has runs with neuron_stats = 4, not 6; take their options" in capsys.readouterr().err


def test_a_plan_counts_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs at a rate that did not win do not count as done; while tuning is not, no reported run does."""
    options = neurons.Options(
        "full", ("muon", "muon_first_half"), ("base", "rate_0.05"), (0, 1), steps=10, rates_tried=3, out=str(tmp_path)
    )
    of_all = groups(options.arms, options.variants, options.steps, 64, 1)
    tuned = [group for group in of_all if group.arm == "muon"][:1]
    ended: dict[str, dict[Any, Any]] = dict(tuning={}, runs={})

    def end(name: str, group: neuron_protocol.Group, rate: float, seed: int, loss: float = 1.0) -> None:
        cell = group.cell(rate)
        result = sweep.Result(cell, seed, 1, 1, "", dict(status="finished", val_loss=loss))
        ended[name][neuron_protocol.key_of(cell, seed)] = result

    monkeypatch.setattr(neurons, "ended_runs", lambda options, name: ended[name])
    monkeypatch.setattr(neurons.arms, "seconds_of_a_run", lambda recipe, settings, threads: 60.0)

    def told() -> list[str]:
        return neurons.plan(options, of_all, tuned, 1, False)

    assert told()[0] == "9 runs of 10 steps (3 of them to tune), 0 done"
    assert [line.split()[:2] for line in told()[1:3]] == [["base", "muon"], ["base", "muon_first_half"]]
    assert told()[3].startswith("about 9 min for the rest")
    for rate, loss in ((0.01, 1.2), (0.02, 1.0)):
        end("tuning", tuned[0], rate, 100, loss)
    end("runs", tuned[0], 0.02, 0)
    assert told()[0].endswith("2 done")
    end("tuning", tuned[0], 0.04, 100, 1.1)
    end("runs", tuned[0], 0.01, 1)  # of an earlier plan
    assert told()[0].endswith("4 done")
    for group in of_all:
        for seed in options.seeds:
            end("runs", group, 0.05 if group.variant == "rate_0.05" else 0.02, seed)
    assert told() == []


def run(arm: str, seed: int, loss: float | None, idle: float, **changes: Any) -> dict[str, Any]:
    """One run as the JSON keeps it, its updates' leverage twice as uneven as its momentum's."""
    edges = [f"{edge:g}" for edge in (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4)]
    leverage = {
        kind: dict(below={edge: share * min(1, float(edge)) for edge in edges}, effective=1 - share, persistence=0.5)
        for kind, share in (("row_norms", idle), ("update", idle), ("momentum", idle / 2))
    }
    last = {name: dict(leverage=leverage) for name in ("gate", "up", "down")}
    last |= dict(contributing=0.5, dead={measure: {"0.3": 0.03, "0.1": 0.01} for measure in ("mean", "peak")})
    curve = {kind: [0.0, idle / 4] for kind in ("row_norms", "update", "momentum")}
    looks = dict(steps=[2, 3], idle=curve, effective=curve, persistence=curve, contributing=[1.0, 0.5])
    kept = dict(arm=arm, variant="base", seed=seed, rate=0.01, at_edge=False, status="finished", val_loss=loss)
    return kept | dict(looks=looks, last=last, pruning=RISES) | changes


def record(*runs: dict[str, Any]) -> dict[str, Any]:
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    told = dict(device="a device", recipe="a recipe", steps=3, every=1, seeds=[0, 1], tokens=640, params=[1000])
    return told | dict(arms=arms, variants=["base"], tuning=[1], runs=list(runs))


def test_table_of_hand_made_runs(tmp_path: Path) -> None:
    diverged = run("adamw", 1, None, 0.0, status="diverged by step 2", last=None, pruning=None)
    diverged["looks"] = {}
    made = record(
        run("muon", 0, 1.0, 0.5), run("muon", 1, 1.2, 0.7), run("aurora", 0, 0.9, 0.1), run("aurora", 1, 1.08, 0.1),
        run("adamw", 0, 1.5, 0.0), diverged, run("riemannian_aurora", 0, 0.8, 0.0),
    )  # fmt: skip
    muon, aurora, adamw, riemannian = neuron_report.losses(made)
    assert (riemannian["less than muon's by"], riemannian["p (Holm)"]) == ("-", "-")  # of one seed
    assert muon == {
        "variant": "base", "arm": "muon", "rate": "0.01", "seeds": "2", "final loss": "1.1000 ± 0.1414",
        "diverged": "0/2", "less than muon's by": "-", "95% interval": "-", "p (Holm)": "-",
    }  # fmt: skip
    differences = [0.1, 0.12]
    low, high = stats.t.interval(0.95, 1, np.mean(differences), stats.sem(differences))
    p = stats.ttest_1samp(differences, 0).pvalue
    assert (aurora["less than muon's by"], aurora["95% interval"]) == ("0.1100", f"{low:.4f} to {high:.4f}")
    assert aurora["p (Holm)"] == f"{p:.2g}"  # AdamW is no comparison, one of its runs diverged
    assert (adamw["final loss"], adamw["diverged"], adamw["p (Holm)"]) == ("1.5000", "1/2", "-")
    muon, _, adamw, _ = neuron_report.leverages(made)
    assert (muon["row norms: % < 0.25"], muon["momentum: % < 0.1"]) == ("15.0 ± 3.5", "3.0 ± 0.7")
    assert (muon["update: effective"], adamw["momentum: effective"]) == ("0.40 ± 0.14", "1.00")
    muon, _, adamw, _ = neuron_report.functions(made)
    assert (muon["pruned 30%"], adamw["pruned 50%"]) == ("4.0 ± 0.0", "16.0")
    assert (muon["dead % (mean < 0.1)"], adamw["dead % (peak < 0.3)"]) == ("1.0 ± 0.0", "3.0")
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


def test_a_variant_changes_one_thing_for_three_arms() -> None:
    of_all = groups(FULL.arms, FULL.variants, FULL.steps, 128, 2)
    base = {group.arm: group.settings for group in of_all if group.variant == "base"}
    assert list(base) == [*neuron_protocol.ARMS, *neuron_protocol.SWITCHED]
    assert (base["muon_first_fifth"]["switching_first"], base["aurora_first_half"]["switching_after"]) == (
        "muon",
        "250",
    )
    changed = {}
    for group in of_all:
        if group.variant != "base":
            assert group.arm in ("muon", "unormuon", "aurora")
            changed.setdefault(group.variant, []).append(group.settings.items() - base[group.arm].items())
    assert {name: [dict(each) for each in found] for name, found in changed.items()} == {
        "mlp_4": [{"mlp_hidden": "512"}] * 3,
        "mlp_8": [{"mlp_hidden": "1024"}] * 3,
        "normal_start": [{"init_out": "0.02", "init_down": "0.02", "init_head": "0.02"}] * 3,
        "decay_0.025": [{"matrix_weight_decay": "0.025"}] * 3,
        "width_doubled": [{"model_dim": "256", "num_heads": "4", "mlp_hidden": "704"}] * 3,
        "rate_0.05": [{}] * 3,
    }
    assert base["muon"]["mlp_hidden"] == "384"
    assert groups(["muon"], ["base"], 500, 768, 6)[0].settings["mlp_hidden"] == "2048"
    assert seeds_of("riemannian_aurora", FULL.seeds) == (0,)
    assert seeds_of("muon", FULL.seeds) == (0, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--arms", "muon", "moon"], ["muon,moon", "one of muon, aurora"]),
        (["--seeds", "0", "0"], ["seeds = 0 0", "each once"]),
        (["--rates_tried=1"], ["rates_tried = 1", "2 to 4"]),
        (["--rates_tried=2", "--seeds", "100"], ["100 is for tuning"]),
        (["--every=0"], ["every = 0"]),
        (["--steps=20"], ["every = 25 must divide steps = 20"]),
        (["--arms", "muon_first_half", "aurora"], ["take the rate that wins for muon", "name it as well"]),
        (["--variants", "mlp_5"], ["mlp_5", "one of base, mlp_4"]),
        (["--variants", "mlp_8", "--arms", "adamw"], ["all but base are for muon unormuon aurora", "name base"]),
        (["--set", "mlp_hidden=3"], ["--set: mlp_hidden is set by this command itself"]),
        (["--set", "train_steps=3"], ["--set: train_steps is set by this command itself"]),
        ([f"--draw={ROOT / 'experiments/results/sotu_tuning.json'}"], ["not a result of this experiment"]),
        (["--preset=full", "--variants", "base", "--arms", "muon"], ["nothing was started", "--yes"]),
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
