"""Transactions on the registry's database; driver errors are translated here and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from sqlalchemy import URL, Connection, Engine, func, make_url, select, text
from sqlalchemy.exc import DatabaseError, DataError, InterfaceError, OperationalError, TimeoutError

from backcast.errors import InvalidInput, RegistryError

_IDLE_STATE = "25P03"  # PostgreSQL ended a transaction whose process slept for too long
_NO_RIGHT_STATE = "42501"  # of PostgreSQL: the role lacks a privilege
_GONE_STATES = {"42703", "42P01"}  # a column, a table: a newer release took it away meanwhile
_STATE_LOCK = 0x73746174  # any constant: PostgreSQL's advisory lock of this name


def utc_now() -> datetime:
    """Return the time, aware and in UTC."""
    return datetime.now(UTC)


def clock(connection: Connection) -> datetime:
    """Return the time by which the registry's moments are compared, within a transaction.

    Hosts' clocks differ, so it is that of the database's server; SQLite has one host.
    """
    if connection.dialect.name == "sqlite":
        return utc_now()
    now: datetime = connection.execute(select(func.clock_timestamp())).scalar_one()
    return now.astimezone(UTC)


def shown_url(url: str | URL) -> str:
    """Return a database's URL for a log or a message, without all that may be a password."""
    return make_url(url).set(query={}).render_as_string(hide_password=True)


class Database:
    """One engine, two kinds of transaction."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # SQLite reads one moment anyway; PostgreSQL would read a newer one at every statement.
        snapshot = {} if engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
        self._reader = engine.execution_options(reads_only=True, **snapshot)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that writes nothing and sees the database at one moment."""
        with _translated(self.engine), self._reader.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that is committed whole, or not at all where an error leaves it."""
        with _translated(self.engine), self.engine.begin() as connection:
            yield connection


def take_turn(connection: Connection) -> None:
    """Let no other transaction change what snapshots amount to before this one has ended.

    They touch several rows, in different orders, and rest on what they have not seen: an erasure on
    there being no further snapshot, a publication on there being no further erasure. Writers of
    SQLite wait for each other anyway.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _STATE_LOCK})


@contextmanager
def _translated(engine: Engine) -> Iterator[None]:
    try:
        yield
    except (DataError, OverflowError) as error:  # one has no NUL in a text, the other a limit
        reason = _first_line(getattr(error, "orig", error))
        raise InvalidInput(f"The registry cannot hold what it was given: {reason}.") from error
    except (DatabaseError, InterfaceError) as error:
        # The bare class is what SQLite raises for a file that is no database; its other
        # subclasses, such as IntegrityError, tell of a statement and are the caller's.
        state, reason = getattr(error.orig, "sqlstate", None), _first_line(error.orig)
        if state in _GONE_STATES:
            raise RegistryError(
                f"The registry's schema is not this release's any more: {reason}."
            ) from error
        if state == _NO_RIGHT_STATE:
            raise RegistryError(
                f"The role in BACKCAST_DATABASE_URL may not do this: {reason}. "
                "Use the one that owns the tables."
            ) from error
        known = type(error) in {DatabaseError, OperationalError, InterfaceError}
        if not known and state != _IDLE_STATE:
            raise
        where = shown_url(engine.url)
        raise RegistryError(f"The registry {where} does not answer: {reason}.") from error
    except TimeoutError as error:  # every connection is taken
        raise RegistryError("The registry has no free connection; try again.") from error


def _first_line(error: object) -> str:
    return str(error).strip().partition("\n")[0]
