"""The registry goes away while the service runs: reads go on, and everything recovers by itself."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from sqlalchemy import Engine, text
from starlette.testclient import TestClient

from backcast.errors import RegistryError
from backcast.registry import Registry, postgres, schema
from backcast.registry.database import Database
from backcast.registry.schema import make_engine, upgrade
from backcast.versions import Scope
from service.wire import Format
from tests import servers
from tests.service_support import assert_served, bearer, client_of, read_rows, secret_of
from tests.support import Home, build_home

LONG_S = 30
WAITED_S = 1.0  # who waits for the registry waits that long, service.auth
STORE_S = 10  # that the store's own connections wait for an answer
STALLS = 2  # reads that a busy machine may have held up as long; who waits, waits again and again


@pytest.fixture(autouse=True)
def _servers_are_waited_for() -> None:
    """As long as they are in a replica."""


@pytest.fixture
def own() -> Iterator[servers.OwnPostgres]:
    with servers.own_postgres() as made:
        yield made


@pytest.fixture
def server(own: servers.OwnPostgres) -> Iterator[servers.Running]:
    with servers.Running(own) as running:
        yield running


@pytest.fixture
def home(own: servers.OwnPostgres, server: servers.Running, tmp_path: Path) -> Iterator[Home]:
    """Version 1 is live; 2 can be promoted."""
    assert server.process.poll() is None
    with build_home(tmp_path, live=1, database_url=own.url) as built:
        yield built


@contextmanager
def refusing(server: servers.Running) -> Iterator[None]:
    """Stop the server; start it again at the end."""
    server.stop()
    yield
    server.start()


@contextmanager
def hanging(server: servers.Running) -> Iterator[None]:
    """Let the server and all of its processes stand still; the kernel goes on answering."""
    pids = [server.process.pid, *children_of(server.process)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def children_of(process: subprocess.Popen[bytes]) -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


AWAY = pytest.mark.parametrize("away", [refusing, hanging])


def read(client: TestClient, home: Home, secret: str) -> int:
    """Read one vector and a batch in every format, each right; return how many were held up."""
    ids, slow = home.ids(version=1), 0
    for format in Format:
        headers = {**bearer(secret), "Accept": format}
        started = time.monotonic()
        one = client.get(f"/embeddings/{ids[0]}?version=0", headers=headers)
        many = client.post("/embeddings/batch", json={"ids": ids, "version": 0}, headers=headers)
        slow += time.monotonic() - started >= WAITED_S
        assert_served(read_rows(one), home, ids[:1], 0, live=1)
        assert_served(read_rows(many), home, ids, 0, live=1)
    return slow


def refused(response: Any, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert response.json()["type"] == f"urn:backcast:problem:{code}"


def eventually(check: Any) -> None:
    deadline = time.monotonic() + LONG_S
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@AWAY
def test_reads_go_on_and_everything_comes_back(
    home: Home, server: servers.Running, away: Any
) -> None:
    known, stranger = secret_of(home), secret_of(home)
    admin = secret_of(home, Scope.ADMIN)
    with client_of(home, key_cache_seconds=2.0, poll_seconds=0.1) as client:
        del client.headers["Authorization"]
        read(client, home, known)
        read(client, home, admin)
        with away(server):
            slow, until = 0, time.monotonic() + 8  # well beyond the time of trust in a key itself
            while time.monotonic() < until:
                slow += read(client, home, known)
                time.sleep(0.05)
            assert slow <= STALLS
            started = time.monotonic()
            refused(client.get("/embeddings/item 0?version=0", headers=bearer(stranger)), 503,
                    "registry-error")  # fmt: skip
            assert time.monotonic() - started < postgres.STATEMENT_S / 2
            for method, path in (
                ("GET", "/admin/deployments"),
                ("GET", "/admin/usage"),
                ("PUT", "/admin/consumers/x"),
                ("POST", "/admin/versions/0/retire"),
                ("POST", "/admin/keys"),
                ("GET", "/admin/audit"),
            ):
                started = time.monotonic()
                response = client.request(method, path, headers=bearer(admin), json={})
                refused(response, 503, "registry-error")
                assert response.headers["Retry-After"] == "1"
                assert time.monotonic() - started < postgres.STATEMENT_S / 2
            assert client.get("/readyz").status_code == 200
            read(client, home, known)
        eventually(
            lambda: client.get("/admin/deployments", headers=bearer(admin)).status_code == 200
        )
        read(client, home, stranger)
        home.backcast.registry.keys.revoke(secret_prefix(known))
        eventually(lambda: client.get("/versions", headers=bearer(known)).status_code == 401)
        home.promote(2)
        eventually(lambda: client.get("/readyz").json()["live_version"] == 2)


def secret_prefix(secret: str) -> str:
    return secret.split("_")[1]


def test_keys_are_not_trusted_for_ever(home: Home, server: servers.Running) -> None:
    known = secret_of(home)
    with client_of(home, key_cache_seconds=0.5, key_outage_seconds=10.0) as client:
        read(client, home, known)
        with refusing(server):
            read(client, home, known)
            eventually(lambda: client.get("/versions", headers=bearer(known)).status_code == 503)
        eventually(lambda: client.get("/versions", headers=bearer(known)).status_code == 200)


def test_expiry_counts_while_the_registry_is_away(home: Home, server: servers.Running) -> None:
    soon = home.backcast.registry.now() + timedelta(seconds=10)
    brief, lasting = secret_of(home, expires_at=soon), secret_of(home)
    with client_of(home, key_cache_seconds=0.5) as client:
        read(client, home, brief)
        read(client, home, lasting)
        with refusing(server):
            eventually(lambda: client.get("/versions", headers=bearer(brief)).status_code != 200)
            expired = client.get("/versions", headers=bearer(brief))
            refused(expired, 401, "unauthorized")
            assert "has expired" in expired.json()["detail"]
            read(client, home, lasting)


def test_service_starts_again_only_with_its_registry(home: Home, server: servers.Running) -> None:
    with refusing(server), pytest.raises(RegistryError), client_of(home):
        pass
    with client_of(home) as client:
        assert client.get("/readyz").status_code == 200


def test_counts_wait_for_the_registry(home: Home, server: servers.Running) -> None:
    secret = secret_of(home)
    with client_of(home, usage_seconds=0.2) as client:
        for _ in range(3):
            client.get("/embeddings/item 0?version=0", headers=bearer(secret))
        with refusing(server):
            for _ in range(4):
                client.get("/embeddings/item 0?version=0", headers=bearer(secret))
            time.sleep(1)
    counted = home.backcast.registry.usage.since(today(home), 0)
    assert [(use.requests, use.vectors) for use in counted] == [(7, 7)]


def today(home: Home) -> Any:
    return home.backcast.registry.versions.get(0).created_at.date()


class TestLimits:
    """Nothing waits longer than it says."""

    @pytest.fixture
    def engine(
        self,
        own: servers.OwnPostgres,
        server: servers.Running,
        monkeypatch: pytest.MonkeyPatch,
    ) -> Iterator[Engine]:
        assert server.process.poll() is None
        monkeypatch.setattr(postgres.PatientConnection, "patience", 1.0)
        made = make_engine(own.url)
        upgrade(made)
        yield made
        made.dispose()

    def test_statement_on_a_server_that_hangs(
        self, engine: Engine, server: servers.Running
    ) -> None:
        registry = Registry(engine)
        assert registry.deployments.live() is None
        with hanging(server):
            started = time.monotonic()
            with pytest.raises(RegistryError, match="does not answer"):
                registry.deployments.live()
            assert time.monotonic() - started < LONG_S
        assert registry.deployments.live() is None

    def test_transaction_on_a_server_that_hangs_in_the_middle(
        self, engine: Engine, server: servers.Running
    ) -> None:
        database = Database(engine)

        def make_half(stack: ExitStack) -> None:
            with database.write() as connection:
                connection.execute(text("CREATE TABLE half (value INTEGER)"))
                stack.enter_context(hanging(server))
                connection.execute(text("SELECT 1"))

        with ExitStack() as stack, pytest.raises(RegistryError, match="no answer within 1 s"):
            make_half(stack)
        with database.read() as connection:
            found = text("SELECT count(*) FROM pg_tables WHERE tablename = 'half'")
            assert connection.scalar(found) == 0

    def test_migration_takes_its_time(self, engine: Engine) -> None:
        with schema._migrating(engine) as config:
            connection = config.attributes["connection"]
            assert connection.scalar(text("SHOW statement_timeout")) == "0"
            connection.execute(text("SELECT pg_sleep(1.5)"))
        with pytest.raises(RegistryError), Database(engine).read() as connection:
            connection.execute(text("SELECT pg_sleep(1.5)"))

    @pytest.mark.parametrize(
        ("query", "timeout"),
        [("", "10s"), ("?options=-c%20statement_timeout%3D77s&connect_timeout=9", "77s")],
    )
    def test_the_server_is_told_unless_the_url_says_otherwise(
        self, own: servers.OwnPostgres, engine: Engine, query: str, timeout: str
    ) -> None:
        assert engine.url.host == "127.0.0.1"
        other = make_engine(own.url + query)
        with other.connect() as connection:
            assert connection.scalar(text("SHOW statement_timeout")) == timeout
        other.dispose()


class TestStoreIsLost:
    def test_readiness_notices_a_store_that_was_emptied(
        self, tmp_path: Path, empty_redis: str
    ) -> None:
        with (
            build_home(tmp_path, live=1, store_url=empty_redis) as home,
            client_of(home) as client,
        ):
            assert client.get("/readyz").status_code == 200
            with Redis.from_url(empty_redis) as redis:
                redis.flushdb()
            refused(client.get("/readyz"), 503, "snapshot-not-loaded")
            home.promote(1)
            assert client.get("/readyz").status_code == 200

    def test_readiness_waits_for_no_store_that_hangs(self, tmp_path: Path) -> None:
        with (
            servers.own_redis() as own,
            own.running() as process,
            build_home(tmp_path, live=1, store_url=own.url) as home,
            client_of(home) as client,
        ):
            os.kill(process.pid, signal.SIGSTOP)
            try:
                started = time.monotonic()
                refused(client.get("/readyz"), 503, "store-error")
                assert client.get("/livez").status_code == 200
                assert time.monotonic() - started < STORE_S
            finally:
                os.kill(process.pid, signal.SIGCONT)
            eventually(lambda: client.get("/readyz").status_code == 200)
