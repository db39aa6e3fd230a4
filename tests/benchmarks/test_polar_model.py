"""The model of the polar factors' time: it sees every launch, and says what it was fitted to."""

from collections import Counter

import pytest

pytest.importorskip("triton", reason="there is no Triton for this platform")

from benchmarks.polar_model import IDEAS, Call, Idea, calls_of, estimate


def test_every_launch_of_a_polar_factor_is_seen() -> None:
    """124M: in the Gram form segments of two, two and one step, 4 len - 3 products each; direct five steps of three."""
    counts = Counter((call.what, call.B) for call in calls_of("124m", 0))
    assert counts["symmetric_product", 24] == counts["symmetric_product", 12] == 5 + 5 + 1
    assert counts["apply_symmetric", 24] == counts["gram", 24] == 3
    assert counts["symmetric_product", 48] == counts["apply_symmetric", 48] == 5
    first, second = (calls_of("124m", iterations) for iterations in (1, 2))
    assert not any(call.what == "scale_rows" for call in first if call.B != 48)  # unit rows: nothing to scale
    assert sum(call.what == "scale_rows" for call in second if call.B != 48) == 2
    assert counts["scale_rows", 24] == counts["scale_rows", 12] == counts["scale_rows", 48] == 1
    in_training = calls_of("124m", 0, has_unit_rows=True)
    assert [call.memory for call in in_training if call.what == "scale_rows"] == [
        4 * B * m * n for B, m, n in ((24, 2048, 768), (12, 2048, 768), (48, 768, 768))
    ]
    assert not any(call.what == "normalize_rows" for call in in_training)


def test_the_model_says_what_it_was_fitted_to_and_grows_with_the_work() -> None:
    memory = 24 * 768 * (2 * 2048 + 768) * 2
    fitted = estimate(Call("apply_symmetric", 24, 2048, 768, memory))
    assert fitted.seconds == pytest.approx(0.1185e-3, rel=0.03)
    assert estimate(Call("apply_symmetric", 48, 2048, 768, 2 * memory)).seconds > 1.9 * fitted.seconds


def test_what_else_could_be_done() -> None:
    """Fewer loads help, by no more than what is bound by them; pieces of a batch do as much work in more launches."""

    def seconds(idea: Idea) -> float:
        return sum(estimate(call, idea).seconds for call in calls_of("124m", 0, idea.at_a_time))

    of = {name: seconds(idea) for name, idea in IDEAS.items()}
    whole, pieces = (calls_of("124m", 0, n) for n in (48, 12))
    assert sum(call.B * call.m for call in pieces) == sum(call.B * call.m for call in whole)
    assert len(pieces) > 2 * len(whole)
    assert of["polar factors"] < of["the same, their operands in L2"] <= of["12 matrices at a time"]
    assert of["operands for nothing"] < of["an operand copied for two blocks at once"] < of["polar factors"]
    wide = Call("apply_symmetric", 24, 2048, 768, 0)
    narrow_s, wide_s = (estimate(wide, idea).seconds for idea in (Idea(), Idea(is_wide=True)))
    assert 0.75 * narrow_s < wide_s < 0.8 * narrow_s  # three loads in place of four; then tensor cores are the bound
