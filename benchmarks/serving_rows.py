"""The rows of the serving table: what each measures, and the bar that it is held against."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx2
import numpy as np
import orjson
from numpy.typing import NDArray

from backcast.lifecycle import load_snapshot, open_backcast
from backcast.settings import Settings
from backcast.stores import EmbeddedStore
from backcast.versions import Entity, Scope
from benchmarks.serving_data import Deployment, prepare, random_batches, random_ids
from benchmarks.serving_limit import Limit
from benchmarks.serving_load import (
    ARROW,
    JSON,
    RAW,
    Load,
    Requests,
    Unmeasured,
    batches,
    drive,
    singles,
)
from benchmarks.serving_processes import (
    Server,
    backcast_server,
    environment,
    free_port,
    http_server,
    redis_server,
)
from service.engine import Engine

CHAIN = (256, 320, 384, 448, 512)
"""The dims of versions 0 to 4."""
NAMES = {JSON: "JSON", ARROW: "Arrow", RAW: "raw"}
SINGLES_AT_ONCE, BATCHES_AT_ONCE, WORKERS_AT_ONCE = 8, 1, 32
BATCH, LARGE_BATCH = 1_000, 10_000
SAMPLE = 100_000
"""Random ids that requests are made of, and gets before memory is read."""


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
    """One of the things that are compared: requests to a server."""

    name: str
    url: str
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
    """

    folder: Path
    items: int
    seconds: float
    rounds: int
    threads: int
    large: int

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
        """Random ids."""
        return random_ids(self.items, SAMPLE)

    @contextmanager
    def serving(self, settings: Settings, *, workers: int = 1, **env: str) -> Iterator[Server]:
        """Serve a deployment; what it answers has been checked."""
        environ = environment(settings, self.threads, **env)
        with backcast_server(environ, workers=workers) as server:
            check(settings, server.url, self.ids[:100])
            yield server

    def measure(self, side: Side, *, seconds: float | None = None) -> Load:
        """Send requests, and say what was measured."""
        load = drive(
            side.url,
            side.requests,
            connections=side.connections,
            seconds=self.seconds if seconds is None else seconds,
        )
        say(f"  {side.name}: {load}")
        return load

    def alternate(self, *sides: Side) -> list[list[Load]]:
        """Measure sides in turn, round after round, after a second each to warm up."""
        for side in sides:
            drive(side.url, side.requests, connections=side.connections, seconds=1)
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
        say(f"  in process, batches of {size}: {limit.rate:,.0f} vectors/s")
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


def ratio(ours: Sequence[Load], theirs: Sequence[Load], of: str = "rate") -> float:
    """Return the median over rounds of ours ÷ theirs, measured one after the other."""
    pairs = zip(ours, theirs, strict=True)
    return median(getattr(mine, of) / getattr(other, of) for mine, other in pairs)


def middle(loads: Sequence[Load], of: str = "rate") -> float:
    """Return the median over rounds."""
    return median(getattr(load, of) for load in loads)


def at_least(what: str, value: float, bar: float, details: str) -> Row:
    """Return a row whose figure should reach its bar."""
    return Row(what, f"{value:.2f} ({details})", f"≥ {bar:.2f}", value >= bar)


def at_most(what: str, value: float, bar: float, details: str) -> Row:
    """Return a row whose figure should stay under its bar."""
    return Row(what, f"{value:.2f} ({details})", f"≤ {bar:.2f}", value <= bar)


def rates(*sides: Sequence[Load], of: str = "rate") -> str:
    """Return the median rates of some sides, to be read beside their ratio."""
    unit = {"rate": "requests/s", "vector_rate": "vectors/s"}[of]
    return " / ".join(f"{middle(side, of):,.0f}" for side in sides) + f" {unit}"


def milliseconds(*sides: Sequence[Load], of: str = "p99_ms") -> str:
    """Return the median latencies of some sides."""
    return " / ".join(f"{middle(side, of):.2f}" for side in sides) + " ms"


# The rows


