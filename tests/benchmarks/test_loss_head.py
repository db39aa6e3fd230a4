"""The benchmark of the fused head and loss: it sees the memory saved, and refuses what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import loss_head
from benchmarks.loss_head import Args, main


def result(folder: Path) -> tuple[dict[str, dict[str, Any]], torch.dtype]:
    """Rows by variant, and the dtype of the products, which is the machine's where it has no bfloat16 units."""
    (path,) = folder.glob("cross_entropy_*.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    dtype = getattr(torch, content["settings"]["dtype"].removeprefix("torch."))
    return {row["variant"]: row for row in content["rows"]}, dtype


@pytest.mark.slow
def test_the_fused_way_holds_one_array_of_logits_and_the_plain_way_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of float32, 64 MiB each, at least, and one in the dtype of the products: 32 or 64 MiB. The fused way's
    blocks and gradients are 4 MiB more; 16, a quarter of an array, leaves room for whole pages. Both in processes
    of their own."""
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    assert main(Args(("1024x16384x8",), passes=1, device="cpu")) == 0
    found, dtype = result(tmp_path)
    assert {row["check"] for row in found.values()} == {"right"}  # of every gradient, against float64
    logits_mib = 1024 * 16384 / 2**20
    assert found["plain"]["peak_mib"] > 3 * 4 * logits_mib
    assert dtype.itemsize * logits_mib <= found["fused"]["peak_mib"] < dtype.itemsize * logits_mib + 16
    assert found["fused"]["peak_of_plain"] == found["fused"]["peak_mib"] / found["plain"]["peak_mib"]
    assert found["fused"]["of_plain"] == pytest.approx(found["fused"]["ms"] / found["plain"]["ms"])
    assert found["plain"]["peak_of_plain"] == found["plain"]["of_plain"] == 1


def test_a_wrong_variant_is_not_timed_and_ends_in_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose gradient in the weights is 3 % too large."""
    monkeypatch.setenv("BENCHMARK_RESULTS", str(tmp_path))
    monkeypatch.setattr(loss_head, "peak_bytes", lambda *arguments: 1)
    genuine = loss_head.fused

    def wrong(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        weight.register_hook(lambda grad: 1.03 * grad)
        return genuine(x, weight, targets)

    monkeypatch.setitem(loss_head.VARIANTS, "fused", wrong)
    assert main(Args(("64x50x8",), passes=1, device="cpu")) == 1
    found, _ = result(tmp_path)
    assert "dW 0.03" in found["fused"]["check"]
    assert found["fused"]["ms"] == found["fused"]["of_plain"] == ""
    assert found["plain"]["check"] == "right"


def test_shapes_are_three_numbers() -> None:
    with pytest.raises(ValueError, match=r"'2048x320' must be tokens x vocabulary x width"):
        main(Args(("2048x320",), device="cpu"))
