"""The embedded store: NumPy files in a folder of one host, shared through the page cache.

One folder a snapshot, written under another name, synced, then renamed, so that it is there whole
or not at all. For each entity kind it holds the matrix in arrival order, the ids as one run of
UTF-8 with offsets, and an index: the ids' 64-bit hashes in order, beside the row each belongs to,
and where the hashes with each run of leading bits start. A lookup begins there, goes on to the
hash, and compares the id's bytes, so a collision of hashes costs a step and never an error. Many
ids are looked up together, by NumPy and Arrow; for a few, plain Python is faster. Everything is
memory-mapped: a worker that opens a snapshot reads only the pages it needs and shares them with
every other worker.
"""

import fcntl
import mmap
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from backcast.errors import DimensionMismatch, InvalidInput, SnapshotNotLoaded, StoreError
from backcast.folders import make_private
from backcast.stores.base import Gathered
from backcast.stores.precision import Precision, Rounder, Rounding
from backcast.vectors import VectorBatch, check_id
from backcast.versions import Entity

FORMAT = 2
_MANIFEST = "manifest.json"
_UNFINISHED = ".unfinished-"
_FEW = 16  # ids that are found sooner one by one


class EmbeddedStore:
    """A vector store in a local folder. For one host: other hosts do not see its files."""

    def __init__(self, folder: Path, precision: Precision = Precision.FLOAT32) -> None:
        self._folder, self._precision = folder, precision
        try:
            make_private(folder)
        except OSError as error:
            raise StoreError(f"The store folder {folder} cannot be made: {error}.") from error

    def load(
        self,
        snapshot: str,
        dim: int,
        counts: Mapping[Entity, int],
        batches: Iterable[VectorBatch],
        precision: Precision | None = None,
    ) -> None:
        """Load a snapshot; see the port. Loads of one store run one after another."""
        target = self._folder / snapshot
        if target.exists():
            return  # at once: another load may take long, and somebody want to go back
        with self._writing():
            if target.exists():
                return
            unfinished = self._folder / f"{_UNFINISHED}{snapshot}"
            unfinished.mkdir()
            try:
                _write(unfinished, dim, counts, batches, Rounder(precision or self._precision))
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

    def remains(self) -> list[str]:
        """Return what was left half written or half deleted, sorted."""
        left = (path.name for path in self._folder.glob(f"{_UNFINISHED}*"))
        return sorted(name.removeprefix(_UNFINISHED) for name in left)

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
            raise ValueError(
                f"it has format {manifest['format']}, not {FORMAT}; publish and promote it again"
            )
        self.dim: int = manifest["dim"]
        self.counts = {Entity(name): count for name, count in manifest["counts"].items()}
        self.rounding = Rounding.read(manifest["rounding"])
        self.size = sum(path.stat().st_size for path in folder.iterdir())
        self._tables = {entity: _IdTable(folder, entity) for entity, n in self.counts.items() if n}

    def gather(self, entity: Entity, ids: Sequence[str]) -> Gathered:
        """Return the vectors of ``ids``; order and duplicates kept."""
        table = self._tables.get(entity)
        if table is None:
            return Gathered(
                np.zeros((len(ids), self.dim), np.float32), np.zeros(len(ids), dtype=bool)
            )
        rows = table.rows_of(ids)
        found = rows >= 0
        vectors = self.rounding.precision.widen(table.vectors.take(rows, axis=0))
        if not found.all():
            vectors[~found] = 0
        return Gathered(vectors, found)


