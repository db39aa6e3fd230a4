"""The optimizers' settings, and the update rules by name: how to add one is at RULES."""

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeGuard, TypeVar

import torch

from optim.adamh import AdamH
from optim.adamuon import AdaMuon
from optim.adamw import CautiousAdamW
from optim.aurora import Aurora
from optim.matrix_optimizer import MatrixOptimizer
from optim.muon import Muon
from optim.muon_eq import MuonEq
from optim.muon_plus import MuonPlus
from optim.muon_squared import MuonSquared
from optim.muown import Muown
from optim.normuon import NorMuon, UNorMuon
from optim.options import Option
from optim.polar import METHODS
from optim.polar_grad import PolarGrad
from optim.replicated import replicate
from optim.riemannian_aurora import RiemannianAurora
from optim.soap import Soap, SoapMuon

T = TypeVar("T")
Groups = list[dict[str, Any]]

# To add an update rule: a line here. Its options become settings of their own, the name here before them.
RULES: dict[str, type[MatrixOptimizer]] = {
    "muon": Muon,
    "aurora": Aurora,
    "riemannian_aurora": RiemannianAurora,
    "normuon": NorMuon,
    "unormuon": UNorMuon,
    "muon_squared": MuonSquared,
    "soap": Soap,
    "soap_muon": SoapMuon,
    "muown": Muown,
    "adamh": AdamH,
    "muon_eq": MuonEq,
    "muon_plus": MuonPlus,
    "adamuon": AdaMuon,
    "polar_grad": PolarGrad,
}

POLAR_METHOD = Option("auto", "how polar factors are computed", choices=("auto", *METHODS))


def adamw(groups: Groups, config: "OptimizerConfig") -> torch.optim.Optimizer:
    fused = groups[0]["params"][0][1].device.type != "meta"
    kind = CautiousAdamW if config.adamw_cautious else torch.optim.AdamW
    return replicate(kind(groups, betas=config.adam_betas, eps=config.adam_eps, fused=fused))


