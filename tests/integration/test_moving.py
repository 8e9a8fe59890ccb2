"""From SQLite and the embedded store to PostgreSQL and Redis, while readers are served."""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import orjson
import pytest
from redis import Redis
from sqlalchemy import event, make_url

from backcast.errors import Conflict, OperationRunning, StoreError
from backcast.lifecycle import erase, move, open_backcast, open_new, upsert, verify
from backcast.registry import OperationDraft, copying, make_registry
from backcast.registry.copying import differing, fingerprints
from backcast.registry.schema import make_engine
from backcast.registry.tables import metadata
from backcast.settings import Settings
from backcast.versions import Entity, OperationState, Scope
from benchmarks.soak_replicas import replica_environment
from tests.service_support import assert_served, client_of, read_rows
from tests.support import Home, build_home, check_books, normal

HOUR = timedelta(hours=1)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with build_home(
        tmp_path / "home", bias=True, direct={2: [0]}, live=2, store_precision="float16"
    ) as home:
        vector = normal(np.random.default_rng(3), 1, home.dims[2])
        upsert(home.backcast, Entity.ITEM, ["item 1"], vector, actor="ann", most_changed=9)
        home.vectors[2][Entity.ITEM]["item 1"] = vector[0]
        erase(home.backcast, Entity.USER, ["user 1"], actor="ann", grace=HOUR)
        home.backcast.registry.keys.create("ranking", Scope.READ, pin=0)
        yield home


@pytest.fixture
def there(home: Home, new_postgres: str, empty_redis: str) -> Settings:
    """Settings of the new places; the artifacts stay."""
    return home.settings.model_copy(update={"database_url": new_postgres, "store_url": empty_redis})


def moved(home: Home, there: Settings, **options: object) -> None:
    with open_new(there) as target:
        same = replace(target, artifacts=home.backcast.artifacts)
        move(home.backcast, same, actor="tests", grace=HOUR, timeout=15, **options)  # type: ignore[arg-type]


def is_empty(settings: Settings) -> bool:
    with open_new(settings) as backcast:
        backcast.registry.demand_empty()
    return True


