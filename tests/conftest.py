"""Shared fixtures: one torch thread, tiny shards that can be learnt, and the trainer in this process."""

import codecs
import locale
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tests.surroundings

os.environ["OMP_NUM_THREADS"] = str(tests.surroundings.THREADS)  # before torch is imported; child processes inherit it
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # some tests ask for deterministic algorithms
os.environ["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"  # ranks meet on 127.0.0.1

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported: Triton then runs it in numpy, on CPU tensors

import kernels
import train_gpt
from data import console
from data.shards import write_shard
from experiments import neurons, sweep
from tests import warm
from tests.matrices import Float64

if kernels.HAS_TRITON:
    import kernels.triton_common  # now: in a test that hides TRITON_INTERPRET it would be another for all that follow

pytest_plugins = ["tests.clock", "tests.gpt2_vocabulary", "tests.record_fixtures"]

ROOT = Path(__file__).resolve().parent.parent
TINY_VOCAB = 48
PATIENCE_S = 600  # with a child process that a fault may leave hanging, on a machine that is busy with other things

sweep.TRAINER = neurons.TRAINER = ROOT / "tests/warm_trainer.py"


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # of pytest-xdist, whose workers inherit the environment
        warm.start_server()


@pytest.fixture(autouse=True)
def same_threads() -> None:
    """Of torch in each test, whatever the one before has set."""
    torch.set_num_threads(tests.surroundings.THREADS)


@pytest.fixture(autouse=True)
def signals_and_streams() -> Iterator[None]:
    """As they were, after a command that ran in this process."""
    handlers, streams = {stop: signal.getsignal(stop) for stop in console.STOPS}, (sys.stdout, sys.stderr)
    yield
    sys.stdout, sys.stderr = streams
    for stop, handler in handlers.items():
        signal.signal(stop, handler)


@pytest.fixture(autouse=True)
def skip_what_torch_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch reads templates of its own, which are UTF-8, in the locale's encoding."""
    if codecs.lookup(locale.getpreferredencoding(False)).name == "ascii":
        monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.skip("torch cannot compile in an ASCII locale"))


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty is full of NaN: an element that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.ones(1, device="cuda" if torch.cuda.is_available() else "cpu").new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same arithmetic of the optimizers on every machine, whatever its bfloat16 units."""
    monkeypatch.setattr("optim.matrix_optimizer.fast_half_dtype", lambda device_type: torch.float32)


@pytest.fixture
def in_float64(float32_products: None) -> Iterator[None]:
    """The optimizers' arithmetic in float64, for weights and gradients that are; see tests/matrices.py."""
    with Float64():
        yield


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards: train 1 to 3 of odd sizes (7,001 tokens in all) and val, from one noisy cycle of tokens."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    tokens = np.cumsum(rng.choice([1, 2, 5], size=11_001, p=[0.7, 0.2, 0.1])) % TINY_VOCAB
    for index, (start, end) in enumerate([(0, 3001), (3001, 6000), (6000, 7001)], start=1):
        write_shard(folder / f"tiny_train_{index:06d}.bin", tokens[start:end])
    write_shard(folder / "tiny_val_000000.bin", tokens[7001:])
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(tiny_data: Path) -> Path:
    """A recipe that trains in about a second: 6 rows of 32 tokens a step, 1.1 epochs, validation on 120 rows."""
    recipe = tiny_data / "tiny.toml"
    settings = dict(
        name="tiny", tokenizer="none", vocab_size=TINY_VOCAB, val_tokens=3840, num_layers=2, num_heads=2, head_dim=8,
        model_dim=16, seq_len=32, train_steps=40, batch_tokens=192, micro_batch_tokens=192, val_every=10, log_every=5,
        dtype="float32", device="cpu",
        train_files=f"{tiny_data}/tiny_train_*.bin", val_files=f"{tiny_data}/tiny_val_*.bin",
    )  # fmt: skip
    lines = [f"{key} = {value!r}" for key, value in settings.items()]
    recipe.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return recipe


@dataclass
class Result:
    returncode: int
    stdout: str
    stderr: str


Trainer = Callable[..., Result]


@pytest.fixture
def trainer(tiny_recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Trainer:
    """trainer("--seed=1") runs the tiny recipe in this process, with its run directories under tmp_path/runs."""

    def run(*arguments: str) -> Result:
        capfd.readouterr()
        status = train_gpt.main([str(tiny_recipe), f"--run_dir={tmp_path / 'runs'}", *arguments])
        return Result(status, *capfd.readouterr())

    return run


def at_step(patch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
    """Do something at the beginning of a training step."""
    genuine = train_gpt.Run.follow

    def follow(run: train_gpt.Run, plan: train_gpt.StepPlan) -> None:
        if run.summary.get("steps") == step:
            action()
        genuine(run, plan)

    patch.setattr(train_gpt.Run, "follow", follow)


def stop() -> None:
    raise KeyboardInterrupt


def python(script: list[str], recipe: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python <script> <recipe> <arguments>` from the repository's root, to its end; torch is loaded beforehand."""
    command = [sys.executable, str(ROOT / "tests/warm.py"), *script, str(recipe), *arguments]
    settings = {**os.environ, **environment}
    return subprocess.run(
        command,
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        encoding="utf-8",
    )


def torchrun(ranks: int, restarts: int = 0, script: str = "train_gpt.py") -> list[str]:
    meeting = ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "--local_addr=127.0.0.1"]  # look up no host's name
    options = [*meeting, f"--nproc_per_node={ranks}", f"--max_restarts={restarts}"]
    return ["-m", "torch.distributed.run", *options, "tests/warm.py", script]


@pytest.fixture(scope="session")
def two_ranks(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the tiny recipe on two ranks, with every checkpoint of its eight."""
    folder = tmp_path_factory.mktemp("two_ranks")
    arguments = ["--micro_batch_tokens=32", "--checkpoint_every=5", "--checkpoint_keep=9", f"--run_dir={folder}"]
    result = python(torchrun(2), tiny_recipe, *arguments)
    assert result.returncode == 0, result.stderr
    (directory,) = folder.iterdir()  # only the first rank writes
    return directory
