"""``backcast serve`` is told to stop while it has much to do: nobody is cut off."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import httpx2
import orjson
import pytest

from backcast.registry.database import utc_now
from backcast.versions import Scope
from tests.servers import free_port
from tests.service_support import bearer, secret_of
from tests.support import Home, build_home

START_S, STOP_S = 90, 60
SINGLE = "/embeddings/item 0?version=0"
BODY = orjson.dumps({"ids": ["item 0"] * 2000, "version": 0})


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with build_home(tmp_path, live=1) as built:
        yield built


@dataclass(frozen=True)
class Service:
    """A running ``backcast serve`` and what may read from it."""

    process: subprocess.Popen[bytes]
    port: int
    headers: dict[str, str]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def half_a_batch(self) -> socket.socket:
        """Begin a batch, whose body lacks its end."""
        lines = ["POST /embeddings/batch HTTP/1.1", "Host: a", f"Content-Length: {len(BODY)}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        client = socket.create_connection(("127.0.0.1", self.port), timeout=STOP_S)
        client.sendall("\r\n".join([*lines, "", ""]).encode() + BODY[:-1])
        return client


@contextmanager
def serving(home: Home, *, workers: int = 1, **settings: object) -> Iterator[Service]:
    port, log = free_port(), home.settings.home / "service.log"
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("BACKCAST_")}
    chosen = {f"BACKCAST_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-m", "backcast", "serve", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--workers", str(workers)],
            env={**inherited, "BACKCAST_HOME": str(home.settings.home), **chosen},
            stdout=output,
            stderr=output,
        )
    try:
        service = Service(process, port, bearer(secret_of(home, Scope.READ)), log)
        deadline = time.monotonic() + START_S
        while not is_ready(service.url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield service
    finally:
        process.kill()
        process.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz").is_success
    except httpx2.TransportError:
        return False


def read_to_the_end(client: socket.socket) -> bytes:
    answer = b""
    while piece := client.recv(1 << 20):
        answer += piece
    return answer


def batch_of(client: socket.socket) -> list[object]:
    """Send the end of a batch that was begun, and return the rows of its answer."""
    client.sendall(BODY[-1:])
    head, _, body = read_to_the_end(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"connection: close" in head
    rows: list[object] = orjson.loads(body)["embeddings"]
    return rows


def wait_until_nobody_listens(port: int) -> None:
    deadline = time.monotonic() + STOP_S
    with suppress(ConnectionRefusedError):
        while time.monotonic() < deadline:
            socket.create_connection(("127.0.0.1", port), timeout=STOP_S).close()
            time.sleep(0.05)
        pytest.fail("it listens still")


@pytest.mark.parametrize("workers", [1, 2])
def test_everybody_is_answered_in_full(home: Home, workers: int) -> None:
    """Readers that go elsewhere when a proxy would send them, and a batch that takes its time."""
    told = threading.Event()

    def read() -> int:
        served = 0
        with httpx2.Client(base_url=service.url, headers=service.headers) as http:
            while not told.is_set():
                response = http.get(SINGLE)
                assert response.status_code == 200, response.text
                served += 1
        return served

    def look() -> str:
        while True:
            response = httpx2.get(f"{service.url}/readyz")
            if response.status_code == 503:
                told.set()
                return str(response.json()["type"])
            time.sleep(0.02)

    with (
        serving(home, workers=workers, drain_seconds=3, body_seconds=60) as service,
        ThreadPoolExecutor(5) as pool,
        closing(service.half_a_batch()) as batch,
    ):
        readers, proxy = [pool.submit(read) for _ in range(4)], pool.submit(look)
        time.sleep(0.5)
        service.stop()
        assert proxy.result() == "urn:backcast:problem:draining"
        served = sum(reader.result() for reader in readers)
        wait_until_nobody_listens(service.port)
        assert len(batch_of(batch)) == 2000
        service.process.wait(STOP_S)
        assert "Traceback" not in service.log.read_text()
    [use] = home.backcast.registry.usage.since(utc_now().date() - timedelta(days=1))
    assert (use.requests, use.vectors) == (served + 1, served + 2000)


def test_who_hammers_on_is_served_or_finds_nobody(home: Home) -> None:
    """What was counted as answered has come, in full, until nobody listens any more."""
    gone: list[int] = []

    def hammer() -> int:
        served = 0
        while True:
            try:
                with httpx2.Client(base_url=service.url, headers=service.headers) as http:
                    while True:
                        response = http.get(SINGLE)
                        assert response.status_code == 200, response.text
                        assert len(response.json()["embedding"]) == 4
                        served += 1
            except httpx2.ConnectError:
                return served
            except (httpx2.ReadError, httpx2.RemoteProtocolError):
                gone.append(1)  # it came when the queue of connections was closed

    with serving(home, drain_seconds=0.5) as service, ThreadPoolExecutor(4) as pool:
        hammers = [pool.submit(hammer) for _ in range(4)]
        time.sleep(0.5)
        service.stop()
        served = sum(one.result() for one in hammers)
        service.process.wait(STOP_S)
        assert "Traceback" not in service.log.read_text()
    [use] = home.backcast.registry.usage.since(utc_now().date() - timedelta(days=1))
    assert use.requests == served > 0
    assert len(gone) <= 4


@pytest.mark.parametrize("workers", [1, 2])
def test_answers_say_that_the_connection_ends_while_it_drains(home: Home, workers: int) -> None:
    with serving(home, workers=workers, drain_seconds=600) as service:
        with httpx2.Client(base_url=service.url, headers=service.headers) as http:
            assert "connection" not in http.get(SINGLE).headers
            service.stop()
            while http.get("/readyz").status_code == 200:
                time.sleep(0.02)
            last = http.get(SINGLE)
            assert (last.status_code, last.headers["connection"]) == (200, "close")
            assert http.get("/livez").status_code == 200
        service.stop()  # once more: now
        service.process.wait(STOP_S)


def test_what_is_never_finished_is_given_up(home: Home) -> None:
    with (
        serving(home, drain_seconds=0, shutdown_seconds=1) as service,
        closing(service.half_a_batch()) as batch,
    ):
        time.sleep(0.3)
        service.stop()
        service.process.wait(STOP_S)
        assert b"HTTP/1.1 200" not in read_to_the_end(batch)
