"""architecture = "track3" against the optimization track's trainer, written plainly from its description."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import train_gpt
from data.shards import write_shard
from harness.machine import find_machine
from model import ModelConfig
from model_track3 import Track3
from optim import build_optimizers
from train_gpt import load_config, set_up

LAYERS, HEADS, HEAD_DIM, WIDTH, VOCAB, ROW = 2, 2, 16, 32, 192, 32
# BATCH / VOCAB is no whole number. If it were, a token could occur just as often, the gradient of its bias in the head
# would be zero but for rounding, and AdamW's first step a throw of the coin.
BATCH, MICRO, STEPS = 1024, 256, 20
SHARDS = (5 * BATCH + 2, 7 * BATCH + 1, 12 * BATCH + 777)  # tokens: 5, 6 and 12 batches; the tails are dropped
SIZES = dict(
    tokenizer="none", vocab_size=VOCAB, num_layers=LAYERS, num_heads=HEADS, head_dim=HEAD_DIM, model_dim=WIDTH,
    mlp_hidden=4 * WIDTH, seq_len=ROW, batch_tokens=BATCH, micro_batch_tokens=MICRO, adam_eps=1e-10 / BATCH,
    val_tokens=256, train_steps=STEPS, val_every=STEPS, log_every=1, track="", target_loss=0, num_seeds=0, device="cpu",
    dtype="float32", compile="false",
)  # fmt: skip
Weights = dict[str, Tensor]


def published_weights(model: Track3) -> Weights:
    """Copies of the model's weights, each matrix and bias by itself, as the track has them."""
    weights: Weights = {"embed": model.embed.weight, "norm1": model.embed_gain, "norm2": model.head_gain}
    weights |= {"head.weight": model.head.weight, "head.bias": model.head.bias}
    for i, block in enumerate(model.blocks):
        named = dict(block.named_parameters())
        for letter, weight, bias in zip(
            "qkv", named["attention.qkv"], named["attention.qkv_bias"].chunk(3), strict=True
        ):
            weights |= {f"{i}.{letter}.weight": weight, f"{i}.{letter}.bias": bias}
        weights |= {f"{i}.proj.weight": named["attention.out"], f"{i}.proj.bias": named["attention.out_bias"]}
        weights |= {f"{i}.fc.weight": named["mlp.gate_up"][0], f"{i}.fc.bias": named["mlp.gate_up_bias"]}
        weights |= {f"{i}.mlp_proj.weight": named["mlp.down"], f"{i}.mlp_proj.bias": named["mlp.down_bias"]}
        weights |= {f"{i}.norm1": named["attention_gain"], f"{i}.norm2": named["mlp_gain"]}
    return {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}


def rotated(x: Tensor) -> Tensor:
    """Of [B, T, H, K], by minus the angle; the second half of the frequencies is zero."""
    half, quarter = HEAD_DIM // 2, HEAD_DIM // 4
    frequencies = [(1 / 1024) ** (j / (quarter - 1)) for j in range(quarter)] + [0.0] * quarter
    angles = torch.arange(x.size(1))[:, None] * torch.tensor(frequencies)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    x1, x2 = x[..., :half], x[..., half:]
    return torch.cat([x1 * cos + x2 * sin, -x1 * sin + x2 * cos], dim=-1)


