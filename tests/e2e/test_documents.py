"""Every command and every piece of code in README and docs, run as it is printed."""

import gzip
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pyarrow as pa
import pytest
from pyarrow import csv as arrow_csv

from tests.e2e.documents import ROOT, Block, as_shell, blocks
from trainer.config import TrainConfig
from trainer.data.synth import SynthConfig, synthesize

SECONDS = 400


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Run the README's quick start and then the guides in one folder, as a newcomer would."""
    folder = tmp_path_factory.mktemp("newcomer")
    _write_csv(folder)
    quick_start = blocks("README.md", after="Quick start")
    guides = [b for name in ("data", "training", "benchmark") for b in blocks(f"docs/{name}.md")]
    guides += blocks("docs/http.md")
    runnable = [b for b in [*quick_start, *guides] if b.language in {"sh", "python"}]
    return run_blocks(runnable, folder)


def test_quick_start_serves_version_0_before_and_after_a_promotion(printed: list[str]) -> None:
    line = next(line for line in printed if line.startswith('{"id":"i0001"'))
    answer, _ = json.JSONDecoder().raw_decode(line)  # no newline ends it: others print after it
    assert (answer["version"], answer["live_version"]) == (0, 0)
    assert len(answer["embedding"]) == answer["dim"] == 32
    fetched = [line.split("\t") for line in printed if line.startswith(("i0001\t", "i0002\t"))]
    assert [id for id, _ in fetched] == ["i0001", "i0002"]
    assert all(len(numbers.split()) == 32 for _, numbers in fetched)


def test_client_example_names_the_missing_id_and_the_servable_versions(printed: list[str]) -> None:
    shape = next(line for line in printed if line.startswith("(3, 32)"))
    assert "('no-such-item',) v1-" in shape
    assert "['0: superseded', '1: live']" in printed


def test_guides_train_the_next_version_against_the_live_one(printed: list[str]) -> None:
    text = "\n".join(printed)
    assert "Version 2 is registered: 48 dimensions, compatible with version 1" in text
    assert "Written to shop-csv" in text
    assert "Written to shop-generated" in text


def test_http_guide_plans_a_promotion(printed: list[str]) -> None:
    plan = next(line for line in printed if line.startswith('{"version":1,"snapshot":"v1-'))
    gates = json.loads(plan)["gates"]
    assert [g["name"] for g in gates] == [
        *("lineage", "maps", "snapshot", "finite", "coverage-item", "coverage-user"),
        *("change-1", "change-0", "metric"),
    ]
    assert all(g["passed"] for g in gates)


def test_benchmark_guide_prints_the_table_and_where_the_report_is(printed: list[str]) -> None:
    start = printed.index("toy, protocol strict")
    rows = [line.split()[1] for line in printed[start:] if line.startswith("│")]
    assert rows[:3] == ["Keep-All", "Non-BC", "Post-Affine"]
    assert "Report: report/report.html" in printed


def test_benchmark_guide_shows_a_valid_file(tmp_path: Path) -> None:
    (toml,) = [b for b in blocks("docs/benchmark.md") if b.language == "toml"]
    file = tmp_path / "grocery.toml"
    file.write_text(toml.text)
    assert TrainConfig.load("paper", file).layers == (1, 1, 2, 2, 2)


def test_training_guide_shows_a_valid_file(tmp_path: Path) -> None:
    (toml,) = [b for b in blocks("docs/training.md") if b.language == "toml"]
    file = tmp_path / "train.toml"
    file.write_text(toml.text)
    assert TrainConfig.load(file=file).epochs == 200


def test_every_language_of_a_block_is_one_that_is_run() -> None:
    documents = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    languages = {b.language for document in documents for b in blocks(document)}
    assert languages == {"sh", "python", "toml"}


def _write_csv(folder: Path) -> None:
    interactions, items = synthesize(SynthConfig(users=200, items=100, interactions=2000))
    columns = {
        name: pa.array(["|".join(v) if isinstance(v, list) else v for v in column.to_pylist()])
        for name, column in zip(items.column_names, items.columns, strict=True)
    }
    for name, table in (("interactions", interactions), ("items", pa.table(columns))):
        sink = pa.BufferOutputStream()
        arrow_csv.write_csv(table, sink)
        (folder / f"{name}.csv.gz").write_bytes(gzip.compress(sink.getvalue().to_pybytes()))


def run_blocks(
    runnable: list[Block], folder: Path, places: Mapping[str, str] = MappingProxyType({})
) -> list[str]:
    """Run blocks as one script and return the lines printed; ``places`` stand for other URLs."""
    script = "set -euo pipefail\ntrap 'kill $(jobs -p)' EXIT\n" + "".join(map(as_shell, runnable))
    script = script.replace(". .venv/bin/activate\n", "").replace("8000", str(_free_port()))
    for printed, real in places.items():
        script = script.replace(printed, real)
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


def _environment() -> Mapping[str, str]:
    others = {k: v for k, v in os.environ.items() if not k.startswith("BACKCAST_")}
    return others | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
