"""Running services, and stores that can be watched and held up."""

import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from typing import Any

import httpx2
import numpy as np
import pyarrow as pa
import uvicorn
from numpy.typing import NDArray
from sqlalchemy import update
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from backcast.lifecycle import publish
from backcast.registry import tables
from backcast.registry.schema import make_engine
from backcast.stores import Gathered, Precision, StoredSnapshot, VectorStore
from backcast.vectors import VectorBatch
from backcast.versions import Entity, Scope
from service.app import create_app
from service.engine import Engine
from service.wire import Format
from tests.support import Home, batches, normal

ODD_IDS = (
    "a/b/c",
    "/leading and trailing/",
    "//",
    "%2F",
    "100%",
    "%",
    "%zz",
    "..",
    ".",
    "a/../b",
    "./c",
    "007",
    "7",
    " ",
    " spaced  out ",
    "what?",
    "?version=2",
    "#fragment",
    "a&b=c;d,e+f",
    "a+b",
    "naïve café",
    "日本語",
    "😀",
    "e\u0301",
    "\u00e9",
    "batch",
    "new\nline\n",
    "tab\t",
    "nul\0",
    'quote"back\\slash',
    "x" * 1024,
    "é" * 512,
)
"""Ids that URLs, routers and JSON like to change."""


def secret_of(home: Home, scope: Scope = Scope.READ, **options: Any) -> str:
    """Make a key of a consumer of its own, and return its secret."""
    consumer = f"consumer {len(home.backcast.registry.keys.all())}"
    return home.backcast.registry.keys.create(consumer, scope, **options)[1]


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@contextmanager
def client_of(home: Home, **settings: Any) -> Iterator[TestClient]:
    """Yield a client of the home's service, which may do anything."""
    chosen = home.settings.model_copy(update=settings)
    headers = bearer(secret_of(home, Scope.ADMIN))
    with TestClient(create_app(chosen), headers=headers) as client:
        yield client


@contextmanager
def running(app: ASGIApp, **options: Any) -> Iterator[str]:
    """Serve an application on a free loopback port, from a thread, and yield its URL."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", **options))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def arrow_ids(*columns: pa.Array, schema: pa.Schema | None = None, **options: Any) -> bytes:
    """Return an Arrow stream with one batch for each column of ids."""
    chosen = pa.schema([("id", columns[0].type)]) if schema is None else schema
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, chosen, **options) as stream:
        for column in columns:
            stream.write_batch(pa.record_batch([column], schema=chosen))
    content: bytes = sink.getvalue().to_pybytes()
    return content


def publish_ids(home: Home, version: int, ids: Sequence[str], *, seed: int = 0) -> None:
    """Publish a snapshot of random vectors with these ids, items and users alike."""
    rng = np.random.default_rng([seed, version])
    home.vectors[version] = {
        entity: dict(zip(ids, normal(rng, len(ids), home.dims[version]), strict=True))
        for entity in Entity
    }
    backcast = home.backcast
    rows = batches(home.vectors[version])
    publish(backcast.registry, backcast.artifacts, version, rows, details={})


def set_version(home: Home, number: int, **columns: object) -> None:
    """Change columns of a version's row, as a later command would."""
    engine = make_engine(home.settings.registry_url)
    with engine.begin() as connection:
        connection.execute(
            update(tables.versions).where(tables.versions.c.number == number).values(**columns)
        )
    engine.dispose()


def expire(home: Home, prefix: str, moment: datetime) -> None:
    """Let a key expire at ``moment``."""
    engine = make_engine(home.settings.registry_url)
    with engine.begin() as connection:
        connection.execute(
            update(tables.api_keys)
            .where(tables.api_keys.c.prefix == prefix)
            .values(expires_at=moment)
        )
    engine.dispose()


def engine_of(home: Home, store: VectorStore | None = None) -> Engine:
    """Return an engine on the home's places, refreshed once."""
    backcast = home.backcast
    engine = Engine(backcast.registry, backcast.artifacts, store or backcast.store, "cpu")
    engine.refresh()
    return engine


def assert_served(
    served: NDArray[np.float32],
    home: Home,
    ids: Sequence[str],
    target: int,
    entity: Entity = Entity.ITEM,
    *,
    live: int,
) -> None:
    """Demand ‖served − ref‖₂ ≤ 1e-5 · ‖W‖₂ ‖z‖₂ of every row, ref in float64."""
    reference = home.reference(target, ids, entity, live=live)
    assert served.dtype == np.float32
    assert served.shape == reference.shape
    errors = np.linalg.norm(served.astype(np.float64) - reference, axis=1)
    norms = np.linalg.norm(home.reference(live, ids, entity, live=live), axis=1)
    assert np.all(errors <= 1e-5 * gain(home, target, live) * norms)


def read_rows(response: httpx2.Response) -> NDArray[np.float32]:
    """Read vectors in whichever format they came: (N, D), NaN where one is missing.

    One vector is read as a batch of one.
    """
    assert response.status_code == 200, response.text
    dim = int(response.headers["Backcast-Dim"])
    rows: list[list[float] | None]
    match Format(response.headers["content-type"]):
        case Format.RAW:
            shape = [int(length) for length in response.headers["Backcast-Shape"].split(",")]
            assert shape[-1] == dim
            return np.frombuffer(response.content, "<f4").reshape(-1, *shape[-1:])
        case Format.ARROW:
            with pa.ipc.open_stream(response.content) as stream:
                rows = stream.read_all()["vector"].to_pylist()
        case Format.JSON:
            document = response.json()
            rows = [row["embedding"] for row in document.get("embeddings", [document])]
    gaps = [row or [np.nan] * dim for row in rows]
    return np.array(gaps, np.float32).reshape(len(rows), dim)


def gain(home: Home, target: int, live: int) -> float:
    """Return ‖W_live^target‖₂."""
    return float(np.linalg.norm(_product(home, target, live), ord=2))


def _product(home: Home, target: int, live: int) -> NDArray[np.float64]:
    if target == live:
        return np.eye(home.dims[live])
    if (live, target, True) in home.maps:
        return home.maps[live, target, True][0].astype(np.float64)
    parent = home.parents[live]
    assert parent is not None
    return _product(home, target, parent) @ home.maps[live, parent, False][0].astype(np.float64)


class WatchedStore:
    """Another store, with a call made before every gather."""

    def __init__(self, store: VectorStore, before: Callable[[Sequence[str]], object]) -> None:
        self._store, self._before = store, before

    def load(
        self,
        snapshot: str,
        dim: int,
        counts: Mapping[Entity, int],
        batches: Iterable[VectorBatch],
        precision: Precision | None = None,
    ) -> None:
        self._store.load(snapshot, dim, counts, batches, precision)

    def open(self, snapshot: str) -> StoredSnapshot:
        return WatchedSnapshot(self._store.open(snapshot), self._before)

    def snapshots(self) -> list[str]:
        return self._store.snapshots()

    def remains(self) -> list[str]:
        return self._store.remains()

    def drop(self, snapshot: str) -> None:
        self._store.drop(snapshot)

    def close(self) -> None:
        self._store.close()


class WatchedSnapshot:
    """A snapshot of a WatchedStore."""

    def __init__(self, stored: StoredSnapshot, before: Callable[[Sequence[str]], object]) -> None:
        self.dim, self.counts, self.size = stored.dim, stored.counts, stored.size
        self.rounding = stored.rounding
        self._stored, self._before = stored, before

    def gather(self, entity: Entity, ids: Sequence[str]) -> Gathered:
        self._before(ids)
        return self._stored.gather(entity, ids)
