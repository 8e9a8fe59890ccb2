"""Schema of the registry: make it, change it, and refuse one that this code was not made for."""

import importlib.util
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DisconnectionError, NoSuchModuleError
from sqlalchemy.pool import ConnectionPoolEntry

from backcast.errors import ConfigError, InvalidInput, SchemaMismatch
from backcast.registry.database import Database
from backcast.registry.tables import SCHEMA_REVISION

_UPGRADE_LOCK = 0x6261636B  # any constant: PostgreSQL's advisory lock of this name


def make_engine(url: str) -> Engine:
    """Return an engine for ``url``; SQLite gets its parent folder, WAL and foreign keys."""
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        engine = _create(parsed)
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"BACKCAST_DATABASE_URL: {error}.") from error
    except OSError as error:
        raise ConfigError(
            f"The registry's folder {Path(str(parsed.database)).parent} cannot be made: "
            f"{error.strerror}. Set BACKCAST_HOME or BACKCAST_DATABASE_URL."
        ) from error
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{parsed.drivername} needs the package {error.name!r}: pip install backcast[service]."
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _tune_sqlite)
        event.listen(engine, "begin", _begin)
        _follow_file(engine, str(parsed.database))
    return engine


def _create(url: URL) -> Engine:
    if url.get_dialect().driver != "psycopg":
        return create_engine(url, pool_pre_ping=True)
    from backcast.registry import postgres

    engine = create_engine(
        url,
        pool_pre_ping=True,
        pool_timeout=postgres.POOL_S,
        connect_args=postgres.limits_beside(url.query),
    )
    postgres.bound(engine)
    return engine


def _tune_sqlite(connection: sqlite3.Connection, _record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver's guess
    connection.execute("PRAGMA busy_timeout = 10000")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _follow_file(engine: Engine, path: str) -> None:
    """Use no connection to a file that was deleted or replaced: what it is told would be lost."""

    def identity() -> tuple[int, int] | None:
        try:
            found = os.stat(path)
        except OSError:  # none yet, or a database in memory
            return None
        return found.st_dev, found.st_ino

    @event.listens_for(engine, "connect")
    def note(_connection: sqlite3.Connection, record: ConnectionPoolEntry) -> None:
        record.info["file"] = identity()

    @event.listens_for(engine, "checkout")
    def demand(_connection: object, record: ConnectionPoolEntry, _proxy: object) -> None:
        if record.info["file"] != identity():
            raise DisconnectionError  # another connection is made


def _begin(connection: Connection) -> None:
    # A transaction that reads and then writes would otherwise fail, not wait, beside another.
    reads_only = connection.get_execution_options().get("reads_only", False)
    connection.exec_driver_sql("BEGIN" if reads_only else "BEGIN IMMEDIATE")


def found_revision(engine: Engine) -> str | None:
    """Return the revision that the database is at, None where there is no schema."""
    with Database(engine).read() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def check(engine: Engine) -> None:
    """Raise SchemaMismatch unless the database is at this code's revision."""
    found = found_revision(engine)
    if found != SCHEMA_REVISION:
        raise SchemaMismatch(found, SCHEMA_REVISION)


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the schema up to ``revision``; safe to call from several processes at once."""
    with _migrating(engine) as config:
        command.upgrade(config, revision)


def downgrade(engine: Engine, revision: str) -> None:
    """Take the schema down to ``revision`` (``base`` drops every table)."""
    with _migrating(engine) as config:
        command.downgrade(config, revision)


@contextmanager
def _migrating(engine: Engine) -> Iterator[Config]:
    config = Config()
    config.set_main_option("script_location", str(_scripts()))
    with Database(engine).write() as connection, _taking_its_time(connection):
        if engine.dialect.name == "postgresql":
            lock = text("SELECT pg_advisory_xact_lock(:lock)")
            connection.execute(lock, {"lock": _UPGRADE_LOCK})
        config.attributes["connection"] = connection
        try:
            yield config
        except CommandError as error:
            raise InvalidInput(f"The schema cannot be changed: {error}.") from error


@contextmanager
def _taking_its_time(connection: Connection) -> Iterator[None]:
    """Lift the limits on how long a statement may take: tables may be large, others migrate too."""
    if connection.dialect.driver != "psycopg":
        yield
        return
    from backcast.registry import postgres

    with postgres.unbound(connection):
        yield


def _scripts() -> Path:
    spec = importlib.util.find_spec("migrations")
    if spec is None or spec.origin is None:
        raise ConfigError(
            "The migrations are not installed. Run this from a checkout of Backcast "
            "(pip install -e '.[service]') or from its container image."
        )
    return Path(spec.origin).parent
