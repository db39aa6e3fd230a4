"""What a fork changes in one place, through the whole trainer: an activation, a metric, clipping, a rule of its own."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import model
import train_gpt
from leaderboard.runs import read_run
from leaderboard.verify_run import of_files
from tests.conftest import ROOT, Trainer
from tests.test_train import metrics, only_run, summary

RULE = '''
from optim import MatrixOptimizer, Option

class SignMuon(MatrixOptimizer):
    """Sign of the momentum to a power."""

    options = {"power": Option(1.0, "exponent of the row norm", ("> 0",))}

    def orthogonalize(self, update, state, group):
        return update.sign() / update.size(-1) ** (0.5 * group["power"])
'''


def test_another_activation_is_one_line_whatever_is_fused(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses, short = [], ["--train_steps=20", "--init_out=0.5", "--init_down=0.5", "--init_head=0.1"]
    for activation in (model.ACTIVATIONS["swiglu"][0], lambda gate, up: F.gelu(gate) - up):
        monkeypatch.setitem(model.ACTIVATIONS, "swiglu", (activation, 2))
        for fused in ("none", "norm,mlp,head,blocks"):
            folder = tmp_path / str(len(losses))
            assert trainer(f"--fused={fused}", *short, f"--run_dir={folder}").returncode == 0
            losses.append(metrics(next(folder.iterdir()), "val_loss")[20])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[2] == pytest.approx(losses[3], rel=1e-4)
    assert abs(losses[0] - losses[2]) > 1e-3


def test_a_metric_is_one_line_that_reaches_all_outputs_and_no_record_minds(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = train_gpt.train_step

    def with_metric(run: train_gpt.Run, *batch: torch.Tensor) -> torch.Tensor:
        run.extra["embed_norm"] = run.model.embed.weight.norm()  # the line
        run.extra["nothing"] = math.nan
        return genuine(run, *batch)

    monkeypatch.setattr(train_gpt, "train_step", with_metric)
    result = trainer()
    directory = only_run(tmp_path)
    found = metrics(directory, "extra")
    assert set(found) == set(range(5, 41, 5))
    assert f" embed_norm:{found[40]['embed_norm']:.5g} " in result.stdout  # type: ignore[index]
    assert summary(directory)["extra"] == found[40]
    assert found[40]["nothing"] is None  # type: ignore[index]
    assert " nothing:-\n" in result.stdout
    run = read_run(directory)
    assert (run.broken, list(of_files(run))) == ([], [])

    rows = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    (directory / "metrics.jsonl").write_text(
        "\n".join(json.dumps(json.loads(row) | {"other": 1}) for row in rows), encoding="utf-8"
    )
    assert "['other'], which no trainer here writes" in read_run(directory).broken[0]


def test_a_text_that_no_metric_explains_is_no_line_of_a_record(trainer: Trainer, tmp_path: Path) -> None:
    assert trainer().returncode == 0
    log = only_run(tmp_path) / "log.txt"
    text = log.read_text(encoding="utf-8")
    log.write_text(text.replace("ms\nstep:10", "ms embed_norm:3\nstep:10"), encoding="utf-8")
    assert any("where metrics.jsonl has" in reason for reason in of_files(read_run(log.parent)))


def test_clipping_limits_the_norm_of_all_gradients_and_tells_it(trainer: Trainer, tmp_path: Path) -> None:
    norms: list[dict[int, Any]] = []
    for limit in (1e9, 0.1):
        folder = tmp_path / str(limit)
        settings = ["--matrix_optimizer=sgd", "--embed_lr=1e-3", "--train_steps=10"]
        assert trainer(f"--grad_clip={limit}", *settings, f"--run_dir={folder}").returncode == 0
        norms.append(metrics(next(folder.iterdir()), "extra"))
    free, clipped = ([row["grad_norm"] for row in found.values()] for found in norms)
    assert min(free) > 0.1  # before clipping, in both
    assert clipped != free


def test_the_documents_rule_from_outside_that_takes_gradients_and_weights_trains(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on from a checkpoint as if it had not stopped: its state is in there."""
    text = (ROOT / "docs/forking.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "steady.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    noise = ["--init_out=0.1", "--init_down=0.1"]
    words = ["--matrix_optimizer=steady:SteadyMuon", "--steadymuon_agreement=1", "--train_steps=10", *noise]
    result = trainer(*words, "--checkpoint_every=5", f"--run_dir={tmp_path / 'whole'}")
    assert result.returncode == 0, result.stderr
    (checkpoint,) = (tmp_path / "whole").glob("*/*5.pt")
    result = trainer(*words, f"--resume={checkpoint}", f"--run_dir={tmp_path / 'rest'}")
    assert result.returncode == 0, result.stderr
    whole, rest = (summary(next((tmp_path / folder).iterdir()))["val_loss"] for folder in ("whole", "rest"))
    assert whole == rest < 3.9  # ln 48, of a model that knows nothing, is 3.87


def test_a_rule_from_outside_has_settings_and_its_source_in_the_log(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rules.py").write_text(RULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    rule = "--matrix_optimizer=my_rules:SignMuon"
    result = trainer(rule, "--signmuon_power=2", "--train_steps=10")
    assert result.returncode == 0, result.stderr
    assert "SignMuon matrix" in result.stdout
    assert summary(only_run(tmp_path))["config"]["signmuon_power"] == 2
    assert "# file: my_rules.py\n" + RULE in (only_run(tmp_path) / "log.txt").read_text(encoding="utf-8")

    for words, said in (
        ([rule, "--signmuon_power=0"], "signmuon_power = 0 must be > 0; 1.0 works"),
        (["--signmuon_power=2"], "signmuon_power is not a setting"),
        (["--matrix_optimizer=my_rules:Other"], "my_rules has no Other; choose one of SignMuon"),
        (["--matrix_optimizer=no_such:Rule"], "'no_such' cannot be imported"),
    ):
        refused = trainer(*words)
        assert refused.returncode == 2
        assert said in refused.stderr
