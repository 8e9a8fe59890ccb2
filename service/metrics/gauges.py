"""How this worker stands: what it serves, and how well it follows."""

from collections.abc import Iterator, Mapping
from importlib.metadata import version

from service.engine import Engine, Snapshot, View
from service.metrics import families
from service.metrics.families import Key
from service.metrics.meter import Meter
from service.operations import Operator

_QUANTILES = {"p50": "0.5", "p95": "0.95", "p99": "0.99", "max": "1"}
_RELEASE = version("backcast")


def read_gauges(engine: Engine, operator: Operator, meter: Meter) -> dict[Key, float]:
    """Return every gauge of this worker; ages as the Unix time since which they grow."""
    view, running = engine.view, operator.active
    gauges = {
        families.BUILD.key(_RELEASE): 1.0,
        families.WORKERS.key(): 1.0,
        families.IN_PROGRESS.key(): float(meter.in_progress),
        families.SERVING.key(): float(view.snapshot is not None),
        **dict(_of_view(view)),
    }
    if running is not None:
        gauges[families.OPERATION_RUNNING.key(running)] = 1.0
    return gauges


def _of_view(view: View) -> Iterator[tuple[Key, float]]:
    if view.read_at is not None:
        yield families.REGISTRY_AGE.key(), view.read_at.timestamp()
    if view.snapshot is not None:
        yield from _of_snapshot(view.snapshot)


def _of_snapshot(snapshot: Snapshot) -> Iterator[tuple[Key, float]]:
    live = snapshot.live
    yield families.LIVE_VERSION.key(), float(live.version)
    yield families.LIVE_GENERATION.key(), float(live.generation)
    yield families.LIVE_DELTA.key(), float(live.delta)
    yield families.SNAPSHOT.key(live.snapshot, str(live.version)), 1.0
    yield families.SNAPSHOT_AGE.key(), snapshot.published_at.timestamp()
    if snapshot.bounds is not None:
        figures = snapshot.bounds.record.figures
        for version in snapshot.servable[-families.MOST_VERSIONS :]:
            for entity, spread in figures.get(str(version), {}).items():
                yield from _of_spread(str(version), entity, spread)


def _of_spread(
    version: str, entity: str, spread: Mapping[str, float]
) -> Iterator[tuple[Key, float]]:
    yield families.DRIFT_UNKNOWN.key(version, entity), float(spread["unknown"])
    for name, quantile in _QUANTILES.items():
        if name in spread:  # there is none where no bound is known
            yield families.DRIFT.key(version, entity, quantile), float(spread[name])
