"""Numbered changes of snapshots. Their own files never change: S.d is S and its first d deltas."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from sqlalchemy import Connection, delete, func, insert, select, update

from backcast.errors import UnknownSnapshot
from backcast.registry import tables
from backcast.registry.database import Database, take_turn, utc_now
from backcast.versions import DeltaDraft, DeltaKind, DeltaRecord, Entity, Live

_AT_ONCE = 500  # values in a statement


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

    def changed(self, snapshot: str) -> int:
        """Return how many ids the deltas on ``snapshot`` name, each as often as it is named."""
        named = select(func.coalesce(func.sum(tables.deltas.c.count), 0))
        with self._db.read() as connection:
            return int(connection.scalar(named.where(tables.deltas.c.snapshot == snapshot)) or 0)

    def append(
        self, seen: Live, drafts: Sequence[DeltaDraft], back: Mapping[Entity, Sequence[str]]
    ) -> Live:
        """Make ``drafts`` the next deltas on the live snapshot, if ``seen`` is still live.

        ``back`` are the digests of the ids that have a vector again, by entity kind: their
        erasures are over.

        Raises:
            StateMoved: it is not, or another delta came first; nothing was changed.
        """
        with self._db.write() as connection:
            take_turn(connection)
            for entity, digests in back.items():
                end_erasures(connection, entity, digests)
            return append_to_live(connection, seen, drafts)


def end_erasures(connection: Connection, entity: Entity, digests: Sequence[str]) -> None:
    """Take ids off the list of those that are left out, within the caller's transaction."""
    if connection.scalar(select(tables.erasures.c.number).limit(1)) is None:
        return
    listed = tables.erasures.c
    for start in range(0, len(digests), _AT_ONCE):
        some = listed.sha256.in_(digests[start : start + _AT_ONCE])
        connection.execute(delete(tables.erasures).where((listed.entity == entity) & some))


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
