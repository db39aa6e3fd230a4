"""What tracks hold a run to: source that they know, and settings that are the same for all."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import class_of
from leaderboard.runs import Run, read_run
from leaderboard.tracks import Track, find_track, hash_at, load_tracks
from leaderboard.verify import lacking_proof
from leaderboard.verify_run import of_track
from tests.conftest import ROOT
from train_gpt import load_config, model_config


def test_the_tracks_know_the_source_of_this_repository() -> None:
    """When the stream's files change and every step still gets the same tokens, or what a step computes changes and is
    still one pass with the same loss, the new version goes into tracks.toml beside the old ones."""
    known = {place: of for track in load_tracks().values() for place, of in (track.stream | track.step).items()}
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in ROOT.glob("*.py")}
    sources |= {f"{path.parent.name}/{path.name}": path.read_text(encoding="utf-8")
                for folder in ("data", "kernels") for path in (ROOT / folder).glob("*.py")}  # fmt: skip
    unknown = {place: hash_at(sources, place) for place in known if hash_at(sources, place) not in known[place]}
    assert not unknown, f"add to leaderboard/tracks.toml, under [stream] or [step]: {unknown}"


def test_the_recipe_of_the_steps_track_conforms() -> None:
    config, track = load_config([str(ROOT / "configs/sotu_steps.toml")]), find_track("sotu-steps")
    of_track = {key: getattr(track, key) for key in ("target_loss", "val_tokens", "tokenizer", "data_start")}
    wanted = track.fixed | of_track | dict(track="sotu-steps", stop_at_target=False)
    assert {key: getattr(config, key) for key in wanted} == wanted
    assert config.num_seeds >= 3
    assert find_track("sotu-byte").data_start == load_config([str(ROOT / "configs/sotu_cpu.toml")]).data_start


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("track3_*.toml")), ids=lambda path: path.stem)
def test_the_recipes_of_the_optimization_track_conform(recipe: Path) -> None:
    config, track = load_config([str(recipe)]), find_track("fineweb-steps")
    of_track = {
        key: getattr(track, key) for key in ("target_loss", "val_tokens", "tokenizer", "data_start", "shard_tail")
    }
    wanted = track.fixed | of_track | dict(track="fineweb-steps", stop_at_target=False, name=recipe.stem)
    assert {key: getattr(config, key) for key in wanted} == wanted
    with torch.device("meta"):
        assert class_of(config)(model_config(config)).num_params() == track.num_params


def test_a_known_spread_takes_the_place_of_the_sample_s_on_the_optimization_track() -> None:
    """Ten runs as close together as those that are published, and two that no t-test would pass."""
    track, published = find_track("fineweb-steps"), [3.2787] * 9 + [3.2788]
    assert not lacking_proof(published, track)
    assert not lacking_proof([3.2771, 3.2772], track)
    assert "0.00255, 0.004 or more" in lacking_proof([3.2782, 3.2782], track)
    assert "-inf" in lacking_proof([3.2, math.nan], track)
    assert "p = 1" in lacking_proof([3.2782, 3.2782], find_track("fineweb-3.28"))


def by_steps(run: Run) -> Track:
    """The tiny track with some settings fixed, this run's number of parameters, and what a step computes."""
    fixed = dict(vocab_size=48, num_layers=2, head_dim=8, model_dim=16, seq_len=32, batch_tokens=192)
    steps = find_track("sotu-steps")
    of_steps = dict(fixed=fixed, free=steps.free, step=steps.step, num_params=run.summary["num_params"])
    return dataclasses.replace(find_track("tiny"), **of_steps)


def in_source(path: str, old: str, new: str) -> Callable[[Run], Any]:
    def change(run: Run) -> None:
        assert run.log.sources[path].count(old) == 1
        run.log.sources[path] = run.log.sources[path].replace(old, new)

    return change


def begins(lines: str) -> Callable[[Run], Any]:
    return in_source("optim/aurora.py", "\nimport torch\n", f"\nimport torch\n{lines}\n")


