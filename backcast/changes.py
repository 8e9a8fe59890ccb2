"""What changed in a snapshot since it was published, and the snapshot seen with it.

A snapshot S is immutable; an upsert or an erasure is a numbered delta on it, a file of its own,
and S.d is S with the first d of them. The changed ids and their vectors are few and stay in memory,
over the store's snapshot; a new snapshot takes them up.

Columns of a delta's file: ``entity`` string, ``id`` string and, of an upsert, ``vector``
fixed_size_list<float32>[D].
"""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import repeat

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from backcast.artifacts import Artifacts
from backcast.columns import decoding, ids_of, vectors_of
from backcast.errors import InvalidInput
from backcast.stores import Gathered, Rounding, StoredSnapshot
from backcast.vectors import VectorBatch
from backcast.versions import DeltaDraft, DeltaKind, DeltaRecord, Entity

_NAME = "delta.parquet"
_ROWS = 10_000


@dataclass(frozen=True, eq=False)
class Delta:
    """New vectors of some ids of one entity kind, or their end.

    Attributes:
        ids: n different ids.
        vectors: (n, D_k) float32, finite; None where the ids are erased.
    """

    entity: Entity
    ids: Sequence[str]
    vectors: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if len(set(self.ids)) != len(self.ids):
            [(twice, _)] = Counter(self.ids).most_common(1)
            raise InvalidInput(f"The {self.entity} {twice!r} comes more than once.")

    @property
    def kind(self) -> DeltaKind:
        """What it does."""
        return DeltaKind.ERASE if self.vectors is None else DeltaKind.UPSERT


def write_delta(artifacts: Artifacts, delta: Delta, actor: str) -> DeltaDraft:
    """Write a delta to a file of its own, durable when this returns; the row is the caller's."""
    columns = {
        "entity": pa.repeat(pa.scalar(str(delta.entity)), len(delta.ids)),
        "id": pa.array(delta.ids, pa.string()),
    }
    if delta.vectors is not None:
        numbers = pa.array(np.ascontiguousarray(delta.vectors, np.float32).reshape(-1))
        columns["vector"] = pa.FixedSizeListArray.from_arrays(numbers, delta.vectors.shape[1])
    content = io.BytesIO()
    pq.write_table(pa.table(columns), content)
    folder = artifacts.new_folder("deltas", str(delta.kind))
    try:
        digest = artifacts.write(folder, {_NAME: content.getvalue()})[_NAME]
    except BaseException:
        artifacts.delete(folder)
        raise
    return DeltaDraft(
        delta.kind, delta.entity, len(delta.ids), f"{folder}/{_NAME}", digest.sha256, actor
    )


def discard_delta(artifacts: Artifacts, draft: DeltaDraft) -> None:
    """Delete the file of a delta that no row names."""
    artifacts.delete(draft.file.rpartition("/")[0])


def read_delta(artifacts: Artifacts, record: DeltaRecord) -> Delta:
    """Read a delta back; raise ArtifactMissing or ArtifactCorrupt."""
    folder, _, name = record.file.rpartition("/")
    content = artifacts.read(folder, name, record.sha256)
    with decoding(artifacts.url(folder, name)):
        # Four times as fast as ``read_table``, and there may be thousands of such files.
        parquet = pq.ParquetFile(io.BytesIO(content))
        _demand_count(parquet.metadata.num_rows, record)
        is_upsert = record.kind is DeltaKind.UPSERT
        columns = ["id", "vector"] if is_upsert else ["id"]
        table = parquet.read(columns=columns, use_threads=False)
        _demand_count(table.num_rows, record)  # row groups have counts of their own
        ids = ids_of(table.column("id"))
        if not is_upsert:
            return Delta(record.entity, ids)
        vectors = vectors_of(table.column("vector").combine_chunks())
        batch = VectorBatch(record.entity, ids, vectors)
        return Delta(batch.entity, batch.ids, batch.vectors)


def _demand_count(rows: int, record: DeltaRecord) -> None:
    if rows != record.count:
        raise InvalidInput(f"it holds {rows} rows, not {record.count}")


_UNCHANGED = (-1, -1)  # known by its identity

Place = tuple[int, int] | None
"""Where the vector of a changed id lies: the number of the delta and the row; None: erased."""


