"""Published snapshots."""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update

from backcast.errors import Conflict, UnknownSnapshot
from backcast.registry import tables
from backcast.registry.database import Database, take_turn, utc_now
from backcast.registry.deltas import StateMoved, append_deltas
from backcast.registry.erasures import Erased, last_erasure
from backcast.versions import DeltaDraft, DeltaKind, Live, SnapshotRecord


class Snapshots:
    """Read and register snapshots. A snapshot's contents never change; only its fate does."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def register(
        self,
        record: SnapshotRecord,
        details: Mapping[str, Any],
        *,
        erased: Erased | None = None,
        live: Live | None = None,
        drafts: Sequence[DeltaDraft] = (),
    ) -> None:
        """Write a snapshot whose files are already durable, and the first deltas on it.

        It is the newest of its version from then on, whatever the clocks of those who wrote the
        others said. ``erased`` is what they leave out, or was thought of in ``drafts``; so were
        erasures on what was ``live`` when they were begun, up to its delta. With neither, nothing
        is asked.

        Raises:
            StateMoved: there is a later erasure, or was one; nothing was written.
            Conflict: whether there was one cannot be told any more; nothing was written.
        """
        values = {field: getattr(record, field) for field in _FIELDS}
        values["counts"] = dict(record.counts)
        with self._db.write() as connection:
            take_turn(connection)
            if erased is not None:
                if last_erasure(connection) > erased.number:
                    raise StateMoved
                _demand_told(connection, live)
            if live is not None and _last_erasure_on(connection, live.snapshot) > live.delta:
                raise StateMoved
            values["created_at"] = _after_all_others(connection, record)
            connection.execute(insert(tables.snapshots).values(**values, details=dict(details)))
            append_deltas(connection, record.id, record.head, drafts)

    def get(self, id: str) -> SnapshotRecord:
        """Return one snapshot; raise UnknownSnapshot."""
        with self._db.read() as connection:
            row = connection.execute(_select().where(tables.snapshots.c.id == id)).first()
        if row is None:
            raise UnknownSnapshot(id)
        return _snapshot(row)

    def details(self, id: str) -> dict[str, Any]:
        """Return what was noted of a snapshot's making; raise UnknownSnapshot."""
        noted = select(tables.snapshots.c.details).where(tables.snapshots.c.id == id)
        with self._db.read() as connection:
            row = connection.execute(noted).first()
        if row is None:
            raise UnknownSnapshot(id)
        return dict(row.details)

    def latest(self, version: int) -> SnapshotRecord | None:
        """Return the newest snapshot of ``version`` that is not condemned, or None."""
        wanted = (tables.snapshots.c.version == version) & tables.snapshots.c.condemned_at.is_(None)
        newest_first = (tables.snapshots.c.created_at.desc(), tables.snapshots.c.id.desc())
        with self._db.read() as connection:
            row = connection.execute(_select().where(wanted).order_by(*newest_first)).first()
        return None if row is None else _snapshot(row)

    def undeleted(self) -> list[SnapshotRecord]:
        """Return every snapshot whose files are not known to be gone, oldest first."""
        kept = _select().where(tables.snapshots.c.deleted_at.is_(None))
        oldest_first = (tables.snapshots.c.created_at, tables.snapshots.c.id)
        with self._db.read() as connection:
            return [_snapshot(row) for row in connection.execute(kept.order_by(*oldest_first))]

    def datasets(self) -> list[str]:
        """Return the data set folders that versions and undeleted snapshots were made from."""
        kept = tables.snapshots.c.deleted_at.is_(None)
        with self._db.read() as connection:
            trained = set(connection.scalars(select(tables.versions.c.dataset)))
            published = connection.scalars(select(tables.snapshots.c.details).where(kept))
            named = {details.get("dataset") for details in published}
        return sorted(trained | {name for name in named if name})

    def everything(self) -> list[SnapshotRecord]:
        """Return every snapshot there ever was."""
        with self._db.read() as connection:
            return [_snapshot(row) for row in connection.execute(_select())]

    def due(self, moment: datetime) -> list[SnapshotRecord]:
        """Return what ``condemn`` would, oldest first, and change nothing."""
        oldest_first = (tables.snapshots.c.created_at, tables.snapshots.c.id)
        wanted = _select().where(_due(moment)).order_by(*oldest_first)
        with self._db.read() as connection:
            return [_snapshot(row) for row in connection.execute(wanted)]

    def condemn(self, moment: datetime) -> list[SnapshotRecord]:
        """Condemn what was superseded at ``moment`` or before; return all that waits for deletion.

        They come oldest first. A condemned snapshot never goes live again, so its files may be
        deleted without a lock, by anyone and more than once.
        """
        if not self.due(moment):
            return []
        row = tables.snapshots.c
        due = (row.superseded_at <= moment) & row.condemned_at.is_(None)
        waiting = row.condemned_at.is_not(None) & row.deleted_at.is_(None)
        with self._db.write() as connection:
            take_turn(connection)
            connection.execute(update(tables.snapshots).where(due).values(condemned_at=utc_now()))
            wanted = _select().where(waiting).order_by(row.created_at, row.id)
            return [_snapshot(found) for found in connection.execute(wanted)]

    def mark_deleted(self, id: str) -> None:
        """Note that the files of a condemned snapshot are gone."""
        with self._db.write() as connection:
            connection.execute(
                update(tables.snapshots)
                .where(tables.snapshots.c.id == id)
                .values(deleted_at=utc_now())
            )


def _demand_told(connection: Connection, live: Live | None) -> None:
    """Raise Conflict unless what was live has been told of every erasure since.

    The list of erasures forgets whoever was put again, so nothing else tells of those.
    """
    condemned = tables.snapshots.c.condemned_at
    if live is None:
        untold = connection.scalar(select(tables.live.c.snapshot)) is not None
        why = "A version went live while these vectors were made, for the first time"
    else:
        its = tables.snapshots.c.id == live.snapshot
        untold = connection.scalar(select(condemned).where(its)) is not None
        why = f"Snapshot {live.snapshot}, live when these vectors were begun, is deleted by now"
    if untold:
        raise Conflict(f"{why}, so that who was erased meanwhile is not known. Publish again.")


def _last_erasure_on(connection: Connection, snapshot: str) -> int:
    deltas = tables.deltas.c
    wanted = (deltas.snapshot == snapshot) & (deltas.kind == DeltaKind.ERASE)
    return int(connection.scalar(select(func.max(deltas.number)).where(wanted)) or 0)


def _after_all_others(connection: Connection, record: SnapshotRecord) -> datetime:
    moments = tables.snapshots.c.created_at
    others = select(func.max(moments)).where(tables.snapshots.c.version == record.version)
    newest: datetime | None = connection.scalar(others)
    if newest is None or newest < record.created_at:
        return record.created_at
    return newest + timedelta(microseconds=1)


_FIELDS = tuple(SnapshotRecord.__dataclass_fields__)


def _due(moment: datetime) -> Any:
    row = tables.snapshots.c
    return row.deleted_at.is_(None) & (
        row.condemned_at.is_not(None) | (row.superseded_at <= moment)
    )


def _select() -> Any:
    return select(*(tables.snapshots.c[name] for name in _FIELDS))


def _snapshot(row: Row[Any]) -> SnapshotRecord:
    return SnapshotRecord(**row._mapping)
