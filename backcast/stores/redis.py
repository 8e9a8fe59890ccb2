"""The Redis store: one key a vector, raw little-endian float32, for many hosts.

Keys: ``backcast:{snapshot}:{entity}:{id}`` → D_k × 4 bytes; ``backcast:{snapshot}`` → what was
loaded, written last, so that a snapshot without it is not there. Keys carry the snapshot, so a
reader can never mix two.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import orjson

from backcast.errors import (
    ConfigError,
    DimensionMismatch,
    InvalidInput,
    SnapshotNotLoaded,
    StoreError,
)
from backcast.stores.base import Gathered
from backcast.vectors import VectorBatch
from backcast.versions import Entity

try:
    import redis
except ModuleNotFoundError as error:
    raise ConfigError(
        "BACKCAST_STORE_URL names Redis, whose package is missing: pip install backcast[service]."
    ) from error

_ROWS = 1_000


class RedisStore:
    """A vector store in Redis, which must not evict keys."""

    def __init__(self, url: str) -> None:
        try:
            self._redis = redis.Redis.from_url(url, socket_timeout=10, socket_connect_timeout=5)
        except ValueError as error:
            raise ConfigError(f"BACKCAST_STORE_URL: {error}.") from error
        options = self._redis.connection_pool.connection_kwargs
        self._name = f"redis {options.get('host', '')}:{options.get('port', '')}"
        with self._translated():
            policy = self._redis.info("memory").get("maxmemory_policy")
        if policy != "noeviction":
            raise ConfigError(
                f"{self._name} may evict vectors: its maxmemory-policy is {policy}, "
                "it must be noeviction."
            )

    def load(
        self,
        snapshot: str,
        dim: int,
        counts: Mapping[Entity, int],
        batches: Iterable[VectorBatch],
    ) -> None:
        """Load a snapshot; see the port."""
        with self._translated():
            if self._redis.exists(_marker(snapshot)):
                return
            try:
                size = self._write_all(snapshot, dim, counts, batches)
            except InvalidInput:
                self.drop(snapshot)  # what was refused would stand in the way of the next load
                raise
            manifest = {"dim": dim, "counts": {str(e): n for e, n in counts.items()}, "size": size}
            self._redis.set(_marker(snapshot), orjson.dumps(manifest))

    def open(self, snapshot: str) -> "RedisSnapshot":
        """Return a handle; raise SnapshotNotLoaded."""
        with self._translated():
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
            for start in range(0, len(doomed), _ROWS):
                self._redis.unlink(*doomed[start : start + _ROWS])

    def close(self) -> None:
        """Close every connection."""
        self._redis.close()

    def read(self, snapshot: str, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values of ``keys``; raise SnapshotNotLoaded where the store was emptied."""
        values: list[bytes | None] = []
        with self._translated():
            for start in range(0, len(keys), _ROWS):
                values += cast("list[bytes | None]", self._redis.mget(keys[start : start + _ROWS]))
            if None in values and not self._redis.exists(_marker(snapshot)):
                raise SnapshotNotLoaded(snapshot, self._name)
        return values

    def _write_all(
        self,
        snapshot: str,
        dim: int,
        counts: Mapping[Entity, int],
        batches: Iterable[VectorBatch],
    ) -> int:
        written: dict[Entity, int] = dict.fromkeys(counts, 0)
        size = 0
        for batch in batches:
            if batch.dim != dim:
                raise DimensionMismatch(f"{batch.entity} vectors", dim, batch.dim)
            for piece in batch.slices(_ROWS):
                size += self._write(snapshot, piece)
            written[batch.entity] = written.get(batch.entity, 0) + len(batch.ids)
        if written != dict(counts):
            raise DimensionMismatch("number of vectors", dict(counts), written)
        self._refuse_duplicates(snapshot, sum(written.values()))
        return size

    def _write(self, snapshot: str, piece: VectorBatch) -> int:
        values = {
            key_of(snapshot, piece.entity, id): row.astype("<f4").tobytes()
            for id, row in zip(piece.ids, piece.vectors, strict=True)
        }
        self._redis.mset(cast("Mapping[Any, Any]", values))
        return sum(len(key) + len(value) for key, value in values.items())

    def _keys(self, snapshot: str) -> Iterator[bytes]:
        yield from self._redis.scan_iter(f"{_marker(snapshot)}:*", count=10_000)

    def _refuse_duplicates(self, snapshot: str, expected: int) -> None:
        found = len(set(self._keys(snapshot)))
        if found != expected:
            raise InvalidInput(
                f"Snapshot {snapshot} has {expected} vectors but {found} ids: some come twice."
            )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise StoreError(f"{self._name} does not answer: {error}.") from error


class RedisSnapshot:
    """One loaded snapshot in Redis."""

    def __init__(self, store: RedisStore, snapshot: str, manifest: Mapping[str, Any]) -> None:
        self._store, self._snapshot = store, snapshot
        self.dim: int = manifest["dim"]
        self.counts = {Entity(name): count for name, count in manifest["counts"].items()}
        self.size: int = manifest["size"]

    def gather(self, entity: Entity, ids: Sequence[str]) -> Gathered:
        """Return the vectors of ``ids``; order and duplicates kept."""
        values = self._store.read(
            self._snapshot, [key_of(self._snapshot, entity, id) for id in ids]
        )
        found = np.fromiter((value is not None for value in values), bool, len(values))
        raw = b"".join(value or bytes(4 * self.dim) for value in values)
        if len(raw) != 4 * self.dim * len(ids):
            raise StoreError(f"A vector of snapshot {self._snapshot} has not {self.dim} floats.")
        return Gathered(np.frombuffer(raw, "<f4").reshape(len(ids), self.dim).copy(), found)


def _marker(snapshot: str) -> str:
    return f"backcast:{snapshot}"


def key_of(snapshot: str, entity: Entity, id: str) -> bytes:
    """Return the key of one vector."""
    return f"{_marker(snapshot)}:{entity}:{id}".encode(errors="surrogatepass")
