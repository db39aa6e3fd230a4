"""Settings as words, and as the trainer's arguments."""

import pytest

from harness.overrides import arguments, assignments


def test_words_become_the_trainers_arguments() -> None:
    settings = assignments(["author=--faster=x", "adam_betas=0.9:0.95"])
    assert arguments(settings) == ["--author=--faster=x", "--adam_betas=0.9,0.95"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["lr"], "--set: 'lr' is not key=value with a new key"),
        (["a=1", "a=2"], "--set: 'a=2' is not key=value with a new key"),
        (["seed=1"], "--set: seed is set by this command itself; leave it out"),
    ],
)
def test_other_words_are_refused_by_name(words: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        assignments(words, "--set: ", own=("seed",))
