"""Exports: what is in the folder; and, in the environment with transformers that ./run.sh examples makes, the logits,
generated tokens and ids that it gives."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.tokenizer import get_tokenizer
from inference import export as module
from inference.export import main, merges, tokenizer_files
from inference.generate import Sampling, generate
from inference.load import Loaded, load
from tests.conftest import ROOT, Trainer
from tests.test_train import metrics, only_run, summary

PYTHON = ROOT / ".venv-examples/bin/python"
TEXTS = ["Fellow citizens", "naïve 日本 🙂\n\n  x", " lead", "don't  stop\t12,345", "a"]
BYTES = ["--tokenizer=byte", "--vocab_size=257", "--train_steps=6", "--val_every=6", "--checkpoint_every=6"]
RUNS: dict[str, list[str]] = {
    "plain": [],
    "everything": ["--window=12", "--doc_mask=true", "--value_embeds=1", "--embed_skip=true", "--ngrams=2,3",
                   "--ngram_rows=97", "--activation=squared_relu"],
    "averaged": ["--average_steps=3", "--average_share=0.5", "--ngrams=4", "--ngram_sparse=true"],
}  # fmt: skip


def expected_of(loaded: Loaded, path: Path) -> None:
    """Logits and greedy tokens by the repository's own model."""
    model, generator = loaded.model, torch.Generator().manual_seed(0)
    ids = torch.randint(256, (3, 20), generator=generator)
    ids[:, 7] = 256
    with torch.no_grad():
        logits = model.logits(model.hidden(ids, kind="sdpa"))[..., :257].contiguous()
    prompts = [ids[0, :11].tolist(), ids[1, :5].tolist()]
    rows = []
    for prompt in prompts:
        new = [*generate(model, prompt, 12, torch.Generator(), Sampling(temperature=0))]
        rows.append([256] * (11 - len(prompt)) + prompt + new)
    save_file(dict(ids=ids, logits=logits, greedy=torch.tensor(rows)), path)


def checked(folder: Path, expected: Path, tokenizer: str) -> None:
    if not PYTHON.exists():
        assert "REQUIRE_TRANSFORMERS" not in os.environ
        pytest.skip("no environment with transformers; ./run.sh examples makes one")
    texts = expected.with_suffix(".json")
    encode = get_tokenizer(tokenizer).encode_ordinary
    texts.write_text(json.dumps([[text, encode(text)] for text in TEXTS]), encoding="utf-8")
    command = [PYTHON, ROOT / "tests/inference/check_export.py", folder, expected, texts]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(expected.parent / "hub"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, encoding="utf-8")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.endswith("equal\n")


