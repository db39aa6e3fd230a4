"""Parameters in shards, as fully_shard leaves them: any number of ranks moves them as one process moves whole ones."""

import copy
import math
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from optim import MatrixOptimizer, Muon, bank, clip_gradients
from optim.shards import gathered, is_dtensor, shard_like
from tests.optim.test_sharding import SHAPES, flat, float64, make, make_params, randn

WORLD = 4
STEPS = 10
# What acts on weights, asks for them, or keeps state; every rule is in tests/test_fsdp.py.
RULES = [
    "muon", "muon, cautious", "muon, brake and floor", "muon, hyperball", "muown", "normuon, long", "aurora, warm",
    "adamuon",
]  # fmt: skip
MASTERED, FEW_STEPS = ["aurora", "muon, hyperball", "muon, brake and floor"], 4  # in bfloat16
PLACES = ("2 ranks", "3 ranks", "4 ranks", "2 copies on 2 ranks", "3 ranks, rows")
Params = dict[str, nn.Parameter]


def gradient(name: str, step: int, spoiled: bool = False) -> torch.Tensor:
    value = randn(100 * step + list(SHAPES).index(name), *SHAPES[name]).clone()
    if spoiled:
        value.flatten()[-1] = torch.nan  # in the last rank's shard
    return value


def set_gradients(params: Params, step: int, bad: str = "") -> None:
    for name, p in params.items():
        if name not in ("frozen", "unused") and (name != "sometimes" or step % 3 != 1):
            p.grad = shard_like(gradient(name, step, name == bad).to(p.dtype), p)


