"""Pins, usage and the end of a version, on both databases."""

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import Connection, event
from starlette.testclient import TestClient

from backcast import errors
from backcast.errors import BackcastError, InvalidInput
from backcast.lifecycle import deprecate, open_backcast, retire, withdraw_deprecation
from backcast.registry import Switch
from backcast.registry.consumers import ANONYMOUS
from backcast.registry.database import utc_now
from backcast.versions import Entity, Scope, Use, Version, VersionState
from service.usage import UsageMeter
from service.wire import Format
from tests.service_support import (
    assert_served,
    bearer,
    client_of,
    expire,
    read_rows,
    secret_of,
    set_version,
)
from tests.support import Home, build_home

WEEK = timedelta(days=7)
LATER = datetime(2099, 1, 31, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path, backends: dict[str, Any]) -> Iterator[Home]:
    """0 ← 1 ← 2, which is live; 3 was never live, 4 is a sibling of 2 that was."""
    parents = (None, 0, 1, 2, 1)
    with build_home(tmp_path, (4, 5, 6, 7, 8), parents=parents, live=4, **backends) as built:
        built.promote(2, force=True, reason="4 is bad")
        yield built


def end(home: Home, version: int, **options: Any) -> Version:
    return retire(home.backcast, version, actor="tests", **{"idle": WEEK, **options})


def announce(home: Home, version: int, sunset_at: datetime = LATER, **options: Any) -> Version:
    return deprecate(home.backcast, version, sunset_at=sunset_at, actor="tests", **options)


def pin(home: Home, name: str, version: int | None) -> None:
    home.backcast.registry.consumers.pin(name, version)


def today() -> date:
    return utc_now().date()


class TestRetirement:
    def test_unused_version_is_retired_and_its_maps_stay(self, home: Home) -> None:
        before = utc_now()
        retired = end(home, 1)
        assert (retired.state, retired.note) == (VersionState.RETIRED, None)
        assert retired.retired_at is not None
        assert before <= retired.retired_at <= utc_now()
        home.check_served(2)  # version 0 is served through the maps of version 1

    def test_pinned_consumers_are_in_the_way_by_name(self, home: Home) -> None:
        for name, version in (("search", 0), ("ads", 0), ("other", 1)):
            home.backcast.registry.keys.create(name, Scope.READ, pin=version)
        with pytest.raises(errors.VersionInUse) as raised:
            end(home, 0)
        assert raised.value.data["pinned"] == ["ads", "search"]
        assert raised.value.data["used"] == {}
        assert "pinned to it: ads, search" in raised.value.message
        pin(home, "search", 1)
        pin(home, "ads", None)
        assert end(home, 0).state is VersionState.RETIRED

    def test_late_use_is_in_the_way_and_older_is_not(self, home: Home) -> None:
        home.backcast.registry.keys.create("ads", Scope.READ)
        usage = home.backcast.registry.usage
        usage.add([Use("ads", 0, today() - timedelta(days=8), 9, 9)])
        usage.add([Use("ads", 1, today(), 9, 9)])
        usage.add([Use(ANONYMOUS, 1, today() - timedelta(days=3), 1, 0)])
        with pytest.raises(errors.VersionInUse) as raised:
            end(home, 0, idle=timedelta(days=8))
        assert raised.value.data["used"] == {"ads": f"{today() - timedelta(days=8)}"}
        assert end(home, 0).state is VersionState.RETIRED
        with pytest.raises(errors.VersionInUse) as raised:
            end(home, 1)
        assert raised.value.data["used"] == {
            ANONYMOUS: f"{today() - timedelta(days=3)}",
            "ads": f"{today()}",
        }

    def test_announced_sunset_is_kept(self, home: Home) -> None:
        announce(home, 0, utc_now() + timedelta(hours=1))
        with pytest.raises(errors.VersionInUse, match="announced to last until 20"):
            end(home, 0)
        set_version(home, 0, sunset_at=utc_now() - timedelta(seconds=1))
        assert end(home, 0).state is VersionState.RETIRED

    def test_force_needs_a_reason_which_is_kept(self, home: Home) -> None:
        home.backcast.registry.keys.create("ads", Scope.READ, pin=0)
        home.backcast.registry.usage.add([Use("ads", 0, today(), 1, 1)])
        with pytest.raises(InvalidInput, match="needs a reason"):
            end(home, 0, force=True)
        assert home.backcast.registry.versions.get(0).state is VersionState.SUPERSEDED
        assert end(home, 0, force=True, reason="ads is gone").note == "ads is gone"

    def test_a_second_time_changes_nothing(self, home: Home) -> None:
        first = end(home, 0, reason="nobody reads it")
        assert end(home, 0, force=True, reason="again") == first

    @pytest.mark.parametrize(
        ("version", "error", "message"),
        [
            (9, errors.UnknownVersion, "Version 9 does not exist"),
            (2, errors.Conflict, "live and cannot be retired"),
            (3, errors.Conflict, r"\(registered\) was never served"),
            (4, errors.VersionOffChain, "rolled_back"),
        ],
    )
    @pytest.mark.parametrize("force", [False, True])
    def test_what_cannot_be_retired(
        self, home: Home, version: int, error: type[BackcastError], message: str, force: bool
    ) -> None:
        with pytest.raises(error, match=message) as raised:
            end(home, version, force=force, reason="because")
        assert type(raised.value) is error

    def test_retired_version_takes_no_pin_and_goes_live_no_more(self, home: Home) -> None:
        keys = home.backcast.registry.keys
        keys.create("ads", Scope.READ)
        snapshot = home.backcast.registry.snapshots.latest(1)
        assert snapshot is not None
        end(home, 1, reason="too old")
        with pytest.raises(errors.VersionRetired, match="too old"):
            pin(home, "ads", 1)
        with pytest.raises(errors.VersionRetired):
            keys.create("search", Scope.READ, pin=1)
        with pytest.raises(errors.VersionRetired):
            home.promote(1, force=True, reason="back")
        live = home.backcast.registry.deployments.live()
        switch = Switch("rollback", live, 1, snapshot.id, "tests", head=snapshot.head)
        with pytest.raises(errors.VersionRetired):  # retired after its promotion began
            home.backcast.registry.deployments.switch(switch)
        assert home.backcast.registry.deployments.live() == live
        assert home.backcast.registry.versions.get(1).state is VersionState.RETIRED


