"""The service as it is run: its own processes, a real port, the real client."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from starlette.types import Receive, Send
from starlette.types import Scope as ASGIScope

from backcast.client import Client
from backcast.stores import Precision
from backcast.versions import Entity, Scope
from service import wire
from service.app import create_app
from service.wire import Format
from tests.servers import free_port
from tests.service_support import (
    ODD_IDS,
    assert_served,
    bearer,
    client_of,
    publish_ids,
    read_rows,
    running,
    secret_of,
)
from tests.support import Home, as_stored, build_home

START_S, STOP_S, WORKERS = 90, 30, 2
SERVE = [sys.executable, "-c", "from backcast.cli import main; main()", "serve"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Version 0 is live; 1 and 2 can be promoted. All have vectors of odd ids."""
    with build_home(tmp_path_factory.mktemp("home"), bias=True, published=False) as built:
        for version in range(3):
            publish_ids(built, version, ODD_IDS)
        built.promote(0)
        yield built


@pytest.fixture(scope="module")
def url(home: Home) -> Iterator[str]:
    with serving(home, workers=WORKERS) as served:
        yield served


def environment(home: Home, **variables: str) -> dict[str, str]:
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("BACKCAST_")}
    return {
        **inherited,
        "BACKCAST_HOME": str(home.settings.home),
        "BACKCAST_POLL_SECONDS": "0.05",
        "BACKCAST_MAX_BATCH": "8",
        "BACKCAST_GATE_CHANGE": "1e9",
        **variables,
    }


@contextmanager
def serving(home: Home, *, workers: int, **variables: str) -> Iterator[str]:
    """Run ``backcast serve`` and yield its URL."""
    port = free_port()
    log = Path(home.settings.home) / f"service-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*SERVE, "--port", str(port), "--workers", str(workers)],
            env=environment(home, **variables),
            stdout=output,
            stderr=output,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_S
        while not answers(f"{url}/readyz"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield url
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_S)
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx2.get(url).is_success
    except httpx2.TransportError:
        return False


@pytest.mark.parametrize("entity", Entity)
def test_every_id_arrives_as_it_is(home: Home, url: str, entity: Entity) -> None:
    with Client(url, secret_of(home)) as client:
        live = client.get_many(["007"], "live").live_version
        together = client.get_many(ODD_IDS, 0, entity)
        assert together.found.all()
        assert_served(together.vectors, home, ODD_IDS, 0, entity, live=live)
        for id, vector in zip(ODD_IDS, together.vectors, strict=True):
            np.testing.assert_allclose(client.get(id, 0, entity), vector, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", Format)
def test_every_format_is_what_it_says(home: Home, url: str, format: Format) -> None:
    with httpx2.Client(base_url=url, headers=bearer(secret_of(home))) as http:
        body = {"ids": ["007", "nobody"], "version": 0}
        response = http.post("/embeddings/batch", json=body, headers={"Accept": format})
    assert response.headers["content-type"] == format
    assert response.headers["Backcast-Missing"] == "1"


def test_no_read_is_torn_while_versions_change(home: Home, url: str) -> None:
    answers = {live: home.reference(0, ODD_IDS, live=live) for live in range(3)}
    secret, done = secret_of(home), threading.Event()

    def read() -> set[int]:
        seen = set()
        with Client(url, secret) as client:
            while not done.is_set():
                result = client.get_many(ODD_IDS, 0)
                seen.add(result.live_version)
                expected = answers[result.live_version]
                np.testing.assert_allclose(result.vectors, expected, atol=1e-4)
        return seen

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        for version in (1, 2, 0, 1, 2, 0):
            home.promote(version, force=True, reason="round and round")
            time.sleep(0.3)
        done.set()
    assert set.union(*(reader.result() for reader in readers)) == {0, 1, 2}


@pytest.mark.long
def test_no_answer_is_torn_by_a_swap_every_50_ms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "_NUMBERS", 64)  # JSON goes out in a hundred pieces
    states: dict[str, Any] = {}
    done = threading.Event()
    with build_home(tmp_path, dims=(8, 12, 16), bias=True, items=800, live=1) as home:
        service = create_app(home.settings.model_copy(update={"poll_seconds": 3600.0}))

        async def app(scope: ASGIScope, receive: Receive, send: Send) -> None:
            states.update(scope.get("state", {}))
            await service(scope, receive, send)

        ids, secret = home.ids(version=1), secret_of(home)
        expected = {str(live): home.reference(0, ids, live=live) for live in (1, 2)}

        def read(url: str, format: Format) -> set[str]:
            seen = set()
            headers = {**bearer(secret), "Accept": format}
            with httpx2.Client(base_url=url, headers=headers) as http:
                while not done.is_set():
                    many = http.post("/embeddings/batch", json={"ids": ids, "version": 0})
                    one = http.get("/embeddings/item 7?version=0")
                    for answer, rows in ((many, slice(None)), (one, slice(7, 8))):
                        live = answer.headers["Backcast-Live-Version"]
                        assert answer.headers["Backcast-Snapshot"].startswith(f"v{live}-")
                        np.testing.assert_allclose(
                            read_rows(answer), expected[live][rows], atol=1e-4
                        )
                        seen.add(live)
            return seen

        with running(app) as url, ThreadPoolExecutor(4) as pool:
            assert answers(f"{url}/readyz")
            engine = states["service"].engine
            views = [engine.view]
            home.promote(2)
            engine.refresh()
            views.append(engine.view)
            readers = [pool.submit(read, url, format) for format in (*Format, Format.JSON)]
            for swap in range(400):
                engine._view = views[swap % 2]
                time.sleep(0.05)
            done.set()
            assert [reader.result() for reader in readers] == [{"1", "2"}] * 4


