"""What the registry promises, held against SQLite and PostgreSQL."""

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import Connection, Engine, Table, event, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, StatementError

from backcast.acts import Act, Actor, ActRecord, Outcome
from backcast.errors import (
    Conflict,
    DimensionMismatch,
    Forbidden,
    IdempotencyKeyReused,
    InvalidInput,
    LastAdminKey,
    NothingPublished,
    OperationAbandoned,
    OperationRunning,
    PromotionConflict,
    RegistryError,
    UnknownKey,
    UnknownOperation,
    UnknownSnapshot,
    UnknownVersion,
)
from backcast.registry import NumberTaken, OperationDraft, Registry, Switch
from backcast.registry.database import utc_now
from backcast.registry.keys import matches, split_secret
from backcast.registry.schema import make_engine, upgrade
from backcast.registry.tables import api_keys, audit, audit_outcomes, metadata, snapshots
from backcast.registry.versions import set_note, set_state
from backcast.versions import (
    Claim,
    FileDigest,
    KeyState,
    Live,
    Operation,
    OperationState,
    Scope,
    SnapshotRecord,
    Transform,
    Version,
    VersionState,
)
from tests.support import draft, registry_away_after

T = TypeVar("T")

DAY, MINUTE = timedelta(days=1), timedelta(minutes=1)
NOON = datetime(2026, 3, 29, 12, 0, 0, 123456, UTC)
LATER = datetime(2099, 3, 29, 12, 0, 0, 123456, UTC)
FILES = {"transform.safetensors": FileDigest(12, "a" * 64), "direct": FileDigest(8, "b" * 64)}


@pytest.fixture(scope="module")
def sqlite_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with this release's schema and no rows, to copy."""
    file = tmp_path_factory.mktemp("registry") / "registry.db"
    engine = make_engine(f"sqlite:///{file}")
    upgrade(engine)
    engine.dispose()
    return file


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_registry"), tmp_path / "registry.db")
        engine = make_engine(f"sqlite:///{tmp_path / 'registry.db'}")
    else:
        engine = make_engine(request.getfixturevalue("empty_registry"))
    yield engine
    engine.dispose()


@pytest.fixture
def registry(engine: Engine) -> Registry:
    return Registry(engine)


def backward(source: int, target: int, rows: int = 4, cols: int = 4) -> Transform:
    return Transform(source, target, False, rows, cols, affine=False, file="transform.safetensors")


def add(registry: Registry, number: int, parent: int | None = None, **changes: Any) -> Version:
    maps = () if parent is None else (backward(number, parent),)
    made = draft(number, parent, 4, maps)
    named = {"folder": f"versions/v{number}", "files": FILES, **changes}
    return registry.versions.register(replace(made, **named))


def add_line(registry: Registry, parents: dict[int, int | None]) -> None:
    """Register versions with one snapshot each: version 3's is named s3."""
    for number, parent in parents.items():
        add(registry, number, parent)
        add_snapshot(registry, f"s{number}", number)


def add_snapshot(
    registry: Registry, id: str, version: int, created_at: datetime = NOON
) -> SnapshotRecord:
    record = SnapshotRecord(
        id, version, 4, {"item": 3, "user": 0}, f"snapshots/{id}", "c" * 64, 0, created_at
    )
    registry.snapshots.register(record, details={"rows": 3})
    return record


def change(
    seen: Live | None, version: int, snapshot: str | None = None, kind: str = "promote"
) -> Switch:
    return Switch(kind, seen, version, snapshot or f"s{version}", actor="tests")


def promote(registry: Registry, version: int, snapshot: str | None = None) -> Live:
    seen = registry.deployments.live()
    return registry.deployments.switch(change(seen, version, snapshot))


def states(registry: Registry) -> dict[int, str]:
    return {v.number: str(v.state) for v in registry.versions.all()}


def superseded(registry: Registry, *ids: str) -> list[str]:
    return [id for id in ids if registry.snapshots.get(id).superseded_at is not None]


def at_once(*acts: Callable[[], T]) -> list[T | BaseException]:
    """Run all acts in threads that start together, and return what each gave or raised."""
    barrier = threading.Barrier(len(acts))

    def run(act: Callable[[], T]) -> T | BaseException:
        barrier.wait()
        try:
            return act()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(run, acts))


def contents(engine: Engine) -> dict[str, list[Any]]:
    with engine.connect() as connection:
        return {
            name: [tuple(row) for row in connection.execute(select(table))]
            for name, table in metadata.tables.items()
        }


