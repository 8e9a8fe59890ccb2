"""Long-running acts: visible while they run, and afterwards."""

import uuid
from collections.abc import Mapping
from typing import Any

from sqlalchemy import insert, select, update

from backcast.errors import BackcastError, UnknownOperation
from backcast.registry import tables
from backcast.registry.database import Database, utc_now
from backcast.versions import Operation, OperationState


class Operations:
    """Start, follow and finish operations."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def start(self, kind: str, request: Mapping[str, Any], actor: str, owner: str) -> Operation:
        """Write a pending operation and return it."""
        id, now = uuid.uuid4().hex, utc_now()
        with self._db.write() as connection:
            connection.execute(
                insert(tables.operations).values(
                    id=id,
                    kind=kind,
                    state=OperationState.PENDING,
                    request=dict(request),
                    actor=actor,
                    owner=owner,
                    heartbeat_at=now,
                    created_at=now,
                )
            )
        return self.get(id)

    def get(self, id: str) -> Operation:
        """Return one operation; raise UnknownOperation."""
        columns = [tables.operations.c[name] for name in Operation.__dataclass_fields__]
        with self._db.read() as connection:
            row = connection.execute(select(*columns).where(tables.operations.c.id == id)).first()
        if row is None:
            raise UnknownOperation(id)
        values = dict(row._mapping)
        return Operation(**{**values, "state": OperationState(values["state"])})

    def progress(self, id: str, step: str, fraction: float) -> None:
        """Note how far a running operation is."""
        self._set(
            id,
            state=OperationState.RUNNING,
            step=step,
            progress=fraction,
            heartbeat_at=utc_now(),
        )

    def succeed(self, id: str, result: Mapping[str, Any]) -> None:
        """Finish an operation that did what it was asked."""
        self._set(
            id,
            state=OperationState.SUCCEEDED,
            progress=1.0,
            result=dict(result),
            finished_at=utc_now(),
        )

    def fail(self, id: str, error: BackcastError) -> None:
        """Finish an operation that could not, with the reason."""
        described = {"code": error.code, "message": error.message, **error.data}
        self._set(id, state=OperationState.FAILED, error=described, finished_at=utc_now())

    def _set(self, id: str, **values: Any) -> None:
        with self._db.write() as connection:
            connection.execute(
                update(tables.operations).where(tables.operations.c.id == id).values(**values)
            )
