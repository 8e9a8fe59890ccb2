"""Changes of the live snapshot that its successor does not hold go with the switch to it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import dropwhile

from backcast.artifacts import Artifacts
from backcast.changes import Changes, Delta, discard_delta, read_delta, write_delta
from backcast.drift import hash_of
from backcast.errors import Conflict
from backcast.lifecycle.places import Backcast
from backcast.registry import Switch
from backcast.versions import (
    DeltaDraft,
    DeltaKind,
    DeltaRecord,
    DriftRecord,
    Live,
    SnapshotRecord,
)

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
    """Return the upserts of the version of ``target``, newer than it, that it must take over.

    They were made on what is live, or while its version was live before.
    """
    return _missed(backcast, live, target, partial(read_delta, backcast.artifacts))


def _missed(backcast: Backcast, live: Live, target: SnapshotRecord, read: Read) -> Changes:
    newer = _newer(backcast, live, target)
    records = dropwhile(lambda record: record.kind is DeltaKind.ERASE, newer)
    # Numbers of several snapshots: they are counted anew.
    return Changes().after(enumerate(map(read, records)))


@dataclass(frozen=True)
class _Tenure:
    """A time for which a snapshot was live, with the deltas in (after, upto] of that time."""

    version: int
    snapshot: str
    after: int
    upto: int


def _tenures(backcast: Backcast, live: Live) -> Iterator[_Tenure]:
    """Yield the times of all snapshots, newest first."""
    upto = live.delta
    for arrival in backcast.registry.deployments.history():
        yield _Tenure(arrival["version"], arrival["snapshot"], arrival["delta"], upto)
        upto = arrival["from_delta"]


def _newer(backcast: Backcast, live: Live, target: SnapshotRecord) -> list[DeltaRecord]:
    """Return the deltas since ``target`` was begun, from its base or itself on to what is live.

    Of other versions, that were live meanwhile, these are the erasures.
    """
    deltas, newer, with_older = backcast.registry.deltas, list[DeltaRecord](), list[DeltaRecord]()
    tenures = list(_tenures(backcast, live))
    was_live = any(tenure.snapshot == target.id for tenure in tenures)
    base = None if was_live else target.base_snapshot
    for tenure in tenures:
        own, snapshot = tenure.version == target.version, tenure.snapshot
        # Of older releases, the base may be of another version: what was live when it was begun.
        if snapshot == target.id or (snapshot == base and not own):
            return newer
        if snapshot == base:
            return deltas.of(snapshot, after=target.base_delta or 0, upto=tenure.upto) + newer
        if backcast.registry.snapshots.get(snapshot).condemned_at is not None:
            return with_older  # its files are gone
        # What it had when it went live it had from the one before, or was told on both.
        since = deltas.of(snapshot, after=tenure.after, upto=tenure.upto)
        if own:
            with_older = deltas.of(snapshot, upto=tenure.upto) + newer
            newer = since + newer
        else:
            newer = [record for record in since if record.kind is DeltaKind.ERASE] + newer
    return with_older


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
