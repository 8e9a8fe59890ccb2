"""The wheel holds the core only, and does what the core does where nothing else is installed."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.e2e.documents import ROOT

SECONDS = 300


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    _run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)])
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of programs of a clean environment: what core.txt locks, and the wheel."""
    folder = tmp_path_factory.mktemp("clean")
    _run([sys.executable, "-m", "venv", str(folder)])
    pip = [str(folder / "bin/pip"), "install", "--no-deps", "--disable-pip-version-check"]
    _run([*pip, "--require-hashes", "-r", str(ROOT / "requirements/core.txt")])
    _run([*pip, str(wheel)])
    return folder / "bin"


def test_wheel_holds_backcast_only(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    about = f"{wheel.name.partition('-py3')[0]}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"backcast", about}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "backcast").rglob("*.py")}
    assert {name for name in names if name.startswith("backcast/")} == sources | _markers()


def test_bare_install_is_complete_and_has_no_torch(programs: Path) -> None:
    _run([str(programs / "pip"), "check"])
    find = "from importlib.util import find_spec; print(*map(find_spec, ('torch', 'fastapi')))"
    assert _run([str(programs / "python"), "-c", find]).split() == ["None", "None"]


def test_bare_install_has_the_command_and_the_client(programs: Path) -> None:
    assert _run([str(programs / "backcast"), "--version"]) == "backcast 0.1.0\n"
    assert "embedding" in _run([str(programs / "backcast"), "--help"])
    ask = "from backcast import Client; Client('http://127.0.0.1:9').close()"
    _run([str(programs / "python"), "-W", "error", "-c", ask])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("serve", "needs the package 'service', which the wheel does not hold. Run it from a"),
        ("train", "needs the package 'trainer', which the wheel does not hold. Run it from a"),
        ("db upgrade", "The migrations are not installed. Run this from a checkout of Backcast"),
    ],
)
def test_command_of_an_application_says_what_to_install(
    command: str, message: str, programs: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [programs / "backcast", *command.split()],
        env=_environment() | {"BACKCAST_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert message in done.stderr
    assert "pip install -e" in done.stderr


def _markers() -> set[str]:
    return {"backcast/py.typed"} if (ROOT / "backcast/py.typed").exists() else set()


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command,
        cwd="/",  # not the checkout, whose packages would be found
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("BACKCAST_", "PYTHON"))}
