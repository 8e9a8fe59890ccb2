"""How far a served vector may have moved from the last stored one.

While version j was live, the ver-j vector of an id was stored. Every promotion since has changed
what is served in its place by some Δ, and every refresh and upsert too. The sum of all ‖Δ‖ bounds
the distance between the vector served now and the last one stored: the drift bound, one number for
each id and each older version. It is no distance to what the old model would give today.

Bounds are kept as vectors are: a snapshot whose vectors have one number a version, -1 where the id
was never stored as that version, or where what became of it is not known.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from backcast.artifacts import Artifacts
from backcast.changes import ChangedSnapshot
from backcast.diff import Moved, Route
from backcast.errors import SnapshotNotLoaded
from backcast.registry.database import utc_now
from backcast.snapshots import write_vectors
from backcast.spreads import Tally
from backcast.stores import StoredSnapshot, VectorStore
from backcast.vectors import VectorBatch
from backcast.versions import DriftRecord, Entity, SnapshotRecord

UNKNOWN = np.float32(-1)

Bounds = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class DriftBounds:
    """The drift bounds of the vectors of one snapshot's files, as the store holds them."""

    record: DriftRecord
    stored: StoredSnapshot

    def of(self, entity: Entity, ids: Sequence[str], version: int) -> Bounds:
        """Return the bounds for ``version``, (n,); NaN where there is none."""
        bounds = np.full(len(ids), np.nan, np.float32)
        if version not in self.record.targets:
            return bounds
        gathered = self.stored.gather(entity, ids)
        column = gathered.vectors[:, list(self.record.targets).index(version)]
        known = gathered.found & (column >= 0)
        bounds[known] = column[known]
        unsettled = self._unsettled.get((version, entity))
        if unsettled:
            bounds[[hash_of(id) in unsettled for id in ids]] = np.nan
        return bounds

    @cached_property
    def _unsettled(self) -> Mapping[tuple[int, Entity], frozenset[int]]:
        return {
            (int(version), Entity(name)): frozenset(hashes)
            for version, kinds in self.record.unsettled.items()
            for name, hashes in kinds.items()
        }


def hash_of(id: str) -> int:
    """Return by what an unsettled id is known; others that share it have no bound either."""
    return xxhash.xxh3_64_intdigest(id.encode(errors="surrogatepass")) >> 1  # fits in 63 bits


Mapper = Callable[[int, NDArray[np.float32]], NDArray[np.float32]]
"""Takes a version j and vectors (n, D_k), and returns their ver-j vectors (n, D_j)."""


@dataclass(frozen=True, eq=False)
class LiveDrift:
    """The drift bounds of what is live: S.d of version k, whose own vectors are stored.

    Attributes:
        bounds: those of the files of S, without its deltas; None where nothing is known.
        mapped: as the service maps.
    """

    version: int
    store: ChangedSnapshot
    bounds: DriftBounds | None
    mapped: Mapper

    def of(self, entity: Entity, ids: Sequence[str], version: int) -> Bounds:
        """Return the bounds of some ids, (n,); NaN where there is none."""
        if version == self.version:
            found = self.store.gather(entity, ids).found
            return np.where(found, np.float32(0), np.float32(np.nan))
        if self.bounds is None:
            return np.full(len(ids), np.nan, np.float32)
        bounds = self.bounds.of(entity, ids, version)
        places = self.store.changes.places.get(entity)
        if places:
            self._add_changes(entity, ids, version, bounds)
        return bounds

    def _add_changes(
        self, entity: Entity, ids: Sequence[str], version: int, bounds: Bounds
    ) -> None:
        """Add how far deltas have moved vectors away from those in the files: W_k^j (z' - z)."""
        places = self.store.changes.places[entity]
        rows = [row for row, id in enumerate(ids) if id in places]
        if not rows:
            return
        changed = [ids[row] for row in rows]
        now, then = self.store.gather(entity, changed), self.store.stored.gather(entity, changed)
        moved = self.mapped(version, now.vectors) - self.mapped(version, then.vectors)
        further = np.linalg.norm(moved.astype(np.float64), axis=1)
        further[~(now.found & then.found)] = np.nan
        bounds[rows] = rounded_up(bounds[rows] + further)


