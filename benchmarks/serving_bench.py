"""What the rows of the serving table are made with: deployments, servers, measurements, ratios."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx2
import numpy as np
import orjson
from numpy.typing import NDArray

from backcast.lifecycle import open_backcast
from backcast.settings import Settings
from backcast.versions import Entity
from benchmarks.serving_data import Deployment, prepare, random_ids
from benchmarks.serving_limit import Limit
from benchmarks.serving_load import RAW, Load, Requests, drive
from benchmarks.serving_processes import Server, backcast_server, environment
from service.engine import Engine

CHAIN = (256, 320, 384, 448, 512)
"""The dims of versions 0 to 4."""
BATCH = 1_000
SAMPLE = 100_000
"""Random ids that requests are made of."""


@dataclass(frozen=True)
class Row:
    """One line of the table; ``met`` is None where there is no bar."""

    what: str
    figure: str
    bar: str | None = None
    met: bool | None = None

    def cells(self) -> list[object]:
        """Return the line as it is printed."""
        return [self.what, self.figure, self.bar, {True: "yes", False: "NO", None: None}[self.met]]


@dataclass(frozen=True)
class Side:
    """One of the things that are compared: requests to a server, over a number of connections."""

    name: str
    server: Server
    requests: Requests
    connections: int


@dataclass(frozen=True)
class Bench:
    """What to measure with.

    Attributes:
        folder: where deployments are kept.
        seconds: of each measurement.
        rounds: how often each side of a comparison is measured, in turn.
        threads: of a matrix product.
        large: items of the row that needs much disk.
        feast: the virtual environment that has Feast.
    """

    folder: Path
    items: int
    seconds: float
    rounds: int
    threads: int
    large: int
    feast: Path

    @cached_property
    def chain(self) -> Settings:
        """Versions 0 to 4, version 4 live."""
        return prepare(self.folder, Deployment("chain", CHAIN, 4, self.items))

    @cached_property
    def keep_all(self) -> Settings:
        """One version, which has the dim of the chain's version 0."""
        return prepare(self.folder, Deployment("keep-all", CHAIN[:1], 0, self.items))

    @cached_property
    def ids(self) -> list[str]:
        """Random ids of the items."""
        return random_ids(self.items, SAMPLE)

    @contextmanager
    def serving(
        self,
        settings: Settings,
        *,
        ids: Sequence[str] | None = None,
        workers: int = 1,
        **env: str,
    ) -> Iterator[Server]:
        """Serve a deployment with these ids, once its answers have been checked."""
        environ = environment(settings, self.threads, **env)
        with backcast_server(environ, workers=workers) as server:
            check(settings, server.url, (ids or self.ids)[:100])
            yield server

    def warm_up(self, *sides: Side) -> None:
        """Send requests for a second to each side."""
        for side in sides:
            drive(side.server.url, side.requests, connections=side.connections, seconds=1)

    def measure(self, side: Side, *, more_seconds: float = 0) -> Load:
        """Send requests, and return what was measured."""
        before = side.server.cpu()
        load = drive(
            side.server.url,
            side.requests,
            connections=side.connections,
            seconds=self.seconds + more_seconds,
        )
        load = replace(load, server_cpu=side.server.cpu() - before)
        say(f"  {side.name}: {load}")
        return load

    def alternate(self, *sides: Side) -> list[list[Load]]:
        """Measure sides in turn, round after round; return the loads of each side."""
        self.warm_up(*sides)
        rounds = [[self.measure(side) for side in sides] for _ in range(self.rounds)]
        return [list(loads) for loads in zip(*rounds, strict=True)]

    def limit(self, settings: Settings, size: int, **env: str) -> Limit:
        """Measure the in-process limit of batches in a process of its own."""
        script = Path(__file__).with_name("serving_limit.py")
        with TemporaryDirectory() as folder:
            ids = Path(folder) / "ids"
            ids.write_text("\n".join(self.ids))
            command = [sys.executable, str(script), "--ids", str(ids), "--size", str(size)]
            output = subprocess.run(
                [*command, "--seconds", str(self.seconds)],
                env=environment(settings, self.threads, **env),
                stdout=subprocess.PIPE,
                check=True,
            ).stdout
        limit = Limit(**orjson.loads(output))
        say(f"  in process, batches of {size}: {limit}")
        return limit


def say(text: str) -> None:
    """Tell how it goes, beside the table."""
    print(text, file=sys.stderr, flush=True)


def check(settings: Settings, url: str, ids: Sequence[str]) -> None:
    """Demand that a server answers with the ver-0 vectors of its deployment."""
    answer = httpx2.post(
        f"{url}/embeddings/batch", json={"ids": ids, "version": 0}, headers={"Accept": RAW}
    )
    answer.raise_for_status()
    served = np.frombuffer(answer.content, "<f4").reshape(len(ids), -1)
    np.testing.assert_allclose(served, vectors_of(settings, ids), rtol=1e-4, atol=1e-5)


def vectors_of(settings: Settings, ids: Sequence[str]) -> NDArray[np.float32]:
    """Return ver-0 vectors of ``ids`` without a server: (n, D_0)."""
    with open_backcast(settings) as backcast:
        engine = Engine(backcast.registry, backcast.artifacts, backcast.store, "cpu")
        engine.refresh()
        return engine.current().vectors(Entity.ITEM, ids, 0).vectors


# Loads in the table: one number for each side, the median over rounds


def ratio(ours: Sequence[Load], theirs: Sequence[Load], of: str = "rate") -> float:
    """Return the median over rounds of ours ÷ theirs, measured one after the other."""
    pairs = zip(ours, theirs, strict=True)
    return float(median(getattr(mine, of) / getattr(other, of) for mine, other in pairs))


def middle(loads: Sequence[Load], of: str = "rate") -> float:
    """Return the median over rounds."""
    return float(median(getattr(load, of) for load in loads))


def rates(*sides: Sequence[Load]) -> str:
    """Return requests/s of some sides, or vectors/s of batches, and what they cost the server."""
    batch = sides[0][0].vectors > 1
    of, unit = ("vector_rate", "vectors/s") if batch else ("rate", "requests/s")
    shown = " / ".join(f"{middle(side, of):,.0f}" for side in sides)
    cpu = " / ".join(f"{middle(side, 'server_us'):,.0f}" for side in sides)
    return f"{shown} {unit}; {cpu} µs of CPU a request"


def milliseconds(*sides: Sequence[Load], of: str = "p99_ms") -> str:
    """Return the latencies of some sides."""
    return " / ".join(f"{middle(side, of):.2f}" for side in sides) + " ms"


def at_least(what: str, value: float, bar: float, details: str) -> Row:
    """Return a row whose figure should reach its bar."""
    return Row(what, f"{value:.2f} ({details})", f"≥ {bar:g}", value >= bar)


def at_most(what: str, value: float, bar: float, details: str) -> Row:
    """Return a row whose figure should stay under its bar."""
    return Row(what, f"{value:.2f} ({details})", f"≤ {bar:g}", value <= bar)
