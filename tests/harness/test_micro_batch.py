"""micro_batch_tokens = 0: what is chosen, from what passes are said to need."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from harness import micro_batch
from harness.machine import find_machine
from harness.micro_batch import choices, choose, with_micro_batch
from tests.conftest import Trainer
from train_gpt import load_config, set_up, train_step

GIB = 2**30


def test_choices_divide_every_batch() -> None:
    assert choices(96 * 64, False, 64, 8) == [64 * rows for rows in (1, 2, 3, 4, 6, 12)]
    assert choices(96 * 64, True, 64, 8) == [64 * rows for rows in (1, 2, 3, 6)]
    assert choices(100, False, 64, 1) == [64]
    assert choices(64, False, 64, 8) == [64]


@pytest.mark.parametrize(("room", "expected"), [(80, 65536), (24, 16384), (19, 8192), (1, 1024)])
def test_the_largest_pass_that_fits_is_chosen(room: int, expected: int) -> None:
    """10 GiB whatever the micro-batch, and 0.5 MiB per token: 42 GiB for 65,536 and 18 GiB for 16,384 tokens."""
    asked = []

    def peak(tokens: int) -> int:
        asked.append(tokens)
        return 10 * GIB + tokens * 2**19

    chosen, why = choose([1024 * 2**i for i in range(7)], peak, room * GIB)
    assert chosen == expected
    assert asked == [4096, 8192]  # no pass that might not fit
    assert f"of {room:.1f} GiB expected, 512 KiB per token" in why


@pytest.mark.parametrize(
    ("known", "asked", "expected"),
    [
        ([512], {512}, 512),
        ([2048, 198656], {2048}, 2048),
        ([1024, 130048], {1024}, 1024),
        ([16384, 32768], {16384, 32768}, 32768),
    ],
)
def test_choices_far_apart_are_not_tried(known: list[int], asked: set[int], expected: int) -> None:
    found = set[int]()
    assert choose(known, lambda tokens: found.add(tokens) or GIB + tokens, 80 * GIB)[0] == expected
    assert found == asked


def test_a_gpu_is_probed_with_a_run_that_is_then_given_up(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a pretended GPU: the trainer's own set-up and step, and the least of what ranks can take."""
    config = load_config([str(tiny_recipe), "--micro_batch_tokens=0", f"--run_dir={tmp_path}"])
    cpu = find_machine("cpu", "float32")
    probed = []

    def peak(run: object, tokens: int) -> int:
        probed.append((type(run).__name__, tokens))
        return GIB + tokens * 2**20

    monkeypatch.setattr(micro_batch, "peak_bytes", peak)
    monkeypatch.setattr(micro_batch, "room_bytes", lambda: 2 * GIB)
    gpu = dataclasses.replace(cpu, device=torch.device("cuda", 0))
    chosen, machine = with_micro_batch(config, gpu, lambda config, machine: set_up(config, cpu), train_step)
    assert {name for name, _ in probed} == {"Run"}
    assert chosen.micro_batch_tokens == max(
        tokens for tokens in choices(config.batch_tokens, False, config.seq_len, 1) if GIB + tokens * 2**20 <= 1.8 * GIB
    )
    assert machine.notes[-1].startswith(f"micro_batch_tokens = {chosen.micro_batch_tokens} (")


def test_what_was_chosen_is_logged_and_changes_no_loss(trainer: Trainer, tmp_path: Path) -> None:
    losses = []
    for number in (0, 96):
        folder = tmp_path / str(number)
        result = trainer(f"--micro_batch_tokens={number}", f"--run_dir={folder}", "--train_steps=3", "--val_every=3")
        assert result.returncode == 0, result.stderr
        assert ("micro_batch_tokens = 192 (a CPU's usual)" in result.stdout) == (number == 0)
        (summary,) = folder.glob("*/summary.json")
        assert json.loads(summary.read_text(encoding="utf-8"))["config"]["micro_batch_tokens"] == (number or 192)
        losses.append([line.split("train_time")[0] for line in result.stdout.splitlines() if "val_loss:" in line])
    assert losses[0] == losses[1]