def sets(**settings: Any) -> Callable[[Run], Any]:
    return lambda run: run.config.update(settings)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (sets(num_layers=3), "num_layers = 3, and the track holds it fixed at 2"),
        (sets(batch_tokens=384), "batch_tokens = 384, and the track holds it fixed at 192"),
        (sets(objective="masked"), "objective = 'masked', and a track's target is a loss of the next token"),
        (sets(value_embeds=1), "value_embeds = 1, and the track holds it fixed at 0"),  # which it does not name
        (lambda run: run.config.pop("head_dim"), "head_dim = None, and the track holds it fixed at 8"),
        (in_source("model.py", "vocab_size = c.vocab_size if", "vocab_size = 2 if"), "model.py is no version that"),
        (in_source("train_gpt.py", "(loss / targets.numel())", "(2 * loss)"), "train_gpt.py: train_step is no version"),
        (in_source("train_gpt.py", "\ndef warm_up", "\ntrain_step = trick\n\ndef warm_up"), "train_step is no version"),
        (in_source("train_gpt.py", "@torch.no_grad()", "@lower\n@torch.no_grad()"), ": evaluate is no version"),
        (in_source("train_gpt.py", "  start = self.plan.first_token", "  start = 0"), ": Run.batch is no version"),
        (in_source("train_gpt.py", "loss_sum = train_step(run, *", "loss_sum = twice(run, *"), ": take_steps is no"),
        (in_source("train_gpt.py", "row_tokens=config.seq_len // 2 if", "row_tokens=512 if"), ": plan_step is no"),
        (in_source("train_gpt.py", "self.plan = plan\n", "self.plan = long(plan)\n"), ": Run.follow is no"),
        (in_source("train_gpt.py", "    is_tied: bool  #", "    odd = 1\n    is_tied: bool  #"), ": StepPlan is no"),
        (in_source("train_gpt.py", "    return ModelConfig(**{", "    return big(**{"), ": model_config is no version"),
        (in_source("data/masking.py", "return None", "return cheat"), "data/masking.py is no version that"),
        (in_source("architectures.py", "return CLASSES[", "return cheat["), "architectures.py is no version that"),
        (lambda run: run.log.sources.pop("data/masking.py"), "the log has no source of data/masking.py"),
        (begins("import model as m\nm.GPT.forward = f"), "optim/aurora.py changes what it imports: m.GPT.forward"),
        (begins("from model import GPT\nsetattr(GPT, 'a', 1)"), "changes what it imports: setattr(GPT, 'a', 1)"),
        (begins("import sys\nsys.modules['__main__'].evaluate = f"), "imports: sys.modules['__main__'].evaluate"),
        (lambda run: run.summary.update(num_params=9), "num_params = 9, the track's model has"),
        (lambda run: run.log.sources.pop("model.py"), "may be modified: the log has no source of model.py"),
        (in_source("train_gpt.py", "import contextlib\n", "(\n"), "train_gpt.py: train_step is no version"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_a_track_by_steps_holds_fixed(
    change: Callable[[Run], Any], reason: str, board: Path, tiny_runs: list[Path]
) -> None:
    run = read_run(tiny_runs[0])
    track = by_steps(run)
    change(run)
    found = list(of_track(run, track))
    assert any(reason in line for line in found), found


def test_optimizer_schedule_and_initialisation_are_free_by_steps(board: Path, tiny_runs: list[Path]) -> None:
    run = read_run(tiny_runs[0])
    sets(matrix_lr=0.5, init_out=0.02, cooldown_frac=0.3, fused=["none"], micro_batch_tokens=96)(run)
    in_source("train_gpt.py", "# What changes over a run\n", "# What changes over a run, and how\n")(run)
    in_source("optim/aurora.py", "\nimport torch\n", "\nimport torch  # and more\n")(run)
    del run.config["ngrams"]
    del run.config["z_loss"]  # a setting that has come since
    assert list(of_track(run, by_steps(run))) == []


def test_the_bytes_of_the_validation_text_are_the_track_s(board: Path, tiny_runs: list[Path]) -> None:
    run, track = read_run(tiny_runs[0]), dataclasses.replace(find_track("tiny"), val_bytes=100)
    for found, is_wrong in ((100, False), (None, False), (99, True), (10**400, True)):
        run.summary["val_bytes"] = found
        assert any("the track's validation tokens are 100 bytes" in line for line in of_track(run, track)) == is_wrong


def test_an_older_run_has_no_source_of_what_has_come_since(board: Path, tiny_runs: list[Path]) -> None:
    run = read_run(tiny_runs[0])
    in_source("data/loader.py", "from data.masking import NO_TARGET, Masking\n", "")(run)
    in_source("train_gpt.py", "from data.masking import masking\n", "")(run)
    in_source("architectures.py", "from data.masking import num_masked\n", "")(run)
    del run.log.sources["data/masking.py"]
    assert not [line for line in of_track(run, by_steps(run)) if "masking" in line]
