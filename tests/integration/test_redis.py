"""The Redis store, and the service on it: outages, restarts, TLS, passwords."""

import logging
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from redis import Redis
from starlette.testclient import TestClient

from backcast.errors import (
    BackcastError,
    ConfigError,
    DimensionMismatch,
    InvalidInput,
    OperationAbandoned,
    SnapshotNotLoaded,
    StoreError,
)
from backcast.lifecycle import load_snapshot, promote
from backcast.stores import Precision
from backcast.stores.redis import RedisStore
from backcast.vectors import VectorBatch
from backcast.versions import Entity
from tests import servers
from tests.service_support import assert_served, client_of, read_rows
from tests.support import Home, build_home

KEPT = ("--appendonly", "yes")
BUSY = """
local function now() local t = redis.call("TIME") return t[1] * 1000 + t[2] / 1000 end
local stop = now() + 300
while now() < stop do end
"""


def vectors(rows: int) -> VectorBatch:
    numbers = np.random.default_rng(0).standard_normal((rows, 4), np.float32)
    return VectorBatch(Entity.ITEM, [f"i{n}" for n in range(rows)], numbers)


def load(store: RedisStore, snapshot: str, rows: int = 1000) -> None:
    store.load(snapshot, 4, {Entity.ITEM: rows}, [vectors(rows)])


def check_whole(store: RedisStore, snapshot: str, rows: int = 1000) -> None:
    answer = store.open(snapshot).gather(Entity.ITEM, vectors(rows).ids)
    assert answer.found.all()
    assert answer.vectors.tobytes() == vectors(rows).vectors.tobytes()


