"""A published snapshot is brought into the vector store."""

from collections.abc import Callable, Iterable, Iterator

from backcast.errors import SnapshotNotLoaded
from backcast.lifecycle.places import Backcast
from backcast.snapshots import read_snapshot
from backcast.stores import Precision, Rounding, VectorStore
from backcast.vectors import VectorBatch
from backcast.versions import DriftRecord, Entity


def load_snapshot(
    backcast: Backcast,
    snapshot: str,
    advance: Callable[[float], None] = lambda _done: None,
    precision: Precision | None = None,
) -> Rounding:
    """Load a published snapshot into the store; harmless where it is there already.

    ``advance`` is told the fraction that is done, at most a hundred times. ``precision`` is that
    of the vectors, where it is not the store's own. Returns the precision that the vectors are
    stored at, and what it cost.

    Raises:
        InvalidInput: a number is too large for the store's precision.
    """
    record = backcast.registry.snapshots.get(snapshot)
    counts = {Entity(name): count for name, count in record.counts.items()}
    batches = _counted(read_snapshot(backcast.artifacts, record), sum(counts.values()), advance)
    backcast.store.load(snapshot, record.dim, counts, batches, precision)
    drift = backcast.registry.drifts.of(snapshot)
    if drift is not None:
        load_drift(backcast, drift)
    return backcast.store.open(snapshot).rounding


def load_drift(backcast: Backcast, drift: DriftRecord) -> None:
    """Load drift bounds into the store, as float32 whatever its precision: bounds are exact."""
    counts = {Entity(name): count for name, count in drift.counts.items()}
    batches = read_snapshot(backcast.artifacts, drift)
    backcast.store.load(drift.id, drift.dim, counts, batches, Precision.FLOAT32)


def discard_drift(backcast: Backcast, drift: DriftRecord | None) -> None:
    """Delete drift bounds that no row names."""
    if drift is not None:
        backcast.artifacts.delete(drift.folder)
        if is_loaded(backcast.store, drift.id):  # what is there in part is left to the collector
            backcast.store.drop(drift.id)


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
