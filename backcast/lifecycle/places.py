"""The three places that a version lives in, opened together."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

from backcast.artifacts import Artifacts
from backcast.lifecycle.gates import Thresholds
from backcast.registry import Registry, make_registry, open_registry
from backcast.settings import Settings
from backcast.stores import Precision, VectorStore, open_store
from backcast.tracing import NO_TRACES, Tracing, open_tracing

Report = Callable[[str, float], None]
"""Called with the name of a step and the fraction of the whole that is done."""


@dataclass(frozen=True)
class Backcast:
    """Registry, artifacts and store: the three places that a version lives in.

    Attributes:
        thresholds: what the gates of a promotion hold their figures to.
        precision: that of the vectors which the store will be given.
        tracing: where spans go.
    """

    registry: Registry
    artifacts: Artifacts
    store: VectorStore
    thresholds: Thresholds = field(default_factory=Thresholds)
    precision: Precision = Precision.FLOAT32
    tracing: Tracing = NO_TRACES


@contextmanager
def open_backcast(settings: Settings) -> Iterator[Backcast]:
    """Open registry, artifacts and store, and close them at the end."""
    with (
        open_tracing(settings) as tracing,
        open_registry(settings, tracing) as registry,
        _beside(registry, settings, tracing) as backcast,
    ):
        yield backcast


@contextmanager
def open_new(settings: Settings) -> Iterator[Backcast]:
    """Do the same where a database without a schema is given this release's."""
    with (
        open_tracing(settings) as tracing,
        make_registry(settings.registry_url, tracing) as registry,
        _beside(registry, settings, tracing) as backcast,
    ):
        yield backcast


@contextmanager
def _beside(registry: Registry, settings: Settings, tracing: Tracing) -> Iterator[Backcast]:
    with closing(open_store(settings, tracing)) as store:
        yield Backcast(
            registry,
            Artifacts(settings.artifacts_root),
            store,
            Thresholds.of(settings),
            Precision(settings.store_precision),
            tracing,
        )
