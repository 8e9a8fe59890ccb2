"""A version goes live: gates, then the store, then one switch."""

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from backcast.artifacts import Artifacts
from backcast.chains import load_chain
from backcast.errors import (
    BackcastError,
    Conflict,
    InvalidInput,
    NothingPublished,
    PromotionConflict,
    UnknownVersion,
    VersionRetired,
)
from backcast.lifecycle.carrying import switch_carrying
from backcast.lifecycle.loading import is_loaded, load_snapshot
from backcast.lifecycle.places import Backcast, Report
from backcast.registry import Catalog, Switch
from backcast.snapshots import read_snapshot
from backcast.stores import Rounding
from backcast.versions import (
    Claim,
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


@dataclass(frozen=True)
class Promoted:
    """What went live, and what storing its vectors cost."""

    live: Live
    rounding: Rounding


@dataclass(frozen=True)
class Gate:
    """One named check before a promotion, with what it found."""

    name: str
    passed: bool
    finding: str


@dataclass(frozen=True)
class Plan:
    """What a promotion would do, and whether its gates let it."""

    version: int
    snapshot: str
    live: Live | None
    servable: tuple[int, ...]
    gates: tuple[Gate, ...]

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
        }


def find_candidate(
    backcast: Backcast, version: int, *, expected_live: int | Expected | None = None
) -> Candidate:
    """Look up what a promotion of ``version`` would start from; cheap, as no gate is run.

    ``expected_live`` is the version that must be live now, ``Expected.NOTHING``, or None: any may.

    Raises:
        UnknownVersion, NothingPublished, VersionRetired: there is nothing to promote.
        PromotionConflict: what is live is not what was expected, or it is ``version`` already, and
            loaded.
    """
    catalog = backcast.registry.deployments.catalog()
    known = {v.number: v for v in catalog.versions}.get(version)
    if known is None:
        raise UnknownVersion(version)
    demand_expected(expected_live, catalog.live)
    if known.state is VersionState.RETIRED:
        raise VersionRetired(version, ())
    if known.state is VersionState.REJECTED:
        raise Conflict(f"Version {version} was rejected and cannot be promoted.", version=version)
    snapshot = backcast.registry.snapshots.latest(version)
    if snapshot is None:
        raise NothingPublished(version)
    is_live = catalog.live is not None and catalog.live.snapshot == snapshot.id
    if is_live and is_loaded(backcast.store, snapshot.id):
        raise PromotionConflict(
            f"Version {version} is live already, with its newest snapshot {snapshot.id}.",
            current_version=version,
        )
    return Candidate(version, snapshot, catalog)


def plan_promotion(
    backcast: Backcast, version: int, *, expected_live: int | Expected | None = None
) -> Plan:
    """Check everything that a promotion of ``version`` rests on, and change nothing.

    Raises:
        UnknownVersion, NothingPublished, VersionRetired, PromotionConflict: see ``find_candidate``.
    """
    candidate = find_candidate(backcast, version, expected_live=expected_live)
    catalog, snapshot = candidate.catalog, candidate.snapshot
    chain = Lineage.of(catalog.versions).chain(version)
    gates = (
        _lineage_gate(chain, candidate.live),
        _maps_gate(backcast.artifacts, catalog, version),
        _snapshot_gate(backcast, snapshot),
    )
    state = {v.number: v.state for v in catalog.versions}
    servable = tuple(j for j in sorted(chain) if state[j] is not VersionState.RETIRED)
    return Plan(version, snapshot.id, candidate.live, servable, gates)


def promote(
    backcast: Backcast,
    version: int,
    *,
    actor: str,
    expected_live: int | Expected | None = None,
    force: bool = False,
    reason: str | None = None,
    operation: Claim | None = None,
    report: Report = lambda _step, _fraction: None,
) -> Promoted:
    """Load the newest snapshot of ``version`` into the store and make it live, in one switch.

    Where ``version`` is live already, a newer snapshot of it takes the old one's place; where the
    store has lost the live snapshot, it is loaded again, and nothing is switched.

    ``force`` overrides failed gates of lineage only, and needs a ``reason``: maps or snapshots
    that are not what was registered are never served.

    Raises:
        Conflict: a gate failed, or another version went live meanwhile. The old one stays live.
    """
    if force and not reason:
        raise InvalidInput("A forced promotion needs a reason.")
    report("check", 0.0)
    plan = plan_promotion(backcast, version, expected_live=expected_live)
    _demand(plan, force=force)
    report("load", 0.2)
    rounding = load_snapshot(
        backcast, plan.snapshot, lambda done: report("load", round(0.2 + 0.7 * done, 2))
    )
    if plan.live is not None and plan.live.snapshot == plan.snapshot:
        return Promoted(_still_live(backcast, plan.live), rounding)
    report("switch", 0.9)
    switch = Switch(
        kind="refresh" if plan.live and plan.live.version == version else "promote",
        seen=plan.live,
        version=version,
        snapshot=plan.snapshot,
        actor=actor,
        reason=reason,
        forced=force and not plan.passed,
        gates={gate.name: gate.finding for gate in plan.gates},
        operation=operation,
    )
    return Promoted(switch_carrying(backcast, switch), rounding)


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


def _lineage_gate(chain: list[int], live: Live | None) -> Gate:
    lost = live is not None and live.version not in chain
    path = " → ".join(f"{number}" for number in chain)
    finding = f"chain {path}"
    if live is not None and lost:
        finding += f"; live version {live.version} is not on it, its consumers would get 409"
    return Gate("lineage", not lost, finding)


def _maps_gate(artifacts: Artifacts, catalog: Catalog, version: int) -> Gate:
    try:
        chain = load_chain(catalog, artifacts, version)
    except BackcastError as error:
        return Gate("maps", False, error.message)
    gains = ", ".join(f"{j}: {chain[j].norm:.3g}" for j in sorted(chain))
    return Gate("maps", True, f"largest singular value of W_{version}^j by j: {gains}")


def _snapshot_gate(backcast: Backcast, snapshot: SnapshotRecord) -> Gate:
    try:
        rows = sum(len(batch.ids) for batch in read_snapshot(backcast.artifacts, snapshot))
    except BackcastError as error:
        return Gate("snapshot", False, error.message)
    return Gate("snapshot", True, f"{rows} finite vectors of dim {snapshot.dim}, digests match")


def _demand(plan: Plan, *, force: bool) -> None:
    failed = [gate for gate in plan.gates if not gate.passed]
    blocking = [gate for gate in failed if not force or gate.name != "lineage"]
    gates = {gate.name: gate for gate in plan.gates}
    if blocking:
        raise Conflict(
            f"Version {plan.version} is not promoted: "
            + "; ".join(f"gate {gate.name}: {gate.finding}" for gate in blocking)
            + (". Force, with a reason, overrides it." if blocking == [gates["lineage"]] else "."),
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
