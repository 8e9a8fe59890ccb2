"""A version goes live: gates, then the store, then one switch."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from backcast.chains import load_chain
from backcast.errors import (
    ArtifactError,
    ArtifactUnwritable,
    BackcastError,
    Conflict,
    InvalidInput,
    NothingPublished,
    PromotionConflict,
    RegistryError,
    SnapshotNotLoaded,
    UnknownVersion,
)
from backcast.lifecycle.carrying import switch_carrying
from backcast.lifecycle.comparing import Compared, Examination, LiveSide, servable_versions
from backcast.lifecycle.gates import (
    Gate,
    diff_gates,
    failed_maps_gate,
    failed_snapshot_gate,
    lineage_gate,
    maps_gate,
    metric_gate,
    snapshot_gates,
    uncompared_gates,
)
from backcast.lifecycle.loading import discard_drift, is_loaded, load_drift, load_snapshot
from backcast.lifecycle.places import Backcast, Report
from backcast.lifecycle.registering import demand_promotable
from backcast.registry import Catalog, Switch
from backcast.snapshots import read_snapshot
from backcast.stores import Rounding
from backcast.transforms import AffineMap
from backcast.versions import (
    Claim,
    DiffDraft,
    DriftRecord,
    Lineage,
    Live,
    SnapshotRecord,
    VersionState,
)


class Expected(Enum):
    """What a caller may expect to be live, besides a version's number."""

    NOTHING = "nothing"


@dataclass(frozen=True)
class Candidate:
    """A version that can be promoted if its gates let it, and the moment that was seen."""

    version: int
    snapshot: SnapshotRecord
    catalog: Catalog

    @property
    def live(self) -> Live | None:
        """What was live."""
        return self.catalog.live

    @property
    def was_live(self) -> bool:
        """Whether the version was live before the one that is."""
        states = {v.number: v.state for v in self.catalog.versions}
        return states[self.version] is VersionState.SUPERSEDED


@dataclass(frozen=True)
class Promoted:
    """What went live, and what storing its vectors cost."""

    live: Live
    rounding: Rounding


@dataclass(frozen=True)
class Plan:
    """What a promotion would do, and whether its gates let it.

    Attributes:
        diff: what its consumers would see change; None where nothing could be compared.
        drift: the drift bounds that would go with it, where they were written.
    """

    version: int
    snapshot: str
    live: Live | None
    servable: tuple[int, ...]
    gates: tuple[Gate, ...]
    diff: Compared | None = None
    drift: DriftRecord | None = None

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return all(gate.passed for gate in self.gates)

    def document(self) -> dict[str, Any]:
        """Return the plan as a JSON document."""
        return {
            "version": self.version,
            "snapshot": self.snapshot,
            "live_version": self.live.version if self.live else None,
            "servable_versions": list(self.servable),
            "gates": [asdict(gate) for gate in self.gates],
            "passed": self.passed,
            "diff": self.diff.document() if self.diff else None,
        }


def find_candidate(
    backcast: Backcast,
    version: int,
    *,
    expected_live: int | Expected | None = None,
    snapshot: str | None = None,
) -> Candidate:
    """Look up what a promotion of ``version`` would start from; cheap, as no gate is run.

    ``expected_live`` is the version that must be live now, ``Expected.NOTHING``, or None: any may.
    The candidate is the ``snapshot`` that is named, else the newest one of ``version``; or that
    which is live, where the store has lost it.

    Raises:
        UnknownVersion, NothingPublished, VersionRetired: there is nothing to promote.
        UnknownSnapshot, InvalidInput, Conflict: the snapshot that is named is none, is of another
            version, or is deleted.
        PromotionConflict: what is live is not what was expected, or it is ``version`` already, and
            loaded.
    """
    catalog = backcast.registry.deployments.catalog()
    known = {v.number: v for v in catalog.versions}.get(version)
    if known is None:
        raise UnknownVersion(version)
    demand_expected(expected_live, catalog.live)
    demand_promotable(known)
    live = catalog.live
    if snapshot is not None:
        return Candidate(version, _named_snapshot(backcast, version, snapshot, live), catalog)
    newest = backcast.registry.snapshots.latest(version)
    if newest is None:
        raise NothingPublished(version)
    if (
        live is not None
        and live.version == version
        and not is_loaded(backcast.store, live.snapshot)
    ):
        # What is served comes first: a newer snapshot can only be compared with it then.
        return Candidate(version, backcast.registry.snapshots.get(live.snapshot), catalog)
    if live is not None and live.snapshot == newest.id:
        raise PromotionConflict(
            f"Version {version} is live already, with its newest snapshot {newest.id}; "
            f"`backcast publish {version}` makes a newer one.",
            current_version=version,
        )
    return Candidate(version, newest, catalog)


