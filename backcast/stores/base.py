"""The vector store port: what serving and promotion need of it, and nothing more."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from backcast.stores.precision import Precision, Rounding
from backcast.vectors import VectorBatch
from backcast.versions import Entity


@dataclass(frozen=True, eq=False)
class Gathered:
    """Vectors in the order of the ids asked for.

    Attributes:
        vectors: (n, D) float32, exactly what is stored; rows of unknown ids are zero.
        found: (n,) bool.
    """

    vectors: NDArray[np.float32]
    found: NDArray[np.bool_]


class StoredSnapshot(Protocol):
    """A readable handle on one loaded snapshot; safe to use from several threads."""

    @property
    def dim(self) -> int:
        """D_k."""

    @property
    def counts(self) -> Mapping[Entity, int]:
        """Vectors held by entity kind."""

    @property
    def size(self) -> int:
        """Bytes that the snapshot takes in the store, ids and index included."""

    @property
    def rounding(self) -> Rounding:
        """The precision that the vectors are stored at, and what it cost."""

    def gather(self, entity: Entity, ids: Sequence[str]) -> Gathered:
        """Return the vectors of ``ids``; order and duplicates kept."""


class VectorStore(Protocol):
    """Holds loaded snapshots, each under its id, each whole or not at all."""

    def load(
        self,
        snapshot: str,
        dim: int,
        counts: Mapping[Entity, int],
        batches: Iterable[VectorBatch],
        precision: Precision | None = None,
    ) -> None:
        """Load a snapshot; it becomes visible at once when complete. Loading again is harmless.

        ``precision`` is that of its numbers, where it is not the store's own. What is held
        already stays as it is, whatever precision the store would use now.

        Raises:
            DimensionMismatch: a batch is not of dimension ``dim``, or the counts differ.
            InvalidInput: an id comes twice, or a number is too large for the store's precision.
            StoreError: the store cannot be written.
        """

    def open(self, snapshot: str) -> StoredSnapshot:
        """Return a handle; raise SnapshotNotLoaded."""

    def snapshots(self) -> list[str]:
        """Return the ids of the snapshots held, sorted."""

    def remains(self) -> list[str]:
        """Return the names of what a killed load or drop left, or one under way; sorted.

        To load or drop one of that name makes an end of it.
        """

    def drop(self, snapshot: str) -> None:
        """Remove a snapshot; open handles stay readable where the store can, else fail cleanly."""

    def close(self) -> None:
        """Return what the store holds open."""
