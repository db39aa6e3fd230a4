"""Imports go down only, between the rooms of the repository and without a loop."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

# What each room may import besides itself; tests may import all.
BELOW = {
    "kernels": set(),
    "data": set(),
    "optim": {"kernels"},
    "model": {"kernels"},
    "model_track3": {"model", "kernels"},
    "architectures": {"data", "model", "model_track3", "kernels"},
    "harness": {"data", "optim", "architectures", "model", "model_track3", "kernels"},
}
BELOW["inference"] = BELOW["harness"] | {"harness"}
BELOW["train_gpt"] = BELOW["inference"] | {"inference"}
BELOW |= {room: BELOW["train_gpt"] | {"train_gpt"} for room in ("leaderboard", "experiments", "benchmarks")}
BELOW["docs"] = BELOW["leaderboard"] | {"leaderboard", "experiments", "benchmarks"}  # its tables are of all rooms
EXCEPTIONS = {("harness/launch.py", "train_gpt")}  # it checks the settings before any rank starts


def imports(path: Path) -> Iterator[str]:
    """First parts of the names of what a file imports, wherever in it that stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0] if not node.level else "."


def violations(root: Path) -> list[str]:
    top = list(root.glob("*.py"))
    rooms = [folder for folder in root.iterdir() if (folder / "__init__.py").exists() and folder.name != "tests"]
    ours = {path.stem for path in top} | {folder.name for folder in rooms}
    found = []
    for path in sorted([*top, *(path for room in rooms for path in room.rglob("*.py"))]):
        name = path.relative_to(root).as_posix()
        room = name.split("/")[0].removesuffix(".py")
        for other in sorted(set(imports(path)) & (ours - {room})):
            if other not in BELOW.get(room, set()) and (name, other) not in EXCEPTIONS:
                found.append(f"{name} imports {other}")
    return found


def test_imports_go_down_only() -> None:
    assert violations(ROOT) == []


def test_an_import_that_goes_up_is_found(tmp_path: Path) -> None:
    for room in ("optim", "data"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    (tmp_path / "model.py").touch()
    (tmp_path / "optim/muon.py").write_text("import torch\n\ndef f():\n    from model import GPT\n", encoding="utf-8")
    (tmp_path / "data/loader.py").write_text("import optim.muon\nimport data\n", encoding="utf-8")
    assert violations(tmp_path) == ["data/loader.py imports optim", "optim/muon.py imports model"]
