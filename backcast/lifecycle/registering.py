"""Versions and snapshots are written: files first, then one row in one transaction."""

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self

from backcast.artifacts import Artifacts
from backcast.changes import (
    Delta,
    discard_delta,
    read_delta,
    write_delta,
)
from backcast.errors import (
    ArtifactMissing,
    Conflict,
    InvalidInput,
    UnknownVersion,
    VersionRetired,
)
from backcast.lifecycle.folding import Folding
from backcast.registry import Erased, NumberTaken, Registry, StateMoved, VersionDraft
from backcast.snapshots import read_ids, write_snapshot
from backcast.vectors import VectorBatch
from backcast.versions import (
    DeltaDraft,
    DeltaKind,
    Entity,
    Live,
    SnapshotRecord,
    Version,
    VersionState,
)


def register_version(
    registry: Registry, artifacts: Artifacts, draft: VersionDraft, files: Mapping[str, bytes]
) -> Version:
    """Write a version's files, then its row and those of its maps in one transaction.

    The number in ``draft`` is a proposal: where another trainer took it meanwhile, the next free
    one is given. ``draft.folder`` and ``draft.files`` are filled in here.
    """
    while True:
        folder = artifacts.new_folder("versions", f"v{draft.number}")
        try:
            draft = replace(draft, folder=folder, files=artifacts.write(folder, files))
        except BaseException:
            artifacts.delete(folder)
            raise
        # Only a row that was refused frees its files: where the answer to a commit is lost, the
        # row may be there, and files that no row names are only litter.
        try:
            return registry.versions.register(draft)
        except NumberTaken:
            artifacts.delete(folder)
            draft = _renumbered(draft, registry.versions.next_number())
        except (InvalidInput, UnknownVersion):
            artifacts.delete(folder)
            raise


def _renumbered(draft: VersionDraft, number: int) -> VersionDraft:
    if draft.parent is None:
        raise Conflict("Version 0 was registered meanwhile; train against it as the parent.")
    maps = tuple(replace(t, source=number) for t in draft.transforms)
    return replace(draft, number=number, transforms=maps)


@dataclass(frozen=True)
class Base:
    """What there was when the making of vectors began: what changed later is newer than they."""

    live: Live | None
    erased: Erased

    @classmethod
    def now(cls, registry: Registry) -> Self:
        """Look."""
        return cls(registry.deployments.live(), registry.erasures.all())

    def last(self, registry: Registry, version: int) -> Live | None:
        """Return the state of ``version`` that was live last by then.

        None where it never was, or its files may be gone.
        """
        if self.live is None or self.live.version == version:
            return self.live
        delta = None  # that was the last when the next one came
        for arrival in registry.deployments.history():
            if arrival["version"] == version and arrival["generation"] < self.live.generation:
                left = registry.snapshots.get(arrival["snapshot"])
                found = Live(version, left.id, delta or 0, arrival["generation"])
                return found if left.condemned_at is None else None
            delta = arrival["from_delta"]
        return None


def demand_promotable(version: Version) -> None:
    """Raise where no snapshot of a version can ever go live.

    Raises:
        VersionRetired, Conflict: it is retired, or was rejected.
    """
    if version.state is VersionState.RETIRED:
        raise VersionRetired(version.number, None)
    if version.state is VersionState.REJECTED:
        raise Conflict(
            f"Version {version.number} was rejected and cannot be promoted.",
            version=version.number,
        )