def rounded_up(numbers: NDArray[np.float64]) -> Bounds:
    """Return float32 numbers that are not smaller; what is too large, or none, is NaN."""
    with np.errstate(over="ignore"):
        above = np.nextafter(numbers.astype(np.float32), np.float32(np.inf))
    return np.where(np.isfinite(above), above, np.float32(np.nan))


class DriftSum:
    """Adds what a promotion moves to the bounds of what is live.

    Args:
        live: the bounds so far.
        routes: those that the moves were measured along.
        targets: the versions to be bounded, at least one.
    """

    def __init__(self, live: LiveDrift, routes: Sequence[Route], targets: Sequence[int]) -> None:
        self._live, self.targets = live, tuple(targets)
        self._columns = {route.version: at for at, route in enumerate(routes)}
        self._tallies: dict[tuple[int, Entity], Tally] = {}
        self._unknown: dict[tuple[int, Entity], int] = {}

    def batches(self, moved: Iterable[Moved]) -> Iterator[VectorBatch]:
        """Yield the new bounds as vectors of one number a target."""
        for batch in moved:
            bounds = np.full((len(batch.ids), len(self.targets)), UNKNOWN)
            for at, target in enumerate(self.targets):
                if target in self._columns:
                    bounds[:, at] = self._sum(batch, target)
                self._count(batch.entity, target, bounds[:, at])
            yield VectorBatch(batch.entity, batch.ids, bounds)

    def _sum(self, batch: Moved, target: int) -> Bounds:
        before = self._live.of(batch.entity, batch.ids, target).astype(np.float64)
        exact = before + batch.distances[:, self._columns[target]]  # NaN where either is
        bounds = rounded_up(exact)
        return np.where(np.isnan(bounds), UNKNOWN, bounds)

    def _count(self, entity: Entity, target: int, bounds: Bounds) -> None:
        key, known = (target, entity), bounds >= 0
        self._tallies.setdefault(key, Tally()).add(bounds[known].astype(np.float64))
        self._unknown[key] = self._unknown.get(key, 0) + int(np.count_nonzero(~known))

    def figures(self) -> dict[str, Any]:
        """Return how the bounds are spread, by version and entity kind."""
        figures: dict[str, Any] = {str(target): {} for target in self.targets}
        for (target, entity), tally in self._tallies.items():
            spread = tally.spread()
            figures[str(target)][str(entity)] = {
                "known": tally.count,
                "unknown": self._unknown[target, entity],
                **({} if spread is None else asdict(spread)),
            }
        return figures


def write_drift(
    artifacts: Artifacts, snapshot: SnapshotRecord, drift: DriftSum, moved: Iterable[Moved]
) -> DriftRecord:
    """Write the bounds of ``snapshot``; durable when this returns, the row is the caller's."""
    folder = artifacts.new_folder("drifts", f"{snapshot.id}{_MARK}")
    batches = drift.batches(moved)
    written = write_vectors(
        artifacts, folder, snapshot.version, len(drift.targets), batches, utc_now()
    )
    return DriftRecord(
        id=written.id,
        snapshot=snapshot.id,
        targets=drift.targets,
        counts=written.counts,
        folder=folder,
        manifest_sha256=written.manifest_sha256,
        unsettled={},
        figures=drift.figures(),
    )


_MARK = "-drift"


def bounded_snapshot(name: str) -> str:
    """Return the snapshot whose bounds a store calls ``name``; of a snapshot's name, itself."""
    return name.partition(f"{_MARK}-")[0]


def open_bounds(record: DriftRecord | None, store: VectorStore) -> DriftBounds | None:
    """Open drift bounds; None where there are none, or the store has lost them."""
    try:
        return None if record is None else DriftBounds(record, store.open(record.id))
    except SnapshotNotLoaded:  # vectors can be served and compared all the same
        return None