@dataclass(frozen=True, eq=False)
class Changes:
    """What all deltas on a snapshot amount to; immutable.

    Attributes:
        places: of each changed id, by entity kind.
        vectors: of each upsert, (n, D_k) float32, by the number of the delta.
    """

    places: Mapping[Entity, Mapping[str, Place]] = field(default_factory=dict)
    vectors: Mapping[int, NDArray[np.float32]] = field(default_factory=dict)

    def after(self, deltas: Iterable[tuple[int, Delta]]) -> "Changes":
        """Return these changes and further deltas, each with its number."""
        places = {entity: dict(known) for entity, known in self.places.items()}
        vectors = dict(self.vectors)
        for number, delta in deltas:
            known = places.setdefault(delta.entity, {})
            if delta.vectors is None:
                known.update(dict.fromkeys(delta.ids))
            else:
                vectors[number] = delta.vectors
                known.update((id, (number, row)) for row, id in enumerate(delta.ids))
        return Changes(places, vectors)

    def upserted(self, entity: Entity) -> list[str]:
        """Return the ids that have a new vector, in the order of their first change."""
        return [id for id, place in self.places.get(entity, {}).items() if place is not None]

    def erased(self, entity: Entity) -> list[str]:
        """Return the ids that have no vector any more."""
        return [id for id, place in self.places.get(entity, {}).items() if place is None]

    def vectors_of(self, entity: Entity, ids: Sequence[str]) -> NDArray[np.float32]:
        """Return the new vectors of upserted ids, (n, D_k)."""
        known = self.places[entity]
        return np.stack([self._vector(known[id]) for id in ids])

    def batches(self) -> Iterator[VectorBatch]:
        """Yield the vectors of all upserted ids."""
        for entity in self.places:
            yield from self.batches_of(entity, self.upserted(entity))

    def batches_of(self, entity: Entity, ids: Sequence[str]) -> Iterator[VectorBatch]:
        """Yield the vectors of some upserted ids."""
        for start in range(0, len(ids), _ROWS):
            piece = ids[start : start + _ROWS]
            yield VectorBatch(entity, piece, self.vectors_of(entity, piece))

    def put_into(self, entity: Entity, ids: Sequence[str], gathered: Gathered) -> None:
        """Overwrite what was gathered for ``ids`` where they were changed."""
        known = self.places.get(entity)
        if not known:
            return
        changed: dict[int | None, tuple[list[int], list[int]]] = {}  # by delta: rows, and its rows
        for row, place in enumerate(map(known.get, ids, repeat(_UNCHANGED))):
            if place is not _UNCHANGED:
                number, at = place or (None, 0)
                rows, places = changed.setdefault(number, ([], []))
                rows.append(row)
                places.append(at)
        for number, (rows, places) in changed.items():
            gathered.vectors[rows] = 0 if number is None else self.vectors[number][places]
            gathered.found[rows] = number is not None

    def _vector(self, place: Place) -> NDArray[np.float32]:
        assert place is not None
        number, row = place
        vector: NDArray[np.float32] = self.vectors[number][row]
        return vector


def read_changes(
    artifacts: Artifacts, records: Iterable[DeltaRecord], before: Changes | None = None
) -> Changes:
    """Read deltas and add them to those ``before``; raise ArtifactMissing or ArtifactCorrupt."""
    deltas = ((record.number, read_delta(artifacts, record)) for record in records)
    return (before or Changes()).after(deltas)


def changed_batches(batches: Iterable[VectorBatch], changes: Changes) -> Iterator[VectorBatch]:
    """Yield the vectors of S.d, given those of S: without the changed ids, then the new ones."""
    for batch in batches:
        known = changes.places.get(batch.entity, {})
        yield batch.only([row for row, id in enumerate(batch.ids) if id not in known])
    yield from changes.batches()


class ChangedSnapshot:
    """S.d: a stored snapshot and the changes on it, read as one; see ``StoredSnapshot``."""

    def __init__(self, stored: StoredSnapshot, changes: Changes) -> None:
        self.stored, self.changes = stored, changes
        self.dim: int = stored.dim
        self.size: int = stored.size
        self.rounding: Rounding = stored.rounding

    @cached_property
    def counts(self) -> Mapping[Entity, int]:
        """Vectors held by entity kind, with the changes."""
        counts = dict(self.stored.counts)
        for entity, known in self.changes.places.items():
            ids = list(known)
            before = int(self.stored.gather(entity, ids).found.sum())
            after = len(self.changes.upserted(entity))
            counts[entity] = counts.get(entity, 0) - before + after
        return counts

    def gather(self, entity: Entity, ids: Sequence[str]) -> Gathered:
        """Return the vectors of ``ids``; order and duplicates kept."""
        gathered = self.stored.gather(entity, ids)
        self.changes.put_into(entity, ids, gathered)
        return gathered
