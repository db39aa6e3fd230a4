"""The benchmark of the fused head and loss: it sees the memory saved, and refuses what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks import cross_entropy, report
from benchmarks.cross_entropy import Args, main


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    (path,) = folder.glob("cross_entropy_*.json")
    return {row["variant"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}


@pytest.mark.slow
def test_the_fused_way_takes_a_fraction_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the plain way's, which holds three arrays of float32 logits, 64 MiB each, at least; the fused
    way one of bfloat16. Both in processes of their own."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert main(Args(("1024x16384x8",), passes=1, device="cpu")) == 0
    found = rows(tmp_path)
    assert {row["check"] for row in found.values()} == {"right"}  # of every gradient, against float64
    assert found["plain"]["peak_mib"] > 3 * 4 * 1024 * 16384 / 2**20
    assert found["fused"]["peak_of_plain"] < 1 / 4
    assert found["fused"]["of_plain"] == pytest.approx(found["fused"]["ms"] / found["plain"]["ms"])
    assert found["plain"]["peak_of_plain"] == found["plain"]["of_plain"] == 1


def test_a_wrong_variant_is_not_timed_and_ends_in_status_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose gradient in the weights is 3 % too large."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(cross_entropy, "peak_bytes", lambda *arguments: 1)
    genuine = cross_entropy.fused

    def wrong(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        weight.register_hook(lambda grad: 1.03 * grad)
        return genuine(x, weight, targets)

    monkeypatch.setitem(cross_entropy.VARIANTS, "fused", wrong)
    assert main(Args(("64x50x8",), passes=1, device="cpu")) == 1
    found = rows(tmp_path)
    assert "dW 0.03" in found["fused"]["check"]
    assert found["fused"]["ms"] == found["fused"]["of_plain"] == ""
    assert found["plain"]["check"] == "right"


def test_shapes_are_three_numbers() -> None:
    with pytest.raises(ValueError, match=r"'2048x320' must be tokens x vocabulary x width"):
        main(Args(("2048x320",), device="cpu"))
