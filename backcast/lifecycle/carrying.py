"""Changes of the live snapshot that its successor does not hold go with the switch to it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from backcast.artifacts import Artifacts
from backcast.changes import Changes, Delta, discard_delta, read_delta, write_delta
from backcast.drift import hash_of
from backcast.errors import Conflict
from backcast.lifecycle.places import Backcast
from backcast.registry import Switch
from backcast.versions import DeltaDraft, DeltaRecord, DriftRecord, Live, SnapshotRecord

Read = Callable[[DeltaRecord], Delta]


def switch_carrying(backcast: Backcast, switch: Switch) -> Live:
    """Switch, with all upserts that came since the new snapshot was begun; return what is live.

    No id is changed between the look at what must be carried and the switch: whoever wants to
    change one waits.

    Raises:
        PromotionConflict: something else went live.
        NothingPublished: the snapshot was deleted meanwhile.
    """
    carried: list[DeltaDraft] = []
    read = _reading_once(backcast.artifacts)

    def with_carried() -> Switch:
        live = backcast.registry.deployments.live()
        target = backcast.registry.snapshots.get(switch.snapshot)
        ready = replace(switch, head=target.head)
        if live is None or switch.seen is None or live.generation != switch.seen.generation:
            return ready  # nothing to carry, or something else went live and this is refused
        carried.extend(_carry(backcast, live, target, switch.actor, read))
        drift = _settled(backcast, switch, live, read)
        return replace(ready, seen=live, carried=carried, drift=drift)

    _look_ahead(backcast, switch, read)
    try:
        return backcast.registry.deployments.switch_in_turn(with_carried)
    except Conflict:  # refused for certain; where an answer is lost, the files may be needed
        _discard(backcast, carried)
        raise


def _look_ahead(backcast: Backcast, switch: Switch, read: Read) -> None:
    """Read what will have to be carried while nobody waits; a day of changes takes a while."""
    if switch.seen is not None:
        live = backcast.registry.deployments.live() or switch.seen
        _missed(backcast, live, backcast.registry.snapshots.get(switch.snapshot), read)
        _since_compared(backcast, switch, live, read)


def _reading_once(artifacts: Artifacts) -> Read:
    """Return a way to read deltas that reads none twice."""
    known: dict[str, Delta] = {}

    def read(record: DeltaRecord) -> Delta:
        if record.file not in known:
            known[record.file] = read_delta(artifacts, record)
        return known[record.file]

    return read


def _settled(backcast: Backcast, switch: Switch, live: Live, read: Read) -> DriftRecord | None:
    """Take the bounds of the live version from ids that were put since they were worked out.

    Those of older versions hold: what was stored of them last did not change.
    """
    newer = _since_compared(backcast, switch, live, read)
    if switch.drift is None or not newer.places:
        return switch.drift
    put = {str(entity): [hash_of(id) for id in newer.upserted(entity)] for entity in newer.places}
    return replace(switch.drift, unsettled={str(live.version): put})


def _since_compared(backcast: Backcast, switch: Switch, live: Live, read: Read) -> Changes:
    compared = switch.compared
    if switch.drift is None or compared is None or live.version == switch.version:
        return Changes()
    deltas = backcast.registry.deltas.of(live.snapshot, after=compared.delta, upto=live.delta)
    return Changes().after((record.number, read(record)) for record in deltas)


def missed_upserts(backcast: Backcast, live: Live, target: SnapshotRecord) -> Changes:
    """Return the upserts on what is live that are newer than ``target``, of the same version."""
    return _missed(backcast, live, target, partial(read_delta, backcast.artifacts))


def _missed(backcast: Backcast, live: Live, target: SnapshotRecord, read: Read) -> Changes:
    if live.version != target.version:
        return Changes()
    records = _newer(backcast, live, target)
    # Numbers of several snapshots: they are counted anew.
    return Changes().after(enumerate(map(read, records)))


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


def _carry(
    backcast: Backcast, live: Live, target: SnapshotRecord, actor: str, read: Read
) -> list[DeltaDraft]:
    missed = _missed(backcast, live, target, read)
    return [
        write_delta(backcast.artifacts, Delta(entity, ids, missed.vectors_of(entity, ids)), actor)
        for entity in missed.places
        if (ids := missed.upserted(entity))
    ]


def _discard(backcast: Backcast, drafts: Sequence[DeltaDraft]) -> None:
    for draft in drafts:
        discard_delta(backcast.artifacts, draft)
