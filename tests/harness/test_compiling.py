"""The compiled model: the eager one's numbers from few graphs, and reductions that start while backward runs."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.testing._internal.distributed.fake_pg import FakeStore

import optim
from harness import compiling
from harness.compiling import compile_model, prepare_compiler
from optim.bank import Bank
from tests.conftest import ROOT, Trainer
from tests.harness.test_neuron_stats import looks
from tests.test_model import OPTIONS, SMALL, small_model, tokens
from tests.test_train import metrics, only_run


@pytest.fixture
def dynamo() -> Iterator[None]:
    """The compiler's settings, as they were afterwards, and nothing compiled by other tests."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        yield


@pytest.mark.parametrize("option", ["value embeddings", "everything, fused"])
def test_by_block_it_has_the_same_gradients_from_few_graphs(
    monkeypatch: pytest.MonkeyPatch, dynamo: None, option: str
) -> None:
    """For training and for validation one graph each: start, loss, blocks with value embeddings, blocks without.
    Validation once fell to pieces where attention took two blocks of queries, as here."""
    monkeypatch.setattr("kernels.attention.BLOCK", 12)
    config = replace(SMALL, **dict(num_layers=3) | OPTIONS[option])
    model, inputs, targets = small_model(config), tokens(3, 24), tokens(3, 24, seed=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = compile_model(model, True, backend=counter, fullgraph=True)
    expected = model(inputs, targets)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(compiled(inputs, targets), model(inputs, targets))
        loss = compiled(inputs, targets)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), gradients, rtol=1e-3, atol=1e-4)
    assert counter.frame_count == 2 * (2 + 2)
    assert all("forward" not in vars(module) for module in model.modules())  # to others it is what it was


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """This is the first of them, and nothing travels."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


# For each graph of a backward pass, the reductions that start when it has ended. A block has 3 matrices (QKV), 1 (out),
# 2 (gate and up) and 1 (down); a reduction takes two of one kind, which may be of two blocks: 5 + 2 + 3 + 2 of three.
TRACES = {"whole": [12], "by block": [0, 5, 2, 5, 0]}  # by block: the loss, the blocks from the last, the start


@pytest.mark.parametrize("how", TRACES)
def test_reductions_start_before_backward_has_ended(
    monkeypatch: pytest.MonkeyPatch, dynamo: None, two_ranks: None, how: str
) -> None:
    """If it has more graphs than one."""
    trace: list[int] = []

    def recorded(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        def backward(*arguments: Tensor) -> Any:
            results = graph(*arguments)
            trace.append(0)
            return results

        return make_boxed_func(backward)

    def start(bank: Bank, slots: range) -> None:
        trace[-1] += 1
        genuine(bank, slots)

    model, ids = small_model(replace(SMALL, num_layers=3)), tokens(2, 24)
    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph.forward), bw_compiler=recorded)
    compiled = compile_model(model, how == "by block", backend=backend, fullgraph=True)
    monkeypatch.setattr("optim.bank.BUCKET_BYTES", 1)
    optimizers, genuine = optim.build_optimizers(model, optim.OptimizerConfig()), Bank.start_reduction
    monkeypatch.setattr(Bank, "start_reduction", start)
    loss = compiled(ids, ids)
    optim.start_reduction(optimizers)
    loss.backward()
    optim.finish_reduction(optimizers)
    assert trace == TRACES[how]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", ".cache/inductor"),
        (f"{tempfile.gettempdir()}/torchinductor_me", ".cache/inductor"),
        ("/mine", "/mine"),
        (f"{tempfile.gettempdir()}/mine", f"{tempfile.gettempdir()}/mine"),
    ],
    ids=["nothing", "torch's default", "the user's", "the user's for a while"],
)
def test_what_is_compiled_is_kept(monkeypatch: pytest.MonkeyPatch, dynamo: None, before: str, after: str) -> None:
    """By a process which has imported the compiler by then, as a run has."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
    if not before:
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    prepare_compiler()
    assert cache_dir() == str(ROOT / after)


def test_a_checkout_that_cannot_be_written_keeps_nothing_of_the_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dynamo: None
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_me")
    (tmp_path / ".cache").write_text("no folder can be made here", encoding="utf-8")
    monkeypatch.setattr(compiling, "ROOT", tmp_path)
    prepare_compiler()
    assert cache_dir() == f"{tempfile.gettempdir()}/torchinductor_me"


def test_a_run_that_is_compiled_measures_samples_and_resumes_as_another(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dynamo: None
) -> None:
    """Neuron statistics, which watch the blocks' MLPs, and sampling, of which every length would be a graph, take the
    model as it is; checkpoints of one go on as the other."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    settings = ["--tokenizer=byte", "--vocab_size=257", "--train_steps=4", "--val_every=2", "--neuron_stats=2"]
    settings += ["--checkpoint_every=2", "--matrix_optimizer=adamw", "--matrix_lr=0.01"]
    assert trainer(*settings).returncode == 0
    eager = only_run(tmp_path)
    resume = f"--resume={eager / 'checkpoint_000002.pt'}"
    result = trainer(*settings, "--compile", "--profile", resume, f"--run_dir={tmp_path / 'compiled'}")
    assert (result.returncode, result.stderr) == (0, "")
    assert "\nsample       " in result.stdout
    assert counter.frame_count == 2 * 3
    (compiled,) = (tmp_path / "compiled").iterdir()
    assert metrics(compiled, "val_loss")[4] == pytest.approx(metrics(eager, "val_loss")[4], rel=1e-5)
    assert looks(compiled)[4]["median"]["mean"] == pytest.approx(looks(eager)[4]["median"]["mean"], rel=1e-3)
