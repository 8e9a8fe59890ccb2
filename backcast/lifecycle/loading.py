"""A published snapshot is brought into the vector store."""

from collections.abc import Callable, Iterable, Iterator

from backcast.errors import SnapshotNotLoaded
from backcast.lifecycle.places import Backcast
from backcast.snapshots import read_snapshot
from backcast.stores import Rounding, VectorStore
from backcast.vectors import VectorBatch
from backcast.versions import Entity


def load_snapshot(
    backcast: Backcast, snapshot: str, advance: Callable[[float], None] = lambda _done: None
) -> Rounding:
    """Load a published snapshot into the store; harmless where it is there already.

    ``advance`` is told the fraction that is done, at most a hundred times. Returns the precision
    that the vectors are stored at, and what it cost.

    Raises:
        InvalidInput: a number is too large for the store's precision.
    """
    record = backcast.registry.snapshots.get(snapshot)
    counts = {Entity(name): count for name, count in record.counts.items()}
    batches = _counted(read_snapshot(backcast.artifacts, record), sum(counts.values()), advance)
    backcast.store.load(snapshot, record.dim, counts, batches)
    return backcast.store.open(snapshot).rounding


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