def test_every_worker_follows_a_promotion(home: Home, url: str) -> None:
    with Client(url, secret_of(home, Scope.ADMIN)) as client:
        live = client.get_many(["007"], "live").live_version
        operation = client.promote(1, live, force=True, reason="once more")
        deadline = time.monotonic() + 30
        while operation["state"] not in {"succeeded", "failed"}:
            assert time.monotonic() < deadline
            operation = client.operation(operation["id"])
        assert operation["result"]["live_version"] == 1
    followed = 0
    while followed < 20:  # new connections, which the workers share between them
        assert time.monotonic() < deadline
        followed = followed + 1 if httpx2.get(f"{url}/readyz").json()["live_version"] == 1 else 0


@pytest.mark.parametrize("precision", Precision)
def test_answers_are_the_arithmetic_on_what_is_stored(
    tmp_path: Path, backends: dict[str, Any], precision: Precision
) -> None:
    with (
        build_home(tmp_path, bias=True, live=2, store_precision=precision, **backends) as home,
        client_of(home) as client,
    ):
        for rows in home.vectors[2].values():
            rows.update({id: as_stored(vector, precision) for id, vector in rows.items()})
        for entity, format, version in itertools.product(Entity, Format, range(3)):
            ids = home.ids(entity, version=2)
            body = {"ids": ids, "version": version, "entity": entity}
            accept = {"Accept": format}
            many = client.post("/embeddings/batch", json=body, headers=accept)
            assert_served(read_rows(many), home, ids, version, entity, live=2)
            path = f"/embeddings/{ids[0]}?version={version}&entity={entity}"
            one = client.get(path, headers=accept)
            assert_served(read_rows(one), home, ids[:1], version, entity, live=2)


def test_port_that_is_taken_is_one_line(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = subprocess.run(
            [*SERVE, "--port", str(taken.getsockname()[1])],
            env=environment(home),
            capture_output=True,
            text=True,
            timeout=START_S,
        )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: 127.0.0.1:")
    assert ended.stderr.count("\n") == 1
