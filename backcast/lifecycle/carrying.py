"""Changes of the live snapshot that its successor does not hold go with the switch to it."""

from collections.abc import Sequence
from dataclasses import replace

from backcast.changes import Changes, Delta, read_changes, write_delta
from backcast.errors import PromotionConflict
from backcast.lifecycle.places import Backcast
from backcast.registry import StateMoved, Switch
from backcast.versions import DeltaDraft, Live, SnapshotRecord

_ATTEMPTS = 20


def switch_carrying(backcast: Backcast, switch: Switch) -> Live:
    """Switch, with all upserts that came since the new snapshot was begun; return what is live.

    Ids may change while this looks; then it looks again.

    Raises:
        PromotionConflict: something else went live, or ids change faster than this can follow.
        NothingPublished: the snapshot was deleted meanwhile.
    """
    for _ in range(_ATTEMPTS):
        live = backcast.registry.deployments.live()
        target = backcast.registry.snapshots.get(switch.snapshot)
        carried = _carry(backcast, live, target, switch.actor)
        seen = switch.seen
        if seen is not None and live is not None and live.generation == seen.generation:
            seen = live  # the same, with the deltas that are carried
        try:
            return backcast.registry.deployments.switch(
                replace(switch, seen=seen, head=target.head, carried=carried)
            )
        except StateMoved:
            _discard(backcast, carried)
        except PromotionConflict:
            _discard(backcast, carried)
            raise
    raise PromotionConflict(
        f"The ids of the live version changed {_ATTEMPTS} times while version {switch.version} "
        "was to go live; nothing was switched. Try again.",
        current_version=None if switch.seen is None else switch.seen.version,
    )


def missed_upserts(backcast: Backcast, live: Live, target: SnapshotRecord) -> Changes:
    """Return the upserts on what is live that are newer than ``target``, of the same version."""
    if live.version != target.version or live.snapshot == target.id:
        return Changes()
    known = target.base_delta if target.base_snapshot == live.snapshot else 0
    records = backcast.registry.deltas.of(live.snapshot, after=known or 0, upto=live.delta)
    return read_changes(backcast.artifacts, records)


def _carry(
    backcast: Backcast, live: Live | None, target: SnapshotRecord, actor: str
) -> list[DeltaDraft]:
    if live is None:
        return []
    missed = missed_upserts(backcast, live, target)
    return [
        write_delta(backcast.artifacts, Delta(entity, ids, missed.vectors_of(entity, ids)), actor)
        for entity in missed.places
        if (ids := missed.upserted(entity))
    ]


def _discard(backcast: Backcast, drafts: Sequence[DeltaDraft]) -> None:
    for draft in drafts:
        backcast.artifacts.delete(draft.file.rpartition("/")[0])
