"""What each deployment changed for its consumers, and the drift bounds of each snapshot."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Connection, delete, insert, select

from backcast.registry import tables
from backcast.registry.database import Database, utc_now
from backcast.registry.names import unnamed
from backcast.versions import DiffDraft, DriftRecord, Live

_DRIFT = tuple(DriftRecord.__dataclass_fields__)


class Diffs:
    """Read diffs. They are written in the switch that they describe."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def of(self, deployment: int) -> list[dict[str, Any]]:
        """Return the rows of one deployment (its id), the newest version first."""
        rows = select(tables.diffs).where(tables.diffs.c.deployment == deployment)
        with self._db.read() as connection:
            found = connection.execute(rows.order_by(tables.diffs.c.target.desc()))
            return [dict(row._mapping) for row in found]


class Drifts:
    """Read where drift bounds lie. They are written in the switch that makes them true."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def of(self, snapshot: str) -> DriftRecord | None:
        """Return the drift bounds of a snapshot; None where there are none."""
        columns = [tables.drifts.c[name] for name in _DRIFT]
        with self._db.read() as connection:
            row = connection.execute(
                select(*columns).where(tables.drifts.c.snapshot == snapshot)
            ).first()
        return None if row is None else DriftRecord(**row._mapping)


def write_diffs(
    connection: Connection,
    deployment: int,
    after: Live,
    baseline: Live | None,
    diffs: Sequence[DiffDraft],
) -> None:
    """Write what a deployment changes from ``baseline``, within the caller's transaction."""
    if baseline is None or not diffs:
        return
    about = {
        "version": after.version,
        "snapshot": after.snapshot,
        "baseline_snapshot": baseline.snapshot,
        "baseline_delta": baseline.delta,
        "deployment": deployment,
        "created_at": utc_now(),
    }
    figures = unnamed(connection, [draft.figures for draft in diffs])
    rows = [
        {**about, "target": draft.target, "figures": found}
        for draft, found in zip(diffs, figures, strict=True)
    ]
    connection.execute(insert(tables.diffs), rows)


def replace_drift(connection: Connection, snapshot: str, drift: DriftRecord | None) -> None:
    """Put ``drift`` in the place of what was known of a snapshot; None: nothing is any more."""
    connection.execute(delete(tables.drifts).where(tables.drifts.c.snapshot == snapshot))
    if drift is not None:
        values = {**asdict(drift), "targets": list(drift.targets), "created_at": utc_now()}
        connection.execute(insert(tables.drifts).values(**values))
