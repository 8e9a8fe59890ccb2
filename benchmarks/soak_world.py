"""The soak's versions and vectors, and what the registry says became of them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from threading import Lock
from typing import Any

import numpy as np
from sqlalchemy import Connection, Engine, select
from sqlalchemy import Row as SqlRow
from sqlalchemy.exc import SQLAlchemyError

from backcast.artifacts import dump_json, dump_tensors
from backcast.changes import read_delta
from backcast.errors import ArtifactMissing
from backcast.lifecycle import Backcast, compact, publish, register_version
from backcast.registry import VersionDraft, tables
from backcast.registry.schema import make_engine
from backcast.settings import Settings
from backcast.vectors import VectorBatch
from backcast.versions import DeltaKind, DeltaRecord, Entity, Transform
from benchmarks.soak_ledger import Id, Ledger, Models, Row, Span

DIMS = (12, 16, 20, 16, 24)
PARENTS = (None, 0, 1, 1, 3)
ITEMS, USERS = 240, 40
_MISSING = 0.03  # of the ids that a publication leaves out
_AWAY_S = 60.0


@dataclass(frozen=True)
class Deployed:
    """One row of the history of what was live; ``seen_at`` is on the soak's own clock."""

    generation: int
    kind: str
    version: int
    snapshot: str
    delta: int
    from_snapshot: str | None
    from_delta: int | None
    seen_at: float


def make_models(rng: np.random.Generator) -> Models:
    """Return random versions of which some are off the chain of others."""
    steps = {}
    for version, parent in enumerate(PARENTS):
        if parent is not None:
            rows, cols = DIMS[parent], DIMS[version]
            weight = rng.standard_normal((rows, cols), np.float32) / np.float32(np.sqrt(cols))
            bias = rng.standard_normal(rows, np.float32)
            steps[version] = (weight.astype(np.float64), bias.astype(np.float64))
    return Models(dict(enumerate(PARENTS)), dict(enumerate(DIMS)), steps)


def register(backcast: Backcast, models: Models) -> None:
    """Register all versions."""
    for version, parent in models.parents.items():
        maps, files = [], {"version.json": dump_json({"soak": version})}
        if parent is not None:
            weight, bias = (array.astype(np.float32) for array in models.steps[version])
            name = "transform.safetensors"
            files[name] = dump_tensors({"weight": weight, "bias": bias})
            rows, cols = weight.shape
            maps = [Transform(version, parent, False, rows, cols, True, name)]
        draft = VersionDraft(
            version, parent, models.dims[version], "soak", 0, 0, "soak", "0" * 64, "", {}, {}, maps
        )
        register_version(backcast.registry, backcast.artifacts, draft, files)