class TestAtOnce:
    """What was checked stays so until the change is made, whoever else writes."""

    def test_pin_waits_for_a_retirement_that_has_checked(self, home: Home) -> None:
        home.backcast.registry.keys.create("ads", Scope.READ)
        with open_backcast(home.settings) as other:

            def meanwhile() -> None:
                other.registry.consumers.pin("ads", 0)

            with overtaken(home, "FROM usage", meanwhile) as outcome:
                assert end(home, 0).state is VersionState.RETIRED
            assert isinstance(outcome(), errors.VersionRetired)
        assert home.backcast.registry.consumers.all()[0].pin is None

    def test_retirement_waits_for_a_pin_that_has_checked(self, home: Home) -> None:
        home.backcast.registry.keys.create("ads", Scope.READ)
        with open_backcast(home.settings) as other:

            def meanwhile() -> None:
                retire(other, 0, actor="tests", idle=WEEK)

            with overtaken(home, "FROM versions", meanwhile) as outcome:
                pin(home, "ads", 0)
            assert isinstance(outcome(), errors.VersionInUse)
        assert home.backcast.registry.versions.get(0).state is VersionState.SUPERSEDED

    def test_switch_waits_for_a_retirement_that_has_checked(self, home: Home) -> None:
        live = home.backcast.registry.deployments.live()
        snapshot = home.backcast.registry.snapshots.latest(1)
        assert snapshot is not None
        switch = Switch("rollback", live, 1, snapshot.id, "tests", head=snapshot.head)
        with open_backcast(home.settings) as other:

            def meanwhile() -> None:
                other.registry.deployments.switch(switch)

            with overtaken(home, "FROM usage", meanwhile) as outcome:
                assert end(home, 1).state is VersionState.RETIRED
            assert isinstance(outcome(), errors.VersionRetired)
        assert home.backcast.registry.deployments.live() == live

    def test_many_pins_and_retirements_never_leave_both(self, home: Home) -> None:
        registry = home.backcast.registry
        registry.keys.create("ads", Scope.READ)
        for _ in range(10):
            barrier = threading.Barrier(2)

            def at_once(act: Callable[[], object], barrier: threading.Barrier = barrier) -> bool:
                barrier.wait()
                try:
                    act()
                except (errors.VersionRetired, errors.VersionInUse):
                    return False
                return True

            with ThreadPoolExecutor(2) as pool:
                acts = [lambda: pin(home, "ads", 0), lambda: end(home, 0)]
                assert sorted(pool.map(at_once, acts)) == [False, True]
            retired = registry.versions.get(0).state is VersionState.RETIRED
            assert retired == (registry.consumers.all()[0].pin is None)
            set_version(home, 0, state=VersionState.SUPERSEDED, retired_at=None)
            pin(home, "ads", None)


