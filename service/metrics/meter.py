"""One worker's counts. Counting a request costs as much as noting it."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from threading import Lock
from typing import NamedTuple

import numpy as np

from backcast.errors import BackcastError
from backcast.lifecycle import Promote, Refresh, Rollback
from service.metrics import families
from service.metrics.families import Family, Key
from service.metrics.notes import Served
from service.problems import HTTP_CODES, METHODS

OTHER, NONE = "other", "none"

_OPERATIONS = (Promote.kind, Refresh.kind, Rollback.kind)
_MOST_NOTES = 1_000_000  # they are added up every second; where nobody does, memory is bounded
_MOST_SERIES = 10_000  # far beyond what the labels allow


class _Note(NamedTuple):
    """One request: what is added up later."""

    route: str
    method: str
    status: int
    seconds: float
    size: int
    served: Served | None
    problem: str | None


class Meter:
    """Counts what this worker does; a number never shrinks.

    A request is only noted where it is answered; the notes are added up when the counts are read.

    Args:
        before: what was counted by the worker that this one replaces.
    """

    def __init__(self, before: Mapping[Key, Sequence[float]] | None = None) -> None:
        self._notes: deque[_Note] = deque(maxlen=_MOST_NOTES)
        self._series = {key: list(numbers) for key, numbers in (before or {}).items()}
        self._versions: set[int] = set()
        self._shed: Counter[str] = Counter()
        self._adding = Lock()
        self.in_progress = 0
        # An alert sees the first error only where there was a 0 before.
        for code in families.STORE_CODES:
            self._of(families.STORE_ERRORS, code)
        for code in families.REGISTRY_CODES:
            self._of(families.REGISTRY_ERRORS, code)
        for limit in families.LIMITS:
            self._of(families.SHED, limit)
        for kind, outcome in product(_OPERATIONS, ("succeeded", "failed")):
            self._of(families.OPERATIONS, kind, outcome)
        self._add(families.WORKER_STARTS)

    def answered(
        self,
        route: str,
        method: str,
        status: int,
        seconds: float,
        size: int = 0,
        served: Served | None = None,
        problem: str | None = None,
    ) -> None:
        """Count one request.

        ``route`` is the template of its path, which has no id in it, ``size`` the bytes of the
        answer's body, ``problem`` the code of the problem document that answers it.
        """
        # From several threads at once: an append needs no lock, and takes less time than one.
        self._notes.append(_Note(route, method, status, seconds, size, served, problem))

    def failures_of(self, task: str) -> Callable[[Exception], None]:
        """Return what counts the failures of a task in the background."""
        self._of(families.TASK_FAILURES, task)

        def count(error: Exception) -> None:
            with self._adding:
                self._add(families.TASK_FAILURES, task)
                self._add_error(_code_of(error))

        return count

    def ended(self, kind: str, error: Exception | None = None) -> None:
        """Count an operation that was carried out here, or failed."""
        with self._adding:
            self._add(families.OPERATIONS, kind, "succeeded" if error is None else "failed")
            if error is not None:
                self._add_error(_code_of(error))

    def take_shed(self, shed: Mapping[str, int]) -> None:
        """Count what was refused since this was called last; ``shed`` has what was ever."""
        with self._adding:
            for limit, count in dict(shed).items():
                self._of(families.SHED, limit)[0] += count - self._shed[limit]
                self._shed[limit] = count

    def counts(self) -> dict[Key, list[float]]:
        """Return every series as it is now."""
        with self._adding:
            self._add_notes()
            return {key: numbers[:] for key, numbers in self._series.items()}

    def _add(self, family: Family, *values: str) -> None:
        self._of(family, *values)[0] += 1

    def _add_error(self, code: str) -> None:
        family = families.error_family(code)
        if family is not None:
            self._add(family, code)

    def _add_notes(self) -> None:
        alike = defaultdict(list)
        for _ in range(len(self._notes)):
            note = self._notes.popleft()
            served = note.served
            version = None if served is None else (served.version, served.format)
            alike[note.route, note.method, note.status, version].append(note)
            if note.problem is not None:
                self._add(families.PROBLEMS, note.problem)
                self._add_error(note.problem)
        for notes in alike.values():
            self._add_alike(notes)

    def _add_alike(self, notes: list[_Note]) -> None:
        """Add notes whose labels are the same."""
        route, method, status, _, _, served, _ = notes[0]
        version, format = NONE, NONE
        if served is not None:
            version, format = self._name(served.version), served.format.name.lower()
            self._add_parts(notes, route, version, format)
        known = method if method in METHODS else OTHER
        labels = route, known, str(status), version, format
        self._of(families.REQUESTS, *labels)[0] += len(notes)
        seconds = [note.seconds for note in notes]
        self._observe(seconds, families.REQUEST_SECONDS, route, version, format)

    def _add_parts(self, notes: list[_Note], route: str, version: str, format: str) -> None:
        parts = [note.served for note in notes if note.served is not None]
        self._of(families.VECTORS, version, format)[0] += sum(part.vectors for part in parts)
        self._of(families.BYTES, version, format)[0] += sum(note.size for note in notes)
        looked = [part for part in parts if part.gathering]
        mapped = [part.mapping for part in looked if part.mapping]
        self._observe([part.gathering for part in looked], families.STAGES, route, "gather")
        self._observe(mapped, families.STAGES, route, "product")
        self._observe([part.encoding for part in looked], families.STAGES, route, "encode")

    def _observe(self, seconds: Sequence[float], family: Family, *values: str) -> None:
        if not seconds:
            return
        series, width = self._of(family, *values), len(family.buckets) + 1
        counted = np.bincount(np.searchsorted(family.buckets, seconds), minlength=width)
        series[:-1] = [a + b for a, b in zip(series, counted.tolist(), strict=False)]
        series[-1] += sum(seconds)

    def _of(self, family: Family, *values: str) -> list[float]:
        key = family.key(*values)
        if key not in self._series and len(self._series) >= _MOST_SERIES:
            return [0.0] * family.width  # it is counted nowhere
        return self._series.setdefault(key, [0.0] * family.width)

    def _name(self, version: int) -> str:
        if version not in self._versions and len(self._versions) >= families.MOST_VERSIONS:
            return OTHER
        self._versions.add(version)
        return str(version)


def _code_of(error: Exception) -> str:
    return error.code if isinstance(error, BackcastError) else HTTP_CODES[500]
