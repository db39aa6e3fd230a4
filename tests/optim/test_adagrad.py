"""Adagrad on rows of tables against its definition in float64, with sparse and dense gradients, and on ranks."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from optim import clip_gradients
from optim.adagrad import Adagrad
from optim.replicated import replicate

ROWS, WIDTH, STEPS = 30, 5, 12


def table(is_sparse: bool = True) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(ROWS, WIDTH, sparse=is_sparse)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Rows, some of them several times, and what each is to become."""
    generator = torch.Generator().manual_seed(step)
    return torch.randint(ROWS, (8,), generator=generator), torch.randn(8, WIDTH, generator=generator)


def backward(module: nn.Embedding, rows: Tensor, targets: Tensor) -> None:
    ((module(rows) - targets).square().sum() / 2).backward()


@pytest.mark.parametrize("is_sparse", [True, False])
def test_the_definition(is_sparse: bool) -> None:
    module = table(is_sparse)
    optimizer = Adagrad(module.parameters(), lr=0.3)
    weight = module.weight.detach().double()
    total = torch.zeros_like(weight)
    for step in range(STEPS):
        rows, targets = batch(step)
        gradient = torch.zeros_like(weight).index_add_(0, rows, weight[rows] - targets)
        total += gradient**2
        seen = rows.unique()
        weight[seen] -= 0.3 * gradient[seen] / (total[seen].sqrt() + 1e-10)
        backward(module, rows, targets)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(module.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(optimizer.state[module.weight]["sum"].double(), total, rtol=1e-5, atol=1e-6)


def test_rows_that_were_not_seen_keep_their_bits() -> None:
    module = table()
    before = module.weight.detach().clone()
    backward(module, torch.tensor([3, 3, 7]), torch.zeros(3, WIDTH))
    Adagrad(module.parameters()).step()
    changed = (module.weight.detach() != before).any(1).nonzero().flatten()
    assert changed.tolist() == [3, 7]


def test_a_state_dict_goes_on_as_if_never_saved() -> None:
    module, other = table(), table()
    optimizer, resumed = Adagrad(module.parameters()), Adagrad(other.parameters())
    for step in range(6):
        if step == 3:
            other.load_state_dict(module.state_dict())
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for each, moves in ((module, optimizer), (other, resumed)) if step >= 3 else ((module, optimizer),):
            backward(each, *batch(step))
            moves.step()
            moves.zero_grad()
    assert torch.equal(module.weight, other.weight)


def test_short_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"torch.bfloat16 are too short"):
        Adagrad(table().to(torch.bfloat16).parameters())


def train(rank: int, num_ranks: int, folder: str) -> None:
    """Two passes per step, so that ranks have different numbers of rows; the gradient is clipped."""
    torch.set_num_threads(1)
    if num_ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks)
    module, dense = table(), nn.Parameter(torch.ones(WIDTH))
    optimizers = [replicate(Adagrad(module.parameters())), replicate(torch.optim.SGD([dense], lr=0.1))]
    norms = []
    for step in range(STEPS):
        for part in range(2):
            rows, targets = (each.chunk(num_ranks)[rank] for each in batch(2 * step + part))
            ((module(rows) - dense * targets).square().sum() * num_ranks / 2).backward()
        norms.append(clip_gradients(optimizers, 2.0))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.save([module.weight.detach(), dense.detach(), torch.stack(norms)], Path(folder) / f"{num_ranks}_{rank}.pt")
    if num_ranks > 1:
        dist.destroy_process_group()


def test_ranks_move_rows_as_one_process_does(tmp_path: Path) -> None:
    train(0, 1, str(tmp_path))
    mp.spawn(train, (3, str(tmp_path)), 3)
    alone = torch.load(tmp_path / "1_0.pt")
    of_ranks = [torch.load(tmp_path / f"3_{rank}.pt") for rank in range(3)]
    assert all(torch.equal(a, b) for other in of_ranks[1:] for a, b in zip(of_ranks[0], other, strict=True))
    torch.testing.assert_close(of_ranks[0], alone, rtol=1e-4, atol=1e-5)
    assert (alone[2] > 2).any()  # it was clipped
