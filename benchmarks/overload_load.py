"""More load than a server can take. Loopback only.

Requests are sent at their time, whether or not earlier ones were answered, and their latencies
count from that time: a server that lets them wait cannot hide it. Nothing is sent again.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np
import orjson

from benchmarks.serving_load import JSON, RAW

_PIECE = 1 << 20
_PAUSE_S = 1.0  # of a client that was refused: what Retry-After says
_GIVE_UP_S = 10.0


@dataclass
class Tally:
    """What became of requests.

    Attributes:
        statuses: answers by status; 0 stands for none, or for half of one.
        hasty: refusals that do not say when to come again.
        seconds: of those answered with 200.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    hasty: int = 0
    seconds: list[float] = field(default_factory=list)

    def note(self, status: int, says_when: bool, seconds: float) -> None:
        """Count one answer."""
        self.statuses[status] += 1
        if status == 200:
            self.seconds.append(seconds)
        elif status in {429, 503} and not says_when:
            self.hasty += 1

    @property
    def served(self) -> int:
        """How many were answered with 200."""
        return self.statuses[200]

    @property
    def shed(self) -> int:
        """How many were refused because of too much to do."""
        return self.statuses[429] + self.statuses[503]

    @property
    def other(self) -> dict[int, int]:
        """Everything that neither was answered nor should have happened."""
        return {s: n for s, n in self.statuses.items() if s not in {200, 429, 503}}

    def milliseconds(self, percentile: float) -> float:
        """Return a percentile of the latencies."""
        return (
            1e3 * float(np.percentile(self.seconds, percentile)) if self.seconds else float("nan")
        )


@dataclass(frozen=True)
class Step:
    """What was offered for some seconds, in requests a second, and what became of it."""

    rate: float
    seconds: float
    batches: Tally
    singles: Tally


async def offer(
    url: str,
    ids: Sequence[str],
    *,
    batch: int,
    rate: float,
    singles: float,
    seconds: float,
    secret: str | None = None,
) -> Step:
    """Send ``rate`` batches of ``batch`` ids a second, and ``singles`` vectors beside."""
    target = _Target(url, secret)
    step = Step(rate, seconds, Tally(), Tally())
    batches = [target.batch(ids[:batch], format) for format in (JSON, RAW)]
    one = [target.single(id) for id in ids]
    await asyncio.gather(
        _send_steadily(target, batches, rate, seconds, step.batches),
        _send_steadily(target, one, singles, seconds, step.singles),
    )
    return step


async def flood(url: str, ids: Sequence[str], *, connections: int, seconds: float) -> Tally:
    """Send singles over so many connections, each when the last is answered, or as told."""
    target, tally = _Target(url, None), Tally()
    until = time.perf_counter() + seconds

    async def client(at: int) -> None:
        connection = _Connection(target)
        while (now := time.perf_counter()) < until:
            status = await connection.ask(target.single(ids[at % len(ids)]), tally, now)
            at += connections
            if status != 200:
                await asyncio.sleep(_PAUSE_S)
        connection.close()

    await asyncio.gather(*(client(at) for at in range(connections)))
    return tally


async def _send_steadily(
    target: "_Target", requests: Sequence[bytes], rate: float, seconds: float, tally: Tally
) -> None:
    """Send a request every 1 / ``rate`` seconds, over as many connections as that takes."""
    idle: list[_Connection] = []
    start = time.perf_counter()

    async def ask(at: int) -> None:
        due = start + at / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        connection = idle.pop() if idle else _Connection(target)
        await connection.ask(requests[at % len(requests)], tally, due)
        idle.append(connection)

    await asyncio.gather(*(ask(at) for at in range(int(rate * seconds))))
    for connection in idle:
        connection.close()


class _Target:
    """Where requests go, and how they are written."""

    def __init__(self, url: str, secret: str | None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.host, self.port = parts.hostname, parts.port
        self._head = f"Host: {parts.netloc}\r\n"
        if secret is not None:
            self._head += f"Authorization: Bearer {secret}\r\n"

    def single(self, id: str) -> bytes:
        head = f"GET /embeddings/{id}?version=0 HTTP/1.1\r\n{self._head}Accept: {RAW}\r\n\r\n"
        return head.encode()

    def batch(self, ids: Sequence[str], format: str) -> bytes:
        body = orjson.dumps({"ids": ids, "version": 0})
        head = f"POST /embeddings/batch HTTP/1.1\r\n{self._head}Accept: {format}\r\n"
        head += f"Content-Type: {JSON}\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body


class _Connection:
    """A connection that is opened when it is needed, and again when it was closed."""

    def __init__(self, target: _Target) -> None:
        self._target = target
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes, tally: Tally, since: float) -> int:
        """Send a request and read its answer to the end; 0 where there is no whole answer."""
        status, says_when = 0, False
        try:
            async with asyncio.timeout(_GIVE_UP_S):
                if self._streams is None:
                    self._streams = await asyncio.open_connection(
                        self._target.host, self._target.port
                    )
                status, says_when, stays = await _exchange(*self._streams, request)
            if not stays:
                self.close()
        except (OSError, EOFError, TimeoutError):
            self.close()
        tally.note(status, says_when, time.perf_counter() - since)
        return status

    def close(self) -> None:
        """Close, without waiting."""
        if self._streams is not None:
            with suppress(OSError):
                self._streams[1].close()
        self._streams = None


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes
) -> tuple[int, bool, bool]:
    """Return the status, whether it says when to come again, and whether the connection stays."""
    writer.write(request)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b"transfer-encoding: chunked" in head:
        tail = b""
        while not tail.endswith(b"\r\n0\r\n\r\n"):
            piece = await reader.read(_PIECE)
            if not piece:
                raise EOFError
            tail = (tail + piece)[-7:]
    else:
        left = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while left:
            piece = await reader.read(min(left, _PIECE))
            if not piece:
                raise EOFError
            left -= len(piece)
    return int(head[9:12]), b"retry-after: " in head, b"connection: close" not in head
