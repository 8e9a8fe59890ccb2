"""The serving benchmark at small scale: what it prepares, what it starts, what it prints."""

import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from redis import Redis
from starlette.testclient import TestClient

from backcast.lifecycle import open_backcast
from backcast.settings import Settings
from benchmarks.gpu import TOLERANCE, compare, largest_error, snapshot_on
from benchmarks.serving_bench import Bench, check, vectors_of
from benchmarks.serving_data import Deployment, ids_of, prepare
from benchmarks.serving_load import Unmeasured
from benchmarks.serving_models import MODELS, MODELS_JSON, from_environment
from benchmarks.serving_processes import (
    ROOT,
    backcast_server,
    environment,
    http_server,
    redis_server,
)
from tests.servers import REDIS_VARIABLE, SEARCH, installed_program

ITEMS = 1_500
DIMS = (4, 6, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deployments")


@pytest.fixture(scope="module")
def settings(folder: Path) -> Settings:
    return prepare(folder, Deployment("tiny", DIMS, 2, ITEMS))


@pytest.fixture
def bench(folder: Path) -> Bench:
    return Bench(folder, ITEMS, seconds=0.2, rounds=1, threads=1, large=0, feast=folder / "none")


def script(name: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name), *arguments],
        env=environment(Settings.load(), 1, **more),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


# --- what is prepared -----------------------------------------------------------------------------


def test_a_deployment_serves_its_oldest_version_from_all_items(settings: Settings) -> None:
    ids = ids_of(np.arange(ITEMS))
    vectors = vectors_of(settings, ids)
    assert vectors.shape == (ITEMS, DIMS[0])
    assert np.isfinite(vectors).all()
    assert 0.5 < np.linalg.norm(vectors, axis=1).mean() < 2


def test_vectors_that_are_loaded_directly_are_the_published_ones(
    folder: Path, settings: Settings
) -> None:
    direct = prepare(folder, Deployment("direct", DIMS, 2, ITEMS, published=False))
    ids = ids_of(np.arange(ITEMS))
    assert vectors_of(direct, ids).tobytes() == vectors_of(settings, ids).tobytes()


def test_a_deployment_is_made_once_and_an_unfinished_one_anew(tmp_path: Path) -> None:
    deployment = Deployment("kept", DIMS[:1], 0, 3)
    (tmp_path / ".kept-3").mkdir()
    (tmp_path / ".kept-3" / "registry.db").write_text("half of it")
    registry = prepare(tmp_path, deployment).home / "registry.db"
    made = registry.stat().st_mtime_ns
    assert prepare(tmp_path, deployment).home == registry.parent
    assert registry.stat().st_mtime_ns == made


# --- what is measured against ---------------------------------------------------------------------


def test_the_limit_is_measured_in_a_process_with_fixed_threads(
    bench: Bench, settings: Settings
) -> None:
    limit = bench.limit(settings, 100)
    assert limit.threads == 1
    assert limit.vectors % 100 == 0
    assert limit.gather + limit.product + limit.copy > bench.seconds
    assert limit.rate > 0
    assert 0 < limit.gather_share < 1


