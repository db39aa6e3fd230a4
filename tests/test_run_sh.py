"""run.sh without installing anything: its help is whole, its venv stamp works, and mistakes end in one line."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT


def run_sh(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(folder / "run.sh"), *arguments]
    settings = {**os.environ, **environment}
    return subprocess.run(
        command, env=settings, capture_output=True, text=True, timeout=60, check=False, encoding="utf-8"
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with run.sh and a fake interpreter that writes down how it was called instead of doing it."""
    for name in ("run.sh", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, tmp_path)
    fake = tmp_path / "fake-python"
    fake.write_text(
        "#!/usr/bin/env bash\n"
        f'echo "$(basename "$0") $*" >> {tmp_path}/calls\n'
        'if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/pip"; fi\n',
        encoding="utf-8",
    )
    fake.chmod(0o755)
    return tmp_path


def calls(checkout: Path) -> list[str]:
    lines = (checkout / "calls").read_text(encoding="utf-8").splitlines()
    (checkout / "calls").unlink()
    return [line for line in lines if "sys.version_info" not in line]


def test_help_names_every_command() -> None:
    text = run_sh(ROOT, "--help").stdout
    script = (ROOT / "run.sh").read_text(encoding="utf-8")
    commands = " ".join(re.findall(r"^    ([a-z_ |]+)\)$", script, flags=re.MULTILINE)).replace("|", " ").split()
    expected = {"test", "check", "lint", "bench", "sweep", "grokking", "neurons", "options", "settings", "leaderboard"}
    expected.add("gpu_suite")
    assert set(commands) == expected
    assert all(f"./run.sh {command}" in text for command in commands)


def test_the_first_run_installs_and_the_second_only_trains(checkout: Path) -> None:
    environment = {"PYTHON": str(checkout / "fake-python"), "PATH": "/usr/bin:/bin"}
    for attempt in (1, 2):
        result = run_sh(checkout, "configs/x.toml", "--seed=1", **environment)
        assert result.returncode == 0, result.stderr
        *installs, launch = calls(checkout)
        assert launch == "python launch.py configs/x.toml --seed=1"
        expected = ["fake-python -m venv .venv", "pip install --quiet --disable-pip-version-check -r requirements.txt"]
        assert installs == (expected if attempt == 1 else [])
    with (checkout / "requirements.txt").open("a", encoding="utf-8") as requirements:
        requirements.write("einops\n")
    run_sh(checkout, "configs/x.toml", **environment)
    assert calls(checkout)[0].startswith("pip install")  # what is needed has changed; the venv itself stays


def test_without_a_recipe_the_sample_is_trained_on_what_the_machine_has(checkout: Path, tmp_path: Path) -> None:
    environment = {"PYTHON": str(checkout / "fake-python"), "PATH": f"{tmp_path}/gpu:/usr/bin:/bin"}
    run_sh(checkout, "--seed=1", **environment)
    assert calls(checkout)[-1] == "python launch.py configs/sotu_cpu.toml --seed=1"
    (tmp_path / "gpu").mkdir()
    smi = tmp_path / "gpu" / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: one'\n", encoding="utf-8")
    smi.chmod(0o755)
    run_sh(checkout, **environment)
    assert calls(checkout)[-1] == "python launch.py configs/sotu_gpu.toml"


def test_an_old_or_missing_python_is_one_line(checkout: Path) -> None:
    result = run_sh(checkout, PYTHON="/nowhere/python3")
    assert result.returncode == 2
    assert result.stderr.startswith("error: /nowhere/python3 is missing or older than 3.11")
    assert not (checkout / ".venv").exists()
