"""Tasks on the Hub: rows as they are there, by a stand-in for its client, ask what files of the same items ask."""

import re
from typing import Any

import pytest

from inference.hub_tasks import SOURCES
from inference.tasks import Item, tasks_of

HELLASWAG = dict(
    activity_label="Running", ctx_a="A man runs.", ctx_b="he", endings=["falls", "stops", "turns", "wins"], label="2"
)  # fmt: skip
ROWS: dict[str, dict[str, Any]] = {
    "Rowan/hellaswag": HELLASWAG,
    "baber/piqa": dict(goal="Open a jar", sol1="Turn the lid", sol2="Turn the jar", label=0),
    "allenai/ai2_arc": dict(
        question="What is warm?", choices=dict(text=["ice", "the sun", "snow"], label=["A", "B", "C"]), answerKey="B"
    ),
    "aps/super_glue": dict(premise="Rain. ", choice1="We got wet.", choice2="We slept.", question="effect", label=0),
    "allenai/winogrande": dict(
        sentence="Ann thanked Eve because _ had helped.", option1="Ann", option2="Eve", answer="2"
    ),
    "EleutherAI/lambada_openai": dict(text="She opened the old\ndoor"),
    "nyu-mll/blimp": dict(sentence_good="Cats sleep.", sentence_bad="Cats sleeps."),
}  # fmt: skip
EXPECTED = {
    "hellaswag": Item(
        tuple(("Running: A man runs. He", f" {end}") for end in ("falls", "stops", "turns", "wins")), 2, (5, 5, 5, 4)
    ),
    "piqa": Item(
        tuple(("Question: Open a jar\nAnswer:", f" {end}") for end in ("Turn the lid", "Turn the jar")), 0, (12, 12)
    ),
    "arc_easy": Item(
        tuple(("Question: What is warm?\nAnswer:", f" {end}") for end in ("ice", "the sun", "snow")), 1, (3, 7, 4)
    ),
    "copa": Item((("Rain therefore", "  we got wet."), ("Rain therefore", "  we slept.")), 0, (12, 10)),
    "winogrande": Item(
        (("Ann thanked Eve because Ann", " had helped."), ("Ann thanked Eve because Eve", " had helped.")), 1
    ),
    "lambada_openai": Item((("She opened the", " old\ndoor"),)),
    "blimp": Item((("", " Cats sleep."), ("", " Cats sleeps."))),
}  # fmt: skip
EXPECTED["arc_challenge"] = EXPECTED["arc_easy"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str]]:
    calls: list[tuple[str, str | None, str]] = []

    def load_dataset(repository: str, subset: str | None, split: str) -> list[dict[str, Any]]:
        calls.append((repository, subset, split))
        return [ROWS[repository]] * 3

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.get_dataset_config_names", lambda repository: ["wh_island", "anaphor"])
    monkeypatch.setattr("inference.hub_tasks.reachable", lambda url, timeout_s: True)
    return calls


@pytest.mark.parametrize("name", SOURCES)
def test_rows_of_the_hub_are_items(name: str, asked: list[tuple[str, str | None, str]]) -> None:
    found = tasks_of([f"hub:{name}"], limit=2)
    assert all(task.items == [EXPECTED[name]] * 2 for task in found)
    if name == "blimp":
        assert [task.name for task in found] == ["anaphor", "wh_island"]
        assert {subset for _, subset, _ in asked} == {"anaphor", "wh_island"}
    else:
        assert [task.name for task in found] == [name]
        assert asked == [(SOURCES[name].repository, SOURCES[name].subset, SOURCES[name].split)]


def test_what_the_hub_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=re.escape("hub:mmlu is not known; choose one of hub:hellaswag, hub:piqa")):
        tasks_of(["hub:mmlu"])

    is_there = False
    monkeypatch.setattr("inference.hub_tasks.reachable", lambda url, timeout_s: is_there)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match=r"cannot be read from the Hub \(no answer; with HF_HUB_OFFLINE=1"):
        tasks_of(["hub:piqa"])
    is_there = True

    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"hub:piqa: baber/piqa cannot be read from the Hub \(no route\); name a file$"
    ):
        tasks_of(["hub:piqa"])
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [dict(goal="x")])
    with pytest.raises(ValueError, match=r"hub:piqa: a row of baber/piqa is of another form \(KeyError\('sol1'\)\)"):
        tasks_of(["hub:piqa"])