TORCH_OPTIMIZERS: dict[str, Callable[[Groups, "OptimizerConfig"], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "sgd": lambda groups, config: replicate(torch.optim.SGD(groups, momentum=config.momentum, nesterov=True)),
    "rmsprop": lambda groups, config: replicate(torch.optim.RMSprop(groups, momentum=config.momentum)),
}


def find_rule(name: str) -> type[MatrixOptimizer]:
    """The rule of a name in RULES, or of `module:Class`. ValueError where there is none."""
    if name in RULES:
        return RULES[name]
    if ":" not in name:
        names = [*RULES, *TORCH_OPTIMIZERS]
        near = "".join(f"did you mean {near}? " for near in difflib.get_close_matches(name, names, n=1))
        raise ValueError(
            f"matrix_optimizer = {name!r} is unknown; {near}choose one of {', '.join(names)}, or your own as "
            "module:Class"
        )
    path, _, class_name = name.partition(":")
    try:
        module = importlib.import_module(path)
    except SyntaxError as error:
        raise ValueError(
            f"matrix_optimizer = {name!r}: {path!r} is not valid Python ({error}); mend it there"
        ) from error
    except (ImportError, TypeError, ValueError) as error:
        raise ValueError(
            f"matrix_optimizer = {name!r}: {path!r} cannot be imported ({error}); name a module as `import` "
            "does, in the folder of the program that runs or one in PYTHONPATH"
        ) from error
    rule, known = getattr(module, class_name, None), vars(module).items()
    if is_rule(rule):
        if all(getattr(rule, method) is getattr(MatrixOptimizer, method) for method in ("orthogonalize", "direction")):
            raise ValueError(
                f"matrix_optimizer = {name!r}: {class_name} has no method that makes an update; "
                "define orthogonalize(self, update, state, group) or direction(self, batch)"
            )
        return rule
    own = [key for key, value in known if is_rule(value) and value.__module__ == path]
    problem = f"has no {class_name}" if rule is None else f"has {class_name}, which is no subclass of MatrixOptimizer"
    works = f"choose one of {', '.join(own)}" if own else "define one with `class SignMuon(MatrixOptimizer)`"
    raise ValueError(f"matrix_optimizer = {name!r}: {path} {problem}; {works}")


def check_matrix_optimizer(name: str) -> None:
    """ValueError, as of `find_rule`, unless it names a rule or an optimizer of torch."""
    if name not in TORCH_OPTIMIZERS:
        find_rule(name)


def is_rule(value: Any) -> TypeGuard[type[MatrixOptimizer]]:
    return isinstance(value, type) and issubclass(value, MatrixOptimizer) and value is not MatrixOptimizer


def rule_settings(rule: type[MatrixOptimizer]) -> dict[str, tuple[str, Option]]:
    """{setting: (name, option)} of the options that are the rule's own, not every rule's.

    A setting is named after the first rule in RULES that has this very option, so that rules share it, or after the
    rule's class: aurora_sides, normuon_beta2.
    """
    prefixes = {each: name for name, each in RULES.items()}
    prefixes.setdefault(rule, rule.__name__.lower())
    named = {option: f"{prefixes[each]}_{name}" for each in reversed(prefixes) for name, option in each.options.items()}
    return {
        named[option]: (name, option) for name, option in rule.options.items() if name not in MatrixOptimizer.options
    }


def with_rule_options(config: type[T], rules: Iterable[type[MatrixOptimizer]] = RULES.values()) -> type[T]:
    """The frozen dataclass `config` with a field more for every option of these rules, of type Annotated[kind, Option].

    Raises ValueError for a setting that is there already and is another option.
    """
    known = {field.name: field.type for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    added: dict[str, tuple[str, Any, Any]] = {}
    for rule in rules:
        for setting, (_, option) in rule_settings(rule).items():
            if setting not in known:
                kind: Any = option.value_type | None if option.default is None else option.value_type
                known[setting] = Annotated[kind, option]
                added[setting] = setting, known[setting], dataclasses.field(default=option.default)
            elif option not in getattr(known[setting], "__metadata__", ()):
                raise ValueError(f"{setting} is a setting already; {rule.__name__} needs another name for its class")
    names = {"__module__": config.__module__, "__qualname__": config.__qualname__, "__doc__": config.__doc__}
    return dataclasses.make_dataclass(config.__name__, added.values(), bases=(config,), namespace=names, frozen=True)


@with_rule_options
@dataclass(frozen=True)
class OptimizerConfig:
    """What `build_optimizers` needs to know, the rules' own options included."""

    # Optimizers
    matrix_optimizer: str = "aurora"  # a rule of docs/optimizers.md, such as muon, or adamw, sgd, rmsprop, module:Class
    matrix_lr: Annotated[float, ">= 0"] = 0.02  # learning rate of the matrices inside the blocks
    matrix_weight_decay: Annotated[float, ">= 0"] = 0.0  # decoupled: a step multiplies weights by 1 - lr * this
    matrix_scale: Literal["spectral", "match_rms_adamw", "aspect", "none"] = "spectral"  # scale of muon and relatives
    cautious: bool = False  # muon and relatives: that decay only where it does not work against the update
    hyperball: bool = False  # muon and relatives: each matrix keeps its norm, matrix_lr is the step's share of it
    update_floor: Annotated[float, ">= 0"] = 0.0  # muon and relatives: shortest update, as a share of the weight's norm
    floor_by_row: bool = False  # muon and relatives: that floor under each row of an update instead of the whole
    radial_brake: Annotated[float, ">= 0", "<= 1"] = 1.0  # muon and relatives: share kept of what lengthens a weight
    momentum: Annotated[float, ">= 0", "< 1"] = 0.95  # of all but adamw
    polar_method: Annotated[str, POLAR_METHOD] = "auto"  # see optim/polar.py; auto: the rule's own
    polar_steps: Annotated[int, ">= 0"] = 0  # Newton-Schulz steps; 0: the method's own number
    kernels: Literal["auto", "triton", "torch"] = "auto"  # of muon and relatives; auto: Triton on a GPU
    comm_dtype: Literal["float32", "bfloat16"] = "float32"  # of muon's and relatives' gradients between ranks
    embed_lr: Annotated[float, ">= 0"] = 0.3  # AdamW, token embedding
    head_lr: Annotated[float, ">= 0"] = 0.004  # AdamW, output head
    sparse_lr: Annotated[float, ">= 0"] = 0.3  # Adagrad, tables with sparse gradients
    scalar_lr: Annotated[float, ">= 0"] = 0.015  # AdamW, whatever is not a matrix
    adam_betas: Annotated[tuple[float, float], ">= 0", "< 1"] = (0.8, 0.95)  # AdamW, where nothing else is said
    embed_betas: Annotated[tuple[float, float] | None, ">= 0", "< 1"] = None  # of the embedding; none: adam_betas
    head_betas: Annotated[tuple[float, float] | None, ">= 0", "< 1"] = None  # of the head; none: adam_betas
    scalar_betas: Annotated[tuple[float, float] | None, ">= 0", "< 1"] = None  # of the rest; none: adam_betas
    adam_eps: Annotated[float, "> 0"] = 1e-10  # AdamW, everywhere
    weight_decay: Annotated[float, ">= 0"] = 0.0  # AdamW, embedding, head and scalars
    adamw_cautious: bool = False  # AdamW, everywhere: decay only where it does not work against the update
