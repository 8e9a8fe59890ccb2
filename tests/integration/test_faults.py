"""What breaks in operation: what users see of it, that nothing is lost, that it can be explained.

Processes that are killed are in test_kill.py, a Redis that goes away under reads in test_redis.py.
"""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any

import httpx2
import numpy as np
import pytest
from redis import Redis
from sqlalchemy import Engine, text
from starlette.testclient import TestClient

from backcast.changes import Delta, write_delta
from backcast.errors import ArtifactError, ArtifactUnwritable, RegistryError
from backcast.lifecycle import publish, refresh, rollback, sweep
from backcast.registry import database
from backcast.registry.database import utc_now
from backcast.registry.schema import downgrade, make_engine, upgrade
from backcast.registry.tables import SCHEMA_REVISION
from backcast.versions import Entity, Live, Scope
from benchmarks.soak_replicas import Replica, replica_environment
from tests import servers
from tests.service_support import assert_served, bearer, client_of, read_rows, secret_of
from tests.support import Home, batches, build_home, check_books
from tests.trainer_support import synthetic

PROBLEM = "urn:backcast:problem:"
WAIT_S = 60


def check_answers(client: TestClient | httpx2.Client, home: Home, *, live: int) -> None:
    """Demand right answers for every version that is servable, many and one at a time."""
    ids = home.ids(version=live)
    for target in home.chain(live):
        many = client.post("/embeddings/batch", json={"ids": ids, "version": target})
        assert_served(read_rows(many), home, ids, target, live=live)
        one = client.get(f"/embeddings/{ids[0]}", params={"version": target})
        assert_served(read_rows(one), home, ids[:1], target, live=live)


