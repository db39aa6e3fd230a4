"""objective = "masked": the loss against brute force, no leaks, and the trainer with it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from architectures import class_of
from data.masking import masking
from model import GPT, ModelConfig
from tests.conftest import Trainer, at_step, stop

SMALL = ModelConfig(
    vocab_size=50, num_layers=2, num_heads=3, head_dim=8, model_dim=20, mlp_hidden=28, seq_len=24, fused=("none",),
    objective="masked", mask_share=0.25,
)  # fmt: skip
HEAD = replace(SMALL, fused=("norm", "mlp", "head", "blocks"))
TRACK3 = replace(SMALL, architecture="track3", activation="squared_relu")


def model_of(config: ModelConfig) -> GPT:
    torch.manual_seed(0)
    model = class_of(config)(config, torch.float32)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)  # no zero-initialised output may hide an error
    return model


def masked_rows(config: ModelConfig, text: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
    hide = masking(config, 0)
    assert hide
    inputs, targets = hide(text[:, :-1].int(), text[:, 1:], start)
    return inputs, targets


def text_of(rows: int, length: int = 24) -> Tensor:
    return torch.randint(50, (rows, length + 1), generator=torch.Generator().manual_seed(rows))


def seen_by_all(model: GPT, inputs: Tensor) -> Tensor:
    """Logits [T, V] of one row in float64, head by head, every position attending to all."""
    c = model.config

    def norm(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotate(x: Tensor) -> Tensor:
        angle = torch.outer(
            torch.arange(len(x)), 10000 ** (-2 * torch.arange(c.head_dim // 2, dtype=torch.float64) / c.head_dim)
        )
        one, two = x.chunk(2, -1)
        return torch.cat((one * angle.cos() - two * angle.sin(), two * angle.cos() + one * angle.sin()), -1)

    x = norm(model.embed.weight.double()[inputs])
    for block in model.blocks:
        wq, wk, wv = block.attention.qkv.double()
        heads = []
        for head in range(c.num_heads):
            part = slice(head * c.head_dim, (head + 1) * c.head_dim)
            h = norm(x)
            q, k, v = rotate(norm(h @ wq[part].T)), rotate(norm(h @ wk[part].T)), h @ wv[part].T
            heads.append((q @ k.T / c.head_dim**0.5).softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ block.attention.out.double().T
        gate, up = block.mlp.gate_up.double()
        h = norm(x)
        x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ block.mlp.down.double().T
    return c.softcap * torch.tanh(norm(x) @ model.head.weight.double().T / c.softcap)


@pytest.mark.parametrize("config", [SMALL, HEAD], ids=["plain", "fused"])
def test_the_loss_is_the_mean_over_masked_tokens_by_brute_force(config: ModelConfig) -> None:
    model, text = model_of(config), text_of(3)
    inputs, targets = masked_rows(config, text)
    losses = []
    for row in range(3):
        log_p = seen_by_all(model, inputs[row].long()).log_softmax(-1)
        losses += [-log_p[t, text[row, t]] for t in range(24) if targets[row, t] >= 0]
    assert len(losses) == 3 * 6
    loss = model(inputs, targets)
    assert loss.dtype == torch.float32
    assert loss.item() / targets.numel() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize("config", [SMALL, HEAD, TRACK3], ids=["plain", "fused", "track3"])
def test_only_masked_tokens_count_and_nothing_leaks(config: ModelConfig) -> None:
    model, text = model_of(config), text_of(2)
    inputs, targets = masked_rows(config, text)
    hidden_BTD = model.hidden(inputs).detach().requires_grad_()
    model.loss(hidden_BTD, targets).backward()
    assert hidden_BTD.grad is not None
    assert torch.equal(hidden_BTD.grad.abs().sum(-1) > 0, targets != -1)
    is_masked = inputs == 50  # where the model sees the mask, other text makes no difference to what it sees
    other = text.clone()
    other[:, :-1][is_masked] = (other[:, :-1][is_masked] + 1) % 50
    inputs_after, targets_after = masked_rows(config, other)
    assert is_masked.sum() >= 6
    assert torch.equal(inputs_after, inputs)
    assert not torch.equal(targets_after, targets)


@pytest.mark.parametrize("config", [SMALL, HEAD, TRACK3], ids=["plain", "fused", "track3"])
def test_every_position_sees_both_sides_where_the_causal_model_sees_one(config: ModelConfig) -> None:
    for objective in ("masked", "causal"):
        model = model_of(replace(config, objective=objective))
        text = text_of(1)[:, :-1]
        hidden_BTD = model.hidden(text)
        for changed in (0, 11, 23):
            other = text.clone()
            other[0, changed] += 1
            differs = (model.hidden(other) - hidden_BTD)[0].abs().sum(-1) > 0
            assert differs.tolist() == [objective == "masked" or position >= changed for position in range(24)]


def test_rows_without_targets_add_nothing() -> None:
    model, text = model_of(SMALL), text_of(3)
    inputs, targets = masked_rows(SMALL, text)
    filled = targets.clone()
    filled[1:] = -1
    assert model(inputs, filled).item() == pytest.approx(model(inputs[:1], targets[:1]).item(), rel=1e-6)
    assert model(inputs[1:], filled[1:]).item() == 0


def test_flops_are_those_that_torch_counts() -> None:
    config = replace(SMALL, seq_len=20)  # where 5 targets of 20 are exact
    model, text = model_of(config), text_of(2, 20)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # made of products that it counts
        model(*masked_rows(config, text)).backward()
    assert counter.get_total_flops() == model.flops_per_token() * 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(vocab_size=64), "needs an id that is no token's, for the mask; vocab_size = 65 leaves one"),
        (dict(window=8), "attends to whole rows: set doc_mask = false, window = 0, not doc_mask = false, window = 8"),
        (dict(doc_mask=True), "not doc_mask = true, window = 0"),
    ],
)
def test_what_does_not_go_with_it_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_of(replace(SMALL, **change))  # type: ignore[arg-type]


def only(folder: Path) -> Path:
    (directory,) = folder.iterdir()
    return directory


def losses(directory: Path) -> dict[tuple[str, int], float]:
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {(key, row["step"]): row[key] for row in rows for key in ("train_loss", "val_loss") if key in row}


def test_the_trainer_learns_it_and_resumes_to_the_same_losses(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("--objective=masked", "--target_loss=0", "--micro_batch_tokens=64")
    whole = trainer(*settings, "--tokenizer=none", f"--run_dir={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    expected = losses(only(tmp_path / "whole"))
    steps = [step for key, step in expected if key == "val_loss"]
    assert expected["val_loss", 0] == pytest.approx(math.log(64), rel=1e-4)
    assert expected["val_loss", steps[-1]] < 0.96 * math.log(64)
    other = trainer(*settings[:2], "--micro_batch_tokens=192", f"--run_dir={tmp_path / 'other'}")
    assert other.returncode == 0, other.stderr
    assert losses(only(tmp_path / "other")) == pytest.approx(expected, rel=1e-4)
    with monkeypatch.context() as patch:
        at_step(patch, 25, stop)
        trainer(*settings, "--checkpoint_every=10", f"--run_dir={tmp_path / 'parts'}")
    checkpoint = only(tmp_path / "parts") / "checkpoint_000020.pt"
    rest = trainer(*settings, f"--resume={checkpoint}", f"--run_dir={tmp_path / 'rest'}")
    assert rest.returncode == 0, rest.stderr
    resumed = losses(only(tmp_path / "rest"))
    assert resumed == pytest.approx({key: expected[key] for key in resumed}, rel=1e-6)
    causal = trainer("--target_loss=0", f"--resume={checkpoint}", f"--run_dir={tmp_path / 'causal'}")
    assert causal.returncode == 2
    assert "objective" in causal.stderr


def test_no_sample_is_written(trainer: Trainer, tmp_path: Path) -> None:
    settings = ("--tokenizer=byte", "--vocab_size=257", "--train_steps=2")
    assert "sample  " in trainer(*settings, f"--run_dir={tmp_path / 'causal'}").stdout
    result = trainer(*settings, "--objective=masked", f"--run_dir={tmp_path / 'masked'}")
    assert result.returncode == 0, result.stderr
    assert "sample  " not in result.stdout
