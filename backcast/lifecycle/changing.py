"""Vectors of single ids are put, and ids erased, between two publications."""

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
from numpy.typing import NDArray

from backcast.changes import Delta, discard_delta, write_delta
from backcast.errors import (
    ArtifactError,
    Conflict,
    DimensionMismatch,
    InvalidInput,
    PromotionConflict,
)
from backcast.lifecycle.places import Backcast
from backcast.lifecycle.remains import ErasureReport, report_remains
from backcast.registry import Naming, StateMoved, digest_of
from backcast.stores import Rounder
from backcast.vectors import VectorBatch, check_id
from backcast.versions import DeltaDraft, Entity, Live

ATTEMPTS = 100
"""How often a change is tried while others come before it."""
_LONGEST_PAUSE = 0.05
_LARGEST = 1e18  # of a number: float32 has 1e20 times as much, which no map uses up


def upsert(
    backcast: Backcast,
    entity: Entity,
    ids: Sequence[str],
    vectors: NDArray[np.float32],
    *,
    actor: str,
    most_changed: int,
    expected_live: int | None = None,
) -> Live:
    """Give ids of the live version new vectors; durable, and visible at once, when this returns.

    Args:
        backcast: where the live version lies.
        entity: what the ids stand for.
        ids: n different ids, known to the live snapshot or not.
        vectors: (n, D_k) float32, finite, made by the live version's model.
        actor: who does this.
        most_changed: how many ids may be changed on one snapshot.
        expected_live: the version that the vectors were made for, where the caller knows.

    Returns:
        What is live then: S.d with the new vectors.

    Raises:
        InvalidInput, DimensionMismatch: the ids or the vectors are none that can be stored.
        PromotionConflict: another version is live than was expected.
        Conflict: nothing is live, or too many ids are changed already.
    """
    return upsert_batches(
        backcast,
        [VectorBatch(entity, ids, vectors)],
        actor=actor,
        most_changed=most_changed,
        expected_live=expected_live,
    )


def upsert_batches(
    backcast: Backcast,
    batches: Sequence[VectorBatch],
    *,
    actor: str,
    most_changed: int,
    expected_live: int | None = None,
) -> Live:
    """Do the same for several entity kinds together, one batch each: all are put, or none."""
    deltas = [Delta(batch.entity, batch.ids, batch.vectors) for batch in batches]
    if not any(len(delta.ids) for delta in deltas):
        raise InvalidInput("No id is given; name at least one.")
    seen = _demand_live(backcast, expected_live)
    dim = backcast.registry.versions.get(seen.version).dim
    for batch in batches:
        if batch.dim != dim:
            raise DimensionMismatch(f"{batch.entity} vectors of the live version", dim, batch.dim)
        _refuse_huge(batch)
        Rounder(backcast.precision)(batch)  # what no later snapshot could store is refused now
    back = {delta.entity: [digest_of(id) for id in delta.ids] for delta in deltas}
    with _drafting(backcast) as drafts:
        for delta in deltas:
            drafts.append(write_delta(backcast.artifacts, delta, actor))
        return _append(backcast, drafts, back, seen.version, most_changed)


def erase(
    backcast: Backcast, entity: Entity, ids: Sequence[str], *, actor: str, grace: timedelta
) -> ErasureReport:
    """End the vectors of ids in every snapshot, live, kept or published, and in all to come.

    An id that is put again later is back. ``grace`` is how long superseded snapshots are kept.

    Raises:
        InvalidInput: there are no ids, or one comes twice or cannot be one.
        Conflict: snapshots come faster than this can follow.
    """
    if not ids:
        raise InvalidInput("No id is given; name at least one.")
    for id in ids:
        check_id(id)
    live = _erase(backcast, Delta(entity, ids), actor)
    return report_remains(backcast, entity, ids, live, grace)


def _erase(backcast: Backcast, delta: Delta, actor: str) -> Live | None:
    registry, of_snapshot = backcast.registry, dict[str, DeltaDraft]()
    digests = [digest_of(id) for id in delta.ids]
    naming = registry.erasures.naming(delta.entity, digests)
    with _drafting(backcast) as drafts:
        for attempt in range(ATTEMPTS):
            # A file for each snapshot, which goes when the snapshot does.
            for snapshot in registry.snapshots.undeleted():
                if snapshot.id not in of_snapshot:
                    drafts.append(write_delta(backcast.artifacts, delta, actor))
                    of_snapshot[snapshot.id] = drafts[-1]
            try:
                live, used = registry.erasures.append(
                    of_snapshot, delta.entity, digests, actor, naming=naming
                )
            except StateMoved:
                pause(attempt)
            else:
                _discard(backcast, [d for id, d in of_snapshot.items() if id not in used])
                return live
        raise Conflict(f"Snapshots were published {ATTEMPTS} times meanwhile; nothing was erased.")


