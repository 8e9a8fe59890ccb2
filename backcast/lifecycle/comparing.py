"""A candidate beside what is live: verified and compared in one pass over its files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backcast.chains import load_chain
from backcast.changes import ChangedSnapshot, Changes, Delta, read_changes
from backcast.diff import NAMED, Comparison, Diff, Moved, Route
from backcast.drift import DriftBounds, DriftSum, LiveDrift, open_bounds, write_drift
from backcast.errors import ArtifactError, SnapshotNotLoaded
from backcast.lifecycle.carrying import missed_upserts
from backcast.lifecycle.places import Backcast
from backcast.registry import Catalog
from backcast.snapshots import read_ids, read_snapshot
from backcast.stores import Precision, Rounder
from backcast.transforms import AffineMap
from backcast.vectors import VectorBatch
from backcast.versions import DriftRecord, Entity, Live, SnapshotRecord, Version, VersionState


@dataclass(frozen=True, eq=False)
class LiveSide:
    """What is live at one moment.

    Attributes:
        chain: W_live^j for every j on its chain.
        bounds: the drift bounds of its snapshot, as stored; None where there are none.
    """

    live: Live
    record: SnapshotRecord
    store: ChangedSnapshot
    chain: dict[int, AffineMap]
    bounds: DriftBounds | None

    @classmethod
    def open(cls, backcast: Backcast, catalog: Catalog, live: Live) -> "LiveSide":
        """Open it; raise StoreError or ArtifactError where it cannot be read."""
        deltas = backcast.registry.deltas.of(live.snapshot, upto=live.delta)
        changes = read_changes(backcast.artifacts, deltas)
        return cls(
            live,
            backcast.registry.snapshots.get(live.snapshot),
            ChangedSnapshot(backcast.store.open(live.snapshot), changes),
            load_chain(catalog, backcast.artifacts, live.version),
            open_bounds(backcast.registry.drifts.of(live.snapshot), backcast.store),
        )

    @property
    def drift(self) -> LiveDrift:
        """The drift bounds of S.d."""
        return LiveDrift(self.live.version, self.store, self.bounds, self._mapped)

    def _mapped(self, version: int, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.chain[version](vectors).astype(np.float32)


@dataclass(frozen=True)
class Compared:
    """What a candidate changes, and which two states were compared."""

    version: int
    snapshot: str
    delta: int
    live: Live
    diff: Diff

    def document(self) -> dict[str, Any]:
        """Return it as a JSON document."""
        return {
            "version": self.version,
            "snapshot": f"{self.snapshot}.{self.delta}",
            "live_version": self.live.version,
            "baseline": self.live.name,
            **self.diff.document(),
        }


class Examination:
    """Compares a candidate with what is live, in one pass.

    Args:
        backcast: where both lie.
        catalog: the versions and maps of the moment that is looked at.
        target: the candidate's snapshot.
        chain: W_k^j for every j on its chain.
        side: what is live.
        advance: told the fraction that is done.

    Attributes:
        rows: how many vectors of the candidate's files were looked at.
    """

    def __init__(
        self,
        backcast: Backcast,
        catalog: Catalog,
        target: SnapshotRecord,
        chain: dict[int, AffineMap],
        side: LiveSide,
        advance: Callable[[float], None] = lambda _done: None,
    ) -> None:
        self._backcast, self._target, self._side = backcast, target, side
        self._advance = advance
        self.rows = 0
        servable = servable_versions(catalog.versions, sorted(chain, reverse=True))
        self.ancestors = [j for j in servable if j != target.version]
        self.routes = [
            Route(
                j,
                None if j == side.live.version else side.chain[j],
                None if j == target.version else chain[j],
            )
            for j in servable
            if j in side.chain
        ]
        self._comparison = Comparison(side.store, self.routes)
        self._aside = Comparison(side.store, self.routes)

    @cached_property
    def changes(self) -> Changes:
        """What will be changed on the candidate when it is live, carried upserts included."""
        deltas = self._backcast.registry.deltas.of(self._target.id, upto=self._target.head)
        changes = read_changes(self._backcast.artifacts, deltas)
        missed = missed_upserts(self._backcast, self._side.live, self._target)
        newer = [
            Delta(entity, ids, missed.vectors_of(entity, ids))
            for entity in missed.places
            if (ids := missed.upserted(entity))
        ]
        return changes.after(enumerate(newer, self._target.head + 1))

    def moved(self) -> Iterator[Moved]:
        """Go through the candidate; yield how far each vector of its files moves.

        Ids that deltas have changed count in the diff with their new vectors, and are yielded with
        the distances of those in the files.
        """
        rounder = Rounder(precision_of(self._backcast, self._target.id))
        total = sum(self._target.counts.values())
        for batch in read_snapshot(self._backcast.artifacts, self._target):
            self.rows += len(batch.ids)
            self._advance(self.rows / total)
            stored = _as_stored(batch, rounder)
            known = self.changes.places.get(batch.entity, {})
            changed = np.fromiter((id in known for id in batch.ids), np.bool_, len(batch.ids))
            if not changed.any():
                yield self._comparison.take(stored)
                continue
            yield self._aside.take(_some(stored, changed))
            yield self._comparison.take(_some(stored, ~changed))
        for batch in self.changes.batches():
            self._comparison.take(batch)

    def result(self) -> Compared:
        """Return what the pass, which is over, has found."""
        missing = self._comparison.missing().items()
        diff = self._comparison.result(
            {entity: self._name_lost(entity, count) for entity, count in missing if count}
        )
        target = self._target
        return Compared(target.version, target.id, target.head, self._side.live, diff)

    def write_drift(self) -> DriftRecord | None:
        """Go through the candidate and write its drift bounds; None where it has no ancestors."""
        if not self.ancestors:
            for _ in self.moved():
                pass
            return None
        return write_drift(
            self._backcast.artifacts,
            self._target,
            DriftSum(self._side.drift, self.routes, self.ancestors),
            self.moved(),
        )

    def _name_lost(self, entity: Entity, count: int) -> list[str]:
        try:
            return list(islice(self._lost(entity), min(count, NAMED)))
        except ArtifactError:  # they are counted all the same
            return []

    def _lost(self, entity: Entity) -> Iterator[str]:
        changes = self._side.store.changes
        known = changes.places.get(entity, {})
        for ids in read_ids(self._backcast.artifacts, self._side.record, entity):
            yield from self._comparison.without(entity, [id for id in ids if id not in known])
        yield from self._comparison.without(entity, changes.upserted(entity))


def precision_of(backcast: Backcast, snapshot: str) -> Precision:
    """Return the precision at which the store holds a snapshot, or would."""
    try:
        return backcast.store.open(snapshot).rounding.precision
    except SnapshotNotLoaded:
        return backcast.precision


def servable_versions(versions: Sequence[Version], chain: Sequence[int]) -> list[int]:
    """Return those of a chain that are not retired, in its order."""
    retired = {v.number for v in versions if v.state is VersionState.RETIRED}
    return [j for j in chain if j not in retired]


def _as_stored(batch: VectorBatch, rounder: Rounder) -> VectorBatch:
    if rounder.precision is Precision.FLOAT32:
        return batch
    return replace(batch, vectors=rounder.precision.widen(rounder(batch)))


def _some(batch: VectorBatch, chosen: NDArray[np.bool_]) -> VectorBatch:
    ids = [batch.ids[row] for row in np.flatnonzero(chosen).tolist()]
    return VectorBatch(batch.entity, ids, batch.vectors[chosen])
