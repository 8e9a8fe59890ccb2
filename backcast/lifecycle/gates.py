"""Named checks before a promotion, each with its figure and the threshold it is held to."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from backcast.diff import Diff, TargetDiff
from backcast.errors import ArtifactCorrupt, BackcastError, NotFinite
from backcast.settings import Settings
from backcast.transforms import AffineMap
from backcast.versions import Live, SnapshotRecord, Version

FORCEABLE = frozenset({"lineage", "coverage", "change", "metric"})
"""What force overrides. What is not as it was registered, or not finite, is never served."""

UNCOMPARED = ("coverage", "change")
"""What stands for the gates of each entity kind and version where nothing was compared."""


@dataclass(frozen=True)
class Gate:
    """One named check before a promotion, with what it found.

    Attributes:
        figure: what was measured. threshold: what it is held to; None where it was not measured,
            or is not held to a number.
    """

    name: str
    passed: bool
    finding: str
    figure: float | None = None
    threshold: float | None = None

    @property
    def forceable(self) -> bool:
        """Whether force overrides it."""
        return self.name.partition("-")[0] in FORCEABLE

    def document(self) -> dict[str, Any]:
        """Return it as a JSON document, without its name."""
        found = asdict(self)
        del found["name"]
        return found


@dataclass(frozen=True)
class Thresholds:
    """What gates hold their figures to; see the settings of these names."""

    coverage: float = 0.99
    change: float = 1.0
    metric: float = 0.9

    @classmethod
    def of(cls, settings: Settings) -> "Thresholds":
        """Read them off the settings."""
        return cls(settings.gate_coverage, settings.gate_change, settings.gate_metric)


def lineage_gate(chain: Sequence[int], live: Live | None) -> Gate:
    """Check that the live version stays servable."""
    lost = live is not None and live.version not in chain
    path = " → ".join(f"{number}" for number in chain)
    finding = f"chain {path}"
    if live is not None and lost:
        finding += f"; live version {live.version} is not on it, its consumers would get 409"
    return Gate("lineage", not lost, finding)


def maps_gate(version: int, chain: Mapping[int, AffineMap]) -> Gate:
    """State how much the maps, which could be read, lengthen vectors at most."""
    gains = {j: chain[j].norm for j in sorted(chain)}
    listed = ", ".join(f"{j}: {gain:.3g}" for j, gain in gains.items())
    finding = f"largest singular value of W_{version}^j by j: {listed}"
    return Gate("maps", True, finding, max(gains.values()))


def failed_maps_gate(error: BackcastError) -> Gate:
    """Say why the maps cannot be read."""
    return Gate("maps", False, error.message)


def snapshot_gates(snapshot: SnapshotRecord, rows: int, diff: Diff | None) -> list[Gate]:
    """State what was verified of the vectors, and check that products of them are finite."""
    verified = f"{rows} vectors of dim {snapshot.dim}, digests match"
    overflows = sum(
        change.not_finite
        for target in (diff.targets if diff else ())
        for change in target.entities.values()
    )
    finding = "all vectors are finite, as published and as served"
    if diff is None:
        finding = "all vectors are finite"
    elif overflows:
        finding = f"{overflows} products of finite vectors and maps overflow float32"
    return [
        Gate("snapshot", True, verified, rows),
        Gate("finite", not overflows, finding, overflows, 0),
    ]


def failed_snapshot_gate(error: BackcastError) -> Gate:
    """Say why the vectors cannot be read, or which of them are not finite."""
    cause = error.__cause__
    if isinstance(error, ArtifactCorrupt) and isinstance(cause, NotFinite):
        return Gate("finite", False, error.message, cause.data["count"], 0)
    return Gate("snapshot", False, error.message)


def diff_gates(diff: Diff, thresholds: Thresholds) -> list[Gate]:
    """Check how many live ids stay, and how far vectors move."""
    coverage = [
        Gate(
            f"coverage-{entity}",
            overlap.coverage >= thresholds.coverage,
            f"{overlap.compared} of {overlap.before} live {entity}s are in the snapshot, "
            f"{overlap.gained} are new",
            overlap.coverage,
            thresholds.coverage,
        )
        for entity, overlap in diff.ids.items()
    ]
    return coverage + [_change_gate(target, thresholds.change) for target in diff.targets]


def _change_gate(target: TargetDiff, threshold: float) -> Gate:
    measured = {e: c.relative.p95 for e, c in target.entities.items() if c.relative is not None}
    name = f"change-{target.version}"
    if not measured:
        return Gate(name, True, "no vector was compared", None, threshold)
    worst = max(measured, key=lambda entity: measured[entity])
    finding = (
        f"5 % of the {worst} vectors of version {target.version} move by more than "
        f"{100 * measured[worst]:.3g} % of their length"
    )
    return Gate(name, measured[worst] <= threshold, finding, measured[worst], threshold)


def uncompared_gates(reason: str, *, passed: bool) -> list[Gate]:
    """Say why nothing was compared with what is live."""
    return [Gate(name, passed, f"not measured: {reason}") for name in UNCOMPARED]


def metric_gate(version: Version, live: Live | None, threshold: float) -> Gate:
    """Check what M_k reaches against its parent on the same evaluation edges."""
    if live is not None and live.version == version.number:
        return Gate("metric", True, f"passed, the model of version {live.version} is live already")
    if version.parent is None:
        return Gate("metric", True, "passed, the first version has no parent to compare with")
    metrics = version.details.get("metrics") or {}
    own, parents = metrics.get("recall_at_50"), metrics.get("parent_recall_at_50")
    if own is None or parents is None:
        reason = "passed, not measured: training had no --horizon to measure until"
        return Gate("metric", True, reason, None, threshold)
    finding = f"Recall@50 {own:.4f}, that of version {version.parent} {parents:.4f}"
    if parents <= 0:
        return Gate("metric", True, f"{finding}: nothing to lose", None, threshold)
    return Gate("metric", own / parents >= threshold, finding, own / parents, threshold)
