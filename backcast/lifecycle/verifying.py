"""What the registry names is looked at: files by their digests, stored vectors by their bits."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from backcast.artifacts import Artifacts
from backcast.errors import (
    ArtifactError,
    DimensionMismatch,
    NotFound,
    SnapshotNotLoaded,
    StoreError,
)
from backcast.lifecycle.files import faults_of_files, named_files
from backcast.lifecycle.places import Backcast, Report
from backcast.snapshots import Registered, read_snapshot
from backcast.stores import StoredSnapshot
from backcast.vectors import VectorBatch
from backcast.versions import Entity

Expected = Callable[[VectorBatch], NDArray[np.float32]]
"""Returns what a store must answer for the ids of a batch, (n, D) float32."""


@dataclass(frozen=True)
class Verified:
    """What was looked at, and what is wrong with it.

    Attributes:
        live: S.d; None where nothing is.
        files, bytes: of artifacts.
        snapshots: ids of those that the store holds.
        vectors: in the store.
        faults: a line each.
    """

    live: str | None
    files: int
    bytes: int
    snapshots: tuple[str, ...]
    vectors: int
    faults: tuple[str, ...]


def verify(backcast: Backcast, report: Report = lambda _step, _done: None) -> Verified:
    """Compare files and store with what the registry says; nothing is changed.

    Every file is read, and every vector that the store holds of a snapshot that is live or can be
    gone back to is compared with the file's, rounded as the store rounds, and their drift bounds
    are too. All faults are told, not only the first.

    Raises:
        NotFound: no version is registered.
    """
    if not backcast.registry.versions.all():
        raise NotFound(
            "The registry has no versions, so there is nothing to verify. Name the one that is "
            "meant with BACKCAST_HOME or BACKCAST_DATABASE_URL."
        )
    found = _look(backcast, report)
    if not found.faults:
        return found
    again = _look(backcast, report)  # what was deleted or switched meanwhile is no fault
    return replace(again, faults=tuple(fault for fault in again.faults if fault in found.faults))


def _look(backcast: Backcast, report: Report) -> Verified:
    registry, artifacts = backcast.registry, backcast.artifacts
    try:
        files = list(named_files(registry, artifacts))
    except ArtifactError:  # is among the faults
        files = []
    total, done = sum(file.size for file in files) or 1, 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        report("files", 0.5 * min(1.0, done / total))

    faults = list(faults_of_files(registry, artifacts, advance))
    held = _held(backcast)
    vectors = 0
    for at, name in enumerate(held):
        report("store", 0.5 + 0.5 * at / len(held))
        try:
            record = registry.snapshots.get(name)
            vectors += check_stored(artifacts, record, backcast.store.open(name))
        except (StoreError, ArtifactError, DimensionMismatch) as error:
            faults += [] if error.message in faults else [error.message]
        try:
            check_bounds(backcast, name)
        except (StoreError, ArtifactError, DimensionMismatch) as error:
            faults += [] if error.message in faults else [error.message]
    live = registry.deployments.live()
    if live is not None and live.snapshot not in held:
        where = SnapshotNotLoaded(live.snapshot, "in use").message
        faults.append(f"{where} Run `backcast promote {live.version}`.")
    served = None if live is None else live.name
    size = sum(file.size for file in files)
    return Verified(served, len(files), size, tuple(held), vectors, tuple(faults))


def _held(backcast: Backcast) -> list[str]:
    """Return what the store holds of the snapshots that can be live."""
    kept = {s.id for s in backcast.registry.snapshots.undeleted() if s.condemned_at is None}
    return [name for name in backcast.store.snapshots() if name in kept]


def check_bounds(backcast: Backcast, snapshot: str) -> None:
    """Compare the drift bounds of a snapshot, where it has any; raise what ``check_stored`` does.

    A store without them raises SnapshotNotLoaded.
    """
    drift = backcast.registry.drifts.of(snapshot)
    if drift is not None:
        check_stored(backcast.artifacts, drift, backcast.store.open(drift.id))


def check_stored(
    artifacts: Artifacts,
    record: Registered,
    stored: StoredSnapshot,
    expected: Expected | None = None,
) -> int:
    """Compare every stored vector, bit by bit, and return how many there are.

    They must be those of the snapshot's files, rounded to the precision of the store, or what
    ``expected`` says.

    Raises:
        StoreError: a vector is missing, is another one, or there are more than in the files.
        ArtifactError: the files cannot be read.
    """
    precision = stored.rounding.precision

    def rounded(batch: VectorBatch) -> NDArray[np.float32]:
        return precision.widen(precision.narrow(batch.vectors))

    wanted, counts = expected or rounded, dict.fromkeys(Entity, 0)
    for batch in read_snapshot(artifacts, record):
        _compare(record.folder, batch, wanted(batch), stored)
        counts[batch.entity] += len(batch.ids)
    held = {entity: stored.counts.get(entity, 0) for entity in Entity}
    if held != counts:
        raise StoreError(
            f"The store holds {_shown(held)} of {record.folder}, not {_shown(counts)}."
        )
    return sum(counts.values())


def _compare(
    folder: str, batch: VectorBatch, wanted: NDArray[np.float32], stored: StoredSnapshot
) -> None:
    found = stored.gather(batch.entity, batch.ids)
    same = found.found & (found.vectors.view(np.uint32) == wanted.view(np.uint32)).all(axis=1)
    if not same.all():
        row = int(np.argmin(same))
        what = "holds another vector of" if found.found[row] else "does not hold"
        raise StoreError(f"The store {what} {batch.entity} {batch.ids[row]!r} of {folder}.")


def _shown(counts: dict[Entity, int]) -> str:
    return " and ".join(f"{count} {entity}s" for entity, count in counts.items())
