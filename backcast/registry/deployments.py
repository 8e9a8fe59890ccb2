"""What is live, and how it came to be."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from backcast.errors import (
    NothingPublished,
    PromotionConflict,
    UnknownDeployment,
    VersionRetired,
)
from backcast.logs import redact
from backcast.registry import tables
from backcast.registry.database import Database, clock, take_turn, utc_now
from backcast.registry.deltas import StateMoved, append_deltas
from backcast.registry.diffs import replace_drift, write_diffs
from backcast.registry.operations import fence
from backcast.registry.versions import read_transforms, read_versions, set_note, set_state
from backcast.versions import (
    Claim,
    DeltaDraft,
    DiffDraft,
    DriftRecord,
    Lineage,
    Live,
    Transform,
    Version,
    VersionState,
)


@dataclass(frozen=True)
class Catalog:
    """Everything a replica needs to know, read in one transaction."""

    live: Live | None
    versions: Sequence[Version]
    transforms: Sequence[Transform]


@dataclass(frozen=True)
class Switch:
    """A change of what is live: from ``seen`` (None: nothing was) to ``version``, ``snapshot``.

    Attributes:
        head: the last delta on ``snapshot`` that the caller knows of.
        carried: changes that go with the switch: they become the next deltas on ``snapshot``.
        reason: kept with the deployment, and as the note of versions that it rolls back.
        operation: what the switch is part of; where another took it over, nothing is switched.
        compared: what was live when ``diffs`` and ``drift`` were measured; ``seen``, or that with
            fewer deltas.
        diffs: what the switch changes, by version.
        drift: the drift bounds of ``snapshot`` from now on; a rollback leaves those it had.
    """

    kind: str
    seen: Live | None
    version: int
    snapshot: str
    actor: str
    reason: str | None = None
    forced: bool = False
    gates: Mapping[str, Any] | None = None
    operation: Claim | None = None
    head: int = 0
    carried: Sequence[DeltaDraft] = ()
    compared: Live | None = None
    diffs: Sequence[DiffDraft] = ()
    drift: DriftRecord | None = None


class Deployments:
    """The live row and its history. The row changes by compare-and-swap only."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def live(self) -> Live | None:
        """Return what is live, None before the first promotion."""
        with self._db.read() as connection:
            return read_live(connection)

    def catalog(self) -> Catalog:
        """Return live row, versions and maps of one moment."""
        with self._db.read() as connection:
            return Catalog(
                read_live(connection), read_versions(connection), read_transforms(connection)
            )

    def switch(self, change: Switch) -> Live:
        """Make ``change.version`` live, if what was seen is still live; all in one transaction.

        Raises:
            PromotionConflict: something else went live meanwhile; nothing was changed.
            StateMoved: ids were changed meanwhile, on the live snapshot or on the new one; nothing
                was changed.
            NothingPublished: the snapshot was deleted meanwhile; nothing was changed.
            OperationAbandoned: another took the operation over; nothing was changed.
            VersionRetired: the version was retired meanwhile; nothing was changed.
        """
        return self.switch_in_turn(lambda: change)

    def switch_in_turn(self, make: Callable[[], Switch]) -> Live:
        """Switch as ``make`` says, which is called when nobody else can change anything any more.

        It may read the registry, and write files; whoever wants to change something waits for it.
        """
        try:
            with self._db.write() as connection:
                take_turn(connection)
                change = make()
                generation = 1 if change.seen is None else change.seen.generation + 1
                if change.operation is not None:
                    fence(connection, change.operation)
                delta = append_deltas(connection, change.snapshot, change.head, change.carried)
                after = Live(change.version, change.snapshot, delta, generation)
                _swap(connection, change.seen, after)
                _move_states(connection, change)
                _supersede(connection, change)
                deployment = _record(connection, change, after)
                write_diffs(connection, deployment, after, change.compared, change.diffs)
                if change.kind != "rollback":
                    replace_drift(connection, change.snapshot, change.drift)
        except IntegrityError as error:  # two first promotions at once meet in the primary key
            found = self.live()
            if found == change.seen:
                raise
            raise _conflict(change.seen, found) from error
        return after

    def made_by(self, operation: str) -> Live | None:
        """Return what an operation made live, None where it has made no switch."""
        row = tables.deployments.c
        columns = (row.version, row.snapshot, row.delta, row.generation)
        with self._db.read() as connection:
            found = connection.execute(select(*columns).where(row.operation == operation)).first()
        return None if found is None else Live(**found._mapping)

    def history(self) -> list[dict[str, Any]]:
        """Return every deployment, newest first."""
        newest_first = select(tables.deployments).order_by(tables.deployments.c.generation.desc())
        with self._db.read() as connection:
            return [_plain(row) for row in connection.execute(newest_first)]

    def get(self, generation: int) -> dict[str, Any]:
        """Return one deployment; raise UnknownDeployment."""
        wanted = select(tables.deployments).where(tables.deployments.c.generation == generation)
        with self._db.read() as connection:
            row = connection.execute(wanted).first()
        if row is None:
            raise UnknownDeployment(generation)
        return _plain(row)


