"""What still holds an erased id, and when that goes."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from backcast.changes import read_changes, read_delta
from backcast.errors import ArtifactError, BackcastError, SnapshotNotLoaded, StoreError
from backcast.lifecycle.places import Backcast
from backcast.snapshots import read_ids
from backcast.versions import DeltaKind, Entity, Live, SnapshotRecord

_COMPACT = "backcast refresh --compact writes a snapshot without it; this one goes after its grace"


@dataclass(frozen=True)
class Holder:
    """Files that still hold an erased id or its vector; no answer is made from them.

    Attributes:
        what: "snapshot", "deltas" (files of the changes on it) or "data set".
        name: the snapshot's id, or the data set's folder.
        version: whose vectors they are; None of a data set.
        state: of a snapshot: "live", "superseded", "published" or "condemned"; else None.
        places: where: "artifacts", "store", or both.
        ids: how many of the erased ids; None where that was not looked at, or could not be.
        until: when the files go by themselves; None where they do not.
        mend: what makes them go.
    """

    what: str
    name: str
    version: int | None
    state: str | None
    places: tuple[str, ...]
    ids: int | None
    until: datetime | None
    mend: str


@dataclass(frozen=True)
class ErasureReport:
    """What an erasure did, and what it could not do at once.

    Attributes:
        ids: how many were erased.
        live: what is live then, None where nothing is.
        unknown: the ids that no snapshot and no delta holds; they are erased all the same.
        holders: what still holds some of the others.
    """

    entity: Entity
    ids: int
    live: Live | None
    unknown: tuple[str, ...]
    holders: tuple[Holder, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every snapshot and delta could be looked through."""
        return all(h.ids is not None or h.what == "data set" for h in self.holders)

    def document(self) -> dict[str, Any]:
        """Return the report as a JSON document."""
        return {
            "entity": str(self.entity),
            "erased": self.ids,
            "snapshot": self.live.name if self.live else None,
            "live_version": self.live.version if self.live else None,
            "unknown": list(self.unknown),
            "held_by": [asdict(holder) for holder in self.holders],
        }


def report_remains(
    backcast: Backcast, entity: Entity, ids: Sequence[str], live: Live | None, grace: timedelta
) -> ErasureReport:
    """Look through snapshots, deltas and what is known of data sets for erased ids.

    What cannot be read is reported as such: the erasure itself is done.
    """
    wanted, found, holders = frozenset(ids), set[str](), list[Holder]()
    for record in backcast.registry.snapshots.undeleted():
        fate = _fate(record, live, grace)
        for what, look in (("snapshot", _in_snapshot), ("deltas", _in_deltas)):
            try:
                places, held = look(backcast, record, entity, wanted)
            except BackcastError as error:
                unread = f"not looked at: {error.message}"
                holders.append(
                    Holder(what, record.id, record.version, fate[0], (), None, fate[1], unread)
                )
                continue
            found |= held
            if held:
                holders.append(
                    Holder(what, record.id, record.version, fate[0], places, len(held), *fate[1:])
                )
    holders += [_dataset(folder) for folder in backcast.registry.snapshots.datasets()]
    unknown = tuple(id for id in ids if id not in found)
    return ErasureReport(entity, len(ids), live, unknown, tuple(holders))


def served_as(
    backcast: Backcast, live: Live, entity: Entity, ids: Sequence[str]
) -> tuple[str, ...]:
    """Return those of ``ids`` that are live as ``entity``; none where that cannot be read."""
    try:
        gathered = backcast.store.open(live.snapshot).gather(entity, ids)
        deltas = backcast.registry.deltas.of(live.snapshot, upto=live.delta)
        read_changes(backcast.artifacts, deltas).put_into(entity, ids, gathered)
    except (ArtifactError, StoreError):
        return ()
    return tuple(id for id, found in zip(ids, gathered.found, strict=True) if found)


def _fate(
    record: SnapshotRecord, live: Live | None, grace: timedelta
) -> tuple[str, datetime | None, str]:
    if live is not None and record.id == live.snapshot:
        return "live", None, _COMPACT
    if record.condemned_at is not None:
        return "condemned", record.condemned_at, "it is being deleted"
    if record.superseded_at is not None:
        return "superseded", record.superseded_at + grace, "it is deleted after its grace period"
    return "published", None, f"publish version {record.version} again, and promote that"


def _in_snapshot(
    backcast: Backcast, record: SnapshotRecord, entity: Entity, ids: frozenset[str]
) -> tuple[tuple[str, ...], frozenset[str]]:
    wanted = sorted(ids)
    try:
        stored = backcast.store.open(record.id).gather(entity, wanted).found
    except SnapshotNotLoaded:
        pass
    else:
        known = frozenset(id for id, there in zip(wanted, stored, strict=True) if there)
        return ("artifacts", "store"), known
    listed = read_ids(backcast.artifacts, record, entity)
    return ("artifacts",), frozenset(id for some in listed for id in ids.intersection(some))


def _in_deltas(
    backcast: Backcast, record: SnapshotRecord, entity: Entity, ids: frozenset[str]
) -> tuple[tuple[str, ...], frozenset[str]]:
    upserts: Iterable[Sequence[str]] = (
        read_delta(backcast.artifacts, delta).ids
        for delta in backcast.registry.deltas.of(record.id)
        if delta.kind is DeltaKind.UPSERT and delta.entity is entity
    )
    return ("artifacts",), frozenset(id for some in upserts for id in ids.intersection(some))


def _dataset(folder: str) -> Holder:
    mend = "interactions are not looked at: take the id out of the folder before it is used again"
    return Holder("data set", folder, None, None, (), None, None, mend)