class World:
    """Publishes vectors, and follows in the registry what became of everything that was meant."""

    def __init__(
        self, settings: Settings, backcast: Backcast, ledger: Ledger, rng: np.random.Generator
    ) -> None:
        self.settings, self.backcast, self.ledger = settings, backcast, ledger
        self._rng = rng
        self._engine: Engine = make_engine(settings.registry_url).execution_options(
            reads_only=True, isolation_level="REPEATABLE READ"
        )
        self._following = Lock()
        self.publishing = Lock()
        self.history: list[Deployed] = []
        self.erased: frozenset[Id] = frozenset()
        self.condemned: frozenset[str] = frozenset()
        self.emptied: frozenset[str] = frozenset()
        self.population: list[Id] = [
            *((Entity.ITEM, f"item {n}/é") for n in range(ITEMS)),
            *((Entity.USER, f"user {n}") for n in range(USERS)),
        ]

    def close(self) -> None:
        """Return every connection."""
        self._engine.dispose()

    def draw(self, version: int, ids: Sequence[Id]) -> dict[Id, Row]:
        """Return new random ver-``version`` vectors of ids."""
        rows = self._rng.standard_normal((len(ids), self.ledger.models.dims[version]), np.float32)
        return dict(zip(ids, rows, strict=True))

    def publish(self, version: int) -> None:
        """Publish new vectors of a version, of nearly all ids."""
        kept = self._rng.random(len(self.population)) >= _MISSING
        ids = [id for id, keep in zip(list(self.population), kept, strict=False) if keep]
        vectors = self.draw(version, ids)
        batches = [
            VectorBatch(entity, [id for kind, id in vectors if kind is entity], rows)
            for entity in Entity
            if len(rows := np.array([row for (kind, _), row in vectors.items() if kind is entity]))
        ]
        registry, artifacts = self.backcast.registry, self.backcast.artifacts
        with self._publication(version, vectors):
            publish(registry, artifacts, version, batches, {})

    def compact(self) -> None:
        """Publish what is live, its changes among it."""
        version = self.live.version
        with self._publication(version, None):
            compact(self.backcast, expected_live=version)

    @contextmanager
    def _publication(self, version: int, vectors: Mapping[Id, Row] | None) -> Iterator[None]:
        # Nobody who was erased comes back meanwhile: the books could not tell whether before.
        with self.publishing:
            self.ledger.will_publish(version, vectors)
            try:
                yield
            finally:
                self.look()

    def note_emptied(self) -> None:
        """Note that the store may have lost all that there is but what is live."""
        self.look()
        self.emptied = frozenset(self.ledger.snapshots())

    def may_be_gone(self, name: str) -> bool:
        """Return whether a snapshot, S or S.d, went with an emptied store and is not filled again.

        Only what is live is.
        """
        snapshot = name.partition(".")[0]
        return snapshot in self.emptied and snapshot != self.live.snapshot

    def look(self) -> None:
        """Follow; wait for a database that is away."""
        deadline = time.monotonic() + _AWAY_S
        while True:
            try:
                return self.follow()
            except SQLAlchemyError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    @property
    def live(self) -> Deployed:
        """What was live when the registry was last looked at."""
        return self.history[-1]

    def follow(self) -> None:
        """Look at the registry and take up in the ledger what is new.

        Raises:
            ValueError: something cannot be explained by what was meant.
            SQLAlchemyError: the database does not answer.
        """
        with self._following, self._engine.connect() as connection:
            self._take_up_snapshots(connection)
            self._take_up_deployments(connection)

    def _take_up_snapshots(self, connection: Connection) -> None:
        self.erased = self._erased(connection)
        table = tables.snapshots.c
        rows = connection.execute(select(tables.snapshots).order_by(table.created_at)).all()
        for row in sorted(rows, key=lambda row: not self.ledger.knows(row.id)):
            changes = self._new_changes(connection, row)
            if not self.ledger.knows(row.id):
                base = (row.base_snapshot, row.base_delta) if row.base_snapshot else None
                told = {id for delta in changes for id, new in delta.items() if new is None}
                self.ledger.add_snapshot(row.id, row.version, base, self.erased - told)
            for number, delta in enumerate(changes, self.ledger.head(row.id) + 1):
                self.ledger.add_delta(row.id, number, delta)
        self.condemned = self._condemned(connection)

    def _condemned(self, connection: Connection) -> frozenset[str]:
        gone = tables.snapshots.c.condemned_at.is_not(None)
        return frozenset(connection.scalars(select(tables.snapshots.c.id).where(gone)))

    def _erased(self, connection: Connection) -> frozenset[Id]:
        known = {(entity, sha256(id.encode()).hexdigest()): id for entity, id in self.population}
        rows = connection.execute(select(tables.erasures.c.entity, tables.erasures.c.sha256))
        found = ((Entity(row.entity), row.sha256) for row in rows)
        return frozenset((entity, known[entity, digest]) for entity, digest in found)

    def _new_changes(
        self, connection: Connection, row: SqlRow[Any]
    ) -> list[Mapping[Id, Row | None]]:
        try:
            return self._read_changes(connection, row.id, row.head)
        except ArtifactMissing:  # it is served no more, and may have been condemned just now
            with self._engine.connect() as now:  # the other one sees what was before
                if row.id in self._condemned(now):
                    return []
            raise

    def _read_changes(
        self, connection: Connection, snapshot: str, head: int
    ) -> list[Mapping[Id, Row | None]]:
        known = self.ledger.head(snapshot) if self.ledger.knows(snapshot) else 0
        if known == head:
            return []
        columns = [tables.deltas.c[name] for name in DeltaRecord.__dataclass_fields__]
        newer = (tables.deltas.c.snapshot == snapshot) & (tables.deltas.c.number > known)
        found = select(*columns).where(newer).order_by(tables.deltas.c.number)
        records = [
            DeltaRecord(
                **{**row._mapping, "kind": DeltaKind(row.kind), "entity": Entity(row.entity)}
            )
            for row in connection.execute(found)
        ]
        if [record.number for record in records] != list(range(known + 1, head + 1)):
            raise ValueError(f"{snapshot} is at {head}, its deltas after {known} are {records}")
        return [self._changes(record) for record in records]

    def _changes(self, record: DeltaRecord) -> Mapping[Id, Row | None]:
        delta = read_delta(self.backcast.artifacts, record)
        rows: Any = [None] * len(delta.ids) if delta.vectors is None else delta.vectors
        return {(record.entity, id): row for id, row in zip(delta.ids, rows, strict=True)}

    def _take_up_deployments(self, connection: Connection) -> None:
        table = tables.deployments.c
        newer = select(tables.deployments).where(table.generation > len(self.history))
        for row in connection.execute(newer.order_by(table.generation)):
            if row.generation != len(self.history) + 1:
                raise ValueError(f"generation {row.generation} follows {len(self.history)}")
            values = {
                name: getattr(row, name) for name in Deployed.__dataclass_fields__ if name in table
            }
            deployed = Deployed(**values, seen_at=time.monotonic())
            self._check_carried(deployed)
            self.history.append(deployed)

    def _check_carried(self, deployed: Deployed) -> None:
        lived, until = list[Span](), deployed
        for before in reversed(self.history):
            assert until.from_snapshot == before.snapshot
            assert until.from_delta is not None
            lived.append(Span(before.snapshot, before.delta, until.from_delta))
            until = before
        first = next((s.last for s in lived if s.snapshot == deployed.snapshot), 0)
        target = Span(deployed.snapshot, first, deployed.delta)
        if wrong := self.ledger.carried(lived, target, self.condemned):
            (id, words), *_ = wrong
            raise ValueError(
                f"going live, {deployed.snapshot}.{deployed.delta} is wrong about {len(wrong)} "
                f"ids: {id} {words}"
            )
