"""Servers, and settings that no variable of the outside reaches."""

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
from redis import Redis
from sqlalchemy import delete, text

from backcast.registry.schema import make_engine, upgrade
from backcast.registry.tables import audit, audit_outcomes, metadata
from service import auth
from service.routes import health
from tests import servers

hypothesis.settings.register_profile("backcast", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("backcast")


@pytest.fixture(autouse=True)
def _settings_are_the_tests_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("BACKCAST_") and not name.startswith("BACKCAST_TEST_"):
            monkeypatch.delenv(name)
    # Most vectors and maps of the tests are random, so that promotions change everything.
    monkeypatch.setenv("BACKCAST_GATE_COVERAGE", "0")
    monkeypatch.setenv("BACKCAST_GATE_CHANGE", "1e9")


@pytest.fixture(autouse=True)
def _servers_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # They answer, if not at once where a machine is busy. Tests of those that do not override this.
    monkeypatch.setattr(auth, "_PATIENCE_S", 30.0)
    monkeypatch.setattr(health, "_PROBE_S", 30.0)


@pytest.fixture(scope="session", autouse=True)
def _nothing_waits_for_the_disk() -> Iterator[None]:
    # No test cuts the power, and a killed process loses nothing that it has written. Waiting for
    # the disk would take most of the time; that it is asked to sync is tested where it matters.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The session's PostgreSQL; take ``new_postgres`` or ``empty_registry`` to write to it."""
    with servers.postgres() as url:
        yield url


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The session's Redis database; take ``empty_redis`` to find nothing in it."""
    with servers.redis() as url:
        yield url


@pytest.fixture
def new_postgres(postgres_url: str) -> Iterator[str]:
    """A PostgreSQL database of the test's own, without a schema."""
    with servers.postgres(environ={servers.DATABASE_VARIABLE: postgres_url}) as url:
        yield url


@pytest.fixture(scope="session")
def _registry(postgres_url: str) -> Iterator[str]:
    with servers.postgres(environ={servers.DATABASE_VARIABLE: postgres_url}) as url:
        engine = make_engine(url)
        upgrade(engine)
        engine.dispose()
        yield url


@pytest.fixture
def empty_registry(_registry: str) -> str:
    """A PostgreSQL database with this release's schema and no rows."""
    engine = make_engine(_registry)
    with engine.begin() as connection:
        # Nobody may empty the audit log but who owns its tables, and says so.
        for log in (audit, audit_outcomes):
            connection.execute(text(f"ALTER TABLE {log} DISABLE TRIGGER USER"))
        for table in reversed(metadata.sorted_tables):  # few rows: faster than TRUNCATE
            connection.execute(delete(table))
        for log in (audit, audit_outcomes):
            connection.execute(text(f"ALTER TABLE {log} ENABLE TRIGGER USER"))
    engine.dispose()
    return _registry


@pytest.fixture
def empty_redis(redis_url: str) -> str:
    """The session's Redis database, emptied."""
    with Redis.from_url(redis_url) as client:
        client.flushdb()
    return redis_url


@pytest.fixture(params=["sqlite and embedded", "postgresql and redis"])
def backends(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Settings of the two ways to run, one host and many; the default folders of a home, or not."""
    if request.param == "sqlite and embedded":
        return {}
    return {
        "database_url": request.getfixturevalue("empty_registry"),
        "store_url": request.getfixturevalue("empty_redis"),
    }
