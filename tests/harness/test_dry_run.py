"""The dry run: its memory is that of real tensors; it reports without data, GPU, run directory or other processes."""

import dataclasses
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import torch

import train_gpt
from benchmarks.memory_use import peak_bytes, saved_bytes
from harness import dry_run, launch, memory_plan
from harness.machine import PEAK_FLOPS
from model import GPT, FusedPart, ModelConfig
from optim import RULES, build_optimizers
from optim.averages import Averages
from tests.conftest import ROOT, Trainer
from train_gpt import load_config

PARTS: tuple[FusedPart, ...] = ("norm", "mlp", "head", "blocks")
SHAPE = 3, 192
OPTIONS: list[dict[str, Any]] = [
    dict(doc_mask=True, window=64),
    dict(doc_mask=True, window=64, fused=("blocks",)),
    dict(value_embeds=1, ngrams=(2, 3), embed_skip=True, mask_padding=True, z_loss=1e-4),
    dict(activation="squared_relu", mlp_hidden=100),
    dict(float8=("head", "mlp")),
    dict(float8=("head", "mlp"), fused=("mlp", "head")),
]
SMALL: dict[str, Any] = dict(num_layers=2, num_heads=2, head_dim=32, model_dim=64, seq_len=192)


def passes_of(config: ModelConfig, dtype: torch.dtype) -> tuple[GPT, torch.Tensor, torch.Tensor]:
    model = GPT(config, dtype, 5 if config.doc_mask else None)
    tokens = torch.randint(config.vocab_size, SHAPE)
    return model, tokens.int(), tokens


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        *((torch.bfloat16, dict(fused=parts or ("none",))) for n in range(5) for parts in combinations(PARTS, n)),
        *((torch.float32, dict(fused=parts)) for parts in (("none",), PARTS)),
        *((torch.float32, options) for options in OPTIONS),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_what_autograd_keeps_is_planned_to_the_byte(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    config = ModelConfig(**SMALL | dict(fused=("none",)) | settings)
    model, inputs, targets = passes_of(config, dtype)
    eager, _ = memory_plan.activations(config, dtype, "cpu", SHAPE)
    assert eager.kept == saved_bytes(model, model, inputs, targets) + 4  # and the loss


@pytest.mark.parametrize("fused", [("none",), ("norm", "blocks")], ids=str)
def test_the_most_of_both_passes_is_what_the_allocator_held(fused: tuple[FusedPart, ...]) -> None:
    config = ModelConfig(**SMALL, fused=fused)
    model, inputs, targets = passes_of(config, torch.float32)
    model(inputs, targets).backward()
    eager, _ = memory_plan.activations(config, torch.float32, "cpu", SHAPE)
    assert peak_bytes(lambda: model(inputs, targets).backward()) == pytest.approx(eager.most, rel=0.02)


def test_compiled_blocks_keep_what_products_and_attention_read_and_make() -> None:
    """For each token and block of width D, attention A and G matrices in the MLP of width F: both norms and both
    outputs, 4 D; Q, K, V, the rotated Q and K, and attention's result, 6 A; (G + 1) F. All in bfloat16."""
    config = ModelConfig(**SMALL | dict(num_layers=6, vocab_size=64))
    deeper = ModelConfig(**SMALL | dict(num_layers=7, vocab_size=64))
    (_, few), (_, many) = (memory_plan.activations(each, torch.bfloat16, "cuda", SHAPE) for each in (config, deeper))
    D, A, F, G = config.model_dim, config.num_heads * config.head_dim, config.hidden_dim, config.num_gates
    weights = 4 * D * A + (G + 1) * D * F  # their copies in bfloat16
    assert many.blocks - few.blocks == 2 * (SHAPE[0] * SHAPE[1] * (4 * D + 6 * A + (G + 1) * F) + weights)
    _, in_8_bits = memory_plan.activations(dataclasses.replace(config, float8=("mlp",)), torch.bfloat16, "cuda", SHAPE)
    assert 0.7 * few.blocks < in_8_bits.blocks < 1.2 * few.blocks


def test_the_fused_head_in_8_bits_holds_its_operands() -> None:
    """Of a byte each, beside what it holds without."""
    config = ModelConfig(**SMALL | dict(num_layers=1, vocab_size=5000, fused=("head",)))
    plans = (dataclasses.replace(config, float8=parts) for parts in ((), ("head",)))
    plain, in_8_bits = (memory_plan.activations(each, torch.bfloat16, "cpu", SHAPE)[0].most for each in plans)
    assert in_8_bits - plain == (SHAPE[0] * SHAPE[1] + config.padded_vocab_size) * config.model_dim


@pytest.mark.filterwarnings("ignore:PolarGrad")
@pytest.mark.parametrize("settings", [*RULES, "aurora --aurora_variant=warm", "adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_planned_state_is_the_state_of_a_real_step(tiny_recipe: Path, settings: str, dtype: torch.dtype) -> None:
    noise = ["--init_out=0.02", "--init_down=0.02"]  # some rules keep norms
    config = load_config([str(tiny_recipe), *noise, *f"--matrix_optimizer={settings}".split()])
    with torch.device("meta"):
        planned = GPT(config).to(dtype)
    model = GPT(config).to(dtype)
    optimizers = build_optimizers(model, config)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()
    held = sum(memory_plan.nbytes(entry.values()) for each in optimizers for entry in each.state.values())
    assert sum(memory_plan.state_bytes(build_optimizers(planned, config), 1, False).values()) == held


@pytest.mark.parametrize(
    "settings", ["aurora", "normuon --cautious --matrix_weight_decay=0.1", "soap", "muon --hyperball"]
)
def test_an_update_takes_what_is_planned(settings: str, float32_products: None) -> None:
    sizes = ["num_layers=3", "model_dim=128", "init_out=0.02", "init_down=0.02"]
    config = load_config([f"--{size}" for size in sizes] + f"--matrix_optimizer={settings}".split())
    model = GPT(config)
    optimizer, _ = build_optimizers(model, config)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    _, planned = memory_plan.update_bytes([optimizer], 1, False)
    assert 0.8 * planned < peak_bytes(optimizer.step) < 1.02 * planned


def test_parts_of_a_rank(tiny_recipe: Path) -> None:
    """Look-ahead and average as their real tensors; a rank of two has half the gradients of matrices, and with fsdp
    half of all that dimensions of even length divide into."""
    config = load_config([str(tiny_recipe), "--lookahead=0.1", "--average_steps=5"])
    with torch.device("meta"):
        model = GPT(config)
    optimizers = build_optimizers(model, config)
    averages = Averages(model, optimizers, config)
    averages.tail.update()
    weights = 4 * model.num_params()
    parts = dry_run.parts_of_rank(config, model, optimizers, "cpu", (6, 32), 1)
    ahead = [*averages.lookahead.mean_step.values(), *averages.lookahead._before.values()]
    assert parts["look-ahead, two copies of the weights"] == memory_plan.nbytes(chain(*ahead))
    assert parts["average of the weights"] == memory_plan.nbytes(averages.tail.mean.values())
    assert parts["weights"] == parts["gradients"] == weights
    passes, _ = memory_plan.activations(config, torch.float32, "cpu", (6, 32))
    first = list(parts)[: list(parts).index("activations of blocks")]
    assert parts["at the peak"] == sum(parts[part] for part in first) + passes.most
    tables = dataclasses.replace(config, ngrams=(2,), ngram_rows=1000, ngram_sparse=True)
    with torch.device("meta"):
        with_tables = GPT(tables)
    sparse = dry_run.parts_of_rank(tables, with_tables, build_optimizers(with_tables, tables), "cpu", (6, 32), 1)
    assert sparse["weights"] - weights == sparse["state of Adagrad"] == 4 * 1000 * tables.model_dim
    assert sparse["gradients"] - weights == tables.batch_tokens * (4 * tables.model_dim + 8)
    halves = load_config([str(tiny_recipe), "--fsdp"])
    sharded = dry_run.parts_of_rank(halves, model, optimizers, "cpu", (3, 32), 2)
    assert sharded["weights"] == sharded["gradients"] == weights / 2
    assert sharded["weights and gradients gathered"] > 0


def test_a_report_trains_and_writes_nothing(trainer: Trainer, tmp_path: Path) -> None:
    elsewhere = ["--init_from=runs/another", "--resume=auto"]
    result = trainer("--dry_run", "--small_batch_steps=4", "--short_row_steps=2", "--micro_batch_tokens=96", *elsewhere)
    assert (result.returncode, result.stderr) == (0, "")
    assert not (tmp_path / "runs").exists()
    output = result.stdout
    assert "40 steps of 192 tokens in rows of 32; the first 4 of 96; the first 2 in rows of 16: 7,296 tokens" in output
    assert "7,001 training tokens in 3 shards: 1.04 epochs" in output
    assert "not on 8 ranks: batch_tokens: found 192" in output
    assert "2 of 3x32" in output  # a full step's, not the first ones'
    assert "an assumption" not in output  # of a CPU no peak is known
    for word in ("init_from = 'runs/another' is not", "resume = 'auto' is not"):
        assert f"{word} looked at" in output
    assert "eval_tasks" not in output


def test_a_gpu_recipe_without_gpu_and_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """17.04 shards' worth of tokens, so 18 of training and one of validation, of 0.2 GB each."""
    folder = tmp_path / "fineweb10B"
    files = [f"--train_files={folder}/fineweb_train_*.bin", f"--val_files={folder}/fineweb_val_*.bin"]
    recipe = [str(ROOT / "configs/fineweb_124m_aurora.toml"), "--num_layers=1", "--model_dim=64", "--num_heads=1"]
    assert train_gpt.main([*recipe, *files, "--dry_run"]) == 0
    output = capfd.readouterr().out
    assert "to fetch: 19 shards, 1,900,000,000 tokens, 3.8 GB of disk; training is 0.95 epochs of 18" in output
    assert "16 of 32x1024  2 of 32x1024  1 of 32x1024" in output
    assert "at the peak without torch.compile" in output
    assert not folder.exists()


def test_time_is_flops_over_peak_and_assumed_mfu() -> None:
    table = dry_run.of_time(1e18, [1, 8])
    (row,) = [line for line in table.splitlines() if line.strip().startswith("A100")]
    minutes = 1e18 / PEAK_FLOPS["A100"] / 60
    assert row.split()[1:4] == [f"{minutes / 0.5:.1f}", "to", f"{minutes / 0.4:.1f}"]
    assert row.split()[4] == f"{minutes / 0.5 / 8:.1f}"
    assert "50% to 40%: an assumption, not a measurement" in table


def test_the_launcher_fetches_nothing_and_starts_no_ranks(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("ensure", "run"):
        monkeypatch.setattr(launch, name, lambda *_: pytest.fail("a dry run needs neither data nor ranks"))
    assert launch.main([str(tiny_recipe), "--dry_run", "--device=cuda"]) == 0
    assert "Dry run of tiny" in capfd.readouterr().out


def test_what_fits_no_number_of_ranks_is_refused(trainer: Trainer) -> None:
    result = trainer("--dry_run", "--micro_batch_tokens=100")
    assert result.returncode == 2
    assert "on 1 or 8 or 16 ranks: micro_batch_tokens: found 100" in result.stderr
