"""The Redis store: one key a vector, raw little-endian numbers, for many hosts.

Keys: ``backcast:{snapshot}:{entity}:{id}`` → D_k numbers, float32 unless the store's precision is
another; ``backcast:{snapshot}`` → what was loaded, written last, so that a snapshot without it is
not there. Keys carry the snapshot, so a reader can never mix two. Every read asks for that last
key too, in the same command: where it is gone the store was emptied, and no id is unknown.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from backcast.errors import (
    ConfigError,
    DimensionMismatch,
    InvalidInput,
    SnapshotNotLoaded,
    StoreError,
)
from backcast.stores.base import Gathered
from backcast.stores.precision import Precision, Rounder, Rounding
from backcast.vectors import VectorBatch
from backcast.versions import Entity

try:
    import redis
    from redis.backoff import ExponentialWithJitterBackoff
    from redis.retry import Retry
except ModuleNotFoundError as error:
    raise ConfigError(
        "BACKCAST_STORE_URL names Redis, whose package is missing: pip install backcast[service]."
    ) from error

_READ_ROWS, _WRITE_ROWS = 1_000, 250  # of one command
_IN_FLIGHT = 4  # writes that the server has not answered yet
_DROPPED_ROWS = 1_000


class RedisStore:
    """A vector store in Redis, which must not evict keys.

    A connection that broke is made again at the next call, after a few quick attempts within it;
    one that has been idle is tried before it is used.
    """

    def __init__(self, url: str, precision: Precision = Precision.FLOAT32) -> None:
        self._precision = precision
        self._redis = _client(url)
        options = self._redis.connection_pool.connection_kwargs
        self._name = f"redis {options.get('host', 'localhost')}:{options.get('port', 6379)}"
        with self._translated():
            self._demand_no_eviction()

    def load(
        self,
        snapshot: str,
        dim: int,
        counts: Mapping[Entity, int],
        batches: Iterable[VectorBatch],
        precision: Precision | None = None,
    ) -> None:
        """Load a snapshot; see the port."""
        with self._translated():
            self._demand_no_eviction()
            if self._redis.exists(_marker(snapshot)):
                return
            rounder = Rounder(precision or self._precision)
            try:
                size = self._write_all(snapshot, dim, counts, batches, rounder)
            except (InvalidInput, redis.OutOfMemoryError):
                self.drop(snapshot)  # what was refused would stand in the way of the next load
                raise
            manifest = {
                "dim": dim,
                "counts": {str(e): n for e, n in counts.items()},
                "size": size,
                "rounding": asdict(rounder.total),
            }
            self._redis.set(_marker(snapshot), orjson.dumps(manifest))

    def open(self, snapshot: str) -> "RedisSnapshot":
        """Return a handle; raise SnapshotNotLoaded."""
        with self._translated():
            self._demand_no_eviction()
            manifest = cast("bytes | None", self._redis.get(_marker(snapshot)))
        if manifest is None:
            raise SnapshotNotLoaded(snapshot, self._name)
        return RedisSnapshot(self, snapshot, orjson.loads(manifest))

    def snapshots(self) -> list[str]:
        """Return the ids of the snapshots held, sorted."""
        with self._translated():
            keys = [key.decode() for key in self._redis.scan_iter("backcast:*", count=10_000)]
        return sorted(key.removeprefix("backcast:") for key in keys if key.count(":") == 1)

    def drop(self, snapshot: str) -> None:
        """Remove a snapshot; the marker goes first, so that no reader finds half of it."""
        with self._translated():
            self._redis.delete(_marker(snapshot))
            doomed = list(self._keys(snapshot))
            for start in range(0, len(doomed), _DROPPED_ROWS):
                self._redis.unlink(*doomed[start : start + _DROPPED_ROWS])

    def close(self) -> None:
        """Close every connection."""
        self._redis.close()

    def read(self, snapshot: str, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values of ``keys``; raise SnapshotNotLoaded where the store was emptied."""
        marker = _marker(snapshot).encode()
        values: list[bytes | None] = []
        with self._translated():
            for start in range(0, len(keys), _READ_ROWS):
                answer = self._redis.mget([marker, *keys[start : start + _READ_ROWS]])
                loaded, *piece = cast("list[bytes | None]", answer)
                if loaded is None:
                    raise SnapshotNotLoaded(snapshot, self._name)
                values += piece
        return values

    def _demand_no_eviction(self) -> None:
        policy = self._redis.info("memory").get("maxmemory_policy")
        if policy != "noeviction":
            raise ConfigError(
                f"{self._name} may evict vectors: its maxmemory-policy is {policy}, "
                "it must be noeviction."
            )

    def _write_all(
        self,
        snapshot: str,
        dim: int,
        counts: Mapping[Entity, int],
        batches: Iterable[VectorBatch],
        rounder: Rounder,
    ) -> int:
        written: dict[Entity, int] = dict.fromkeys(counts, 0)
        unanswered: deque[Future[int]] = deque()
        size = 0
        with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="redis") as pool:
            for batch in batches:
                if batch.dim != dim:
                    raise DimensionMismatch(f"{batch.entity} vectors", dim, batch.dim)
                for piece in batch.slices(_WRITE_ROWS):
                    if len(unanswered) == _IN_FLIGHT:
                        size += unanswered.popleft().result()
                    unanswered.append(
                        pool.submit(self._write, snapshot, batch.entity, piece.ids, rounder(piece))
                    )
                written[batch.entity] = written.get(batch.entity, 0) + len(batch.ids)
            size += sum(answer.result() for answer in unanswered)
        if written != dict(counts):
            raise DimensionMismatch("number of vectors", dict(counts), written)
        self._refuse_duplicates(snapshot, sum(written.values()))
        return size

    def _write(self, snapshot: str, entity: Entity, ids: Sequence[str], rows: NDArray[Any]) -> int:
        raw, width = rows.tobytes(), rows.dtype.itemsize * rows.shape[1]
        values = {
            key_of(snapshot, entity, id): raw[at * width : (at + 1) * width]
            for at, id in enumerate(ids)
        }
        self._redis.mset(cast("Mapping[Any, Any]", values))
        return sum(map(len, values)) + len(raw)

    def _keys(self, snapshot: str) -> Iterator[bytes]:
        yield from self._redis.scan_iter(f"{_marker(snapshot)}:*", count=10_000)

    def _refuse_duplicates(self, snapshot: str, expected: int) -> None:
        found = len(set(self._keys(snapshot)))
        if found != expected:
            raise InvalidInput(
                f"Snapshot {snapshot} has {expected} vectors but {found} ids: some come twice, or "
                f"{self._name} lost keys during the load; load it again to tell."
            )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except redis.OutOfMemoryError as error:
            raise StoreError(
                f"{self._name} is full: its maxmemory is reached. Raise it, or wait until "
                "superseded snapshots have gone."
            ) from error
        except redis.RedisError as error:
            raise StoreError(f"{self._name} does not answer: {str(error).rstrip('.')}.") from error


