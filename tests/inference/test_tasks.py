"""Tasks: what their lines ask, scores against one token after the other, and how sure an accuracy is."""

import json
import math
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import class_of
from data.tokenizer import get_tokenizer
from harness.machine import find_machine
from inference import evaluate
from inference.evaluate import task_rows
from inference.load import Loaded
from inference.tasks import Item, Outcome, Score, Task, encode_pair, item_of, pieces_of, read_tasks, run_task, scores
from model import ModelConfig

ENDS = ("runs off now", "a", "b", "c")  # of HellaSwag's item below
PAIR = '{"sentence_good": "x", "sentence_bad": "y"}\n'


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    torch.manual_seed(0)
    config = ModelConfig(num_layers=2, num_heads=2, head_dim=8, model_dim=16, seq_len=32, fused=("none",))
    model = class_of(config)(config, torch.float32)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return Loaded(model, "byte", find_machine("cpu", "float32"), Path("a model"), {})


def one_by_one(loaded: Loaded, row: list[int], num_scored: int) -> Score:
    """The last tokens of a row, each after those before it."""
    log_p, is_greedy = 0.0, True
    for place in range(len(row) - num_scored, len(row)):
        before = torch.tensor([row[:place][-loaded.model.config.seq_len :]])
        with torch.no_grad():
            of_next = loaded.model.logits(loaded.model.hidden(before))[0, -1, :257].log_softmax(0)
        log_p += float(of_next[row[place]])
        is_greedy &= int(of_next.argmax()) == row[place]
    return Score(log_p, is_greedy)


def test_scores_are_those_of_one_token_after_the_other(loaded: Loaded) -> None:
    requests = [
        ("Ab c", " de"),
        ("", "x"),
        ("A longer one,", " and more"),
        ("e ", " two spaces"),
        ("é", "ü"),
        (" ", "y"),
    ]
    with torch.no_grad():
        likeliest = int(loaded.model.logits(loaded.model.hidden(torch.tensor([[256]])))[0, -1, :257].argmax())
    texts = [([*b"Ab c"], [*b" de"]), ([256], [*b"x"]), ([*b"A longer one,"], [*b" and more"]),
             ([*b"e"], [*b"  two spaces"]), ([*"é".encode()], [*"ü".encode()]), ([256], [*b" y"])]  # fmt: skip
    expected = [one_by_one(loaded, context + ids, len(ids)) for context, ids in texts]
    for micro_batch_tokens in (1, 40, 10_000):
        found = scores(loaded, requests, micro_batch_tokens, "test")
        assert [score.is_greedy for score in found] == [score.is_greedy for score in expected]
        assert [score.log_p for score in found] == pytest.approx([score.log_p for score in expected], rel=1e-5)
    if likeliest < 128:
        assert scores(loaded, [("", chr(likeliest))], 64, "test")[0].is_greedy


def test_of_what_is_longer_than_a_row_the_end_is_kept(loaded: Loaded) -> None:
    context, continuation = "once upon a time there was a long context", " and an end"
    (found,) = scores(loaded, [(context, continuation)], 64, "test")
    row = [*context.encode(), *continuation.encode()][-33:]
    assert found.log_p == pytest.approx(one_by_one(loaded, row, len(continuation)).log_p, rel=1e-5)


def test_a_continuation_longer_than_a_row_is_scored_in_pieces(loaded: Loaded) -> None:
    ids = [*range(65, 65 + 40)]
    pieces = [*pieces_of(7, [1, 2], ids, 32)]
    assert [(piece.request, piece.num_scored) for piece in pieces] == [(7, 16), (7, 16), (7, 8)]
    assert [piece.row for piece in pieces] == [[1, 2, *ids[:16]], [2, *ids[:32]][-33:], ids[7:40]]
    assert [len(piece.row) for piece in pieces_of(0, [1] * 50, ids[:32], 32)] == [33]
    (found,) = scores(loaded, [("ab", "".join(map(chr, ids)))], 64, "test")
    rows = [[97, 98, *ids[:16]], [98, *ids[:32]], ids[7:40]]
    expected = sum(one_by_one(loaded, row, count).log_p for row, count in zip(rows, (16, 16, 8), strict=True))
    assert found.log_p == pytest.approx(expected, rel=1e-5)