def single_gets(bench: Bench) -> list[Row]:
    """GETs of composed vectors against the same server that has stored them."""
    rows = []
    with bench.serving(bench.chain) as ours, bench.serving(bench.keep_all) as kept:
        for media in (JSON, RAW):
            requests = singles(bench.ids, media)
            composed, stored = bench.alternate(
                Side("composed", ours.url, requests, SINGLES_AT_ONCE),
                Side("stored", kept.url, requests, SINGLES_AT_ONCE),
            )
            name = f"single GET, {NAMES[media]}: composed ÷ stored (keep-all)"
            faster, slower = ratio(composed, stored), ratio(composed, stored, "p99_ms")
            rows += [
                at_least(f"{name}, requests/s", faster, 0.90, rates(composed, stored)),
                at_most(f"{name}, p99", slower, 1.20, milliseconds(composed, stored)),
            ]
    return rows


def keys(bench: Bench) -> list[Row]:
    """What a key costs."""
    with open_backcast(bench.chain) as backcast:
        consumer = f"benchmark {time.time_ns()}"
        _, secret = backcast.registry.keys.create(consumer, Scope.READ)
    with bench.serving(bench.chain) as server:
        with_key, without = bench.alternate(
            *(
                Side(name, server.url, singles(bench.ids, RAW, secret), SINGLES_AT_ONCE)
                for name, secret in (("with a key", secret), ("without", None))
            )
        )
    figure = f"{ratio(with_key, without):.2f} ({rates(with_key, without)})"
    return [Row("single GET, raw: with a key ÷ without", figure)]


def binary_batches(bench: Bench) -> list[Row]:
    """Binary batches against the in-process limit."""
    rows = []
    with bench.serving(bench.chain) as server:
        for media in (RAW, ARROW):
            side = Side(
                NAMES[media], server.url, batches(bench.ids, BATCH, media), BATCHES_AT_ONCE
            )
            drive(side.url, side.requests, connections=side.connections, seconds=1)
            measured = [
                (bench.measure(side), bench.limit(bench.chain, BATCH)) for _ in range(bench.rounds)
            ]
            reached = median(load.vector_rate / limit.rate for load, limit in measured)
            served = median(load.vector_rate for load, _ in measured)
            possible = median(limit.rate for _, limit in measured)
            what = f"batch of {BATCH:,}, {NAMES[media]} ÷ in-process limit"
            rows.append(at_least(what, reached, 0.60, f"{served:,.0f} / {possible:,.0f} vectors/s"))
    return rows


def json_batches(bench: Bench) -> list[Row]:
    """JSON batches against response models, and against Arrow."""
    port = free_port()
    factory = "benchmarks.serving_models:from_environment"
    command = [sys.executable, "-m", "uvicorn", factory, "--factory", "--port", str(port)]
    command += ["--log-level", "warning", "--no-access-log", "--no-server-header"]
    environ = environment(bench.chain, bench.threads)
    with (
        bench.serving(bench.chain) as server,
        http_server(command, environ, port, "/readyz") as models,
    ):
        as_json, requests = "JSON", batches(bench.ids, BATCH, JSON)
        ours, theirs, arrow = bench.alternate(
            Side(as_json, server.url, requests, BATCHES_AT_ONCE),
            Side("response models", models.url, requests, BATCHES_AT_ONCE),
            Side("Arrow", server.url, batches(bench.ids, BATCH, ARROW), BATCHES_AT_ONCE),
        )
    what = f"batch of {BATCH:,}, JSON"
    against_models = rates(ours, theirs, of="vector_rate")
    against_arrow = f"{ratio(ours, arrow):.2f} ({rates(ours, arrow, of='vector_rate')})"
    return [
        at_least(f"{what} ÷ FastAPI response models", ratio(ours, theirs), 4, against_models),
        Row(f"{what} ÷ Arrow", against_arrow),
    ]