def train(optimizer: MatrixOptimizer, params: Params, steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()
        optimizer.zero_grad()


def sharded(params: Params, mesh: Any, cut: Any) -> Params:
    from torch.distributed.tensor import Shard, distribute_tensor

    rows = {name: [Shard(p.ndim - 2)] if cut == "rows" else cut for name, p in params.items()}
    shards = {name: distribute_tensor(p.detach(), mesh, rows[name]) for name, p in params.items()}
    return {name: nn.Parameter(shard, params[name].requires_grad) for name, shard in shards.items()}


def whole(params: Params) -> torch.Tensor:
    return torch.cat([p.detach().full_tensor().float().flatten() for p in params.values()])  # type: ignore[attr-defined]


def alone(rule: str) -> dict[str, Any]:
    params = make_params()
    optimizer = make(rule, params)
    train(optimizer, params, range(STEPS))
    return dict(params=flat(params), state=optimizer.state_dict()["state"])


def worker(rank: int, folder: str) -> None:
    """Everything that needs ranks, in one start of them; what comes out is checked by the tests."""
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mock.patch("optim.matrix_optimizer.fast_half_dtype", lambda device_type: torch.float32).start()
    meshes: dict[str, tuple[Any, Any]] = {
        f"{ranks} ranks": (DeviceMesh("cpu", list(range(ranks))), [Shard(0)]) for ranks in (2, 3, 4)
    }
    meshes["2 copies on 2 ranks"] = init_device_mesh("cpu", (2, 2)), [Replicate(), Shard(0)]
    meshes["3 ranks, rows"] = meshes["3 ranks"][0], "rows"
    out: dict[str, Any] = {}
    for place, (mesh, cut) in meshes.items():
        if mesh.get_coordinate() is None:
            continue
        for rule in RULES:
            with float64():
                params = sharded(make_params(), mesh, cut)
                optimizer = make(rule, params)
                train(optimizer, params, range(STEPS))
                numbers = [value.numel() for each, _ in optimizer._banks for value in each.state.values()]
                state = optimizer.state_dict()["state"]
                shown = [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]
                shapes = [{name: value.shape for name, value in each.items()} for each in shown]
                kept = dict(state=state, shapes=shapes, state_numbers=sum(numbers))
                out[f"{rule}, {place}"] = dict(params=whole(params), **kept)
        for rule in MASTERED:
            params = sharded(make_params(torch.bfloat16), mesh, cut)
            train(make(rule, params), params, range(FEW_STEPS))
            out[f"bfloat16, {rule}, {place}"] = whole(params)
        out |= {f"{key}, {place}": value for key, value in hostile(mesh, cut).items()}
        with float64():
            out |= {f"{key}, {place}": value for key, value in resumed(mesh, cut).items()}
    out |= traffic(*meshes["4 ranks"])
    out |= refused(*meshes["4 ranks"])
    torch.save(out, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def hostile(mesh: Any, cut: Any) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, distribute_tensor

    out: dict[str, Any] = {}
    for deferred in (False, True):
        params = sharded(make_params(), mesh, cut)
        optimizer = make("normuon", params, defer_check=deferred)
        train(optimizer, params, range(2))
        before, state = whole(params), copy.deepcopy(optimizer.state_dict()["state"])
        set_gradients(params, 2, bad="stack")
        try:
            optimizer.step()
            optimizer.raise_if_not_finite()
        except FloatingPointError as error:
            out[f"nan, {deferred}"] = str(error), torch.equal(whole(params), before)
        after = optimizer.state_dict()["state"]
        out[f"state, {deferred}"] = all(torch.equal(state[i][key], after[i][key]) for i in state for key in state[i])
    params = sharded(make_params(), mesh, cut)
    optimizer = make("muon", params)
    set_gradients(params, 0)
    squares = sum(gradient(name, 0).double().square().sum() for name, p in params.items() if p.grad is not None)
    gain = nn.Parameter(torch.zeros(5))
    gain.grad = torch.full((5,), 2.0)
    norm = clip_gradients([optimizer, torch.optim.SGD([gain], lr=1.0)], 1.0)
    clipped = sum(float(each.double().square().sum()) for each in optimizer.finish_reduction())
    total = torch.tensor(clipped)
    dist.all_reduce(total, group=optimizer.owners())
    out["norm"] = float(norm), math.sqrt(squares + 20), float(total)
    copies = nn.Parameter(distribute_tensor(torch.zeros(4, 3), mesh, [Replicate()] * mesh.ndim))
    copies.grad = torch.ones_like(copies)
    norm = clip_gradients([torch.optim.SGD([*params.values(), copies])], 1e9)
    out["norm without matrices"] = float(norm), squares + 12
    return out


def resumed(mesh: Any, cut: Any) -> dict[str, Any]:
    """A state that shards saved goes on in whole parameters, and the other way round."""
    params = sharded(make_params(), mesh, cut)
    optimizer = make("aurora, warm", params)
    train(optimizer, params, range(4))
    weights = {name: p.detach().full_tensor().clone() for name, p in params.items()}  # type: ignore[attr-defined]
    saved = optimizer.state_dict()
    others = make_params()
    for name, p in others.items():
        p.data.copy_(weights[name])
    with mock.patch("torch.distributed.is_initialized", return_value=False):  # one process
        unsharded = make("aurora, warm", others)
        unsharded.load_state_dict(saved)
        train(unsharded, others, range(4, 7))
        back = unsharded.state_dict()
    params = sharded({name: nn.Parameter(p.detach().clone(), p.requires_grad) for name, p in others.items()}, mesh, cut)
    optimizer = make("aurora, warm", params)
    optimizer.load_state_dict(back)
    train(optimizer, params, range(7, STEPS))
    return {"resumed": whole(params)}


def traffic(mesh: Any, cut: Any) -> dict[str, Any]:
    """Bytes that this rank sends to others in a step of eight 8x4 matrices on four ranks, in shards and whole."""
    sent: dict[str, list[int]] = {"in shards": [], "whole": []}
    all_to_all, reduce_scatter, all_gather = dist.all_to_all_single, bank._reduce_scatter, bank._all_gather

    def exchange(received: Any, given: torch.Tensor, expected: list[int], counts: list[int], **how: Any) -> Any:
        sent["in shards"].append((sum(counts) - counts[dist.get_rank()]) * given.itemsize)
        return all_to_all(received, given, expected, counts, **how)

    def scatter(received: torch.Tensor, given: torch.Tensor, **how: Any) -> Any:
        sent["whole"].append(given.nbytes - received.nbytes)
        return reduce_scatter(received, given, **how)

    def gather(received: torch.Tensor, given: torch.Tensor, **how: Any) -> Any:
        sent["whole"].append(given.nbytes * (WORLD - 1))
        return all_gather(received, given, **how)

    in_one_go: list[int] = []

    def gather_state(received: torch.Tensor, given: torch.Tensor, **how: Any) -> Any:
        in_one_go.append(len(received))
        return all_gather(received, given, **how)

    whole_params = {f"p{i}": nn.Parameter(randn(i, 8, 4).clone()) for i in range(8)}
    for params in (sharded(whole_params, mesh, cut), whole_params):
        optimizer = Muon(params.items(), comm_dtype=torch.bfloat16)
        for p in params.values():
            p.grad = shard_like(torch.ones(8, 4), p)
        with (
            mock.patch("torch.distributed.all_to_all_single", exchange),
            mock.patch("optim.bank._reduce_scatter", scatter),
            mock.patch("optim.bank._all_gather", gather),
        ):
            optimizer.step()
        if is_dtensor(params["p0"]):
            with mock.patch("optim.bank._all_gather", gather_state):
                optimizer.state_dict()
    return {"sent": sent, "gathered": in_one_go}


def refused(mesh: Any, cut: Any) -> dict[str, Any]:
    from torch.distributed.tensor import Replicate, Shard

    def message(*groups: Params, **options: Any) -> str:
        with pytest.raises(ValueError) as error:
            Muon([dict(params=list(group.items())) for group in groups], **options)
        return str(error.value)

    matrix = {"wide": nn.Parameter(torch.ones(8, 12))}
    whole, shards = {"whole": nn.Parameter(torch.ones(8, 12))}, sharded(matrix, mesh, cut)
    return {
        "columns": message(sharded(matrix, mesh, [Shard(1)])),
        "copies": message(sharded(matrix, mesh, [Replicate()])),
        "mixed": message(shards, whole),
        "group": message(shards, process_group=mesh.get_group()),
        "zeros": message(sharded({"wide": nn.Parameter(torch.zeros(8, 12))}, mesh, cut), hyperball=True),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    preload = [__name__, "torch._dynamo", "torch.distributed.tensor"]
    mp.get_context("forkserver").set_forkserver_preload(preload)  # loaded once, not by every rank
    with mock.patch.dict(os.environ, {"PYTHONWARNINGS": "ignore"}):
        mp.start_processes(worker, (str(folder),), WORLD, start_method="forkserver")  # type: ignore[no-untyped-call]
    yield [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def of_one_process() -> dict[str, dict[str, Any]]:
    half = mock.patch("optim.matrix_optimizer.fast_half_dtype", lambda device_type: torch.float32)
    with half, float64():
        return {rule: alone(rule) for rule in RULES}


def at(results: list[dict[str, Any]], key: str) -> list[Any]:
    return [result[key] for result in results if key in result]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("columns", ["wide is a DTensor placed as (", "cut it along dimension 0", "fully_shard"]),
        ("copies", ["wide is a DTensor placed as ("]),
        ("mixed", ["whole and wide are not sharded alike", "an optimizer of its own"]),
        ("group", ["process_group is for whole parameters, and wide is sharded", "leave it out"]),
        ("zeros", ["wide has a matrix of zeros"]),
    ],
)
def test_what_cannot_be_moved_in_shards_is_refused_by_name(
    results: list[dict[str, Any]], case: str, words: list[str]
) -> None:
    assert all(word in result[case] for word in words for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rule", RULES)
def test_shards_move_as_whole_matrices_do(
    results: list[dict[str, Any]], of_one_process: dict[str, Any], rule: str, place: str
) -> None:
    expected, found = of_one_process[rule], at(results, f"{rule}, {place}")
    assert len(found) == (WORLD if "copies" in place else int(place[0]))
    assert all(torch.equal(found[0]["params"], other["params"]) for other in found)
    assert found[0]["params"].dtype == torch.float64
    assert (found[0]["params"] - expected["params"]).abs().max() < 1e-9 * expected["params"].abs().max()
    for i, state in expected["state"].items():
        assert all(each["shapes"][i] == {name: value.shape for name, value in state.items()} for each in found)
        for name, value in state.items():
            assert (found[0]["state"][i][name] - value).abs().max() <= 1e-9 * value.abs().max().clamp(min=1)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rule", MASTERED)
def test_masters_of_shards_in_bfloat16(
    results: list[dict[str, Any]], rule: str, place: str, float32_products: None
) -> None:
    params = make_params(torch.bfloat16)
    train(make(rule, params), params, range(FEW_STEPS))
    for found in at(results, f"bfloat16, {rule}, {place}"):
        assert (found - flat(params)).norm() < 0.01 * (flat(params) - flat(make_params())).norm()


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_an_owner_keeps_the_state_of_its_own_matrices_alone(results: list[dict[str, Any]], place: str) -> None:
    ranks = 2 if "copies" in place else int(place[0])
    planned = [each for each, _ in make("muon", make_params()).plan_banks(0, ranks)]
    expected = sum(-(-each.size // ranks) * each.m * each.n for each in planned)
    assert {found["state_numbers"] for found in at(results, f"muon, {place}")} == {expected}


@pytest.mark.slow
@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
@pytest.mark.parametrize("place", PLACES)
def test_a_bad_number_in_one_shard_moves_nothing(results: list[dict[str, Any]], place: str, deferred: bool) -> None:
    for message, is_same in at(results, f"nan, {deferred}, {place}"):
        assert "the gradient of stack holds NaN or infinity" in message
        assert is_same
    assert all(at(results, f"state, {deferred}, {place}"))


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_clipping_sees_all_shards(results: list[dict[str, Any]], place: str) -> None:
    for norm, expected, clipped in at(results, f"norm, {place}"):
        assert norm == pytest.approx(expected, rel=1e-6)
        assert clipped == pytest.approx(1 - 20 / expected**2, rel=1e-5)  # the gain's share beside


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_each_shard_counts_once_in_a_norm(results: list[dict[str, Any]], place: str) -> None:
    """Of torch's optimizers too, whatever copies there are, and without a matrix optimizer that knows the ranks."""
    for norm, square in at(results, f"norm without matrices, {place}"):
        assert norm == pytest.approx(math.sqrt(square), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_state_goes_from_shards_to_whole_parameters_and_back(
    results: list[dict[str, Any]], of_one_process: dict[str, Any], place: str
) -> None:
    expected = of_one_process["aurora, warm"]["params"]
    for found in at(results, f"resumed, {place}"):
        assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.slow
def test_what_a_rank_sends_is_what_the_formula_says(results: list[dict[str, Any]]) -> None:
    """Each way B m n (R - 1) / R^2 numbers in shards, and R times that whole; here of bfloat16."""
    each_way = 8 * 8 * 4 * 3 // 16 * 2
    for result in results:
        assert result["sent"] == {"in shards": [each_way] * 2, "whole": [WORLD * each_way] * 2}


@pytest.mark.slow
def test_state_in_shards_is_gathered_a_matrix_of_each_rank_at_a_time(results: list[dict[str, Any]]) -> None:
    """What a device may have no room for whole goes to main memory in parts: eight matrices of four ranks in two."""
    assert all(result["gathered"] == [WORLD, WORLD] for result in results)


def test_a_rank_that_does_not_write_keeps_no_tensor_of_a_state() -> None:
    state = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    kept = {**state, "state": {0: {"momentum_buffer": None}}}
    assert gathered(state, is_kept=False) == kept
