"""Going back to what was live before: the store still has it, so it is one switch."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from backcast.chains import load_chain
from backcast.changes import ChangedSnapshot, Changes, changed_batches, read_changes
from backcast.errors import Conflict, InvalidInput, PromotionConflict, VersionRetired
from backcast.lifecycle.carrying import missed_upserts, switch_carrying
from backcast.lifecycle.loading import is_loaded, load_snapshot
from backcast.lifecycle.places import Backcast, Report
from backcast.lifecycle.promotion import Expected, demand_expected
from backcast.registry import Catalog, Switch
from backcast.snapshots import read_snapshot
from backcast.versions import Claim, Entity, Lineage, Live, SnapshotRecord, VersionState


@dataclass(frozen=True)
class Target:
    """A superseded snapshot that can go live again, and the moment that was seen."""

    snapshot: SnapshotRecord
    live: Live
    catalog: Catalog

    @property
    def version(self) -> int:
        """The version that will be live."""
        return self.snapshot.version


@dataclass(frozen=True)
class RollbackPlan:
    """What a rollback would do.

    Attributes:
        live: what is live now.
        version, snapshot: what would be, S.d.
        servable: the versions that can be asked for afterwards.
        refused: the versions that answer 409 afterwards, and do not now.
        pinned: consumers whose pin is among those, by name.
        lost: ids upserted since the promotion that the older snapshot lacks, by entity kind.
        grace_left: how long the older snapshot is certain to stay.
        loaded: the store has it, so that nothing must be loaded.
    """

    live: Live
    version: int
    snapshot: str
    servable: tuple[int, ...]
    refused: tuple[int, ...]
    pinned: tuple[str, ...]
    lost: dict[Entity, tuple[str, ...]]
    grace_left: timedelta
    loaded: bool

    def document(self) -> dict[str, Any]:
        """Return the plan as a JSON document."""
        return {
            "live_version": self.live.version,
            "live_snapshot": self.live.name,
            "version": self.version,
            "snapshot": self.snapshot,
            "servable_versions": list(self.servable),
            "refused_versions": list(self.refused),
            "pinned_consumers": list(self.pinned),
            "lost_ids": {str(entity): list(ids) for entity, ids in self.lost.items()},
            "grace_left_seconds": round(self.grace_left.total_seconds(), 3),
            "loaded": self.loaded,
        }


def find_target(
    backcast: Backcast,
    *,
    expected_live: int | Expected | None = None,
    to_snapshot: str | None = None,
) -> Target:
    """Look up what a rollback would go back to; cheap.

    Without ``to_snapshot`` that is what was live before the live version was promoted.

    Raises:
        PromotionConflict: what is live is not what was expected.
        Conflict: nothing was live before, or its grace period is over.
        VersionRetired: its version is retired.
        UnknownSnapshot, InvalidInput: ``to_snapshot`` is none, or none to go back to.
    """
    catalog = backcast.registry.deployments.catalog()
    demand_expected(expected_live, catalog.live)
    if catalog.live is None:
        raise PromotionConflict("Nothing is live, so there is nothing to roll back.")
    id = _before_promotion(backcast, catalog.live) if to_snapshot is None else to_snapshot
    record = backcast.registry.snapshots.get(id)
    _demand_possible(catalog, catalog.live, record)
    return Target(record, catalog.live, catalog)


def plan_rollback(
    backcast: Backcast,
    *,
    grace: timedelta,
    expected_live: int | Expected | None = None,
    to_snapshot: str | None = None,
) -> RollbackPlan:
    """Say what a rollback would do, and change nothing.

    Raises:
        PromotionConflict, Conflict, VersionRetired, UnknownSnapshot: see ``find_target``.
    """
    target = find_target(backcast, expected_live=expected_live, to_snapshot=to_snapshot)
    servable = _servable(target.catalog, target.version)
    refused = set(_servable(target.catalog, target.live.version)) - set(servable)
    keys = [key for key in backcast.registry.keys.all() if key.revoked_at is None]
    now = backcast.registry.now()
    superseded_at = target.snapshot.superseded_at or now
    return RollbackPlan(
        live=target.live,
        version=target.version,
        snapshot=f"{target.snapshot.id}.{target.snapshot.head}",
        servable=servable,
        refused=tuple(sorted(refused)),
        pinned=tuple(sorted({k.consumer for k in keys if k.pin in refused})),
        lost=_lost_ids(backcast, target),
        grace_left=max(timedelta(0), superseded_at + grace - now),
        loaded=is_loaded(backcast.store, target.snapshot.id),
    )


def rollback(
    backcast: Backcast,
    *,
    actor: str,
    expected_live: int | Expected | None = None,
    reason: str,
    to_snapshot: str | None = None,
    operation: Claim | None = None,
    report: Report = lambda _step, _fraction: None,
) -> Live:
    """Make a superseded snapshot live again, in one switch, and return what is live.

    The store still holds it; where it has lost it, it is loaded again. The version that is left,
    and any between, become rolled back, with ``reason`` as their note. Of an older snapshot of the
    same version, the ids upserted since are carried over.

    Raises:
        PromotionConflict, Conflict, VersionRetired, UnknownSnapshot: see ``find_target``.
        ArtifactError: a map is not what was registered. The old version stays live.
    """
    if not reason.strip():
        raise InvalidInput("A rollback needs a reason: consumers of the newer version are told it.")
    report("check", 0.0)
    target = find_target(backcast, expected_live=expected_live, to_snapshot=to_snapshot)
    load_chain(target.catalog, backcast.artifacts, target.version)
    report("load", 0.2)
    load_snapshot(
        backcast, target.snapshot.id, lambda done: report("load", round(0.2 + 0.7 * done, 2))
    )
    report("switch", 0.9)
    switch = Switch(
        kind="rollback",
        seen=target.live,
        version=target.version,
        snapshot=target.snapshot.id,
        actor=actor,
        reason=reason,
        operation=operation,
    )
    return switch_carrying(backcast, switch)


def _before_promotion(backcast: Backcast, live: Live) -> str:
    for row in backcast.registry.deployments.history():
        if (row["kind"], row["version"]) == ("promote", live.version):
            if row["from_snapshot"] is None:
                break
            before: str = row["from_snapshot"]
            return before
    raise Conflict(
        f"Nothing was live before version {live.version}, so there is nothing to go back to.",
        current_version=live.version,
    )


def _demand_possible(catalog: Catalog, live: Live, record: SnapshotRecord) -> None:
    state = {v.number: v.state for v in catalog.versions}[record.version]
    if record.condemned_at is not None:
        raise Conflict(
            f"Snapshot {record.id} of version {record.version} is over its grace period and "
            f"deleted. Publish it anew (backcast publish {record.version}) and promote it.",
            current_version=live.version,
        )
    if record.superseded_at is None:
        raise InvalidInput(
            f"Snapshot {record.id} is {'live' if record.id == live.snapshot else 'not yet used'}; "
            "a rollback goes to one that was superseded."
        )
    if state is VersionState.RETIRED:
        raise VersionRetired(record.version, _servable(catalog, live.version))
    above = Lineage.of(catalog.versions).chain(record.version)[1:]
    if live.version in above:
        raise InvalidInput(
            f"Version {record.version} of snapshot {record.id} is newer than the live version "
            f"{live.version}; that is no rollback. Promote it: backcast promote {record.version}"
        )


def _servable(catalog: Catalog, version: int) -> tuple[int, ...]:
    state = {v.number: v.state for v in catalog.versions}
    chain = Lineage.of(catalog.versions).chain(version)
    return tuple(j for j in sorted(chain) if state[j] is not VersionState.RETIRED)


def _lost_ids(backcast: Backcast, target: Target) -> dict[Entity, tuple[str, ...]]:
    if target.version == target.live.version:
        return {}  # upserts of the same version go with the switch
    upserted = _upserted_since(backcast, target)
    carried = missed_upserts(backcast, target.live, target.snapshot)
    lost = {
        entity: tuple(
            id
            for id in _missing(backcast, target.snapshot, entity, ids)
            if carried.places.get(entity, {}).get(id) is None
        )
        for entity, ids in upserted.items()
    }
    return {entity: ids for entity, ids in lost.items() if ids}


def _upserted_since(backcast: Backcast, target: Target) -> dict[Entity, list[str]]:
    """Return the ids that were put on what was live since the target, and not erased after.

    An erasure is on every snapshot, so each says by itself what is left of its upserts; those of a
    deleted one are gone.
    """
    snapshots: list[str] = []
    for row in backcast.registry.deployments.history():
        snapshots.append(row["snapshot"])
        if row["from_snapshot"] == target.snapshot.id:
            break
    upserted: dict[Entity, dict[str, None]] = {}
    for id in dict.fromkeys(reversed(snapshots)):
        if backcast.registry.snapshots.get(id).condemned_at is not None:
            continue
        changes = _changes_on(backcast, id)
        for entity in changes.places:
            upserted.setdefault(entity, {}).update(dict.fromkeys(changes.upserted(entity)))
    return {entity: list(ids) for entity, ids in upserted.items()}


def _changes_on(backcast: Backcast, snapshot: str, upto: int | None = None) -> Changes:
    return read_changes(backcast.artifacts, backcast.registry.deltas.of(snapshot, upto=upto))


def _missing(
    backcast: Backcast, record: SnapshotRecord, entity: Entity, ids: Sequence[str]
) -> list[str]:
    changes = _changes_on(backcast, record.id, record.head)
    if is_loaded(backcast.store, record.id):
        held = ChangedSnapshot(backcast.store.open(record.id), changes)
        found = held.gather(entity, ids).found
        return [id for id, known in zip(ids, found, strict=True) if not known]
    missing = dict.fromkeys(ids)
    for batch in changed_batches(read_snapshot(backcast.artifacts, record), changes):
        if batch.entity == entity:
            for id in batch.ids:
                missing.pop(id, None)
    return list(missing)
