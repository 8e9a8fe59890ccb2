"""The embedded store: NumPy files in a folder of one host, shared through the page cache.

One folder a snapshot, written under another name, synced, then renamed, so that it is there whole
or not at all. For each entity kind it holds the matrix in arrival order, the ids as one run of
UTF-8 with offsets, and an index: the ids' 64-bit hashes in order, beside the row each belongs to.
A lookup is a binary search for the hash and a comparison of the id's bytes, so a collision of
hashes costs a step and never an error. Everything is memory-mapped: a worker that opens a
snapshot reads only the pages it needs and shares them with every other worker.
"""

import fcntl
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import xxhash
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from backcast.errors import DimensionMismatch, InvalidInput, SnapshotNotLoaded, StoreError
from backcast.stores.base import Gathered
from backcast.vectors import VectorBatch, check_id
from backcast.versions import Entity

FORMAT = 1
_MANIFEST = "manifest.json"
_UNFINISHED = ".unfinished-"


class EmbeddedStore:
    """A vector store in a local folder. For one host: other hosts do not see its files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"The store folder {folder} cannot be made: {error}.") from error

    def load(
        self,
        snapshot: str,
        dim: int,
        counts: Mapping[Entity, int],
        batches: Iterable[VectorBatch],
    ) -> None:
        """Load a snapshot; see the port. Loads of one store run one after another."""
        with self._writing():
            target = self._folder / snapshot
            if target.exists():
                return
            unfinished = self._folder / f"{_UNFINISHED}{snapshot}"
            unfinished.mkdir()
            try:
                _write(unfinished, dim, counts, batches)
                os.rename(unfinished, target)
                _sync(self._folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)

    def open(self, snapshot: str) -> "EmbeddedSnapshot":
        """Return a handle; it stays readable after the snapshot was dropped."""
        try:
            return EmbeddedSnapshot(self._folder / snapshot)
        except FileNotFoundError as error:
            raise SnapshotNotLoaded(snapshot, str(self._folder)) from error
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise StoreError(f"Snapshot {snapshot} cannot be read: {error}.") from error

    def snapshots(self) -> list[str]:
        """Return the ids of the snapshots held, sorted."""
        return sorted(path.parent.name for path in self._folder.glob(f"[!.]*/{_MANIFEST}"))

    def drop(self, snapshot: str) -> None:
        """Remove a snapshot's files; pages that a handle has mapped live on until it is gone."""
        with self._writing():
            doomed = self._folder / f"{_UNFINISHED}{snapshot}"
            try:
                os.rename(self._folder / snapshot, doomed)
            except FileNotFoundError:
                return
            shutil.rmtree(doomed)

    def close(self) -> None:
        """Nothing is held open."""

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with open(self._folder / ".lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel gives it back if the writer is killed
                for litter in self._folder.glob(f"{_UNFINISHED}*"):
                    shutil.rmtree(litter)
                yield
        except OSError as error:
            raise StoreError(f"The store {self._folder} cannot be changed: {error}.") from error


class EmbeddedSnapshot:
    """One loaded snapshot, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        manifest = orjson.loads((folder / _MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError(f"{folder} has format {manifest['format']}, not {FORMAT}")
        self.dim: int = manifest["dim"]
        self.counts = {Entity(name): count for name, count in manifest["counts"].items()}
        self.size = sum(path.stat().st_size for path in folder.iterdir())
        self._tables = {
            entity: _IdTable.open(folder, entity) for entity, n in self.counts.items() if n
        }

    def gather(self, entity: Entity, ids: Sequence[str]) -> Gathered:
        """Return the vectors of ``ids``; order and duplicates kept."""
        table = self._tables.get(entity)
        if table is None:
            return Gathered(
                np.zeros((len(ids), self.dim), np.float32), np.zeros(len(ids), dtype=bool)
            )
        rows = table.rows_of(ids)
        found = rows >= 0
        if found.all():
            return Gathered(np.take(table.vectors, rows, axis=0), found)
        vectors = np.zeros((len(ids), self.dim), np.float32)
        vectors[found] = table.vectors[rows[found]]
        return Gathered(vectors, found)


@dataclass(frozen=True, eq=False)
class _IdTable:
    """Vectors of one entity kind, and the way from id to row.

    Attributes:
        vectors: (N, D) float32.
        hashes: (N,) uint64, ascending.
        rows: (N,) uint32, the row of each hash.
        offsets: (N + 1,) int64, where each row's id starts in ``text``.
        text: the ids in row order, UTF-8.
    """

    vectors: NDArray[np.float32]
    hashes: NDArray[np.uint64]
    rows: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    text: memoryview

    @classmethod
    def open(cls, folder: Path, entity: Entity) -> "_IdTable":
        def mapped(part: str) -> NDArray[Any]:
            array = np.load(folder / f"{entity}.{part}.npy", mmap_mode="r")
            return np.asarray(array)  # np.memmap itself spends microseconds on every slice

        with open(folder / f"{entity}.ids", "rb") as file:
            text = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return cls(mapped("vectors"), mapped("hashes"), mapped("rows"), mapped("offsets"), text)

    def rows_of(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the row of each id, -1 where it is unknown."""
        encoded = [id.encode(errors="surrogatepass") for id in ids]
        wanted = np.fromiter(map(xxhash.xxh3_64_intdigest, encoded), np.uint64, len(encoded))
        first = np.searchsorted(self.hashes, wanted)
        near = np.minimum(first, len(self.hashes) - 1)
        candidates = np.where(self.hashes[near] == wanted, self.rows[near].astype(np.int64), -1)
        starts = self.offsets[candidates].tolist()
        stops = self.offsets[candidates + 1].tolist()
        rows: list[int] = candidates.tolist()
        for at, (row, start, stop, id) in enumerate(zip(rows, starts, stops, encoded, strict=True)):
            if row >= 0 and self.text[start:stop] != id:
                rows[at] = self._after_collision(int(first[at]) + 1, wanted[at], id)
        return np.array(rows, dtype=np.int64)

    def _after_collision(self, at: int, wanted: np.uint64, id: bytes) -> int:
        while at < len(self.hashes) and self.hashes[at] == wanted:
            row = int(self.rows[at])
            if self.text[self.offsets[row] : self.offsets[row + 1]] == id:
                return row
            at += 1
        return -1


def _write(
    folder: Path, dim: int, counts: Mapping[Entity, int], batches: Iterable[VectorBatch]
) -> None:
    with ExitStack() as files:
        writers = {
            entity: _TableWriter(folder, entity, count, dim, files)
            for entity, count in counts.items()
        }
        for batch in batches:
            if batch.dim != dim:
                raise DimensionMismatch(f"{batch.entity} vectors", dim, batch.dim)
            if batch.entity not in writers:
                raise DimensionMismatch(f"number of {batch.entity} vectors", 0, len(batch.ids))
            writers[batch.entity].append(batch)
        for writer in writers.values():
            writer.finish()
    manifest = {"format": FORMAT, "dim": dim, "counts": {str(e): n for e, n in counts.items()}}
    (folder / _MANIFEST).write_bytes(orjson.dumps(manifest))
    for path in (*folder.iterdir(), folder):
        _sync(path)


class _TableWriter:
    def __init__(
        self, folder: Path, entity: Entity, count: int, dim: int, files: ExitStack
    ) -> None:
        self._folder, self._entity, self._count = folder, entity, count
        self._vectors = self._new("vectors", np.float32, (count, dim))
        self._offsets = self._new("offsets", np.int64, (count + 1,))
        self._hashes = np.empty(count, np.uint64)
        self._text = files.enter_context(open(folder / f"{entity}.ids", "wb"))  # noqa: SIM115
        self._written = 0

    def append(self, batch: VectorBatch) -> None:
        start, stop = self._written, self._written + len(batch.ids)
        if stop > self._count:
            raise DimensionMismatch(f"number of {self._entity} vectors", self._count, f"{stop}+")
        encoded = [check_id(id) for id in batch.ids]
        ends = np.cumsum([len(id) for id in encoded], dtype=np.int64)
        self._vectors[start:stop] = batch.vectors
        self._offsets[start + 1 : stop + 1] = self._offsets[start] + ends
        self._hashes[start:stop] = np.fromiter(
            map(xxhash.xxh3_64_intdigest, encoded), np.uint64, len(encoded)
        )
        self._text.write(b"".join(encoded))
        self._written = stop

    def finish(self) -> None:
        self._text.flush()
        if self._written != self._count:
            raise DimensionMismatch(f"number of {self._entity} vectors", self._count, self._written)
        order = np.argsort(self._hashes, kind="stable")
        self._refuse_duplicates(order)
        self._new("hashes", np.uint64, (self._count,))[:] = self._hashes[order]
        self._new("rows", np.uint32, (self._count,))[:] = order

    def _refuse_duplicates(self, order: NDArray[np.intp]) -> None:
        ordered = self._hashes[order]
        text = (self._folder / f"{self._entity}.ids").read_bytes()
        seen: set[bytes] = set()
        same_hash = np.isin(ordered, ordered[1:][ordered[1:] == ordered[:-1]])
        for row in order[same_hash]:
            id = text[self._offsets[row] : self._offsets[row + 1]]
            if id in seen:
                raise InvalidInput(f"The {self._entity} id {id.decode()!r} comes twice.")
            seen.add(id)

    def _new(self, part: str, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any]:
        # An empty array cannot be mapped; a snapshot without such vectors has no such files.
        path = self._folder / f"{self._entity}.{part}.npy"
        if 0 in shape:
            return np.empty(shape, dtype)
        array = open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
        with open(path, "r+b") as file:  # a full disk is an error here, a fatal signal in a page
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