def published_loss(w: Weights, inputs: Tensor, targets: Tensor) -> Tensor:
    """Summed over the tokens of [rows, ROW]."""

    def norm(x: Tensor, gain: Tensor | None = None) -> Tensor:
        normed = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
        return normed if gain is None else normed * gain

    def layer(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = norm(w["embed"][inputs], w["norm1"])
    hidden_later = torch.ones(ROW, ROW, dtype=torch.bool).triu(1)
    for i in range(LAYERS):
        h = norm(x, w[f"{i}.norm1"])
        q, k, v = (layer(h, f"{i}.{letter}").view(-1, ROW, HEADS, HEAD_DIM) for letter in "qkv")
        q, k = rotated(norm(q)), rotated(norm(k))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.12
        attended = torch.einsum("bhij,bjhd->bihd", scores.masked_fill(hidden_later, -math.inf).softmax(-1), v)
        x = x + layer(attended.flatten(2), f"{i}.proj")
        x = x + layer(F.relu(layer(norm(x, w[f"{i}.norm2"]), f"{i}.fc")) ** 2, f"{i}.mlp_proj")
    z = layer(norm(x, w["norm2"]), "head")
    capped = 15 * z / (z**2 + 225).sqrt()
    return F.cross_entropy(capped.flatten(0, 1), targets.flatten(), reduction="sum")


def published_stream(shards: list[np.ndarray]) -> list[tuple[Tensor, Tensor]]:
    """The batches of the first steps: one shard after the other, left where no further batch fits."""
    batches, shard, position = [], 0, 0
    for _ in range(STEPS):
        if position + BATCH + 1 >= len(shards[shard]):
            shard, position = (shard + 1) % len(shards), 0
        tokens = torch.from_numpy(shards[shard][position : position + BATCH + 1].astype(np.int64))
        batches.append((tokens[:-1].view(-1, ROW), tokens[1:].view(-1, ROW)))
        position += BATCH
    return batches


def muon_update(B: Tensor, G: Tensor) -> Tensor:
    """The tuned baseline's: B is kept."""
    B.mul_(0.95).add_(G, alpha=0.05)
    X = 0.05 * G + 0.95 * B
    X = X / (X.norm() + 1e-7)
    X = X.T if G.size(0) > G.size(1) else X
    for _ in range(12):
        A = X @ X.T
        X = 2 * X + (-1.5 * A + 0.5 * A @ A) @ X
    X = X.T if G.size(0) > G.size(1) else X
    return X * max(1, G.size(0) / G.size(1)) ** 0.5


def published_run(w: Weights, batches: list[tuple[Tensor, Tensor]], matrices_by: str) -> list[float]:
    """Mean training losses of the steps, with the sum of the micro-batches' gradients."""
    matrices = {name: torch.zeros_like(p) for name, p in w.items() if p.ndim == 2 and name[0].isdigit()}
    rates = {name: 0.7 if name == "embed" else 0.004 if name == "head.weight" else 0.015
             for name in w.keys() - matrices.keys()}  # fmt: skip
    groups = [dict(params=[w[name]], lr=lr, initial=lr) for name, lr in rates.items()]
    if matrices_by == "adamw":
        groups += [dict(params=[w[name]], lr=0.0015, initial=0.0015, weight_decay=0.1) for name in matrices]
    adamw = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.001)
    losses = []
    for step, (inputs, targets) in enumerate(batches):
        share = min(1.0, (1 - step / STEPS) / 0.7)
        total = 0.0
        for rows in range(0, BATCH // ROW, MICRO // ROW):
            loss = published_loss(w, inputs[rows : rows + MICRO // ROW], targets[rows : rows + MICRO // ROW])
            loss.backward()
            total += loss.item()
        for group in adamw.param_groups:
            group["lr"] = group["initial"] * share
        adamw.step()
        if matrices_by == "muon":
            for name, B in matrices.items():
                gradient = w[name].grad
                assert gradient is not None
                with torch.no_grad():
                    update = muon_update(B, gradient)
                    w[name].mul_(1 - 0.025 * share * 0.05).sub_(update, alpha=0.025 * share)
        for p in w.values():
            p.grad = None
        losses.append(total / BATCH)
    return losses


def tiny_track3(dtype: torch.dtype = torch.float32, **settings: Any) -> Track3:
    sizes = dict(vocab_size=VOCAB, num_layers=LAYERS, num_heads=HEADS, head_dim=HEAD_DIM, model_dim=WIDTH, seq_len=ROW)
    return Track3(ModelConfig(**(sizes | dict(architecture="track3", activation="squared_relu") | settings)), dtype)


def shards(folder: Path) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    made = []
    for number, size in enumerate(SHARDS):
        tokens = np.cumsum(rng.choice([1, 3, 10], size=size, p=[0.7, 0.2, 0.1])) % VOCAB
        write_shard(folder / f"fineweb_train_{number + 1:06d}.bin", tokens)
        made.append(tokens.astype(np.uint16))
    write_shard(folder / "fineweb_val_000000.bin", np.cumsum(rng.choice([1, 3, 10], size=257)) % VOCAB)
    return made


def words(folder: Path, **settings: object) -> list[str]:
    files = {f"{kind}_files": folder / f"fineweb_{kind}_*.bin" for kind in ("train", "val")}
    return [f"--{key}={value}" for key, value in (SIZES | files | dict(run_dir=folder / "runs") | settings).items()]


@pytest.mark.parametrize("matrices_by", ["muon", "adamw"])
@pytest.mark.usefixtures("float32_products")
def test_twenty_steps_have_the_losses_of_the_track_s_own_trainer(matrices_by: str, tmp_path: Path) -> None:
    made = shards(tmp_path)
    alike = {} if matrices_by == "muon" else dict(matrix_optimizer="adamw", matrix_lr=0.0015, matrix_weight_decay=0.1)
    line = ["configs/track3_muon.toml", *words(tmp_path, **alike)]
    config = load_config(line)
    run = set_up(config, find_machine("cpu", "float32"))
    run.loader.close()
    assert isinstance(run.model, Track3)
    expected = published_run(published_weights(run.model), published_stream(made), matrices_by)
    assert train_gpt.main(line) == 0
    (metrics,) = tmp_path.glob("runs/*/metrics.jsonl")
    rows = [json.loads(row) for row in metrics.read_text(encoding="utf-8").splitlines()]
    assert rows[0]["val_loss"] == pytest.approx(math.log(VOCAB), abs=1e-6)
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    assert losses == pytest.approx(expected, rel=5e-7)  # float32's rounding; two Newton-Schulz steps fewer make 7e-7


@pytest.mark.parametrize("fused", ["none", "norm", "mlp", "blocks"])
def test_fused_parts_compute_the_same(fused: str) -> None:
    torch.manual_seed(0)
    plain = tiny_track3(fused=("none",))
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    other = tiny_track3(fused=(fused,))
    other.load_state_dict(plain.state_dict())
    tokens = torch.randint(VOCAB, (2, ROW + 1))
    for model in (plain, other):
        model(tokens[:, :-1].int(), tokens[:, 1:]).backward()
    for (name, p), q in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4 * p.grad.abs().max().item(), msg=name)


def test_its_embedding_is_in_the_dtype_of_products_and_trains_in_it() -> None:
    config = load_config(["configs/track3_muon.toml", *words(Path("nowhere"))])
    model = tiny_track3(torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if name != "embed.weight"} == {torch.float32}
    assert model.embed.weight.dtype == torch.bfloat16
    optimizers = build_optimizers(model, config)
    tokens, losses = torch.arange(4 * ROW + 4).view(4, -1) % VOCAB, []
    for _ in range(30):
        loss = model(tokens[:, :-1].int(), tokens[:, 1:]) / (4 * ROW)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=1e-3)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (dict(head_dim=6), "must be a multiple of 4"),
        (dict(tie_head_steps=3), "track3's head is not tied"),
        (dict(fused=("head",)), "architecture = 'gpt', not 15.0 and 'track3'"),
    ],
)
def test_what_it_cannot_be_is_said(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        tiny_track3(**settings)


def test_it_starts_as_the_tuned_baseline_does() -> None:
    """Standard deviations of a width at which they are known to 1%; projections and biases zero, gains one."""
    torch.manual_seed(0)
    model = Track3(ModelConfig(architecture="track3", activation="squared_relu", num_layers=1, model_dim=256))
    block = model.blocks[0]
    for weight in (block.attention.qkv, block.mlp.gate_up):
        assert weight.std().item() == pytest.approx(math.sqrt(0.33 / 256), rel=0.01)
    assert model.embed.weight.float().std().item() == pytest.approx(1, rel=0.01)
    zeros = {"blocks.0.attention.out", "blocks.0.mlp.down", "head.weight"}
    for name, p in model.named_parameters():
        if name in zeros or "bias" in name:
            assert not p.any(), name
        if "gain" in name:
            assert (p == 1).all(), name
    wide = Track3(ModelConfig(architecture="track3", activation="squared_relu", init_up=0.5, num_layers=1))
    assert wide.blocks[0].mlp.gate_up.std().item() == pytest.approx(0.5, rel=0.02)


def test_it_is_not_sharded() -> None:
    with pytest.raises(ValueError, match="fsdp gathers embedding and head in one dtype"):
        load_config(["configs/track3_muon.toml", "--fsdp"])
