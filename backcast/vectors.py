"""Batches of vectors: what trainers write, snapshots hold and stores load."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backcast.errors import DimensionMismatch, InvalidInput, NotFinite
from backcast.versions import Entity

MAX_ID_BYTES = 1024


@dataclass(frozen=True, eq=False)
class VectorBatch:
    """Vectors of one entity kind.

    Args:
        entity: item or user.
        ids: n ids, each 1 to 1024 bytes of UTF-8.
        vectors: (n, D) float32, finite.

    Raises:
        DimensionMismatch: ``vectors`` is not (n, D).
        InvalidInput: an id is empty, too long or not UTF-8. NotFinite: a value is NaN or infinite.
    """

    entity: Entity
    ids: Sequence[str]
    vectors: NDArray[np.float32]

    def __post_init__(self) -> None:
        with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite below
            vectors = np.ascontiguousarray(self.vectors, dtype=np.float32)
        if vectors.ndim != 2 or len(vectors) != len(self.ids):
            raise DimensionMismatch("vectors", f"({len(self.ids)}, D)", vectors.shape)
        finite: NDArray[np.bool_] = np.all(np.isfinite(vectors), axis=1)
        if not finite.all():
            first = self.ids[int(np.argmin(finite))]
            raise NotFinite(len(finite) - int(finite.sum()), self.entity, first)
        for id in self.ids:
            check_id(id)
        object.__setattr__(self, "vectors", vectors)

    @property
    def dim(self) -> int:
        """D, the length of each vector."""
        return int(self.vectors.shape[1])

    def only(self, rows: Sequence[int]) -> "VectorBatch":
        """Return some of the rows; the batch itself where that is all of them."""
        if len(rows) == len(self.ids):
            return self
        return VectorBatch(self.entity, [self.ids[row] for row in rows], self.vectors[rows])

    def slices(self, rows: int) -> Iterator["VectorBatch"]:
        """Yield the batch in pieces of at most ``rows``."""
        for start in range(0, len(self.ids), rows):
            stop = start + rows
            yield VectorBatch(self.entity, self.ids[start:stop], self.vectors[start:stop])


def norms(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return ‖v‖₂ of each row of (n, D), added up in float64."""
    squares: NDArray[np.float64] = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    return np.sqrt(squares)


def check_id(id: str) -> bytes:
    """Return the id as UTF-8; raise InvalidInput where it is none that can be stored."""
    try:
        encoded = id.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"The id {id!r} is not valid Unicode.") from error
    if not 0 < len(encoded) <= MAX_ID_BYTES:
        raise InvalidInput(
            f"An id has 1 to {MAX_ID_BYTES} bytes of UTF-8; {id[:40]!r} has {len(encoded)}."
        )
    return encoded
