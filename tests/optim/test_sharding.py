"""Matrices with owners: any number of ranks moves parameters as one process does, to the same bits on every rank."""

import copy
import functools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from optim import MatrixOptimizer, Muon, NorMuon, clip_gradients, finish_reduction, start_reduction
from optim.bank import Bank
from optim.reductions import Reductions
from optim.replicated import average_gradients
from tests.matrices import Float64
from tests.optim import rules

WORLD = 4
STEPS = 20
RULES = {
    **rules.RULES,
    "muon, cautious": partial(Muon, cautious=True),
    "muon, brake and floor": partial(Muon, radial_brake=0.5, update_floor=0.35, floor_by_row=True, cautious=True),
    "muon, hyperball": lambda params, **place: Muon(params, hyperball=True, **place | dict(weight_decay=0.0)),
}
# The others take 8: missing gradients and early reductions come back after 6.
LONG = {"muon", "muon, cautious", "normuon", "unormuon", "aurora", "aurora, paper", "aurora, warm", "riemannian_aurora"}
# Banks of 8 (a stack among them), 1, 4 and 6 (a fused parameter's blocks) matrices, so fewer and more than ranks, even
# and uneven, and two that are left out: one frozen, one that the loss does not reach.
SHAPES = {
    "unused": (12, 5), "sometimes": (7, 7), "a": (12, 5), "stack": (2, 3, 12, 5), "b": (12, 5), "wide": (5, 12),
    "q0": (7, 7), "q1": (7, 7), "q2": (7, 7), "q3": (7, 7), "fused": (24, 5), "fused2": (24, 5), "frozen": (7, 7),
}  # fmt: skip


