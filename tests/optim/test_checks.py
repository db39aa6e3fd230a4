"""What a matrix optimizer refuses by name, and states of every kind: older, of others, of convolutions."""

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from optim import Aurora, MatrixOptimizer, Muon, NorMuon
from tests.matrices import randn

pytestmark = pytest.mark.usefixtures("float32_products")


def stepped(optimizer: MatrixOptimizer, seed: int = 0) -> MatrixOptimizer:
    """The optimizer after a step with gradients that depend on each parameter's size alone."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = randn(*p.shape, seed=seed).to(p.dtype)
    optimizer.step()
    return optimizer


# Parameters


def expanded() -> nn.Parameter:
    return nn.Parameter(randn(1, 4).expand(3, 4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Parameter(torch.ones(4)), ["shape (4,)", "no matrix", "AdamW"]),
        (lambda: nn.Parameter(torch.ones(3, 4, dtype=torch.complex64)), ["complex64", "real"]),
        (lambda: nn.Parameter(torch.ones(3, 4, dtype=torch.int64), requires_grad=False), ["int64"]),
        (lambda: nn.Parameter(torch.ones(0, 4)), ["(0, 4)", "no elements"]),
        (lambda: nn.Parameter(torch.ones(4, 0)), ["(4, 0)", "no elements"]),
        (lambda: nn.Parameter(torch.ones(0, 3, 4)), ["(0, 3, 4)", "no elements"]),
        (lambda: nn.Parameter(torch.eye(3).to_sparse()), ["sparse_coo", "dense"]),
        (lambda: nn.UninitializedParameter(), ["no shape yet", "batch"]),
        (expanded, ["share memory", "clone()"]),
        (lambda: nn.Parameter(torch.ones(3, 4).to(torch.float8_e4m3fn)), ["float8_e4m3fn", "bfloat16"]),
    ],
    ids=[
        "vector",
        "complex",
        "integer",
        "no rows",
        "no columns",
        "no matrices",
        "sparse",
        "lazy",
        "expanded",
        "float8",
    ],
)
def test_what_cannot_be_moved_is_refused_at_construction(make: Callable[[], nn.Parameter], words: list[str]) -> None:
    for params in ([("odd.one", make())], [dict(params=[("odd.one", make())], flatten=True)]):
        with pytest.raises(ValueError) as refusal:
            Muon(params)
        assert all(word in str(refusal.value) for word in ["Muon: odd.one", *words])


def test_a_parameter_given_twice_is_refused() -> None:
    p, q = nn.Parameter(randn(3, 4)), nn.Parameter(randn(3, 4))
    with warnings.catch_warnings(), pytest.raises(ValueError, match="tied is in its group twice"):
        warnings.simplefilter("ignore")  # torch's own, that this will be an error
        Muon([("first", p), ("second", q), ("tied", p)])


def test_parameters_without_memory_are_planned_for_and_not_stepped() -> None:
    optimizer = Muon([("W", nn.Parameter(torch.empty(3, 4, device="meta")))])
    assert optimizer.plan_banks(0, 1)[0][0].size == 1
    with pytest.raises(ValueError, match="W is on the device meta"):
        optimizer.step()


# Convolutions


@pytest.mark.parametrize("shape", [(16, 8, 3, 3), (16, 8, 3), (4, 2, 3, 3, 3), (16, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_flattened_parameters_move_as_their_matrices_do(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """In every order of memory; beside a stack and with blocks of rows. Bits are equal: the arithmetic is the same."""
    weights = [nn.Parameter(randn(*shape, seed=i).to(dtype)) for i in range(2)]
    if len(shape) == 4:
        weights[1].data = weights[1].data.contiguous(memory_format=torch.channels_last)
    flat = [nn.Parameter(w.detach().flatten(1).clone()) for w in weights]
    make = partial(NorMuon, weight_decay=0.1, cautious=True, row_blocks=2)
    optimizer, reference = make(weights, flatten=True), make(flat)
    for step in range(3):
        for i, (w, f) in enumerate(zip(weights, flat, strict=True)):
            gradient = randn(*shape, seed=10 * step + i).to(dtype)
            w.grad, f.grad = gradient, gradient.flatten(1).clone()
        optimizer.step()
        reference.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for w, f in zip(weights, flat, strict=True):
        assert torch.equal(w.flatten(1), f)
        assert optimizer.state[w].keys() == reference.state[f].keys()
        assert all(torch.equal(optimizer.state[w][key], reference.state[f][key]) for key in reference.state[f])


@pytest.mark.parametrize(
    ("shape", "options", "warns"),
    [
        ((16, 8, 3, 3), dict(), True),
        ((16, 8, 3, 3), dict(flatten=True), False),
        ((16, 8, 3, 3), dict(flatten=False), False),
        ((4, 8, 3, 3, 3), dict(), True),
        ((3, 8, 8), dict(), False),
        ((8, 8), dict(), False),
    ],
    ids=str,
)
def test_what_may_be_a_convolution_is_said_once(
    shape: tuple[int, ...], options: dict[str, Any], warns: bool, recwarn: pytest.WarningsRecorder
) -> None:
    named = [("plain", nn.Parameter(randn(8, 8))), ("conv.weight", nn.Parameter(randn(*shape)))]
    optimizer = stepped(Muon(named, **options))
    stepped(Muon(named, flatten=options.get("flatten", False))).load_state_dict(optimizer.state_dict())
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == warns
    assert all(warning.filename == __file__ for warning in recwarn)
    assert all("Muon: the last two dimensions of conv.weight are" in text and "flatten=True" in text for text in said)


# States


def named(*shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}", nn.Parameter(randn(*shape, seed=i))) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("rule", [Muon, NorMuon, partial(Aurora, variant="warm")], ids=["muon", "normuon", "warm"])
def test_options_that_a_state_or_pickle_lacks_are_the_optimizer_s_own(rule: Callable[..., MatrixOptimizer]) -> None:
    """Each option in turn is taken away, as in a state that was saved before there was one."""
    options = set(rule(named((6, 4))).defaults) - {"polar_method", "lr", "differentiable"}
    assert options > {"cautious", "row_blocks", "flatten"}
    for option in options:
        saved = stepped(rule(named((6, 4)), lr=0.3, cautious=True))
        whole = pickle.loads(pickle.dumps(saved))
        state = saved.state_dict()
        del state["param_groups"][0][option]
        loaded = rule(named((6, 4)), cautious=True)
        loaded.load_state_dict(state)
        assert loaded.param_groups[0]["lr"] == 0.3
        assert loaded.param_groups[0][option] == saved.param_groups[0][option]
        value = saved.param_groups[0].pop(option)
        old = pickle.loads(pickle.dumps(saved))  # knows nothing of the option, and takes its default
        assert old.param_groups[0][option] == type(saved)(named((6, 4))).defaults[option]
        old.param_groups[0][option] = value
        del saved.defaults[option]
        older = pickle.loads(pickle.dumps(saved))
        older.add_param_group(dict(params=[("added", nn.Parameter(randn(3, 4)))], lr=0.1))
        assert older.param_groups[1][option] == type(saved)(named((6, 4))).defaults[option]
        results = [stepped(each, seed=1).param_groups[0]["params"][0] for each in (whole, old, copy.deepcopy(whole))]
        assert torch.equal(results[0], results[1])


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


def changed(**entry: Any) -> dict[str, Any]:
    """Muon's state of `named((6, 4), (3, 4))` with the second entry changed; None takes a key away."""
    state = state_of(Muon(named((6, 4), (3, 4))))
    state["state"][1] = {k: v for k, v in {**state["state"][1], **entry}.items() if v is not None}
    return state


