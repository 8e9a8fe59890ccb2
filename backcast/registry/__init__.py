"""The version registry: what exists, what is live, who may read it."""

from datetime import datetime
from typing import Self

from sqlalchemy import Engine, select

from backcast.registry import schema, tables
from backcast.registry.consumers import Consumers
from backcast.registry.database import Database, clock
from backcast.registry.deltas import Deltas, StateMoved
from backcast.registry.deployments import Catalog, Deployments, Switch
from backcast.registry.diffs import Diffs, Drifts
from backcast.registry.erasures import Erased, Erasures, digest_of
from backcast.registry.keys import Keys
from backcast.registry.operations import OperationDraft, Operations
from backcast.registry.retirements import Retirements
from backcast.registry.snapshots import Snapshots
from backcast.registry.usage import Usage
from backcast.registry.versions import NumberTaken, VersionDraft, Versions
from backcast.settings import Settings

__all__ = [
    "Catalog",
    "Erased",
    "NumberTaken",
    "OperationDraft",
    "Operations",
    "Registry",
    "StateMoved",
    "Switch",
    "VersionDraft",
    "digest_of",
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

    def close(self) -> None:
        """Return every connection."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_registry(settings: Settings) -> Registry:
    """Open the registry that ``settings`` name.

    A new SQLite database under home is made on the spot; any other is upgraded by
    ``backcast db upgrade`` only.

    Raises:
        SchemaMismatch: the schema is not this release's.
        RegistryError: the database does not answer.
    """
    engine = schema.make_engine(settings.registry_url)
    if not settings.database_url and schema.found_revision(engine) is None:
        schema.upgrade(engine)
    return Registry(engine)
