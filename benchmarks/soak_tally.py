"""What the soak counts, and when which part was away."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

from benchmarks.soak_checker import Fault, Finding

_SHOWN = 10


class Tally:
    """Counts of everything; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self.requests = 0
        self.vectors = 0
        self.answers: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.switches: Counter[str] = Counter()
        self.changes: Counter[str] = Counter()
        self.allowed: Counter[str] = Counter()
        self.faults: Counter[Fault] = Counter()
        self.examples: list[str] = []
        self.converged: list[float] = []

    def verified(self, kind: str, vectors: int) -> None:
        """Count a request with a verdict."""
        with self._lock:
            self.requests += 1
            self.vectors += vectors
            self.answers[kind] += 1

    def count(self, counter: Counter[str], kind: str) -> None:
        """Count one of a kind."""
        with self._lock:
            counter[kind] += 1

    def accuse(self, findings: Sequence[Finding]) -> None:
        """Count faults; the first few are kept in words."""
        with self._lock:
            for finding in findings:
                self.faults[finding.fault] += 1
                if len(self.examples) < _SHOWN:
                    self.examples.append(f"{finding.fault}: {finding.text}")

    def followed(self, seconds: float) -> None:
        """Note how long a replica took to serve what went live."""
        with self._lock:
            self.converged.append(seconds)

    @property
    def clean(self) -> bool:
        """Whether nothing was torn, wrong, lost or late."""
        return not self.faults.total()


class Absences:
    """When which part was away; an error is allowed where one falls into the request's time."""

    def __init__(self, settle_s: float) -> None:
        self._settle_s = settle_s
        self._lock = Lock()
        self._spans: dict[str, list[list[float]]] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """The part is away for the block, and a short while after it."""
        span = [time.monotonic(), float("inf")]
        with self._lock:
            self._spans.setdefault(part, []).append(span)
        try:
            yield
        finally:
            span[1] = time.monotonic() + self._settle_s

    def overlap(self, parts: Sequence[str], start: float, end: float) -> bool:
        """Return whether one of the parts was away at some time from ``start`` to ``end``."""
        with self._lock:
            spans = [span for part in parts for span in self._spans.get(part, ())]
        return any(away < end and start < back for away, back in spans)
