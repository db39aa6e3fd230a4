"""Which optimizer moves what: every parameter once, in any wrapping; rules by name, settings of rules."""

import dataclasses
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, get_args, get_type_hints

import pytest
import torch
from torch import nn

from harness.settings import describe
from model import GPT, ModelConfig
from optim import (
    RULES,
    TORCH_OPTIMIZERS,
    Aurora,
    MatrixOptimizer,
    OptimizerConfig,
    Option,
    build_optimizers,
    find_rule,
    routing_table,
    with_rule_options,
)
from optim.adagrad import Adagrad
from optim.config import rule_settings

pytestmark = [pytest.mark.usefixtures("float32_products"), pytest.mark.filterwarnings("ignore:PolarGrad")]


def config(**changes: Any) -> SimpleNamespace:
    settings: dict[str, Any] = dict(
        matrix_optimizer="aurora", matrix_lr=0.02, matrix_weight_decay=0.1, matrix_scale="none", cautious=False,
        momentum=0.95,
        polar_method="auto", polar_steps=0, kernels="auto", comm_dtype="float32", aurora_variant="release",
        aurora_iterations=2, aurora_beta=0.5, aurora_sides="both", embed_lr=0.3, head_lr=0.004, scalar_lr=0.015,
        adam_betas=(0.8, 0.95), embed_betas=None, head_betas=None, scalar_betas=None, adam_eps=1e-10, weight_decay=0.01,
        adamw_cautious=False,
    )  # fmt: skip
    return SimpleNamespace(**{**settings, **changes})


@pytest.mark.parametrize("name", [*RULES, *TORCH_OPTIMIZERS])
def test_every_parameter_is_moved_once_by_the_optimizer_it_belongs_to(name: str) -> None:
    model = tiny_gpt(init_out=0.02, init_down=0.02)
    model.gain = nn.Parameter(torch.ones(16))  # as a fork might add
    decay = 0.0 if name == "adamh" else 0.1  # which keeps norms
    matrix, rest = optimizers = build_optimizers(model, config(matrix_optimizer=name, matrix_weight_decay=decay))
    assert type(matrix).__name__.lower() == name.replace("_", "")
    assert type(rest) is torch.optim.AdamW
    moved = {group["name"]: set(group["params"]) for o in optimizers for group in o.param_groups}
    assert moved["matrix"] == set(model.blocks.parameters())
    assert moved["embed"] == {model.embed.weight}
    assert moved["head"] == {model.head.weight}
    assert moved["scalar"] == {model.gain}
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for o in optimizers for group in o.param_groups}
    assert rates == {"matrix": (0.02, decay), "embed": (0.3, 0.01), "head": (0.004, 0.01), "scalar": (0.015, 0.01)}
    table = routing_table(optimizers)
    count = sum(p.numel() for p in model.blocks.parameters())
    assert f"matrix: 8 tensors, {count:,} parameters" in table
    assert ("torch kernels" in table) == isinstance(matrix, MatrixOptimizer)
    assert table.count(", not scale-free, lr") == (not getattr(matrix, "is_scale_free", True))


def test_tables_with_sparse_gradients_are_adagrads() -> None:
    model = tiny_gpt(ngrams=(2, 3), ngram_rows=20, ngram_sparse=True)
    optimizers = build_optimizers(model, config(sparse_lr=0.7))
    *_, tables = optimizers
    assert type(tables) is Adagrad
    (group,) = tables.param_groups
    assert (group["params"], group["lr"]) == ([table.weight for table in model.ngram_embeds], 0.7)
    moved = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(moved) == len(set(moved)) == len(list(model.parameters()))


def tiny_gpt(**changes: Any) -> GPT:
    shape = dict(vocab_size=50, num_layers=2, num_heads=2, head_dim=8, model_dim=16, seq_len=8)
    return GPT(ModelConfig(**{**shape, **changes}))


def routes(model: nn.Module) -> dict[str, set[nn.Parameter]]:
    return {group["name"]: set(group["params"]) for o in build_optimizers(model, config()) for group in o.param_groups}


@pytest.mark.parametrize("wrappers", ["_orig_mod", "module", "module _orig_mod", "_fsdp_wrapped_module", "model"])
def test_a_wrapped_model_is_routed_as_without(wrappers: str) -> None:
    """By torch.compile, DistributedDataParallel, both, and others, around the whole or around its parts."""
    model = tiny_gpt()
    expected = routes(model)
    assert len(expected) == 3
    whole: nn.Module = model
    for name in reversed(wrappers.split()):
        whole = nn.ModuleDict({name: whole})
    assert routes(whole) == expected
    model.head, model.embed = (nn.ModuleDict({wrappers.split()[0]: part}) for part in (model.head, model.embed))
    model.blocks[1] = nn.ModuleDict({wrappers.split()[0]: model.blocks[1]})
    assert routes(whole) == expected