def redis_store(bench: Bench) -> list[Row]:
    """The Redis store against the embedded one."""
    with redis_server() as url, ExitStack() as stack:
        settings = bench.chain.model_copy(update={"store_url": url})
        with open_backcast(settings) as backcast:
            live = backcast.registry.deployments.live()
            assert live is not None
            load_snapshot(backcast, live.snapshot)
        ours = stack.enter_context(bench.serving(bench.chain))
        redis = stack.enter_context(bench.serving(settings, BACKCAST_STORE_URL=url))
        rows = []
        for requests, connections, what in (
            (singles(bench.ids, RAW), SINGLES_AT_ONCE, "single GET, raw"),
            (batches(bench.ids, BATCH, RAW), BATCHES_AT_ONCE, f"batch of {BATCH:,}, raw"),
        ):
            there, here = bench.alternate(
                Side("Redis", redis.url, requests, connections),
                Side("embedded", ours.url, requests, connections),
            )
            size = requests.vectors
            share = bench.limit(settings, size, BACKCAST_STORE_URL=url).gather_share
            figure = f"{ratio(there, here):.2f} ({rates(there, here, of='vector_rate')})"
            rows += [
                Row(f"{what}: Redis ÷ embedded", figure),
                Row(f"{what}: gathering from Redis, of gather, product and bytes", f"{share:.0%}"),
            ]
    return rows


def two_workers(bench: Bench) -> list[Row]:
    """Two workers against what the cores leave beside the load generator."""
    requests = singles(bench.ids, JSON)
    with bench.serving(bench.chain) as one, bench.serving(bench.chain, workers=2) as two:
        sides = [
            (server, Side(name, server.url, requests, WORKERS_AT_ONCE))
            for server, name in ((one, "one worker"), (two, "two workers"))
        ]
        for _, side in sides:
            drive(side.url, side.requests, connections=side.connections, seconds=1)
        rounds = [
            [_with_cpu(bench, server, side) for server, side in sides] for _ in range(bench.rounds)
        ]
    (of_one, cpu), (of_two, _) = (
        (list(loads), sum(seconds))
        for loads, seconds in (zip(*side, strict=True) for side in zip(*rounds, strict=True))
    )
    answered = sum(load.requests for load in of_one)
    server_us = 1e6 * cpu / answered
    wrk_us = 1e6 * sum(load.cpu for load in of_one) / answered
    cores = len(os.sched_getaffinity(0))
    ceiling = 1e6 * min(2 / server_us, cores / (server_us + wrk_us))
    arithmetic = (
        f"{middle(of_two):,.0f} requests/s of min(2 workers ÷ {server_us:.0f} µs, {cores} cores ÷ "
        f"({server_us:.0f} + {wrk_us:.0f} µs of wrk)) = {ceiling:,.0f}; "
        f"one worker {middle(of_one):,.0f}, times {ratio(of_two, of_one):.2f}"
    )
    what = "single GET, JSON: two workers ÷ ceiling"
    return [at_least(what, middle(of_two) / ceiling, 0.85, arithmetic)]


def _with_cpu(bench: Bench, server: Server, side: Side) -> tuple[Load, float]:
    before = server.cpu()
    load = bench.measure(side)
    return load, server.cpu() - before


def mixed(bench: Bench) -> list[Row]:
    """Singles while large batches are answered."""
    rows = []
    with bench.serving(bench.chain) as server:
        single = Side("singles", server.url, singles(bench.ids, JSON), SINGLES_AT_ONCE)
        drive(single.url, single.requests, connections=single.connections, seconds=1)
        for media in (RAW, JSON):
            large = Side("batches", server.url, batches(bench.ids, LARGE_BATCH, media), 1)
            pairs = [(bench.measure(single), _beside(bench, single, large)) for _ in range(bench.rounds)]
            idle, busy = (list(loads) for loads in zip(*pairs, strict=True))
            what = f"single GET, JSON, beside one client's batches of {LARGE_BATCH:,} as {NAMES[media]}"
            figure = f"{ratio(busy, idle, 'p99_ms'):.1f} times ({milliseconds(busy, idle)})"
            rows.append(Row(f"{what}: p99 ÷ idle", figure))
    return rows


