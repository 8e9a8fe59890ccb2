"""Schema of the registry: make it, change it, and refuse one that this code cannot run on."""

import importlib.util
import logging
import os
import random
import re
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DisconnectionError, NoSuchModuleError
from sqlalchemy.pool import ConnectionPoolEntry

from backcast.errors import (
    ConfigError,
    Conflict,
    InvalidInput,
    RegistryError,
    SchemaMismatch,
)
from backcast.folders import make_private
from backcast.registry.database import Database
from backcast.registry.revisions import Fit, Revision, fit
from backcast.registry.tables import SCHEMA_REVISION

logger = logging.getLogger(__name__)

_UPGRADE_LOCK = 0x6261636B  # any constant: PostgreSQL's advisory lock of this name
_LOCK_MS = 500  # how long a migration waits for a table, and all others behind it
_LOCK_TAKEN = "55P03"  # of PostgreSQL
_ATTEMPTS = 60

_ENCODE = "In a password : is %3A, / %2F and @ %40."
# As SQLAlchemy reads one: who, perhaps with a password, and where, in which no @ is left.
_SERVER_URL = re.compile(r"[^:]*://(?:[^:/]*(?::[^@]*)?@)?[^@]*")


def make_engine(url: str) -> Engine:
    """Return an engine for ``url``; SQLite gets its parent folder, WAL and foreign keys.

    A folder or a file that is made here is for the user of this process alone.

    Raises:
        ConfigError: the URL names no database that could be used; no part of a password is shown.
    """
    file = None
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() != "sqlite":
            _demand_whole_password(url)
            _demand_postgresql(parsed)
        elif (file := _sqlite_file(parsed)) is not None:
            make_private(file.parent)
        engine = _create(parsed)
    except (ArgumentError, NoSuchModuleError) as error:
        raise ConfigError(f"BACKCAST_DATABASE_URL: {error}.") from error
    except ValueError:  # which repeats what stands in the port's place: of a password, perhaps
        raise ConfigError(f"BACKCAST_DATABASE_URL: its port is no number. {_ENCODE}") from None
    except OSError as error:
        raise ConfigError(
            f"The registry's folder {file and file.parent} cannot be made: "
            f"{error.strerror}. Set BACKCAST_HOME or BACKCAST_DATABASE_URL."
        ) from error
    except ModuleNotFoundError as error:
        mend = "write sqlite:///… or postgresql+psycopg://… instead"
        if error.name == "psycopg":
            mend = "pip install backcast[service]"
        raise ConfigError(
            f"{parsed.drivername} needs the package {error.name!r}: {mend}."
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "do_connect", _make_file)
        event.listen(engine, "connect", _tune_sqlite)
        event.listen(engine, "begin", _begin)
        if file is not None:
            _follow_file(engine, file)
    return engine


def _sqlite_file(url: URL) -> Path | None:
    """Return the file of a SQLite database, None where it lies in memory."""
    (name,), options = url.get_dialect()().create_connect_args(url)
    if not options.get("uri"):
        return None if name == ":memory:" else Path(str(url.database))
    uri = urlsplit(name)
    in_memory = uri.path in {"", ":memory:"} or "memory" in parse_qs(uri.query).get("mode", [])
    return None if in_memory else Path(unquote(uri.path))


def _demand_whole_password(url: str) -> None:
    # One that is cut at its first @ goes on in the host or the database, which messages name.
    if _SERVER_URL.fullmatch(url) is None:
        raise ConfigError(f"BACKCAST_DATABASE_URL: it has an @ too many. {_ENCODE}")


def _demand_postgresql(url: URL) -> None:
    if url.get_backend_name() != "postgresql":
        raise ConfigError(
            "BACKCAST_DATABASE_URL: the registry is SQLite (sqlite:///…) or PostgreSQL "
            f"(postgresql+psycopg://…), not {url.get_backend_name()}."
        )


def _create(url: URL) -> Engine:
    if url.get_dialect().driver != "psycopg":
        return create_engine(url, pool_pre_ping=True, hide_parameters=True)
    from backcast.registry import postgres

    engine = create_engine(
        url,
        pool_pre_ping=True,
        hide_parameters=True,  # an error must show no id, wherever it is logged
        pool_timeout=postgres.POOL_S,
        connect_args=postgres.limits_beside(url.query),
    )
    postgres.bound(engine)
    return engine


def _make_file(_dialect: object, _record: object, names: list[str], _options: object) -> None:
    # SQLite would make it under the umask; what it makes beside it has the rights of the file.
    if not names[0].startswith((":memory:", "file:")):
        with suppress(OSError):  # it is there, or SQLite will say what is wrong
            os.close(os.open(names[0], os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))