class TestVersions:
    def test_version_comes_back_as_it_was_registered(self, registry: Registry) -> None:
        before = utc_now()
        add(registry, 0)
        details = {"λ": 16, "metrics": {"recall": [0.5, None]}}
        maps = (backward(1, 0), Transform(1, 0, True, 4, 4, affine=True, file="direct"))
        made = replace(draft(1, 0, 4, maps), folder="f", files=FILES, details=details)
        version = registry.versions.register(made)
        assert registry.versions.get(1) == version
        assert before <= version.created_at <= utc_now()
        assert version == Version(
            number=1,
            parent=0,
            state=VersionState.REGISTERED,
            dim=4,
            method="bc-aligner",
            until=1_400_000_001,
            seed=1,
            dataset="tests",
            dataset_fingerprint="f" * 64,
            folder="f",
            files=FILES,
            details=details,
            created_at=version.created_at,
        )
        by_kind = sorted(registry.versions.transforms(), key=lambda t: t.direct)
        assert by_kind == list(maps)

    def test_versions_come_oldest_first(self, registry: Registry) -> None:
        for number, parent in ((0, None), (2, 0), (1, 0), (7, 2)):
            add(registry, number, parent)
        assert [v.number for v in registry.versions.all()] == [0, 1, 2, 7]

    def test_next_number_follows_the_highest_ever(self, registry: Registry) -> None:
        assert registry.versions.next_number() == 0
        add(registry, 0)
        add(registry, 4, 0)
        add(registry, 2, 0)
        assert registry.versions.next_number() == 5

    def test_number_is_given_once(self, registry: Registry) -> None:
        add(registry, 0)
        first = add(registry, 1, 0)
        with pytest.raises(NumberTaken):
            add(registry, 1, 0, folder="versions/another")
        assert registry.versions.all()[1:] == [first]
        assert registry.versions.transforms() == [backward(1, 0)]

    def test_number_of_a_rejected_version_is_not_given_again(
        self, registry: Registry, engine: Engine
    ) -> None:
        add_line(registry, {0: None, 1: 0})
        with engine.begin() as connection:
            set_state(connection, [1], VersionState.REJECTED)
        assert registry.versions.next_number() == 2
        with pytest.raises(NumberTaken):
            add(registry, 1, 0, folder="versions/another")

    def test_two_trainers_never_share_a_number(self, registry: Registry) -> None:
        add(registry, 0)
        for number in range(1, 6):
            outcomes = at_once(
                *(
                    partial(add, registry, number, 0, folder=f"versions/{number}-{n}")
                    for n in range(3)
                )
            )
            made = [v for v in outcomes if isinstance(v, Version)]
            assert len(made) == 1
            assert sum(isinstance(v, NumberTaken) for v in outcomes) == 2
            assert registry.versions.get(number) == made[0]

    @pytest.mark.parametrize("parent", [0, 5])
    def test_parent_must_exist(self, registry: Registry, parent: int) -> None:
        with pytest.raises(UnknownVersion, match=f"Version {parent} does not exist"):
            add(registry, 6, parent)
        assert registry.versions.all() == []

    def test_target_of_a_direct_map_must_exist(self, registry: Registry) -> None:
        add(registry, 0)
        maps = (backward(3, 0), Transform(3, 2, True, 4, 4, affine=False, file="direct"))
        with pytest.raises(UnknownVersion, match="Version 2 does not exist"):
            add(registry, 3, 0, transforms=maps)
        assert registry.versions.next_number() == 1

    @pytest.mark.parametrize(
        ("direct", "rows", "cols"), [(False, 5, 4), (False, 4, 3), (True, 3, 4), (True, 4, 5)]
    )
    def test_map_must_fit_both_versions(
        self, registry: Registry, direct: bool, rows: int, cols: int
    ) -> None:
        add(registry, 0)
        odd = Transform(1, 0, direct, rows, cols, affine=False, file="direct")
        maps = (backward(1, 0), odd) if direct else (odd,)
        message = rf"map 1 → 0: expected \(4, 4\), got \({rows}, {cols}\)"
        with pytest.raises(DimensionMismatch, match=message):
            add(registry, 1, 0, transforms=maps)
        assert registry.versions.transforms() == []

    def test_map_must_have_its_file(self, registry: Registry) -> None:
        add(registry, 0)
        with pytest.raises(InvalidInput, match=r"map 1 → 0 has no file 'transform\.safetensors'"):
            add(registry, 1, 0, files={})
        assert registry.versions.next_number() == 1

    def test_unknown_version_is_named(self, registry: Registry) -> None:
        with pytest.raises(UnknownVersion, match="Version 3 does not exist"):
            registry.versions.get(3)


class TestLive:
    def test_nothing_is_live_at_first(self, registry: Registry) -> None:
        add_line(registry, {0: None})
        assert registry.deployments.live() is None
        assert registry.deployments.history() == []

    def test_switches_count_generations_and_are_kept(self, registry: Registry) -> None:
        add_line(registry, {0: None, 1: 0})
        first = promote(registry, 0)
        second = registry.deployments.switch(
            Switch("promote", first, 1, "s1", "ann", "better", True, {"maps": "fine"})
        )
        assert (first, second) == (Live(0, "s0", 0, 1), Live(1, "s1", 0, 2))
        assert registry.deployments.live() == second
        newest, oldest = registry.deployments.history()
        assert (oldest["generation"], oldest["from_version"], oldest["forced"]) == (1, None, False)
        assert newest.pop("id") > oldest["id"]
        assert timedelta(0) <= utc_now() - newest.pop("created_at") < DAY
        assert newest == {
            "kind": "promote",
            "version": 1,
            "snapshot": "s1",
            "from_version": 0,
            "from_snapshot": "s0",
            "generation": 2,
            "delta": 0,
            "from_delta": 0,
            "actor": "ann",
            "reason": "better",
            "forced": True,
            "gates": {"maps": "fine"},
            "operation": None,
        }

    @pytest.mark.parametrize("first", [True, False], ids=["first-ever", "later"])
    def test_one_of_two_switches_at_once_wins(self, registry: Registry, first: bool) -> None:
        add_line(registry, {0: None, 1: 0, 2: 0, 3: 0, 4: 0})
        seen = None if first else promote(registry, 0)
        outcomes = at_once(
            *(
                partial(registry.deployments.switch, change(seen, version))
                for version in (1, 2, 3, 4)
            )
        )
        [won] = [o for o in outcomes if isinstance(o, Live)]
        lost = [o for o in outcomes if isinstance(o, PromotionConflict)]
        assert len(lost) == 3
        assert registry.deployments.live() == won
        history = registry.deployments.history()
        assert [d["version"] for d in history] == ([won.version] if first else [won.version, 0])
        assert states(registry)[won.version] == "live"
        assert list(states(registry).values()).count("live") == 1
        for error in lost:
            assert error.data["current_version"] == won.version
            assert error.data["expected_version"] == (None if first else 0)

    def test_stale_switch_changes_nothing(self, registry: Registry, engine: Engine) -> None:
        add_line(registry, {0: None, 1: 0, 2: 1})
        seen = promote(registry, 0)
        promote(registry, 1)
        before = contents(engine)
        message = r"Live was version 0 \(s0\) .* is version 1 \(s1\) now; nothing was changed"
        with pytest.raises(PromotionConflict, match=message):
            registry.deployments.switch(change(seen, 2))
        assert contents(engine) == before

    def test_the_same_version_live_again_is_another_moment(self, registry: Registry) -> None:
        add_line(registry, {0: None, 1: 0})
        seen = promote(registry, 0)
        promote(registry, 1)
        promote(registry, 0)  # version and snapshot are those of ``seen``
        with pytest.raises(PromotionConflict):
            registry.deployments.switch(change(seen, 1))

    def test_switch_to_what_is_not_registered_changes_nothing(
        self, registry: Registry, engine: Engine
    ) -> None:
        add_line(registry, {0: None, 1: 0})
        seen = promote(registry, 0)
        before = contents(engine)
        with pytest.raises(UnknownSnapshot):
            registry.deployments.switch(change(seen, 1, "s9"))
        assert contents(engine) == before

    def test_chain_of_the_live_version_is_superseded(self, registry: Registry) -> None:
        add_line(registry, {0: None, 1: 0, 2: 1, 3: 2})
        promote(registry, 0)
        promote(registry, 2)
        assert states(registry) == {0: "superseded", 1: "superseded", 2: "live", 3: "registered"}

    def test_sibling_that_was_live_is_rolled_back(self, registry: Registry) -> None:
        add_line(registry, {0: None, 1: 0, 2: 0})
        promote(registry, 0)
        promote(registry, 1)
        promote(registry, 2)
        assert states(registry) == {0: "superseded", 1: "rolled_back", 2: "live"}

    def test_version_is_rolled_back_to_its_parent(self, registry: Registry) -> None:
        add_line(registry, {0: None, 1: 0})
        promote(registry, 0)
        seen = promote(registry, 1)
        registry.deployments.switch(change(seen, 0, kind="rollback"))
        assert states(registry) == {0: "live", 1: "rolled_back"}
        assert superseded(registry, "s0", "s1") == ["s1"]

    def test_version_off_the_chain_keeps_its_state(self, registry: Registry) -> None:
        add_line(registry, {0: None, 1: 0, 2: 0, 3: 2})
        for version in (0, 1, 2, 3):
            promote(registry, version)
        assert states(registry) == {0: "superseded", 1: "rolled_back", 2: "superseded", 3: "live"}

    def test_retired_version_stays_retired(self, registry: Registry, engine: Engine) -> None:
        add_line(registry, {0: None, 1: 0, 2: 1})
        promote(registry, 1)
        with engine.begin() as connection:
            set_state(connection, [0], VersionState.RETIRED)
        promote(registry, 2)
        assert states(registry) == {0: "retired", 1: "superseded", 2: "live"}

    def test_catalog_is_of_one_moment(self, registry: Registry, engine: Engine) -> None:
        add_line(registry, {0: None, 1: 0})
        seen = promote(registry, 0)
        url = engine.url.render_as_string(hide_password=False)
        pending = [change(seen, 1)]

        def meanwhile(connection: Connection, _cursor: Any, sql: str, *_: Any) -> None:
            if "FROM live" in sql and connection.engine.pool is engine.pool and pending:
                other.deployments.switch(pending.pop())

        event.listen(engine, "after_cursor_execute", meanwhile)
        with Registry(make_engine(url)) as other:
            catalog = registry.deployments.catalog()
            assert pending == []
            assert catalog.live == seen
            assert {v.number: v.state for v in catalog.versions}[0] is VersionState.LIVE
            assert registry.deployments.catalog().live == other.deployments.live() != seen