def test_command_moves_everything_and_compares_it(home: Home, there: Settings) -> None:
    stored = {name: home.backcast.store.open(name) for name in home.held()}
    command = ["migrate-store", "--to-database", there.database_url, "--to-store", there.store_url]
    ended = subprocess.run(
        [sys.executable, "-m", "backcast", *command],
        env=replica_environment(home.settings),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    vectors = sum(sum(one.counts.values()) for one in stored.values())
    assert f"{vectors} stored vectors were compared, bit by bit" in ended.stdout
    assert "set BACKCAST_DATABASE_URL, BACKCAST_STORE_URL and start" in ended.stdout
    password = make_url(there.database_url).password
    assert password is None or password not in ended.stdout
    one, other = (engine_rows(s) for s in (home.settings, there))
    # The move itself, which has ended here and is noted there.
    assert differing(one, other) == ["audit", "audit_outcomes", "operations"]
    with open_backcast(there) as backcast:
        assert verify(backcast).faults == ()
        for name, before in stored.items():
            for entity in before.counts:
                ids = [*home.ids(entity, version=2), "user 2", "item 5"]
                mine, theirs = (
                    before.gather(entity, ids),
                    backcast.store.open(name).gather(entity, ids),
                )
                assert mine.vectors.tobytes() == theirs.vectors.tobytes()
                assert mine.found.tobytes() == theirs.found.tobytes()
        after = replace(home, settings=there, backcast=backcast)
        (copy,) = (o for o in backcast.registry.operations.recent(9) if o.kind == "move")
        assert copy.state is OperationState.FAILED
        (act,) = backcast.registry.audit.recent(1)
        assert (act.act, act.outcome) == ("move", "succeeded")
        (original,) = (o for o in home.backcast.registry.operations.recent(9) if o.kind == "move")
        assert original.state is OperationState.SUCCEEDED
        after.publish(1)
        check_books(after)


def engine_rows(settings: Settings) -> dict[str, copying.Fingerprint]:
    engine = make_engine(settings.registry_url)
    with engine.connect() as connection:
        found = fingerprints(connection)
    engine.dispose()
    return found


def test_only_what_is_compared_is_read_again(tmp_path: Path) -> None:
    with build_home(tmp_path / "home", live=1) as home:
        registry, reads = home.backcast.registry, Counter[str]()

        def count(_1: object, _2: object, statement: str, *_: object) -> None:
            found = re.search(r"FROM (\w+) ORDER BY", statement)
            reads.update([found[1]] if found else [])

        event.listen(registry._engine, "before_cursor_execute", count)
        for name, still in (("one", set[str]()), ("two", {"versions", "diffs"})):
            reads.clear()
            with make_registry(f"sqlite:///{tmp_path / name}.db") as copy:
                registry.copy_to(copy, still=still)
            assert reads == {table: 1 + (table in still) for table in metadata.tables}


def test_readers_are_served_meanwhile_and_promotions_are_refused(
    home: Home, there: Settings
) -> None:
    with client_of(home) as client:
        seen: list[str] = []

        def look(step: str, _done: float) -> None:
            ids = [id for id in home.ids(version=2) if id != "item 1"]
            body = {"ids": ids, "version": 0}
            answer = client.post("/embeddings/batch", json=body)
            assert_close(answer, home, ids)
            refused = client.post("/admin/rollback", json={"expected_live": 2, "reason": "late"})
            assert refused.status_code == 409
            assert refused.json()["type"].endswith("operation-running")
            seen.append(step)

        moved(home, there, report=look)
        assert {"store", "registry"} <= set(seen)
        refused = client.post("/admin/rollback", json={"expected_live": 2, "reason": "now"})
        assert refused.status_code == 202


def assert_close(answer: object, home: Home, ids: list[str]) -> None:
    rows = read_rows(answer)  # type: ignore[arg-type]
    half = {
        id: v.astype(np.float16).astype(np.float32)
        for id, v in home.vectors[2][Entity.ITEM].items()
    }
    rounded = replace(home, vectors={2: {Entity.ITEM: half}})
    assert_served(rows, rounded, ids, 0, live=2)


@pytest.mark.parametrize("what", ["an upsert", "a key", "a pin"])
def test_what_is_written_meanwhile_is_noticed_and_nothing_is_kept(
    home: Home, there: Settings, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = home.backcast.registry
    vector = np.ones((1, home.dims[2]), np.float32)
    acts: dict[str, Callable[[], object]] = {
        "an upsert": lambda: upsert(
            home.backcast, Entity.ITEM, ["late"], vector, actor="bob", most_changed=9
        ),
        "a key": lambda: registry.keys.create("late", Scope.READ),
        "a pin": lambda: registry.consumers.pin("ranking", 1),
    }
    copy = copying.copy_rows

    def copy_and_act(*connections: object) -> object:
        read = copy(*connections)  # type: ignore[arg-type]
        acts[what]()
        return read

    with monkeypatch.context() as patch:
        patch.setattr(copying, "copy_rows", copy_and_act)
        with pytest.raises(Conflict, match="was changed while it was copied"):
            moved(home, there)
    assert is_empty(there)
    assert registry.operations.active() is None
    moved(home, there)
    with open_backcast(there) as backcast:
        assert verify(backcast).faults == ()


def test_target_that_is_in_use_is_refused(home: Home, there: Settings) -> None:
    moved(home, there)
    before = engine_rows(there)
    with pytest.raises(Conflict, match=r"is not empty: .* Name an empty one with --to-database\."):
        moved(home, there)
    assert engine_rows(there) == before


def test_vector_that_differs_in_the_new_store_stops_the_move(home: Home, there: Settings) -> None:
    (live,) = (d["snapshot"] for d in home.backcast.registry.deployments.history()[:1])
    moved(home, there)
    with open_new(there) as target, Redis.from_url(there.store_url) as redis:
        target.registry._engine.dispose()
        key = f"backcast:{live}:item:item 5"
        value = bytearray(redis.get(key))
        value[0] ^= 1
        redis.set(key, bytes(value))
    empty = home.settings.model_copy(
        update={"home": there.home.parent / "elsewhere", "store_url": there.store_url}
    )
    with pytest.raises(StoreError, match="holds another vector of item 'item 5'"):
        moved(home, empty)
    assert is_empty(empty)


def test_move_waits_for_no_operation(home: Home, there: Settings) -> None:
    home.backcast.registry.operations.start(OperationDraft("promote", {}, "ann", "host:1"))
    with pytest.raises(OperationRunning):
        moved(home, there)
    assert is_empty(there)


def test_document_of_the_command_is_json(home: Home, there: Settings, tmp_path: Path) -> None:
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "backcast", "migrate-store", "--json"),
            *("--to-database", there.database_url, "--to-artifacts", str(tmp_path / "artifacts")),
        ],
        env=replica_environment(home.settings),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    document = orjson.loads(ended.stdout)
    assert document["vectors"] == 0  # the store stays
    copied = home.settings.model_copy(
        update={"database_url": there.database_url, "artifacts_url": str(tmp_path / "artifacts")}
    )
    # The embedded store of the home is used on.
    with open_backcast(copied) as backcast:
        assert verify(backcast).faults == ()
