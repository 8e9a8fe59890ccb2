"""Who asks for which version: counted in memory, written to the registry every few seconds."""

from collections import Counter, deque
from datetime import date
from threading import Lock

from backcast.registry.consumers import ANONYMOUS
from backcast.registry.database import utc_now
from backcast.registry.usage import Usage
from backcast.versions import Key, Use


class UsageMeter:
    """Counts answered requests and their vectors. Counting never waits for the registry.

    A request is only noted where it is answered; the notes are added up when they are written, and
    belong to the UTC day of that moment.
    """

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._notes: deque[tuple[str, int, int]] = deque()  # consumer, version, vectors
        self._unwritten: list[Use] = []
        self._writing = Lock()

    def count(self, caller: Key | None, version: int, vectors: int) -> None:
        """Count one answered request with ``vectors`` found; None is an anonymous caller."""
        # From several threads at once: an append needs no lock, and takes less time than one.
        self._notes.append((ANONYMOUS if caller is None else caller.consumer, version, vectors))

    def flush(self) -> None:
        """Write what was counted; where that fails it is kept for the next time.

        Raises:
            RegistryError: the registry does not answer.
        """
        with self._writing:
            self._unwritten = _summed([*self._unwritten, *self._taken()])
            if self._unwritten:
                self._usage.add(self._unwritten)
                self._unwritten = []

    def _taken(self) -> list[Use]:
        today = utc_now().date()
        requests: Counter[tuple[str, int]] = Counter()
        vectors: Counter[tuple[str, int]] = Counter()
        for _ in range(len(self._notes)):
            consumer, version, found = self._notes.popleft()
            requests[consumer, version] += 1
            vectors[consumer, version] += found
        return [Use(*asked, today, requests[asked], vectors[asked]) for asked in requests]


def _summed(uses: list[Use]) -> list[Use]:
    """Return one use for each consumer, version and day: one row is not changed twice at once."""
    sums: dict[tuple[str, int, date], Use] = {}
    for use in uses:
        asked = use.consumer, use.version, use.day
        before = sums.get(asked, Use(*asked, 0, 0))
        sums[asked] = Use(*asked, before.requests + use.requests, before.vectors + use.vectors)
    return list(sums.values())