def _beside(bench: Bench, single: Side, large: Side) -> Load:
    """Measure singles while batches run, from a second before until a second after."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(bench.measure, large, seconds=bench.seconds + 2)
        time.sleep(1)
        load = bench.measure(single)
        running.result()
    return load


def storage(bench: Bench) -> list[Row]:
    """Keeping the vectors of all versions against the latest and the maps."""
    with open_backcast(bench.chain) as backcast:
        live = backcast.registry.deployments.live()
        assert live is not None
        vectors = backcast.store.open(live.snapshot).size
    registered = Path(bench.chain.artifacts_root) / "versions"
    maps = sum(path.stat().st_size for path in registered.rglob("transform.safetensors"))
    kept = sum(_stored_size(bench, dim) for dim in CHAIN)
    mib = [f"{size / 2**20:,.0f}" for size in (kept, vectors, maps)]
    figure = f"{kept / (vectors + maps):.2f} ({mib[0]} MiB / {mib[1]} MiB and {mib[2]} of maps)"
    return [Row("stored for versions 0 to 4: keep-all ÷ ours, bytes on disk", figure)]


def _stored_size(bench: Bench, dim: int) -> int:
    with TemporaryDirectory(dir=bench.folder) as folder:
        store = EmbeddedStore(Path(folder))
        store.load("all", dim, {Entity.ITEM: bench.items}, random_batches(bench.items, dim))
        return store.open("all").size


def long_chains(bench: Bench) -> list[Row]:
    """What a longer chain costs a request."""
    lengths = (1, 10, 50)
    items = min(bench.items, 20_000)
    ids = random_ids(items, SAMPLE)
    rows = []
    with ExitStack() as stack:
        urls = {}
        for length in lengths:
            say(f"  chain of {length}")
            deployment = Deployment(f"chain-of-{length}", (128,) * 51, length, items)
            settings = prepare(bench.folder, deployment)
            server = backcast_server(environment(settings, bench.threads))
            urls[length] = stack.enter_context(server).url
            check(settings, urls[length], ids[:100])
        for requests, connections, what in (
            (singles(ids, RAW), SINGLES_AT_ONCE, "single GET, raw"),
            (batches(ids, BATCH, RAW), BATCHES_AT_ONCE, f"batch of {BATCH:,}, raw"),
        ):
            sides = [Side(f"{n} maps", url, requests, connections) for n, url in urls.items()]
            measured = bench.alternate(*sides)
            figure = f"{ratio(measured[-1], measured[0], 'p50_ms'):.2f} "
            figure += f"(p50 {milliseconds(*measured, of='p50_ms')}; p99 {milliseconds(*measured)})"
            what = f"{what}, ver-0, dim 128: 50 maps composed ÷ 1 (1 / 10 / 50), p50"
            rows.append(Row(what, figure, "flat"))
    return rows


def large_memory(bench: Bench) -> list[Row]:
    """Start-up and memory with many vectors."""
    deployment = Deployment("large", (128, 128), 1, bench.large, published=False)
    settings = prepare(bench.folder, deployment)
    ids = random_ids(bench.large, SAMPLE)
    with backcast_server(environment(settings, bench.threads)) as server:
        check(settings, server.url, ids[:100])
        before = server.memory()
        side = Side("singles", server.url, singles(ids, RAW), SINGLES_AT_ONCE)
        gets = 0
        while gets < SAMPLE:
            gets += bench.measure(side).requests
        after = server.memory()
    what = f"{bench.large:,} × 128"
    mib = " / ".join(f"{size:,.0f}" for size in (*before, *after))
    return [
        Row(f"{what}: seconds from the start of the process to ready", f"{server.started:.1f}"),
        Row(f"{what}: RSS / PSS of the worker at first, and after {gets:,} gets, MiB", mib),
    ]


ROWS: dict[str, Callable[[Bench], list[Row]]] = {
    "singles": single_gets,
    "key": keys,
    "batches": binary_batches,
    "json": json_batches,
    "redis": redis_store,
    "workers": two_workers,
    "mixed": mixed,
    "storage": storage,
    "chains": long_chains,
    "large": large_memory,
}
"""By the names that ``--only`` takes."""


def measure_row(name: str, bench: Bench) -> list[Row]:
    """Measure a row; one that cannot be measured says why."""
    say(name)
    try:
        return ROWS[name](bench)
    except Unmeasured as error:
        return [Row(name, f"not measured: {error}", met=False)]