class _IdTable:
    """Vectors of one entity kind, and the way from id to row.

    Attributes:
        vectors: (N, D) of the precision's dtype.
    """

    def __init__(self, folder: Path, entity: Entity) -> None:
        def mapped(part: str) -> NDArray[Any]:
            array = np.load(folder / f"{entity}.{part}.npy", mmap_mode="r")
            return np.asarray(array)  # np.memmap itself spends microseconds on every slice

        with open(folder / f"{entity}.ids", "rb") as file:
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        offsets = mapped("offsets")  # (N + 1,) int64, where each row's id starts in the text
        self.vectors = mapped("vectors")
        self._hashes: NDArray[np.uint64] = mapped("hashes")  # (N + 1,), ascending
        self._rows: NDArray[np.uint32] = mapped("rows")  # (N + 1,), the row of each hash
        self._starts: NDArray[np.uint32] = mapped("starts")  # by leading bits, the first hash
        self._shift = _shift(len(self._starts))
        self._ids = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(text)]
        )
        # The same pages again, in the form that Python reads single values from most quickly.
        self._hash_at, self._row_at = self._hashes.data, self._rows.data
        self._start_at, self._offset_at = self._starts.data, offsets.data
        self._text = text

    def rows_of(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Return the row of each id, -1 where it is unknown."""
        encoded = _encoded(ids)
        if len(encoded) <= _FEW:
            return np.array([self._row_of(id) for id in encoded], dtype=np.int64)
        wanted = np.fromiter(map(xxhash.xxh3_64_intdigest, encoded), np.uint64, len(encoded))
        at = self._starts[wanted >> np.uint64(self._shift)].astype(np.int64)
        behind = np.flatnonzero(self._hashes[at] < wanted)
        while behind.size:
            at[behind] += 1
            behind = behind[self._hashes[at[behind]] < wanted[behind]]
        rows: NDArray[np.int64] = self._rows[at].astype(np.int64)
        known = self._hashes[at] == wanted
        same = pc.equal(self._ids.take(pa.array(rows)), pa.array(encoded, pa.large_binary()))
        right: NDArray[np.bool_] = known & same.to_numpy(zero_copy_only=False)
        rows[~right] = -1
        for collided in np.flatnonzero(known & ~right):  # another id has this hash too
            rows[collided] = self._row_of(encoded[collided])
        return rows

    def _row_of(self, id: bytes) -> int:
        wanted = xxhash.xxh3_64_intdigest(id)
        hashes, offsets = self._hash_at, self._offset_at
        at = self._start_at[wanted >> self._shift]
        while hashes[at] < wanted:
            at += 1
        while at < len(hashes) - 1 and hashes[at] == wanted:
            row = self._row_at[at]
            if self._text[offsets[row] : offsets[row + 1]] == id:
                return row
            at += 1
        return -1


def _encoded(ids: Sequence[str]) -> list[bytes]:
    try:
        return list(map(str.encode, ids))
    except UnicodeEncodeError:  # an id that is no text is unknown, not an error
        return [id.encode(errors="surrogatepass") for id in ids]


def _shift(starts: int) -> int:
    return 65 - starts.bit_length()


def _write(
    folder: Path,
    dim: int,
    counts: Mapping[Entity, int],
    batches: Iterable[VectorBatch],
    rounder: Rounder,
) -> None:
    with ExitStack() as files:
        writers = {
            entity: _TableWriter(folder, entity, count, dim, rounder, files)
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
    manifest = {
        "format": FORMAT,
        "dim": dim,
        "counts": {str(e): n for e, n in counts.items()},
        "rounding": asdict(rounder.total),
    }
    (folder / _MANIFEST).write_bytes(orjson.dumps(manifest))
    for path in (*folder.iterdir(), folder):
        _sync(path)


class _TableWriter:
    def __init__(
        self,
        folder: Path,
        entity: Entity,
        count: int,
        dim: int,
        rounder: Rounder,
        files: ExitStack,
    ) -> None:
        self._folder, self._entity, self._count = folder, entity, count
        self._rounder = rounder
        self._vectors = self._new("vectors", rounder.precision.dtype, (count, dim))
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
        self._vectors[start:stop] = self._rounder(batch)
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
        if self._count:
            self._write_index(order)

    def _write_index(self, order: NDArray[np.intp]) -> None:
        # The last hash is a sentinel: none is larger, so a search ends there.
        hashes = self._new("hashes", np.uint64, (self._count + 1,))
        hashes[:-1], hashes[-1] = self._hashes[order], np.iinfo(np.uint64).max
        rows = self._new("rows", np.uint32, (self._count + 1,))
        rows[:-1], rows[-1] = order, 0
        starts = self._new("starts", np.uint32, (1 << max(1, (self._count - 1).bit_length()),))
        firsts = np.arange(len(starts), dtype=np.uint64) << np.uint64(_shift(len(starts)))
        starts[:] = np.searchsorted(hashes, firsts)

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
