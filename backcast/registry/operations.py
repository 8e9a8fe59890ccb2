"""Long-running acts: one at a time, visible while they run, and afterwards.

The one that is active holds the only slot. Its owner gives signs of life, a number that grows;
whoever finds it unchanged for long enough may take the operation over, by compare-and-swap on
owner and number. An owner that lost its operation can write nothing to it any more.
"""

import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, Update, insert, select, update
from sqlalchemy.exc import IntegrityError

from backcast.errors import (
    BackcastError,
    Conflict,
    IdempotencyKeyReused,
    OperationAbandoned,
    OperationRunning,
    UnknownOperation,
)
from backcast.registry import tables
from backcast.registry.database import Database, utc_now
from backcast.versions import Claim, Operation, OperationState

SLOT = "live"
"""What an active operation holds: operations change what is live, so there is one."""

_ATTEMPTS = 5


@dataclass(frozen=True)
class OperationDraft:
    """An operation about to begin.

    Attributes:
        owner: who runs it; unlike any other, this process's earlier ones included.
        resumable: another replica may carry it on.
        idempotency_key: stands for this request, and no other.
    """

    kind: str
    request: Mapping[str, Any]
    actor: str
    owner: str
    resumable: bool = False
    idempotency_key: str | None = None


class Operations:
    """Start, follow, take over and finish operations."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def start(self, draft: OperationDraft) -> Operation:
        """Write a pending operation and return it; where its key is known, the one of that key.

        Raises:
            OperationRunning: another operation is active.
            IdempotencyKeyReused: the key came with another request before.
        """
        for _ in range(_ATTEMPTS):
            known = self.known(draft)
            if known is not None:
                return known
            try:
                return self._insert(draft)
            except IntegrityError:
                active = self.active()
            key = draft.idempotency_key
            if active is not None and (key is None or active.idempotency_key != key):
                raise running(active)
        raise Conflict("Operations begin and end faster than this one could; try again.")

    def known(self, draft: OperationDraft) -> Operation | None:
        """Return the operation of the draft's key, None without one; raise IdempotencyKeyReused."""
        key = draft.idempotency_key
        if key is None:
            return None
        found = self._first(tables.operations.c.idempotency_key == key)
        if found is None:
            return None
        wanted = (draft.kind, dict(draft.request), draft.actor)
        if (found.kind, dict(found.request), found.actor) != wanted:
            raise IdempotencyKeyReused(key, found.id)
        return found

    def _insert(self, draft: OperationDraft) -> Operation:
        id, now = uuid.uuid4().hex, utc_now()
        values = {
            **asdict(draft),
            "id": id,
            "state": OperationState.PENDING,
            "slot": SLOT,
            "heartbeat_at": now,
            "created_at": now,
        }
        with self._db.write() as connection:
            connection.execute(insert(tables.operations).values(**values))
        return self.get(id)

    def get(self, id: str) -> Operation:
        """Return one operation; raise UnknownOperation."""
        found = self._first(tables.operations.c.id == id)
        if found is None:
            raise UnknownOperation(id)
        return found

    def active(self) -> Operation | None:
        """Return the operation that holds the slot."""
        return self._first(tables.operations.c.slot == SLOT)

    def recent(self, limit: int) -> list[Operation]:
        """Return the newest operations, newest first."""
        row = tables.operations.c
        newest = _select().order_by(row.created_at.desc(), row.id.desc()).limit(limit)
        with self._db.read() as connection:
            return [_operation(found) for found in connection.execute(newest)]

    def beat(self, claim: Claim) -> None:
        """Give a sign of life; raise OperationAbandoned where another took over."""
        self._write(claim, beat=tables.operations.c.beat + 1, heartbeat_at=utc_now())

    def progress(self, claim: Claim, step: str, fraction: float) -> None:
        """Note how far a running operation is; raise OperationAbandoned."""
        self._write(claim, state=OperationState.RUNNING, step=step, progress=fraction)

    def succeed(self, claim: Claim, result: Mapping[str, Any]) -> None:
        """Finish an operation that did what it was asked; raise OperationAbandoned."""
        done = {"state": OperationState.SUCCEEDED, "progress": 1.0, "result": dict(result)}
        self._write(claim, **done, slot=None, finished_at=utc_now())

    def fail(self, claim: Claim, error: BackcastError) -> None:
        """Finish an operation that could not, with the reason; raise OperationAbandoned."""
        described = {"code": error.code, "message": error.message, **error.data}
        failed = {"state": OperationState.FAILED, "error": described}
        self._write(claim, **failed, slot=None, finished_at=utc_now())

    def release(self, claim: Claim) -> None:
        """Hand an operation back, for any replica to carry on; raise OperationAbandoned."""
        self._write(claim, owner=None, beat=tables.operations.c.beat + 1)

    def take(self, seen: Operation, owner: str) -> Claim | None:
        """Make ``owner`` the one who runs an operation, if it is as it was seen; else None."""
        row = tables.operations.c
        unchanged = (row.id == seen.id) & (row.slot == SLOT) & (row.beat == seen.beat)
        unchanged &= row.owner.is_(None) if seen.owner is None else row.owner == seen.owner
        taken = update(tables.operations).where(unchanged)
        taken = taken.values(owner=owner, beat=row.beat + 1, heartbeat_at=utc_now())
        with self._db.write() as connection:
            if connection.execute(taken).rowcount != 1:
                return None
        return Claim(seen.id, owner)

    def _write(self, claim: Claim, **values: Any) -> None:
        with self._db.write() as connection:
            if connection.execute(_of(claim).values(**values)).rowcount != 1:
                raise _lost(claim)

    def _first(self, condition: Any) -> Operation | None:
        with self._db.read() as connection:
            row = connection.execute(_select().where(condition)).first()
        return None if row is None else _operation(row)


def fence(connection: Connection, claim: Claim) -> None:
    """Hold the operation for the caller's transaction; raise OperationAbandoned.

    Nobody takes it over until the transaction ends, and nobody who looked before does afterwards.
    """
    held = _of(claim).values(beat=tables.operations.c.beat + 1)
    if connection.execute(held).rowcount != 1:
        raise _lost(claim)


def _of(claim: Claim) -> Update:
    row = tables.operations.c
    own = (row.id == claim.id) & (row.owner == claim.owner) & (row.slot == SLOT)
    return update(tables.operations).where(own)


def _lost(claim: Claim) -> OperationAbandoned:
    return OperationAbandoned(
        f"Operation {claim.id} is not run by {claim.owner} any more: it gave no sign of life for "
        "too long, or handed it back. Its state says what became of it.",
        operation=claim.id,
    )


def running(active: Operation) -> OperationRunning:
    """Return the error that names an active operation."""
    return OperationRunning(active.id, active.kind, active.step, active.progress, active.owner)


_FIELDS = tuple(Operation.__dataclass_fields__)


def _select() -> Any:
    return select(*(tables.operations.c[name] for name in _FIELDS))


def _operation(row: Row[Any]) -> Operation:
    return Operation(**{**row._mapping, "state": OperationState(row.state)})