class TestStore:
    def test_restarted_server_is_found_again(self) -> None:
        with servers.own_redis() as plain:
            server = plain.with_options(*KEPT)
            with server.running():
                store = RedisStore(server.url)
                load(store, "s1")
                held = store.open("s1")
            with pytest.raises(StoreError, match="does not answer"):
                held.gather(Entity.ITEM, ["i0"])
            with server.running():
                assert held.gather(Entity.ITEM, ["i0"]).found.all()
                check_whole(store, "s1")
                load(store, "s2")
                store.close()

    def test_connection_that_breaks_in_a_call_is_made_again(self) -> None:
        with servers.own_redis() as server, server.running(), Redis.from_url(server.url) as other:
            store = RedisStore(server.url)
            load(store, "s1")
            held = store.open("s1")
            hangup = other.pipeline(transaction=False)
            hangup.eval(BUSY, 0).client_kill_filter(_type="normal", skipme=True)
            with ThreadPoolExecutor(1) as pool:
                hung_up = pool.submit(hangup.execute)
                while not hung_up.done():  # one of these is asked in time, and never answered
                    assert held.gather(Entity.ITEM, ["i0"]).found.all()
            assert hung_up.result()[1] > 0
            store.close()

    def test_server_killed_during_a_load_leaves_nothing_to_be_seen(self) -> None:
        with servers.own_redis() as plain:
            server = plain.with_options(*KEPT)
            with server.running() as process:
                store = RedisStore(server.url)
                load(store, "s0")

                def cut_short() -> Iterator[VectorBatch]:
                    pieces = vectors(20_000).slices(2000)
                    yield next(pieces)
                    process.kill()
                    process.wait()
                    yield from pieces

                with pytest.raises(StoreError, match="does not answer"):
                    store.load("s1", 4, {Entity.ITEM: 20_000}, cut_short())
            with server.running():
                assert store.snapshots() == ["s0"]
                with pytest.raises(SnapshotNotLoaded):
                    store.open("s1")
                load(store, "s1", 20_000)
                check_whole(store, "s1", 20_000)
                check_whole(store, "s0")
                store.close()

    @pytest.mark.parametrize(
        ("lost", "options"), [("flush", ()), ("restart", ()), ("restart", KEPT)]
    )
    def test_server_that_may_have_lost_keys_of_a_load_is_noticed(
        self, lost: str, options: Sequence[str]
    ) -> None:
        with servers.own_redis() as plain, ExitStack() as stack:
            server = plain.with_options(*options)
            process = stack.enter_context(server.running())
            store = RedisStore(server.url)

            def emptied() -> Iterator[VectorBatch]:
                pieces = vectors(20_000).slices(2000)
                yield next(pieces)
                with Redis.from_url(server.url) as other:
                    while other.dbsize() < 2001:  # all that was sent is there
                        time.sleep(0.01)
                    if lost == "flush":
                        other.flushall()
                if lost == "restart":
                    process.kill()
                    process.wait()
                    stack.enter_context(server.running())
                yield from pieces

            with pytest.raises(StoreError, match="restarted or emptied meanwhile"):
                store.load("s1", 4, {Entity.ITEM: 20_000}, emptied())
            assert store.snapshots() == []
            with Redis.from_url(server.url) as other:
                assert other.dbsize() == 0
            load(store, "s1", 20_000)
            check_whole(store, "s1", 20_000)
            store.close()

    @pytest.mark.parametrize("error", [OperationAbandoned("it was taken over"), InvalidInput("x")])
    def test_load_that_fails_takes_nothing_from_one_that_was_done(
        self, error: BackcastError
    ) -> None:
        with servers.own_redis() as server, server.running():
            store, other = RedisStore(server.url), RedisStore(server.url)

            def overtaken() -> Iterator[VectorBatch]:
                pieces = vectors(1000).slices(250)
                yield next(pieces)
                load(other, "s1")
                yield next(pieces)
                raise error

            with pytest.raises(type(error)):
                store.load("s1", 4, {Entity.ITEM: 1000}, overtaken())
            check_whole(other, "s1")
            assert (other.snapshots(), other.remains()) == (["s1"], [])
            for one in (store, other):
                one.close()

    def test_load_that_another_precision_overtook_writes_no_more(self) -> None:
        with servers.own_redis() as server, server.running():
            store, other = RedisStore(server.url), RedisStore(server.url, Precision.FLOAT16)

            def overtaken() -> Iterator[VectorBatch]:
                pieces = vectors(1000).slices(250)
                yield next(pieces)
                load(other, "s1")
                yield from pieces

            with pytest.raises(
                StoreError, match="s1 was dropped or is loaded at another precision"
            ):
                store.load("s1", 4, {Entity.ITEM: 1000}, overtaken())
            self.check_half(other, "s1", 1000)
            for one in (store, other):
                one.close()

    def test_load_that_is_overtaken_leaves_the_other_alone(self) -> None:
        with servers.own_redis() as server, server.running(), ThreadPoolExecutor(1) as pool:
            store, other = RedisStore(server.url), RedisStore(server.url, Precision.FLOAT16)
            begun, refused, others = Event(), Event(), list[Future[None]]()

            def overtaking() -> Iterator[VectorBatch]:
                pieces = vectors(1000).slices(250)
                yield next(pieces)
                begun.set()
                assert refused.wait(30)
                yield from pieces

            def overtaken() -> Iterator[VectorBatch]:
                pieces = vectors(1000).slices(250)
                yield next(pieces)
                others.append(pool.submit(load_of, overtaking()))
                assert begun.wait(30)
                yield from pieces

            load_of = partial(other.load, "s1", 4, {Entity.ITEM: 1000})
            with pytest.raises(StoreError, match="loaded at another precision"):
                store.load("s1", 4, {Entity.ITEM: 1000}, overtaken())
            refused.set()
            others[0].result(30)
            self.check_half(other, "s1", 1000)
            for one in (store, other):
                one.close()

    @staticmethod
    def check_half(store: RedisStore, snapshot: str, rows: int) -> None:
        held, wanted = store.open(snapshot), vectors(rows).vectors.astype(np.float16)
        answer = held.gather(Entity.ITEM, vectors(rows).ids)
        assert held.rounding.precision is Precision.FLOAT16
        assert answer.vectors.tolist() == wanted.astype(np.float32).tolist()
        assert store.remains() == []

    @pytest.mark.parametrize("other", ["flush", "drop", "wrong"])
    def test_load_that_cannot_be_whole_leaves_no_key(self, other: str) -> None:
        with servers.own_redis() as server, server.running(), Redis.from_url(server.url) as client:
            store, second = RedisStore(server.url), RedisStore(server.url)

            def disturbed() -> Iterator[VectorBatch]:
                pieces = vectors(5000).slices(1000)
                yield next(pieces)
                if other == "drop":
                    second.drop("s1")
                else:
                    client.flushall()
                if other == "wrong":
                    yield VectorBatch(Entity.ITEM, ["i0"], np.zeros((1, 9), np.float32))
                yield from pieces

            with pytest.raises(DimensionMismatch if other == "wrong" else StoreError):
                store.load("s1", 4, {Entity.ITEM: 5000}, disturbed())
            assert client.dbsize() == 0
            for one in (store, second):
                one.close()

    def test_load_in_the_middle_of_a_drop_is_whole_and_ends_that(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with servers.own_redis() as server, server.running():
            store, other = RedisStore(server.url), RedisStore(server.url)
            load(store, "s1", 5000)
            pages = store._keys

            def interrupted(snapshot: str) -> Iterator[list[bytes]]:
                for number, keys in enumerate(pages(snapshot)):
                    if number == 1:
                        load(other, "s1", 5000)
                    yield keys

            monkeypatch.setattr(store, "_keys", interrupted)
            store.drop("s1")
            check_whole(other, "s1", 5000)
            assert other.snapshots() == ["s1"]
            for one in (store, other):
                one.close()

    def test_full_server_drops_and_holds_what_it_holds(self) -> None:
        with servers.own_redis() as server, server.running(), Redis.from_url(server.url) as client:
            store = RedisStore(server.url)
            for snapshot in ("s1", "s2"):
                load(store, snapshot)
            client.config_set("maxmemory", 1_000_000)
            load(store, "s1")  # which is there
            with pytest.raises(StoreError, match="is full"):
                load(store, "s3")
            assert (store.snapshots(), store.remains()) == (["s1", "s2"], [])
            store.drop("s1")
            assert (store.snapshots(), store.remains()) == (["s2"], [])
            assert not list(client.scan_iter("backcast:s1*"))
            client.config_set("maxmemory", 0)
            check_whole(store, "s2")
            store.close()

    def test_drop_goes_on_over_a_restart(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with servers.own_redis() as plain, ExitStack() as stack:
            server = plain.with_options(*KEPT)
            process = stack.enter_context(server.running())
            store = RedisStore(server.url)
            load(store, "s1", 20_000)
            pages, restarts = store._keys, iter([True])

            def restarted(snapshot: str) -> Iterator[list[bytes]]:
                for keys in pages(snapshot):
                    if next(restarts, False):
                        process.kill()
                        process.wait()
                        stack.enter_context(server.running())
                        return  # as with a cursor that another server gave
                    yield keys

            monkeypatch.setattr(store, "_keys", restarted)
            store.drop("s1")
            with Redis.from_url(server.url) as client:
                assert client.dbsize() == 0
            store.close()

    def test_names_are_not_looked_for_among_the_keys(self) -> None:
        with servers.own_redis() as server, server.running(), Redis.from_url(server.url) as other:
            store = RedisStore(server.url)
            load(store, "s1")
            other.config_resetstat()
            assert (store.snapshots(), store.remains()) == (["s1"], [])
            store.drop("unknown")
            load(store, "s2")
            assert "cmdstat_scan" not in other.info("commandstats")
            store.close()

    @pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
    def test_server_that_came_to_evict_is_noticed(self, policy: str) -> None:
        with servers.own_redis() as server, server.running(), Redis.from_url(server.url) as other:
            store = RedisStore(server.url)
            load(store, "s1")
            other.config_set("maxmemory-policy", policy)
            refused = pytest.raises(ConfigError, match=f"maxmemory-policy is {policy}")
            with refused:
                store.open("s1")
            with refused:
                load(store, "s2")
            other.config_set("maxmemory-policy", "noeviction")
            check_whole(store, "s1")
            store.close()


class TestTLS:
    @pytest.mark.parametrize("asks_for_clients", [False, True])
    def test_private_authority_is_named_in_the_url(self, asks_for_clients: bool) -> None:
        with servers.own_tls_redis(asks_for_clients=asks_for_clients) as server, server.running():
            store = RedisStore(server.url)
            load(store, "s1", 3000)
            check_whole(store, "s1", 3000)
            store.close()

    def test_server_of_an_unknown_authority_is_refused(self, tmp_path: Path) -> None:
        servers.make_certificates(tmp_path)
        with servers.own_tls_redis() as server, server.running():
            without, _, _ = server.url.partition("?")
            for url in (without, f"{without}?ssl_ca_certs={tmp_path / 'ca.pem'}"):
                with pytest.raises(StoreError, match="certificate verify failed"):
                    RedisStore(url)

    def test_server_that_asks_for_a_client_refuses_one_without(self) -> None:
        refused = pytest.raises(StoreError, match="does not answer")
        with servers.own_tls_redis(asks_for_clients=True) as server, server.running(), refused:
            RedisStore(server.url.partition("&")[0])

    def test_plain_connection_is_refused(self) -> None:
        refused = pytest.raises(StoreError, match="does not answer")
        with servers.own_tls_redis() as server, server.running(), refused:
            RedisStore(server.url.replace("rediss:", "redis:").partition("?")[0])


class TestPasswords:
    PASSWORD = "s3cret/@:?#%"
    ENCODED = "s3cret%2F%40%3A%3F%23%25"

    @pytest.fixture
    def server(self) -> Iterator[servers.OwnRedis]:
        with servers.own_redis() as plain:
            url = plain.url.replace("//", f"//:{self.ENCODED}@")
            yield plain.with_options("--requirepass", self.PASSWORD, url=url)

    def test_password_is_percent_encoded(self, server: servers.OwnRedis) -> None:
        with server.running():
            store = RedisStore(server.url)
            load(store, "s1")
            check_whole(store, "s1")
            store.close()

    def test_password_is_in_no_error(self, server: servers.OwnRedis) -> None:
        bare = server.url.replace(f":{self.ENCODED}@", "")
        with server.running():
            store = RedisStore(server.url)
            load(store, "s1")
            held = store.open("s1")
            with Redis.from_url(server.url) as other:
                other.flushall()
            said = [error_of(lambda: held.gather(Entity.ITEM, ["i0"]))]
            wrong = (server.url.replace(self.ENCODED, "s3cret"), f"{bare}?password=s3cret")
            said += [error_of(partial(RedisStore, url)) for url in wrong]
        said.append(error_of(lambda: held.gather(Entity.ITEM, ["i0"])))
        said += [error_of(partial(RedisStore, url)) for url in (server.url, *wrong)]
        assert "does not hold snapshot s1" in said[0]
        assert "invalid username-password pair" in said[1]
        assert "refused" in said[3]
        assert all("s3cret" not in text for text in said)

    def test_password_is_not_in_the_log(
        self, server: servers.OwnRedis, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with (
            server.running(),
            caplog.at_level(logging.DEBUG),
            build_home(tmp_path, store_url=server.url, live=1) as home,
            client_of(home),
        ):
            pass
        assert "store redis://127.0.0.1:" in caplog.text
        assert "s3cret" not in caplog.text


def error_of(act: Any) -> str:
    """Return all that an error says, causes included."""
    with pytest.raises((StoreError, ConfigError)) as caught:
        act()
    error: BaseException | None = caught.value
    texts = [str(caught.value.data)]
    while error is not None:
        texts.append(repr(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join(texts)


class TestService:
    """What consumers see of an outage, and that nobody has to restart anything."""

    def test_empty_server_after_a_restart_is_503_and_never_404(self, tmp_path: Path) -> None:
        with servers.own_redis() as server, ExitStack() as stack:
            with server.running():
                home = stack.enter_context(build_home(tmp_path, store_url=server.url, live=2))
                client = stack.enter_context(client_of(home, poll_seconds=0.05))
                check_answers(client, home)
            check_problem(client, home, "store-error")
            with server.running():
                check_problem(client, home, "snapshot-not-loaded")
                promote(home.backcast, 2, actor="test")
                check_answers(client, home)
                stack.close()

    def test_server_that_kept_its_keys_is_found_again(self, tmp_path: Path) -> None:
        with servers.own_redis() as plain, ExitStack() as stack:
            server = plain.with_options(*KEPT)
            with server.running() as process:
                home = stack.enter_context(build_home(tmp_path, store_url=server.url, live=2))
                client = stack.enter_context(client_of(home))
                check_answers(client, home)
                process.kill()
                process.wait()
                check_problem(client, home, "store-error")
            with server.running():
                check_answers(client, home)
                stack.close()

    def test_server_that_hangs_is_waited_for_no_longer_than_allowed(self, tmp_path: Path) -> None:
        with servers.own_redis() as plain, plain.running() as process:
            url = f"{plain.url}?socket_timeout=0.2"
            with build_home(tmp_path, store_url=url, live=2) as home, client_of(home) as client:
                check_answers(client, home)
                with stopped(process):
                    check_problem(client, home, "store-error")
                check_answers(client, home)

    def test_flush_while_reading_is_never_an_unknown_id(self, tmp_path: Path) -> None:
        with (
            servers.own_redis() as server,
            server.running(),
            build_home(tmp_path, store_url=server.url, live=2) as home,
            client_of(home) as client,
            Redis.from_url(server.url) as other,
        ):
            live, done = home.backcast.registry.deployments.live(), Event()
            assert live is not None
            ids = home.ids(version=2)

            def read() -> set[int]:
                seen = set()
                while not done.is_set():
                    one = client.get(f"/embeddings/{ids[0]}", params={"version": 1})
                    many = client.post("/embeddings/batch", json={"ids": ids, "version": 1})
                    seen |= {one.status_code, many.status_code}
                    if many.status_code == 200:
                        assert_served(read_rows(many), home, ids, 1, live=2)
                return seen

            with ThreadPoolExecutor(3) as pool:
                readers = [pool.submit(read) for _ in range(3)]
                for _ in range(10):
                    other.flushall()
                    time.sleep(0.05)
                    load_snapshot(home.backcast, live.snapshot)
                    time.sleep(0.05)
                done.set()
            assert set.union(*(reader.result() for reader in readers)) == {200, 503}


def check_answers(client: TestClient, home: Home) -> None:
    ids = home.ids(version=2)
    many = client.post("/embeddings/batch", json={"ids": ids, "version": 0})
    assert_served(read_rows(many), home, ids, 0, live=2)
    one = client.get(f"/embeddings/{ids[0]}", params={"version": 0})
    assert_served(read_rows(one), home, ids[:1], 0, live=2)
    assert client.get("/embeddings/nobody", params={"version": 0}).status_code == 404


def check_problem(client: TestClient, home: Home, code: str) -> None:
    ids = [*home.ids(version=2), "nobody"]
    answers = [client.get(f"/embeddings/{id}", params={"version": 0}) for id in (ids[0], ids[-1])]
    answers.append(client.post("/embeddings/batch", json={"ids": ids, "version": 0}))
    for answer in answers:
        assert answer.status_code == 503, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["Retry-After"] == "1"
        assert answer.json()["type"] == f"urn:backcast:problem:{code}"
    assert client.get("/livez").status_code == 200


@contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)
