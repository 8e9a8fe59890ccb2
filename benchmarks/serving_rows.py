"""The rows of the serving table: what each measures, and the bar that it is held against."""

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from backcast.lifecycle import load_snapshot, open_backcast
from backcast.stores import EmbeddedStore
from backcast.versions import Entity, Scope
from benchmarks.serving_bench import (
    BATCH,
    CHAIN,
    SAMPLE,
    Bench,
    Row,
    Side,
    at_least,
    at_most,
    middle,
    milliseconds,
    rates,
    ratio,
    say,
)
from benchmarks.serving_data import Deployment, prepare, random_batches, random_ids
from benchmarks.serving_load import ARROW, JSON, RAW, Load, Requests, batches, singles
from benchmarks.serving_models import MODELS, MODELS_JSON
from benchmarks.serving_processes import environment, free_port, http_server, redis_server

NAMES = {JSON: "JSON", ARROW: "Arrow", RAW: "raw"}
SINGLES_AT_ONCE, BATCHES_AT_ONCE, WORKERS_AT_ONCE = 8, 1, 32
LARGE_BATCH = 10_000
LENGTHS = (1, 10, 50)
LENGTHS_ITEMS = 20_000


def single_gets(bench: Bench) -> list[Row]:
    """GETs of composed vectors against the same server that has them stored."""
    rows = []
    with bench.serving(bench.chain) as ours, bench.serving(bench.keep_all) as kept:
        for media in (JSON, RAW):
            requests = singles(bench.ids, media)
            composed, stored = bench.alternate(
                Side("composed", ours, requests, SINGLES_AT_ONCE),
                Side("stored", kept, requests, SINGLES_AT_ONCE),
            )
            what = f"single GET, {NAMES[media]}: composed ÷ stored (keep-all)"
            fast, late = ratio(composed, stored), ratio(composed, stored, "p99_ms")
            rows += [
                at_least(f"{what}, requests/s", fast, 0.90, rates(composed, stored)),
                at_most(f"{what}, p99", late, 1.20, milliseconds(composed, stored)),
            ]
    return rows


def keys(bench: Bench) -> list[Row]:
    """What a key costs."""
    with open_backcast(bench.chain) as backcast:
        consumer = f"benchmark {time.time_ns()}"
        _, secret = backcast.registry.keys.create(consumer, Scope.READ)
    with bench.serving(bench.chain) as server:
        with_key, without = bench.alternate(
            Side("with a key", server, singles(bench.ids, RAW, secret), SINGLES_AT_ONCE),
            Side("without", server, singles(bench.ids, RAW), SINGLES_AT_ONCE),
        )
    figure = f"{ratio(with_key, without):.2f} ({rates(with_key, without)})"
    return [Row("single GET, raw: with a key ÷ without", figure)]


def binary_batches(bench: Bench) -> list[Row]:
    """Binary batches against the in-process limit."""
    rows = []
    with bench.serving(bench.chain) as server:
        for media in (RAW, ARROW):
            requests = batches(bench.ids, BATCH, media)
            side = Side(NAMES[media], server, requests, BATCHES_AT_ONCE)
            bench.warm_up(side)
            rounds = [
                (bench.measure(side), bench.limit(bench.chain, BATCH)) for _ in range(bench.rounds)
            ]
            reached = median(load.vector_rate / limit.rate for load, limit in rounds)
            possible = median(limit.rate for _, limit in rounds)
            what = f"batch of {BATCH:,}, {NAMES[media]} ÷ in-process limit"
            details = f"{rates([load for load, _ in rounds])}; limit {possible:,.0f} vectors/s"
            rows.append(at_least(what, reached, 0.60, details))
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
        http_server(command, environ, port, "/readyz") as other,
    ):
        requests = batches(bench.ids, BATCH, JSON)
        ours, models, models_json, arrow = bench.alternate(
            Side("JSON", server, requests, BATCHES_AT_ONCE),
            Side("response models", other, requests.to(MODELS), BATCHES_AT_ONCE),
            Side("as JSONResponse", other, requests.to(MODELS_JSON), BATCHES_AT_ONCE),
            Side("Arrow", server, batches(bench.ids, BATCH, ARROW), BATCHES_AT_ONCE),
        )
    what = f"batch of {BATCH:,}, JSON ÷ "
    against = f"{what}FastAPI response models, written by "
    return [
        at_least(f"{against}json", ratio(ours, models_json), 4, rates(ours, models_json)),
        at_least(f"{against}pydantic", ratio(ours, models), 4, rates(ours, models)),
        Row(f"{what}Arrow", f"{ratio(ours, arrow):.2f} ({rates(ours, arrow)})"),
    ]


def redis_store(bench: Bench) -> list[Row]:
    """The Redis store against the embedded one."""
    with redis_server() as url, ExitStack() as stack:
        in_redis = bench.chain.model_copy(update={"store_url": url})
        with open_backcast(in_redis) as backcast:
            live = backcast.registry.deployments.live()
            assert live is not None
            say("  loading Redis")
            load_snapshot(backcast, live.snapshot)
        here = stack.enter_context(bench.serving(bench.chain))
        there = stack.enter_context(bench.serving(in_redis, BACKCAST_STORE_URL=url))
        rows = []
        for what, requests, connections in _kinds(bench.ids):
            redis, embedded = bench.alternate(
                Side("Redis", there, requests, connections),
                Side("embedded", here, requests, connections),
            )
            limit = bench.limit(in_redis, requests.vectors, BACKCAST_STORE_URL=url)
            figure = f"{ratio(redis, embedded):.2f} ({rates(redis, embedded)})"
            rows += [
                Row(f"{what}: Redis ÷ embedded", figure),
                Row(f"{what}: the store's share in process, Redis", f"{limit.gather_share:.0%}"),
            ]
    return rows