class overtaken:  # noqa: N801  (read as a verb)
    """Start ``act`` on another thread as soon as a statement has run that contains ``words``.

    It must not have come through before the transaction that ran the statement has ended. Yields a
    function that returns how it ended.
    """

    def __init__(self, home: Home, words: str, act: Callable[[], None]) -> None:
        self._engine = home.backcast.registry._engine
        self._words, self._act = words, act
        self._thread: threading.Thread | None = None
        self._outcome: list[BaseException | None] = []

    def __enter__(self) -> Callable[[], BaseException | None]:
        event.listen(self._engine, "after_cursor_execute", self._start)
        return self._ended

    def __exit__(self, *_: object) -> None:
        event.remove(self._engine, "after_cursor_execute", self._start)
        assert self._thread is not None, "the statement was not run"
        self._thread.join(30)

    def _ended(self) -> BaseException | None:
        [outcome] = self._outcome
        return outcome

    def _start(self, connection: Connection, _cursor: Any, sql: str, *_: Any) -> None:
        if self._thread is not None or self._words not in sql:
            return
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._thread.join(0.5)
        assert self._thread.is_alive(), "it did not wait"
        assert connection.in_transaction()

    def _run(self) -> None:
        try:
            self._act()
        except BackcastError as error:
            self._outcome.append(error)
        else:
            self._outcome.append(None)


class TestDeprecation:
    def test_it_is_announced_changed_and_taken_back(self, home: Home) -> None:
        before = utc_now()
        first = announce(home, 0, reason="use version 2")
        assert (first.sunset_at, first.note) == (LATER, "use version 2")
        assert first.deprecated_at is not None
        assert before <= first.deprecated_at <= utc_now()
        assert first.state is VersionState.SUPERSEDED
        second = announce(home, 0, LATER + WEEK)
        assert (second.deprecated_at, second.sunset_at, second.note) == (
            first.deprecated_at,
            LATER + WEEK,
            None,
        )
        for _ in range(2):
            kept = withdraw_deprecation(home.backcast, 0, actor="tests")
            assert (kept.deprecated_at, kept.sunset_at, kept.note) == (None, None, None)

    @pytest.mark.parametrize(
        ("moment", "message"),
        [
            (datetime(2099, 1, 1), "no zone; add Z"),
            (datetime(2020, 1, 1, tzinfo=UTC), "2020-01-01T00:00:00.00:00 is over"),
            (
                datetime(9999, 12, 31, 23, tzinfo=timezone(timedelta(hours=-14))),
                "after the year 9999",
            ),
        ],
    )
    def test_moments_that_cannot_be_promised(
        self, home: Home, moment: datetime, message: str
    ) -> None:
        with pytest.raises(InvalidInput, match=message):
            announce(home, 0, moment)

    @pytest.mark.parametrize(
        ("version", "error"),
        [
            (9, errors.UnknownVersion),
            (1, errors.VersionRetired),
            (3, errors.Conflict),
            (4, errors.VersionOffChain),
        ],
    )
    def test_versions_without_an_end_to_announce(
        self, home: Home, version: int, error: type[BackcastError]
    ) -> None:
        end(home, 1)
        with pytest.raises(error):
            announce(home, version)
        with pytest.raises(error):
            withdraw_deprecation(home.backcast, version, actor="tests")

    def test_live_version_may_be_announced_to_end(self, home: Home) -> None:
        assert announce(home, 2).state is VersionState.LIVE


