"""Scrapes: written for all who wait for one together, and with pauses, as anybody may ask."""

import math
import time
from collections.abc import Callable

from anyio import CapacityLimiter, Lock, sleep, to_thread

from service.metrics.exposition import Rendering, preferred

_REST = 3  # times as long as the writing took: however many ask, it takes a quarter of a core
_LONGEST_REST_S = 0.25
_LONGEST_ACCEPT = 2000  # bytes of a header; that of Prometheus has a few hundred


class Scrapes:
    """Answers scrapes; on the event loop only, which it leaves for the writing.

    Nobody is given what was begun before they asked: what one worker shows is never behind what
    another has shown.

    Args:
        write: returns the metrics, written in the way that it is given.
    """

    def __init__(self, write: Callable[[Rendering], bytes]) -> None:
        self._write = write
        self._turn, self._thread = Lock(), CapacityLimiter(1)
        self._written: dict[Rendering, tuple[float, bytes]] = {}  # begun when
        self._rests_until = 0.0

    async def text(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics of the replica as an Accept header asks, and their media type."""
        asked_at, rendering = time.monotonic(), preferred(accept[:_LONGEST_ACCEPT])
        async with self._turn:
            begun, content = self._written.get(rendering, (-math.inf, b""))
            if begun < asked_at:
                await sleep(max(0.0, self._rests_until - time.monotonic()))
                content = await self._write_anew(rendering)
        return content, rendering

    async def _write_anew(self, rendering: Rendering) -> bytes:
        begun = time.monotonic()
        content = await to_thread.run_sync(self._write, rendering, limiter=self._thread)
        ended = time.monotonic()
        self._rests_until = ended + min(_REST * (ended - begun), _LONGEST_REST_S)
        self._written[rendering] = begun, content
        return content
