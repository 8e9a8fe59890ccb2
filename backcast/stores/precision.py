"""The precision that vectors are stored at, and what it costs.

float16 keeps 11 significant bits up to 65504; bfloat16 keeps 8, and float32's range. Both halve
the store, and both widen to float32 exactly: what is lost is lost once, when a snapshot is loaded.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from backcast.errors import InvalidInput
from backcast.vectors import VectorBatch, norms


class Precision(StrEnum):
    """How one number is stored; all of them little-endian."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def dtype(self) -> np.dtype[Any]:
        """What NumPy reads it as; a bfloat16 is the upper half of a float32."""
        return np.dtype({"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[self])

    def narrow(self, vectors: NDArray[np.float32]) -> NDArray[Any]:
        """Round finite numbers to the nearest that can be stored, ties to even.

        What is too large becomes infinite.
        """
        if self is Precision.BFLOAT16:
            bits = vectors.view(np.uint32)
            nearest = bits + 0x7FFF + (bits >> 16 & 1)  # carries into the upper half, or not
            return (nearest >> 16).astype(self.dtype)
        with np.errstate(over="ignore", under="ignore"):
            return vectors.astype(self.dtype, copy=False)

    def widen(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Return finite numbers that ``narrow`` made, as float32; float32 itself is not copied."""
        if self is Precision.BFLOAT16:
            bits: NDArray[np.uint32] = np.left_shift(stored, 16, dtype=np.uint32)
            return bits.view(np.float32)
        if self is Precision.FLOAT16:
            return _widen_float16(stored)
        return stored.astype(np.float32, copy=False)


def _widen_float16(stored: NDArray[Any]) -> NDArray[np.float32]:
    # Exact for finite numbers, and six times as fast as NumPy's cast, which takes one at a time:
    # with sign and fraction in place, only the exponent is too small, by the difference in bias.
    bits = np.left_shift(stored.view("<i2"), 13, dtype=np.int32)
    bits &= -0x70000001  # the shift left copies of the sign between it and the exponent
    numbers: NDArray[np.float32] = bits.view(np.float32)
    numbers *= np.float32(2.0**112)
    return numbers


@dataclass(frozen=True)
class Rounding:
    """What storing a snapshot's vectors at a precision cost.

    Attributes:
        mean_error: of ‖stored - given‖₂ / ‖given‖₂ over all vectors; a zero vector has no error.
        largest_error: of the same.
    """

    precision: Precision = Precision.FLOAT32
    mean_error: float = 0.0
    largest_error: float = 0.0

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Self:
        """Read what ``asdict`` wrote; raise ValueError for a precision that is not known."""
        return cls(**{**document, "precision": Precision(document["precision"])})

    def __str__(self) -> str:
        if self.precision is Precision.FLOAT32:
            return "float32, nothing lost"
        return (
            f"{self.precision}, relative error {self.mean_error:.1e} on average, "
            f"{self.largest_error:.1e} at most"
        )


class Rounder:
    """Rounds the batches of one snapshot, and measures what that costs."""

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self._sum, self._count, self._largest = 0.0, 0, 0.0

    def __call__(self, batch: VectorBatch) -> NDArray[Any]:
        """Return a batch's vectors as they are stored, (n, D) of the precision's dtype.

        Raises:
            InvalidInput: a number is too large for the precision.
        """
        narrow = self.precision.narrow(batch.vectors)
        if self.precision is not Precision.FLOAT32 and len(batch.ids):
            self._refuse_overflow(batch, narrow)
            errors = _errors(batch.vectors, self.precision.widen(narrow))
            self._sum += float(errors.sum())
            self._largest = max(self._largest, float(errors.max()))
        self._count += len(batch.ids)
        return narrow

    @property
    def total(self) -> Rounding:
        """What all batches so far cost."""
        mean = self._sum / max(self._count, 1)
        return Rounding(self.precision, mean, self._largest)

    def _refuse_overflow(self, batch: VectorBatch, narrow: NDArray[Any]) -> None:
        exponent = 0x7F80 if self.precision is Precision.BFLOAT16 else 0x7C00  # of infinity
        overflows = narrow.view("<u2") & exponent == exponent
        if overflows.any():
            row, column = np.argwhere(overflows)[0]
            wider = "float32" if self.precision is Precision.BFLOAT16 else "bfloat16"
            raise InvalidInput(
                f"{batch.entity} {batch.ids[row]!r} holds {batch.vectors[row, column]:.6g}, too "
                f"large for {self.precision}. Set BACKCAST_STORE_PRECISION={wider}."
            )


def _errors(given: NDArray[np.float32], stored: NDArray[np.float32]) -> NDArray[np.float64]:
    lost, whole = norms(stored - given), norms(given)
    return np.divide(lost, whole, out=np.zeros_like(lost), where=whole > 0)
