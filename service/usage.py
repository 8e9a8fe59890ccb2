"""Who asks for which version: counted in memory, written to the registry every few seconds."""

import time
from collections.abc import Mapping
from datetime import date, timedelta
from threading import Lock

from backcast.registry.consumers import ANONYMOUS
from backcast.registry.usage import Usage
from backcast.versions import Key, Use

_DAY_S = 86_400
_EPOCH = date(1970, 1, 1)

_Counts = dict[tuple[str, int, int], tuple[int, int]]
"""(requests, vectors) by consumer, version and UTC day, counted from 1970."""


class UsageMeter:
    """Counts answered requests and their vectors. Counting never waits for the registry."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._counting = Lock()  # batches are answered on several threads
        self._counts: _Counts = {}

    def count(self, caller: Key | None, version: int, vectors: int) -> None:
        """Count one answered request with ``vectors`` found; None is an anonymous caller."""
        consumer = ANONYMOUS if caller is None else caller.consumer
        counted = consumer, version, int(time.time()) // _DAY_S
        with self._counting:
            before = self._counts.get(counted)
            self._counts[counted] = (
                (1, vectors) if before is None else (before[0] + 1, before[1] + vectors)
            )

    def flush(self) -> None:
        """Write what was counted; where that fails it is kept for the next time.

        Raises:
            RegistryError: the registry does not answer.
        """
        with self._counting:
            taken, self._counts = self._counts, {}
        if not taken:
            return
        try:
            self._usage.add([_use(*counted, *counts) for counted, counts in taken.items()])
        except BaseException:
            self._put_back(taken)
            raise

    def _put_back(self, taken: Mapping[tuple[str, int, int], tuple[int, int]]) -> None:
        with self._counting:
            for counted, (requests, vectors) in taken.items():
                since = self._counts.get(counted, (0, 0))
                self._counts[counted] = since[0] + requests, since[1] + vectors


def _use(consumer: str, version: int, day: int, requests: int, vectors: int) -> Use:
    return Use(consumer, version, _EPOCH + timedelta(days=day), requests, vectors)