def read_live(connection: Connection) -> Live | None:
    """Return what is live, within the caller's transaction."""
    row = connection.execute(
        select(
            tables.live.c.version,
            tables.live.c.snapshot,
            tables.live.c.delta,
            tables.live.c.generation,
        )
    ).first()
    return None if row is None else Live(**row._mapping)


def _plain(row: Row[Any]) -> dict[str, Any]:
    # The names of columns are a kind of str that not everybody takes for one.
    return {str(name): value for name, value in row._mapping.items()}


def _swap(connection: Connection, seen: Live | None, after: Live) -> None:
    values = {
        "version": after.version,
        "snapshot": after.snapshot,
        "delta": after.delta,
        "generation": after.generation,
        "updated_at": utc_now(),
    }
    if seen is None:
        connection.execute(insert(tables.live).values(id=1, **values))
        return
    unchanged = (tables.live.c.generation == seen.generation) & (tables.live.c.delta == seen.delta)
    if connection.execute(update(tables.live).where(unchanged).values(**values)).rowcount != 1:
        found = read_live(connection)
        if found is not None and found.generation == seen.generation:
            raise StateMoved
        raise _conflict(seen, found)


def _conflict(seen: Live | None, found: Live | None) -> PromotionConflict:
    def name(live: Live | None) -> str:
        return "nothing" if live is None else f"version {live.version} ({live.snapshot})"

    return PromotionConflict(
        f"Live was {name(seen)} when this began and is {name(found)} now; nothing was changed.",
        expected_version=None if seen is None else seen.version,
        current_version=None if found is None else found.version,
    )


def _move_states(connection: Connection, change: Switch) -> None:
    versions = read_versions(connection)
    chain = Lineage.of(versions).chain(change.version)
    state = {v.number: v.state for v in versions}
    if state[change.version] is VersionState.RETIRED:  # since this promotion began
        raise VersionRetired(change.version, None)
    ancestors = [j for j in chain[1:] if state[j] is not VersionState.RETIRED]
    set_state(connection, ancestors, VersionState.SUPERSEDED)
    if change.seen is not None and change.seen.version not in chain:
        left = Lineage.of(versions).chain(change.seen.version)
        served = {VersionState.LIVE, VersionState.SUPERSEDED}
        off = [j for j in left if j not in chain and state[j] in served]
        set_state(connection, off, VersionState.ROLLED_BACK)
        set_note(connection, off, change.reason)
    set_state(connection, [change.version], VersionState.LIVE)
    back = [j for j in chain if state[j] is VersionState.ROLLED_BACK]
    set_note(connection, back, None)


def _supersede(connection: Connection, change: Switch) -> None:
    others = (tables.snapshots.c.id != change.snapshot) & (
        tables.snapshots.c.superseded_at.is_(None)
    )
    was_live = tables.snapshots.c.id == (change.seen.snapshot if change.seen else "")
    older = (tables.snapshots.c.version == change.version) & (
        tables.snapshots.c.created_at
        < select(func.max(tables.snapshots.c.created_at))
        .where(tables.snapshots.c.id == change.snapshot)
        .scalar_subquery()
    )
    gone = update(tables.snapshots).where(others & (was_live | older))
    connection.execute(gone.values(superseded_at=clock(connection)))
    kept = connection.execute(
        update(tables.snapshots)
        .where(tables.snapshots.c.id == change.snapshot)
        .where(tables.snapshots.c.condemned_at.is_(None))
        .values(superseded_at=None)
    )
    if kept.rowcount != 1:  # deleted after its grace period, since this promotion began
        raise NothingPublished(change.version)


def _record(connection: Connection, change: Switch, after: Live) -> int:
    """Write the deployment and return its id."""
    written = connection.execute(
        insert(tables.deployments).values(
            kind=change.kind,
            version=change.version,
            snapshot=change.snapshot,
            from_version=change.seen.version if change.seen else None,
            from_snapshot=change.seen.snapshot if change.seen else None,
            generation=after.generation,
            delta=after.delta,
            from_delta=change.seen.delta if change.seen else None,
            actor=change.actor,
            reason=change.reason and redact(change.reason),
            forced=change.forced,
            gates=dict(change.gates or {}),
            operation=None if change.operation is None else change.operation.id,
            created_at=utc_now(),
        )
    )
    key = written.inserted_primary_key
    assert key is not None
    return int(key[0])
