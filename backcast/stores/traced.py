"""A store whose calls are recorded where they are part of a trace."""

from collections.abc import Iterable, Mapping, Sequence

from backcast.stores.base import Gathered, StoredSnapshot, VectorStore
from backcast.stores.precision import Precision
from backcast.tracing import Attributes, Tracing
from backcast.vectors import VectorBatch
from backcast.versions import Entity


class TracedStore:
    """Another store, each call of it a span; see the port."""

    def __init__(self, store: VectorStore, tracing: Tracing, kind: str) -> None:
        self.store, self._tracing = store, tracing
        self._said = {"backcast.store": kind}

    def load(
        self,
        snapshot: str,
        dim: int,
        counts: Mapping[Entity, int],
        batches: Iterable[VectorBatch],
        precision: Precision | None = None,
    ) -> None:
        """Load a snapshot."""
        with self._tracing.part(
            "store load", {**self._said, "backcast.vectors": sum(counts.values())}
        ):
            self.store.load(snapshot, dim, counts, batches, precision)

    def open(self, snapshot: str) -> StoredSnapshot:
        """Return a handle."""
        with self._tracing.part("store open", self._said):
            return TracedSnapshot(self.store.open(snapshot), self._tracing, self._said)

    def snapshots(self) -> list[str]:
        """Return the ids of the snapshots held, sorted."""
        with self._tracing.part("store snapshots", self._said):
            return self.store.snapshots()

    def remains(self) -> list[str]:
        """Return what was left half loaded."""
        with self._tracing.part("store remains", self._said):
            return self.store.remains()

    def drop(self, snapshot: str) -> None:
        """Remove a snapshot."""
        with self._tracing.part("store drop", self._said):
            self.store.drop(snapshot)

    def close(self) -> None:
        """Return what the store holds open."""
        self.store.close()


class TracedSnapshot:
    """A snapshot of a TracedStore."""

    def __init__(self, stored: StoredSnapshot, tracing: Tracing, said: Attributes) -> None:
        self.dim, self.counts, self.size = stored.dim, stored.counts, stored.size
        self.rounding = stored.rounding
        self._gather = tracing.measured(
            "store gather", stored.gather, lambda _entity, ids: {**said, "backcast.ids": len(ids)}
        )

    def gather(self, entity: Entity, ids: Sequence[str]) -> Gathered:
        """Return the vectors of ``ids``; order and duplicates kept."""
        return self._gather(entity, ids)