@functools.cache
def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_params(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    params = {
        name: nn.Parameter(randn(i, *shape).to(dtype, copy=True)) for i, (name, shape) in enumerate(SHAPES.items())
    }
    params["frozen"].requires_grad_(False)
    return params


def make(rule: str, params: dict[str, nn.Parameter], **place: Any) -> MatrixOptimizer:
    optimizer = RULES[rule](
        [(name, p) for name, p in params.items() if "fused" not in name], weight_decay=0.1, flatten=False, **place
    )
    fused = [(name, p) for name, p in params.items() if "fused" in name]
    optimizer.add_param_group(dict(params=fused, row_blocks=3, scale="match_rms_adamw"))
    return optimizer


def train(optimizer: MatrixOptimizer, params: dict[str, nn.Parameter], rank: int, ranks: int, steps: range) -> None:
    for step in steps:
        backward(optimizer, params, rank, ranks, step)
        optimizer.step()
        optimizer.zero_grad()


def backward(optimizer: MatrixOptimizer, params: dict[str, nn.Parameter], rank: int, ranks: int, step: int) -> None:
    """Gradients that differ between ranks and average to the same for any number of them, from two micro-batches, the
    second of which starts the reductions in odd steps."""
    used = {name: p for name, p in params.items() if name not in ("frozen", "unused")}
    if step % 3 == 1:
        del used["sometimes"]
    for micro_batch in range(2):
        loss = torch.zeros(())
        for i, p in enumerate(used.values()):
            seed = 1000 * step + 20 * i
            noise = [randn(seed + 1 + r, *p.shape).double() for r in range(ranks)]
            gradient = randn(seed, *p.shape) + (1 + micro_batch) * (noise[rank] - torch.stack(noise).mean(0))
            loss = loss + (p.float() * gradient).sum() / 2
        if micro_batch == 1 and step % 2:
            start_reduction([optimizer])
        loss.backward()
        if micro_batch == 1 and step % 2 and ranks > 1:
            assert optimizer._reductions._started > 0  # while backward ran


@contextmanager
def float64() -> Iterator[None]:
    """Float64, also in what backward calls, which torch runs outside of such modes."""
    start_reduction = Bank.start_reduction

    def start(bank: Bank, slots: range) -> None:
        with Float64():
            start_reduction(bank, slots)

    with Float64(), mock.patch.object(Bank, "start_reduction", start):
        yield


def flat(params: dict[str, nn.Parameter]) -> torch.Tensor:
    return torch.cat([p.detach().float().flatten() for p in params.values()])


def worker(rank: int, folder: str) -> None:
    """Everything that needs ranks, in one start of them; what comes out is checked by the tests."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    groups = [dist.new_group(list(range(ranks))) for ranks in range(1, WORLD + 1)]
    out: dict[str, Any] = {}
    mock.patch("optim.matrix_optimizer.fast_half_dtype", lambda device_type: torch.float32).start()
    mock.patch("optim.bank.BUCKET_BYTES", 1000).start()  # several buckets in a bank
    for ranks, group in enumerate(groups, start=1):
        if rank >= ranks:
            continue
        for rule in RULES:
            with float64():
                params = make_params()
                optimizer = make(rule, params, process_group=group)
                train(optimizer, params, rank, ranks, range(STEPS if rule in LONG else 8))
                state = optimizer.state_dict()["state"]
                bank_state = [value for bank, _ in optimizer._banks for value in bank.state.values()]
                out[f"{rule}, {ranks} ranks"] = dict(
                    params=flat(params),
                    momentum=torch.cat([state[i]["momentum_buffer"].flatten() for i in sorted(state)]),
                    names=sorted({name for entry in state.values() for name in entry}),
                    state_numbers=sum(value.numel() for value in bank_state),
                )
        for dtype in (torch.bfloat16, torch.float32):
            params = make_params(dtype)
            optimizer = make("aurora", params, process_group=group, comm_dtype=torch.bfloat16)
            train(optimizer, params, rank, ranks, range(STEPS))
            out[f"bfloat16 traffic, {dtype}, {ranks} ranks"] = flat(params)
    out.update(hostile(rank, groups))
    out.update(clipped(rank, groups))
    with float64():
        out.update(fewer_ranks(rank, groups))
    mock.patch.stopall()
    mock.patch("optim.matrix_optimizer.fast_half_dtype", lambda device_type: torch.bfloat16).start()
    for ranks, group in enumerate(groups, start=1):
        if rank < ranks:  # results that are halves: of every owner alike, whatever has a gradient
            params = make_params()
            train(make("normuon", params, process_group=group), params, rank, ranks, range(STEPS))
            out[f"half results, {ranks} ranks"] = flat(params)
    torch.save(out, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def hostile(rank: int, groups: list[dist.ProcessGroup]) -> dict[str, Any]:
    """Gradients that one rank alone spoils, and steps that go wrong half way."""
    out: dict[str, Any] = {}
    for deferred in (False, True):
        params = make_params()
        optimizer = make("normuon", params, process_group=groups[-1], defer_check=deferred)
        train(optimizer, params, rank, WORLD, range(2))
        before, state = flat(params), optimizer.state_dict()["state"]
        for p in params.values():
            p.grad = torch.ones_like(p)
        if rank == 2:
            params["q1"].grad[3, 3] = torch.nan  # type: ignore[index]
        try:
            optimizer.step()
            optimizer.raise_if_not_finite()
            message = ""
        except FloatingPointError as error:
            message = str(error)
        after = optimizer.state_dict()["state"]
        same_state = all(torch.equal(state[i][name], after[i][name]) for i in state for name in state[i])
        out[f"nan, {deferred}"] = (message, torch.equal(flat(params), before), same_state)
        optimizer.zero_grad()
        train(optimizer, params, rank, WORLD, range(2, 4))  # and on it goes
        out[f"after nan, {deferred}"] = flat(params)
    for deferred in (False, True):
        params = make_params()
        optimizer = make("muon", params, process_group=groups[-1], defer_check=deferred)
        for p in params.values():
            p.grad = torch.ones_like(p)
        if rank == 1:
            params["wide"].grad = None
        try:
            optimizer.step()
            optimizer.raise_if_not_finite()
        except ValueError as error:
            out[f"missing, {deferred}"] = (str(error), torch.equal(flat(params), flat(make_params())))
    # a rank whose only matrix never has a gradient still has the state that others have, and copies know their ranks
    pair = [nn.Parameter(randn(i, 6, 4)) for i in range(2)]
    pair[1].requires_grad_(False)
    if rank < 2:
        optimizer = NorMuon(pair, process_group=groups[1])
        for _ in range(2):
            pair[0].grad = randn(7, 6, 4)
            optimizer.step()
        twin = copy.deepcopy(optimizer)
        out["idle owner"] = sorted(optimizer.state_dict()["state"][0])
        out["copy"] = twin.process_group is groups[1]
    # a step that is skipped after its reductions have started leaves nothing behind
    params, others = make_params(), make_params()
    optimizer, reference = (make("muon", each, process_group=groups[-1]) for each in (params, others))
    train(optimizer, params, rank, WORLD, range(1))
    train(reference, others, rank, WORLD, range(1))
    optimizer.start_reduction()
    reached = [p.sum() * 100 for name, p in params.items() if name == "q3" or (p.requires_grad and rank != 1)]
    torch.stack(reached).sum().backward()
    optimizer.zero_grad()
    train(optimizer, params, rank, WORLD, range(2, 3))
    train(reference, others, rank, WORLD, range(2, 3))
    out["skipped step"] = torch.equal(flat(params), flat(others))
    # thawed parameters are waited for, and a gradient that comes twice is refused
    params = make_params()
    params["q1"].requires_grad_(False)
    optimizer = make("muon", params, process_group=groups[-1])
    train(optimizer, params, rank, WORLD, range(2))
    before = params["q1"].detach().clone()
    params["q1"].requires_grad_(True)
    train(optimizer, params, rank, WORLD, range(3, 4))
    out["thawed"] = float((params["q1"] - before).norm().detach())
    optimizer.start_reduction()
    loss = torch.stack([p.sum() for p in params.values() if p.requires_grad]).sum()
    loss.backward(retain_graph=True)
    try:
        loss.backward()
    except RuntimeError as error:
        out["twice"] = str(error)
    return out


def clipped(rank: int, groups: list[dist.ProcessGroup]) -> dict[str, Any]:
    """A step in phases: the gradients' norm, and what moves by a clipped step, with SGD for a parameter beside."""
    out: dict[str, Any] = {}
    for ranks, group in enumerate(groups, start=1):
        if rank >= ranks:
            continue
        params, gain = make_params(), nn.Parameter(randn(77, 12).clone())
        optimizers = [make("muon", params, process_group=group), torch.optim.SGD([gain], lr=1.0)]
        for step in range(2):
            noise = [randn(500 + step + r, 12) for r in range(ranks)]
            gain.grad = randn(400 + step, 12) + noise[rank] - torch.stack(noise).mean(0)
            backward(optimizers[0], params, rank, ranks, step)
            finish_reduction(optimizers)
            out[f"norm {step}, {ranks} ranks"] = clip_gradients(optimizers, 0.5)
            with mock.patch("torch.distributed.all_reduce") as again:
                average_gradients(optimizers[1], group)  # as a step of build_optimizers's does
            out[f"sent again {step}, {ranks} ranks"] = again.called
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        out[f"clipped, {ranks} ranks"] = torch.cat([flat(params), gain.detach()])
        gain.grad = randn(9, 12) * (rank + 1)
        average_gradients(optimizers[1], group)
        gain.grad += rank  # no longer the mean
        average_gradients(optimizers[1], group)
        out[f"mean, {ranks} ranks"] = gain.grad
    return out


def fewer_ranks(rank: int, groups: list[dist.ProcessGroup]) -> dict[str, Any]:
    """Three ranks save, two and one go on."""
    out: dict[str, Any] = {}
    saved = None
    if rank < 3:
        params = make_params()
        optimizer = make("aurora, warm", params, process_group=groups[2])
        train(optimizer, params, rank, 3, range(10))
        saved = (optimizer.state_dict(), {name: p.detach().clone() for name, p in params.items()})
        train(optimizer, params, rank, 3, range(10, 20))
        out["3 ranks all the way"] = flat(params)
    for ranks in (1, 2):
        if rank < ranks:
            params = make_params()
            assert saved is not None
            for name, p in params.items():
                p.data.copy_(saved[1][name])
            optimizer = make("aurora, warm", params, process_group=groups[ranks - 1])
            optimizer.load_state_dict(saved[0])
            train(optimizer, params, rank, ranks, range(10, 20))
            out[f"3 ranks, then {ranks}"] = flat(params)
    return out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.get_context("forkserver").set_forkserver_preload([__name__, "torch._dynamo"])  # loaded once, not by every rank
    with mock.patch.dict(os.environ, {"PYTHONWARNINGS": "ignore"}):
        mp.start_processes(worker, (str(folder),), WORLD, start_method="forkserver")  # type: ignore[no-untyped-call]
    yield [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("rule", RULES)
def test_any_number_of_ranks_is_one_process(results: list[dict[str, Any]], rule: str, ranks: int) -> None:
    alone, together = results[0][f"{rule}, 1 ranks"], [results[r][f"{rule}, {ranks} ranks"] for r in range(ranks)]
    for key in ("params", "momentum"):
        assert all(torch.equal(together[0][key], other[key]) for other in together[1:])
        assert together[0][key].dtype == torch.float64
        assert (together[0][key] - alone[key]).abs().max() < 1e-9 * alone[key].abs().max()
    assert together[0]["names"] == alone["names"]
    assert (alone["params"] - flat(make_params())).abs().max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bfloat16_traffic_is_close_and_the_same_everywhere(
    results: list[dict[str, Any]], dtype: torch.dtype, ranks: int
) -> None:
    """Weights of either format follow the exact run within the rounding of what travelled."""
    ours = [results[r][f"bfloat16 traffic, {dtype}, {ranks} ranks"] for r in range(ranks)]
    assert all(torch.equal(ours[0], other) for other in ours[1:])
    moved = results[0]["aurora, 1 ranks"]["params"] - flat(make_params())
    error = ours[0] - results[0]["aurora, 1 ranks"]["params"]
    assert error.norm() < (0.02 if dtype == torch.float32 else 0.03) * moved.norm()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_rank_keeps_state_for_its_own_share_alone(results: list[dict[str, Any]], ranks: int) -> None:
    """Momentum of ceil(B / R) matrices of each bank of B, and nothing else for Muon."""
    banks = make("muon", make_params()).plan_banks(0, ranks)
    expected = sum(-(-bank.size // ranks) * bank.m * bank.n for bank, _ in banks)
    for rank in range(ranks):
        assert results[rank][f"muon, {ranks} ranks"]["state_numbers"] == expected
    assert results[0]["muon, 1 ranks"]["state_numbers"] == flat(make_params()).numel()


@pytest.mark.slow
@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
def test_a_bad_gradient_on_one_rank_is_refused_on_all_and_nothing_moves(
    results: list[dict[str, Any]], deferred: bool
) -> None:
    for rank in range(WORLD):
        message, same_weights, same_state = results[rank][f"nan, {deferred}"]
        assert "the gradient of q1 holds NaN or infinity" in message
        assert same_weights
        assert same_state
        assert results[rank][f"after nan, {deferred}"].isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
def test_a_gradient_that_one_rank_lacks_is_refused_on_all(results: list[dict[str, Any]], deferred: bool) -> None:
    for rank in range(WORLD):
        message, same_weights = results[rank][f"missing, {deferred}"]
        assert "wide has a gradient on some ranks and none on others" in message
        assert same_weights


@pytest.mark.slow
def test_an_idle_owner_is_like_the_others_and_copies_keep_their_ranks(results: list[dict[str, Any]]) -> None:
    for rank in range(2):
        assert results[rank]["idle owner"] == ["momentum_buffer", "row_square"]
        assert results[rank]["copy"]


@pytest.mark.slow
def test_steps_that_go_wrong_half_way(results: list[dict[str, Any]]) -> None:
    for rank in range(WORLD):
        assert results[rank]["skipped step"]
        assert results[rank]["thawed"] == pytest.approx(0.02 * 7**0.5, rel=0.3)  # a polar factor of 7x7, times lr
        assert "accumulated once more after its reduction had started" in results[rank]["twice"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_results_that_are_halves_travel_as_they_are(results: list[dict[str, Any]], ranks: int) -> None:
    alone = results[0]["half results, 1 ranks"]
    together = [results[rank][f"half results, {ranks} ranks"] for rank in range(ranks)]
    assert all(torch.equal(together[0], other) for other in together[1:])
    assert (together[0] - alone).norm() < 0.02 * (alone - flat(make_params())).norm()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_clipping_is_the_same_for_any_number_of_ranks(results: list[dict[str, Any]], ranks: int) -> None:
    params, rounding = make_params(), 20 * torch.finfo(torch.float32).eps
    for step in range(2):
        params["sometimes"].requires_grad_(step % 3 != 1)
        used = [p for name, p in params.items() if name != "unused" and p.requires_grad]
        gradients = [randn(1000 * step + 20 * i, *p.shape) for i, p in enumerate(used)] + [randn(400 + step, 12)]
        norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
        for rank in range(ranks):
            assert results[rank][f"norm {step}, {ranks} ranks"].item() == pytest.approx(norm, rel=1e-6)
            assert not results[rank][f"sent again {step}, {ranks} ranks"]
    ours = [results[rank][f"clipped, {ranks} ranks"] for rank in range(ranks)]
    assert all(torch.equal(ours[0], other) for other in ours[1:])
    assert results[0][f"norm 1, {ranks} ranks"] == results[ranks - 1][f"norm 1, {ranks} ranks"]
    mean = randn(9, 12) * (ranks + 1) / 2 + (ranks - 1) / 2
    torch.testing.assert_close(results[0][f"mean, {ranks} ranks"], mean, rtol=rounding, atol=rounding)
    torch.testing.assert_close(ours[0][-12:], results[0]["clipped, 1 ranks"][-12:], rtol=rounding, atol=rounding)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_state_saved_under_three_ranks_goes_on_under_others(results: list[dict[str, Any]], ranks: int) -> None:
    expected, found = results[0]["3 ranks all the way"], results[0][f"3 ranks, then {ranks}"]
    assert expected.dtype == torch.float64
    assert (found - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize(("size", "ranks"), [(84, 8), (5, 3), (2, 4), (1, 1)], ids=str)
def test_every_matrix_has_one_owner_and_no_rank_more_than_its_share(size: int, ranks: int) -> None:
    banks = [Bank([torch.zeros(size, 3, 2)], ["stack"], rank=rank, num_ranks=ranks) for rank in range(ranks)]
    owned = [list(range(size))[bank.rank :: bank.num_ranks] for bank in banks]
    assert sorted(row for rows in owned for row in rows) == list(range(size))
    assert max(map(len, owned)) <= banks[0].num_slots == -(-size // ranks)
    assert sorted(slot for slots in banks[0].buckets for slot in slots) == list(range(banks[0].num_slots))


def test_what_a_rank_shows_of_state_has_no_memory_and_may_be_moved() -> None:
    """Lightning moves it when training ends."""
    bank = Bank([torch.zeros(4, 3)], ["W"], num_ranks=2)
    bank.state["momentum_buffer"] = torch.zeros(1, 4, 3)
    ((_, shown),) = bank.shapes()
    moved = shown["momentum_buffer"].to("cpu", non_blocking=True)
    assert moved.is_meta
    assert moved.shape == (4, 3)


def test_buckets_start_in_backward_in_one_order_and_the_rest_at_the_step() -> None:
    """Two ranks' plan, watched without sending: the last layers first, nothing before it is whole."""
    params = [nn.Parameter(torch.zeros(4, 4)) for _ in range(6)]
    with mock.patch("optim.bank.BUCKET_BYTES", 2 * 4 * 4 * 4):  # one slot, two matrices
        bank = Bank(params, [f"p{i}" for i in range(6)], num_ranks=2)
    started: list[range] = []
    with mock.patch.object(bank, "start_reduction", started.append), mock.patch.object(bank, "own_gradients"):
        reductions = Reductions([bank], params)
        reductions.await_backward()
        for i, expected in [(5, 0), (3, 0), (4, 1), (1, 1), (2, 2)]:
            reductions.ready(params[i])
            assert len(started) == expected
        reductions.finish()
    assert started == [range(2, 3), range(1, 2), range(1)]
