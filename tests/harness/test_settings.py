"""Where settings come from and how mistakes in them are worded: one line naming source, key and what would work."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Annotated

import pytest

from harness.settings import check_settings, describe, parse_settings, rules_of
from optim import Aurora, MatrixOptimizer, Option, RiemannianAurora
from tests.conftest import ROOT
from train_gpt import Config, load_config


def toml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_file_overrides_defaults_and_command_line_overrides_file(tmp_path: Path) -> None:
    recipe = toml(tmp_path, 'name = "x"\nmatrix_lr = 0.5\nadam_betas = [0.1, 0.2]\ncompile = true\nseed = 3\n')
    config = load_config([recipe, "--matrix_lr=0.25", "--seed", "7", "--stop_at_target"])
    expected = dict(name="x", matrix_lr=0.25, adam_betas=(0.1, 0.2), compile=True, seed=7, stop_at_target=True)
    assert config == dataclasses.replace(Config(), **expected)


@pytest.mark.parametrize(
    ("arguments", "value"),
    [(["--compile"], True), (["--compile=true"], True), (["--compile", "False"], False), (["--compile=false"], False)],
    ids=str,
)
def test_spellings_of_a_switch(arguments: list[str], value: bool) -> None:
    assert load_config([*arguments, "--seed=1"]).compile is value
    assert load_config(["--seed=1", *arguments]).compile is value


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--matrx_lr=1"], ["command line", "matrx_lr", "did you mean matrix_lr?"]),
        (["--qqq=1"], ["qqq", "--help lists them all"]),
        (["--train_steps=many"], ["command line: train_steps = 'many' must be a whole number", "300 works"]),
        (["--train_steps=2.5"], ["train_steps = 2.5 must be a whole number"]),
        (["--compile=maybe"], ["compile = 'maybe' must be true or false"]),
        (["--adam_betas", "0.9"], ["adam_betas", "2 values", "0.8,0.95 works"]),
        (["--train_steps=0"], ["train_steps = 0 must be > 0; 300 works"]),
        (["--matrix_lr=-1"], ["matrix_lr = -1 must be >= 0; 0.02 works"]),
        (["--matrix_lr=nan"], ["matrix_lr = nan must be >= 0"]),
        (["--matrix_lr=inf"], ["matrix_lr = inf must be finite"]),
        (["--cooldown_frac=1.5"], ["cooldown_frac = 1.5 must be <= 1; 0.7 works"]),
        (["--head_dim=7"], ["head_dim = 7", "even"]),
        (["--vocab_size=300"], ["vocab_size = 300", "'byte'", "257", "none"]),
        (["--tokenizer=bert"], ["'bert'", "gpt2"]),
        (["missing.toml"], ["missing.toml", "configs/sotu_cpu.toml"]),
        (["stray"], ["stray"]),
        (["seed=1"], ["config seed=1 cannot be read", "try --seed=1"]),
        (["sotu_base"], ["try configs/sotu_base.toml"]),
        (["--adam_betas=0.9,1.5"], ["adam_betas = '0.9,1.5' must be < 1; 0.8,0.95 works"]),
        (["--head_betas=0.9"], ["head_betas = '0.9' must be 2 values"]),
        (["--adamw_cooldown_frac=2"], ["adamw_cooldown_frac = 2 must be <= 1; leaving it out works"]),
        (["--matrix_optimizer=adam"], ["matrix_optimizer = 'adam' is unknown", "module:Class"]),
        (["a.toml", "b.toml"], ["a.toml and b.toml are both taken for config files"]),
        (["--seed"], ["--seed has no value; write --seed=VALUE"]),
        (["-x"], ["-x is not a setting", "--key=value"]),
        (["--device=gpu"], ["device = 'gpu' must be one of auto, cuda, cpu"]),
        (["--aurora_beta=2"], ["aurora_beta = 2 must be <= 1; 0.5 works"]),
        (["--aurora_sides=left"], ["aurora_sides = 'left' must be one of both, tall, wide"]),
    ],
    ids=str,
)
def test_mistakes_on_the_command_line(arguments: list[str], words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        load_config(arguments)
    message = str(refusal.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    "name",
    ["exp/a", "/abs", "..", ".", "", "../up", ".hidden", "-x", "~", " a", "a\nb", "a\0b", "a\x1b[0m", "a" * 232,
     "日" * 78, "\udce9"],
    ids=ascii,
)  # fmt: skip
def test_a_name_that_cannot_begin_a_directory_s_is_refused_with_one_that_can(name: str) -> None:
    with pytest.raises(ValueError, match=r"name = .* must begin with .*; '(.*)' works$") as refusal:
        dataclasses.replace(Config(), name=name)
    assert "no control characters" in str(refusal.value)
    works = str(refusal.value).split("'")[-2]
    assert load_config([f"--name={works}"]).name == works
    assert "\n" not in str(refusal.value)


def test_ordinary_names_are_taken() -> None:
    for name in ("a" * 231, "日" * 77, "_x", "7", "matrix_lr=0.02,adam_betas=0.9:0.95", "a[b]*?", "50%2Fa b"):
        assert load_config([f"--name={name}"]).name == name


def test_the_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = ("run_dir", "resume", "train_files", "val_files")
    config = load_config([f"--{key}=~/a/{key}*" for key in keys])
    assert [getattr(config, key) for key in keys] == [f"{tmp_path}/a/{key}*" for key in keys]
    default = load_config([])
    assert [getattr(default, key) for key in keys] == [getattr(Config(), key) for key in keys]
    assert load_config(["--run_dir=runs/~/./x/"]).run_dir == "runs/~/./x/"


def test_words_and_files_of_an_ascii_locale_are_the_user_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('name = "é-run"\ntrain_files = "é/a_*.bin"\n', encoding="utf-8")
    monkeypatch.setattr(os, "fsencode", lambda name: str(name).encode("ascii", "surrogateescape"))
    monkeypatch.setattr(os, "fsdecode", lambda name: name.decode("ascii", "surrogateescape"))
    as_read = "\udcc3\udca9"  # é
    config = load_config([str(recipe), f"--author=Zo{as_read}", f"--run_dir={as_read}", "--val_files=b_*.bin"])
    assert (config.author, config.name) == ("Zoé", "é-run")
    assert (config.run_dir, config.train_files) == (as_read, f"{as_read}/a_*.bin")
    assert (config.val_files, config.resume) == ("b_*.bin", "")


def test_a_value_is_that_value_however_it_is_written(tmp_path: Path) -> None:
    """In a file or behind =, whatever it begins with or looks like; numbers as whole ones where they are."""
    for text in ("--faster", "-5%", "--seed=9", "--help", "true", "José", "a, b", "x" * 5000):
        recipe = tmp_path / "text.toml"
        recipe.write_bytes(b"\xef\xbb\xbf" + f'description = "{text}"\r\n'.encode())
        assert load_config([str(recipe)]).description == load_config([f"--description={text}"]).description == text
    for words in (["--train_steps=1e3"], ["--train-steps", "1000"], ["--train_steps=1_000"]):
        assert load_config(words).train_steps == 1000
    for words in (["--adam_betas=0.5,0.6"], ["--adam_betas", "0.5,0.6"], ["--adam_betas", "0.5", "0.6"]):
        assert load_config([*words, "--compile"]).adam_betas == (0.5, 0.6)
    assert load_config(["--head_betas=0.5,0.6"]).head_betas == (0.5, 0.6)
    assert load_config([]).head_betas is None
    assert load_config(["--fused", "norm", "mlp", toml(tmp_path, "seed = 3")]).fused == ("norm", "mlp")
    assert load_config([toml(tmp_path, 'fused = "norm"\ntrain_steps = 1e3')]).fused == ("norm",)


def test_a_recipe_may_stand_anywhere_and_the_command_line_counts(tmp_path: Path) -> None:
    recipe, words = toml(tmp_path, "seed = 3\nval_every = 7"), ["--compile", "--seed", "4", "--log_every=2"]
    for place in (0, 1, 3, 4):
        config = load_config([*words[:place], recipe, *words[place:]])
        assert (config.compile, config.seed, config.log_every, config.val_every) == (True, 4, 2, 7)


def test_every_setting_has_a_text_and_a_default_that_keeps_its_rule() -> None:
    shown = describe(Config(), "")
    for key in rules_of(Config):
        assert re.search(rf"^  --{key}=\w+ +\S", shown, re.MULTILINE), key
        assert not re.search(rf"^  --{key}=\w+ +\(", shown, re.MULTILINE), key
    check_settings(Config())


def test_words_of_a_list_of_texts_keep_their_commas() -> None:
    @dataclasses.dataclass(frozen=True)
    class Options:
        variants: tuple[str, ...] = ()

    assert parse_settings(Options, ["--variants", "plain", "all: fused=norm,mlp"]).variants == (
        "plain", "all: fused=norm,mlp",
    )  # fmt: skip
    assert parse_settings(Options, ["--variants=plain,other"]).variants == ("plain", "other")


def test_an_option_may_be_none_until_it_is_given() -> None:
    @dataclasses.dataclass(frozen=True)
    class Options:
        cap: Annotated[int | None, Option(None, "largest", ("> 0",), kind=int)] = None

    assert parse_settings(Options, []).cap is None
    assert parse_settings(Options, ["--cap=3"]).cap == 3
    with pytest.raises(ValueError, match=r"cap = 0 must be > 0; leaving it out works$"):
        parse_settings(Options, ["--cap=0"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("matrix_lrr = 1.0", ["recipe.toml", "matrix_lrr", "did you mean matrix_lr?"]),
        ('train_steps = "300"', ["recipe.toml: train_steps = '300' must be a whole number"]),
        ("train_steps = 2.5", ["recipe.toml: train_steps = 2.5 must be a whole number"]),
        ("compile = 1", ["recipe.toml: compile = 1 must be true or false; false works"]),
        ("adam_betas = 0.9", ["recipe.toml: adam_betas = 0.9 must be 2 values; [0.8, 0.95] works"]),
        ('name = ["a"]', ["recipe.toml: name = ['a'] must be text"]),
        (f"seed = {'9' * 5000}", ["recipe.toml is not valid TOML"]),
        ("train_steps = ", ["recipe.toml", "not valid TOML", "per line"]),
        ("[model]\nwidth = 3", ["recipe.toml", "model"]),
    ],
    ids=["unknown key", "wrong type", "fraction", "switch", "one of two", "list", "long", "syntax", "table"],
)
def test_mistakes_in_a_file(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        load_config([toml(tmp_path, text)])
    message = str(refusal.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_help_lists_every_field_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_settings(Config, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Config):
        assert f"--{field.name}" in text
    assert "seed of the initial weights" not in text
    for name, option in [*Aurora.options.items(), *RiemannianAurora.options.items()]:
        assert option.help in text or name in MatrixOptimizer.options
    assert "(>= 0; <= 1; default 0.5)" in text


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_is_whole_and_divides_on_eight_ranks_or_one(recipe: Path) -> None:
    config = load_config([str(recipe)])
    assert config.name == recipe.stem
    assert config.track or not config.target_loss  # a model to use is no race
    assert config.description
    assert config.micro_batch_tokens % config.seq_len == config.val_tokens % config.seq_len == 0
    num_ranks = 8 if config.name.startswith(("fineweb", "track3")) else 1
    assert config.batch_tokens % (num_ranks * (config.micro_batch_tokens or config.seq_len)) == 0
    assert config.matrix_optimizer in config.name or config.name.startswith("sotu") or config.name.endswith("fast")
    assert config.num_heads * config.head_dim == config.model_dim
