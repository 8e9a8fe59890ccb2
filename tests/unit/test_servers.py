"""Which server the tests get, and that they leave nothing behind on it."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from sqlalchemy import make_url

from tests import servers
from tests.servers import DATABASE_VARIABLE, REDIS_VARIABLE, ServerUnavailable


def execute(url: str, statement: str) -> list[Any]:
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        cursor = connection.execute(statement)
        return [row[0] for row in cursor] if cursor.description else []


def databases(url: str) -> set[str]:
    return set(execute(url, "SELECT datname FROM pg_database"))


def database(url: str) -> str:
    return make_url(url).database or ""


def port(url: str) -> int:
    return make_url(url).port or 0


def script(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    path.chmod(0o755)


@pytest.fixture(scope="module")
def local_postgres() -> Iterator[str]:
    """A server that stands in for the one on the default port, by the URL of its own database."""
    with servers.postgres(environ={}, port=servers.free_port()) as url:
        yield make_url(url).set(database="postgres").render_as_string()


@pytest.fixture
def local_redis() -> Iterator[str]:
    with servers.redis(environ={}, port=servers.free_port()) as url:
        yield url


@pytest.fixture
def redis_client(local_redis: str) -> Iterator[Redis]:
    with Redis.from_url(local_redis, decode_responses=True) as client:
        yield client


@pytest.fixture
def programs() -> Iterator[Path]:
    """A folder of programs that the servers' user may enter, unlike pytest's."""
    with TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_named_postgres_wins(local_postgres: str) -> None:
    environ = {DATABASE_VARIABLE: local_postgres}
    with servers.postgres(environ=environ, port=servers.free_port()) as url:
        assert port(url) == port(local_postgres)
        assert database(url) in databases(local_postgres)
    assert database(url) not in databases(local_postgres)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql"])
def test_named_postgres_needs_no_driver(local_postgres: str, scheme: str) -> None:
    named = make_url(local_postgres).set(drivername=scheme).render_as_string()
    with servers.postgres(environ={DATABASE_VARIABLE: named}) as url:
        assert url.startswith("postgresql+psycopg://")


def test_default_postgres_is_used_in_a_database_of_its_own(local_postgres: str) -> None:
    before = databases(local_postgres)
    # An empty variable, as a Makefile passes on, names nothing.
    with servers.postgres(environ={DATABASE_VARIABLE: ""}, port=port(local_postgres)) as url:
        assert databases(local_postgres) - before == {database(url)}
        assert execute(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'") == []
    assert databases(local_postgres) == before


def test_database_is_dropped_under_an_open_connection(local_postgres: str) -> None:
    with ExitStack() as connections:
        with servers.postgres(environ={}, port=port(local_postgres)) as url:
            connections.enter_context(psycopg.connect(url.replace("+psycopg", "")))
        assert database(url) not in databases(local_postgres)


def test_two_postgres_at_once_are_different(local_postgres: str) -> None:
    with (
        servers.postgres(environ={}, port=port(local_postgres)) as first,
        servers.postgres(environ={}, port=port(local_postgres)) as second,
    ):
        execute(first, "CREATE TABLE only_in_first ()")
        assert execute(second, "SELECT to_regclass('only_in_first')") == [None]


def test_private_postgres_starts_and_stops() -> None:
    unused = servers.free_port()
    with servers.postgres(environ={}, port=unused) as url:
        assert port(url) != unused
        assert execute(url, "SELECT 1") == [1]
        assert execute(url, "SHOW listen_addresses") == ["127.0.0.1"]
        [data] = execute(url, "SHOW data_directory")
        assert Path(data).parent.name.startswith("backcast-")
    with pytest.raises(psycopg.OperationalError, match="refused"):
        execute(url, "SELECT 1")
    assert not Path(data).parent.exists()


def test_default_postgres_that_lets_nobody_in_gives_way(local_postgres: str) -> None:
    keeper = make_url(local_postgres).set(username="keeper").render_as_string()
    execute(local_postgres, "CREATE ROLE keeper SUPERUSER LOGIN")
    execute(keeper, "ALTER ROLE postgres NOLOGIN")
    try:
        with servers.postgres(environ={}, port=port(local_postgres)) as url:
            assert port(url) != port(local_postgres)
    finally:
        execute(keeper, "ALTER ROLE postgres LOGIN")


def test_named_postgres_must_answer() -> None:
    address = f"127.0.0.1:{servers.free_port()}/backcast"
    environ = {DATABASE_VARIABLE: f"postgresql://someone:s3cret@{address}"}
    with pytest.raises(ServerUnavailable) as caught, servers.postgres(environ=environ):
        pass
    named = f"{DATABASE_VARIABLE} names postgresql://someone:***@{address}"
    assert str(caught.value).startswith(named)
    assert "s3cret" not in str(caught.value)


def test_named_postgres_must_let_its_role_create_databases(local_postgres: str) -> None:
    execute(local_postgres, "CREATE ROLE reader LOGIN")
    environ = {
        DATABASE_VARIABLE: make_url(local_postgres).set(username="reader").render_as_string()
    }
    refused = pytest.raises(ServerUnavailable, match=r"//reader@.*permission denied to create")
    with refused, servers.postgres(environ=environ, port=port(local_postgres)):
        pass


def test_named_postgres_must_be_a_url() -> None:
    refused = pytest.raises(ServerUnavailable, match=f"{DATABASE_VARIABLE} names somewhere,")
    with refused, servers.postgres(environ={DATABASE_VARIABLE: "somewhere"}):
        pass


def test_named_redis_wins(local_redis: str) -> None:
    environ = {REDIS_VARIABLE: local_redis}
    with servers.redis(environ=environ, port=servers.free_port()) as url:
        assert url == local_redis


def test_every_worker_of_a_test_run_has_a_redis_database(local_redis: str) -> None:
    first = {REDIS_VARIABLE: local_redis, "PYTEST_XDIST_WORKER": "gw0"}
    third = {REDIS_VARIABLE: local_redis, "PYTEST_XDIST_WORKER": "gw2"}
    with servers.redis(environ=first) as url, servers.redis(environ=third) as other:
        server, _, number = local_redis.rpartition("/")
        assert (url, other) == (local_redis, f"{server}/{int(number) + 2}")


def test_default_redis_is_used_in_a_database_of_its_own(
    local_redis: str, redis_client: Redis
) -> None:
    redis_client.set("theirs", "stays")
    with (
        servers.redis(environ={REDIS_VARIABLE: ""}, port=port(local_redis)) as url,
        Redis.from_url(url) as client,
    ):
        assert url == f"redis://127.0.0.1:{port(local_redis)}/15"
        assert client.dbsize() == 0
        client.set("ours", "goes")
    assert redis_client.keys() == ["theirs"]
    assert redis_client.info("keyspace").keys() == {"db0"}


def test_default_redis_skips_databases_in_use(local_redis: str) -> None:
    occupied = f"redis://127.0.0.1:{port(local_redis)}/15"
    with Redis.from_url(occupied, decode_responses=True) as client:
        client.set("theirs", "stays")
        with servers.redis(environ={}, port=port(local_redis)) as url:
            assert database(url) == "14"
        assert client.keys() == ["theirs"]


def test_two_redis_at_once_are_different(local_redis: str) -> None:
    with (
        servers.redis(environ={}, port=port(local_redis)) as first,
        servers.redis(environ={}, port=port(local_redis)) as second,
    ):
        assert [database(first), database(second)] == ["15", "14"]


def test_claim_expires(local_redis: str, redis_client: Redis) -> None:
    with servers.redis(environ={}, port=port(local_redis)):
        [claim] = redis_client.keys()
        assert 0 < redis_client.ttl(claim) <= servers.CLAIM_S


def test_private_redis_starts_and_stops() -> None:
    unused = servers.free_port()
    with servers.redis(environ={}, port=unused) as url, Redis.from_url(url) as client:
        assert port(url) != unused
        assert client.ping()
        settings = client.config_get("bind", "save", "appendonly", "maxmemory-policy", "dir")
        folder = Path(settings.pop("dir"))
        assert settings == {
            "bind": "127.0.0.1",
            "save": "",
            "appendonly": "no",
            "maxmemory-policy": "noeviction",
        }
    with Redis.from_url(url) as client, pytest.raises(RedisConnectionError, match="refused"):
        client.ping()
    assert not folder.exists()


def test_default_redis_that_evicts_gives_way(local_redis: str, redis_client: Redis) -> None:
    redis_client.config_set("maxmemory-policy", "allkeys-lru")
    with servers.redis(environ={}, port=port(local_redis)) as url:
        assert port(url) != port(local_redis)


def test_default_redis_that_asks_for_a_password_gives_way(
    local_redis: str, redis_client: Redis
) -> None:
    redis_client.config_set("requirepass", "s3cret")
    with servers.redis(environ={}, port=port(local_redis)) as url:
        assert port(url) != port(local_redis)


def test_default_redis_that_is_none_gives_way(local_postgres: str) -> None:
    with servers.redis(environ={}, port=port(local_postgres)) as url:
        assert port(url) != port(local_postgres)


def test_named_redis_must_answer() -> None:
    address = f"127.0.0.1:{servers.free_port()}/3"
    environ = {REDIS_VARIABLE: f"redis://:s3cret@{address}"}
    with pytest.raises(ServerUnavailable) as caught, servers.redis(environ=environ):
        pass
    assert str(caught.value).startswith(f"{REDIS_VARIABLE} names redis://:***@{address}")
    assert "s3cret" not in str(caught.value)


def test_named_redis_must_be_empty(local_redis: str, redis_client: Redis) -> None:
    redis_client.set("theirs", "stays")
    refused = pytest.raises(ServerUnavailable, match=f"{REDIS_VARIABLE} .* not empty")
    with refused, servers.redis(environ={REDIS_VARIABLE: local_redis}):
        pass
    assert redis_client.keys() == ["theirs"]


def test_named_redis_is_flushed_at_the_end(local_redis: str, redis_client: Redis) -> None:
    with servers.redis(environ={REDIS_VARIABLE: local_redis}):
        redis_client.set("ours", "goes")
    assert redis_client.keys() == []


def test_named_redis_must_be_a_url() -> None:
    refused = pytest.raises(ServerUnavailable, match=f"{REDIS_VARIABLE} names somewhere,")
    with refused, servers.redis(environ={REDIS_VARIABLE: "somewhere"}):
        pass


def test_missing_postgres_says_what_to_do(programs: Path) -> None:
    advice = rf"no postgres .* apt-get install postgresql\) .* in {DATABASE_VARIABLE}"
    missing = pytest.raises(ServerUnavailable, match=advice)
    with missing, servers.postgres(environ={}, port=servers.free_port(), search=[str(programs)]):
        pass


def test_missing_redis_says_what_to_do(programs: Path) -> None:
    advice = rf"no redis-server .* apt-get install redis-server\) .* in {REDIS_VARIABLE}"
    missing = pytest.raises(ServerUnavailable, match=advice)
    with missing, servers.redis(environ={}, port=servers.free_port(), search=[str(programs)]):
        pass


def test_only_root_installs(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(programs / "apt-get", f"touch {programs}/called")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    missing = pytest.raises(ServerUnavailable, match="no redis-server")
    with missing, servers.redis(environ={}, port=servers.free_port(), search=[str(programs)]):
        pass
    assert not (programs / "called").exists()


def test_root_installs_the_package(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The folder of the program appears with the package, as PostgreSQL's does on Debian.
    script(
        programs / "apt-get",
        f'echo "$DEBIAN_FRONTEND: $*" >> {programs}/calls',
        f"mkdir -p {programs}/7/bin && touch {programs}/7/bin/redis-server",
        f"chmod +x {programs}/7/bin/redis-server",
    )
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    search = [str(programs), f"{programs}/*/bin"]
    assert servers.find_program("redis-server", search) is None
    found = servers.installed_program("redis-server", "redis-server", REDIS_VARIABLE, search)
    assert found == programs / "7/bin/redis-server"
    assert (programs / "calls").read_text().splitlines() == [
        "noninteractive: update",
        "noninteractive: install -y --no-install-recommends redis-server",
    ]


def test_package_is_unpacked_and_not_installed(programs: Path, tmp_path: Path) -> None:
    script(programs / "apt-get", f'echo "$*" >> {programs}/calls')
    asked = ("promtool", "prometheus", tmp_path, [str(programs)])
    with pytest.raises(ServerUnavailable, match=r"no promtool to start: .* install prometheus"):
        servers.unpacked_program(*asked)
    assert (programs / "calls").read_text().splitlines() == ["update", "download prometheus"]
    unpacked = tmp_path / "prometheus/usr/bin/promtool"
    unpacked.parent.mkdir(parents=True)
    script(unpacked)
    assert servers.unpacked_program(*asked) == unpacked


def test_newest_version_is_found_first(programs: Path) -> None:
    for version in ("9.6", "15", "9.10"):
        folder = programs / version / "bin"
        folder.mkdir(parents=True)
        script(folder / "postgres")
    assert servers.find_program("postgres", [f"{programs}/*/bin"]) == programs / "15/bin/postgres"


def test_postgres_that_cannot_start_shows_its_log(programs: Path) -> None:
    script(programs / "postgres")
    script(programs / "initdb", "echo no space left", "exit 1")
    failed = pytest.raises(ServerUnavailable, match=r"initdb failed:\nno space left")
    with failed, servers.postgres(environ={}, port=servers.free_port(), search=[str(programs)]):
        pass


def test_redis_that_cannot_start_shows_its_log(programs: Path) -> None:
    script(programs / "redis-server", "seq 1 100", "exit 1")
    failed = pytest.raises(ServerUnavailable, match=r"redis-server failed:\n81\n82\n[^z]*\n100$")
    with failed, servers.redis(environ={}, port=servers.free_port(), search=[str(programs)]):
        pass
