"""Long-running acts: one at a time, visible while they run, and afterwards.

The one that is active holds the only slot. Its owner gives signs of life, a number that grows;
whoever finds it unchanged for long enough may take the operation over, by compare-and-swap on
owner and number. An owner that lost its operation, or whose operation was cancelled, can write
nothing to it any more.
"""

import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, Update, insert, select, update
from sqlalchemy.exc import IntegrityError

from backcast.acts import Outcome, judge
from backcast.errors import (
    BackcastError,
    Conflict,
    IdempotencyKeyReused,
    OperationAbandoned,
    OperationCancelled,
    OperationRunning,
    UnknownOperation,
)
from backcast.registry import tables
from backcast.registry.audit import end_act
from backcast.registry.database import Database, utc_now
from backcast.versions import Claim, Operation, OperationState

SLOT = "live"
"""What an active operation holds: operations change what is live, so there is one."""

_ATTEMPTS = 5
_TOLD = ("live_version", "snapshot")  # of a result, to the audit log


@dataclass(frozen=True)
class OperationDraft:
    """An operation about to begin.

    Attributes:
        owner: who runs it; unlike any other, this process's earlier ones included.
        resumable: another replica may carry it on.
        idempotency_key: stands for this request, and no other.
        act: its number in the audit log, which is told what became of it.
    """

    kind: str
    request: Mapping[str, Any]
    actor: str
    owner: str
    resumable: bool = False
    idempotency_key: str | None = None
    act: int | None = None


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
        told = {name: result[name] for name in _TOLD if name in result}
        self._finish(claim, done, Outcome.SUCCEEDED, None, told)

    def fail(self, claim: Claim, error: BackcastError) -> None:
        """Finish an operation that could not, with the reason; raise OperationAbandoned."""
        gates = [gate["name"] for gate in error.data.get("gates", ()) if not gate["passed"]]
        told = {"failed_gates": gates} if gates else {}
        self._finish(claim, _failed(error), *judge(error), told)

    def _finish(
        self,
        claim: Claim,
        end: Mapping[str, Any],
        outcome: Outcome,
        code: str | None,
        told: Mapping[str, Any],
    ) -> None:
        values = {**end, "slot": None, "finished_at": utc_now()}
        ended = _of(claim).values(**values).returning(tables.operations.c.act)
        with self._db.write() as connection:
            row = connection.execute(ended).first()
            if row is None:
                raise _lost(connection, claim)
            if row.act is not None:
                end_act(connection, row.act, outcome, code, told)

    def release(self, claim: Claim) -> None:
        """Hand an operation back, for any replica to carry on; raise OperationAbandoned."""
        self._write(claim, owner=None, beat=tables.operations.c.beat + 1)

    def take(self, seen: Operation, owner: str) -> Claim | None:
        """Make ``owner`` the one who runs an operation, if it is as it was seen; else None."""
        beat = tables.operations.c.beat + 1
        taken = _unchanged(seen).values(owner=owner, beat=beat, heartbeat_at=utc_now())
        with self._db.write() as connection:
            if connection.execute(taken).rowcount != 1:
                return None
        return Claim(seen.id, owner)

    def cancel(self, seen: Operation, error: OperationCancelled) -> bool:
        """Fail an operation that another process runs; return whether it was still as seen.

        Where it was not, it may have made its switch since; else it never does any more.
        """
        values = {**_failed(error), "slot": None, "finished_at": utc_now()}
        ended = _unchanged(seen).values(**values).returning(tables.operations.c.act)
        with self._db.write() as connection:
            row = connection.execute(ended).first()
            if row is not None and row.act is not None:
                end_act(connection, row.act, *judge(error), {})
        return row is not None

    def _write(self, claim: Claim, **values: Any) -> None:
        with self._db.write() as connection:
            if connection.execute(_of(claim).values(**values)).rowcount != 1:
                raise _lost(connection, claim)

    def _first(self, condition: Any) -> Operation | None:
        with self._db.read() as connection:
            row = connection.execute(_select().where(condition)).first()
        return None if row is None else _operation(row)


def abandon_active(connection: Connection, reason: str) -> None:
    """End the active operation of a copy, which nobody runs, within the caller's transaction."""
    error = OperationAbandoned(reason)
    row = tables.operations.c
    values = {**_failed(error), "slot": None, "finished_at": utc_now()}
    ended = update(tables.operations).where(row.slot == SLOT).values(**values).returning(row.act)
    for act in connection.scalars(ended).all():
        if act is not None:
            end_act(connection, act, *judge(error), {})


def fence(connection: Connection, claim: Claim) -> None:
    """Hold the operation for the caller's transaction; raise OperationAbandoned.

    Nobody takes it over or cancels it until the transaction ends, and nobody who looked before
    does afterwards.
    """
    held = _of(claim).values(beat=tables.operations.c.beat + 1)
    if connection.execute(held).rowcount != 1:
        raise _lost(connection, claim)


def _failed(error: BackcastError) -> dict[str, Any]:
    described = {"code": error.code, "message": error.message, **error.data}
    return {"state": OperationState.FAILED, "error": described}


def _of(claim: Claim) -> Update:
    row = tables.operations.c
    own = (row.id == claim.id) & (row.owner == claim.owner) & (row.slot == SLOT)
    return update(tables.operations).where(own)


def _unchanged(seen: Operation) -> Update:
    row = tables.operations.c
    unchanged = (row.id == seen.id) & (row.slot == SLOT) & (row.beat == seen.beat)
    unchanged &= row.owner.is_(None) if seen.owner is None else row.owner == seen.owner
    return update(tables.operations).where(unchanged)


def _lost(connection: Connection, claim: Claim) -> OperationAbandoned:
    row = tables.operations.c
    found = dict(connection.scalar(select(row.error).where(row.id == claim.id)) or {})
    if found.pop("code", None) == OperationCancelled.code:
        return OperationCancelled.rebuild(found.pop("message"), found)
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