def _kinds(ids: list[str]) -> list[tuple[str, Requests, int]]:
    return [
        ("single GET, raw", singles(ids, RAW), SINGLES_AT_ONCE),
        (f"batch of {BATCH:,}, raw", batches(ids, BATCH, RAW), BATCHES_AT_ONCE),
    ]


def two_workers(bench: Bench) -> list[Row]:
    """Two workers against what the cores leave beside the load generator.

    A request costs the server s and wrk w seconds of CPU, measured with one worker; two workers
    can answer 2 ÷ s requests a second, and C cores C ÷ (s + w).
    """
    requests = singles(bench.ids, JSON)
    with bench.serving(bench.chain) as one, bench.serving(bench.chain, workers=2) as two:
        of_one, of_two = bench.alternate(
            Side("one worker", one, requests, WORKERS_AT_ONCE),
            Side("two workers", two, requests, WORKERS_AT_ONCE),
        )
    server, wrk = middle(of_one, "server_us"), middle(of_one, "wrk_us")
    cores = len(os.sched_getaffinity(0))
    ceiling = 1e6 * min(2 / server, cores / (server + wrk))
    arithmetic = (
        f"{middle(of_two):,.0f} requests/s of min(2 workers ÷ {server:.0f} µs, {cores} cores ÷ "
        f"({server:.0f} + {wrk:.0f} µs of wrk)) = {ceiling:,.0f}; "
        f"one worker {middle(of_one):,.0f}, times {ratio(of_two, of_one):.2f}"
    )
    what = "single GET, JSON: two workers ÷ ceiling"
    return [at_least(what, middle(of_two) / ceiling, 0.85, arithmetic)]


def mixed(bench: Bench) -> list[Row]:
    """Singles while large batches are answered."""
    rows = []
    with bench.serving(bench.chain) as server:
        single = Side("singles", server, singles(bench.ids, JSON), SINGLES_AT_ONCE)
        bench.warm_up(single)
        for media in (RAW, JSON):
            name = f"batches of {LARGE_BATCH:,} as {NAMES[media]}"
            large = Side(name, server, batches(bench.ids, LARGE_BATCH, media), 1)
            rounds = [
                (_beside(bench, single, large), bench.measure(single)) for _ in range(bench.rounds)
            ]
            busy, idle = (list(loads) for loads in zip(*rounds, strict=True))
            figure = f"{ratio(busy, idle, 'p99_ms'):.1f} times ({milliseconds(busy, idle)})"
            rows.append(Row(f"single GET, JSON: p99 beside one client's {name} ÷ idle", figure))
    return rows


def _beside(bench: Bench, single: Side, large: Side) -> Load:
    """Measure singles while batches run, from a second before until a second after."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(bench.measure, large, more_seconds=2)
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
    all_of_them, latest, small = (f"{size / 2**20:,.1f} MiB" for size in (kept, vectors, maps))
    figure = f"{kept / (vectors + maps):.2f} ({all_of_them} / {latest} and {small} of maps)"
    return [Row("bytes stored for versions 0 to 4: keep-all ÷ ours", figure)]


def _stored_size(bench: Bench, dim: int) -> int:
    with TemporaryDirectory(dir=bench.folder) as folder:
        store = EmbeddedStore(Path(folder))
        store.load("all", dim, {Entity.ITEM: bench.items}, random_batches(bench.items, dim))
        return store.open("all").size


def long_chains(bench: Bench) -> list[Row]:
    """What a longer chain costs a request."""
    items = min(bench.items, LENGTHS_ITEMS)
    ids = random_ids(items, SAMPLE)
    rows = []
    with ExitStack() as stack:
        servers = {}
        for length in LENGTHS:
            name, dims = f"chain-of-{length}", (128,) * (LENGTHS[-1] + 1)
            settings = prepare(bench.folder, Deployment(name, dims, length, items))
            servers[length] = stack.enter_context(bench.serving(settings, ids=ids))
        for what, requests, connections in _kinds(ids):
            loads = bench.alternate(
                *(Side(f"{n} maps", servers[n], requests, connections) for n in LENGTHS)
            )
            grown = ratio(loads[-1], loads[0], "p50_ms")
            cpu = " / ".join(f"{middle(load, 'server_us'):,.0f}" for load in loads)
            figure = f"{grown:.2f} (p50 {milliseconds(*loads, of='p50_ms')}, "
            figure += f"p99 {milliseconds(*loads)}; {cpu} µs of CPU a request)"
            rows.append(
                Row(f"{what}, dim 128: p50 through 50 maps ÷ 1 (10 between)", figure, "flat")
            )
    return rows


def large_memory(bench: Bench) -> list[Row]:
    """Start-up and memory with many vectors."""
    deployment = Deployment("large", (128, 128), 1, bench.large, published=False)
    settings = prepare(bench.folder, deployment)
    ids = random_ids(bench.large, SAMPLE)
    with bench.serving(settings, ids=ids) as server:
        before = server.memory()
        side = Side("singles", server, singles(ids, RAW), SINGLES_AT_ONCE)
        gets = 0
        while gets < SAMPLE:
            gets += bench.measure(side).requests
        after = server.memory()
    items = f"{bench.large:,} × 128"
    memory = f"{after} after {gets:,} gets; {before} before"
    return [
        Row(f"seconds to ready, {items}", f"{server.started:.1f}"),
        Row(f"RSS / PSS / anonymous memory of the worker in MiB, {items}", memory),
    ]
