"""The live version gets a newer snapshot of itself."""

from collections.abc import Iterable, Iterator
from functools import partial

from backcast.errors import Conflict, PromotionConflict
from backcast.lifecycle.folding import Folding
from backcast.lifecycle.places import Backcast, Report
from backcast.lifecycle.promotion import Promoted, promote
from backcast.lifecycle.registering import Base, publish
from backcast.snapshots import read_snapshot
from backcast.vectors import VectorBatch
from backcast.versions import Claim, Live, SnapshotRecord


def refresh(
    backcast: Backcast,
    *,
    actor: str,
    expected_live: int | None = None,
    reason: str | None = None,
    operation: Claim | None = None,
    report: Report = lambda _step, _fraction: None,
) -> Promoted:
    """Promote the newest snapshot of the live version.

    Upserts that came since that snapshot was begun go with it.

    Raises:
        PromotionConflict: another version is live than was expected, or the live snapshot is the
            newest already.
        Conflict: nothing is live, or a gate failed.
    """
    live = _demand_live(backcast.registry.deployments.live(), expected_live)
    go = partial(
        promote,
        backcast,
        live.version,
        actor=actor,
        expected_live=live.version,
        reason=reason,
        operation=operation,
        report=report,
    )
    promoted, newest = go(), backcast.registry.snapshots.latest(live.version)
    is_filled = promoted.live.generation == live.generation  # and nothing is switched yet
    if is_filled and newest is not None and newest.id != live.snapshot:
        promoted = go()  # the store had lost what was live, and was filled with that first
    return promoted


def compact(
    backcast: Backcast,
    *,
    expected_live: int | None = None,
    report: Report = lambda _step, _fraction: None,
) -> SnapshotRecord:
    """Write what is live, its changes among them, as a new snapshot of the live version.

    No model is run. The snapshot is published like any other: a refresh makes it live.

    Raises:
        PromotionConflict: another version is live than was expected.
        Conflict: nothing is live, or nothing was changed on it.
    """
    registry, artifacts = backcast.registry, backcast.artifacts
    base = Base.now(registry)
    live = _demand_live(base.live, expected_live)
    demand_changes(live)
    record = registry.snapshots.get(live.snapshot)
    details = registry.snapshots.details(live.snapshot)
    details.pop("put", None)  # that of the new one is its own
    details["compacted"] = live.name
    # What was put is left out here, and taken over as by every publication.
    folding = Folding.of(registry, artifacts, live, base.erased)
    rows = folding.computed(read_snapshot(artifacts, record))
    counted = _counted(rows, sum(record.counts.values()), report)
    return publish(registry, artifacts, live.version, counted, details, base=base)


def demand_changes(live: Live) -> None:
    """Raise Conflict where nothing was changed on what is live."""
    if live.delta == 0:
        raise Conflict(f"Nothing was changed on snapshot {live.snapshot}: there is nothing to do.")


def is_compacted(backcast: Backcast) -> bool:
    """Return whether the newest snapshot of the live version is what is live, compacted."""
    live = backcast.registry.deployments.live()
    newest = None if live is None else backcast.registry.snapshots.latest(live.version)
    if live is None or newest is None:
        return False
    noted = backcast.registry.snapshots.details(newest.id).get("compacted")
    return bool(noted == live.name)


def _demand_live(live: Live | None, expected: int | None) -> Live:
    if live is None:
        raise Conflict("Nothing is live, so nothing can be refreshed; promote a version first.")
    if expected is not None and live.version != expected:
        raise PromotionConflict(
            f"Version {expected} was expected to be live, version {live.version} is.",
            expected_version=expected,
            current_version=live.version,
        )
    return live


def _counted(batches: Iterable[VectorBatch], total: int, report: Report) -> Iterator[VectorBatch]:
    done = 0
    for batch in batches:
        report("write", min(1.0, done / max(1, total)))
        yield batch
        done += len(batch.ids)
