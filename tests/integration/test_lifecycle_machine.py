"""The whole life of versions, in any order that hypothesis can think of, against a model of it."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from numpy.typing import NDArray

from backcast.errors import (
    BackcastError,
    Conflict,
    InvalidInput,
    NothingPublished,
    NotReady,
    PromotionConflict,
    UnknownVersion,
    VersionNotPromoted,
    VersionOffChain,
    VersionRetired,
)
from backcast.lifecycle import compact, erase, promote, publish, retire, rollback, sweep, upsert
from backcast.registry import schema
from backcast.versions import Entity
from service.engine import Engine
from tests.service_support import assert_served, engine_of
from tests.support import Home, batches, build_home, check_books

Row = NDArray[np.float32]
Id = tuple[Entity, str]

IDS: list[Id] = [(Entity.ITEM, id) for id in "abcde"] + [(Entity.USER, id) for id in "xy"]
NEW_IDS: list[Id] = [(Entity.ITEM, "new"), (Entity.USER, "newer")]
NOBODY = "nobody"
MOST_VERSIONS = 5


@dataclass
class ModelSnapshot:
    """What a snapshot holds, its changes included.

    Attributes:
        begun: when it was published, on the model's own clock.
        put: when each id was put whose vector comes from an upsert.
    """

    version: int
    begun: int
    rows: dict[Id, Row]
    put: dict[Id, int] = field(default_factory=dict)
    deleted: bool = False
    superseded: bool = False

    def erase(self, id: Id) -> None:
        self.rows.pop(id, None)
        self.put.pop(id, None)

    def take(self, id: Id, other: "ModelSnapshot") -> None:
        """Hold the vector that another snapshot was given."""
        self.rows[id], self.put[id] = other.rows[id], other.put[id]


@dataclass
class Model:
    """What the documentation promises, as plain dictionaries."""

    parents: dict[int, int | None] = field(default_factory=dict)
    states: dict[int, str] = field(default_factory=dict)
    snapshots: dict[str, ModelSnapshot] = field(default_factory=dict)
    latest: dict[int, str] = field(default_factory=dict)
    lived: list[str] = field(default_factory=list)
    puts: dict[int, dict[Id, tuple[int, Row]]] = field(default_factory=dict)
    live: str | None = None
    history: list[tuple[str, int, str | None]] = field(default_factory=list)
    erased: set[Id] = field(default_factory=set)
    clock: int = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def publish(self, snapshot: str, version: int, rows: dict[Id, Row]) -> None:
        self.snapshots[snapshot] = self.published(version, rows)
        self.latest[version] = snapshot

    def published(self, version: int, rows: dict[Id, Row]) -> ModelSnapshot:
        """Return a new snapshot: without the erased, with what was put and is not computed."""
        kept = {id: row for id, row in rows.items() if id not in self.erased}
        new = ModelSnapshot(version, self.tick(), kept)
        last = self.last(version)
        for id in last.put.keys() - rows.keys():
            new.take(id, last)
        return new

    def last(self, version: int) -> ModelSnapshot:
        """Return what was live last of a version; nothing where that is deleted or never was."""
        found = (self.snapshots[id] for id in reversed(self.lived))
        nothing = ModelSnapshot(version, 0, {})
        last = next((one for one in found if one.version == version), nothing)
        return nothing if last.deleted else last

    def kept_puts(self, version: int) -> dict[Id, tuple[int, Row]]:
        """Return what was put last of each id on a version, while what was live of it is kept."""
        return self.puts.get(version, {}) if self.last(version).rows else {}

    def compact(self, snapshot: str) -> None:
        now = self.now()
        same = ModelSnapshot(now.version, self.tick(), dict(now.rows), dict(now.put))
        self.snapshots[snapshot], self.latest[now.version] = same, snapshot

    def upsert(self, rows: dict[Id, Row]) -> None:
        now, moment = self.now(), self.tick()
        now.rows.update(rows)
        now.put.update(dict.fromkeys(rows, moment))
        puts = self.puts.setdefault(now.version, {})
        puts.update({id: (moment, row) for id, row in rows.items()})
        self.erased -= set(rows)

    def erase(self, ids: set[Id]) -> None:
        self.erased |= ids
        for found in self.snapshots.values():
            for id in ids:
                found.erase(id)
        for puts in self.puts.values():
            for id in ids:
                puts.pop(id, None)

    def chain(self, version: int) -> list[int]:
        parent = self.parents[version]
        return [version, *([] if parent is None else self.chain(parent))]

    def now(self) -> ModelSnapshot:
        assert self.live is not None
        return self.snapshots[self.live]

    def before_promotion(self) -> str | None:
        """Return what was live before the live version was last promoted."""
        version = self.now().version
        found = [
            before
            for kind, number, before in self.history
            if (kind, number) == ("promote", version)
        ]
        return found[-1] if found else None

    def switch(self, snapshot: str, kind: str) -> None:
        """Make a snapshot live."""
        before, after = self.live, self.snapshots[snapshot]
        chain = self.chain(after.version)
        for older in chain[1:]:
            if self.states[older] != "retired":
                self.states[older] = "superseded"
        if before is not None:
            left = self.snapshots[before]
            for id, (moment, row) in self.kept_puts(after.version).items():
                if moment > after.begun:
                    after.rows[id], after.put[id] = row, moment
            left.superseded = before != snapshot
            for off in set(self.chain(left.version)) - set(chain):
                if self.states[off] in {"live", "superseded"}:
                    self.states[off] = "rolled_back"
        for found in self.snapshots.values():
            if found.version == after.version and found.begun < after.begun:
                found.superseded = True
        again = before is not None and left.version == after.version
        self.history.append(
            ("refresh" if kind == "promote" and again else kind, after.version, before)
        )
        self.states[after.version] = "live"
        after.superseded = False
        self.live = snapshot
        self.lived.append(snapshot)


@cache
def empty_registry_file() -> bytes:
    """Return an SQLite registry without rows: migrations would take most of the time."""
    with TemporaryDirectory() as folder:
        engine = schema.make_engine(f"sqlite:///{folder}/registry.db")
        schema.upgrade(engine)
        with engine.execution_options(reads_only=True).connect() as connection:
            connection.exec_driver_sql("COMMIT")
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        engine.dispose()
        return Path(folder, "registry.db").read_bytes()


class Lifecycle(RuleBasedStateMachine):
    """Every rule acts on a real place and on the model; the engine serves what the model says."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        folder = Path(self.stack.enter_context(TemporaryDirectory()))
        (folder / "registry.db").write_bytes(empty_registry_file())
        self.home: Home = self.stack.enter_context(build_home(folder, ()))
        self.engine: Engine = engine_of(self.home)
        self.model = Model()
        self.seed = 0

    def teardown(self) -> None:
        check_books(self.home)
        self.stack.close()

    def vectors(self, version: int, ids: list[Id]) -> dict[Id, Row]:
        self.seed += 1
        dim = self.home.dims[version]
        rows = np.random.default_rng(self.seed).standard_normal((len(ids), dim), np.float32)
        return dict(zip(ids, rows, strict=True))

    def act(self, act: Any, *expected: type[BackcastError]) -> Any:
        """Do something that must raise the expected error, or none; return what it returns."""
        if not expected:
            return act()
        try:
            act()
        except expected:
            return None
        raise AssertionError(f"none of {expected}")

    # Rules.

    @initialize()
    def first(self) -> None:
        self.register(None, 5)
        self.publish_some(0, frozenset(IDS))

    def register(self, parent: int | None, dim: int) -> None:
        version = self.home.register(dim, parent=parent, bias=True).number
        self.model.parents[version] = parent
        self.model.states[version] = "registered"

    @precondition(lambda self: len(self.model.parents) < MOST_VERSIONS)
    @rule(data=st.data(), dim=st.integers(3, 7))
    def register_next(self, data: st.DataObject, dim: int) -> None:
        self.register(data.draw(st.sampled_from(sorted(self.model.parents))), dim)

    @rule(data=st.data(), left_out=st.sets(st.sampled_from(IDS), max_size=2))
    def publish_any(self, data: st.DataObject, left_out: set[Id]) -> None:
        version = data.draw(st.sampled_from(sorted(self.model.parents)))
        self.publish_some(version, frozenset(IDS) - left_out)

    def publish_some(self, version: int, ids: frozenset[Id]) -> None:
        rows = self.vectors(version, sorted(ids))
        backcast = self.home.backcast
        by_entity = {
            entity: {id: row for (kind, id), row in rows.items() if kind is entity}
            for entity in Entity
        }
        given = batches({entity: found for entity, found in by_entity.items() if found})
        nothing = [] if self.model.published(version, rows).rows else [InvalidInput]
        record = self.act(
            lambda: publish(backcast.registry, backcast.artifacts, version, given, {}), *nothing
        )
        if record is not None:
            self.model.publish(record.id, version, rows)

    @precondition(lambda self: self.model.live is not None)
    @rule()
    def compact_live(self) -> None:
        live = self.home.backcast.registry.deployments.live()
        assert live is not None
        now = self.model.now()
        why_not: list[type[BackcastError]] = []
        if live.delta == 0:
            why_not = [Conflict]
        elif not now.rows:
            why_not = [InvalidInput]
        record = self.act(lambda: compact(self.home.backcast), *why_not)
        if record is not None:
            self.model.compact(record.id)

    @rule(data=st.data())
    def promote_any(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from([*sorted(self.model.parents), 99]))
        force = data.draw(st.booleans())
        options: dict[str, Any] = {"force": True, "reason": "drawn"} if force else {}
        made = self.act(
            lambda: promote(self.home.backcast, version, actor="machine", **options),
            *self.why_not(version, force),
        )
        if made is not None:
            self.model.switch(made.live.snapshot, "promote")
            assert self.model.latest[version] == self.model.live

    def why_not(self, version: int, force: bool) -> list[type[BackcastError]]:
        if version not in self.model.parents:
            return [UnknownVersion]
        if self.model.states[version] == "retired":
            return [VersionRetired]
        snapshot = self.model.latest.get(version)
        if snapshot is None or self.model.snapshots[snapshot].deleted:
            return [NothingPublished]
        if snapshot == self.model.live:
            return [PromotionConflict]
        live = None if self.model.live is None else self.model.now().version
        leaves = live is not None and live not in self.model.chain(version)
        return [Conflict] if leaves and not force else []

    @precondition(lambda self: self.model.live is not None)
    @rule(ids=st.sets(st.sampled_from([*IDS, *NEW_IDS]), min_size=1, max_size=3))
    def upsert_some(self, ids: set[Id]) -> None:
        rows = self.vectors(self.model.now().version, sorted(ids))
        for entity in Entity:
            found = {id: row for (kind, id), row in rows.items() if kind is entity}
            if found:
                upsert(
                    self.home.backcast,
                    entity,
                    list(found),
                    np.stack(list(found.values())),
                    actor="machine",
                    most_changed=1_000,
                )
        self.model.upsert(rows)

    @rule(ids=st.sets(st.sampled_from([*IDS, *NEW_IDS]), min_size=1, max_size=2))
    def erase_some(self, ids: set[Id]) -> None:
        for entity in Entity:
            found = sorted(id for kind, id in ids if kind is entity)
            if found:
                erase(self.home.backcast, entity, found, actor="machine", grace=timedelta(hours=1))
        self.model.erase(ids)

    @precondition(lambda self: self.model.live is not None)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        named = data.draw(st.sampled_from([None, *sorted(self.model.snapshots)]))
        target = named or self.model.before_promotion()
        live = self.act(
            lambda: rollback(
                self.home.backcast, actor="machine", reason="worse", to_snapshot=named
            ),
            *self.why_no_rollback(target),
        )
        if live is not None:
            assert live.snapshot == target
            self.model.switch(live.snapshot, "rollback")

    def why_no_rollback(self, target: str | None) -> list[type[BackcastError]]:
        if target is None:
            return [Conflict]
        snapshot, live = self.model.snapshots[target], self.model.now().version
        if snapshot.deleted:
            return [Conflict]
        if not snapshot.superseded:
            return [InvalidInput]
        if self.model.states[snapshot.version] == "retired":
            return [VersionRetired]
        return [InvalidInput] if live in self.model.chain(snapshot.version)[1:] else []

    @rule(data=st.data())
    def retire_any(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from([*sorted(self.model.parents), 99]))
        why_not = self.why_no_retirement(version)
        self.act(
            lambda: retire(self.home.backcast, version, actor="machine", idle=timedelta(days=1)),
            *why_not,
        )
        if not why_not:
            self.model.states[version] = "retired"

    def why_no_retirement(self, version: int) -> list[type[BackcastError]]:
        state = self.model.states.get(version)
        if state is None:
            return [UnknownVersion]
        if state == "retired":
            return []
        if self.model.live is None or state in {"registered", "live"}:
            return [Conflict]
        return [] if version in self.model.chain(self.model.now().version) else [VersionOffChain]

    @rule()
    def sweep_at_once(self) -> None:
        doomed = {
            id
            for id, found in self.model.snapshots.items()
            if found.superseded and not found.deleted
        }
        assert set(sweep(self.home.backcast, timedelta(0))) == doomed
        for id in doomed:
            self.model.snapshots[id].deleted = True

    @rule()
    def sweep_within_grace(self) -> None:
        assert sweep(self.home.backcast, timedelta(hours=1)) == []

    @rule()
    def restart(self) -> None:
        """Another replica sees the same."""
        self.engine = engine_of(self.home)

    # What must hold after each of them.

    @invariant()
    def every_version_answers_as_it_should(self) -> None:
        self.engine.refresh()
        if self.model.live is None:
            self.act(self.engine.current, NotReady)
            return
        snapshot = self.engine.current()
        assert snapshot.live.snapshot == self.model.live
        live = self.model.now().version
        chain = self.model.chain(live)
        for version in [*self.model.parents, 99]:
            self.act(lambda: snapshot.resolve(version), *self.error_of(version, live))  # noqa: B023
        assert list(snapshot.servable) == sorted(
            j for j in chain if self.model.states[j] != "retired"
        )
        for version in snapshot.servable:
            self.check_vectors(version, live)

    def error_of(self, version: int, live: int) -> list[type[BackcastError]]:
        state = self.model.states.get(version)
        if state is None:
            return [UnknownVersion]
        if state == "retired":
            return [VersionRetired]
        if version in self.model.chain(live):
            return []
        if state == "registered" and version > live:
            return [VersionNotPromoted]
        return [VersionOffChain]

    def check_vectors(self, version: int, live: int) -> None:
        rows = self.model.now().rows
        for entity in Entity:
            known = {id: row for (kind, id), row in rows.items() if kind is entity}
            asked = [id for kind, id in [*IDS, *NEW_IDS] if kind is entity] + [NOBODY]
            answer = self.engine.current().vectors(entity, asked, version)
            assert answer.found.tolist() == [id in known for id in asked]
            assert np.isnan(answer.vectors[~answer.found]).all()
            self.home.vectors[live] = {entity: known}
            served = answer.vectors[answer.found]
            found = [id for id in asked if id in known]
            assert_served(served, self.home, found, version, entity, live=live)

    @invariant()
    def states_are_those_of_the_model(self) -> None:
        found = {v.number: str(v.state) for v in self.home.backcast.registry.versions.all()}
        assert found == self.model.states


TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a run takes too long to look for a shorter one
)