@pytest.mark.parametrize(
    "wrap",
    [
        lambda gpt: nn.Sequential(gpt),
        lambda gpt: nn.ModuleList([gpt]),
        lambda gpt: nn.ModuleDict({"0": gpt}),
        lambda gpt: nn.Sequential(nn.ModuleDict({"module": gpt})),
        lambda gpt: nn.ModuleList([nn.Sequential(gpt), nn.Identity()]),
    ],
    ids=["sequential", "list", "dict", "sequential module", "list of two"],
)
def test_a_model_in_a_list_is_routed_as_without(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_gpt()
    attention = model.blocks[0].attention
    attention.head, attention.bias_table = nn.Linear(16, 4, bias=False), nn.Embedding(8, 2)
    expected = routes(model)
    assert expected["head"] == {model.head.weight}
    assert attention.head.weight in expected["matrix"]
    assert routes(wrap(model)) == expected


def test_a_head_may_be_called_as_others_do() -> None:
    model = tiny_gpt()
    expected = routes(model)
    model.lm_head = model.head
    del model.head
    assert routes(nn.ModuleDict({"module": model})) == expected


def test_every_model_has_its_head_and_blocks_alone_have_none() -> None:
    pair = nn.ModuleList([tiny_gpt(), tiny_gpt()])
    assert routes(pair)["head"] == {model.head.weight for model in pair}
    blocks = tiny_gpt().blocks
    blocks[0].attention.head = nn.Linear(16, 4, bias=False)
    assert set(routes(blocks)) == {"matrix"}
    around = nn.ModuleDict(dict(trunk=tiny_gpt(), head=nn.Linear(16, 3, bias=False)))
    assert routes(around)["head"] == {around["head"].weight, around["trunk"].head.weight}


def test_a_parametrized_embedding_is_one() -> None:
    model = tiny_gpt()
    nn.utils.parametrizations.weight_norm(model.embed)
    assert routes(model)["embed"] == set(model.embed.parameters())


def test_a_head_of_a_block_is_a_matrix_and_a_bias_of_the_head_is_a_scalar() -> None:
    model = tiny_gpt()
    model.blocks[0].attention.head = nn.Linear(16, 4, bias=False)
    model.head = nn.Linear(16, 64)
    assert model.blocks[0].attention.head.weight in routes(model)["matrix"]
    assert routes(model)["head"] == {model.head.weight}
    assert routes(model)["scalar"] == {model.head.bias}


def test_a_tied_head_and_a_bag_are_embeddings() -> None:
    model = tiny_gpt()
    model.bag = nn.EmbeddingBag(50, 16)
    model.head.weight = model.embed.weight
    assert routes(model) == {"matrix": set(model.blocks.parameters()), "embed": {model.embed.weight, model.bag.weight}}


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_model_without_matrices_is_refused_and_one_of_matrices_alone_is_not(name: str) -> None:
    with pytest.raises(ValueError, match=f"matrix_optimizer = '{name}': the model has no matrices"):
        build_optimizers(
            nn.ModuleDict(dict(embed=nn.Embedding(8, 4), head=nn.Linear(4, 8))), config(matrix_optimizer=name)
        )
    (only,) = build_optimizers(nn.Linear(4, 8, bias=False), config(matrix_optimizer=name))
    assert only.param_groups[0]["name"] == "matrix"


# Rules by name, and their options as settings


class Spread(Aurora):  # as someone's own file would have it
    options: ClassVar = {
        "power": Option(None, "of nothing", ("> 0",), kind=int),
        "polar_method": replace(MatrixOptimizer.options["polar_method"], default="quintic"),
    }


class Idle(MatrixOptimizer):
    """Has no method."""


class Lopsided(MatrixOptimizer):
    options: ClassVar = {"beta": Option(0.1, "is not Aurora's", (">= 0",))}


Lopsided.__name__ = "Aurora"


def built(settings: Any) -> torch.optim.Optimizer:
    return build_optimizers(nn.Linear(8, 4, bias=False), settings)[0]


def another_value(option: Option) -> Any:
    """One that is allowed and is not the default."""
    if option.choices:
        return next(choice for choice in option.choices if choice != option.default)
    if option.value_type is bool:
        return not option.default
    return 0.5 * (option.default or 1.0) if option.value_type is float else (option.default or 0) + 1


def test_every_option_of_a_rule_is_a_setting_that_reaches_it() -> None:
    fields = {field.name: field for field in dataclasses.fields(OptimizerConfig)}
    own = [setting for rule in RULES.values() for setting in rule_settings(rule)]
    assert {"aurora_variant", "aurora_iterations", "aurora_beta", "aurora_sides", "normuon_beta2",
            "riemannian_aurora_cg_steps", "riemannian_aurora_outer_steps"} < set(own)  # fmt: skip
    assert "riemannian_aurora_sides" not in own
    for name, rule in RULES.items():
        for setting, (option_name, option) in rule_settings(rule).items():
            assert fields[setting].default == option.default
            kind: Any = option.value_type | None if option.default is None else option.value_type
            assert get_args(fields[setting].type) == (kind, option)
            value = another_value(option)
            (group,) = built(OptimizerConfig(matrix_optimizer=name, **{setting: value})).param_groups
            assert group[option_name] == value != option.default


def test_auto_leaves_the_rule_s_own_defaults_alone() -> None:
    methods = {}
    for name in (*RULES, f"{__name__}:Spread"):
        for method in ("auto", "svd"):
            (group,) = built(OptimizerConfig(matrix_optimizer=name, polar_method=method)).param_groups
            methods[name, method] = group["polar_method"], group["polar_steps"]
            (group,) = built(OptimizerConfig(matrix_optimizer=name, polar_steps=3)).param_groups
            assert group["polar_steps"] == 3
    assert methods.pop(("riemannian_aurora", "auto")) == ("simple_quintic", None)
    assert methods.pop((f"{__name__}:Spread", "auto")) == ("quintic", None)
    assert {key: value[0] for key, value in methods.items()} == {
        key: "polar_express" if key[1] == "auto" else "svd" for key in methods
    }


def test_a_rule_from_outside_is_named_by_its_module_and_has_settings_of_its_own() -> None:
    rule = find_rule(f"{__name__}:Spread")
    assert rule is Spread
    assert find_rule("normuon") is RULES["normuon"]
    settings = with_rule_options(OptimizerConfig, [rule])
    (added,) = {field.name for field in dataclasses.fields(settings)} - {
        f.name for f in dataclasses.fields(OptimizerConfig)
    }
    assert added == "spread_power"
    assert get_type_hints(settings)["spread_power"] == int | None
    made = built(settings(matrix_optimizer=f"{__name__}:Spread", spread_power=3, aurora_beta=0.25))
    assert type(made) is Spread
    assert (made.param_groups[0]["power"], made.param_groups[0]["beta"]) == (3, 0.25)
    assert (
        built(config(matrix_optimizer=f"{__name__}:Spread")).param_groups[0]["power"] is None
    )  # no field: the default
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings().momentum = 0.5
    assert pickle.loads(pickle.dumps(OptimizerConfig(aurora_beta=0.25))) == OptimizerConfig(aurora_beta=0.25)
    with pytest.raises(ValueError, match="aurora_beta is a setting already; Aurora needs another name for its class"):
        with_rule_options(OptimizerConfig, [Lopsided])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lion", ["is unknown", "muon, aurora", "rmsprop", "module:Class"]),
        ("no_such_module:Lion", ["'no_such_module' cannot be imported", "PYTHONPATH"]),
        (":Lion", ["'' cannot be imported"]),
        (".lion:Lion", ["'.lion' cannot be imported"]),
        ("optim.normuon:NorMoun", ["optim.normuon has no NorMoun", "choose one of NorMuon, UNorMuon"]),
        ("optim.bank:Bank", ["optim.bank has Bank, which is no subclass", "class SignMuon"]),
        ("optim:MatrixOptimizer", ["no subclass of MatrixOptimizer"]),
        (f"{__name__}:Idle", ["Idle has no method", "orthogonalize(self, update, state, group)"]),
    ],
    ids=["unknown", "module", "empty", "relative", "class", "other class", "base class", "no method"],
)
def test_a_rule_that_is_not_there_is_refused_with_what_is(name: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        built(config(matrix_optimizer=name))
    assert all(word in str(refusal.value) for word in [f"matrix_optimizer = {name!r}", *words]), refusal.value


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def (:", ["is not valid Python", "line 1"]),
        (
            "import optim\nclass A(optim.MatrixOptimizer):\n    options = {'b': 2.0}",
            ["A: the option b", "Option(2.0, "],
        ),
    ],
    ids=["syntax", "option"],
)
def test_a_mistake_in_the_file_of_a_rule_is_told_in_one_line(
    source: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mistaken_rule.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as refusal:
        find_rule("mistaken_rule:A")
    assert all(word in str(refusal.value) for word in words), refusal.value


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            dict(matrix_optimizer="muon", hyperball=True, matrix_weight_decay=0.1),
            ["matrix_weight_decay = 0.1", "set matrix_weight_decay = 0.0"],
        ),
        (dict(matrix_optimizer="adamw", hyperball=True), ["'adamw'", "hyperball = True", "set hyperball = False"]),
        (dict(matrix_optimizer="sgd", update_floor=0.35), ["update_floor = 0.35", "set update_floor = 0.0", "'muon'"]),
    ],
    ids=["decay", "adamw", "sgd"],
)
def test_constraints_that_cannot_hold_are_refused_in_words_of_the_settings(
    settings: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as refusal:
        built(config(**settings))
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_help_explains_every_setting_of_the_optimizers() -> None:
    declared = dataclasses.fields(OptimizerConfig.__base__)
    explained, _ = describe(OptimizerConfig(), "").split("Options of single update rules")
    assert [line.split("=")[0] for line in explained.splitlines() if line.startswith("  --")] == [
        f"  --{field.name}" for field in declared
    ]