class TestPins:
    def test_they_belong_to_the_consumer(self, home: Home) -> None:
        registry = home.backcast.registry
        key, _ = registry.keys.create("ads", Scope.READ)
        registry.keys.create("ads", Scope.READ)
        gone, _ = registry.keys.create("ads", Scope.ADMIN)
        registry.keys.revoke(gone.prefix)
        late, _ = registry.keys.create("ads", Scope.READ)
        expire(home, late.prefix, utc_now() - WEEK)
        registry.keys.create("search", Scope.READ, expires_at=utc_now() + WEEK)
        registry.usage.add(
            [
                Use("ads", 0, today() - timedelta(days=40), 1, 1),
                Use("ads", 1, today() - timedelta(days=2), 1, 1),
            ]
        )
        pin(home, "ads", 1)
        found = registry.keys.find(key.prefix)
        assert found is not None
        assert found.pin == 1
        rows = [(c.name, c.pin, c.keys_in_force, c.last_used) for c in registry.consumers.all()]
        assert rows == [("ads", 1, 2, today() - timedelta(days=2)), ("search", None, 1, None)]

    def test_who_and_what_cannot_be_pinned(self, home: Home) -> None:
        home.backcast.registry.keys.create("ads", Scope.READ)
        home.backcast.registry.usage.add([Use(ANONYMOUS, 0, today(), 1, 1)])
        with pytest.raises(errors.UnknownVersion):
            pin(home, "ads", 9)
        for name in ("nobody", ANONYMOUS):
            with pytest.raises(errors.UnknownConsumer, match="backcast consumers"):
                pin(home, name, 0)
        with pytest.raises(InvalidInput, match="without a key"):
            home.backcast.registry.keys.create(f" {ANONYMOUS}", Scope.READ)

    def test_replicas_follow(self, home: Home) -> None:
        _, secret = home.backcast.registry.keys.create("ads", Scope.READ, pin=0)
        with client_of(home, key_cache_seconds=0.3) as client:
            assert version_for(client, secret) == "0"
            pin(home, "ads", 1)
            eventually(lambda: version_for(client, secret) == "1")


def version_for(client: TestClient, secret: str) -> str:
    response = client.get("/embeddings/item 0", headers=bearer(secret))
    version: str = response.headers["Backcast-Version"]
    return version


def eventually(check: Callable[[], bool]) -> None:
    waited = threading.Event()
    for _ in range(300):
        if check():
            return
        waited.wait(0.1)
    raise AssertionError("never")


