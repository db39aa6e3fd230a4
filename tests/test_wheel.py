"""`pip install` of the repository: the optimizers as nanogpt_aurora, without a module on anybody's path besides."""

import copy
import os
import pickle
import re
import subprocess
import sys
import sysconfig
import venv
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import nn

import kernels
import optim
from setup import with_own_imports
from tests import wheel_user
from tests.conftest import PATIENCE_S, ROOT

KERNELS = {
    "__init__", "apply_symmetric", "apply_update", "cross_entropy", "gram", "momentum", "normalize_rows", "not_finite",
    "reference", "scale_rows", "scattered", "symmetric_product", "triton_common",
}  # fmt: skip


@dataclass
class Environment:
    """A virtual environment with this one's packages, another package `kernels` in place of the Hub's, and no more."""

    root: Path

    def __post_init__(self) -> None:
        venv.create(self.root, symlinks=True)
        self.packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(self.root)}))
        folders = "\n".join(path for path in sys.path if path.endswith("-packages"))
        (self.packages / "others.pth").write_text(folders, encoding="utf-8")
        (self.packages / "kernels").mkdir()
        (self.packages / "kernels/__init__.py").write_text('"""Those of others."""', encoding="utf-8")

    def python(self, *arguments: str | Path) -> None:
        path = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part and Path(part) != ROOT]
        settings = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PIP_CONFIG_FILE": os.devnull}
        subprocess.run(
            [self.root / "bin/python", *arguments], cwd=self.root, env=settings, check=True, timeout=PATIENCE_S
        )

    def pip(self, *arguments: str | Path) -> None:
        self.python("-m", "pip", "--isolated", "--quiet", "--disable-pip-version-check", *arguments)


def build_leftovers() -> set[Path]:
    """What setuptools would leave in the checkout, and take up into the next wheel."""
    return {*ROOT.glob("build/**"), *ROOT.glob("*.egg-info")}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """The wheel is built and installed as users do, but with the setuptools that is here; and at the end removed."""
    environment = Environment(tmp_path_factory.mktemp("wheel") / "venv")
    before = set(environment.packages.rglob("*"))
    left_in_checkout = build_leftovers()
    environment.pip("install", "--no-index", "--no-deps", "--no-build-isolation", ROOT)
    assert build_leftovers() == left_in_checkout
    yield environment
    environment.pip("uninstall", "--yes", "nanogpt-aurora")
    assert {path for path in environment.packages.rglob("*") if "kernels/__pycache__" not in str(path)} == before


@pytest.mark.slow
def test_the_wheel_is_the_files_of_the_repository(environment: Environment) -> None:
    (wheel,) = metadata.distributions(name="nanogpt-aurora", path=[str(environment.packages)])
    files = [path for path in wheel.files or () if path.suffix != ".pyc"]
    assert {path.parts[0] for path in files} == {"nanogpt_aurora", f"nanogpt_aurora-{wheel.version}.dist-info"}
    sources = {path.as_posix().removeprefix("nanogpt_aurora/"): path for path in files if len(path.parts) == 3}
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "optim").glob("*.py")}
    ours |= {f"kernels/{name}.py" for name in KERNELS}
    assert {name for name in sources if name.endswith(".py")} == ours
    for name in ours:
        text = sources[name].read_text(encoding="utf-8").replace("from nanogpt_aurora.", "from ")
        assert text == (ROOT / name).read_text(encoding="utf-8")
    assert wheel.requires == ["torch>=2.10"]
    assert f"version: {wheel.version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_works_outside_the_checkout_and_meets_the_repository(
    environment: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There imported first, here after it. Both compute the same bits, by kernels of their own."""
    script = tmp_path / "wheel_user.py"  # in the repository it would have that on its path
    script.write_text(Path(wheel_user.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    environment.python(script, ROOT, tmp_path / "results.pt")
    there = torch.load(tmp_path / "results.pt")
    assert (there["others"], there["optim"]) == ("Those of others.", False)

    monkeypatch.syspath_prepend(environment.packages)
    import nanogpt_aurora
    import nanogpt_aurora.kernels

    assert Path(nanogpt_aurora.__file__).is_relative_to(environment.packages)
    state = wheel_user.train(optim)
    assert equal(state, there["trained"])
    assert equal(state, there["in the repository"])
    assert equal(state, wheel_user.train(nanogpt_aurora))
    assert equal(wheel_user.train(optim, state), wheel_user.train(nanogpt_aurora, there["trained"]))

    assert set(nanogpt_aurora.__all__) == set(optim.__all__)
    optimizer = nanogpt_aurora.Aurora([torch.nn.Parameter(torch.randn(4, 4))])
    assert type(pickle.loads(pickle.dumps(optimizer))) is nanogpt_aurora.Aurora is not optim.Aurora
    if kernels.HAS_TRITON:
        grams = [wheel_user.gram(kernels), wheel_user.gram(nanogpt_aurora.kernels)]
        assert equal([there["gram"], there["gram in the repository"]], grams)
        assert kernels.NAMESPACE == "aurora_kernels" != nanogpt_aurora.kernels.NAMESPACE


def equal(a: object, b: object) -> bool:
    """To the bit, in whatever dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)  # type: ignore[arg-type]
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)  # type: ignore[attr-defined,index]
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))  # type: ignore[arg-type]
    return a == b


@pytest.mark.parametrize(
    "line",
    [
        "from data.files import whole",
        "import harness.machine",
        "import numpy",
        "import kernels",
        "import math, optim",
        "from .polar import polar",
        "from . import polar",
        "from  optim.polar import polar",
        "from torch import Tensor; x = 'é'; from model import GPT",
    ],
)
def test_an_import_that_the_wheel_cannot_have_ends_the_build(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rule.py"
    path.write_text(f'"""A rule."""\n\n{line}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}:3: the wheel cannot have .*{re.escape(line[-5:])}"):
        with_own_imports(path)


def test_imports_change_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "rule.py"
    text = '''"""from optim import Muon"""
import torch.optim  # from optim.polar import polar
def f():
    from optim.polar import (  # ä
        polar,
    )
    from kernels import backend, reference
    return "from optim import Muon", torch.optim
'''
    path.write_text(text, encoding="utf-8")
    source, used = with_own_imports(path)
    assert source == text.replace("    from ", "    from nanogpt_aurora.")
    names = ("kernels/__init__.py", "kernels/reference.py", "optim/polar.py")
    assert used == {ROOT / name for name in names}


def test_the_lines_for_a_project_of_ones_own_train_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/optimizers.md").read_text(encoding="utf-8")
    lines = re.findall(r"```python\n(from nanogpt_aurora .*?)```", text, re.DOTALL)[0]
    monkeypatch.setitem(sys.modules, "nanogpt_aurora", optim)
    parts = dict(embed=nn.Embedding(9, 6), body=nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)), head=nn.Linear(6, 9))
    names = {"model": nn.Sequential(OrderedDict(parts)), "torch": torch}
    before = copy.deepcopy(names["model"].state_dict())
    exec(lines, names)
    names["model"](torch.arange(9)).square().sum().backward()
    for optimizer in names["optimizers"]:
        optimizer.step()
    after = names["model"].state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert [id(p) for p in names["matrices"]] == [id(parts["body"][0].weight)]
