"""The version registry: what exists, what is live, who may read it."""

from collections.abc import Collection
from datetime import datetime
from typing import Self

from sqlalchemy import Engine, func, select

from backcast.registry import copying, schema, tables
from backcast.registry.audit import Audit
from backcast.registry.consumers import Consumers
from backcast.registry.database import Database, clock
from backcast.registry.deltas import Deltas, StateMoved
from backcast.registry.deployments import Catalog, Deployments, Switch
from backcast.registry.diffs import Diffs, Drifts
from backcast.registry.erasures import Erased, Erasures
from backcast.registry.keys import Keys
from backcast.registry.names import Naming, digest_of
from backcast.registry.operations import OperationDraft, Operations
from backcast.registry.retirements import Retirements
from backcast.registry.snapshots import Snapshots
from backcast.registry.usage import Usage
from backcast.registry.versions import NumberTaken, VersionDraft, Versions
from backcast.settings import Settings
from backcast.tracing import NO_TRACES, Tracing

__all__ = [
    "Catalog",
    "Erased",
    "Naming",
    "NumberTaken",
    "OperationDraft",
    "Operations",
    "Registry",
    "StateMoved",
    "Switch",
    "VersionDraft",
    "digest_of",
    "make_registry",
    "open_registry",
]


class Registry:
    """The registry on one database, by topic."""

    def __init__(self, engine: Engine) -> None:
        try:
            schema.check(engine)
        except BaseException:
            engine.dispose()
            raise
        database = Database(engine)
        self._engine, self._database = engine, database
        self.versions = Versions(database)
        self.snapshots = Snapshots(database)
        self.deltas = Deltas(database)
        self.erasures = Erasures(database)
        self.deployments = Deployments(database)
        self.diffs = Diffs(database)
        self.drifts = Drifts(database)
        self.operations = Operations(database)
        self.keys = Keys(database)
        self.consumers = Consumers(database)
        self.usage = Usage(database)
        self.retirements = Retirements(database)
        self.audit = Audit(database)

    def named_folders(self) -> set[str]:
        """Return every folder of artifacts that a row names, of what is deleted too."""
        columns = (
            tables.versions.c.folder,
            tables.snapshots.c.folder,
            tables.drifts.c.folder,
            tables.deltas.c.file,
        )
        with self._database.read() as connection:
            *folders, files = [list(connection.scalars(select(column))) for column in columns]
        return {name for found in folders for name in found} | {
            file.rpartition("/")[0] for file in files
        }

    def now(self) -> datetime:
        """Return the time on the registry's clock; see ``clock``."""
        with self._database.read() as connection:
            return clock(connection)

    def demand_empty(self, *named_by: str) -> None:
        """Raise Conflict where there are rows already; see ``copying.demand_empty``."""
        with self._database.read() as connection:
            copying.demand_empty(connection, *named_by)

    def rows(self) -> int:
        """Return how many rows all tables hold."""
        with self._database.read() as connection:
            counts = [
                connection.scalar(select(func.count()).select_from(table))
                for table in tables.metadata.tables.values()
            ]
        return sum(count or 0 for count in counts)

    def copy_to(
        self,
        target: "Registry",
        *,
        still: Collection[str] = (),
        finish: copying.Finish = lambda _connection: None,
    ) -> dict[str, copying.Fingerprint]:
        """Copy every row of one moment into an empty registry; see ``copy_registry``."""
        database = target._database
        return copying.copy_registry(self._database, database, still=still, finish=finish)

    def close(self) -> None:
        """Return every connection."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_registry(settings: Settings, tracing: Tracing = NO_TRACES) -> Registry:
    """Open the registry that ``settings`` name.

    A new SQLite database under home is made on the spot; any other is upgraded by
    ``backcast db upgrade`` only.

    Raises:
        SchemaMismatch: the schema is not this release's.
        RegistryError: the database does not answer.
    """
    if not settings.database_url:
        return make_registry(settings.registry_url, tracing)
    return Registry(_engine(settings.registry_url, tracing))


def make_registry(url: str, tracing: Tracing = NO_TRACES) -> Registry:
    """Open the registry at ``url``; a database without a schema gets this release's."""
    engine = _engine(url, tracing)
    if schema.found_revision(engine) is None:
        schema.upgrade(engine)
    return Registry(engine)


def _engine(url: str, tracing: Tracing) -> Engine:
    engine = schema.make_engine(url)
    tracing.watch(engine)
    return engine
