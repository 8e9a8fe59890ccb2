"""Numbered changes of snapshots. Their own files never change: S.d is S and its first d deltas."""

from collections.abc import Sequence
from dataclasses import asdict

from sqlalchemy import Connection, insert, select, update

from backcast.errors import UnknownSnapshot
from backcast.registry import tables
from backcast.registry.database import Database, utc_now
from backcast.versions import DeltaDraft, DeltaKind, DeltaRecord, Entity, Live


class StateMoved(Exception):
    """Ids were changed, or something else went live, since the caller looked."""


class Deltas:
    """Read and append deltas."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def of(self, snapshot: str, *, after: int = 0, upto: int | None = None) -> list[DeltaRecord]:
        """Return the deltas on ``snapshot`` with numbers in (after, upto], in their order."""
        numbers = tables.deltas.c.number
        wanted = (tables.deltas.c.snapshot == snapshot) & (numbers > after)
        if upto is not None:
            wanted &= numbers <= upto
        columns = [tables.deltas.c[name] for name in DeltaRecord.__dataclass_fields__]
        with self._db.read() as connection:
            rows = connection.execute(select(*columns).where(wanted).order_by(numbers))
            return [
                DeltaRecord(
                    **{
                        **row._mapping,
                        "kind": DeltaKind(row.kind),
                        "entity": Entity(row.entity),
                    }
                )
                for row in rows
            ]

    def append(self, seen: Live, drafts: Sequence[DeltaDraft]) -> Live:
        """Make ``drafts`` the next deltas on the live snapshot, if ``seen`` is still live.

        Raises:
            StateMoved: it is not, or another delta came first; nothing was changed.
        """
        with self._db.write() as connection:
            return append_to_live(connection, seen, drafts)


def append_to_live(connection: Connection, seen: Live, drafts: Sequence[DeltaDraft]) -> Live:
    """Append deltas to what is live within the caller's transaction; raise StateMoved."""
    delta = append_deltas(connection, seen.snapshot, seen.delta, drafts)
    live = tables.live.c
    unchanged = (live.generation == seen.generation) & (live.delta == seen.delta)
    moved = update(tables.live).where(unchanged).values(delta=delta, updated_at=utc_now())
    if connection.execute(moved).rowcount != 1:
        raise StateMoved
    return Live(seen.version, seen.snapshot, delta, seen.generation)


def append_deltas(
    connection: Connection, snapshot: str, head: int, drafts: Sequence[DeltaDraft]
) -> int:
    """Append deltas to any snapshot within the caller's transaction; return the new head.

    Raises:
        StateMoved: its last delta is not ``head``. UnknownSnapshot: there is none of this name.
    """
    snapshots, new_head = tables.snapshots.c, head + len(drafts)
    found = update(tables.snapshots).where((snapshots.id == snapshot) & (snapshots.head == head))
    if connection.execute(found.values(head=new_head)).rowcount != 1:
        if connection.scalar(select(snapshots.id).where(snapshots.id == snapshot)) is None:
            raise UnknownSnapshot(snapshot)
        raise StateMoved
    if drafts:
        now = utc_now()
        rows = [
            {**asdict(draft), "snapshot": snapshot, "number": number, "created_at": now}
            for number, draft in enumerate(drafts, head + 1)
        ]
        connection.execute(insert(tables.deltas), rows)
    return new_head
