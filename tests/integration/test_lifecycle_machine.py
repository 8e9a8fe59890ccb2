"""The whole life of versions, in any order that hypothesis can think of, against a model of it."""

import time
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

from backcast.errors import (
    BackcastError,
    Conflict,
    InvalidInput,
    NothingPublished,
    NotReady,
    PromotionConflict,
    SnapshotMismatch,
    UnknownVersion,
    VersionInUse,
    VersionNotPromoted,
    VersionOffChain,
    VersionRetired,
)
from backcast.lifecycle import (
    compact,
    deprecate,
    erase,
    plan_rollback,
    promote,
    publish,
    refresh,
    retire,
    rollback,
    sweep,
    upsert,
    withdraw_deprecation,
)
from backcast.registry import schema
from backcast.registry.database import utc_now
from backcast.versions import Entity, Scope
from service.engine import Engine
from tests.service_support import assert_served, engine_of
from tests.support import Home, batches, build_home, check_books

Row = NDArray[np.float32]
Id = tuple[Entity, str]

IDS: list[Id] = [(Entity.ITEM, id) for id in "abcde"] + [(Entity.USER, id) for id in "xy"]
NEW_IDS: list[Id] = [(Entity.ITEM, "new"), (Entity.USER, "newer")]
NOBODY = "nobody"
LEFT = {"superseded", "rolled_back"}
MOST_VERSIONS = 5
READER = "reader"
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
LONG_S = 180
"""How long the long profile goes on finding new lives."""


@dataclass
class ModelSnapshot:
    """What a snapshot holds, its changes included.

    Attributes:
        begun: when it was published, on the model's own clock.
        put: when each id was put whose vector comes from an upsert.
        told: the ids of its upserts, those that came with it when it went live among them.
    """

    version: int
    begun: int
    rows: dict[Id, Row]
    put: dict[Id, int] = field(default_factory=dict)
    told: set[Id] = field(default_factory=set)
    deleted: bool = False
    superseded: bool = False

    def erase(self, id: Id) -> None:
        self.rows.pop(id, None)
        self.put.pop(id, None)
        self.told.discard(id)

    def take(self, id: Id, other: "ModelSnapshot") -> None:
        """Hold the vector that another snapshot was given."""
        self.rows[id], self.put[id] = other.rows[id], other.put[id]


