"""The three places that a version lives in, opened together."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

from backcast.artifacts import Artifacts
from backcast.registry import Registry, open_registry
from backcast.settings import Settings
from backcast.stores import VectorStore, open_store

Report = Callable[[str, float], None]
"""Called with the name of a step and the fraction of the whole that is done."""


@dataclass(frozen=True)
class Backcast:
    """Registry, artifacts and store: the three places that a version lives in."""

    registry: Registry
    artifacts: Artifacts
    store: VectorStore


@contextmanager
def open_backcast(settings: Settings) -> Iterator[Backcast]:
    """Open registry, artifacts and store, and close them at the end."""
    with open_registry(settings) as registry, closing(open_store(settings)) as store:
        yield Backcast(registry, Artifacts(settings.artifacts_root), store)
