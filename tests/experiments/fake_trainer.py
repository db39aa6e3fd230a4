"""A trainer for sweeps of runs that compute nothing."""

from pathlib import Path

import pytest

from experiments import sweep

# Stands in for the trainer where only what the sweep does with it matters. The summary says how it was called.
FAKE_TRAINER = """
import json, pathlib, sys
words = dict(word[2:].split("=", 1) for word in sys.argv if word.startswith("--") and "=" in word)
if "crash" in words.values():
    sys.exit("RuntimeError: out of luck")
directory = pathlib.Path(words["run_dir"], "fake")
directory.mkdir()
summary = dict(status="finished", val_loss=1.0, train_time_s=2.0, time_to_target_s=None, steps_to_target=None,
               git_commit="", device="", arguments=sys.argv[1:])
(directory / "summary.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def fake_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe for a sweep of runs that compute nothing."""
    monkeypatch.setattr(sweep, "TRAINER", tmp_path / "fake_trainer.py")
    monkeypatch.setattr(sweep, "load_config", lambda argv: None)  # which knows no settings but the real trainer's
    sweep.TRAINER.write_text(FAKE_TRAINER, encoding="utf-8")
    recipe = tmp_path / "fake.toml"
    recipe.write_text("num_layers = 1\n", encoding="utf-8")
    return recipe