@dataclass
class Model:
    """What the documentation promises, as plain dictionaries."""

    parents: dict[int, int | None] = field(default_factory=dict)
    states: dict[int, str] = field(default_factory=dict)
    snapshots: dict[str, ModelSnapshot] = field(default_factory=dict)
    lived: list[str] = field(default_factory=list)
    puts: dict[int, dict[Id, tuple[int, Row]]] = field(default_factory=dict)
    live: str | None = None
    history: list[tuple[str, int, str | None]] = field(default_factory=list)
    erased: set[Id] = field(default_factory=set)
    ending: set[int] = field(default_factory=set)
    pin: int | None = None
    clock: int = 0

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def publish(self, snapshot: str, version: int, rows: dict[Id, Row]) -> None:
        self.snapshots[snapshot] = self.published(version, rows)

    def published(self, version: int, rows: dict[Id, Row]) -> ModelSnapshot:
        """Return a new snapshot: without the erased, with what was put and is not computed."""
        kept = {id: row for id, row in rows.items() if id not in self.erased}
        new = ModelSnapshot(version, self.tick(), kept)
        last = self.last(version)
        for id in last.put.keys() - rows.keys():
            new.take(id, last)
        return new

    def newest(self, version: int) -> str | None:
        """Return the snapshot that a promotion takes."""
        kept = [id for id, s in self.snapshots.items() if s.version == version and not s.deleted]
        return max(kept, key=lambda id: self.snapshots[id].begun, default=None)

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
        self.snapshots[snapshot] = same

    def upsert(self, rows: dict[Id, Row]) -> None:
        now, moment = self.now(), self.tick()
        now.rows.update(rows)
        now.put.update(dict.fromkeys(rows, moment))
        now.told |= rows.keys()
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

    def servable(self, version: int) -> set[int]:
        return {j for j in self.chain(version) if self.states[j] != "retired"}

    def lost(self, target: str) -> set[Id]:
        """Return the ids put since a snapshot was live, or ever, that are not in it then."""
        if self.snapshots[target].version == self.now().version:
            return set()
        index = max((at for at, id in enumerate(self.lived) if id == target), default=-1)
        since = (self.snapshots[id] for id in self.lived[index + 1 :])
        put = {id for found in since if not found.deleted for id in found.told}
        then = deepcopy(self)
        then.switch(target, "rollback")
        return put - then.now().rows.keys()

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
                    after.told.add(id)
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
        self.home.backcast.registry.keys.create(READER, Scope.READ)

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

    @initialize(live=st.integers(0, 4))
    def first(self, live: int) -> None:
        self.register(None, 5)
        self.publish_some(0, frozenset(IDS))
        if live:
            self.promote_one(0, force=False)

    def register(self, parent: int | None, dim: int) -> None:
        version = self.home.register(dim, parent=parent, bias=True).number
        self.model.parents[version] = parent
        self.model.states[version] = "registered"

    @precondition(lambda self: len(self.model.parents) < MOST_VERSIONS)
    @rule(data=st.data(), dim=st.integers(3, 7))
    def register_next(self, data: st.DataObject, dim: int) -> None:
        self.register(data.draw(st.sampled_from(sorted(self.model.parents))), dim)

    @precondition(lambda self: len(self.model.parents) < MOST_VERSIONS and self.model.live)
    @rule(dim=st.integers(3, 7), put=st.sets(st.sampled_from(NEW_IDS)))
    def train_publish_and_promote(self, dim: int, put: set[Id]) -> None:
        if put:
            self.upsert_ids(put)  # and leave it behind
        version = len(self.model.parents)
        self.register(self.model.now().version, dim)
        self.publish_some(version, frozenset(IDS))
        self.promote_one(version, force=False)

    @rule(data=st.data(), left_out=st.sets(st.sampled_from(IDS), max_size=2))
    def publish_any(self, data: st.DataObject, left_out: set[Id]) -> None:
        version = data.draw(st.sampled_from(sorted(self.model.parents)))
        self.publish_some(version, frozenset(IDS) - left_out)

    @precondition(lambda self: self.left_with_puts())
    @rule(data=st.data(), left_out=st.sets(st.sampled_from(IDS), max_size=2))
    def publish_what_was_left(self, data: st.DataObject, left_out: set[Id]) -> None:
        """Most of what could come back by mistake comes so."""
        self.publish_some(
            data.draw(st.sampled_from(self.left_with_puts())), frozenset(IDS) - left_out
        )

    @precondition(lambda self: self.left_with_puts())
    @rule(data=st.data(), published=st.booleans())
    def come_back_and_publish_what_was_left(self, data: st.DataObject, published: bool) -> None:
        """An id is erased and put again elsewhere, and the vectors that it had may be made anew."""
        version = data.draw(st.sampled_from(self.left_with_puts()))
        back = data.draw(st.sampled_from(sorted(self.model.puts[version])))
        self.erase_ids({back})
        self.upsert_ids({back})
        if published:
            self.publish_some(version, frozenset(IDS) - {back})
            self.promote_one(version, force=True)

    def left_with_puts(self) -> list[int]:
        """Return the versions that something was put on, and that are not live now."""
        model = self.model
        live = None if model.live is None else model.now().version
        return sorted(
            v for v, s in model.states.items() if v != live and s in LEFT and model.puts.get(v)
        )

    def publish_some(self, version: int, ids: frozenset[Id]) -> None:
        rows = self.vectors(version, sorted(ids))
        backcast = self.home.backcast
        by_entity = {
            entity: {id: row for (kind, id), row in rows.items() if kind is entity}
            for entity in Entity
        }
        given = batches({entity: found for entity, found in by_entity.items() if found})
        why_not: list[type[BackcastError]] = []
        if self.model.states[version] == "retired":
            why_not = [VersionRetired]
        elif not self.model.published(version, rows).rows:
            why_not = [InvalidInput]
        record = self.act(
            lambda: publish(backcast.registry, backcast.artifacts, version, given, {}), *why_not
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
        self.promote_one(version, force=data.draw(st.booleans()))

    def promote_one(self, version: int, *, force: bool) -> None:
        options: dict[str, Any] = {"force": True, "reason": "drawn"} if force else {}
        made = self.act(
            lambda: promote(self.home.backcast, version, actor="machine", **options),
            *self.why_not(version, force),
        )
        if made is not None:
            assert made.live.snapshot == self.model.newest(version)
            self.model.switch(made.live.snapshot, "promote")

    @precondition(lambda self: self.promotable())
    @rule(data=st.data())
    def promote_what_can_be(self, data: st.DataObject) -> None:
        self.promote_one(data.draw(st.sampled_from(self.promotable())), force=True)

    def promotable(self) -> list[int]:
        return [version for version in self.model.parents if not self.why_not(version, True)]

    @precondition(lambda self: self.model.live is not None)
    @rule(left_out=st.sets(st.sampled_from(IDS), max_size=2))
    def publish_and_refresh(self, left_out: set[Id]) -> None:
        self.publish_some(self.model.now().version, frozenset(IDS) - left_out)
        self.refresh_live()

    @precondition(lambda self: self.model.live is not None)
    @rule()
    def refresh_live(self) -> None:
        newest = self.model.newest(self.model.now().version)
        why_not = [PromotionConflict] if newest == self.model.live else []
        made = self.act(lambda: refresh(self.home.backcast, actor="machine"), *why_not)
        if made is not None:
            assert made.live.snapshot == newest
            self.model.switch(made.live.snapshot, "promote")

    @precondition(lambda self: self.model.snapshots)
    @rule(data=st.data(), force=st.booleans())
    def promote_named(self, data: st.DataObject, force: bool) -> None:
        possible = [
            name
            for name, found in self.model.snapshots.items()
            if not self.why_not_named(found.version, name, force)
        ]
        name = data.draw(st.sampled_from([*3 * possible, *self.model.snapshots]))
        of = self.model.snapshots[name].version
        version = data.draw(st.sampled_from([of, of, of, *sorted(self.model.parents)]))
        options: dict[str, Any] = {"force": True, "reason": "drawn"} if force else {}
        made = self.act(
            lambda: promote(self.home.backcast, version, actor="machine", snapshot=name, **options),
            *self.why_not_named(version, name, force),
        )
        if made is not None:
            assert made.live.snapshot == name
            self.model.switch(name, "promote")

    def why_not_named(self, version: int, name: str, force: bool) -> list[type[BackcastError]]:
        snapshot = self.model.snapshots[name]
        if self.model.states[version] == "retired":
            return [VersionRetired]
        if snapshot.version != version:
            return [InvalidInput]
        if snapshot.deleted:
            return [Conflict]
        if self.model.live is not None and self.model.now().version == version:
            return [PromotionConflict]
        return [Conflict] if self.leaves_the_chain(version) and not force else []

    def leaves_the_chain(self, version: int) -> bool:
        model = self.model
        return model.live is not None and model.now().version not in model.chain(version)

    def why_not(self, version: int, force: bool) -> list[type[BackcastError]]:
        if version not in self.model.parents:
            return [UnknownVersion]
        if self.model.states[version] == "retired":
            return [VersionRetired]
        snapshot = self.model.newest(version)
        if snapshot is None:
            return [NothingPublished]
        if snapshot == self.model.live:
            return [PromotionConflict]
        return [Conflict] if self.leaves_the_chain(version) and not force else []

    @precondition(lambda self: self.model.live is not None)
    @rule(ids=st.sets(st.sampled_from([*IDS, *NEW_IDS]), min_size=1, max_size=3))
    def upsert_some(self, ids: set[Id]) -> None:
        self.upsert_ids(ids)

    @precondition(lambda self: self.model.live is not None and self.model.erased)
    @rule(data=st.data())
    def upsert_who_was_erased(self, data: st.DataObject) -> None:
        erased = st.sampled_from(sorted(self.model.erased))
        self.upsert_ids(data.draw(st.sets(erased, min_size=1, max_size=2)))

    def upsert_ids(self, ids: set[Id]) -> None:
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
        self.erase_ids(ids)

    @precondition(lambda self: any(self.model.puts.values()))
    @rule(data=st.data())
    def erase_who_was_put(self, data: st.DataObject) -> None:
        put = sorted({id for puts in self.model.puts.values() for id in puts})
        self.erase_ids({data.draw(st.sampled_from(put))})

    def erase_ids(self, ids: set[Id]) -> None:
        for entity in Entity:
            found = sorted(id for kind, id in ids if kind is entity)
            if found:
                erase(self.home.backcast, entity, found, actor="machine", grace=HOUR)
        self.model.erase(ids)

    @precondition(lambda self: self.model.live is not None)
    @rule(data=st.data())
    def roll_back(self, data: st.DataObject) -> None:
        named = data.draw(st.sampled_from([None, *self.model.snapshots]))
        self.roll_back_to(named)

    @precondition(lambda self: self.can_go_back())
    @rule(data=st.data())
    def roll_back_to_what_can_be(self, data: st.DataObject) -> None:
        self.roll_back_to(data.draw(st.sampled_from(self.can_go_back())))

    def can_go_back(self) -> list[str]:
        if self.model.live is None:
            return []
        return [id for id in self.model.snapshots if not self.why_no_rollback(id)]

    def roll_back_to(self, named: str | None) -> None:
        target = named or self.model.before_promotion()
        why_not = self.why_no_rollback(target)
        plan = self.act(
            lambda: plan_rollback(self.home.backcast, grace=HOUR, to_snapshot=named), *why_not
        )
        if plan is not None:
            assert target is not None
            lost = self.model.lost(target)
            assert {(entity, id) for entity, ids in plan.lost.items() for id in ids} == lost
            servable = self.model.servable(plan.version)
            refused = self.model.servable(self.model.now().version) - servable
            assert (set(plan.servable), set(plan.refused)) == (servable, refused)
            assert plan.pinned == ((READER,) if self.model.pin in refused else ())
        live = self.act(
            lambda: rollback(
                self.home.backcast, actor="machine", reason="worse", to_snapshot=named
            ),
            *why_not,
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
        self.act(lambda: retire(self.home.backcast, version, actor="machine", idle=DAY), *why_not)
        if not why_not:
            self.model.states[version] = "retired"

    def why_no_retirement(self, version: int) -> list[type[BackcastError]]:
        state = self.model.states.get(version)
        if state == "retired":
            return []
        if why_not := self.why_not_served(version):
            return why_not
        if state == "live":
            return [Conflict]
        in_use = version == self.model.pin or version in self.model.ending
        return [VersionInUse] if in_use else []

    def why_not_served(self, version: int) -> list[type[BackcastError]]:
        state = self.model.states.get(version)
        if state is None:
            return [UnknownVersion]
        if state == "retired":
            return [VersionRetired]
        if self.model.live is None or state == "registered":
            return [Conflict]
        return [] if version in self.model.chain(self.model.now().version) else [VersionOffChain]

    @rule(data=st.data())
    def deprecate_any(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from([*sorted(self.model.parents), 99]))
        why_not, end = self.why_not_served(version), utc_now() + DAY
        self.act(
            lambda: deprecate(self.home.backcast, version, sunset_at=end, actor="machine"),
            *why_not,
        )
        if not why_not:
            self.model.ending.add(version)

    @rule(data=st.data())
    def withdraw_any(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from([*sorted(self.model.parents), 99]))
        why_not = self.why_not_served(version)
        self.act(
            lambda: withdraw_deprecation(self.home.backcast, version, actor="machine"), *why_not
        )
        if not why_not:
            self.model.ending.discard(version)

    @rule(data=st.data())
    def pin_reader(self, data: st.DataObject) -> None:
        version = data.draw(st.sampled_from([None, *sorted(self.model.parents), 99]))
        why_not: list[type[BackcastError]] = []
        if version is not None and version not in self.model.states:
            why_not = [UnknownVersion]
        elif version is not None and self.model.states[version] == "retired":
            why_not = [VersionRetired]
        self.act(lambda: self.home.backcast.registry.consumers.pin(READER, version), *why_not)
        if not why_not:
            self.model.pin = version

    @precondition(lambda self: self.model.live is not None)
    @rule(data=st.data())
    def expect_any(self, data: st.DataObject) -> None:
        """What was superseded answers until it is deleted, without what was erased since."""
        name = data.draw(st.sampled_from(list(self.model.snapshots)))
        found = self.model.snapshots[name]
        kept = name in self.model.lived and not found.deleted
        snapshot = self.act(
            lambda: self.engine.expecting(name), *([] if kept else [SnapshotMismatch])
        )
        if snapshot is None:
            return
        for entity in Entity:
            asked = [id for kind, id in [*IDS, *NEW_IDS] if kind is entity] + [NOBODY]
            held = snapshot.store.gather(entity, asked)
            for id, vector, there in zip(asked, held.vectors, held.found, strict=True):
                assert there == ((entity, id) in found.rows)
                if there:
                    assert vector.tolist() == found.rows[entity, id].tolist()

    @rule(chance=st.integers(0, 2))
    def sweep_at_once(self, chance: int) -> None:
        if chance:
            return  # more can be gone back to
        doomed = {id for id, s in self.model.snapshots.items() if s.superseded and not s.deleted}
        assert set(sweep(self.home.backcast, timedelta(0))) == doomed
        for id in doomed:
            self.model.snapshots[id].deleted = True

    @rule()
    def sweep_within_grace(self) -> None:
        assert sweep(self.home.backcast, HOUR) == []

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
        versions = self.home.backcast.registry.versions.all()
        assert {v.number: str(v.state) for v in versions} == self.model.states
        assert {v.number for v in versions if v.sunset_at is not None} == self.model.ending


QUICK = settings(
    max_examples=25,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],  # a run takes too long to look for a shorter one
)
LONG = settings(QUICK, max_examples=50, stateful_step_count=80, derandomize=False, print_blob=True)

TestLifecycle = Lifecycle.TestCase
TestLifecycle.settings = QUICK


@pytest.mark.long
def test_lives_that_nobody_has_seen_yet() -> None:
    until = time.monotonic() + LONG_S
    while time.monotonic() < until:
        run_state_machine_as_test(Lifecycle, settings=LONG)
