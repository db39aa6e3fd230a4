"""Tasks on an export by lm_eval, in the environment with transformers that CI makes: the same to the last item."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from inference.export import main
from inference.load import load
from inference.tasks import read_tasks, run_task
from tests.conftest import ROOT, Trainer
from tests.inference.test_export import PYTHON
from tests.test_train import only_run

TEXT = "the house, a vote; naïve or not? 12 of them went to the north and back again"
WORDS = TEXT.split()


def words(start: int, count: int) -> str:
    return " ".join(WORDS[(start + 5 * place) % len(WORDS)] for place in range(count))


def items(kind: str, number: int) -> dict[str, Any]:
    """Some contexts end with a space, some are longer than a row of the model's, and some choices differ in length."""
    context, choices = words(number, 2 + 6 * (number % 5)), [words(number + place, 1 + place) for place in range(1, 5)]
    return {
        "asked": dict(query=f"Question: {context}\n", choices=choices, gold=number % 4),
        "plain": dict(query=context + " " * (number % 2), choices=choices[:2], gold=number % 2),
        "hellaswag": dict(
            activity_label="Voting", ctx_a=f"{context} [title] More.", ctx_b="they [step] go  on", endings=choices,
            ctx=f"{context} [title] More. They [step] go  on", label=str(number % 4), ind=number,
        ),
        "contexts": dict(
            context_options=[f"{context} {choice}" for choice in choices[:2]], continuation=words(number, 3),
            gold=number % 2,
        ),
        "last_word": dict(context=context, continuation=WORDS[number % len(WORDS)]),
        "sentences": dict(sentence_good=words(number, 2 + 2 * (number % 5)), sentence_bad=words(number + 1, 6)),
    }[kind]  # fmt: skip


def test_lm_eval_scores_an_export_as_evaluate_does(trainer: Trainer, tmp_path: Path) -> None:
    if not PYTHON.exists() or subprocess.run([PYTHON, "-c", "import lm_eval"], capture_output=True).returncode:
        assert "REQUIRE_TRANSFORMERS" not in os.environ
        pytest.skip("no environment with lm_eval: tests/inference/requirements.txt into that of ./run.sh examples")
    model = ["--tokenizer=byte", "--vocab_size=257", "--seq_len=96", "--val_tokens=192", "--batch_tokens=192",
             "--micro_batch_tokens=192", "--init_out=0.5", "--init_down=0.5", "--init_head=0.5", "--ngrams=2",
             "--ngram_rows=97"]  # fmt: skip
    result = trainer(*model, "--train_steps=6", "--val_every=6", "--checkpoint_every=6", "--dtype=float32")
    assert result.returncode == 0, result.stderr
    assert main([str(only_run(tmp_path)), f"--out={tmp_path / 'my_model'}"]) == 0
    paths = []
    for kind in ("asked", "plain", "hellaswag", "contexts", "last_word", "sentences"):
        rows = [json.dumps(items(kind, number), ensure_ascii=False) for number in range(12)]
        paths.append(tmp_path / f"{kind}.jsonl")
        paths[-1].write_text("\n".join(rows) + "\n", encoding="utf-8")
    script, out = ROOT / "tests/inference/check_lm_eval.py", tmp_path / "found.json"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_DATASETS_OFFLINE": "1", "PYTHONUTF8": "1"}
    command = [PYTHON, script, tmp_path / "my_model", out, *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, loaded = json.loads(out.read_text()), load(str(tmp_path / "my_model"), "cpu", "float32")
    for path in paths:
        (task,) = read_tasks(path)
        ours, found = run_task(loaded, task, 96), theirs[path.stem]
        assert [bool(right) for right in found["items"]["acc"]] == ours.right, path.stem
        assert [bool(right) for right in found["items"].get("acc_norm", [])] == ours.right_norm, path.stem
        if ours.perplexity:
            assert found["results"]["perplexity"] == pytest.approx(ours.perplexity[0], rel=1e-4)