def _tune_sqlite(connection: sqlite3.Connection, _record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver's guess
    connection.execute("PRAGMA busy_timeout = 10000")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


def _follow_file(engine: Engine, path: Path) -> None:
    """Use no connection to a file that was deleted or replaced: what it is told would be lost."""

    def identity() -> tuple[int, int] | None:
        try:
            found = os.stat(path)
        except OSError:  # none yet
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


def check(engine: Engine) -> Fit:
    """Return how the schema fits; raise SchemaMismatch unless this code can run on it."""
    found = found_revision(engine)
    fits = fit(found, SCHEMA_REVISION)
    if not fits.runs:
        raise SchemaMismatch(found, SCHEMA_REVISION, newer=fits is Fit.NEWER)
    return fits


def demand_current(engine: Engine) -> None:
    """Raise SchemaMismatch unless this code knows every column there is, to copy them."""
    found = found_revision(engine)
    if found != SCHEMA_REVISION:
        newer = fit(found, SCHEMA_REVISION) in {Fit.NEWER, Fit.EXPANDED}
        raise SchemaMismatch(found, SCHEMA_REVISION, newer=newer)


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Bring the schema up to ``revision``, each migration in a transaction of its own.

    Where there is none yet, it is made in one.

    Safe to call from several processes at once, and while replicas serve: a migration that cannot
    have a table at once lets them go first, and tries again. A schema that a newer release has
    expanded stays as it is.

    Raises:
        SchemaMismatch: the schema is that of a newer release, and this code cannot run on it.
        Conflict: other transactions held a table all the time; the migrations before stand.
    """
    script = ScriptDirectory.from_config(_config())
    while True:
        found = found_revision(engine)
        if found is not None and _check_not_newer(found) is Fit.EXPANDED:
            return
        steps = _steps(script, found, revision)
        if not steps:
            return
        # A new schema is there whole or not at all: who opens it meanwhile finds no older one.
        goal = steps[-1] if found is None else steps[0]
        _patiently(engine, lambda config: _step(config, found, goal))  # noqa: B023


def upgrade_url(url: str) -> None:
    """Do the same to the database at ``url``."""
    engine = make_engine(url)
    try:
        upgrade(engine)
    finally:
        engine.dispose()


def demand_expansion(engine: Engine) -> None:
    """Raise Conflict where an upgrade would leave behind replicas that may be running now."""
    found = found_revision(engine)
    if found is None or _check_not_newer(found) is Fit.EXPANDED:
        return
    for step in _steps(ScriptDirectory.from_config(_config()), found, "head"):
        if Revision.parse(step).ends_code_of(Revision.parse(found)):
            raise Conflict(
                f"Migration {step} takes away what code that can run on schema {found} rests on; "
                "nothing was changed. Once no replica of an older release runs any more: "
                "backcast db upgrade --contract."
            )


def _check_not_newer(found: str) -> Fit:
    """Return how the revision ``found`` fits; raise SchemaMismatch where it is too new."""
    fits = fit(found, SCHEMA_REVISION)
    if fits is Fit.NEWER:
        raise SchemaMismatch(found, SCHEMA_REVISION, newer=True)
    return fits


def downgrade(engine: Engine, revision: str) -> None:
    """Take the schema down to ``revision`` (``base`` drops every table)."""
    _patiently(engine, lambda config: command.downgrade(config, revision))


def _steps(script: ScriptDirectory, found: str | None, revision: str) -> list[str]:
    """Return the revisions between ``found`` and ``revision``, in their order."""
    try:
        return [step.revision for step in script.iterate_revisions(revision, found or "base")][::-1]
    except CommandError as error:
        raise InvalidInput(f"The schema cannot be changed: {error}.") from error


def _step(config: Config, found: str | None, revision: str) -> None:
    context = MigrationContext.configure(config.attributes["connection"])
    if context.get_current_revision() == found:  # else another process has done it
        command.upgrade(config, revision)


def _patiently(engine: Engine, act: Callable[[Config], None]) -> None:
    for attempt in range(_ATTEMPTS):
        try:
            with _migrating(engine) as config:
                act(config)
        except RegistryError as error:
            if not _lacked_a_lock(error):
                raise
            if attempt == 0:
                logger.warning("a migration waits for a table that others use")
            time.sleep(random.uniform(0.5, 1.5))
        else:
            return
    raise Conflict(
        f"Other transactions held a table in each of {_ATTEMPTS} attempts to migrate it. Find them "
        "in pg_stat_activity, end them, and run `backcast db upgrade` again."
    )


def _lacked_a_lock(error: RegistryError) -> bool:
    return getattr(getattr(error.__cause__, "orig", None), "sqlstate", None) == _LOCK_TAKEN


@contextmanager
def _migrating(engine: Engine) -> Iterator[Config]:
    config = _config()
    with Database(engine).write() as connection, _taking_its_time(connection):
        if engine.dialect.name == "postgresql":
            lock = text("SELECT pg_advisory_xact_lock(:lock)")
            connection.execute(lock, {"lock": _UPGRADE_LOCK})
            # Who waits for a table keeps all others waiting that come after.
            connection.execute(text(f"SET LOCAL lock_timeout = {_LOCK_MS}"))
        config.attributes["connection"] = connection
        try:
            yield config
        except CommandError as error:
            raise InvalidInput(f"The schema cannot be changed: {error}.") from error


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_scripts()))
    return config


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