class TestUsage:
    def counted(self, home: Home, version: int | None = None) -> list[tuple[str, int, int, int]]:
        uses = home.backcast.registry.usage.since(today() - timedelta(days=1), version)
        return [(use.consumer, use.version, use.requests, use.vectors) for use in uses]

    def test_every_answered_request_is_counted(self, home: Home) -> None:
        _, ads = home.backcast.registry.keys.create("ads", Scope.READ)
        _, search = home.backcast.registry.keys.create("search", Scope.READ, pin=1)
        with client_of(home) as client:
            client.headers = httpx2.Headers(bearer(ads))
            first = client.get("/embeddings/item 0?version=0")  # asks the registry for the key
            client.get("/embeddings/item 1?version=0")  # the short way
            for tag in (first.headers["ETag"], "*"):
                known = {"If-None-Match": tag}
                assert client.get("/embeddings/item 0?version=0", headers=known).status_code == 304
            expecting = {"Backcast-Expect-Snapshot": first.headers["Backcast-Snapshot"]}
            client.get("/embeddings/item 2?version=0", headers=expecting)  # the long way
            for format in Format:
                body = {"ids": ["item 1", "nobody", "item 1"], "version": 0}
                client.post("/embeddings/batch", json=body, headers={"Accept": format})
            client.get("/embeddings/item 0?version=live")
            client.get("/embeddings/item 0", headers=bearer(search))
            for refused in (
                "/embeddings/nobody?version=0",
                "/embeddings/item 0?version=9",
                "/embeddings/item 0?version=3",
                "/embeddings/item 0",
                "/versions",
            ):
                client.get(refused)
            client.get("/embeddings/item 0?version=0", headers=bearer("bc_00000000_x"))
            client.post("/embeddings/batch", json={"ids": [7], "version": 0})
        assert self.counted(home) == [
            ("ads", 0, 8, 3 + 3 * 2),
            ("search", 1, 1, 1),
            ("ads", 2, 1, 1),
        ]
        assert self.counted(home, 1) == [("search", 1, 1, 1)]

    def test_callers_without_a_key_are_counted_together(self, home: Home) -> None:
        with client_of(home, reads="open") as client:
            del client.headers["Authorization"]
            for id in ("item 0", "item 1"):
                client.get(f"/embeddings/{id}?version=0")
        assert self.counted(home) == [(ANONYMOUS, 0, 2, 2)]

    def test_replicas_add_up_while_they_run(self, home: Home) -> None:
        _, ads = home.backcast.registry.keys.create("ads", Scope.READ)
        body = {"ids": home.ids(version=2)[:4], "version": 1}

        def ask(client: TestClient) -> None:
            for _ in range(10):
                client.post("/embeddings/batch", json=body, headers=bearer(ads))
                client.get("/embeddings/item 0?version=1", headers=bearer(ads))

        with (
            client_of(home, usage_seconds=0.05) as one,
            client_of(home, usage_seconds=0.05) as two,
            ThreadPoolExecutor(4) as pool,
        ):
            list(pool.map(ask, [one, two, one, two]))
            eventually(lambda: self.counted(home) == [("ads", 1, 80, 40 * 4 + 40)])

    def test_writers_of_many_rows_at_once_lose_nothing_and_wait_for_no_circle(
        self, home: Home
    ) -> None:
        names = [f"consumer {n}" for n in range(6)]
        for name in names:
            home.backcast.registry.keys.create(name, Scope.READ)
        uses = [Use(name, version, today(), 1, 2) for name in names for version in (0, 1)]
        with ThreadPoolExecutor(4) as pool:
            for turn in range(40):
                pool.submit(home.backcast.registry.usage.add, uses[:: 1 if turn % 2 else -1])
        assert self.counted(home) == [(name, j, 40, 80) for j in (0, 1) for name in names]

    def test_what_could_not_be_written_is_kept(self, home: Home) -> None:
        key, _ = home.backcast.registry.keys.create("ads", Scope.READ)
        usage = home.backcast.registry.usage

        class Failing:
            def add(self, _uses: object) -> None:
                meter.count(key, 0, 5)  # a request that comes in the meantime
                raise errors.RegistryError("away")

        meter = UsageMeter(Failing())  # type: ignore[arg-type]
        meter.count(key, 0, 1)
        meter.count(key, 1, 1)
        with pytest.raises(errors.RegistryError):
            meter.flush()
        meter._usage = usage
        meter.flush()
        meter.flush()
        assert self.counted(home) == [("ads", 0, 2, 6), ("ads", 1, 1, 1)]

    def test_threads_lose_no_count(self, home: Home) -> None:
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            self._count_on_threads(home)
        finally:
            sys.setswitchinterval(before)

    def _count_on_threads(self, home: Home) -> None:
        meter = UsageMeter(home.backcast.registry.usage)

        def count() -> None:
            for _ in range(5_000):
                meter.count(None, 0, 2)

        with ThreadPoolExecutor(4) as pool:
            for _ in range(4):
                pool.submit(count)
            meter.flush()
        meter.flush()
        assert self.counted(home) == [(ANONYMOUS, 0, 20_000, 40_000)]

    def test_days_are_those_of_utc(self, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
        meter = UsageMeter(home.backcast.registry.usage)
        for moment in (
            datetime(2026, 3, 28, 23, 59, 59, 900_000, UTC),
            datetime(2026, 3, 29, 0, 0, tzinfo=UTC),
        ):
            monkeypatch.setattr("service.usage.utc_now", lambda moment=moment: moment)
            meter.count(None, 0, 1)
            meter.flush()
        uses = home.backcast.registry.usage.since(date(2026, 3, 28))
        assert [use.day for use in uses] == [date(2026, 3, 29), date(2026, 3, 28)]
        assert len(home.backcast.registry.usage.since(date(2026, 3, 29))) == 1


@pytest.mark.parametrize("format", Format)
def test_announcement_is_in_every_answer(home: Home, format: Format) -> None:
    announced = announce(home, 0, LATER, reason="use version 2").deprecated_at
    announce(home, 2)
    assert announced is not None
    ids = home.ids(version=2)
    with client_of(home) as client:
        accept = {"Accept": format}
        one = client.get("/embeddings/item 0?version=0", headers=accept)
        known = {**accept, "If-None-Match": one.headers["ETag"]}
        body = {"ids": ids, "version": 0}
        expecting = {**accept, "Backcast-Expect-Snapshot": one.headers["Backcast-Snapshot"]}
        for answer in (
            one,
            client.get("/embeddings/item 0?version=0", headers=known),
            client.get("/embeddings/item 0?version=0", headers=expecting),
            client.post("/embeddings/batch", json=body, headers=accept),
        ):
            assert answer.headers["Deprecation"] == f"@{int(announced.timestamp())}"
            assert answer.headers["Sunset"] == "Sat, 31 Jan 2099 00:00:00 GMT"
            assert answer.headers["Link"] == (
                '</versions/0>; rel="deprecation"; type="application/json", '
                '</versions/2>; rel="successor-version"; anchor="/versions/0"'
            )
        live = client.get("/embeddings/item 0?version=live", headers=accept)
        assert live.headers["Link"] == '</versions/2>; rel="deprecation"; type="application/json"'
        other = client.get("/embeddings/item 0?version=1", headers=accept)
        assert not {"Deprecation", "Sunset", "Link"} & {name.title() for name in other.headers}
        assert client.get("/versions/0").json()["note"] == "use version 2"


@pytest.mark.parametrize("entity", Entity)
def test_retirement_reaches_every_replica_and_snapshots_in_grace(
    home: Home, entity: Entity
) -> None:
    ids = home.ids(entity, version=2)
    with (
        client_of(home, poll_seconds=0.05) as replica,
        client_of(home, poll_seconds=0.05) as other,
    ):
        before = replica.get("/embeddings/item 0?version=0").headers["Backcast-Snapshot"]
        home.publish(3)
        home.promote(3)
        for client in (replica, other):
            eventually(partial(serves, client, 3))
        in_grace = {"Backcast-Expect-Snapshot": before}
        body = {"ids": ids, "version": 0, "entity": entity}
        kept = other.post("/embeddings/batch", json=body, headers=in_grace)
        assert_served(read_rows(kept), home, ids, 0, entity, live=2)
        retired = replica.post("/admin/versions/0/retire", json={})
        assert code_of(retired) == (409, "version-in-use")
        assert retired.json()["used"] == {name: f"{today()}" for name in retired.json()["used"]}
        forced = replica.post("/admin/versions/0/retire", json={"force": True, "reason": "too old"})
        assert forced.json()["state"] == "retired"
        for client in (replica, other):
            for headers in ({}, in_grace):
                eventually(partial(gone, client, body, headers))
        assert "too old" in other.post("/embeddings/batch", json=body).json()["detail"]
        assert other.get("/embeddings/item 0?version=1").status_code == 200


def serves(client: TestClient, version: int) -> bool:
    live: int = client.get("/readyz").json()["live_version"]
    return live == version


def gone(client: TestClient, body: dict[str, Any], headers: dict[str, str]) -> bool:
    one = client.get(f"/embeddings/item 0?version={body['version']}", headers=headers)
    many = client.post("/embeddings/batch", json=body, headers=headers)
    return [code_of(one)[0], code_of(many)[0]] == [410, 410]


def code_of(response: Any) -> tuple[int, str]:
    if response.status_code == 200:
        return 200, "ok"
    return response.status_code, response.json()["type"].removeprefix("urn:backcast:problem:")


class TestHttp:
    @pytest.fixture
    def client(self, home: Home) -> Iterator[TestClient]:
        with client_of(home, poll_seconds=3600.0) as opened:
            yield opened

    def test_deprecation_and_its_end(self, home: Home, client: TestClient) -> None:
        order = {"sunset_at": "2099-01-31T01:00:00+01:00", "reason": "use version 2"}
        told = client.post("/admin/versions/0/deprecate", json=order).json()
        assert told["deprecated_at"].endswith("Z")
        assert {name: told[name] for name in ("number", "state", "sunset_at", "note")} == {
            "number": 0,
            "state": "superseded",
            "sunset_at": "2099-01-31T00:00:00Z",
            "note": "use version 2",
        }
        told = client.delete("/admin/versions/0/deprecate").json()
        assert (told["deprecated_at"], told["sunset_at"]) == (None, None)
        told = client.post("/admin/versions/0/retire", json={"reason": "done"}).json()
        assert (told["state"], told["note"]) == ("retired", "done")
        assert told == client.post("/admin/versions/0/retire", json={}).json()

    @pytest.mark.parametrize(
        ("path", "order", "refusal"),
        [
            ("0/deprecate", {"sunset_at": "2099-01-31T00:00:00"}, (422, "invalid-input")),
            ("0/deprecate", {"sunset_at": "2020-01-31T00:00:00Z"}, (422, "invalid-input")),
            ("0/deprecate", {}, (422, "invalid-input")),
            ("9/deprecate", {"sunset_at": "2099-01-31T00:00:00Z"}, (404, "unknown-version")),
            ("3/deprecate", {"sunset_at": "2099-01-31T00:00:00Z"}, (409, "conflict")),
            ("0/retire", {"force": True}, (422, "invalid-input")),
            ("0/retire", {"forced": True}, (422, "invalid-input")),
            ("2/retire", {}, (409, "conflict")),
            ("4/retire", {}, (409, "version-off-chain")),
        ],
        ids=str,
    )
    def test_orders_that_are_refused(
        self, client: TestClient, path: str, order: dict[str, Any], refusal: tuple[int, str]
    ) -> None:
        assert code_of(client.post(f"/admin/versions/{path}", json=order)) == refusal

    def test_text_that_not_every_database_holds_is_no_unforeseen_error(
        self, home: Home, client: TestClient, backends: dict[str, Any]
    ) -> None:
        look = {"expected_live": 2, "dry_run": True, "to_snapshot": "nul \0"}
        answers = {
            client.post("/admin/rollback", json=look).status_code,
            client.put("/admin/consumers/%00", json={"pin": None}).status_code,
        }
        assert answers == ({422} if backends else {404})  # SQLite holds anything

    def test_pins(self, home: Home, client: TestClient) -> None:
        home.backcast.registry.keys.create("team/ads é", Scope.READ)
        answer = client.put("/admin/consumers/team%2Fads%20%C3%A9", json={"pin": 1})
        assert (answer.status_code, answer.json()) == (200, {"pin": 1})
        listed = client.get("/admin/consumers").json()["consumers"]
        assert [(c["name"], c["pin"]) for c in listed][-1] == ("team/ads é", 1)
        assert client.put("/admin/consumers/team/ads é", json={"pin": None}).json()["pin"] is None
        for name, body, refusal in (
            ("nobody", {"pin": 1}, (404, "unknown-consumer")),
            ("team/ads é", {"pin": 9}, (404, "unknown-version")),
            ("team/ads é", {"pin": "1"}, (422, "invalid-input")),
            ("team/ads é", {}, (422, "invalid-input")),
        ):
            assert code_of(client.put(f"/admin/consumers/{name}", json=body)) == refusal

    def test_usage(self, home: Home, client: TestClient) -> None:
        home.backcast.registry.keys.create("ads", Scope.READ)
        rows = [("ads", 0, 0), ("ads", 1, 0), ("ads", 0, 29), ("ads", 0, 30)]
        for name, version, age in rows:
            day = today() - timedelta(days=age)
            home.backcast.registry.usage.add([Use(name, version, day, 2, 3)])
        told = client.get("/admin/usage").json()
        assert told["since"] == f"{today() - timedelta(days=29)}"
        assert [(use["version"], use["day"]) for use in told["usage"]] == [
            (0, f"{today()}"),
            (1, f"{today()}"),
            (0, f"{today() - timedelta(days=29)}"),
        ]
        assert told["usage"][0] == {
            "consumer": "ads",
            "version": 0,
            "day": f"{today()}",
            "requests": 2,
            "vectors": 3,
        }
        assert len(client.get("/admin/usage?version=0&days=1").json()["usage"]) == 1
        assert len(client.get("/admin/usage?version=0&days=31").json()["usage"]) == 3
        for query in ("days=0", "days=x", "version=-1", "verison=0"):
            assert code_of(client.get(f"/admin/usage?{query}")) == (422, "invalid-input")

    def test_unflushed_counts_are_written_when_it_stops(self, home: Home) -> None:
        secret = secret_of(home)
        with client_of(home, usage_seconds=60.0) as client:
            client.get("/embeddings/item 0?version=0", headers=bearer(secret))
            assert home.backcast.registry.usage.since(today()) == []
        assert len(home.backcast.registry.usage.since(today())) == 1
