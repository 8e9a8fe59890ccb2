"""The registry's rows, copied from one database to another, whichever kinds they are."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy import JSON, Column, Connection, Table, bindparam, func, insert, select, text

from backcast.errors import Conflict, RegistryError
from backcast.registry import schema
from backcast.registry.database import Database, shown_url, take_turn
from backcast.registry.tables import metadata

_ROWS = 500  # of one statement
_MODULUS = 1 << 256
_EVERY = frozenset(metadata.tables)

Finish = Callable[[Connection], None]
"""Writes what a copy has more than its source, within the transaction that fills it."""


@dataclass(frozen=True)
class Fingerprint:
    """What a table holds, in whatever order: the number of its rows and the sum of their SHA-256.

    The same rows have the same fingerprint in every database.
    """

    rows: int = 0
    sum: int = 0

    def plus(self, row: tuple[Any, ...]) -> "Fingerprint":
        """Return the fingerprint with one row more."""
        digest = hashlib.sha256(orjson.dumps(row, option=orjson.OPT_SORT_KEYS)).digest()
        return Fingerprint(self.rows + 1, (self.sum + int.from_bytes(digest)) % _MODULUS)


def copy_registry(
    source: Database,
    target: Database,
    *,
    still: Collection[str] = (),
    finish: Finish = lambda _connection: None,
) -> dict[str, Fingerprint]:
    """Copy every row of one moment into an empty registry: all of it, compared, or nothing.

    ``still`` are the tables that must not have changed when the copy is done. Returns what each
    table held before ``finish``.

    Raises:
        SchemaMismatch: a registry is not of this release, so that columns might be left out.
        Conflict: the target is not empty, or a table that shall be still was changed.
        RegistryError: the target does not hold what it was given.
    """
    for database in (source, target):
        schema.demand_current(database.engine)
    with target.write() as filled:
        take_turn(filled)
        demand_empty(filled)
        with source.read() as moment:
            read = copy_rows(moment, filled)
        wrong = differing(read, fingerprints(filled))
        if wrong:
            raise RegistryError(
                f"The copy of {', '.join(wrong)} is not what was read; nothing was kept."
            )
        with source.read() as now:
            changed = differing(fingerprints(now, still), read)
        if changed:
            raise Conflict(
                f"The registry was changed while it was copied ({', '.join(changed)}); nothing was "
                "kept. Stop who writes to it, and run this again."
            )
        finish(filled)
    return read


def copy_rows(source: Connection, target: Connection) -> dict[str, Fingerprint]:
    """Copy every row into empty tables of the same schema, within the callers' transactions.

    Numbers that a database gives go on after the highest it ever gave. Returns what was read, by
    table.

    Raises:
        InvalidInput: the target cannot hold a value that the source did.
    """
    read = {}
    for table in metadata.sorted_tables:
        found = Fingerprint()
        for rows in _rows(source, table):
            for row in rows:
                found = found.plus(row)
            target.execute(_insert(table), [_parameters(table, row) for row in rows])
        _go_on_after(source, target, table)
        read[table.name] = found
    return read


def fingerprints(connection: Connection, names: Collection[str] = _EVERY) -> dict[str, Fingerprint]:
    """Return what tables hold, all or those named."""
    held = {}
    for table in (table for table in metadata.sorted_tables if table.name in names):
        found = Fingerprint()
        for rows in _rows(connection, table):
            for row in rows:
                found = found.plus(row)
        held[table.name] = found
    return held


def differing(one: Mapping[str, Fingerprint], other: Mapping[str, Fingerprint]) -> list[str]:
    """Return the tables of ``one`` that do not hold the same in ``other``, sorted."""
    return sorted(name for name in one if one[name] != other[name])


def demand_empty(
    connection: Connection, named_by: str = "BACKCAST_DATABASE_URL or BACKCAST_HOME"
) -> None:
    """Raise Conflict where the registry holds rows already; ``named_by`` names another."""
    for table in metadata.sorted_tables:
        if connection.execute(select(*table.primary_key).limit(1)).first() is not None:
            where = shown_url(connection.engine.url)
            raise Conflict(
                f"The registry {where} is not empty: {table.name} has rows; nothing was changed. "
                f"Name an empty one with {named_by}."
            )


def _rows(connection: Connection, table: Table) -> Iterator[list[tuple[Any, ...]]]:
    # Parents have smaller numbers than their children, so they come first.
    every = select(table).order_by(*table.primary_key).execution_options(yield_per=_ROWS)
    for rows in connection.execute(every).partitions():
        yield [tuple(row) for row in rows]


def _insert(table: Table) -> Any:
    values = {column.name: bindparam(f"_{column.name}", type_=_type(column)) for column in table.c}
    return insert(table).values(values)


def _type(column: Column[Any]) -> Any:
    # What is absent stays absent: by itself, SQLAlchemy would write a JSON null.
    return JSON(none_as_null=True) if isinstance(column.type, JSON) else column.type


def _parameters(table: Table, row: tuple[Any, ...]) -> dict[str, Any]:
    return {f"_{column.name}": value for column, value in zip(table.c, row, strict=True)}


def _go_on_after(source: Connection, target: Connection, table: Table) -> None:
    column = table.autoincrement_column
    if column is None:
        return
    highest = max(_last_given(source, table, column), _highest(target, column))
    if not highest:
        return
    if target.dialect.name == "postgresql":
        target.execute(
            text("SELECT setval(pg_get_serial_sequence(:name, :column), :highest)"),
            {"name": table.name, "column": column.name, "highest": highest},
        )
    elif table.dialect_options["sqlite"]["autoincrement"]:
        target.execute(text("DELETE FROM sqlite_sequence WHERE name = :name"), {"name": table.name})
        target.execute(
            text("INSERT INTO sqlite_sequence (name, seq) VALUES (:name, :highest)"),
            {"name": table.name, "highest": highest},
        )


def _last_given(connection: Connection, table: Table, column: Column[Any]) -> int:
    if connection.dialect.name == "postgresql":
        name = connection.scalar(
            text("SELECT pg_get_serial_sequence(:name, :column)"),
            {"name": table.name, "column": column.name},
        )
        given = text(f"SELECT last_value FROM {name} WHERE is_called")
        return int(connection.scalar(given) or 0)
    if not table.dialect_options["sqlite"]["autoincrement"]:
        return 0  # the highest there is: no row of such a table is ever deleted
    given = text("SELECT seq FROM sqlite_sequence WHERE name = :name")
    return int(connection.scalar(given, {"name": table.name}) or 0)


def _highest(connection: Connection, column: Column[Any]) -> int:
    return int(connection.scalar(select(func.max(column))) or 0)
