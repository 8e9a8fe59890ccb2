"""How many numbers are spread: mean, largest and percentiles, in memory that does not grow."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_STEP = math.log(1.01)  # between the edges of two neighbouring bins
_LOWEST, _HIGHEST = 1e-20, 1e20  # smaller counts as 0, larger as this
_BINS = math.ceil(math.log(_HIGHEST / _LOWEST) / _STEP)


@dataclass(frozen=True)
class Spread:
    """How numbers are spread. Mean and largest are exact, percentiles to half a percent."""

    mean: float
    p50: float
    p95: float
    p99: float
    max: float

    def document(self) -> Mapping[str, Any]:
        """Return it as a JSON document."""
        return asdict(self)


class Tally:
    """Takes numbers ≥ 0 in pieces and says how they are spread.

    Percentiles come from a histogram whose bins grow by one percent each: 72 KB, however many
    numbers there are. A percentile is the smallest number that at least so many are not above.
    """

    def __init__(self) -> None:
        self._bins = np.zeros(_BINS + 1, np.int64)  # the first one counts what is 0, or nearly
        self._sum, self._count, self._largest = 0.0, 0, 0.0

    @property
    def count(self) -> int:
        """How many numbers were taken."""
        return self._count

    def add(self, numbers: NDArray[np.float64]) -> None:
        """Take ``numbers`` of shape (n,), finite and ≥ 0."""
        if not len(numbers):
            return
        inside = np.clip(numbers, _LOWEST, _HIGHEST)
        at = np.ceil(np.log(inside / _LOWEST) / _STEP).astype(np.int64)
        self._bins += np.bincount(np.minimum(at, _BINS), minlength=_BINS + 1)
        self._sum += float(numbers.sum())
        self._count += len(numbers)
        self._largest = max(self._largest, float(numbers.max()))

    def percentile(self, percent: float) -> float:
        """Return the number that ``percent`` of all do not exceed; there must be one."""
        rank = max(1, math.ceil(self._count * percent / 100))
        at = int(np.searchsorted(np.cumsum(self._bins), rank))
        if at == 0:
            return 0.0
        middle = _LOWEST * math.exp((at - 0.5) * _STEP)
        return min(middle, self._largest)

    def spread(self) -> Spread | None:
        """Return how the numbers are spread; None where there were none."""
        if not self._count:
            return None
        middle, high, highest = (self.percentile(percent) for percent in (50, 95, 99))
        return Spread(self._sum / self._count, middle, high, highest, self._largest)
