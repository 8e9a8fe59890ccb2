"""Who asked for which version, by UTC day."""

from collections.abc import Callable, Sequence
from datetime import date, timedelta
from typing import Any

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from backcast.registry import tables
from backcast.registry.consumers import ANONYMOUS
from backcast.registry.database import Database, utc_now
from backcast.versions import Use

_DAY = ["consumer", "version", "day"]
_INSERT: dict[str, Callable[..., Any]] = {"postgresql": postgresql.insert, "sqlite": sqlite.insert}


def first_day(days: int) -> date:
    """Return the first of the last ``days`` UTC days, today included."""
    return utc_now().date() - timedelta(days=days - 1)


class Usage:
    """Add up counts, and read them."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def add(self, uses: Sequence[Use]) -> None:
        """Add counts to what is there, all or none of them; any number of replicas may at once."""
        with self._db.write() as connection:
            ids = _consumers(connection, {use.consumer for use in uses})
            rows = [
                {
                    "consumer": ids[use.consumer],
                    "version": use.version,
                    "day": use.day,
                    "requests": use.requests,
                    "vectors": use.vectors,
                }
                for use in uses
            ]
            # In one order everywhere, so that no two replicas wait for each other.
            rows.sort(key=lambda row: [row[name] for name in _DAY])
            if rows:
                connection.execute(_adding(connection), rows)

    def since(self, day: date, version: int | None = None) -> list[Use]:
        """Return the counts of ``day`` and later, of one version or all: newest day first."""
        usage, consumers = tables.usage.c, tables.consumers.c
        wanted = (
            select(
                consumers.name.label("consumer"),
                usage.version,
                usage.day,
                usage.requests,
                usage.vectors,
            )
            .join(tables.consumers, consumers.id == usage.consumer)
            .where(usage.day >= day)
            .order_by(usage.day.desc(), usage.version, consumers.name)
        )
        if version is not None:
            wanted = wanted.where(usage.version == version)
        with self._db.read() as connection:
            return [Use(**row._mapping) for row in connection.execute(wanted)]


def _consumers(connection: Connection, names: set[str]) -> dict[str, int]:
    if ANONYMOUS in names:  # the one consumer that no key has made
        made = _INSERT[connection.dialect.name](tables.consumers)
        connection.execute(
            made.values(name=ANONYMOUS, created_at=utc_now()).on_conflict_do_nothing()
        )
    consumers = tables.consumers.c
    found = select(consumers.name, consumers.id).where(consumers.name.in_(names))
    return {row.name: row.id for row in connection.execute(found)}


def _adding(connection: Connection) -> Any:
    new = _INSERT[connection.dialect.name](tables.usage)
    counts = {name: tables.usage.c[name] + new.excluded[name] for name in ("requests", "vectors")}
    return new.on_conflict_do_update(index_elements=_DAY, set_=counts)
