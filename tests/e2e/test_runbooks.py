"""Every command of the runbooks, run as it is printed, on a home with three versions."""

import re
from pathlib import Path

import pytest

from tests.e2e.documents import ROOT, blocks
from tests.e2e.test_documents import run_blocks
from tests.support import build_home

PAGE = "docs/operations.md"
DATABASE = "postgresql+psycopg://backcast@db.example/backcast"
STORE = "redis://cache.example:6379/0"


@pytest.fixture
def printed(tmp_path: Path, new_postgres: str, empty_redis: str) -> list[str]:
    with build_home(tmp_path / ".backcast", bias=True, live=1):
        pass
    runnable = [block for block in blocks(PAGE) if block.language == "sh"]
    return run_blocks(runnable, tmp_path, {DATABASE: new_postgres, STORE: empty_redis})


def test_runbooks_do_what_they_say(printed: list[str], tmp_path: Path) -> None:
    text = "\n".join(printed)
    (kept,) = re.findall(r"(\d+ rows and \d+ files \(.*\), live is .*): backups/monday", text)
    assert f"{kept}, as of " in text
    compared = re.findall(r"(\d+) stored vectors were compared, bit by bit: all are the same", text)
    assert compared == ["34", "17"]  # restored with what can be gone back to; moved without
    assert "Version 1 is live, from snapshot v1-" in text
    assert len(re.findall(r"stored vectors of \d snapshots? are what was registered", text)) == 4
    assert len(re.findall(r"transform.safetensors is registered but missing", text)) == 1
    assert "The registry's schema is at " in text
    assert '"live_version":1' in text
    backup = tmp_path / "backups" / "monday"  # into which nobody else can look
    assert [path.stat().st_mode & 0o777 for path in (backup.parent, backup)] == [0o700] * 2


def test_every_fault_has_its_runbook() -> None:
    faults, runbooks = (
        re.findall(r"^\| (?!fault)(\w.*?) \|", (ROOT / page).read_text(), re.MULTILINE)
        for page in ("docs/faults.md", PAGE)
    )
    assert runbooks == faults