@pytest.mark.parametrize("path", [MODELS, MODELS_JSON])
def test_response_models_answer_with_the_same_vectors(
    path: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BACKCAST_HOME", str(settings.home))
    ids = ids_of(np.arange(5))
    with TestClient(from_environment()) as client:
        answer = client.post(path, json={"ids": ids, "version": 0}).json()
    assert answer["ids"] == ids
    served = np.array(answer["embeddings"], np.float32)
    np.testing.assert_allclose(served, vectors_of(settings, ids), rtol=1e-5, atol=1e-6)


# --- servers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(folder: Path) -> Settings:
    return prepare(folder, Deployment("other", (4, 5), 1, ITEMS))


def test_a_server_is_checked_and_looked_at(settings: Settings, other: Settings) -> None:
    ids = ids_of(np.arange(20))
    with backcast_server(environment(settings, 1), workers=2) as server:
        check(settings, server.url, ids)
        with pytest.raises(AssertionError):
            check(other, server.url, ids)
        assert len(server.pids()) >= 3
        assert server.cpu() > 0
        memory = server.memory()
        assert memory.rss > memory.pss > memory.own > 10


def test_a_server_that_ends_is_shown_with_its_last_words() -> None:
    command = [sys.executable, "-c", "raise SystemExit('no, ' + 'thanks')"]
    ended = http_server(command, {}, 1, "/readyz")
    with pytest.raises(Unmeasured, match="no, thanks"), ended:
        pass


def test_a_program_that_is_missing_is_named() -> None:
    with (
        pytest.raises(Unmeasured, match="no-such-server"),
        http_server(["no-such-server"], {}, 1, ""),
    ):
        pass


def test_redis_is_our_own_and_keeps_everything() -> None:
    installed_program("redis-server", "redis-server", REDIS_VARIABLE, SEARCH)
    with redis_server() as url, closing(Redis.from_url(url)) as client:
        assert client.dbsize() == 0
        assert client.info("memory")["maxmemory_policy"] == "noeviction"


# --- the GPU's check ------------------------------------------------------------------------------


def test_the_largest_error_is_within_the_bound_and_a_wrong_weight_is_not(
    settings: Settings,
) -> None:
    ids = ids_of(np.arange(200))
    with open_backcast(settings) as backcast:
        snapshot = snapshot_on(backcast, "cpu")
        assert 0 < largest_error(backcast, snapshot, ids) <= TOLERANCE
        weight = snapshot.maps[0].weight.clone()
        weight[0, 0] += 1e-3
        wrong = replace(snapshot.maps[0], weight=weight)
        spoilt = replace(snapshot, maps={**snapshot.maps, 0: wrong})
        assert largest_error(backcast, spoilt, ids) > TOLERANCE


def test_a_device_is_checked_and_then_timed_by_batch_size(
    settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_backcast(settings) as backcast:
        assert compare(backcast, ids_of(np.arange(100)), "cpu") == 0
    checked, *table = capsys.readouterr().out.splitlines()
    assert checked.startswith("Largest error on the CPU: ")
    cells = [line.split("│")[1:-1] for line in table if line[0] == "│"]
    assert [int(row[0]) for row in cells] == [1, 10, 100]
    assert all(int(cell.replace(",", "")) > 0 for row in cells for cell in row[1:])


def test_without_cuda_nothing_is_measured_on_it() -> None:
    ended = script("gpu.py", CUDA_VISIBLE_DEVICES="")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "There is no CUDA device here, so there is nothing to measure.\n"


# --- the table ------------------------------------------------------------------------------------


def test_the_table_or_how_to_install_what_is_missing(tmp_path: Path) -> None:
    given = ("--items", "2000", "--duration", "1", "--rounds", "1", "--folder", str(tmp_path))
    ended = script("serving.py", *given, "--only", "singles,feast,storage", "--feast", "nowhere")
    if shutil.which("wrk") is None:
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr == "There is no wrk here, which makes the load: apt-get install wrk\n"
        return
    assert ended.returncode == 0, ended.stderr
    machine, servers, *table = ended.stdout.splitlines()
    assert " cores, " in machine
    assert servers.startswith("Servers with OMP_NUM_THREADS=1, ")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table if line[0] == "│"]
    bars = [row[2] for row in rows if "÷ stored" in row[0]]
    assert bars == ["≥ 0.9", "≤ 1.2"] * 2
    assert any("make bench-feast" in row[1] for row in rows)
    assert any(row[0].startswith("bytes stored for versions 0 to 4") for row in rows)


def test_without_wrk_the_benchmark_says_how_to_install_it(tmp_path: Path) -> None:
    given = ("--items", "10", "--folder", str(tmp_path / "new"))
    ended = script("serving.py", *given, PATH=str(tmp_path))
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == "There is no wrk here, which makes the load: apt-get install wrk\n"
    assert not (tmp_path / "new").exists()


def test_an_unknown_row_is_named() -> None:
    ended = script("serving.py", "--only", "singles,sinlges")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("--only: there is no row 'sinlges'; there are singles, key, ")
