"""What was put on a version stays when its vectors are computed anew.

Only ids that were put are kept so: an id that was computed once and is not any more has left the
data. Which ids of a snapshot were put is a file beside its own, as after a refresh nothing else
would tell.
"""

import io
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from backcast.artifacts import Artifacts
from backcast.changes import Changes, read_changes
from backcast.errors import ArtifactError
from backcast.registry import Erased, Registry
from backcast.snapshots import read_snapshot
from backcast.vectors import VectorBatch
from backcast.versions import DeltaKind, Entity, Live, SnapshotRecord

PUT_FILE = "put.parquet"


@dataclass(frozen=True, eq=False)
class Folding:
    """The ids that were put on a snapshot while it was live, or on one that it took them over from.

    Attributes:
        artifacts: where the files lie.
        snapshot: what was live last of the version; None where nothing is taken over.
        changes: the deltas on it.
        earlier: ids that were put before it was written, and not changed since.
        erased: ids that are left out.
        added: the ids that were added to the newer vectors, filled while ``batches`` is read.
    """

    artifacts: Artifacts
    snapshot: SnapshotRecord | None = None
    changes: Changes = field(default_factory=Changes)
    earlier: Mapping[Entity, AbstractSet[str]] = field(default_factory=dict)
    erased: Erased = field(default_factory=Erased)
    added: dict[Entity, list[str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        registry: Registry,
        artifacts: Artifacts,
        base: Live | None,
        erased: Erased,
    ) -> Self:
        """Find what newer vectors must take over from the last state of their version.

        Of what was told to it later, only erasures count: who is put again elsewhere is on the list
        of the ``erased`` no more, and does not get an older vector back.
        """
        if base is None:
            return cls(artifacts)
        snapshot = registry.snapshots.get(base.snapshot)
        told = registry.deltas.of(base.snapshot)
        counting = [d for d in told if d.number <= base.delta or d.kind is DeltaKind.ERASE]
        changes = read_changes(artifacts, counting)
        put = _read_put(artifacts, snapshot, registry.snapshots.details(base.snapshot))
        earlier = {entity: ids - changes.places.get(entity, {}).keys() for entity, ids in put}
        return cls(artifacts, snapshot, changes, earlier, erased)

    def computed(self, batches: Iterable[VectorBatch]) -> Iterator[VectorBatch]:
        """Yield the vectors of that snapshot that were neither put nor changed."""
        for batch in batches:
            changed = self.changes.places.get(batch.entity, {})
            earlier = self.earlier.get(batch.entity, frozenset())
            yield batch.only(
                [row for row, id in enumerate(batch.ids) if id not in changed and id not in earlier]
            )

    def batches(self, newer: Iterable[VectorBatch]) -> Iterator[VectorBatch]:
        """Yield newer vectors, then those that were put and are not among them."""
        earlier = {entity: self._kept(entity, ids) for entity, ids in self.earlier.items()}
        upserted = {e: self._kept(e, self.changes.upserted(e)) for e in self.changes.places}
        for batch in newer:
            for lacking in (earlier, upserted):
                for id in batch.ids if lacking.get(batch.entity) else ():
                    lacking[batch.entity].pop(id, None)
            yield batch
        for batch in self._written(earlier):
            yield self._noted(batch)
        for entity, ids in upserted.items():
            for batch in self.changes.batches_of(entity, list(ids)):
                yield self._noted(batch)

    def write(self, folder: str) -> dict[str, Any]:
        """Write which ids were added beside the snapshot's files; return what to note of it."""
        columns = {
            "entity": [str(entity) for entity, ids in self.added.items() for _ in ids],
            "id": [id for ids in self.added.values() for id in ids],
        }
        if not columns["id"]:
            return {}
        content = io.BytesIO()
        pq.write_table(pa.table(columns), content)
        digest = self.artifacts.write(folder, {PUT_FILE: content.getvalue()})[PUT_FILE]
        return {"put": {"count": len(columns["id"]), "sha256": digest.sha256}}

    def _kept(self, entity: Entity, ids: Iterable[str]) -> dict[str, None]:
        return dict.fromkeys(id for id in ids if not self.erased.covers(entity, id))

    def _written(self, wanted: Mapping[Entity, Mapping[str, None]]) -> Iterator[VectorBatch]:
        if self.snapshot is None or not any(wanted.values()):
            return
        for batch in read_snapshot(self.artifacts, self.snapshot):
            ids = wanted.get(batch.entity, {})
            yield batch.only([row for row, id in enumerate(batch.ids) if id in ids])

    def _noted(self, batch: VectorBatch) -> VectorBatch:
        self.added.setdefault(batch.entity, []).extend(batch.ids)
        return batch


def _read_put(
    artifacts: Artifacts, snapshot: SnapshotRecord, details: Mapping[str, Any]
) -> list[tuple[Entity, AbstractSet[str]]]:
    if "put" not in details:
        return []
    try:
        content = artifacts.read(snapshot.folder, PUT_FILE, details["put"]["sha256"])
    except ArtifactError as error:  # without it, what was put would be lost unnoticed
        mend = "It says which ids were put; copy it from a backup, where it has the same name."
        raise type(error).rebuild(f"{error.message} {mend}", error.data) from error
    table = pq.read_table(io.BytesIO(content))
    ids: dict[Entity, set[str]] = {}
    for entity, id in zip(*(table.column(c).to_pylist() for c in ("entity", "id")), strict=True):
        ids.setdefault(Entity(entity), set()).add(id)
    return list(ids.items())
