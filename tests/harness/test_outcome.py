"""What a command makes of the status of a run."""

import pytest

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
