"""Changes of the live snapshot that its successor does not hold go with the switch to it."""

from collections.abc import Sequence
from dataclasses import replace

from backcast.changes import (
    Changes,
    Delta,
    discard_delta,
    read_changes,
    read_delta,
    write_delta,
)
from backcast.drift import hash_of
from backcast.errors import Conflict
from backcast.lifecycle.places import Backcast
from backcast.registry import Switch
from backcast.versions import DeltaDraft, DeltaRecord, DriftRecord, Live, SnapshotRecord


def switch_carrying(backcast: Backcast, switch: Switch) -> Live:
    """Switch, with all upserts that came since the new snapshot was begun; return what is live.

    No id is changed between the look at what must be carried and the switch: whoever wants to
    change one waits.

    Raises:
        PromotionConflict: something else went live.
        NothingPublished: the snapshot was deleted meanwhile.
    """
    carried: list[DeltaDraft] = []

    def with_carried() -> Switch:
        live = backcast.registry.deployments.live()
        target = backcast.registry.snapshots.get(switch.snapshot)
        ready = replace(switch, head=target.head)
        if live is None or switch.seen is None or live.generation != switch.seen.generation:
            return ready  # nothing to carry, or something else went live and this is refused
        carried.extend(_carry(backcast, live, target, switch.actor))
        drift = None if switch.drift is None else _settled(backcast, switch.drift, switch, live)
        return replace(ready, seen=live, carried=carried, drift=drift)

    try:
        return backcast.registry.deployments.switch_in_turn(with_carried)
    except Conflict:  # refused for certain; where an answer is lost, the files may be needed
        _discard(backcast, carried)
        raise


def _settled(backcast: Backcast, drift: DriftRecord, switch: Switch, live: Live) -> DriftRecord:
    """Take the bounds of the live version from ids that were put since they were worked out.

    Those of older versions hold: what was stored of them last did not change.
    """
    compared = switch.compared
    if compared is None or compared.delta == live.delta or live.version == switch.version:
        return drift
    deltas = backcast.registry.deltas.of(live.snapshot, after=compared.delta, upto=live.delta)
    newer = read_changes(backcast.artifacts, deltas)
    put = {str(entity): [hash_of(id) for id in newer.upserted(entity)] for entity in newer.places}
    return replace(drift, unsettled={str(live.version): put})


def missed_upserts(backcast: Backcast, live: Live, target: SnapshotRecord) -> Changes:
    """Return the upserts on what is live that are newer than ``target``, of the same version."""
    if live.version != target.version:
        return Changes()
    records = _newer(backcast, live, target)
    # Numbers of several snapshots: they are counted anew.
    return Changes().after(enumerate(read_delta(backcast.artifacts, record) for record in records))


def _newer(backcast: Backcast, live: Live, target: SnapshotRecord) -> list[DeltaRecord]:
    """Return the deltas since ``target`` was begun, from its base or itself on to what is live."""
    deltas = backcast.registry.deltas
    snapshot, upto, newer = live.snapshot, live.delta, list[DeltaRecord]()
    for arrival in backcast.registry.deployments.history():
        if snapshot == target.id:
            return newer
        if snapshot == target.base_snapshot:
            return deltas.of(snapshot, after=target.base_delta or 0, upto=upto) + newer
        before = arrival["from_snapshot"] if arrival["from_version"] == target.version else None
        if before is None or backcast.registry.snapshots.get(before).condemned_at is not None:
            return deltas.of(snapshot, upto=upto) + newer
        # What it had when it went live it had from the one before, or was told on both.
        newer = deltas.of(snapshot, after=arrival["delta"], upto=upto) + newer
        snapshot, upto = before, arrival["from_delta"]
    return newer


def _carry(backcast: Backcast, live: Live, target: SnapshotRecord, actor: str) -> list[DeltaDraft]:
    missed = missed_upserts(backcast, live, target)
    return [
        write_delta(backcast.artifacts, Delta(entity, ids, missed.vectors_of(entity, ids)), actor)
        for entity in missed.places
        if (ids := missed.upserted(entity))
    ]


def _discard(backcast: Backcast, drafts: Sequence[DeltaDraft]) -> None:
    for draft in drafts:
        discard_delta(backcast.artifacts, draft)
