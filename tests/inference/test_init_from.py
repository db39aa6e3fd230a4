"""init_from: a run that begins with the weights of another one, from a checkpoint or an export of it."""

import json
from pathlib import Path

import pytest
import torch

from inference import export
from inference.load import load, read_trained
from tests.conftest import Trainer, python, torchrun
from tests.test_train import metrics, only_run

FIRST = [
    "--tokenizer=byte", "--vocab_size=257", "--train_steps=6", "--val_every=3", "--checkpoint_every=6",
    "--dtype=float32", "--average_steps=3", "--value_embeds=1", "--ngrams=2,3", "--ngram_rows=97",
    "--mask_padding=true",
]  # fmt: skip
MODEL = [*FIRST[:2], *FIRST[5:6], *FIRST[7:]]


@pytest.fixture
def run(trainer: Trainer, tmp_path: Path) -> Path:
    assert trainer(*FIRST, "--name=first").returncode == 0
    return only_run(tmp_path)


def second_of(tmp_path: Path) -> Path:
    (found,) = (tmp_path / "runs").glob("second-*")
    return found


@pytest.mark.parametrize("source", ["export", "run", "checkpoint"])
def test_the_first_loss_is_the_last_of_what_it_is_from(
    source: str, run: Path, trainer: Trainer, tmp_path: Path
) -> None:
    assert export.main([str(run), f"--out={tmp_path / 'my_model'}"]) == 0
    paths = dict(export=tmp_path / "my_model", run=run, checkpoint=run / "checkpoint_000006.pt")
    result = trainer(*MODEL, f"--init_from={paths[source]}", "--name=second", "--train_steps=4", "--seed=5")
    assert result.returncode == 0, result.stderr
    losses = metrics(second_of(tmp_path), "val_loss")
    assert losses[0] == metrics(run, "val_loss")[6]
    assert losses[4] != losses[0]


def test_two_ranks_and_shards_begin_with_it_too(run: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    words = [*MODEL, f"--init_from={run}", "--micro_batch_tokens=32", "--fsdp=true", "--train_steps=2", "--name=second"]
    result = python(torchrun(2), tiny_recipe, *words, f"--run_dir={tmp_path / 'runs'}")
    assert result.returncode == 0, result.stderr
    first = metrics(second_of(tmp_path), "val_loss")[0]
    assert first == pytest.approx(metrics(run, "val_loss")[6], rel=1e-5)


def test_a_resumed_run_goes_on_from_its_own_weights(run: Path, trainer: Trainer, tmp_path: Path) -> None:
    words = [*MODEL, f"--init_from={run}", "--name=second", "--train_steps=4", "--checkpoint_every=2"]
    assert trainer(*words).returncode == 0
    whole = second_of(tmp_path)
    whole.joinpath("summary.json").unlink()
    whole.joinpath("checkpoint_000004.pt").unlink()
    assert trainer(*words, "--resume=auto").returncode == 0
    (resumed,) = set((tmp_path / "runs").glob("second-*")) - {whole}
    assert metrics(resumed, "val_loss")[4] == metrics(whole, "val_loss")[4]


def test_an_export_reads_back_as_the_run(run: Path, tmp_path: Path) -> None:
    assert export.main([str(run), f"--out={tmp_path / 'my_model'}"]) == 0
    ours, theirs = load(str(run), "cpu", "float32"), load(str(tmp_path / "my_model"), "cpu", "float32")
    assert ours.model.config == theirs.model.config
    assert ours.tokenizer == theirs.tokenizer
    for name, weight in ours.model.state_dict().items():
        assert torch.equal(weight, theirs.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_layers=3", "--ngrams=2"], "is another model than this run's; set --ngrams=2,3 --num_layers=2"),
        (["--ngrams=", "--ngram_rows=9"], "is another model than this run's; set --ngram_rows=97 --ngrams=2,3"),
        (["--ngram_rows=96"], "is another model than this run's; set --ngram_rows=97"),
        (
            ["--softcap=30", "--mask_padding=false"],
            "is another model than this run's; set --mask_padding=true --softcap=15.0",
        ),
        (
            ["--tie_head_steps=2", "--embed_lr=0.01", "--head_lr=0.01"],
            "and those of init_from are two; set --tie_head_steps=0",
        ),
    ],
)
def test_another_model_is_refused_with_what_to_set(
    words: list[str], message: str, run: Path, trainer: Trainer, tmp_path: Path
) -> None:
    result = trainer(*MODEL, *words, f"--init_from={run}", "--name=second")
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not [*(tmp_path / "runs").glob("second-*")]


def test_what_is_no_model(run: Path, trainer: Trainer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my_model"
    assert export.main([str(run), f"--out={folder}"]) == 0
    assert export.main([str(folder), f"--out={tmp_path / 'again'}"]) == 2
    assert "is an export; copy the folder" in capfd.readouterr().err
    weights = (folder / "model.safetensors").read_bytes()
    for content in (b"", weights[:7], weights[:100], weights[:-1]):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read, or is not whole"):
            read_trained(str(folder))
    assert trainer(*MODEL, f"--init_from={folder}").stderr.count("\n") == 1
    (folder / "model.safetensors").write_bytes(weights)
    sound = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    edited = [
        (dict(seq_len=-5), "seq_len = -5 must be > 0"), (dict(activation="foo"), "its settings are none"),
        (dict(num_heads=None), "its settings are none"), (dict(window=-3), "window = -3 must be >= 0"),
        (dict(vocab_size=300), "vocab_size = 300 does not fit tokenizer = 'byte'"),
    ]  # fmt: skip
    texts = [(json.dumps(sound | dict(training=sound["training"] | change)), message) for change, message in edited]
    texts += [
        ('{"training": {}}', "its settings lack tokenizer, val_files, val_tokens"),
        ('{"a": 1}', "has no settings under 'training'"),
    ]
    for text, message in [*texts, ("{", "config.json is missing or no JSON")]:
        (folder / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            read_trained(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has a config\.json and no model\.safetensors"):
        read_trained(str(folder))
    with pytest.raises(ValueError, match=r"runs holds run directories; name one of them, such as /"):
        read_trained(str(run.parent))
    with pytest.raises(ValueError, match="no run directory, checkpoint or export"):
        read_trained(str(tmp_path / "nowhere"))
