"""The soak itself, for a short while: nothing is torn, wrong, lost or late."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.soak_tally import Tally
from tests.soak import on_own_servers


def run(folder: Path, seconds: float) -> tuple[Tally, list[str]]:
    with on_own_servers(soak.Plan(seconds, "", "", pause_s=0.5)) as plan:
        tally = soak.soak(plan, folder)
    soak.report(tally, seconds)
    return tally, soak.left_out(tally, plan)


def check_clean(tally: Tally) -> None:
    assert tally.clean, tally.examples  # every convergence within its bound, among others
    assert tally.requests > 100
    assert tally.vectors > 1_000
    assert tally.converged
    assert tally.switches.total()
    assert tally.changes.total()
    assert tally.injected.total()
    assert set(soak.FORMATS) <= tally.answers.keys()


def test_short_soak_is_clean_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tally, _ = run(tmp_path, seconds=20)
    check_clean(tally)
    printed = capsys.readouterr().out
    for what in ("requests verified", "fault injected", "torn responses", "late responses"):
        assert what in printed


@pytest.mark.long
def test_long_soak_is_clean(tmp_path: Path) -> None:
    tally, never = run(tmp_path, seconds=300)
    check_clean(tally)
    assert never == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--database-url"),
        (("--database-url", "x", "--store-url", "y", "--minutes", "0"), "--minutes must be"),
        (
            ("--database-url", "x", "--store-url", "y", "--stop-store", "z"),
            "--stop-store and --start-store come together",
        ),
    ],
)
def test_command_line_says_what_is_missing(arguments: tuple[str, ...], said: str) -> None:
    ended = subprocess.run(
        [sys.executable, "benchmarks/soak.py", *arguments],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 2
    assert said in ended.stderr