def _named_snapshot(
    backcast: Backcast, version: int, name: str, live: Live | None
) -> SnapshotRecord:
    record = backcast.registry.snapshots.get(name)
    if record.version != version:
        raise InvalidInput(
            f"Snapshot {name} is of version {record.version}, not of version {version}."
        )
    if record.condemned_at is not None:
        raise Conflict(f"Snapshot {name} is over its grace period and deleted.", snapshot=name)
    if live is not None and live.version == version:
        raise PromotionConflict(
            f"Version {version} is live already; `backcast rollback --to-snapshot` goes back to an "
            "older snapshot of it, `backcast refresh` to its newest.",
            current_version=version,
        )
    return record


def plan_promotion(
    backcast: Backcast,
    version: int,
    *,
    expected_live: int | Expected | None = None,
    snapshot: str | None = None,
) -> Plan:
    """Check everything that a promotion of ``version`` rests on, and change nothing.

    Raises:
        UnknownVersion, NothingPublished, VersionRetired, PromotionConflict: see ``find_candidate``.
    """
    candidate = find_candidate(backcast, version, expected_live=expected_live, snapshot=snapshot)
    return _examine(backcast, candidate, _walk)


def promote(
    backcast: Backcast,
    version: int,
    *,
    actor: str,
    expected_live: int | Expected | None = None,
    force: bool = False,
    reason: str | None = None,
    snapshot: str | None = None,
    operation: Claim | None = None,
    report: Report = lambda _step, _fraction: None,
) -> Promoted:
    """Load a snapshot of ``version`` into the store and make it live, in one switch.

    It is the newest one, or the ``snapshot`` that is named.

    Where ``version`` is live already, a newer snapshot of it takes the old one's place; where the
    store has lost the live snapshot, it is loaded again, and nothing is switched.

    ``force`` overrides failed gates of lineage, coverage, change and metric, and needs a
    ``reason``: maps or snapshots that are not what was registered are never served.

    Raises:
        Conflict: a gate failed, or another version went live meanwhile. The old one stays live.
    """
    if force and not reason:
        raise InvalidInput("A forced promotion needs a reason.")
    report("check", 0.0)
    candidate = find_candidate(backcast, version, expected_live=expected_live, snapshot=snapshot)
    plan = _examine(
        backcast,
        candidate,
        Examination.write_drift,
        lambda done: report("check", round(0.4 * done, 2)),
    )
    try:
        _demand(plan, candidate, force=force)
        rounding = _load(backcast, plan, report)
        if plan.live is not None and plan.live.snapshot == plan.snapshot:
            return Promoted(_still_live(backcast, plan.live), rounding)
        switch = _switch(plan, actor, reason, operation)
        return Promoted(switch_carrying(backcast, switch), rounding)
    except RegistryError:  # the answer to a commit may be lost, and the bounds be needed
        raise
    except BaseException:  # an interrupt may come when the switch is done
        if plan.drift is not None:
            discard_drift(backcast, plan.drift)
        raise


def _load(backcast: Backcast, plan: Plan, report: Report) -> Rounding:
    report("load", 0.4)
    rounding = load_snapshot(
        backcast, plan.snapshot, lambda done: report("load", round(0.4 + 0.5 * done, 2))
    )
    if plan.drift is not None:
        load_drift(backcast, plan.drift)
    report("switch", 0.9)
    return rounding


def _switch(plan: Plan, actor: str, reason: str | None, operation: Claim | None) -> Switch:
    live = plan.live
    return Switch(
        kind="refresh" if live and live.version == plan.version else "promote",
        seen=live,
        version=plan.version,
        snapshot=plan.snapshot,
        actor=actor,
        reason=reason,
        forced=not plan.passed,
        gates={gate.name: gate.document() for gate in plan.gates},
        operation=operation,
        compared=live,
        diffs=_diff_drafts(plan.diff),
        drift=plan.drift,
    )


def _still_live(backcast: Backcast, filled: Live) -> Live:
    """Return what is live, if that is what the store was filled with again."""
    live = backcast.registry.deployments.live()
    if live is not None and live.snapshot == filled.snapshot:
        return live
    record = backcast.registry.snapshots.get(filled.snapshot)
    if record.condemned_at is not None:  # nobody would drop it any more
        backcast.store.drop(filled.snapshot)
    raise PromotionConflict(
        f"Version {filled.version} is not live from snapshot {filled.snapshot} any more; that was "
        "loaded for nothing.",
        expected_version=filled.version,
        current_version=None if live is None else live.version,
    )


def _diff_drafts(compared: Compared | None) -> list[DiffDraft]:
    if compared is None:
        return []
    ids = compared.diff.ids_document()
    return [DiffDraft(t.version, {"ids": ids, **t.figures()}) for t in compared.diff.targets]


def compare_with_live(
    backcast: Backcast, version: int, advance: Callable[[float], None] = lambda _done: None
) -> Compared:
    """Return what a promotion of the newest snapshot of ``version`` would change.

    Raises:
        UnknownVersion, NothingPublished, VersionRetired, PromotionConflict: see ``find_candidate``.
        Conflict: nothing is live. ArtifactError, StoreError: one of the two cannot be read.
    """
    candidate = find_candidate(backcast, version)
    live, catalog, snapshot = candidate.live, candidate.catalog, candidate.snapshot
    if live is None:
        raise Conflict(f"Nothing is live, so there is nothing to compare version {version} with.")
    side = LiveSide.open(backcast, catalog, live)
    chain = load_chain(catalog, backcast.artifacts, version)
    examination = Examination(backcast, catalog, snapshot, chain, side, advance)
    _walk(examination)
    return examination.result()