class RedisSnapshot:
    """One loaded snapshot in Redis."""

    def __init__(self, store: RedisStore, snapshot: str, manifest: Mapping[str, Any]) -> None:
        self._store, self._snapshot = store, snapshot
        self.dim: int = manifest["dim"]
        self.counts = {Entity(name): count for name, count in manifest["counts"].items()}
        self.size: int = manifest["size"]
        self.rounding = Rounding.read(manifest["rounding"])

    def gather(self, entity: Entity, ids: Sequence[str]) -> Gathered:
        """Return the vectors of ``ids``; order and duplicates kept."""
        values = self._store.read(
            self._snapshot, [key_of(self._snapshot, entity, id) for id in ids]
        )
        precision = self.rounding.precision
        width = precision.dtype.itemsize * self.dim
        found = np.fromiter((value is not None for value in values), bool, len(values))
        zero = bytes(width)
        raw = bytearray().join(zero if value is None else value for value in values)
        if len(raw) != width * len(ids):
            raise StoreError(
                f"A vector of snapshot {self._snapshot} has not {self.dim} numbers of {precision}."
            )
        stored = np.frombuffer(raw, precision.dtype).reshape(len(ids), self.dim)
        return Gathered(precision.widen(stored), found)


def _client(url: str) -> redis.Redis:
    """Make a client that has not connected yet; no message shows what may be a password."""
    try:
        client = redis.Redis.from_url(
            url,
            socket_timeout=10,
            socket_connect_timeout=5,
            health_check_interval=30,
            # A server that hangs is not asked again: the caller has waited long enough.
            retry=Retry(
                ExponentialWithJitterBackoff(base=0.05, cap=0.2), 2, (redis.ConnectionError,)
            ),
        )
        pool = client.connection_pool
        pool.connection_class(**pool.connection_kwargs)
    except TypeError as error:  # an option that is none; the message names it, not its value
        raise ConfigError(f"BACKCAST_STORE_URL: {str(error).rpartition(') ')[2]}.") from None
    except (ValueError, redis.RedisError):
        raise ConfigError(
            "BACKCAST_STORE_URL: the form is redis[s]://[user:password@]host:port/number?options, "
            "special characters of a password percent-encoded."
        ) from None
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        path = pool.connection_kwargs.get(name)
        if path is not None and not Path(path).is_file():
            raise ConfigError(f"BACKCAST_STORE_URL: {name}={path} is no file.")
    return client


def _marker(snapshot: str) -> str:
    return f"backcast:{snapshot}"


def key_of(snapshot: str, entity: Entity, id: str) -> bytes:
    """Return the key of one vector."""
    return f"{_marker(snapshot)}:{entity}:{id}".encode(errors="surrogatepass")