def of_group(**options: Any) -> dict[str, Any]:
    state = changed()
    state["param_groups"][0].update(options)
    return state


REFUSED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "adamw": (lambda: state_of(torch.optim.AdamW(named((6, 4), (3, 4)))), ["another kind of optimizer", "betas"]),
    "sgd": (lambda: state_of(torch.optim.SGD(named((6, 4), (3, 4)), momentum=0.9)), ["another kind", "dampening"]),
    "torch's muon": (lambda: state_of(torch.optim.Muon(named((6, 4), (3, 4)))), ["another kind", "ns_steps"]),
    "no state": (lambda: dict(model={}), ["state and param_groups", "model"]),
    "a parameter less": (lambda: state_of(Muon(named((6, 4)))), ["groups of 1 parameters", "groups of 2"]),
    "transposed": (
        lambda: state_of(Muon(named((6, 4), (4, 3)))),
        ["momentum_buffer in the state of p1 has shape (4, 3)", "(3, 4)"],
    ),
    "of other blocks": (lambda: of_group(row_blocks=4), ["row_blocks = 4 must divide the 6 rows of p0"]),
    "reordered": (lambda: of_group(param_names=["p1", "p0"]), ["of p1 where the optimizer has p0"]),
    "a number": (lambda: changed(step=7.0), ["step in the state of p1 is 7.0", "tensor"]),
    "a momentum that is a number": (lambda: changed(momentum_buffer=0.0), ["momentum_buffer in", "of p1 is 0.0"]),
    "sparse": (lambda: changed(momentum_buffer=torch.ones(3, 4).to_sparse()), ["p1", "torch.sparse_coo"]),
    "complex": (lambda: changed(momentum_buffer=torch.ones(3, 4) * 1j), ["p1", "torch.complex64"]),
    "no momentum": (lambda: changed(momentum_buffer=None, velocity=torch.ones(3, 4)), ["p1 has velocity"]),
    "keys of text": (lambda: dict(changed(), state={"0": {}}), ["entries for 0"]),
    "a rate of text": (lambda: of_group(lr="1e-3"), ["lr = '1e-3' is of type str", "0.02"]),
    "no rate": (lambda: of_group(lr=None), ["lr = None", "real number"]),
    "nothing": (lambda: None, ["the state dict is None"]),
    "state that is none": (lambda: dict(changed(), state=None), ["state of type NoneType"]),
    "state that is a list": (lambda: dict(changed(), state=[{}, {}]), ["state of type list"]),
    "groups that are none": (lambda: dict(changed(), param_groups=None), ["param_groups of type NoneType"]),
    "a group that is none": (lambda: dict(changed(), param_groups=[None]), ["group 0 of the state dict has None"]),
    "a group of nothing": (lambda: dict(changed(), param_groups=[dict(lr=0.1)]), ["group 0", "has lr;", "params"]),
    "an entry that is none": (lambda: dict(changed(), state={1: None}), ["state of p1 is None"]),
    "without values": (
        lambda: changed(momentum_buffer=torch.ones(3, 4, device="meta")),
        ["momentum_buffer in the state of p1 is on the device meta", "torch.load"],
    ),
    "a wrong option": (lambda: of_group(lr=-1.0), ["lr = -1.0"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(kind: str) -> None:
    make, words = REFUSED[kind]
    optimizer = stepped(Muon(named((6, 4), (3, 4))))
    reference = pickle.loads(pickle.dumps(optimizer))
    with pytest.raises(ValueError) as refusal:
        optimizer.load_state_dict(make())
    assert all(word in str(refusal.value) for word in ["Muon: ", *words]), refusal.value
    for each in (stepped(optimizer, seed=1), stepped(reference, seed=1)):
        each.param_groups[0].pop("param_names")
    assert str(optimizer.state_dict()) == str(reference.state_dict())


def test_a_state_of_other_matrices_than_the_optimizer_was_made_for_is_refused() -> None:
    def conv(**options: Any) -> MatrixOptimizer:
        return stepped(Muon([("conv", nn.Parameter(randn(16, 8, 3, 3)))], **options))

    stacks = conv(flatten=False).state_dict()
    stacks["param_groups"][0]["flatten"] = None
    with pytest.raises(ValueError, match="Muon: flatten = None in the state, and True here"):
        conv(flatten=True).load_state_dict(stacks)
    conv(flatten=False).load_state_dict(stacks)
    del stacks["param_groups"][0]["flatten"]
    with pytest.raises(ValueError, match=r"momentum_buffer in the state of conv has shape \(16, 8, 3, 3\).*\(16, 72\)"):
        conv(flatten=True).load_state_dict(stacks)
    with pytest.raises(ValueError, match="Muon: row_blocks = 1 in the state, and 2 here"):
        Muon(named((6, 4)), row_blocks=2).load_state_dict(Muon(named((6, 4))).state_dict())
    loaded = Muon(named((6, 4)))
    loaded.load_state_dict(stepped(Muon(named((6, 4)), row_blocks=2)).state_dict())  # options come with a state
    assert stepped(loaded).param_groups[0]["row_blocks"] == 2


def test_a_rule_s_own_state_is_measured_as_the_rule_makes_it() -> None:
    optimizer, state = NorMuon(named((6, 4))), state_of(NorMuon(named((6, 4))))
    state["state"][0]["row_square"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"NorMuon: row_square in the state of p0 has shape \(4,\); it must be \(6\)"):
        optimizer.load_state_dict(state)
    optimizer.load_state_dict(state_of(Muon(named((6, 4)))))  # no statistics yet
    stepped(optimizer)
    with pytest.raises(ValueError, match=r"p0 has shape \(2, 6, 4\); it must be \(3, 6, 4\)"):
        Muon(named((3, 6, 4))).load_state_dict(state_of(Muon(named((2, 6, 4)))))


def test_a_rule_that_asks_for_values_may_have_state_of_its_own() -> None:
    class Counting(MatrixOptimizer):
        def orthogonalize(self, update: torch.Tensor, state: dict[str, Any], group: dict[str, Any]) -> torch.Tensor:
            state["steps"] = state.get("steps", update.new_zeros(update.size(0))) + float(update.norm() > 0)
            return update.sign()

    optimizer = stepped(Counting(named((6, 4), (2, 3, 4))))
    loaded = Counting(named((6, 4), (2, 3, 4)))
    loaded.load_state_dict(optimizer.state_dict())
    stepped(loaded)
    assert [entry["steps"].tolist() for entry in loaded.state_dict()["state"].values()] == [2.0, [2.0, 2.0]]
