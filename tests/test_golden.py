"""Twenty losses of a small run with every option off, as they were before there were options.

A change that is meant to alter the arithmetic of the plain step writes the file anew and says so:

    python -m tests.test_golden
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import train_gpt
from data.shards import write_shard

GOLDEN = Path(__file__).parent / "golden/plain_losses.json"
OPTIMIZERS = ("adamw", "muon", "aurora")
SETTINGS = dict(
    tokenizer="none", vocab_size=100, val_tokens=256, num_layers=3, num_heads=2, head_dim=16, model_dim=48, seq_len=32,
    train_steps=20, batch_tokens=512, micro_batch_tokens=256, val_every=20, log_every=1, warmup_steps=3,
    momentum_warmup_steps=10, dtype="float32", device="cpu", fused="none",
)  # fmt: skip


def losses(matrix_optimizer: str, folder: Path) -> list[float]:
    """Training losses of 20 steps in nats a token, on tokens that follow each other by a noisy rule."""
    tokens = np.cumsum(np.random.default_rng(0).choice([1, 3, 10], size=20 * 512 + 258, p=[0.8, 0.1, 0.1])) % 100
    write_shard(folder / "golden_train_000001.bin", tokens[257:])
    write_shard(folder / "golden_val_000000.bin", tokens[:257])
    arguments = [f"--{key}={value}" for key, value in SETTINGS.items()]
    arguments += [f"--{kind}_files={folder}/golden_{kind}_*.bin" for kind in ("train", "val")]
    assert train_gpt.main([*arguments, f"--run_dir={folder / 'runs'}", f"--matrix_optimizer={matrix_optimizer}"]) == 0
    (metrics,) = folder.glob("runs/*/metrics.jsonl")
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [row["train_loss"] for row in rows if "train_loss" in row]


@pytest.mark.parametrize("matrix_optimizer", OPTIMIZERS)
@pytest.mark.usefixtures("float32_products")
def test_the_plain_step_trains_as_it_always_did(matrix_optimizer: str, tmp_path: Path) -> None:
    """To 1e-6: vector units of other CPUs move a loss by up to 3e-7 here, a change of the arithmetic by far more."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[matrix_optimizer]
    assert losses(matrix_optimizer, tmp_path) == pytest.approx(golden, rel=1e-6)


def write_golden() -> None:
    import optim.matrix_optimizer

    torch.set_num_threads(1)
    optim.matrix_optimizer.fast_half_dtype = lambda device_type: torch.float32  # as in the test
    found = {}
    for name in OPTIMIZERS:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = losses(name, Path(folder))
    GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()
