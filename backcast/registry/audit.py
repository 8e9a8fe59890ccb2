"""The audit log: what was asked for, before it is begun, and what became of it.

It is added to only: triggers of the database refuse to change or delete a row. An act without an
outcome goes on, or its process was killed. What an operation does ends with the operation, in the
same transaction, whichever replica ends it.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from backcast.acts import Act, Actor, ActRecord, Outcome, judge
from backcast.errors import RegistryError
from backcast.logs import redact
from backcast.registry import tables
from backcast.registry.database import Database, clock

logger = logging.getLogger(__name__)

_LONGEST_REASON, _LONGEST_TEXT, _LONGEST_NAME = 2000, 256, 128
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Recorded:
    """An act that is recorded; ``found`` takes what is to be told with its outcome."""

    id: int
    found: dict[str, Any] = field(default_factory=dict)


class Audit:
    """Record acts, and read what was recorded."""

    def __init__(self, database: Database) -> None:
        self._db = database

    @contextmanager
    def recording(self, actor: Actor, act: Act) -> Iterator[Recorded]:
        """Record an act before the block, and after it what became of it.

        An act that was done is never undone because its outcome could not be written; it stays
        without one.

        Raises:
            RegistryError: the act is not recorded, and so was not begun.
        """
        recorded = Recorded(self.begin(actor, act))
        try:
            yield recorded
        except BaseException as error:
            self._conclude(recorded, *judge(error))
            raise
        self._conclude(recorded, Outcome.SUCCEEDED, None)

    def begin(self, actor: Actor, act: Act) -> int:
        """Write down that an act is about to begin; return its number."""
        with self._db.write() as connection:
            return _begin(connection, actor, act)

    def refuse(self, actor: Actor, act: Act, code: str) -> None:
        """Write down an act that was refused before it could begin."""
        with self._db.write() as connection:
            end_act(connection, _begin(connection, actor, act), Outcome.REFUSED, code, {})

    def recent(
        self, limit: int, *, before: int | None = None, since: datetime | None = None
    ) -> list[ActRecord]:
        """Return the newest acts, newest first: of those with smaller numbers than ``before``."""
        wanted = _select().order_by(tables.audit.c.id.desc()).limit(limit)
        if before is not None:
            wanted = wanted.where(tables.audit.c.id < before)
        if since is not None:
            wanted = wanted.where(tables.audit.c.at >= since)
        with self._db.read() as connection:
            return [_record(row) for row in connection.execute(wanted)]

    def _conclude(self, recorded: Recorded, outcome: Outcome, code: str | None) -> None:
        operations = tables.operations.c
        carried = select(operations.id).where(operations.act == recorded.id)
        try:
            with self._db.write() as connection:
                if connection.scalar(carried) is None:  # else its end says what became of it
                    end_act(connection, recorded.id, outcome, code, recorded.found)
        except RegistryError as error:
            logger.warning("the outcome of act %d is not recorded: %s", recorded.id, error.message)


def note_act(connection: Connection, actor: Actor, act: Act) -> None:
    """Write down an act that is done when the caller's transaction is."""
    end_act(connection, _begin(connection, actor, act), Outcome.SUCCEEDED, None, {})


def end_act(
    connection: Connection,
    id: int,
    outcome: Outcome,
    code: str | None,
    details: Mapping[str, Any],
) -> None:
    """Write down what became of an act, within the caller's transaction."""
    connection.execute(
        insert(tables.audit_outcomes).values(
            act=id, at=clock(connection), outcome=outcome, code=code, details=_plain(details)
        )
    )


def _begin(connection: Connection, actor: Actor, act: Act) -> int:
    row = insert(tables.audit).values(
        at=clock(connection),
        actor=_short(actor.name, _LONGEST_NAME),
        key=actor.key,
        act=act.name,
        target=None if act.target is None else _short(act.target, _LONGEST_TEXT),
        reason=None if act.reason is None else _short(act.reason, _LONGEST_REASON),
        details=_plain(act.details),
    )
    return int(connection.execute(row.returning(tables.audit.c.id)).scalar_one())


def _plain(node: Any) -> Any:
    """Return JSON without secrets, and without what no database or terminal should be given."""
    if isinstance(node, Mapping):
        return {name: _plain(value) for name, value in node.items()}
    if isinstance(node, list):
        return [_plain(value) for value in node]
    return _short(node, _LONGEST_TEXT) if isinstance(node, str) else node


def _short(text: str, most: int) -> str:
    safe = _CONTROL.sub("\ufffd", redact(text))
    return safe if len(safe) <= most else f"{safe[: most - 1]}…"


def _select() -> Any:
    acts, outcomes, operations = tables.audit, tables.audit_outcomes, tables.operations
    return (
        select(
            *acts.c,
            outcomes.c.outcome,
            outcomes.c.code,
            outcomes.c.at.label("ended_at"),
            outcomes.c.details.label("found"),
            operations.c.id.label("operation"),
        )
        .select_from(acts)
        .outerjoin(outcomes, outcomes.c.act == acts.c.id)
        .outerjoin(operations, operations.c.act == acts.c.id)
    )


def _record(row: Row[Any]) -> ActRecord:
    values = dict(row._mapping)
    found, outcome = values.pop("found"), values.pop("outcome")
    details = {**values.pop("details"), **(found or {})}
    return ActRecord(
        **values, details=details, outcome=None if outcome is None else Outcome(outcome)
    )