def check_problem(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = response.json()
    assert document["type"] == f"{PROBLEM}{code}"
    return document


def live(home: Home) -> Live:
    found = home.backcast.registry.deployments.live()
    assert found is not None
    return found


def eventually(act: Callable[[], object]) -> None:
    """Try until an assertion holds."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            act()
            return
        except AssertionError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.05)


def order(client: TestClient | httpx2.Client, version: int, expected: int) -> dict[str, Any]:
    """Promote over HTTP and return the operation when it has ended."""
    path, body = f"/admin/versions/{version}/promote", {"expected_live": expected}
    response = client.post(path, json=body)
    assert response.status_code == 202, response.text
    return followed(client, response.json()["id"])


def followed(client: TestClient | httpx2.Client, operation: str) -> dict[str, Any]:
    deadline = time.monotonic() + WAIT_S
    while True:
        found = client.get(f"/admin/operations/{operation}")
        if found.status_code == 200 and found.json()["state"] in {"succeeded", "failed"}:
            ended: dict[str, Any] = found.json()
            return ended
        assert time.monotonic() < deadline, found.text
        time.sleep(0.05)


def backcast(home: Home, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the documentation."""
    return subprocess.run(
        [sys.executable, "-m", "backcast", *arguments],
        env=replica_environment(home.settings),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )


class TestPostgres:
    """Reads go on from the last snapshot; what would change something says 503, and does not."""

    @dataclass(frozen=True)
    class World:
        home: Home
        client: TestClient
        database: servers.Running

    @pytest.fixture
    def world(self, tmp_path: Path) -> Iterator[World]:
        with ExitStack() as stack:
            server = stack.enter_context(servers.own_postgres())
            running = stack.enter_context(servers.Running(server))
            home = stack.enter_context(build_home(tmp_path, live=1, database_url=server.url))
            client = stack.enter_context(client_of(home, poll_seconds=0.05))
            yield self.World(home, client, running)

    def test_reads_go_on_while_it_is_away(self, world: World) -> None:
        home, client = world.home, world.client
        check_answers(client, home, live=1)
        world.database.stop()
        until = time.monotonic() + 1
        while time.monotonic() < until:
            check_answers(client, home, live=1)
        assert client.get("/readyz").status_code == 200
        assert client.get("/livez").status_code == 200
        assert client.get("/versions").status_code == 200
        world.database.start()
        eventually(lambda: order(client, 2, 1))
        eventually(lambda: check_answers(client, home, live=2))
        check_books(home)

    def test_everything_that_needs_it_is_503_and_says_so(self, world: World) -> None:
        home, client = world.home, world.client
        operation = order(client, 2, 1)["id"]
        before = home.backcast.registry.deployments.history()
        world.database.stop()
        for method, path, body in (
            ("POST", "/admin/versions/1/promote", {"expected_live": 2}),
            ("POST", "/admin/versions/1/promote", {"expected_live": 2, "dry_run": True}),
            ("GET", f"/admin/operations/{operation}", None),
            ("GET", "/admin/deployments", None),
        ):
            answer = client.request(method, path, json=body)
            problem = check_problem(answer, 503, "registry-error")
            assert answer.headers["Retry-After"] == "1"
            assert re.search("does not answer|did not answer a moment ago", problem["detail"])
        stranger = bearer(f"bc_0123abcd_{'x' * 43}")
        answer = client.get("/embeddings/item 1?version=0", headers=stranger)
        check_problem(answer, 503, "registry-error")
        world.database.start()
        eventually(
            lambda: check_problem(
                client.get("/embeddings/item 1?version=0", headers=stranger), 401, "unauthorized"
            )
        )
        assert home.backcast.registry.deployments.history() == before
        assert client.get(f"/admin/operations/{operation}").json()["state"] == "succeeded"
        check_answers(client, home, live=2)
        check_books(home)

    def test_commands_say_in_one_line_that_it_is_away(self, world: World) -> None:
        world.database.stop()
        for arguments in (("promote", "2"), ("serve", "--port", "1")):
            ended = backcast(world.home, *arguments)
            assert (ended.returncode, ended.stdout) == (1, "")
            assert ended.stderr.startswith("error: The registry postgresql+psycopg://")
            assert ended.stderr.count("\n") == 1
        world.database.start()
        ended = backcast(world.home, "promote", "2")
        assert ended.returncode == 0, ended.stderr
        eventually(lambda: check_answers(world.client, world.home, live=2))
        check_books(world.home)

    def test_promotion_that_loses_it_half_way_changes_nothing(self, world: World) -> None:
        home = world.home
        check_answers(world.client, home, live=1)

        def stop_before_the_switch(step: str, _fraction: float) -> None:
            if step == "switch":
                world.database.stop()

        with pytest.raises(RegistryError, match="does not answer"):
            home.promote(2, report=stop_before_the_switch)
        check_answers(world.client, home, live=1)
        world.database.start()
        eventually(lambda: check_answers(world.client, home, live=1))
        home.check_served(1)
        check_books(home)
        home.promote(2)
        eventually(lambda: check_answers(world.client, home, live=2))
        check_books(home)


class TestRedis:
    """Switches while the store is away, full or emptied."""

    @contextmanager
    def served(self, tmp_path: Path, server: servers.OwnRedis) -> Iterator[tuple[Home, TestClient]]:
        with (
            build_home(tmp_path, store_url=server.url, live=1) as home,
            client_of(home, poll_seconds=0.05) as client,
        ):
            yield home, client

    def test_promotion_while_it_is_away_fails_and_works_after(self, tmp_path: Path) -> None:
        with servers.own_redis() as plain, ExitStack() as stack:
            running = servers.Running(plain.with_options("--appendonly", "yes"))
            stack.enter_context(running)
            home, client = stack.enter_context(self.served(tmp_path, plain))
            running.stop()
            failed = order(client, 2, 1)
            assert failed["state"] == "failed"
            assert failed["error"]["code"] == "store-error"
            assert live(home).version == 1
            running.start()
            check_answers(client, home, live=1)
            assert order(client, 2, 1)["state"] == "succeeded"
            check_answers(client, home, live=2)
            check_books(home)

    def test_emptied_it_is_filled_by_one_command_changes_included(self, tmp_path: Path) -> None:
        with (
            servers.own_redis() as server,
            server.running(),
            self.served(tmp_path, server) as (home, client),
            Redis.from_url(server.url) as other,
        ):
            put(home, "item 3", seed=7)()
            eventually(lambda: check_answers(client, home, live=1))
            before = live(home), home.backcast.registry.deployments.history()
            other.flushall()
            answer = client.get("/embeddings/item 1", params={"version": 0})
            problem = check_problem(answer, 503, "snapshot-not-loaded")
            assert "promoting its version again loads it" in problem["detail"]
            check_problem(client.get("/readyz"), 503, "snapshot-not-loaded")
            ended = backcast(home, "promote", "1")
            assert ended.returncode == 0, ended.stderr
            eventually(lambda: check_answers(client, home, live=1))
            assert (live(home), home.backcast.registry.deployments.history()) == before
            check_books(home)

    def test_full_it_refuses_a_snapshot_whole(self, tmp_path: Path) -> None:
        with (
            servers.own_redis() as server,
            server.running(),
            self.served(tmp_path, server) as (home, client),
            Redis.from_url(server.url) as other,
        ):
            home.publish(2, items=2_000)
            other.config_set("maxmemory", int(other.info("memory")["used_memory"]) + 50_000)
            failed = order(client, 2, 1)
            assert (failed["state"], failed["error"]["code"]) == ("failed", "store-error")
            assert "is full" in failed["error"]["message"]
            check_answers(client, home, live=1)
            assert not list(other.scan_iter("backcast:v2-*"))  # nothing takes up room for nothing
            other.config_set("maxmemory", 0)
            assert order(client, 2, 1)["state"] == "succeeded"
            check_answers(client, home, live=2)
            check_books(home)


def put(home: Home, id: str, *, seed: int) -> Callable[[], object]:
    """Write another vector of an item to a file; what is returned makes it the next delta."""
    now = live(home)
    vector = np.random.default_rng(seed).standard_normal(home.dims[now.version], np.float32)
    draft = write_delta(home.backcast.artifacts, Delta(Entity.ITEM, [id], vector[None]), "tests")
    home.vectors[now.version][Entity.ITEM][id] = vector
    return lambda: home.backcast.registry.deltas.append(now, [draft], {})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def swap(path: Path) -> None:
    """Put a file of the same kind and size, and other content, in its place."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


@contextmanager
def harmed(path: Path, harm: Callable[[Path], None]) -> Iterator[None]:
    content = path.read_bytes()
    harm(path)
    yield
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [truncate, swap, remove])
class TestArtifacts:
    """At a promotion they are refused: test_lifecycle.py. Here a replica meets them."""

    def test_map_at_the_start_of_a_replica(
        self, tmp_path: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        with build_home(tmp_path, live=2) as home:
            folder = home.backcast.registry.versions.get(1).folder
            path = Path(home.settings.artifacts_root, folder, "transform.safetensors")
            with harmed(path, harm), client_of(home, poll_seconds=0.05) as client:
                check_problem(client.get("/readyz"), 503, "not-ready")
                answer = client.get("/embeddings/item 1", params={"version": 2})
                problem = check_problem(answer, 503, "not-ready")
                assert "the log says why" in problem["detail"]
                assert "transform.safetensors is" in caplog.text
                assert client.get("/livez").status_code == 200
            with client_of(home, poll_seconds=0.05) as client:
                check_answers(client, home, live=2)
            check_books(home)

    def test_map_that_is_put_back_is_taken_up_without_a_restart(
        self, tmp_path: Path, harm: Callable[[Path], None]
    ) -> None:
        with ExitStack() as stack:
            home = stack.enter_context(build_home(tmp_path, live=1))
            folder = home.backcast.registry.versions.get(1).folder
            path = Path(home.settings.artifacts_root, folder, "transform.safetensors")
            with harmed(path, harm):
                client = stack.enter_context(client_of(home, poll_seconds=0.05))
                check_problem(client.get("/readyz"), 503, "not-ready")
            eventually(lambda: check_answers(client, home, live=1))

    def test_running_replica_does_not_need_them(
        self, tmp_path: Path, harm: Callable[[Path], None]
    ) -> None:
        with (
            build_home(tmp_path, live=1) as home,
            client_of(home, poll_seconds=0.05) as client,
            ExitStack() as stack,
        ):
            root = Path(home.settings.artifacts_root)
            for path in [*root.glob("versions/*/*"), *root.glob("snapshots/*/*")]:
                stack.enter_context(harmed(path, harm))
            until = time.monotonic() + 0.3
            while time.monotonic() < until:
                check_answers(client, home, live=1)

    def test_delta_leaves_the_state_before_it_served(
        self, tmp_path: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        with ExitStack() as stack:
            home = stack.enter_context(build_home(tmp_path, live=1))
            client = stack.enter_context(client_of(home, poll_seconds=0.05))
            before = dict(home.vectors[1][Entity.ITEM])
            register = put(home, "item 3", seed=7)
            after = dict(home.vectors[1][Entity.ITEM])
            (path,) = Path(home.settings.artifacts_root).glob("deltas/*/*")
            damage = stack.enter_context(ExitStack())
            damage.enter_context(harmed(path, harm))
            register()
            home.vectors[1][Entity.ITEM] = before
            eventually(lambda: check_logged(caplog, "delta.parquet is"))
            check_answers(client, home, live=1)
            assert client.get("/readyz").json()["snapshot"].endswith(".0")
            damage.close()
            home.vectors[1][Entity.ITEM] = after
            eventually(lambda: check_answers(client, home, live=1))
            assert client.get("/readyz").json()["snapshot"].endswith(".1")
            check_books(home)

    def test_drift_bounds_are_unknown_and_nothing_else(
        self, tmp_path: Path, harm: Callable[[Path], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        with ExitStack() as stack:
            home = stack.enter_context(build_home(tmp_path, live=2))
            for name in home.backcast.store.snapshots():
                home.backcast.store.drop(name)
            damage = stack.enter_context(ExitStack())
            for path in Path(home.settings.artifacts_root).glob("drifts/*/item.parquet"):
                damage.enter_context(harmed(path, harm))
            home.promote(2)  # again, which fills the store
            self.check_bounds(home, known=False)
            rollback(home.backcast, actor="tests", reason="worse")
            self.check_bounds(home, known=False)
            assert caplog.text.count("no drift bounds are known of v") == 2
            assert caplog.text.count("item.parquet is") == 2
            damage.close()
            home.backcast.store.drop(live(home).snapshot)
            home.promote(1)
            self.check_bounds(home, known=True)
            check_books(home)

    def check_bounds(self, home: Home, *, known: bool) -> None:
        """Demand right answers with the drift bounds of version 0, or with none."""
        version, ids = live(home).version, home.ids(version=live(home).version)
        home.check_served(version)
        with client_of(home) as client:
            asked = {"ids": ids, "version": 0, "drift": True}
            answer = client.post("/embeddings/batch", json=asked).json()
        bounds = [row["drift_bound"] for row in answer["embeddings"]]
        assert [bound is not None for bound in bounds] == [known] * len(ids)

    def test_list_of_what_was_put_is_named_and_no_id_is_lost(
        self, tmp_path: Path, harm: Callable[[Path], None]
    ) -> None:
        with build_home(tmp_path, live=1) as home:
            put(home, "new", seed=7)()
            vectors = home.vectors[1]
            served = vectors[Entity.ITEM]
            vectors[Entity.ITEM] = {id: served[id] for id in served if id != "new"}
            self.publish(home)
            refresh(home.backcast, actor="tests")
            folder = home.backcast.registry.snapshots.get(live(home).snapshot).folder
            root = Path(home.settings.artifacts_root)
            held = sorted(path.name for path in root.glob("snapshots/*"))
            with (
                harmed(root / folder / "put.parquet", harm),
                pytest.raises(
                    ArtifactError, match=r"/put\.parquet is .* copy it from a backup, where it has"
                ),
            ):
                self.publish(home)
            assert sorted(path.name for path in root.glob("snapshots/*")) == held
            self.publish(home)
            refresh(home.backcast, actor="tests")
            with client_of(home) as client:
                answer = client.get("/embeddings/new", params={"version": 1})
            assert read_rows(answer).tobytes() == served["new"].tobytes()
            check_books(home)

    def publish(self, home: Home) -> None:
        backcast = home.backcast
        publish(backcast.registry, backcast.artifacts, 1, batches(home.vectors[1]), details={})


def check_logged(caplog: pytest.LogCaptureFixture, text: str) -> None:
    assert text in caplog.text


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """Let no file below ``folder`` be written once it holds ``size`` bytes."""
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode == 0:
        try:
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        return
    # Without the right to mount, a limit on the size of files is what comes nearest.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class TestFullDisk:
    ITEMS, SIZE = 20_000, 1 << 18

    def test_publication_leaves_nothing_and_is_done_again(self, tmp_path: Path) -> None:
        root = tmp_path / "artifacts"
        with build_home(tmp_path, live=0) as home:
            kept = home.vectors[1]
            before = home.backcast.registry.snapshots.latest(1)
            snapshots = root / "snapshots"
            held = sorted(path.name for path in snapshots.iterdir())
            away = snapshots.rename(root / "away")
            with small_disk(snapshots, self.SIZE):
                with pytest.raises(ArtifactUnwritable, match=r"cannot be written: .*BACKCAST_ARTI"):
                    home.publish(1, items=self.ITEMS)
                assert list(snapshots.iterdir()) == []
            snapshots.rmdir()
            away.rename(snapshots)
            home.vectors[1] = kept
            assert home.backcast.registry.snapshots.latest(1) == before
            assert sorted(path.name for path in snapshots.iterdir()) == held
            home.check_served(0)
            home.publish(1, items=self.ITEMS)
            home.promote(1)
            check_books(home)

    def test_store_that_is_full_keeps_the_live_snapshot(self, tmp_path: Path) -> None:
        store = tmp_path / "store"
        with small_disk(store, self.SIZE), build_home(tmp_path, live=0) as home:
            home.publish(1, items=self.ITEMS)
            with client_of(home, poll_seconds=0.05) as client:
                failed = order(client, 1, 0)
                assert (failed["state"], failed["error"]["code"]) == ("failed", "store-error")
                assert "cannot be changed" in failed["error"]["message"]
                check_answers(client, home, live=0)
                assert home.held() == [live(home).snapshot]
                home.publish(1)  # one that there is room for
                assert order(client, 1, 0)["state"] == "succeeded"
                check_answers(client, home, live=1)
                check_books(home)


@contextmanager
def replicas(home: Home, folder: Path, count: int, **environ: str) -> Iterator[list[Replica]]:
    """Run ``backcast serve`` processes."""
    settings = replica_environment(home.settings)
    running = [Replica(n, {**settings, **environ}, folder) for n in range(count)]
    try:
        for replica in running:
            replica.start()
        for replica in running:
            replica.wait(Event())
        yield running
    finally:
        for replica in running:
            replica.stop()


class TestOldPointer:
    """A replica that slept through two promotions and the end of what it served."""

    def test_answers_nothing_wrong_and_follows(
        self, tmp_path: Path, empty_registry: str, empty_redis: str
    ) -> None:
        with build_home(
            tmp_path,
            live=0,
            database_url=empty_registry,
            store_url=empty_redis,
            grace_seconds=0.0,
            poll_seconds=0.3,
        ) as home:
            secret = secret_of(home)
            with (
                replicas(home, tmp_path, 1) as (replica,),
                httpx2.Client(base_url=replica.url, headers=bearer(secret), timeout=30) as http,
            ):
                check_answers(http, home, live=0)
                old = live(home).snapshot
                replica.signal(signal.SIGSTOP)
                home.promote(1)
                home.promote(2)
                gone = sweep(home.backcast, timedelta(0))
                assert old in gone
                replica.signal(signal.SIGCONT)
                seen = [self.ask(http, home) for _ in range(50)]
                assert set(seen) <= {"snapshot-not-loaded", 0, 1, 2}
                eventually(lambda: check_answers(http, home, live=2))
            check_books(home)

    def ask(self, http: httpx2.Client, home: Home) -> str | int:
        ids = home.ids(version=0)
        answer = http.post("/embeddings/batch", json={"ids": ids, "version": 0})
        if answer.status_code != 200:
            return str(answer.json()["type"]).removeprefix(PROBLEM)
        served = int(answer.headers["Backcast-Live-Version"])
        assert_served(read_rows(answer), home, ids, 0, live=served)
        return served


SKEWED = """
import datetime, os
import backcast.registry.database as database
class Skewed(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        skew = datetime.timedelta(seconds=float(os.environ["SKEW_SECONDS"]))
        return datetime.datetime.now(tz) + skew
database.datetime = Skewed
"""
"""A module that Python imports before all others, where it finds it."""


@contextmanager
def clock_off_by(seconds: float) -> Iterator[None]:
    """Let the clock of this process be wrong."""

    class Skewed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=seconds)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "datetime", Skewed)
        yield


class TestClocks:
    """Hosts whose clocks differ agree all the same on what is live, newest, and due."""

    def test_replicas_an_hour_apart_follow_each_other(
        self, tmp_path: Path, empty_registry: str, empty_redis: str
    ) -> None:
        (tmp_path / "sitecustomize.py").write_text(SKEWED)
        with build_home(
            tmp_path / "home", live=0, database_url=empty_registry, store_url=empty_redis
        ) as home:
            secret = bearer(secret_of(home, Scope.ADMIN))
            path = f"{tmp_path}{os.pathsep}{replica_environment(home.settings)['PYTHONPATH']}"
            with ExitStack() as stack:
                running = [
                    stack.enter_context(
                        replicas(home, tmp_path, 1, PYTHONPATH=path, SKEW_SECONDS=skew)
                    )[0]
                    for skew in ("-1800", "1800")
                ]
                https = [
                    stack.enter_context(
                        httpx2.Client(base_url=replica.url, headers=secret, timeout=30)
                    )
                    for replica in running
                ]
                for version, http in ((1, https[0]), (2, https[1])):
                    assert order(http, version, version - 1)["state"] == "succeeded"
                    for other in https:
                        eventually(lambda: check_answers(other, home, live=version))  # noqa: B023
                written = home.backcast.registry.deployments.history()[0]["created_at"]
                assert written > utc_now() + timedelta(seconds=1500)  # the clocks did differ
            check_books(home)

    @pytest.mark.parametrize("skew", [-7200, 7200])
    def test_later_snapshot_is_the_newest_whoever_wrote_it(
        self, tmp_path: Path, backends: dict[str, Any], skew: int
    ) -> None:
        with build_home(tmp_path, live=0, **backends) as home:
            with clock_off_by(skew):
                home.publish(1, seed=1)
            newest = home.publish(1, seed=2)
            assert home.promote(1) == newest.id
            home.check_served(1)
            with clock_off_by(skew):
                newest = home.publish(1, seed=3)
                assert home.promote(1) == newest.id
            home.check_served(1)
            check_books(home)


class TestSchema:
    """Code and schema of different releases refuse each other, and say which command helps."""

    @pytest.fixture
    def home(self, tmp_path: Path, backends: dict[str, Any]) -> Iterator[Home]:
        with build_home(tmp_path, live=0, **backends) as home:
            yield home

    @pytest.fixture
    def engine(self, home: Home) -> Iterator[Engine]:
        engine = make_engine(home.settings.registry_url)
        yield engine
        engine.dispose()

    def test_older_schema_is_upgraded_by_the_command_that_is_named(
        self, home: Home, engine: Engine, tmp_path: Path
    ) -> None:
        data = synthetic(tmp_path / "data").folder
        downgrade(engine, "0001")
        try:
            mend = "Run `backcast db upgrade`."
            self.check_refused(home, "0001", mend, "serve", "--port", "1")
            self.check_refused(home, "0001", mend, "promote", "1")
            self.check_refused(home, "0001", mend, "train", "--data", str(data), "--until", "0.5")
            ended = backcast(home, "db", "upgrade")
            assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
            assert ended.stderr.endswith(": backcast db upgrade --contract.\n")
            ended = backcast(home, "db", "upgrade", "--contract")
            assert (ended.returncode, ended.stderr) == (0, "")
        finally:
            upgrade(engine)
        ended = backcast(home, "promote", "1")
        assert ended.returncode == 0, ended.stderr
        home.check_served(1)
        check_books(home)

    def test_newer_schema_is_left_alone(self, home: Home, engine: Engine) -> None:
        self.set_revision(engine, "9999")
        try:
            mend = "Install the release that made it."
            self.check_refused(home, "9999", mend, "serve", "--port", "1")
            self.check_refused(home, "9999", mend, "promote", "1")
            self.check_refused(home, "9999", mend, "db", "upgrade")
        finally:
            self.set_revision(engine, SCHEMA_REVISION)
        home.check_served(0)
        check_books(home)

    def check_refused(self, home: Home, found: str, mend: str, *arguments: str) -> None:
        ended = backcast(home, *arguments)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr == (
            f"error: The registry's schema is {found}, this release needs {SCHEMA_REVISION}. "
            f"{mend}\n"
        )

    def set_revision(self, engine: Engine, revision: str) -> None:
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = :r"), {"r": revision})
