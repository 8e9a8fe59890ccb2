"""The metrics of a service with several workers, whichever of them is scraped."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest

from tests.integration.test_service import SERVE, START_S, STOP_S, answers, environment
from tests.metrics_support import Samples, scrape, value
from tests.servers import free_port
from tests.service_support import bearer, secret_of
from tests.support import Home, build_home

WORKERS = 2
COUNTED = "backcast_requests_total"
ONE = {"route": "/embeddings/{id}", "status": "200"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with build_home(tmp_path_factory.mktemp("home"), live=1) as built:
        yield built


@dataclass(frozen=True)
class Service:
    """A running ``backcast serve``: its URL, its process, and where its temporary files lie."""

    url: str
    pid: int
    folder: Path


@pytest.fixture(scope="module")
def service(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder, port = tmp_path_factory.mktemp("temporary"), free_port()
    log = Path(home.settings.home) / "service.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*SERVE, "--port", str(port), "--workers", str(WORKERS)],
            env={**environment(home), "TMPDIR": str(folder)},
            stdout=output,
            stderr=output,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_S
        while not answers(f"{url}/readyz") or living(url) < WORKERS:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Service(url, process.pid, folder)
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_S)
        assert "Traceback" not in log.read_text()
        assert not list(folder.iterdir())
    finally:
        process.kill()
        process.wait()


def living(url: str) -> float:
    return value(scrape(url), "backcast_workers")


def ask(url: str, home: Home, times: int) -> None:
    """Ask for one vector, every time on a new connection, so that every worker has some to answer.

    A key that a worker has not seen goes the long way, and then the short one.
    """
    headers = bearer(secret_of(home))
    for _ in range(times):
        response = httpx2.get(f"{url}/embeddings/item 1?version=0", headers=headers, timeout=30)
        assert response.status_code == 200


def settled(url: str, expected: float) -> Samples:
    """Return a scrape when every worker has written what it counted, all summing up."""
    deadline = time.monotonic() + 30
    while value(samples := scrape(url), COUNTED, **ONE) != expected:
        assert value(samples, COUNTED, **ONE) < expected
        assert time.monotonic() < deadline, samples
        time.sleep(0.1)
    return samples


def workers_of(parent: int) -> list[int]:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [pid for pid in map(int, children) if "spawn_main" in command(pid)]


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def kill_one_of(service: Service) -> int:
    killed = workers_of(service.pid)[0]
    os.kill(killed, signal.SIGKILL)
    return killed


def test_every_worker_tells_of_all(home: Home, service: Service) -> None:
    ask(service.url, home, 60)
    settled(service.url, 60)
    for _ in range(20):  # new connections, which the workers share between them
        samples = scrape(service.url)
        assert value(samples, COUNTED, **ONE) == 60
        assert value(samples, "backcast_vectors_total", version="0", format="json") == 60
        assert value(samples, "backcast_workers") == WORKERS
        assert value(samples, "backcast_worker_starts_total") == WORKERS


def test_what_a_killed_worker_has_counted_stays(home: Home, service: Service) -> None:
    before = value(scrape(service.url), COUNTED, **ONE)
    killed = kill_one_of(service)
    deadline = time.monotonic() + START_S
    while living(service.url) < WORKERS or killed in workers_of(service.pid):
        assert value(scrape(service.url), COUNTED, **ONE) == before
        assert time.monotonic() < deadline
        time.sleep(0.1)
    ask(service.url, home, 40)
    settled(service.url, before + 40)
    while value(scrape(service.url), "backcast_worker_starts_total") < WORKERS + 1:
        assert time.monotonic() < deadline  # it holds the file, and has not written it yet
        time.sleep(0.1)
    (shared,) = service.folder.iterdir()
    assert len(list(shared.glob("*.json"))) == WORKERS  # the new one took the file over


def test_nothing_that_was_shown_is_taken_back(home: Home, service: Service) -> None:
    before = seen = value(scrape(service.url), COUNTED, **ONE)
    for round in range(30):
        ask(service.url, home, 3)
        if round == 15:
            kill_one_of(service)
            time.sleep(0.2)
        found = value(scrape(service.url), COUNTED, **ONE)
        assert seen <= found <= before + 3 * (round + 1)
        seen = found
