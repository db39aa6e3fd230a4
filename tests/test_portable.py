"""What tests run in: nothing of the user's shell, and of other machines what can be had here, which is told truly."""

import collections
import os
import runpy
from typing import Any

import pytest

from data import console
from tests import portable
from tests.conftest import ROOT
from tests.portable import Variation, busy_loops, environment_of, main

HERE = dict(
    python="3.11", aten="AVX2", onednn="AVX2", threads=1, bfloat16=False, locale="C.UTF-8", encoding="utf-8",
    utc_offset_s=0, home=True, has_avx2=True, has_avx512=False,
)  # fmt: skip


def test_what_a_shell_has_set_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = [
        "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_OFFLINE", "HF_ENDPOINT", "TIKTOKEN_CACHE_DIR", "RANK",
        "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "PET_NNODES",
        "TORCHELASTIC_RUN_ID", "NNODES", "NPROC_PER_NODE", "RDZV_ENDPOINT", "MAX_RESTARTS", "GIT_DIR",
        "GIT_AUTHOR_NAME", "GIT_CONFIG_COUNT", "COLUMNS", "FORCE_COLOR", "PYTHONWARNINGS",
    ]  # fmt: skip
    ours = {"PATH": "/usr/bin", "CUDA_VISIBLE_DEVICES": "1", "LC_ALL": "C", "OMP_NUM_THREADS": "1"}
    monkeypatch.setattr(os, "environ", dict.fromkeys(theirs, "1") | ours)
    runpy.run_path(str(ROOT / "tests/surroundings.py"))
    git = {"GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": str(ROOT / "tests/gitconfig")}
    assert os.environ == ours | git | {"HF_HUB_DISABLE_TELEMETRY": "1"}


FACTS: dict[str, dict[str, Any]] = {  # a variation that is not here, such as a locale, changes none
    "ATEN_CPU_CAPABILITY=default": {"aten": "DEFAULT"}, "TEST_BFLOAT16=present": {"bfloat16": True},
    "TEST_THREADS=4": {"threads": 4}, "locale=C": {"encoding": "ascii"},
}  # fmt: skip


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fakes a machine and its outcomes, red with four threads; returns the names of what was run."""
    names: list[str] = []

    def facts_of(variation: Variation) -> dict[str, Any]:
        assert "avx512" not in variation.name, "torch dies of it without such units"
        if variation.name.startswith("python="):
            raise ValueError("ModuleNotFoundError: No module named 'torch'")
        changes = [FACTS.get(name, {}) for name in variation.name.split("+")]
        return dict(collections.ChainMap(*changes, HERE))

    def run_tests(variation: Variation, arguments: list[str], seed: int) -> tuple[dict[str, int], bool]:
        names.append(variation.name)
        assert arguments == ["-x"]
        return ({"passed": 5, "failed": 2}, False) if "THREADS=4" in variation.name else ({"passed": 7}, True)

    monkeypatch.setattr(console, "prepare", lambda: None)
    monkeypatch.setattr(portable, "facts_of", facts_of)
    monkeypatch.setattr(portable, "run_tests", run_tests)
    return names


@pytest.mark.parametrize(
    ("chosen", "status", "rows"),
    [
        ("plain,order=reversed", 0, ["7 0 0 0 green", "7 0 0 0 green"]),
        ("TEST_THREADS=4,TEST_BFLOAT16=other", 1, ["5 2 0 0 RED", "7 0 0 0 green"]),
        ("ATEN_CPU_CAPABILITY=avx512,python=3.12,locale=tr_TR.UTF-8+order=reversed", 0,
         ["not here: this CPU has no AVX512", "not here: ModuleNotFoundError: No module named 'torch'",
          "not here: locale stays C.UTF-8"]),
        ("TEST_BFLOAT16=absent,TEST_THREADS=1", 0, ["as plain, where it is so anyway"] * 2),
        ("TEST_BFLOAT16=absent+locale=C,TEST_BFLOAT16=absent+load=2", 0, ["7 0 0 0 green"] * 2),
    ],
    ids=["green", "red", "not here", "as plain", "one of two as plain"],
)  # fmt: skip
def test_what_is_run_and_what_is_said(
    runs: list[str], capsys: pytest.CaptureFixture[str], chosen: str, status: int, rows: list[str]
) -> None:
    assert main(["--only", chosen, "-x"]) == status
    names = chosen.replace("other", "present").split(",")
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert said[-len(rows) :] == [f"{name} {row}" for name, row in zip(names, rows, strict=True)]
    assert runs == [name for name, row in zip(names, rows, strict=True) if "green" in row or "RED" in row]


def test_an_unknown_variation_is_one_line(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "locale=D"]) == 2
    assert capsys.readouterr().err.startswith("error: --only: 'locale=D' is none of plain, ATEN_CPU_CAPABILITY=")


def test_an_empty_value_unsets_and_loops_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    assert "LANG" not in environment_of(Variation("x", {"LANG": ""}))
    with busy_loops(2) as loops:
        assert [loop.poll() for loop in loops] == [None, None]
    assert None not in [loop.returncode for loop in loops]
