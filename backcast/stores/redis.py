"""The Redis store: one key a vector, raw little-endian numbers, for many hosts.

Keys: ``backcast:{snapshot}:{entity}:{id}`` → D_k numbers, float32 unless the store's precision is
another; ``backcast:{snapshot}`` → what was loaded, written last, so that a snapshot without it is
not there. Keys carry the snapshot, so a reader can never mix two. Every read asks for that last
key too, in the same command: where it is gone the store was emptied, and no id is unknown.

``backcast:`` → a hash: each snapshot with keys, and a token of who loads or drops it. A load writes
and ends in that last key, and a drop goes on, only while the token is what it was: so neither meets
half of what the other did, nor of a load at another precision, and a load notices a server that was
emptied. The names are in one place because
to look for them among the keys would keep the server from readers, for seconds.
"""

import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson
import xxhash
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
_SCANNED = 1_000  # keys in one command: half a millisecond in which nobody else is answered
_NAMES = "backcast:"

# Of all scripts the keys are the marker and the names, the arguments the snapshot and a token.
_CLAIM = """
local held = redis.call('HGET', KEYS[2], ARGV[1])
if held and string.sub(held, 1, #ARGV[3]) == ARGV[3] then
  return held
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return ARGV[2]
"""
_WRITE = """
if redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('MSET', unpack(ARGV, 3))
return 1
"""
_FINISH = """
local server = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)') or 'None'
if server ~= ARGV[3] or redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('SET', KEYS[1], ARGV[4])
return 1
"""
# A full server takes no more, but from a script that has deleted something, or tried to, first.
_BEGIN_DROP = """
if redis.call('DEL', KEYS[1]) == 0 and redis.call('HEXISTS', KEYS[2], ARGV[1]) == 0 then
  return 0
end
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return 1
"""
_BEGIN_DISCARD = """
if redis.call('EXISTS', KEYS[1]) == 1 or redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[3] then
  return 0
end
redis.call('DEL', KEYS[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
return 1
"""
_REMOVE = """
if redis.call('HGET', KEYS[2], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call('UNLINK', unpack(ARGV, 3))
return 1
"""
_END_DROP = """
if redis.call('HGET', KEYS[2], ARGV[1]) == ARGV[2] then
  redis.call('HDEL', KEYS[2], ARGV[1])
end
"""


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
            rounder, server = Rounder(precision or self._precision), self._run_id()
            token = self._claim(snapshot, rounder.precision)
            try:
                size = self._write_all(snapshot, token, dim, counts, batches, rounder)
                manifest = {
                    "dim": dim,
                    "counts": {str(e): n for e, n in counts.items()},
                    "size": size,
                    "rounding": asdict(rounder.total),
                }
                if not self._run(_FINISH, snapshot, token, server, orjson.dumps(manifest)):
                    raise self._lost(snapshot)
            except (InvalidInput, StoreError, redis.OutOfMemoryError):
                self._discard(snapshot, token)  # or it would stand in the way of the next load
                raise

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
        return [name for name, is_whole in self._all() if is_whole]

    def remains(self) -> list[str]:
        """Return what was left half loaded or half dropped, sorted."""
        return [name for name, is_whole in self._all() if not is_whole]

    def drop(self, snapshot: str) -> None:
        """Remove a snapshot; the marker goes first, so that no reader finds half of it."""
        with self._translated():
            token = _new_token("drop")
            if self._run(_BEGIN_DROP, snapshot, token):
                self._remove(snapshot, token)

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

    def _all(self) -> list[tuple[str, bool]]:
        """Return all snapshots with keys, sorted, and whether each is whole."""
        with self._translated():
            found = cast("list[bytes]", self._redis.hkeys(_NAMES))
            names = sorted(name.decode() for name in found)
            markers = self._redis.mget([_marker(name) for name in names]) if names else []
        loaded = cast("list[bytes | None]", markers)
        return [(name, held is not None) for name, held in zip(names, loaded, strict=True)]

    def _claim(self, snapshot: str, precision: Precision) -> bytes:
        """Return the token of a load.

        Others that load the same snapshot at the same precision have the same: who ends first is
        right. One at another precision is overtaken, and writes no more.
        """
        kind = f"load-{precision}"
        token: bytes = self._run(_CLAIM, snapshot, _new_token(kind), f"{kind}-")
        return token

    def _discard(self, snapshot: str, load: bytes) -> None:
        """Remove what a refused load wrote, unless the snapshot is whole, or loaded by others."""
        token = _new_token("drop")
        if self._run(_BEGIN_DISCARD, snapshot, token, load):
            self._remove(snapshot, token)

    def _remove(self, snapshot: str, token: bytes) -> None:
        server = None
        while server != (server := self._run_id()):  # a server that restarted loses its cursors
            for keys in self._keys(snapshot):
                if not self._run(_REMOVE, snapshot, token, *keys):
                    return  # it is loaded again, or somebody else drops it
        self._run(_END_DROP, snapshot, token)

    def _lost(self, snapshot: str) -> StoreError:
        return StoreError(
            f"{self._name} was restarted or emptied meanwhile, or {snapshot} was dropped or is "
            "loaded at another precision; load it again."
        )

    def _run(self, script: str, snapshot: str, *arguments: Any) -> Any:
        """Run a script, at once and undisturbed; its keys are the marker and the names."""
        return self._redis.eval(script, 2, _marker(snapshot), _NAMES, snapshot, *arguments)

    def _run_id(self) -> bytes:
        found = str(self._redis.info("server").get("run_id"))
        return found.encode()

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
        token: bytes,
        dim: int,
        counts: Mapping[Entity, int],
        batches: Iterable[VectorBatch],
        rounder: Rounder,
    ) -> int:
        written: dict[Entity, int] = dict.fromkeys(counts, 0)
        hashes: dict[Entity, list[NDArray[np.uint64]]] = {entity: [] for entity in Entity}
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
                        pool.submit(self._write, snapshot, token, piece, rounder(piece))
                    )
                written[batch.entity] = written.get(batch.entity, 0) + len(batch.ids)
                hashes[batch.entity].append(_hashes(batch.ids))
            size += sum(answer.result() for answer in unanswered)
        if written != dict(counts):
            raise DimensionMismatch("number of vectors", dict(counts), written)
        if not all(map(_all_differ, hashes.values())):
            self._refuse_duplicates(snapshot, sum(written.values()))
        return size

    def _write(
        self, snapshot: str, token: bytes, piece: VectorBatch, rows: NDArray[np.generic]
    ) -> int:
        raw, width = rows.tobytes(), rows.dtype.itemsize * rows.shape[1]
        pairs: list[bytes] = []
        for at, id in enumerate(piece.ids):
            pairs += key_of(snapshot, piece.entity, id), raw[at * width : (at + 1) * width]
        if not self._run(_WRITE, snapshot, token, *pairs):
            raise self._lost(snapshot)
        return sum(map(len, pairs))

    def _keys(self, snapshot: str) -> Iterator[list[bytes]]:
        cursor, pattern = None, f"{_marker(snapshot)}:*"
        while cursor != 0:
            answer = self._redis.scan(cursor or 0, pattern, _SCANNED)
            cursor, keys = cast("tuple[int, list[bytes]]", answer)
            if keys:
                yield keys

    def _refuse_duplicates(self, snapshot: str, expected: int) -> None:
        found = len({key for keys in self._keys(snapshot) for key in keys})
        if found != expected:
            raise InvalidInput(
                f"Snapshot {snapshot} has {expected} vectors but {found} ids: some come twice."
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


def _new_token(kind: str) -> bytes:
    return f"{kind}-{secrets.token_hex(8)}".encode()


def _hashes(ids: Sequence[str]) -> NDArray[np.uint64]:
    encoded = (id.encode(errors="surrogatepass") for id in ids)
    return np.fromiter(map(xxhash.xxh3_64_intdigest, encoded), np.uint64, len(ids))


def _all_differ(hashes: Sequence[NDArray[np.uint64]]) -> bool:
    """Return whether no two ids have the same hash, so that they differ themselves."""
    found = np.sort(np.concatenate([np.empty(0, np.uint64), *hashes]))
    return not (found[1:] == found[:-1]).any()


def _marker(snapshot: str) -> str:
    return f"{_NAMES}{snapshot}"


def key_of(snapshot: str, entity: Entity, id: str) -> bytes:
    """Return the key of one vector."""
    return f"{_marker(snapshot)}:{entity}:{id}".encode(errors="surrogatepass")