def test_context_and_continuation_are_encoded_together(gpt2_vocabulary: Path) -> None:
    encode = get_tokenizer("gpt2").encode_ordinary
    assert encode_pair("gpt2", "The capital of France is", " Paris") == (
        encode("The capital of France is"),
        encode(" Paris"),
    )
    assert encode_pair("gpt2", "is ", "Paris") == (encode("is"), encode(" Paris"))  # the space is the word's
    context, continuation = encode_pair("gpt2", "un", "believable")
    assert context == encode("un")
    assert continuation == encode("unbelievable")[1:]
    assert encode_pair("gpt2", "", "Paris") == ([50256], encode("Paris"))


@pytest.mark.parametrize(
    ("row", "item"),
    [
        (dict(query="It rained, so", choices=["he ran.", "it was dry."], gold=1),
         Item((("It rained, so", " he ran."), ("It rained, so", " it was dry.")), 1, (7, 11))),
        (dict(query="Question: Why?\n", choices=["a", "bc"], gold=0),
         Item((("Question: Why?\nAnswer:", " a"), ("Question: Why?\nAnswer:", " bc")), 0, (1, 2))),
        (dict(context_options=["Ann", "Bob"], continuation="won.", gold=1),
         Item((("Ann", " won."), ("Bob", " won.")), 1)),
        (dict(context="I said", continuation="no"), Item((("I said", " no"),))),
        (dict(sentence_good="He is.", sentence_bad="He are."), Item((("", " He is."), ("", " He are.")))),
        (dict(activity_label="Cleaning", ctx_a="A man [title] Step one", ctx_b="he THEN", label="2",
              endings=["runs  off [step] now", "a", " b ", "c"]),
         Item(tuple(("Cleaning: A man. Step one He then", f" {end}") for end in ENDS),
              2, (12, 1, 1, 1))),
    ],
    ids=["choices", "question", "contexts", "last word", "sentences", "HellaSwag"],
)  # fmt: skip
def test_what_a_line_asks(row: dict[str, Any], item: Item) -> None:
    assert item_of(row) == item