def publish(
    registry: Registry,
    artifacts: Artifacts,
    version: int,
    batches: Iterable[VectorBatch],
    details: Mapping[str, Any],
    *,
    base: Base | None = None,
) -> SnapshotRecord:
    """Write a snapshot of ``version`` and register it; it can be promoted when this returns.

    Erased ids are left out, those too that are erased while this goes on, be they put again by the
    end of it. Ids that were put on the version while it was live, and that ``batches`` lack, are
    added.

    ``base`` is what there was when the vectors were begun, where that was before this call.

    Raises:
        UnknownVersion: there is none of this number.
        VersionRetired: it is retired, so that nothing of it could be promoted.
        InvalidInput: the batches hold what cannot be stored.
        Conflict: it was rejected, or what was put or erased could not be heeded, as its
            files were deleted meanwhile.
    """
    known, base = registry.versions.get(version), base or Base.now(registry)
    demand_promotable(known)
    last = base.last(registry, version)
    with _kept(registry, last):
        folding = Folding.of(registry, artifacts, last, base.erased)
        rows = folding.batches(_without_erased(batches, base.erased))
        record = write_snapshot(artifacts, version, known.dim, rows)
    if last is not None:
        record = replace(record, base_snapshot=last.snapshot, base_delta=last.delta)
    details = {**details, **_noted(artifacts, folding, record)}
    try:
        with _kept(registry, base.live):
            return _register(registry, artifacts, record, details, base)
    except Conflict:  # it is registered nowhere, and never will be
        artifacts.delete(record.folder)
        raise


@contextmanager
def _kept(registry: Registry, last: Live | None) -> Iterator[None]:
    """Say why, where changes that count were deleted meanwhile, a grace period being over."""
    try:
        yield
    except ArtifactMissing as error:
        if last is None or registry.snapshots.get(last.snapshot).condemned_at is None:
            raise
        raise Conflict(
            f"Snapshot {last.snapshot}, whose changes were to be taken over, was deleted "
            "meanwhile. Publish again, and put what is still wanted of them."
        ) from error


def _noted(artifacts: Artifacts, folding: Folding, record: SnapshotRecord) -> dict[str, Any]:
    try:
        return folding.write(record.folder)
    except BaseException:
        artifacts.delete(record.folder)
        raise


def _without_erased(batches: Iterable[VectorBatch], erased: Erased) -> Iterator[VectorBatch]:
    for batch in batches:
        if not erased.digests.get(batch.entity):
            yield batch
            continue
        yield batch.only(
            [row for row, id in enumerate(batch.ids) if not erased.covers(batch.entity, id)]
        )


def _register(
    registry: Registry,
    artifacts: Artifacts,
    record: SnapshotRecord,
    details: Mapping[str, Any],
    base: Base,
) -> SnapshotRecord:
    seen, drafts = base, list[DeltaDraft]()
    while True:
        try:  # its files stay where the answer is lost
            registry.snapshots.register(
                record, details, erased=seen.erased, live=seen.live, drafts=drafts
            )
        except StateMoved:
            for draft in drafts:
                discard_delta(artifacts, draft)
            seen, late = _erased_since(registry, artifacts, base)
            drafts = _late_erasures(artifacts, record, seen.erased, late)
        else:
            return replace(record, head=len(drafts))


Ids = Mapping[Entity, AbstractSet[str]]


def _erased_since(registry: Registry, artifacts: Artifacts, base: Base) -> tuple[Base, Ids]:
    """Return what was erased since: what is on the list, and what was live then was told.

    The list does not tell of who was put again, what was live does not of ids that nothing held.
    """
    late: dict[Entity, set[str]] = {}
    live = base.live
    if live is not None:
        told = registry.deltas.of(live.snapshot, after=live.delta)
        for delta in told:
            if delta.kind is DeltaKind.ERASE:
                late.setdefault(delta.entity, set()).update(read_delta(artifacts, delta).ids)
        live = replace(live, delta=told[-1].number if told else live.delta)
    return Base(live, registry.erasures.all(after=base.erased.number)), late


def _late_erasures(
    artifacts: Artifacts, record: SnapshotRecord, erased: Erased, late: Ids
) -> list[DeltaDraft]:
    drafts = []
    for entity in {**erased.digests, **late}:
        told = late.get(entity, frozenset())
        listed = (id for some in read_ids(artifacts, record, entity) for id in some)
        ids = [id for id in listed if id in told or erased.covers(entity, id)]
        if ids:
            drafts.append(write_delta(artifacts, Delta(entity, ids), "backcast publish"))
    return drafts
