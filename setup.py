"""Builds the wheel: optim/ and what it imports of kernels/, as nanogpt_aurora.optim and nanogpt_aurora.kernels.

    pip install .

Its modules are the files of this repository. Only their imports of one another are changed, on the same lines.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "nanogpt_aurora"
FOLDERS = ("optim", "kernels")
MAY_IMPORT = sys.stdlib_module_names | {"torch", "triton"}
INIT = f'''"""Muon, Aurora and relatives for the hidden matrices of any torch model; see {PACKAGE}.optim."""

from {PACKAGE}.optim import *
from {PACKAGE}.optim import __all__

__version__ = "%s"
'''


def imports(tree: ast.Module) -> Iterator[tuple[ast.Import | ast.ImportFrom, str, list[str]]]:
    """Every import statement: the node, a module's name, and what is taken from that module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node, "." * node.level + (node.module or ""), [alias.name for alias in node.names]


def with_own_imports(path: Path) -> tuple[str, set[Path]]:
    """The source of a module in the wheel, and the files that it imports of the wheel's.

    ValueError for an import of something else than those, torch, Triton and the standard library, or in another form
    than `from optim.module import name`.
    """
    text = path.read_text(encoding="utf-8")
    lines, used = text.split("\n"), set[Path]()
    for node, module, names in imports(ast.parse(text)):
        first = module.split(".")[0]
        if first in MAY_IMPORT:
            continue
        line, statement = lines[node.lineno - 1], f"from {module} import "
        if first not in FOLDERS or not line[node.col_offset :].startswith(statement):
            raise ValueError(
                f"{path}:{node.lineno}: the wheel cannot have {line.strip()!r}; import torch, "
                "triton, the standard library, or `from optim.polar import polar` of optim/ and kernels/"
            )
        lines[node.lineno - 1] = f"{line[: node.col_offset]}from {PACKAGE}.{line[node.col_offset + len('from ') :]}"
        found = ROOT / module.replace(".", "/")
        used |= {found / "__init__.py", found.with_suffix(".py"), *(found / f"{name}.py" for name in names)}
    return "\n".join(lines), {path for path in used if path.exists()}


def modules() -> dict[Path, str]:
    """The files that the wheel is made of, with their sources in it."""
    found, left = dict[Path, str](), set((ROOT / FOLDERS[0]).glob("*.py"))
    while left:
        path = left.pop()
        found[path], used = with_own_imports(path)
        left |= used - found.keys()
    return found


class BuildPackage(build_py):  # type: ignore[misc]  # setuptools has no types
    def run(self) -> None:
        if self.editable_mode:
            sys.exit("error: there is nothing to edit in place, since the modules are made; use pip install without -e")
        sources = {path.relative_to(ROOT).as_posix(): source for path, source in modules().items()}
        sources |= {"__init__.py": INIT % self.distribution.get_version(), "py.typed": ""}
        for name, source in sources.items():
            target = Path(self.build_lib, PACKAGE, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(source, encoding="utf-8")

    def get_source_files(self) -> list[str]:
        return ["CITATION.cff", *(str(path.relative_to(ROOT)) for path in modules())]


def main() -> None:
    (version,) = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    with TemporaryDirectory() as work:  # what is left in the checkout would be in the next wheel
        options: dict[str, Any] = {"build": {"build_base": work}, "egg_info": {"egg_base": work}}
        setup(version=version, packages=[PACKAGE], cmdclass={"build_py": BuildPackage}, options=options)


if __name__ == "__main__":
    main()
