"""The model of a step's time against what has been measured, and its parts against FLOPs and bytes counted here."""

import pytest
import torch

pytest.importorskip("triton", reason="there is no Triton for this platform")

from benchmarks import step_model
from benchmarks.polar_model import DRAM, LAUNCH, NORMALIZE, PROCESSORS, TENSOR
from benchmarks.step_model import loss, mlps, model, optimizer_step, product, quantized
from kernels.linear import E4M3, quantize
from tests.kernels.test_elementwise import Bytes

HIDDEN = 24 * 2048 * 768 + 12 * 768 * 2048 + 48 * 768 * 768  # numbers of the 124M model's hidden matrices
HEAD = 50304 * 768


def test_the_loss_of_before_is_near_what_an_h100_took() -> None:
    """0.48 us for a row of head and loss: the model is hopeful."""
    before = loss("124m", fits_l2=False, instructions=step_model.INSTRUCTIONS_BEFORE)
    assert 0.85 < sum(before.values()) / 32768 / 0.48e-6 < 1


def test_a_product_is_bound_by_what_takes_longest() -> None:
    large, thin = (product(8192, 8192, k) for k in (8192, 16))
    assert large == pytest.approx(2 * 8192**3 / TENSOR, rel=0.01)
    assert product(8192, 8192, 8192, is_float8=True) == pytest.approx(large / 2, rel=0.01)
    assert product(8192, 8192, 16, is_float8=True) == pytest.approx(thin, rel=0.01)  # its bytes are the result's
    assert thin - LAUNCH == pytest.approx(2 * 8192**2 / DRAM, rel=0.01)


def test_the_parts_of_an_optimizer_step() -> None:
    muon, aurora = (optimizer_step("124m", iterations) for iterations in (0, 2))
    assert muon.pop("polar factors of unit rows") < aurora.pop("polar factors of unit rows")
    assert muon == aurora
    seconds = [HIDDEN * 4 / DRAM, HIDDEN * 14 / NORMALIZE, HIDDEN * 10 / DRAM, 2 * HEAD * 28 / DRAM]
    assert [*muon.values()] == pytest.approx(seconds, rel=0.06)  # and launches


def test_the_loss_kernel_takes_the_longest_of_three(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel_s(instructions: int, fits_l2: bool = True) -> float:
        return loss("124m", fits_l2=fits_l2, instructions=instructions)["cross_entropy"] - 4 * LAUNCH

    lanes = 32768 * 13 * 4096
    assert kernel_s(33) == pytest.approx(lanes * 6 / 16 / (PROCESSORS * step_model.CLOCK))
    assert kernel_s(128) == pytest.approx(lanes / (PROCESSORS * step_model.CLOCK))
    monkeypatch.setattr(step_model, "SPECIAL", 1)
    assert [kernel_s(1), kernel_s(1, fits_l2=False)] == pytest.approx([32768 * 50304 * size / DRAM for size in (4, 6)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_passes_of_an_operand_in_8_bits_are_those_that_torch_makes(dtype: torch.dtype) -> None:
    x = torch.randn(256, 256).to(dtype)
    with Bytes() as counted:
        quantize(x, E4M3)
    moved = sum(counted.by_operator.values())
    assert DRAM * (quantized(x.numel(), x.itemsize, is_compiled=False) - 3 * LAUNCH) == pytest.approx(moved, rel=0.01)


def test_products_of_mlps_are_their_flops_and_casts() -> None:
    for case in ("124m", "1b"):
        of = model(case)
        weights = of.layers * 3 * of.hidden * of.width
        at_least = 6 * weights * of.tokens / TENSOR + weights * 12 / DRAM
        assert at_least < mlps(case) < 1.1 * at_least
        assert mlps(case, is_float8=True) > 0.5 * at_least


def test_where_8_bits_should_pay() -> None:
    """The logits in both models; MLPs where they are wide, as every operand takes passes that do not grow so fast, and
    compiled more than not."""
    for case in ("124m", "1b"):
        assert 0.85 < sum(loss(case, is_float8=True).values()) / sum(loss(case).values()) < 0.97
        assert mlps(case, is_float8=True, is_compiled=False) > 1.2 * mlps(case, is_float8=True)
    assert mlps("124m", is_float8=True) > 0.95 * mlps("124m")
    assert mlps("1b", is_float8=True) < 0.8 * mlps("1b")
