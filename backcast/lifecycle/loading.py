"""A published snapshot is brought into the vector store."""

import logging
from collections.abc import Callable, Iterable, Iterator

from backcast.errors import ArtifactError, BackcastError, SnapshotNotLoaded
from backcast.lifecycle.places import Backcast
from backcast.snapshots import read_snapshot
from backcast.stores import Precision, Rounding, VectorStore
from backcast.vectors import VectorBatch
from backcast.versions import DriftRecord, Entity

logger = logging.getLogger(__name__)


def load_snapshot(
    backcast: Backcast,
    snapshot: str,
    advance: Callable[[float], None] = lambda _done: None,
    precision: Precision | None = None,
) -> Rounding:
    """Load a published snapshot into the store; harmless where it is there already.

    ``advance`` is told the fraction that is done, at most a hundred times. ``precision`` is that
    of the vectors, where it is not the store's own. Returns the precision that the vectors are
    stored at, and what it cost. Drift bounds go with them; where their files are lost, vectors are
    served all the same, and the bounds are unknown.

    Raises:
        InvalidInput: a number is too large for the store's precision.
        ArtifactError: a file of the vectors is not what was registered.
    """
    record = backcast.registry.snapshots.get(snapshot)
    counts = {Entity(name): count for name, count in record.counts.items()}
    batches = _counted(read_snapshot(backcast.artifacts, record), sum(counts.values()), advance)
    backcast.store.load(snapshot, record.dim, counts, batches, precision)
    drift = backcast.registry.drifts.of(snapshot)
    if drift is not None:
        _load_known_drift(backcast, drift)
    return backcast.store.open(snapshot).rounding


def _load_known_drift(backcast: Backcast, drift: DriftRecord) -> None:
    try:
        load_drift(backcast, drift)
    except ArtifactError as error:
        logger.warning("no drift bounds are known of %s: %s", drift.snapshot, error.message)


def load_drift(backcast: Backcast, drift: DriftRecord) -> None:
    """Load drift bounds into the store, as float32 whatever its precision: bounds are exact."""
    counts = {Entity(name): count for name, count in drift.counts.items()}
    batches = read_snapshot(backcast.artifacts, drift)
    backcast.store.load(drift.id, drift.dim, counts, batches, Precision.FLOAT32)


def discard_drift(backcast: Backcast, drift: DriftRecord) -> None:
    """Delete drift bounds, unless the registry names them; what cannot be deleted is litter."""
    try:
        named = backcast.registry.drifts.of(drift.snapshot)
        if named is not None and named.id == drift.id:
            return
        backcast.artifacts.delete(drift.folder)
        if is_loaded(backcast.store, drift.id):  # what is there in part is left to the collector
            backcast.store.drop(drift.id)
    except BackcastError as error:  # another one is on its way, and says more
        logger.warning("drift bounds %s are not deleted: %s", drift.id, error.message)


def _counted(
    batches: Iterable[VectorBatch], total: int, advance: Callable[[float], None]
) -> Iterator[VectorBatch]:
    done = told = 0
    for batch in batches:
        if told < 100 * done // total:
            told = 100 * done // total
            advance(told / 100)
        yield batch
        done += len(batch.ids)


def is_loaded(store: VectorStore, snapshot: str) -> bool:
    """Return whether the store holds a snapshot."""
    try:
        store.open(snapshot)
    except SnapshotNotLoaded:
        return False
    return True
