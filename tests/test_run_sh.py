"""run.sh without installing anything: its help is whole, its environments are found, made, mended and told apart, and
mistakes end in one line."""

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

SYSTEM = "/usr/bin:/bin"  # the PATH of these tests: nothing of the user's
FAKE = """#!/usr/bin/env bash
bin=$(dirname "$0")
case "$*" in
    -c*torch*) echo "${TORCH_SEES_A_GPU:-False}" ;;
    -c*) [ ! -e "$bin/other-version" ] ;;
    "-m pip --version") [ ! -e "$bin/no-pip" ] ;;
    "-m pip config list") echo "${PIP_CONF:-}" ;;
    *)
        echo "$(basename "$0") $*" >>"$CALLS"
        case "$1 $2 $3" in
            "-m ensurepip "*) [ ! -e "$bin/no-ensurepip" ] && rm "$bin/no-pip" ;;
            "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && [ -z "${NO_VENV:-}" ] ;;
            "-m pip install") env >"$CALLS.env" && [ -z "${NO_NETWORK:-}" ] ;;
            "-m harness.launch "*) pwd >>"$CALLS" ;;
        esac
        ;;
esac
"""


class Checkout:
    """A folder with run.sh and a fake interpreter that writes down how it was called instead of doing it."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "a [new] checkout"
        (self.root / "configs").mkdir(parents=True)
        (self.root / "configs/x.toml").touch()
        for name in ("run.sh", "requirements.txt", "requirements-dev.txt"):
            shutil.copy(ROOT / name, self.root)
        self.python, self.written = tmp_path / "fake-python", tmp_path / "calls"
        self.python.write_text(FAKE, encoding="utf-8")
        self.python.chmod(0o755)
        self.environment = dict(PYTHON=str(self.python), CALLS=str(self.written), PATH=SYSTEM, HOME=str(tmp_path))
        self.bin = self.root / ".venv/bin"

    def command(self, *arguments: str, script: Path | None = None) -> list[str]:
        return ["bash", str(script or self.root / "run.sh"), *arguments]

    def run(self, command: list[str], cwd: Path | None = None, **variables: str) -> tuple[int, str]:
        """Exit status and stderr."""
        done = subprocess.run(
            command, cwd=cwd or self.root, env=self.environment | variables, capture_output=True, text=True,
            timeout=60, check=False, encoding="utf-8",
        )  # fmt: skip
        return done.returncode, done.stderr

    def train(self, *arguments: str, **variables: str) -> tuple[int, str]:
        return self.run(self.command("configs/x.toml", *arguments), **variables)

    def calls(self) -> list[str]:
        """What the interpreter was called with since the last look."""
        lines = self.written.read_text(encoding="utf-8").splitlines() if self.written.exists() else []
        self.written.unlink(missing_ok=True)
        return lines


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def with_examples(checkout: Checkout) -> Checkout:
    shutil.copytree(ROOT / "examples", checkout.root / "examples")
    return checkout


@pytest.fixture
def installed(checkout: Checkout) -> Checkout:
    assert checkout.train() == (0, "Installing into .venv (once; a few minutes) ...\n")
    checkout.calls()
    return checkout


MAKES = "fake-python -m venv .venv"
INSTALLS = "python -m pip install --quiet --disable-pip-version-check --no-user --target= -r requirements.txt"
TRAINS = "python -m harness.launch configs/x.toml"


def test_help_names_every_command() -> None:
    text = subprocess.run([ROOT / "run.sh", "--help"], capture_output=True, text=True, encoding="utf-8").stdout
    script = (ROOT / "run.sh").read_text(encoding="utf-8")
    commands = " ".join(re.findall(r"^    ([a-z_ |]+)\)$", script, flags=re.MULTILINE)).replace("|", " ").split()
    expected = {"test", "check", "lint", "bench", "sweep", "grokking", "neurons", "options", "settings", "leaderboard"}
    expected |= {"gpu_suite", "rules", "examples", "league", "lengths", "claims", "sample", "evaluate", "export"}
    assert set(commands) == expected
    assert all(f"./run.sh {command}" in text for command in commands)


def test_the_first_run_installs_and_the_second_only_trains(checkout: Checkout) -> None:
    for expected in ([MAKES, INSTALLS], []):
        status, stderr = checkout.train("--seed=1")
        assert status == 0, stderr
        assert checkout.calls() == [*expected, f"{TRAINS} --seed=1", str(checkout.root)]


def test_what_is_needed_is_installed_whenever_it_has_changed(installed: Checkout) -> None:
    """Also back to what was needed before, which is not what is there now. The virtual environment itself stays."""
    requirements = installed.root / "requirements.txt"
    before = requirements.read_text(encoding="utf-8")
    for text in (before + "einops\n", before):
        requirements.write_text(text, encoding="utf-8")
        installed.train()
        assert installed.calls()[:-1] == [INSTALLS, TRAINS]


@pytest.mark.parametrize(
    ("sees", "recipe", "said"),
    [
        ("True", "sotu_gpu", ""),
        ("False", "sotu_cpu", "On the CPU: nvidia-smi finds a GPU, but torch none\n"),
    ],
    ids=["a GPU", "a GPU that torch cannot use"],
)
def test_without_a_recipe_the_sample_is_trained_on_what_torch_can_use(
    installed: Checkout, tmp_path: Path, sees: str, recipe: str, said: str
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: one'\n", encoding="utf-8")
    smi.chmod(0o755)
    path = f"{tmp_path}:{SYSTEM}"
    assert installed.run(installed.command("--seed=1"), PATH=path, TORCH_SEES_A_GPU=sees) == (0, said)
    assert installed.calls()[0] == f"python -m harness.launch configs/{recipe}.toml --seed=1"


def test_an_old_or_missing_python_is_one_line(checkout: Checkout) -> None:
    status, stderr = checkout.train(PYTHON="/nowhere/python3")
    assert status == 2
    assert "error: /nowhere/python3 is missing or older than 3.11" in stderr.splitlines()[-1]
    assert not (checkout.root / ".venv").exists()


# ------------------------------------------------------------------------------------------------------------
# Environments that are not whole


def gone(checkout: Checkout) -> None:
    (checkout.bin / "python").unlink()
    (checkout.bin / "python").symlink_to("/nowhere/python3.11")


def other_version(checkout: Checkout) -> None:
    (checkout.bin / "other-version").touch()


def half_made(checkout: Checkout) -> None:
    """Before pip came, by an interpreter that has none to give."""
    (checkout.bin.parent / next(checkout.bin.parent.glob("installed-*"))).unlink()
    (checkout.bin / "no-pip").touch()
    (checkout.bin / "no-ensurepip").touch()


@pytest.mark.parametrize("breaks", [gone, other_version, half_made], ids=lambda breaks: breaks.__name__)
@pytest.mark.parametrize("system", [False, True], ids=["plain", "with the system's packages"])
def test_a_broken_environment_is_made_again_as_it_was(
    installed: Checkout, breaks: Callable[[Checkout], None], system: bool
) -> None:
    (installed.bin.parent / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = {str(system).lower()}\n", encoding="utf-8"
    )
    breaks(installed)
    status, stderr = installed.train()
    assert status == 0, stderr
    makes = MAKES + " --system-site-packages" * system
    assert [call for call in installed.calls()[:-1] if "ensurepip" not in call] == [makes, INSTALLS, TRAINS]


def test_an_environment_that_only_lacks_pip_is_given_it(installed: Checkout) -> None:
    """One that its user has made otherwise, with what is in it."""
    next(installed.bin.parent.glob("installed-*")).unlink()
    (installed.bin / "no-pip").touch()
    assert installed.train()[0] == 0
    assert installed.calls()[:-1] == ["python -m ensurepip", INSTALLS, TRAINS]


def test_an_environment_that_cannot_be_made_leaves_nothing_and_is_one_line(checkout: Checkout) -> None:
    status, stderr = checkout.train(NO_VENV="1")
    assert (status, len(stderr.splitlines())) == (2, 2)
    assert stderr.splitlines()[1].startswith(f"error: {checkout.python} could not make .venv")
    assert "package python3-venv" in stderr
    assert not (checkout.root / ".venv").exists()


def test_an_installation_that_fails_is_tried_again(checkout: Checkout) -> None:
    status, stderr = checkout.train(NO_NETWORK="1")
    assert (status, checkout.calls()) == (2, [MAKES, INSTALLS])
    assert stderr.splitlines()[-1].startswith("error: pip could not install into .venv")
    assert checkout.train()[0] == 0
    assert checkout.calls()[:-1] == [INSTALLS, TRAINS]


@pytest.mark.skipif(not shutil.which("flock", path=SYSTEM), reason="no flock here")
def test_two_at_once_install_once(checkout: Checkout) -> None:
    with (checkout.root / "requirements.txt").open(encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # the first of them is at it
        second = subprocess.Popen(
            checkout.command("configs/x.toml"), env=checkout.environment, stderr=subprocess.PIPE, text=True,
            encoding="utf-8",
        )  # fmt: skip
        assert second.stderr
        assert second.stderr.readline() == "Waiting for another ./run.sh to end its installation ...\n"
        checkout.bin.mkdir(parents=True)
        shutil.copy(checkout.python, checkout.bin / "python")
        stamp = subprocess.check_output(["cksum"], input=(checkout.root / "requirements.txt").read_bytes())
        (checkout.bin.parent / f"installed-{stamp.split()[0].decode()}").touch()
    assert second.wait(60) == 0
    assert checkout.calls()[:-1] == [TRAINS]


def test_pip_installs_here_whatever_the_users_settings(checkout: Checkout) -> None:
    mine = {"PIP_INDEX_URL": "https://mirror.example/simple", "PIP_CONSTRAINT": "/mine.txt", "PIP_PROXY": "http://p:1"}
    elsewhere = dict(PIP_TARGET="/t", PIP_PREFIX="/p", PIP_USER="1", PIP_ROOT="/r", PIP_REQUIRE_VIRTUALENV="1")
    status, stderr = checkout.train(**mine, **elsewhere, PYTHONHOME="/h", PYTHONPATH="/other/packages")
    assert status == 0, stderr
    seen = dict(line.split("=", 1) for line in Path(f"{checkout.written}.env").read_text(encoding="utf-8").splitlines())
    assert {name: value for name, value in seen.items() if name.startswith(("PIP", "PYTHON"))} == {
        **mine, "PYTHON": str(checkout.python),
    }  # fmt: skip


def test_settings_of_pip_that_cannot_be_put_right_are_said(checkout: Checkout) -> None:
    status, stderr = checkout.train(PIP_CONF="global.prefix='/opt'")
    assert status == 2
    assert stderr.splitlines()[1:] == [
        "global.prefix='/opt'",
        "error: these settings of pip suit no virtual environment; PIP_CONFIG_FILE=/dev/null ./run.sh has none",
    ]
    assert checkout.train(PIP_CONF="global.index-url='https://mirror.example/simple'")[0] == 0


def test_an_interpreter_that_is_at_home_elsewhere_is_no_environment(tmp_path: Path) -> None:
    """pip would install into the Python that it is a link to."""
    script = (ROOT / "run.sh").read_text(encoding="utf-8")
    works = "".join(re.findall(r"^(?:runs|works)\(\) \{\n.*?^\}\n", script, flags=re.MULTILINE | re.DOTALL))
    venv = tmp_path / "a venv"
    (venv / "bin").mkdir(parents=True)
    (venv / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages").mkdir(parents=True)
    python = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    (venv / "bin/python").symlink_to(python)
    command = ["bash", "-c", f'{works}works "$1"', "bash", str(venv)]
    assert subprocess.run(command).returncode == 1
    (venv / "pyvenv.cfg").write_text(f"home = {python.parent}\n", encoding="utf-8")
    assert subprocess.run(command).returncode == 0


def test_what_may_not_be_ours_is_moved_and_not_deleted(installed: Checkout) -> None:
    mark = next(installed.bin.parent.glob("installed-*"))
    for moved in ([".venv.unusable"], [".venv.unusable", ".venv.unusable~"]):
        mark.unlink()
        (installed.bin.parent / "mine").write_text(moved[-1], encoding="utf-8")
        other_version(installed)
        status, stderr = installed.train()
        assert status == 0, stderr
        assert stderr.splitlines()[1] == f".venv cannot be used and was not made here: moved to {moved[-1]}"
        assert [(installed.root / name / "mine").read_text(encoding="utf-8") for name in moved] == moved
        assert [path.name for path in installed.bin.parent.iterdir() if path.name != "bin"] == [mark.name]


def test_what_is_ours_is_made_again_in_its_place(installed: Checkout) -> None:
    """Whole once, or cut off before pip came."""
    mark = next(installed.bin.parent.glob("installed-*"))
    for name in (mark.name, "installed-in-part"):
        mark.rename(installed.bin.parent / name)
        other_version(installed)
        assert installed.train() == (0, "Installing into .venv (once; a few minutes) ...\n")
    assert not (installed.root / ".venv.unusable").exists()


@pytest.mark.parametrize(("status", "waits"), [(1, True), (71, False)], ids=["held", "no locks"])
def test_only_a_lock_that_another_holds_is_waited_for(
    checkout: Checkout, tmp_path: Path, status: int, waits: bool
) -> None:
    flock = tmp_path / "flock"
    flock.write_text(f'#!/bin/sh\n[ "$1" != -n ] || exit {status}\n', encoding="utf-8")
    flock.chmod(0o755)
    done, stderr = checkout.train(PATH=f"{tmp_path}:{SYSTEM}")
    assert (done, "Waiting" in stderr) == (0, waits)


# ------------------------------------------------------------------------------------------------------------
# Called from anywhere


@pytest.mark.parametrize("shell", ["bash", "sh", ""], ids=["bash", "sh", "by itself"])
def test_it_finds_itself_through_links_from_another_folder(installed: Checkout, tmp_path: Path, shell: str) -> None:
    bin_ = tmp_path / "bin"
    (bin_ / "configs").mkdir(parents=True)
    (bin_ / "one").symlink_to(f"../{installed.root.name}/run.sh")
    (bin_ / "aurora").symlink_to("one")
    command = [*([shell] if shell else []), str(bin_ / "aurora"), "configs/x.toml"]
    status, stderr = installed.run(command, cwd=bin_, CDPATH=f".:{tmp_path}")
    assert (status, stderr) == (0, "")
    assert installed.calls() == [TRAINS, str(installed.root)]


def test_what_the_user_names_is_where_the_user_is(installed: Checkout, tmp_path: Path) -> None:
    for name in ("mine.toml", "configs/x.toml", "leaderboard", "add", "bench", "loader"):
        (tmp_path / "at" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "at" / name).touch()
    at = tmp_path / "at"
    for arguments, expected in [
        (["mine.toml", "--name=mine.toml"], f"-m harness.launch {at}/mine.toml --name=mine.toml"),
        (["configs/x.toml"], f"-m harness.launch {at}/configs/x.toml"),
        (["sweep", "mine.toml", "--seeds", "2"], f"-m experiments.sweep {at}/mine.toml --seeds 2"),
        (["leaderboard", "add", "../at"], f"-m leaderboard add {at}/../at"),
        (["requirements.txt"], "-m harness.launch requirements.txt"),
        ([""], "-m harness.launch configs/sotu_cpu.toml"),
        (["", "--seed=1"], "-m harness.launch configs/sotu_cpu.toml --seed=1"),
        (["mine.toml", "--name", ""], f"-m harness.launch {at}/mine.toml --name "),
    ]:
        assert installed.run(installed.command(*arguments), cwd=at) == (0, "")
        assert installed.calls()[0] == f"python {expected}"


def test_a_checkout_that_cannot_be_written_serves(installed: Checkout, tmp_path: Path) -> None:
    """From the user's folder, with an environment in the user's cache where it has none that is whole."""
    at = tmp_path / "at"
    at.mkdir()
    lock = ["unshare", "-m", "sh", "-c", 'mount -o bind,ro "$0" "$0" && exec "$@"', str(installed.root)]
    if os.geteuid() != 0:
        lock = []
        installed.root.chmod(0o555)
    elif subprocess.run([*lock, "true"], capture_output=True).returncode != 0:
        pytest.skip("root can write everywhere and may not mount")
    command = [*lock, *installed.command("configs/x.toml")]
    status, stderr = installed.run(command, cwd=at)
    root = installed.root
    assert (status, stderr) == (
        0, f"{root} cannot be written: using {root}/.venv, and data/ and runs/ of {at}\n",
    )  # fmt: skip
    assert installed.calls() == [f"python -m harness.launch {root}/configs/x.toml", str(at)]

    assert installed.run([*lock, *installed.command("settings")], cwd=at)[0] == 0
    assert installed.calls() == [f"python {root}/train_gpt.py --help"]

    next(root.glob(".venv/installed-*")).unlink()
    status, stderr = installed.run(command, cwd=at)
    assert status == 0, stderr
    (cache,) = (tmp_path / ".cache").iterdir()
    assert installed.calls() == [
        f"fake-python -m venv {cache}/.venv",
        f"{INSTALLS.rpartition(' ')[0]} {root}/requirements.txt",
        f"python -m harness.launch {root}/configs/x.toml",
        str(at),
    ]
    root.chmod(0o755)


def test_examples_run_with_the_frameworks_and_the_package_of_this_checkout(with_examples: Checkout) -> None:
    assert with_examples.run(with_examples.command("examples", "plain_loop", "examples/fsdp2_two_ranks.py"))[0] == 0
    made, frameworks, package, alone, ranks = with_examples.calls()
    assert made.endswith("-m venv .venv-examples")
    assert frameworks.endswith("--target= -r examples/requirements.txt")
    assert package.endswith(f"--no-deps --no-build-isolation --force-reinstall {with_examples.root}")
    assert alone == "python examples/plain_loop.py"
    environment = Path(f"{with_examples.written}.env").read_text(encoding="utf-8").splitlines()
    assert {f"PYTHONPATH={with_examples.root}/examples", "PYTHONSAFEPATH=1"} <= {*environment}  # toy.py, and no others
    assert re.fullmatch(r"python -m torch\.distributed\.run --nproc-per-node 2 .* examples/fsdp2_two_ranks\.py", ranks)

    (other := with_examples.root.parent / "project/examples").mkdir(parents=True)  # it means nothing to them
    assert with_examples.run(with_examples.command("examples"), cwd=other.parent)[0] == 0
    scripts = [call.split("/")[-1] for call in with_examples.calls() if "examples/" in call]
    assert scripts == sorted(path.name for path in (ROOT / "examples").glob("*.py") if path.name != "toy.py")


@pytest.mark.parametrize("name", ["jax", "toy", "--help"])
def test_an_example_that_is_not_there_is_one_line_before_anything_is_installed(
    with_examples: Checkout, name: str
) -> None:
    status, said = with_examples.run(with_examples.command("examples", "plain_loop", name))
    assert status == 2
    assert said.startswith(f"error: there is no example {name}; choose one of accelerate_two_ranks.py ")
    assert with_examples.calls() == []