class TestSnapshots:
    def test_snapshot_comes_back_as_it_was_registered(self, registry: Registry) -> None:
        add(registry, 0)
        record = add_snapshot(registry, "s0", 0)
        assert registry.snapshots.get("s0") == record
        with pytest.raises(UnknownSnapshot, match="'s1'"):
            registry.snapshots.get("s1")

    def test_latest_is_the_last_of_its_version_whatever_its_clock_said(
        self, registry: Registry
    ) -> None:
        add(registry, 0)
        add(registry, 1, 0)
        assert registry.snapshots.latest(0) is None
        add_snapshot(registry, "first", 0, NOON + DAY)
        add_snapshot(registry, "last", 0, NOON)
        add_snapshot(registry, "other", 1, NOON + 2 * DAY)
        latest = registry.snapshots.latest(0)
        assert latest is not None
        assert latest.id == "last"

    def test_what_was_live_and_older_ones_of_the_version_are_superseded(
        self, registry: Registry
    ) -> None:
        add_line(registry, {0: None, 1: 0, 2: 1})
        for id, version, age in (("a", 1, 2), ("b", 1, 1), ("c", 1, -1), ("d", 0, -1)):
            add_snapshot(registry, id, version, NOON + age * DAY)
        seen = promote(registry, 0)
        assert superseded(registry, "s0", "s1", "a", "b", "c", "d") == []
        before = utc_now()
        registry.deployments.switch(change(seen, 1, "b"))
        assert superseded(registry, "s0", "s1", "s2", "a", "b", "c", "d") == ["s0", "s1", "a"]
        at = registry.snapshots.get("s0").superseded_at
        assert at is not None
        assert before <= at <= utc_now()

    def test_only_what_was_superseded_that_long_ago_is_condemned(self, registry: Registry) -> None:
        add_line(registry, {0: None, 1: 0, 2: 1})
        promote(registry, 0)
        assert registry.snapshots.condemn(utc_now()) == []
        promote(registry, 1)
        at = registry.snapshots.get("s0").superseded_at
        assert at is not None
        assert registry.snapshots.condemn(at - timedelta(microseconds=1)) == []
        assert [s.id for s in registry.snapshots.condemn(at)] == ["s0"]
        assert registry.snapshots.get("s1").condemned_at is None
        assert registry.snapshots.get("s2").condemned_at is None

    def test_condemned_snapshot_waits_until_it_is_noted_as_deleted(
        self, registry: Registry
    ) -> None:
        add_line(registry, {0: None, 1: 0})
        promote(registry, 0)
        promote(registry, 1)
        for _ in range(2):  # a sweep that was killed is finished by the next
            assert [s.id for s in registry.snapshots.condemn(utc_now())] == ["s0"]
        assert registry.snapshots.latest(0) is None
        registry.snapshots.mark_deleted("s0")
        assert registry.snapshots.condemn(utc_now()) == []
        assert registry.snapshots.get("s0").deleted_at is not None

    def test_condemned_snapshot_cannot_go_live(self, registry: Registry) -> None:
        add_line(registry, {0: None, 1: 0})
        promote(registry, 0)
        seen = promote(registry, 1)
        registry.snapshots.condemn(utc_now())
        with pytest.raises(NothingPublished, match="Version 0 has no snapshot"):
            registry.deployments.switch(change(seen, 0, kind="rollback"))
        assert registry.deployments.live() == seen
        assert states(registry) == {0: "superseded", 1: "live"}
        assert len(registry.deployments.history()) == 2

    def test_live_snapshot_is_never_condemned(self, registry: Registry) -> None:
        add_line(registry, {0: None, 1: 0})
        promote(registry, 0)
        seen = promote(registry, 1)
        registry.deployments.switch(change(seen, 0, kind="rollback"))
        assert [s.id for s in registry.snapshots.condemn(utc_now())] == ["s1"]
        assert registry.snapshots.get("s0").condemned_at is None

    def test_times_come_back_aware_in_utc(self, registry: Registry) -> None:
        add(registry, 0)
        local = NOON.astimezone(timezone(timedelta(hours=5, minutes=30)))
        add_snapshot(registry, "s0", 0, local)
        read = registry.snapshots.get("s0").created_at
        assert read == NOON
        assert read.tzinfo is UTC

    def test_naive_times_are_refused(self, registry: Registry, engine: Engine) -> None:
        add(registry, 0)
        with pytest.raises(StatementError, match="naive datetime"):
            add_snapshot(registry, "s0", 0, NOON.replace(tzinfo=None))
        assert contents(engine)["snapshots"] == []


