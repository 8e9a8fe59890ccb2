"""Published snapshots."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from sqlalchemy import Row, insert, select, update

from backcast.errors import UnknownSnapshot
from backcast.registry import tables
from backcast.registry.database import Database, utc_now
from backcast.versions import SnapshotRecord


class Snapshots:
    """Read and register snapshots. A snapshot's contents never change; only its fate does."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def register(self, record: SnapshotRecord, details: Mapping[str, Any]) -> None:
        """Write a snapshot whose files are already durable."""
        values = {field: getattr(record, field) for field in _FIELDS}
        values["counts"] = dict(record.counts)
        with self._db.write() as connection:
            connection.execute(insert(tables.snapshots).values(**values, details=dict(details)))

    def get(self, id: str) -> SnapshotRecord:
        """Return one snapshot; raise UnknownSnapshot."""
        with self._db.read() as connection:
            row = connection.execute(_select().where(tables.snapshots.c.id == id)).first()
        if row is None:
            raise UnknownSnapshot(id)
        return _snapshot(row)

    def latest(self, version: int) -> SnapshotRecord | None:
        """Return the newest snapshot of ``version`` that still exists, or None."""
        wanted = (tables.snapshots.c.version == version) & tables.snapshots.c.deleted_at.is_(None)
        newest_first = (tables.snapshots.c.created_at.desc(), tables.snapshots.c.id.desc())
        with self._db.read() as connection:
            row = connection.execute(_select().where(wanted).order_by(*newest_first)).first()
        return None if row is None else _snapshot(row)

    def superseded_before(self, moment: datetime) -> list[SnapshotRecord]:
        """Return the snapshots superseded before ``moment`` whose files still exist."""
        wanted = (tables.snapshots.c.superseded_at <= moment) & (
            tables.snapshots.c.deleted_at.is_(None)
        )
        with self._db.read() as connection:
            return [_snapshot(row) for row in connection.execute(_select().where(wanted))]

    @contextmanager
    def deleting(self, id: str, moment: datetime) -> Iterator[bool]:
        """Note that a snapshot superseded before ``moment`` is gone, once the block has deleted it.

        Yields whether it may: a snapshot that is live again, or deleted already, must be left
        alone. Until the block ends it cannot go live, and where the block fails nothing is noted.
        """
        gone = (
            update(tables.snapshots)
            .where(tables.snapshots.c.id == id)
            .where(tables.snapshots.c.superseded_at <= moment)
            .where(tables.snapshots.c.deleted_at.is_(None))
            .values(deleted_at=utc_now())
        )
        with self._db.write() as connection:
            yield connection.execute(gone).rowcount == 1


_FIELDS = tuple(SnapshotRecord.__dataclass_fields__)


def _select() -> Any:
    return select(*(tables.snapshots.c[name] for name in _FIELDS))


def _snapshot(row: Row[Any]) -> SnapshotRecord:
    return SnapshotRecord(**row._mapping)
