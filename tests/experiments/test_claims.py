"""The smaller claims: equal tuning, what is compared with what, and losses at equal training loss, of known curves."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from data.shards import open_shard, write_shard
from experiments import claims, sweep
from experiments.claims import EPOCH_STEPS, PARTS, RATES, gaps, losses, main, other_text_at
from train_gpt import Config

# Stands in for the trainer. Losses follow from the settings: lowest at a rate of 0.02, for adamw 0.004; clipping costs
# 0.1 under muon and pays 0.2 under adamw. The training loss falls by one in 1,000 steps, the loss on other text by half
# of that, more slowly under muon; within an epoch of 244 steps it rises and falls besides.
FAKE_TRAINER = """
import json, math, pathlib, sys
words = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
rule, rate, seed = words["matrix_optimizer"], float(words["matrix_lr"]), int(words["seed"])
loss = 2 + abs(math.log(rate / dict(adamw=0.004).get(rule, 0.02))) + 0.01 * seed
if words.get("grad_clip") == "1":
    loss += dict(muon=0.1, adamw=-0.2)[rule]
directory = pathlib.Path(words["run_dir"], "fake")
directory.mkdir()
status = "diverged by step 3" if rule == "aurora" and rate > 0.03 else "finished"
rows, steps = [], int(words["train_steps"])
for step in range(0, steps + 1):
    row = dict(step=step)
    if step and step % int(words.get("log_every", 25)) == 0:
        row |= dict(train_loss=2 - (step - 0.5) / 1000)
        if words.get("grad_clip") == "1":
            row |= dict(extra=dict(grad_norm=2.0 if step <= steps // 4 else 0.5))
    if step % int(words["val_every"]) == 0:
        within = math.sin(2 * math.pi * step / 244)
        row |= dict(val_loss=2.2 - step / (2500 if rule == "muon" else 2000) + 0.01 * seed + 0.1 * within)
    rows.append(row)
(directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
summary = dict(status=status, val_loss=loss, device="a device", git_commit="abc", steps_to_target=None)
(directory / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    path = tmp_path / "fake_trainer.py"
    path.write_text(FAKE_TRAINER, encoding="utf-8")
    monkeypatch.setattr(sweep, "TRAINER", path)
    monkeypatch.setattr(claims.arms, "seconds_of_a_run", lambda recipe, settings, threads: 60.0)
    monkeypatch.setattr(claims, "ensure", lambda *_: None)
    write_shard(tmp_path / "whole_train_0.bin", [1, 2, 3] * 200_000)
    files = Config(train_files=str(tmp_path / "whole_train_*.bin"), batch_tokens=2048)
    monkeypatch.setattr(claims, "load_config", lambda words: files)
    assert main(["--yes", "--jobs=4", f"--out={tmp_path / 'out'}"]) == 0
    told = capsys.readouterr()
    assert "epochs     9 runs of 1464 steps, 60 s each at most" in told.err
    assert "about 22 min in all, 4 at a time" in told.err  # of 21 + 56 + 9 runs
    found: dict[str, Any] = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert main([f"--draw={tmp_path / 'out.json'}"]) == 0
    assert capsys.readouterr().out == told.out
    assert len(open_shard(tmp_path / "out/few/few_train_000001.bin")) == EPOCH_STEPS * 2048
    return found


def test_all_parts_are_tuned_alike_and_compared_with_their_baselines(record: dict[str, Any]) -> None:
    parts = record["parts"]
    for name in ("masked", "clipping"):
        for arm in parts[name]["arms"]:
            scale = 0.1 if arm["arm"].startswith("adamw") else 1
            assert [rate for rate, _ in arm["tried"]] == pytest.approx([scale * rate for rate in RATES])
    rows = {row["arm"]: row for row in losses(parts["masked"])}
    assert {arm: row["rate"] for arm, row in rows.items()} == {"muon": "0.02", "aurora": "0.02", "adamw": "0.004*"}
    assert parts["masked"]["arms"][1]["tried"][3] == [0.04, None]  # it diverged
    rows = {row["arm"]: row for row in losses(parts["clipping"])}
    assert list(rows) == [
        f"{rule}{rest}"
        for rule in ("muon", "adamw")
        for rest in ("", ", constant rate", ", clipped", ", clipped, constant rate")
    ]
    assert {arm: (row["baseline"], row["lower by"]) for arm, row in rows.items() if "clipped" in arm} == {
        "muon, clipped": ("muon", "-0.1000"), "muon, clipped, constant rate": ("muon", "-0.1000"),
        "adamw, clipped": ("adamw", "0.2000"), "adamw, clipped, constant rate": ("adamw", "0.2000"),
    }  # fmt: skip
    assert rows["muon, clipped"]["steps clipped"] == "25%"
    assert rows["muon"]["steps clipped"] == "-"
    assert record["parts"]["clipping"]["arms"][0]["val_loss"] == [2.0, 2.01, 2.02]


def test_losses_on_other_text_are_read_at_equal_training_losses(record: dict[str, Any]) -> None:
    arms = {arm["arm"]: arm["curves"] for arm in record["parts"]["epochs"]["arms"]}
    for arm, slope in (("muon", 2500), ("adamw", 2000)):
        for seed, points in enumerate(arms[arm]):
            assert [point[0] for point in points] == list(range(122, 1464 - 121, 61))  # a whole epoch around each
            for step, trained, other in points:
                assert trained == pytest.approx(2 - step / 1000, abs=1e-4)
                within = math.sin(2 * math.pi * step / EPOCH_STEPS)
                assert other == pytest.approx(2.2 - step / slope + 0.01 * seed + 0.1 * within, abs=1e-4)
    rows = {row["training loss"]: row for row in gaps(record["parts"]["epochs"])}
    assert list(rows) == ["1.3", "1.2", "1.1", "1", "0.9", "0.8", "at the end"]
    assert rows["1"]["muon"] == "1.8100 ± 0.0100"
    lower, low, high = map(float, re.findall(r"-?\d+\.\d+", rows["1"]["adamw: lower than muon's by"]))
    assert lower == pytest.approx(1000 / 2000 - 1000 / 2500, abs=2e-4)
    assert low <= lower <= high


def test_runs_that_logged_no_norm_have_no_share() -> None:
    arm = dict(arm="muon", baseline="muon", rate=0.02, at_edge=False, val_loss=[1.0, 2.0])
    rows = losses(dict(arms=[arm | dict(clipped=clipped) for clipped in ([0.5, None], [None, None], None)]))
    assert [row["steps clipped"] for row in rows] == ["50%", "-", "-"]


def test_a_level_that_is_never_passed_has_no_loss() -> None:
    points = [[122, 1.2, 1.4], [183, 1.0, 1.3], [244, 1.05, 1.2], [305, 0.9, 1.25]]
    assert other_text_at(points, 1.1) == pytest.approx(1.35)
    assert other_text_at(points, 1.0) == pytest.approx(1.3)
    assert other_text_at(points, 0.95) == pytest.approx(1.2 + 0.05 * 2 / 3)
    assert other_text_at(points, 1.25) is None
    assert other_text_at(points, 0.8) is None


def test_the_protocol() -> None:
    assert all(arm.baseline in part.arms for part in PARTS.values() for arm in part.arms.values())
    (epochs,) = (PARTS["epochs"],)
    assert int(epochs.settings["train_steps"]) == 6 * EPOCH_STEPS


def test_other_files_and_a_start_without_a_terminal_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"parts": {"masked": {}}}', encoding="utf-8")
    assert main([f"--draw={other}"]) == 2
    assert "is not a result of this experiment" in capsys.readouterr().err