class TestKeys:
    def test_key_is_found_by_the_prefix_of_its_secret(self, registry: Registry) -> None:
        add(registry, 0)
        key, secret = registry.keys.create("search", Scope.READ, pin=0, expires_at=LATER)
        assert split_secret(secret) == key.prefix
        assert registry.keys.find(key.prefix) == key
        assert (key.consumer, key.scope, key.pin) == ("search", Scope.READ, 0)
        assert (key.expires_at, key.revoked_at, key.successor) == (LATER, None, None)
        assert key.in_force(LATER - DAY)
        assert not key.in_force(LATER)

    def test_only_the_whole_secret_matches(self, registry: Registry) -> None:
        key, secret = registry.keys.create("search", Scope.READ)
        other, _ = registry.keys.create("search", Scope.READ)
        assert matches(key, secret)
        assert not matches(other, secret)
        for wrong in (secret[:-1], secret + "x", secret.upper(), key.prefix, key.sha256, ""):
            assert not matches(key, wrong)

    def test_secret_is_not_stored(self, registry: Registry, engine: Engine) -> None:
        secrets = [registry.keys.create(f"c{n}", scope)[1] for n, scope in enumerate(Scope)]
        stored = repr(contents(engine))
        for secret in secrets:
            random = secret.split("_", 2)[2]
            assert len(random) == 43  # 32 bytes
            assert random not in stored
            assert (split_secret(secret) or "?") in stored  # the search would find what is there

    def test_unknown_prefix_finds_nothing(self, registry: Registry) -> None:
        assert registry.keys.find("00000000") is None

    def test_keys_come_oldest_first(self, registry: Registry) -> None:
        made = [registry.keys.create(name, Scope.ADMIN)[0] for name in ("b", "a", "b")]
        assert registry.keys.all() == made
        assert len({key.prefix for key in made}) == 3

    def test_revoked_key_is_not_in_force_from_then_on(self, registry: Registry) -> None:
        key, _ = registry.keys.create("search", Scope.READ)
        registry.keys.revoke(key.prefix)
        revoked = registry.keys.find(key.prefix)
        assert revoked is not None
        assert not revoked.in_force(utc_now())
        registry.keys.revoke(key.prefix)
        assert registry.keys.find(key.prefix) == revoked
        with pytest.raises(UnknownKey, match="'00000000'"):
            registry.keys.revoke("00000000")

    def test_pin_is_the_consumers_for_all_of_its_keys(self, registry: Registry) -> None:
        add_line(registry, {0: None, 1: 0})
        registry.keys.create("search", Scope.READ)
        registry.keys.create("ads", Scope.READ, pin=0)
        registry.keys.create("ads", Scope.ADMIN)
        registry.keys.create("ads", Scope.READ, pin=0)
        assert [key.pin for key in registry.keys.all()] == [None, 0, 0, 0]

    @pytest.mark.parametrize(("first", "words"), [(None, "no pin"), (0, "the pin 0")])
    def test_later_key_changes_no_earlier_one(
        self, registry: Registry, first: int | None, words: str
    ) -> None:
        add_line(registry, {0: None, 1: 0})
        registry.keys.create("search", Scope.READ, pin=first)
        with pytest.raises(Conflict, match=f"'search' has {words}"):
            registry.keys.create("search", Scope.READ, pin=1)
        assert [key.pin for key in registry.keys.all()] == [first]

    def test_pin_must_exist(self, registry: Registry, engine: Engine) -> None:
        with pytest.raises(UnknownVersion, match="Version 4"):
            registry.keys.create("search", Scope.READ, pin=4)
        assert contents(engine)["consumers"] == contents(engine)["api_keys"] == []

    @pytest.mark.parametrize("name", ["", "  ", "x" * 129])
    def test_consumer_has_a_name(self, registry: Registry, name: str) -> None:
        with pytest.raises(InvalidInput, match="1 to 128 characters"):
            registry.keys.create(name, Scope.READ)

    @pytest.mark.parametrize(
        "name",
        [
            "q\rINFO forged",
            "q\x1b[31m",
            "q\x9b31m",
            "q\tr",
            "q\0",
            " q",
            "q\n",
            "q\u202er",
            "q\udcff",
        ],
    )
    def test_consumers_name_prints(self, registry: Registry, engine: Engine, name: str) -> None:
        with pytest.raises(InvalidInput, match="a blank at an end, or a character that") as raised:
            registry.keys.create(name, Scope.READ)
        assert repr(name) in raised.value.message
        assert contents(engine)["consumers"] == []
        registry.keys.create("Größe 1 (ранг) 日本", Scope.READ)

    @pytest.mark.parametrize("name", ["cli:root@host", " cli:root@host", "\rcli:root@host"])
    def test_consumer_is_no_command(self, registry: Registry, name: str) -> None:
        with pytest.raises(InvalidInput, match="does not begin with cli:"):
            registry.keys.create(name, Scope.READ)

    @pytest.mark.parametrize(
        ("expiry", "words"), [(LATER.replace(tzinfo=None), "has no zone"), (NOON, "is over")]
    )
    def test_expiry_is_to_come_and_has_a_zone(
        self, registry: Registry, engine: Engine, expiry: datetime, words: str
    ) -> None:
        with pytest.raises(InvalidInput, match=words):
            registry.keys.create("search", Scope.READ, expires_at=expiry)
        assert contents(engine)["consumers"] == contents(engine)["api_keys"] == []
        key, _ = registry.keys.create("search", Scope.READ)
        with pytest.raises(InvalidInput, match=words):
            registry.keys.rotate(key.prefix, DAY, expires_at=expiry)
        assert registry.keys.all() == [key]

    def test_prefix_that_is_taken_is_not_given_again(
        self, registry: Registry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first, secret = registry.keys.create("search", Scope.READ)
        drawn = iter([first.prefix, first.prefix, "00c0ffee"])
        monkeypatch.setattr("backcast.registry.keys.secrets.token_hex", lambda _: next(drawn))
        other, other_secret = registry.keys.create("ads", Scope.ADMIN)
        assert (other.prefix, split_secret(other_secret)) == ("00c0ffee", "00c0ffee")
        assert registry.keys.find(first.prefix) == first
        assert matches(first, secret)

    def test_first_keys_of_one_consumer_may_be_made_at_once(self, registry: Registry) -> None:
        for round in range(5):
            create = partial(registry.keys.create, f"consumer {round}", Scope.READ)
            made = at_once(*[create] * 4)
            assert [m for m in made if isinstance(m, BaseException)] == []
        assert len(registry.keys.all()) == 20

    def test_secret_is_returned_though_the_registry_goes_away_then(
        self, registry: Registry
    ) -> None:
        with registry_away_after("INSERT INTO api_keys"):
            key, secret = registry.keys.create("search", Scope.READ)
            with pytest.raises(RegistryError, match="is away"):
                registry.keys.find(key.prefix)
        assert matches(key, secret)
        with registry_away_after("INSERT INTO api_keys"):
            new, secret = registry.keys.rotate(key.prefix, DAY)
        assert matches(new, secret)
        with registry_away_after("UPDATE api_keys"):
            ended = registry.keys.revoke(key.prefix)
        assert ended.successor == new.prefix
        assert registry.keys.all() == [ended, new]


class TestRotation:
    def test_successor_is_of_the_same_consumer_scope_and_pin(self, registry: Registry) -> None:
        add_line(registry, {0: None})
        old, old_secret = registry.keys.create("search", Scope.ADMIN, pin=0)
        new, secret = registry.keys.rotate(old.prefix, DAY)
        assert (new.consumer, new.scope, new.pin) == ("search", Scope.ADMIN, 0)
        assert (new.expires_at, new.revoked_at, new.successor) == (None, None, None)
        assert matches(new, secret)
        assert not matches(new, old_secret)
        kept = registry.keys.find(old.prefix)
        assert kept is not None
        assert kept.successor == new.prefix
        assert kept.in_force(utc_now() + DAY - MINUTE)
        assert not kept.in_force(utc_now() + DAY)

    def test_without_an_overlap_the_old_key_is_revoked(self, registry: Registry) -> None:
        old, _ = registry.keys.create("search", Scope.READ)
        registry.keys.rotate(old.prefix, timedelta(0))
        kept = registry.keys.find(old.prefix)
        assert kept is not None
        assert kept.state(NOON) is KeyState.REVOKED  # whatever the time is

    def test_overlap_prolongs_no_key(self, registry: Registry) -> None:
        soon = registry.now() + MINUTE
        old, _ = registry.keys.create("search", Scope.READ, expires_at=soon)
        registry.keys.rotate(old.prefix, DAY)
        kept = registry.keys.find(old.prefix)
        assert kept is not None
        assert kept.expires_at == soon

    def test_successor_lives_as_long_as_the_old_key_was_made_to(self, registry: Registry) -> None:
        old, _ = registry.keys.create("search", Scope.READ, expires_at=registry.now() + DAY)
        assert old.expires_at is not None
        new, _ = registry.keys.rotate(old.prefix, MINUTE)
        assert new.expires_at is not None
        lifetimes = [key.expires_at - key.created_at for key in (old, new) if key.expires_at]
        assert abs(lifetimes[1] - lifetimes[0]) < MINUTE
        told, _ = registry.keys.rotate(new.prefix, MINUTE, expires_at=LATER)
        assert told.expires_at == LATER

    def test_successor_of_a_key_that_expires_on_the_last_day(self, registry: Registry) -> None:
        last = datetime.max.replace(tzinfo=UTC)
        old, _ = registry.keys.create("search", Scope.READ, expires_at=last)
        for overlap in (DAY, timedelta(0)):
            old, _ = registry.keys.rotate(old.prefix, overlap)
            assert old.expires_at is not None
            assert old.expires_at >= last
        assert old in registry.keys.all()

    def test_key_is_rotated_once(self, registry: Registry) -> None:
        old, _ = registry.keys.create("search", Scope.READ)
        rotate = partial(registry.keys.rotate, old.prefix, DAY)
        made = at_once(*[rotate] * 4)
        [new] = [found[0] for found in made if not isinstance(found, BaseException)]
        refusals = [error for error in made if isinstance(error, BaseException)]
        assert [type(error) for error in refusals] == [Conflict] * 3
        assert f"was rotated to {new.prefix} before" in str(refusals[0])
        assert [key.prefix for key in registry.keys.all()] == [old.prefix, new.prefix]

    def test_only_a_key_in_force_is_rotated(self, registry: Registry, engine: Engine) -> None:
        gone, _ = registry.keys.create("search", Scope.READ)
        registry.keys.revoke(gone.prefix)
        late, _ = registry.keys.create("search", Scope.READ)
        with engine.begin() as connection:
            mine = update(api_keys).where(api_keys.c.prefix == late.prefix)
            connection.execute(mine.values(expires_at=NOON))
        for key, word in ((gone, "revoked"), (late, "expired")):
            with pytest.raises(Conflict, match=f"{key.prefix} is {word} and cannot be rotated"):
                registry.keys.rotate(key.prefix, DAY)
        with pytest.raises(UnknownKey):
            registry.keys.rotate("00000000", DAY)
        assert len(registry.keys.all()) == 2


class TestLastAdmin:
    def test_last_key_in_force_is_spared_where_that_is_asked_for(self, registry: Registry) -> None:
        one, _ = registry.keys.create("platform", Scope.ADMIN)
        other, _ = registry.keys.create("platform", Scope.ADMIN)
        reader, _ = registry.keys.create("search", Scope.READ)
        registry.keys.revoke(reader.prefix, spare_last_admin=True)
        registry.keys.revoke(one.prefix, spare_last_admin=True)
        with pytest.raises(LastAdminKey, match=other.prefix):
            registry.keys.revoke(other.prefix, spare_last_admin=True)
        registry.keys.revoke(one.prefix, spare_last_admin=True)  # it is already
        assert registry.keys.revoke(other.prefix).revoked_at is not None

    def test_key_in_its_overlap_is_no_other(self, registry: Registry) -> None:
        old, _ = registry.keys.create("platform", Scope.ADMIN)
        new, _ = registry.keys.rotate(old.prefix, DAY)
        with pytest.raises(LastAdminKey, match=new.prefix):
            registry.keys.revoke(new.prefix, spare_last_admin=True)
        registry.keys.revoke(new.prefix)
        with pytest.raises(LastAdminKey, match=old.prefix):  # though not for long
            registry.keys.revoke(old.prefix, spare_last_admin=True)
        other, _ = registry.keys.create("platform", Scope.ADMIN)
        assert registry.keys.revoke(old.prefix, spare_last_admin=True).revoked_at is not None
        newest, _ = registry.keys.rotate(other.prefix, DAY)
        registry.keys.revoke(other.prefix, spare_last_admin=True)
        assert registry.keys.find(newest.prefix) == newest

    def test_two_that_revoke_each_other_leave_one(self, registry: Registry) -> None:
        for _ in range(5):
            made = [registry.keys.create("platform", Scope.ADMIN)[0] for _ in range(2)]
            revoke = partial(registry.keys.revoke, spare_last_admin=True)
            ended = at_once(*(partial(revoke, key.prefix) for key in made))
            assert [type(e) for e in ended if isinstance(e, BaseException)] == [LastAdminKey]
            for key in made:
                registry.keys.revoke(key.prefix)


ANN = Actor("ann", "1a2b3c4d")
_PUT_AGAIN = (
    "INSERT INTO {0} SELECT * FROM {0} WHERE 1 = 1 ON CONFLICT ({1}) DO UPDATE SET at = excluded.at"
)


def last_act(registry: Registry) -> ActRecord:
    return registry.audit.recent(1)[0]


class TestAudit:
    def test_act_is_there_before_it_is_done_and_its_outcome_after(self, registry: Registry) -> None:
        before = registry.now()
        act = Act("retire", "version 3", "nobody needs it", {"force": True})
        with registry.audit.recording(ANN, act) as recorded:
            [begun] = registry.audit.recent(9)
            recorded.found["consumers"] = 2
        [done] = registry.audit.recent(9)
        assert (begun.actor, begun.key, begun.act, begun.target, begun.reason) == (
            *("ann", "1a2b3c4d", "retire", "version 3"),
            "nobody needs it",
        )
        assert (begun.outcome, begun.code, begun.ended_at) == (None, None, None)
        assert begun.details == {"force": True}
        assert done.details == {"force": True, "consumers": 2}
        assert (done.id, done.at, done.outcome, done.code) == (
            *(begun.id, begun.at),
            *(Outcome.SUCCEEDED, None),
        )
        assert done.ended_at is not None
        assert before <= done.at <= done.ended_at <= registry.now()

    @pytest.mark.parametrize(
        ("error", "outcome", "code"),
        [
            (Conflict("no"), Outcome.REFUSED, "conflict"),
            (UnknownVersion(3), Outcome.REFUSED, "unknown-version"),
            (Forbidden("admin"), Outcome.REFUSED, "forbidden"),
            (OperationAbandoned("killed"), Outcome.FAILED, "operation-abandoned"),
            (RegistryError("away"), Outcome.FAILED, "registry-error"),
            (ZeroDivisionError(), Outcome.FAILED, "unforeseen"),
            (KeyboardInterrupt(), Outcome.FAILED, "interrupted"),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_act_that_raises_says_how_it_ended(
        self, registry: Registry, error: BaseException, outcome: Outcome, code: str
    ) -> None:
        with pytest.raises(type(error)), registry.audit.recording(ANN, Act("gc")):
            raise error
        found = last_act(registry)
        assert (found.outcome, found.code) == (outcome, code)

    def test_refusal_is_written_at_once(self, registry: Registry) -> None:
        registry.audit.refuse(ANN, Act("promote", "version 3"), "forbidden")
        found = last_act(registry)
        assert (found.act, found.outcome, found.code) == ("promote", "refused", "forbidden")

    def test_log_is_read_newest_first_page_by_page(self, registry: Registry) -> None:
        for n in range(5):
            registry.audit.refuse(ANN, Act("gc", f"{n}"), "conflict")
        first = registry.audit.recent(2)
        rest = registry.audit.recent(9, before=first[-1].id)
        assert [act.target for act in [*first, *rest]] == ["4", "3", "2", "1", "0"]
        since = rest[0].at
        assert [act.target for act in registry.audit.recent(9, since=since)] == ["4", "3", "2"]

    @pytest.mark.parametrize("log", [audit, audit_outcomes], ids=str)
    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE {0} SET details = '[]'",
            "DELETE FROM {0}",
            _PUT_AGAIN,
        ],
    )
    def test_nothing_that_is_written_can_be_changed(
        self, registry: Registry, engine: Engine, log: Table, statement: str
    ) -> None:
        registry.audit.refuse(ANN, Act("gc"), "conflict")
        before = contents(engine)
        changed = text(statement.format(log, next(iter(log.primary_key)).name))
        with pytest.raises(DBAPIError, match="append-only"), engine.begin() as connection:
            connection.execute(changed)
        assert contents(engine) == before

    @pytest.mark.parametrize("log", [audit, audit_outcomes], ids=str)
    def test_nothing_can_be_replaced_or_truncated(
        self, registry: Registry, engine: Engine, log: Table
    ) -> None:
        registry.audit.refuse(ANN, Act("gc"), "conflict")
        before = contents(engine)
        whole = {
            "sqlite": f"INSERT OR REPLACE INTO {log} SELECT * FROM {log}",
            "postgresql": f"TRUNCATE {log} CASCADE",
        }
        with pytest.raises(DBAPIError, match="append-only"), engine.begin() as connection:
            connection.execute(text(whole[engine.dialect.name]))
        assert contents(engine) == before

    def test_no_secret_and_nothing_unprintable_enters_it(
        self, registry: Registry, engine: Engine
    ) -> None:
        _, secret = registry.keys.create("search", Scope.ADMIN)
        random = secret.split("_", 2)[2]
        act = Act(
            "pin", f"consumer {secret}", f"see {secret}\0\x1b[2J", {"a": [{"b": f"x{secret}"}]}
        )
        with registry.audit.recording(Actor(f"{secret}\ud800"), act) as recorded:
            recorded.found["c"] = secret
        assert random not in repr(contents(engine))
        found = last_act(registry)
        marked = secret.removesuffix(random) + "…"
        assert found.target == f"consumer {marked}"
        assert found.reason == f"see {marked}\ufffd\ufffd[2J"

    def test_long_text_is_cut(self, registry: Registry) -> None:
        words = "reason " * 1000
        registry.audit.refuse(Actor("x" * 300), Act("pin", words, words, {"a": words}), "conflict")
        found = last_act(registry)
        assert found.target is not None
        assert found.reason is not None
        lengths = (len(found.actor), len(found.target), len(found.reason), len(found.details["a"]))
        assert lengths == (128, 256, 2000, 256)

    def test_operation_tells_what_became_of_its_act(self, registry: Registry) -> None:
        def succeed(claim: Claim) -> None:
            registry.operations.succeed(claim, {"live_version": 3, "stored": None})

        def fail(claim: Claim) -> None:
            gates = [{"name": "maps", "passed": False}, {"name": "finite", "passed": True}]
            registry.operations.fail(claim, Conflict("gates", gates=gates))

        for end, outcome, code, told in (
            (succeed, Outcome.SUCCEEDED, None, {"live_version": 3}),
            (fail, Outcome.REFUSED, "conflict", {"failed_gates": ["maps"]}),
        ):
            with registry.audit.recording(ANN, Act("promote")) as recorded:
                operation = begun(registry, act=recorded.id)
            running = last_act(registry)
            assert (running.outcome, running.operation) == (None, operation.id)
            claim = registry.operations.take(registry.operations.get(operation.id), "another")
            assert claim is not None
            end(claim)
            ended = last_act(registry)
            assert (ended.id, ended.outcome, ended.code) == (recorded.id, outcome, code)
            assert (ended.details, ended.operation) == (told, operation.id)

    def test_owner_that_lost_its_operation_tells_nothing(self, registry: Registry) -> None:
        act = registry.audit.begin(ANN, Act("promote"))
        operation = begun(registry, act=act)
        assert registry.operations.take(operation, "another") is not None
        with pytest.raises(OperationAbandoned):
            registry.operations.succeed(ours(operation), {})
        assert last_act(registry).outcome is None


def begun(registry: Registry, owner: str = "host:1", **options: Any) -> Operation:
    return registry.operations.start(
        OperationDraft("promote", {"version": 3}, "ann", owner, **options)
    )


def ours(operation: Operation) -> Claim:
    assert operation.owner is not None
    return Claim(operation.id, operation.owner)


class TestOperations:
    def test_operation_is_followed_to_its_success(self, registry: Registry) -> None:
        started = begun(registry)
        assert started == registry.operations.get(started.id) == registry.operations.active()
        assert (started.kind, started.request, started.actor) == ("promote", {"version": 3}, "ann")
        assert (started.state, started.progress, started.step) == (OperationState.PENDING, 0.0, "")
        assert (started.owner, started.beat, started.resumable) == ("host:1", 0, False)
        registry.operations.progress(ours(started), "load", 0.25)
        running = registry.operations.get(started.id)
        assert (running.state, running.progress, running.step) == ("running", 0.25, "load")
        assert running.finished_at is None
        registry.operations.succeed(ours(started), {"live_version": 3})
        done = registry.operations.get(started.id)
        assert (done.state, done.progress, done.step) == ("succeeded", 1.0, "load")
        assert (done.result, done.error) == ({"live_version": 3}, None)
        assert done.finished_at is not None
        assert started.created_at <= done.finished_at <= utc_now()
        assert registry.operations.active() is None

    def test_failed_operation_keeps_the_reason(self, registry: Registry) -> None:
        started = begun(registry)
        registry.operations.progress(ours(started), "check", 0.5)
        registry.operations.fail(ours(started), NothingPublished(3))
        failed = registry.operations.get(started.id)
        assert (failed.state, failed.progress, failed.result) == ("failed", 0.5, None)
        message = NothingPublished(3).message
        assert failed.error == {"code": "nothing-published", "message": message, "version": 3}
        assert failed.finished_at is not None
        assert registry.operations.active() is None

    def test_second_operation_is_refused_and_told_of_the_first(self, registry: Registry) -> None:
        first = begun(registry)
        registry.operations.progress(ours(first), "load", 0.4)
        with pytest.raises(OperationRunning, match=f"{first.id}.*step load, 40 % done, by host:1"):
            begun(registry, "host:2")
        registry.operations.succeed(ours(first), {})
        second = begun(registry, "host:2")
        assert [o.id for o in registry.operations.recent(10)] == [second.id, first.id]
        assert [o.id for o in registry.operations.recent(1)] == [second.id]

    def test_one_of_many_operations_at_once_is_begun(self, registry: Registry) -> None:
        outcomes = at_once(*(partial(begun, registry, f"host:{n}") for n in range(4)))
        [won] = [o for o in outcomes if isinstance(o, Operation)]
        lost = [o for o in outcomes if isinstance(o, OperationRunning)]
        assert len(lost) == 3
        assert {error.data["operation"] for error in lost} == {won.id}

    def test_same_key_leads_to_the_same_operation(self, registry: Registry) -> None:
        outcomes = at_once(
            *(partial(begun, registry, f"host:{n}", idempotency_key="morning") for n in range(4))
        )
        [id] = {o.id for o in outcomes if isinstance(o, Operation)}
        assert all(isinstance(o, Operation) for o in outcomes)
        started = registry.operations.get(id)
        registry.operations.fail(ours(started), NothingPublished(3))
        again = begun(registry, "host:9", idempotency_key="morning")
        assert (again.id, again.state, again.owner) == (id, "failed", started.owner)
        assert registry.operations.active() is None
        assert begun(registry, "host:9", idempotency_key="evening").id != id

    @pytest.mark.parametrize(
        "other",
        [
            OperationDraft("rollback", {"version": 3}, "ann", "h", False, "morning"),
            OperationDraft("promote", {"version": 4}, "ann", "h", False, "morning"),
            OperationDraft("promote", {"version": 3}, "bob", "h", False, "morning"),
        ],
        ids=["kind", "request", "actor"],
    )
    def test_key_of_another_request_is_refused(
        self, registry: Registry, other: OperationDraft
    ) -> None:
        first = begun(registry, idempotency_key="morning")
        with pytest.raises(IdempotencyKeyReused, match=first.id):
            registry.operations.start(other)

    def test_whoever_lost_an_operation_writes_nothing(
        self, registry: Registry, engine: Engine
    ) -> None:
        seen = begun(registry, resumable=True)
        claim = registry.operations.take(seen, "host:2")
        assert claim == Claim(seen.id, "host:2")
        before = contents(engine)
        for write in (
            partial(registry.operations.beat, ours(seen)),
            partial(registry.operations.progress, ours(seen), "switch", 0.9),
            partial(registry.operations.succeed, ours(seen), {}),
            partial(registry.operations.fail, ours(seen), NothingPublished(3)),
            partial(registry.operations.release, ours(seen)),
        ):
            with pytest.raises(OperationAbandoned, match="not run by host:1 any more"):
                write()
        assert contents(engine) == before
        registry.operations.progress(claim, "switch", 0.9)

    def test_ended_operation_is_written_to_by_nobody(
        self, registry: Registry, engine: Engine
    ) -> None:
        operation = begun(registry)
        registry.operations.succeed(ours(operation), {})
        before = contents(engine)
        with pytest.raises(OperationAbandoned):
            registry.operations.fail(ours(operation), NothingPublished(3))
        assert registry.operations.take(registry.operations.get(operation.id), "host:2") is None
        assert contents(engine) == before

    def test_one_of_many_takes_an_operation_over(self, registry: Registry) -> None:
        seen = begun(registry, resumable=True)
        claims = at_once(
            *(partial(registry.operations.take, seen, f"host:{n}") for n in range(2, 6))
        )
        [won] = [claim for claim in claims if isinstance(claim, Claim)]
        assert registry.operations.get(seen.id).owner == won.owner

    def test_sign_of_life_forbids_the_takeover(self, registry: Registry) -> None:
        seen = begun(registry)
        registry.operations.beat(ours(seen))
        assert registry.operations.take(seen, "host:2") is None
        assert registry.operations.get(seen.id).owner == "host:1"

    def test_operation_handed_back_is_free_to_take(self, registry: Registry) -> None:
        seen = begun(registry, resumable=True)
        registry.operations.release(ours(seen))
        free = registry.operations.active()
        assert free is not None
        assert free.owner is None
        assert registry.operations.take(free, "host:2") == Claim(seen.id, "host:2")

    def test_switch_of_an_operation_that_was_taken_over_changes_nothing(
        self, registry: Registry, engine: Engine
    ) -> None:
        add_line(registry, {0: None, 1: 0})
        live = promote(registry, 0)
        seen = begun(registry, resumable=True)
        switch = replace(change(live, 1), operation=ours(seen))
        claim = registry.operations.take(seen, "host:2")
        assert claim is not None
        before = contents(engine)
        with pytest.raises(OperationAbandoned):
            registry.deployments.switch(switch)
        assert contents(engine) == before
        assert registry.deployments.made_by(seen.id) is None
        after = registry.deployments.switch(replace(switch, operation=claim))
        assert registry.deployments.made_by(seen.id) == after

    def test_switch_forbids_a_takeover_of_what_was_seen_before(self, registry: Registry) -> None:
        add_line(registry, {0: None, 1: 0})
        live = promote(registry, 0)
        seen = begun(registry, resumable=True)
        registry.deployments.switch(replace(change(live, 1), operation=ours(seen)))
        assert registry.operations.take(seen, "host:2") is None

    def test_unknown_operation_is_named(self, registry: Registry) -> None:
        with pytest.raises(UnknownOperation, match="'0f'"):
            registry.operations.get("0f")


class TestNotes:
    def test_version_that_is_left_and_those_between_carry_the_reason(
        self, registry: Registry
    ) -> None:
        add_line(registry, {0: None, 1: 0, 2: 1, 3: 2})
        for version in (0, 1, 2):
            seen = promote(registry, version)
        registry.deployments.switch(replace(change(seen, 0, kind="rollback"), reason="clicks fell"))
        assert states(registry) == {0: "live", 1: "rolled_back", 2: "rolled_back", 3: "registered"}
        notes = {v.number: v.note for v in registry.versions.all()}
        assert notes == {0: None, 1: "clicks fell", 2: "clicks fell", 3: None}

    def test_rolling_forward_clears_the_notes(self, registry: Registry) -> None:
        add_line(registry, {0: None, 1: 0, 2: 1})
        for version in (0, 1, 2):
            seen = promote(registry, version)
        registry.deployments.switch(replace(change(seen, 0, kind="rollback"), reason="clicks fell"))
        promote(registry, 2)
        assert states(registry) == {0: "superseded", 1: "superseded", 2: "live"}
        assert [v.note for v in registry.versions.all()] == [None, None, None]

    def test_notes_of_other_versions_stay(self, registry: Registry, engine: Engine) -> None:
        add_line(registry, {0: None, 1: 0})
        promote(registry, 0)
        with engine.begin() as connection:
            set_note(connection, [0], "old")
        promote(registry, 1)
        assert [v.note for v in registry.versions.all()] == ["old", None]


@pytest.mark.parametrize(
    "row",
    [
        {"version": 9},
        {"id": "s0"},
        {"folder": "snapshots/s0"},
    ],
    ids=["unknown-version", "same-id", "same-folder"],
)
def test_database_itself_refuses_what_cannot_be(
    registry: Registry, engine: Engine, row: dict[str, Any]
) -> None:
    add_line(registry, {0: None})
    [stored] = contents(engine)["snapshots"]
    values = dict(zip(snapshots.c.keys(), stored, strict=True))
    changed = {**values, "id": "s1", "folder": "snapshots/s1", **row}
    with pytest.raises(IntegrityError), engine.begin() as connection:
        connection.execute(insert(snapshots).values(**changed))