def erase_digests(
    backcast: Backcast,
    entity: Entity,
    ids: Sequence[str],
    digests: Sequence[str],
    *,
    seen: Mapping[str, int],
    naming: Naming,
    actor: str,
) -> None:
    """Erase ids, and further ones of which only the digest is known: no snapshot holds those.

    ``seen`` are the snapshots that were looked through for them, each with its last delta then, and
    ``naming`` is what was found in the diffs.

    Raises:
        StateMoved: there is another snapshot, or a later delta; nothing was erased.
    """
    delta = Delta(entity, ids)
    with _drafting(backcast) as drafts:
        of_snapshot = dict[str, DeltaDraft]()
        for snapshot in seen:
            drafts.append(write_delta(backcast.artifacts, delta, actor))
            of_snapshot[snapshot] = drafts[-1]
        _, used = backcast.registry.erasures.append(
            of_snapshot, entity, digests, actor, seen, naming
        )
    _discard(backcast, [d for id, d in of_snapshot.items() if id not in used])


def _refuse_huge(batch: VectorBatch) -> None:
    huge: NDArray[np.bool_] = np.any(np.abs(batch.vectors) > _LARGEST, axis=1)
    if huge.any():
        raise InvalidInput(
            f"The vector of {batch.entity} {batch.ids[int(np.argmax(huge))]!r} holds numbers "
            f"beyond {_LARGEST:g}: mapped to older versions they would overflow."
        )


@contextmanager
def _drafting(backcast: Backcast) -> Iterator[list[DeltaDraft]]:
    """Collect the deltas that are written, and delete them where they are refused for certain.

    Where an answer is lost, their rows may be there.
    """
    drafts: list[DeltaDraft] = []
    try:
        yield drafts
    except (Conflict, ArtifactError, StateMoved):
        _discard(backcast, drafts)
        raise


def _demand_live(backcast: Backcast, expected: int | None) -> Live:
    live = backcast.registry.deployments.live()
    if expected is not None and (live is None or live.version != expected):
        now = "nothing" if live is None else f"version {live.version}"
        raise PromotionConflict(
            f"The vectors are of version {expected}, live is {now}; nothing was changed.",
            expected_version=expected,
            current_version=None if live is None else live.version,
        )
    if live is None:
        raise Conflict("Nothing is live, so no vector can be put; promote a version first.")
    return live


def _append(
    backcast: Backcast,
    drafts: Sequence[DeltaDraft],
    back: Mapping[Entity, Sequence[str]],
    version: int,
    most_changed: int,
) -> Live:
    for attempt in range(ATTEMPTS):
        live = _demand_live(backcast, version)
        _demand_room(backcast, live, sum(draft.count for draft in drafts), most_changed)
        try:
            return backcast.registry.deltas.append(live, drafts, back)
        except StateMoved:
            pause(attempt)
    raise Conflict(
        f"The live snapshot changed {ATTEMPTS} times meanwhile; nothing was put. Try again."
    )


def _demand_room(backcast: Backcast, live: Live, count: int, most: int) -> None:
    changed = backcast.registry.deltas.changed(live.snapshot)
    if changed + count > most:
        raise Conflict(
            f"{changed} ids are changed on snapshot {live.snapshot} and {count} more would pass "
            f"BACKCAST_MAX_CHANGED={most}. Take them up first: backcast refresh --compact.",
            changed=changed,
            count=count,
            limit=most,
        )


def pause(attempt: int) -> None:
    """Wait a little before another attempt, longer each time."""
    # Not all of those that met here come again at the same moment.
    time.sleep(random.uniform(0, min(_LONGEST_PAUSE, 0.001 * 2**attempt)))


def _discard(backcast: Backcast, drafts: Sequence[DeltaDraft]) -> None:
    for draft in drafts:
        discard_delta(backcast.artifacts, draft)