@pytest.fixture
def run(trainer: Trainer, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    result = trainer(*BYTES, "--init_out=0.5", "--init_down=0.5", "--init_head=0.5", *RUNS[request.param])
    assert result.returncode == 0, result.stderr
    return only_run(tmp_path)


@pytest.mark.parametrize("run", RUNS, indirect=True)
def test_an_export_gives_the_same_logits_tokens_and_ids(run: Path, tmp_path: Path) -> None:
    assert main([str(run), f"--out={tmp_path / 'my_model'}"]) == 0
    loaded = load(str(run), "cpu", "float32")
    weights = load_file(tmp_path / "my_model/model.safetensors")
    assert {name: weight.dtype for name, weight in weights.items()} == dict.fromkeys(weights, torch.float32)
    assert all(torch.equal(weights[name], weight) for name, weight in loaded.model.state_dict().items())
    expected_of(loaded, tmp_path / "expected.safetensors")
    checked(tmp_path / "my_model", tmp_path / "expected.safetensors", "byte")


@pytest.mark.parametrize("run", ["plain"], indirect=True)
def test_the_card_is_made_of_the_run_s_facts(run: Path, tmp_path: Path) -> None:
    assert main([str(run), f"--out={tmp_path / 'my_model'}"]) == 0
    told, text = summary(run), (tmp_path / "my_model/README.md").read_text(encoding="utf-8")
    for fact in (
        f"| parameters | {told['num_params']:,} |", f"| validation loss | {told['val_loss']:.4f} nats per token |",
        f"| bits per byte | {told['bits_per_byte']:.4f} of validation text |", "| steps | 6 of 6, 192 tokens each |",
        f"| machine | 1 x {told['device']} |", "| seed | 0 |", "by the recipe `tiny`",
    ):  # fmt: skip
        assert fact in text
    assert "| began with | random weights |" in text
    assert 'AutoTokenizer.from_pretrained("my_model", trust_remote_code=True)' in text
    names = {path.name for path in (tmp_path / "my_model").iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json", "modeling_nanogpt_aurora.py"}  # fmt: skip
    assert sorted(path.name for path in tmp_path.glob(".*")) == []  # nothing half-made is left


def test_the_card_of_an_earlier_checkpoint_is_of_that_step(trainer: Trainer, tmp_path: Path) -> None:
    steps = [
        "--checkpoint_every=2",
        "--checkpoint_keep=9",
        "--val_every=4",
        "--small_batch_steps=1",
        "--micro_batch_tokens=96",
    ]
    tables = ["--ngrams=2", "--ngram_rows=97", "--ngram_sparse=true"]
    assert trainer(*BYTES, *steps, *tables).returncode == 0
    run = only_run(tmp_path)
    told = summary(run)
    for step, loss in ((2, "unknown"), (4, f"{metrics(run, 'val_loss')[4]:.4f} nats per token")):
        out = tmp_path / f"at_{step}"
        assert main([str(run / f"checkpoint_{step:06d}.pt"), f"--out={out}"]) == 0
        text = (out / "README.md").read_text(encoding="utf-8")
        assert f", {192 * step - 96:,} tokens (byte) |" in text
        assert f"| validation loss | {loss} |" in text
        assert f"| machine | 1 x {told['device']} |" in text
        assert "on hidden matrices, Adagrad on tables of n-grams, AdamW on the rest" in text


def test_gpt2_s_files_give_its_own_ids(gpt2_vocabulary: Path, tmp_path: Path) -> None:
    files = tokenizer_files("gpt2")
    model = files["tokenizer.json"]["model"]
    assert len(model["vocab"]) == 50256
    assert len(model["merges"]) == 50000
    assert model["merges"][0] == ["\u0120", "t"]
    words = [get_tokenizer("gpt2").decode_single_token_bytes(token) for token in range(300)]
    assert merges(words, dict(zip(range(256), map(chr, range(256)), strict=True)))[:2] == [[" ", "t"], [" ", "a"]]
    if PYTHON.exists():
        (tmp_path / "tokenizer.json").write_text(json.dumps(files["tokenizer.json"]), encoding="utf-8")
        code = "import sys, json, tokenizers; t = tokenizers.Tokenizer.from_file(sys.argv[1])\n"
        code += "print(json.dumps([t.encode(text).ids for text in json.loads(sys.argv[2])]))"
        command = [PYTHON, "-c", code, tmp_path / "tokenizer.json", json.dumps(TEXTS)]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert json.loads(out) == [get_tokenizer("gpt2").encode_ordinary(text) for text in TEXTS]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--objective=masked"], "objective = 'masked' is not covered by an export; 'causal' is"),
        (["--architecture=track3"], "architecture = 'track3' is not covered by an export; 'gpt' is"),
    ],
)
def test_what_is_not_covered_is_named(
    settings: list[str], message: str, trainer: Trainer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert trainer(*BYTES, *settings).returncode == 0
    assert main([str(only_run(tmp_path)), f"--out={tmp_path / 'my_model'}"]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "my_model").exists()


@pytest.mark.parametrize("run", ["plain"], indirect=True)
def test_a_folder_that_is_there_stays_as_it_is(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    assert main([str(run), f"--out={tmp_path / 'there'}"]) == 2
    assert "is there; name a new folder" in capfd.readouterr().err
    assert [*(tmp_path / "there").iterdir()] == []
    assert main([str(run)]) == 2
    assert "name a run and a folder" in capfd.readouterr().err

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    assert main([str(run), f"--out={tmp_path / 'new'}"]) == 2
    assert "No space left" in capfd.readouterr().err
    assert not [path for path in tmp_path.iterdir() if "new" in path.name]


@pytest.mark.parametrize("run", ["plain"], indirect=True)
def test_push_hands_the_folder_over(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    class HfApi:
        def create_repo(self, name: str, exist_ok: bool) -> None:
            calls.append((name, exist_ok))

        def upload_folder(self, folder_path: Path, repo_id: str) -> str:
            calls.append((folder_path, repo_id))
            return "where it is"

    monkeypatch.setitem(sys.modules, "huggingface_hub", type("hub", (), {"HfApi": HfApi}))
    assert main([str(run), f"--out={tmp_path / 'm'}", "--push=me/m"]) == 0
    assert calls == [("me/m", True), (tmp_path / "m", "me/m")]
    calls.clear()
    (tmp_path / "m/README.md").write_text("mine", encoding="utf-8")
    assert main([str(tmp_path / "m"), "--push=me/m"]) == 0
    assert calls == [("me/m", True), (tmp_path / "m", "me/m")]
    assert (tmp_path / "m/README.md").read_text(encoding="utf-8") == "mine"
    assert main([str(run), f"--out={tmp_path / 'other'}", "--push=no name"]) == 2
    assert not (tmp_path / "other").exists()
    capfd.readouterr()

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nat all")

    monkeypatch.setattr(HfApi, "upload_folder", refuse)
    assert main([str(run), f"--out={tmp_path / 'other'}", "--push=me/m"]) == 2
    error = capfd.readouterr().err
    assert "did not take" in error
    assert f"(no route); the folder is whole: ./run.sh export {tmp_path / 'other'} --push=me/m tries again" in error
    assert error.count("\n") == 1
    assert main([str(run), f"--out={tmp_path / 'third'}"]) == 0