def test_outcomes_follow_from_scores(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {" a": -3.0, " long one": -4.0, " b": -2.0, " end": -1.5, " other": -0.5}
    monkeypatch.setattr(
        "inference.tasks.scores",
        lambda loaded, requests, tokens, what, window: [Score(known[text], text == " other") for _, text in requests],
    )
    choices = [
        Item((("q", " a"), ("q", " long one"), ("q", " b")), 1, (1, 8, 1)),
        Item((("q", " a"), ("q", " b")), 1, (1, 1)),
    ]
    found = run_task(loaded, Task("choices", choices), 64)
    assert (found.right, found.right_norm) == ([False, True], [True, True])
    assert found.chance == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert found.chance_error == pytest.approx(math.sqrt(2 / 9 + 1 / 4) / 2)
    words = run_task(loaded, Task("words", [Item((("c", " end"),)), Item((("c", " other"),))]), 64)
    assert words.right == [False, True]
    assert words.perplexity == pytest.approx((math.e, math.e * 0.5))
    assert (words.chance, words.chance_error) == (0, 0)


def test_rows_say_how_sure_an_accuracy_is() -> None:
    many = Outcome("many", [True] * 60 + [False] * 40, [True] * 50 + [False] * 50, [], 0.25, 0.0433)
    pairs = [Outcome(f"pair {i}", [True] * (5 + i) + [False] * (5 - i), [], [], 0.5, 0.158) for i in range(2)]
    words = Outcome("words", [True, False], [], [-1.0, -3.0], 0.0, 0.0)
    rows = {row["task"]: row for row in task_rows([many, *pairs, words])}
    assert list(rows) == ["many", "pair 0", "pair 1", "words", "mean of 2"]
    assert rows["many"] | {"task": ""} == {
        "task": "", "items": 100, "acc": "0.6000 ± 0.0492", "acc_norm": "0.5000 ± 0.0503", "chance": "0.2500",
        "from chance": "+8.1", "perplexity": "",
    }  # fmt: skip
    assert rows["words"]["perplexity"] == "7.39 ± 7.39"
    assert rows["words"]["from chance"] == ""
    assert rows["mean of 2"]["items"] == 20
    assert rows["mean of 2"]["acc"] == "0.5500 ± 0.1167"  # of 0.1667 and 0.1633
    assert rows["mean of 2"]["from chance"] == "+0.4"  # 0.05 over 0.158 / sqrt 2


def test_files_and_archives(tmp_path: Path) -> None:
    lines = [json.dumps(dict(sentence_good=f"good {i}", sentence_bad="bad")) for i in range(5)]
    (tmp_path / "pairs.jsonl").write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
    (task,) = read_tasks(tmp_path / "pairs.jsonl")
    assert (task.name, len(task.items)) == ("pairs", 5)
    (task,) = read_tasks(tmp_path / "pairs.jsonl", limit=2)
    assert [item.requests[0][1] for item in task.items] == [" good 0", " good 1"]
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("data/b.jsonl", "data/a.jsonl", "__MACOSX/data/a.jsonl", "readme.txt"):
            archive.writestr(name, "\n".join(lines))
    assert [(task.name, len(task.items)) for task in read_tasks(tmp_path / "all.zip", 3)] == [("a", 3), ("b", 3)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", f'{PAIR}{{"text": "z"}}\n', "line 2 is not an item of a task (no key 'context')"),
        ("a.jsonl", "plain text\n", "line 1 is not an item of a task"),
        ("a.jsonl", "[1, 2]\n", "line 1 is not an item of a task"),
        ("a.jsonl", '{"query": "q", "choices": ["a", "b"], "gold": 2}\n', "the right one is number 2 of 2 choices"),
        ("a.jsonl", '{"query": "q", "choices": ["a"], "gold": 0}\n', "there are fewer than two choices"),
        *(("a.jsonl", f'{{"query": "q", "choices": ["a", "b"], "gold": {gold}}}\n', "and has to be its number, from 0")
          for gold in ("1e400", "0.7", "true", '"A"', '"-1"')),
        ("a.jsonl", '{"query": "q", "choices": ["a", ""], "gold": 0}\n', "one of the choices is empty"),
        ("a.jsonl", '{"context_options": ["a", "b"], "continuation": 5, "gold": 0}\n', "[5] is no list of texts"),
        ("a.jsonl", '{"context": "a", "continuation": ""}\n', "the continuation is empty"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1 is not an item of a task"),
        ("a.jsonl", "\n", "has no items"),
        ("a.zip", "no archive", "a.zip is not a zip archive"),
        ("a.jsonl", '{"query": "q", "choices": "abc", "gold": 0}\n', "abc is no list of texts"),
        ("a.jsonl", '{"query": "q", "choices": {"text": [], "label": []}, "gold": 0}\n', "is no list of texts"),
        ("a.jsonl", '{"context": 5, "continuation": "x"}\n', "[5, 'x'] is no list of texts"),
    ],
)  # fmt: skip
def test_another_format_is_one_line(
    name: str, content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert evaluate.main(["nowhere", "--tasks", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_text_that_is_not_utf_8_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"context": "\xff"}')
    with pytest.raises(ValueError, match=r"a\.jsonl is not UTF-8"):
        read_tasks(tmp_path / "a.jsonl")


def test_a_continuation_without_tokens_is_refused(loaded: Loaded) -> None:
    with pytest.raises(ValueError, match="a task: the continuation '' has no tokens"):
        scores(loaded, [("a", "b"), ("a", "")], 64, "a task")


def test_the_command_prints_a_table(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate, "load", lambda *_: loaded)
    rows = [dict(query="one and", choices=["two", "three"], gold=1), dict(query="x", choices=["y", "z"], gold=0)]
    (tmp_path / "mine.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, rows))), encoding="utf-8")
    assert evaluate.main(["a model", f"--tasks={tmp_path / 'mine.jsonl'}"]) == 0
    heading, row = capsys.readouterr().out.splitlines()
    assert heading.split() == ["task", "items", "acc", "acc_norm", "chance", "from", "chance", "perplexity"]
    assert row.split()[:2] == ["mine", "2"]
