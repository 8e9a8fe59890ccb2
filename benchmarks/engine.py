"""What serving costs inside one process: the engine, and one request without a socket.

    PYTHONPATH=. python benchmarks/engine.py

A version of 512 floats is live; the answers are stored vectors of 512, and composed ones of 256.
Times are the thread's own CPU time, the lowest of many runs: other processes disturb it least.
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from backcast.cli.output import print_table
from backcast.versions import Entity, Key
from benchmarks.measuring import machine
from service.app import create_app
from service.engine import Engine, Snapshot
from service.state import State
from service.usage import UsageMeter
from service.wire import Format
from tests.support import Home, build_home

STORED, COMPOSED = 1, 0
ID = "item 5"
COUNTS = (1, 1_000, 10_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=100_000)
    items = parser.parse_args().items
    torch.set_num_threads(1)
    print(machine())
    with serving(items) as (home, snapshot):
        ids = np.random.default_rng(0).integers(0, items - 1, 10_000)
        rows = [engine_row(snapshot, [f"item {n}" for n in ids[:count]]) for count in COUNTS]
        print_table(["ids", "stored", "lookup and gather", "composed", "product"], rows)
        print_table(["one request, CPU µs", "JSON", "raw", "304"], asyncio.run(request_rows(home)))
        head = ["one request, stored, raw, CPU µs", "median", "to uncounted"]
        print_table(head, asyncio.run(counting_rows(home)))


@contextmanager
def serving(items: int) -> Iterator[tuple[Home, Snapshot]]:
    """Yield a home with 512 floats live on top of 256, open to everybody, and its snapshot."""
    with (
        TemporaryDirectory() as folder,
        build_home(Path(folder), (256, 512), items=items, live=1, reads="open") as home,
    ):
        backcast = home.backcast
        engine = Engine(backcast.registry, backcast.artifacts, backcast.store, "cpu")
        engine.refresh()
        yield home, engine.current()


def engine_row(snapshot: Snapshot, ids: list[str]) -> list[str]:
    """Return the milliseconds of a lookup of ``ids``, in all and in its parts."""
    stored = snapshot.store.gather(Entity.ITEM, ids).vectors
    answer = np.empty((len(ids), 256), np.float32)
    calls: list[Callable[[], object]] = [
        lambda: snapshot.vectors(Entity.ITEM, ids, STORED),
        lambda: snapshot.store.gather(Entity.ITEM, ids),
        lambda: snapshot.vectors(Entity.ITEM, ids, COMPOSED),
        lambda: snapshot.maps[COMPOSED](stored, out=answer),
    ]
    return [f"{len(ids):,}", *(f"{1e3 * cpu_seconds(call):.3f} ms" for call in calls)]


def cpu_seconds(call: Callable[[], object]) -> float:
    """Return the lowest CPU time of a call, from runs of a second in all."""
    lowest, until = float("inf"), time.perf_counter() + 1.0
    while time.perf_counter() < until:
        started, calls = time.thread_time(), 0
        while calls == 0 or time.thread_time() - started < 0.005:
            call()
            calls += 1
        lowest = min(lowest, (time.thread_time() - started) / calls)
    return lowest


async def request_rows(home: Home) -> list[list[str]]:
    """Return the CPU time of one GET: a bare route of the framework, stored, composed."""

    async def bare(_: Request) -> Response:
        return Response(bytes(2048), media_type=Format.RAW)

    app = create_app(home.settings)
    async with app.router.lifespan_context(app) as state:
        smallest = Starlette(routes=[Route("/embeddings/{id:path}", bare)])
        rows = [["bare Starlette", "", await request_micros(smallest, {}, Format.RAW), ""]]
        for name, version in (("stored, 512", STORED), ("composed, 512 → 256", COMPOSED)):
            micros = [
                await request_micros(app, state, format, version)
                for format in (Format.JSON, Format.RAW)
            ]
            answer = await answered(app, scope_of(state, Format.RAW, version))
            tag = dict(answer["headers"])[b"etag"]
            known = await request_micros(app, state, Format.RAW, version, (b"if-none-match", tag))
            rows.append([name, *micros, known])
        return rows


async def request_micros(
    app: ASGIApp, state: Any, format: Format, version: int = 0, *headers: tuple[bytes, bytes]
) -> str:
    lowest, until = float("inf"), time.perf_counter() + 1.5
    while time.perf_counter() < until:
        scopes = [scope_of(state, format, version, *headers) for _ in range(200)]
        started = time.thread_time()
        for scope in scopes:
            await answered(app, scope)
        lowest = min(lowest, (time.thread_time() - started) / len(scopes))
    return f"{1e6 * lowest:.0f}"


class Uncounted(UsageMeter):
    """Counts nothing."""

    def count(self, caller: Key | None, version: int, vectors: int) -> None: ...


async def counting_rows(home: Home) -> list[list[str]]:
    """Return what a GET costs with its usage counted and without, asked in turn.

    The notes are added up elsewhere, by a thread that writes them; this is a line of its own.
    """
    app = create_app(home.settings)
    async with app.router.lifespan_context(app) as states:
        assert states is not None
        counted: State = states["service"]
        uncounted = replace(counted, usage=Uncounted(home.backcast.registry.usage))
        asked = {"uncounted": uncounted, "counted": counted}
        seconds: dict[str, list[float]] = {name: [] for name in asked}
        until = time.perf_counter() + 8.0
        while time.perf_counter() < until:
            for name, state in asked.items():
                scopes = [scope_of({"service": state}, Format.RAW, STORED) for _ in range(200)]
                started = time.thread_time()
                for scope in scopes:
                    await answered(app, scope)
                seconds[name].append((time.thread_time() - started) / len(scopes))
    without = float(np.median(seconds["uncounted"]))
    rows = [(name, float(np.median(found))) for name, found in seconds.items()]
    rows.append(("adding up one note, elsewhere", adding_seconds(home)))
    return [[name, f"{1e6 * one:.2f}", f"{one / without:.3f}"] for name, one in rows]


def adding_seconds(home: Home) -> float:
    """Return the CPU time that one note takes to be added up and written, of 100,000."""
    meter = UsageMeter(home.backcast.registry.usage)
    for _ in range(100_000):
        meter.count(None, STORED, 1)
    started = time.thread_time()
    meter.flush()
    return (time.thread_time() - started) / 100_000


def scope_of(
    state: Any, format: Format, version: int, *headers: tuple[bytes, bytes]
) -> dict[str, Any]:
    """Return a request as uvicorn hands it on."""
    sent = [
        (b"host", b"127.0.0.1:8000"),
        (b"accept", format.encode()),
        (b"accept-encoding", b"gzip, deflate"),
        (b"connection", b"keep-alive"),
        (b"user-agent", b"benchmark"),
        *headers,
    ]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": f"/embeddings/{ID}",
        "raw_path": f"/embeddings/{ID}".replace(" ", "%20").encode(),
        "query_string": f"version={version}".encode(),
        "root_path": "",
        "headers": sent,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 8000),
        "state": dict(state),
    }


async def answered(app: ASGIApp, scope: dict[str, Any]) -> MutableMapping[str, Any]:
    """Return the message that begins the answer, after all of it has come."""
    messages: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: MutableMapping[str, Any]) -> None:
        messages.append(message)

    waiting: Awaitable[None] = app(scope, receive, send)
    await waiting
    assert messages[0]["status"] in (200, 304), messages
    return messages[0]


if __name__ == "__main__":
    main()