Walk = Callable[[Examination], DriftRecord | None]
"""Goes through a candidate once, and may leave its drift bounds in a file."""


def _walk(examination: Examination) -> None:
    for _ in examination.moved():
        pass


def _examine(
    backcast: Backcast,
    candidate: Candidate,
    walk: Walk,
    advance: Callable[[float], None] = lambda _done: None,
) -> Plan:
    catalog, snapshot, version = candidate.catalog, candidate.snapshot, candidate.version
    lineage = Lineage.of(catalog.versions).chain(version)
    known = {v.number: v for v in catalog.versions}
    gates = [lineage_gate(lineage, candidate.live)]
    chain: dict[int, AffineMap] | None = None
    try:
        chain = load_chain(catalog, backcast.artifacts, version)
        gates.append(maps_gate(version, chain))
    except BackcastError as error:
        gates.append(failed_maps_gate(error))
    found = _look(backcast, candidate, chain, walk, advance)
    threshold = backcast.thresholds.metric
    metric = metric_gate(known[version], candidate.live, threshold)
    return Plan(
        version,
        snapshot.id,
        candidate.live,
        tuple(servable_versions(catalog.versions, sorted(lineage))),
        (*gates, *found.gates, metric),
        found.diff,
        found.drift,
    )


@dataclass(frozen=True)
class _Found:
    """What a look at the candidate's vectors found."""

    gates: Sequence[Gate]
    diff: Compared | None = None
    drift: DriftRecord | None = None


def _look(
    backcast: Backcast,
    candidate: Candidate,
    chain: dict[int, AffineMap] | None,
    walk: Walk,
    advance: Callable[[float], None],
) -> _Found:
    snapshot, catalog, live = candidate.snapshot, candidate.catalog, candidate.live
    if live is None or chain is None:
        reason = "nothing is live" if live is None else "the maps cannot be read"
        return _verify(backcast, snapshot, uncompared_gates(reason, passed=True))
    if live.snapshot == snapshot.id:
        reason = "the live snapshot is loaded again"
        return _verify(backcast, snapshot, uncompared_gates(reason, passed=True))
    try:
        side = LiveSide.open(backcast, catalog, live)
    except (SnapshotNotLoaded, ArtifactError) as error:
        return _verify(backcast, snapshot, uncompared_gates(error.message, passed=False))
    examination = Examination(backcast, catalog, snapshot, chain, side, advance)
    try:
        drift = walk(examination)
    except ArtifactUnwritable:
        raise
    except ArtifactError as error:
        return _Found([failed_snapshot_gate(error)])
    compared = examination.result()
    gates = snapshot_gates(snapshot, examination.rows, compared.diff)
    return _Found([*gates, *diff_gates(compared.diff, backcast.thresholds)], compared, drift)


def _verify(backcast: Backcast, snapshot: SnapshotRecord, others: Sequence[Gate]) -> _Found:
    try:
        rows = sum(len(batch.ids) for batch in read_snapshot(backcast.artifacts, snapshot))
    except ArtifactError as error:
        return _Found([failed_snapshot_gate(error)])
    return _Found([*snapshot_gates(snapshot, rows, None), *others])


def _demand(plan: Plan, candidate: Candidate, *, force: bool) -> None:
    failed = [gate for gate in plan.gates if not gate.passed]
    blocking = [gate for gate in failed if not force or not gate.forceable]
    if blocking:
        findings = "; ".join(f"gate {gate.name}: {gate.finding.rstrip('.')}" for gate in blocking)
        what = "it" if len(blocking) == 1 else "them"
        hint = (
            f" Force, with a reason, overrides {what}: "
            f"`backcast promote {plan.version} --force --reason …`."
        )
        if candidate.was_live and any(gate.name == "lineage" for gate in blocking):
            hint = (
                " To go back to what was live before, `backcast rollback` first: it is one switch "
                f"in the grace period, and the versions between say why they are left.{hint}"
            )
        raise Conflict(
            f"Version {plan.version} is not promoted: {findings}."
            + (hint if all(gate.forceable for gate in blocking) else ""),
            gates=[asdict(gate) for gate in plan.gates],
        )


def demand_expected(expected: int | Expected | None, live: Live | None) -> None:
    """Raise PromotionConflict unless what was expected is live."""
    wanted = None if expected is Expected.NOTHING else expected
    found = None if live is None else live.version
    if expected is not None and wanted != found:
        raise PromotionConflict(
            f"{_named(wanted)} was expected to be live, {_named(found).lower()} is.",
            expected_version=wanted,
            current_version=found,
        )


def _named(version: int | None) -> str:
    return "Nothing" if version is None else f"Version {version}"
