"""README.md and docs/ are true of the tree: links, paths, modules, settings, examples and generated tables."""

import ast
import dataclasses
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import class_of
from docs import generate
from harness.tables import with_section
from train_gpt import Config, load_config, model_config

ROOT = generate.ROOT
README = ROOT / "README.md"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = {path.name for path in ROOT.glob("[!.]*/") if path.name != "runs"}
FILES = {path.name for path in ROOT.iterdir()} | {
    path.name for folder in FOLDERS for ending in ("py", "md", "toml") for path in (ROOT / folder).rglob(f"*.{ending}")
}
YOURS = {"my_rules.py"}  # a file that the reader is to write
PATH = re.compile(r"(?<![\w./<>*{-])((?:[\w.-]+/)+\w[\w.-]*\.(?:json|txt)|[\w.-][\w./-]*\.(?:py|md|toml|cff|sh))\b")
FORKING = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs/forking.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| .*\| `", line)
]


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(document), re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The names that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", text(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def names_in(path: Path) -> set[str]:
    """Classes, functions, methods, constants and fields of a Python file, with their class before a dot; or the keys of
    a TOML file."""
    if path.suffix == ".toml":
        return set(tomllib.loads(text(path)))
    found = set[str]()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                visit(node.body if isinstance(node, ast.ClassDef) else [], f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(text(path)).body, "")
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", text(document)):
        if "://" not in link:
            target, _, anchor = link.partition("#")
            path = (document.parent / target).resolve() if target else document
            assert path.exists(), link
            assert not anchor or anchor in anchors(path), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_modules_that_are_named_exist(document: Path) -> None:
    missing = set()
    for name in set(PATH.findall(text(document))) - YOURS:
        folder = name.split("/")[0]
        if (folder in FOLDERS and not (ROOT / name).exists()) or ("/" not in name and name not in FILES):
            missing.add(name)
    for module in re.findall(r"python -m ([\w.]+)", text(document)):
        path = ROOT / module.replace(".", "/")
        if path.parts[len(ROOT.parts)] in FOLDERS and not (path.with_suffix(".py").exists() or path.is_dir()):
            missing.add(module)
    assert not missing


def test_the_tree_of_the_readme_is_the_tree() -> None:
    (tree,) = re.findall(r"## The tree\n\n```\n(.*?)```", text(README), re.DOTALL)
    folder, seen = "", set()
    for line in tree.splitlines():
        folder = match[0] if (match := re.match(r"[\w.]+/?", line)) else folder
        seen.add(folder.rstrip("/"))
        for name in re.findall(r"\w+\.(?:py|toml)", line.removeprefix(folder)):
            assert (ROOT / folder / name).is_file(), f"{folder}{name}"
    assert all((ROOT / name).exists() for name in seen)
    python = {path.name for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("[!.]*/*.py")}
    assert python <= seen


def test_the_readme_is_short_and_says_what_has_not_run_on_its_first_screen() -> None:
    lines = text(README).splitlines()
    assert len(lines) <= 250
    assert any("FineWeb, NCCL and several nodes are unmeasured" in line for line in lines[:25])


@pytest.mark.parametrize("row", FORKING, ids=lambda row: row[0])
def test_a_row_of_the_forking_table_names_what_is_there(row: list[str]) -> None:
    _, file, where, settings = row
    path = ROOT / file.strip("`")
    assert path.is_file()
    assert not where or where.strip("`") in names_in(path)
    known = {field.name for field in dataclasses.fields(Config)} | {"options"}
    assert set(re.findall(r"`(\w+)`", settings)) <= known


def test_the_forking_table_has_the_usual_edits() -> None:
    assert len(FORKING) >= 25


def test_the_recipe_of_the_readme_loads(tmp_path: Path) -> None:
    (recipe,) = code(README, "toml")
    path = tmp_path / "deep.toml"
    path.write_text(recipe, encoding="utf-8")
    assert load_config([str(path)]).model_dim == 96


@pytest.mark.parametrize("document", ["README.md", "docs/optimizers.md"])
def test_the_rule_that_is_shown_does_what_it_says(document: str) -> None:
    source = next(block for block in code(ROOT / document, "python") if "class SignMuon" in block)
    module: dict[str, Any] = {}
    exec(source, module)
    update = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    found = module["SignMuon"].orthogonalize(None, update, {}, {"power": 0.5})
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(2, 6))
    assert torch.equal(found.sign(), update.sign())


def test_the_version_is_the_newest_of_the_changelog() -> None:
    (version,) = re.findall(r"^version: (.+)$", text(ROOT / "CITATION.cff"), re.MULTILINE)
    assert re.findall(r"^## \[(.+)\]", text(ROOT / "CHANGELOG.md"), re.MULTILINE)[0] == version


def test_generated_tables_are_of_the_committed_results() -> None:
    whole = {path: text(path) for path in generate.DOCUMENTS}
    for path, document in whole.items():
        assert generate.with_sections(document) == document, f"{path.name}: run python -m docs.generate"
    sections = Counter(re.findall(r"^<!-- (\w+) -->$", "\n".join(whole.values()), re.MULTILINE))
    assert sections == Counter(generate.SECTIONS.keys())  # each stands in one place


def test_every_example_is_shown_in_less_than_20_lines() -> None:
    document = text(ROOT / "docs/optimizers.md")
    for path in generate.EXAMPLES:
        if path.stem != "toy":
            (shown,) = re.findall(rf"<!-- {path.stem} -->\n```python\n(.*?)```", document, re.DOTALL)
            assert 4 <= len(shown.splitlines()) < 20


def test_a_missing_section_is_said() -> None:
    with pytest.raises(ValueError, match=r"<!-- polar -->"):
        with_section("# Nothing\n", "polar", "")


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_sizes_in_a_recipe_s_comments_are_the_model_s(recipe: Path) -> None:
    config = load_config([str(recipe)])
    with torch.device("meta"):
        model = class_of(config)(model_config(config))
    blocks = sum(p.numel() for p in model.blocks.parameters())
    sizes = {"parameters": model.num_params(), "in blocks": blocks, "FLOPs per token": model.flops_per_token()}
    for number, what in re.findall(rf"([\d,]+) ({'|'.join(sizes)})", text(recipe).replace("\n# ", " ")):
        assert int(number.replace(",", "")) == sizes[what]
