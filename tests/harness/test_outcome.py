"""What a command makes of the status of a run."""

import pytest

from harness.log_format import ending
from harness.outcome import raise_if_cut_short


@pytest.mark.parametrize("status", ["finished", "stopped at target", "diverged"])
def test_a_run_that_came_to_an_end_is_a_result(status: str) -> None:
    raise_if_cut_short({"status": status}, "muon")


@pytest.mark.parametrize(
    "summary",
    [
        {"status": "failed", "reason": "at step 3: out of memory"},
        {"status": "lost", "reason": "at step 3: out of memory"},
    ],
    ids=["failed", "lost"],
)
def test_a_failure_is_said_with_the_run_and_the_reason(summary: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"^muon: (failed|lost) at step 3: out of memory; nothing is reported$"):
        raise_if_cut_short(summary, "muon")


def test_a_stop_is_passed_on() -> None:
    with pytest.raises(KeyboardInterrupt):
        raise_if_cut_short({"status": "interrupted"}, "muon")


def test_a_loss_is_told_with_the_step_that_it_was_measured_at() -> None:
    summary = dict(
        steps=20, tokens=40960, val_loss=5.5, val_step=0, status="interrupted", steps_to_target=None, tokens_per_s=1.0,
        mfu=None, world_size=1, device="X", peak_memory_mib=1.0, phase_s={},
    )  # fmt: skip
    told = ending(summary, 1.3)
    assert told["val_loss"] == "5.50000 nats a token at step 0, the last measured"
    assert told["target"] == "1.3 nats not reached: 4.2000 short after 0 steps"
    assert ending(summary | dict(val_step=20), 1.3)["val_loss"] == "5.50000 nats a token after 40,960 tokens"
