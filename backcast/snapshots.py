"""Snapshots on disk: one Parquet file an entity kind, and a manifest with counts and checksums.

Columns: ``entity`` string, ``id`` string, ``vector`` fixed_size_list<float32>[D].
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from datetime import datetime
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from backcast.artifacts import Artifacts, HashingFile, dump_json
from backcast.columns import decoding, ids_of, vectors_of
from backcast.errors import ArtifactCorrupt, DimensionMismatch, InvalidInput
from backcast.registry.database import utc_now
from backcast.vectors import VectorBatch
from backcast.versions import Entity, FileDigest, SnapshotRecord

FORMAT = 1
_ROWS = 16_384
_MANIFEST = "manifest.json"


def write_snapshot(
    artifacts: Artifacts, version: int, dim: int, batches: Iterable[VectorBatch]
) -> SnapshotRecord:
    """Write all ver-k vectors; the files are durable when this returns, the row is the caller's.

    Raises:
        InvalidInput: there are no vectors, or an id comes twice within an entity kind.
        DimensionMismatch: a batch is not of dimension ``dim``.
    """
    now = utc_now()
    folder = artifacts.new_folder("snapshots", f"v{version}-{now:%Y%m%dT%H%M%S}")
    return write_vectors(artifacts, folder, version, dim, _each_id_once(batches), now)


def write_vectors(
    artifacts: Artifacts,
    folder: str,
    version: int,
    dim: int,
    batches: Iterable[VectorBatch],
    created_at: datetime,
) -> SnapshotRecord:
    """Write vectors in the format of a snapshot, whose ids are known to come once only.

    Raises:
        InvalidInput: there are no vectors. DimensionMismatch: a batch is not of dimension ``dim``.
    """
    writers: dict[Entity, _EntityWriter] = {}
    try:
        with ExitStack() as stack:
            for batch in batches:
                if batch.dim != dim:
                    raise DimensionMismatch(f"vectors of version {version}", dim, batch.dim)
                if not len(batch.ids):
                    continue
                if batch.entity not in writers:
                    file = stack.enter_context(artifacts.create(folder, _name(batch.entity)))
                    parquet = stack.enter_context(pq.ParquetWriter(file, _schema(dim)))
                    writers[batch.entity] = _EntityWriter(batch.entity, file, parquet)
                writers[batch.entity].write(batch)
        if not writers:
            raise InvalidInput(f"Version {version} has no vectors to publish.")
        return _seal(artifacts, folder, version, dim, writers, created_at)
    except BaseException:
        artifacts.delete(folder)
        raise


def _seal(
    artifacts: Artifacts,
    folder: str,
    version: int,
    dim: int,
    writers: Mapping[Entity, "_EntityWriter"],
    created_at: datetime,
) -> SnapshotRecord:
    manifest = {
        "format": FORMAT,
        "version": version,
        "dim": dim,
        "files": {
            str(entity): {
                "name": _name(entity),
                "count": writer.count,
                "size": writer.file.digest.size,
                "sha256": writer.file.digest.sha256,
            }
            for entity, writer in writers.items()
        },
    }
    digest = artifacts.write(folder, {_MANIFEST: dump_json(manifest)})[_MANIFEST]
    return SnapshotRecord(
        id=folder.rpartition("/")[2],
        version=version,
        dim=dim,
        counts={str(entity): writer.count for entity, writer in writers.items()},
        folder=folder,
        manifest_sha256=digest.sha256,
        head=0,
        created_at=created_at,
    )


class _EntityWriter:
    """Writes one Parquet file."""

    def __init__(self, entity: Entity, file: HashingFile, parquet: pq.ParquetWriter) -> None:
        self.entity = entity
        self.file = file
        self.count = 0
        self._parquet = parquet

    def write(self, batch: VectorBatch) -> None:
        for piece in batch.slices(_ROWS):
            vectors = pa.FixedSizeListArray.from_arrays(
                pa.array(piece.vectors.reshape(-1)), batch.dim
            )
            entity = pa.repeat(pa.scalar(str(self.entity)), len(piece.ids))
            columns = [entity, pa.array(piece.ids, pa.string()), vectors]
            self._parquet.write_table(pa.Table.from_arrays(columns, schema=_schema(batch.dim)))
            self.count += len(piece.ids)


def _each_id_once(batches: Iterable[VectorBatch]) -> Iterator[VectorBatch]:
    """Yield the batches, and remember a hash of each id so that none comes twice."""
    hashes: dict[Entity, list[NDArray[np.void]]] = {}
    for batch in batches:
        yield batch
        digests = b"".join(xxhash.xxh3_128_digest(id.encode()) for id in batch.ids)
        hashes.setdefault(batch.entity, []).append(np.frombuffer(digests, dtype="V16"))
    for entity, known in hashes.items():
        _refuse_duplicates(entity, known)


def _refuse_duplicates(entity: Entity, hashes: list[NDArray[np.void]]) -> None:
    halves = np.concatenate(hashes).view("<u8").reshape(-1, 2)
    ordered = halves[np.lexsort((halves[:, 1], halves[:, 0]))]
    repeated = int((ordered[1:] == ordered[:-1]).all(axis=1).sum())
    if repeated:
        raise InvalidInput(f"{repeated} {entity} ids come more than once.")


def _name(entity: Entity) -> str:
    return f"{entity}.parquet"


def _schema(dim: int) -> pa.Schema:
    vector = pa.list_(pa.float32(), dim)
    return pa.schema([("entity", pa.string()), ("id", pa.string()), ("vector", vector)])


class Registered(Protocol):
    """What must be known of files in this format to read them."""

    @property
    def dim(self) -> int: ...
    @property
    def counts(self) -> Mapping[str, int]: ...
    @property
    def folder(self) -> str: ...
    @property
    def manifest_sha256(self) -> str: ...


def read_snapshot(artifacts: Artifacts, record: Registered) -> Iterator[VectorBatch]:
    """Yield all vectors of a snapshot, every checksum verified before the first row of a file.

    Raises:
        ArtifactMissing, ArtifactCorrupt: a file is gone, or not what was registered.
    """
    for entity, entry in _read_files(artifacts, record).items():
        where = artifacts.url(record.folder, _name(entity))
        seen = 0
        with (
            artifacts.open(record.folder, _name(entity), entry["sha256"]) as file,
            decoding(where),
        ):
            parquet = pq.ParquetFile(file, pre_buffer=False)  # or all of it is held
            if not parquet.schema_arrow.equals(_schema(record.dim)):
                raise ArtifactCorrupt(where, f"its columns are not those of dim {record.dim}")
            for rows in parquet.iter_batches(batch_size=_ROWS):
                batch = _batch(entity, rows)
                seen += len(batch.ids)
                yield batch
        if seen != entry["count"] or seen != record.counts.get(entity):
            raise ArtifactCorrupt(where, f"it holds {seen} rows, not {entry['count']}")


def read_ids(artifacts: Artifacts, record: Registered, entity: Entity) -> Iterator[list[str]]:
    """Yield the ids of one entity kind, some at a time, without their vectors.

    The column is read alone, so no checksum is verified: for reports and searches, not to serve.
    """
    if entity not in _read_files(artifacts, record):
        return
    where = artifacts.url(record.folder, _name(entity))
    with artifacts.open_unchecked(record.folder, _name(entity)) as file, decoding(where):
        parquet = pq.ParquetFile(file, pre_buffer=False)
        for rows in parquet.iter_batches(batch_size=_ROWS, columns=["id"]):
            yield ids_of(rows.column("id"))


def files_of(artifacts: Artifacts, record: Registered) -> dict[str, FileDigest]:
    """Return the files of a snapshot by name, its manifest first, each with what it must be.

    Raises:
        ArtifactMissing, ArtifactCorrupt: the manifest is gone, or not what was registered.
    """
    files = {
        _name(entity): FileDigest(entry["size"], entry["sha256"])
        for entity, entry in _read_files(artifacts, record).items()
    }
    return {_MANIFEST: FileDigest(0, record.manifest_sha256), **files}


def _read_files(artifacts: Artifacts, record: Registered) -> dict[Entity, Any]:
    """Return what the manifest says of each file; their names are known without it."""
    manifest = artifacts.read_json(record.folder, _MANIFEST, record.manifest_sha256)
    where = artifacts.url(record.folder, _MANIFEST)
    try:
        made = manifest["format"], manifest["dim"]
        files = {Entity(kind): dict(entry) for kind, entry in manifest["files"].items()}
        complete = all({"count", "size", "sha256"} <= set(entry) for entry in files.values())
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactCorrupt(where, "it is no manifest of a snapshot") from error
    if made != (FORMAT, record.dim):
        raise ArtifactCorrupt(where, f"format {made[0]!s:.20}, dim {made[1]!s:.20}")
    if not complete:
        raise ArtifactCorrupt(where, "it does not give the count, size and sha256 of each file")
    return files


def _batch(entity: Entity, rows: pa.RecordBatch) -> VectorBatch:
    return VectorBatch(entity, ids_of(rows.column("id")), vectors_of(rows.column("vector")))
