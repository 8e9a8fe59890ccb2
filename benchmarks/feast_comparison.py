"""The row against Feast's feature server: the same vectors, in its Redis online store.

Feast lives in a virtual environment of its own (``make bench-feast``), with one worker, as the
service has. Both sides are asked for the same items, and their answers are compared first.
"""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import numpy as np
import orjson

from benchmarks.serving_bench import (
    BATCH,
    SAMPLE,
    Bench,
    Row,
    Side,
    at_least,
    rates,
    ratio,
    say,
    vectors_of,
)
from benchmarks.serving_data import ids_of, random_ids
from benchmarks.serving_load import (
    JSON,
    RAW,
    Requests,
    Unmeasured,
    batches,
    pieces,
    posts,
    singles,
)
from benchmarks.serving_processes import (
    Server,
    environment,
    free_port,
    http_server,
    redis_server,
)
from benchmarks.serving_rows import BATCHES_AT_ONCE, SINGLES_AT_ONCE

ITEMS = 20_000
PATH, FEATURE, JOIN_KEY = "/get-online-features", "vectors:embedding", "item_id"


def against_feast(bench: Bench) -> list[Row]:
    """Singles and batches against Feast."""
    if not (bench.feast / "bin" / "feast").exists():
        raise Unmeasured(f"there is no Feast in {bench.feast}: make bench-feast")
    items = min(bench.items, ITEMS)
    ids = random_ids(items, SAMPLE)
    with bench.serving(bench.chain, ids=ids) as server, feast_server(bench, items) as feast:
        compare_answers(server, feast, ids[:10])
        ours, theirs = bench.alternate(
            Side("single GET, JSON", server, singles(ids, JSON), SINGLES_AT_ONCE),
            Side("Feast, singles", feast, features(ids, 1), SINGLES_AT_ONCE),
        )
        as_json, as_raw, theirs_batched = bench.alternate(
            Side("batches, JSON", server, batches(ids, BATCH, JSON), BATCHES_AT_ONCE),
            Side("batches, raw", server, batches(ids, BATCH, RAW), BATCHES_AT_ONCE),
            Side("Feast, batches", feast, features(ids, BATCH), BATCHES_AT_ONCE),
        )
    what = f"÷ Feast ({items:,} items)"
    return [
        at_least(f"single, JSON {what}", ratio(ours, theirs), 8, rates(ours, theirs)),
        *(
            at_least(
                f"batch of {BATCH:,}, {name} {what}",
                ratio(loads, theirs_batched),
                bar,
                rates(loads, theirs_batched),
            )
            for name, loads, bar in (("JSON", as_json, 12), ("raw", as_raw, 50))
        ),
    ]


@contextmanager
def feast_server(bench: Bench, items: int) -> Iterator[Server]:
    """Serve ver-0 vectors of the first items with Feast, from a Redis of its own."""
    with TemporaryDirectory(prefix="backcast-feast-") as name, redis_server() as redis:
        folder = Path(name)
        write_features(bench, folder, items, redis)
        port = free_port()
        command = [str(bench.feast / "bin" / "feast"), "-c", str(folder), "serve"]
        # By default a worker is replaced after 1,000 requests.
        command += ["--port", str(port), "--workers", "1", "--max-requests", "0"]
        environ = environment(bench.chain, bench.threads, PYTHONPATH="", FEAST_USAGE="False")
        with http_server([*command, "--no-access-log"], environ, port, "/health") as server:
            yield server


def write_features(bench: Bench, folder: Path, items: int, redis: str) -> None:
    """Let Feast make a feature repository in ``folder`` and write the vectors to Redis."""
    say(f"  writing {items:,} vectors with Feast")
    ids = ids_of(np.arange(items))
    np.save(folder / "vectors.npy", vectors_of(bench.chain, ids))
    (folder / "ids.txt").write_text("\n".join(ids))
    script = Path(__file__).with_name("feast_writing.py")
    ended = subprocess.run(
        [str(bench.feast / "bin" / "python"), str(script), str(folder), redis],
        env=environment(bench.chain, bench.threads, PYTHONPATH="", FEAST_USAGE="False"),
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode:
        raise Unmeasured(f"Feast wrote no vectors: {ended.stderr[-2000:]}")


def features(ids: Sequence[str], size: int) -> Requests:
    """Return requests for the vectors of ``size`` ids each."""
    return posts(PATH, [feature_request(piece) for piece in pieces(ids, size)], size)


def feature_request(ids: Sequence[str]) -> bytes:
    """Return the body of a request to Feast."""
    return orjson.dumps({"features": [FEATURE], "entities": {JOIN_KEY: list(ids)}})


def compare_answers(server: Server, feast: Server, ids: Sequence[str]) -> None:
    """Demand that both answer with the same vectors."""
    answer = httpx2.post(f"{server.url}/embeddings/batch", json={"ids": ids, "version": 0})
    ours = [row["embedding"] for row in answer.raise_for_status().json()["embeddings"]]
    answer = httpx2.post(
        f"{feast.url}{PATH}", content=feature_request(ids), headers={"Content-Type": JSON}
    )
    document = answer.raise_for_status().json()
    names = document["metadata"]["feature_names"]
    theirs = document["results"][names.index("embedding")]["values"]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
