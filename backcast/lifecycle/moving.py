"""Everything moves to other places: another database, another store, other artifacts."""

from dataclasses import replace
from datetime import timedelta

from sqlalchemy import Connection

from backcast import acts
from backcast.acts import Actor
from backcast.lifecycle.backups import Copied, fill_store
from backcast.lifecycle.files import copy_files, named_files
from backcast.lifecycle.operations import alone
from backcast.lifecycle.places import Backcast, Report
from backcast.lifecycle.verifying import Expected
from backcast.registry.audit import note_act
from backcast.registry.operations import abandon_active
from backcast.registry.tables import metadata
from backcast.stores import StoredSnapshot

_COUNTED_MEANWHILE = {"operations", "usage", "audit", "audit_outcomes"}
"""Tables that may change while a move goes on: by its signs of life, by reads and by refusals."""


def move(
    source: Backcast,
    target: Backcast,
    *,
    actor: str,
    reason: str | None = None,
    grace: timedelta,
    timeout: float,
    report: Report = lambda _step, _done: None,
) -> Copied:
    """Copy everything to places whose registry is empty, and compare it there.

    Places that source and target share stay as they are. Holds the slot of operations, so nothing
    goes live meanwhile; reads may go on. Every stored vector is compared between the two stores,
    every row between the two registries.

    Raises:
        OperationRunning: an operation runs.
        Conflict: the target's registry is not empty, or ids, keys, pins or versions were changed
            meanwhile; the target's registry stays empty, and the move can be run again.
        StoreError, ArtifactError: something cannot be read or written, or is not the same.
    """

    def finish(copied: Connection) -> None:
        abandon_active(copied, "This registry is the copy that the move made.")
        note_act(copied, Actor(actor), acts.moving(reason))

    target.registry.demand_empty("--to-database")
    with alone(source, "move", "copy", actor, timeout):
        files = list(named_files(source.registry, source.artifacts))
        if target.artifacts is not source.artifacts:
            copy_files(
                source.artifacts, target.artifacts, files, lambda done: report("files", 0.5 * done)
            )
        vectors = _fill(source, target, grace, report)
        report("registry", 0.95)
        still = metadata.tables.keys() - _COUNTED_MEANWHILE
        read = source.registry.copy_to(target.registry, still=still, finish=finish)
    rows = sum(table.rows for table in read.values())
    live = target.registry.deployments.live()
    name = None if live is None else live.name
    return Copied(name, rows, len(files), sum(file.size for file in files), vectors)


def _fill(source: Backcast, target: Backcast, grace: timedelta, report: Report) -> int:
    if target.store is source.store:
        return 0
    held = {name: source.store.open(name) for name in source.store.snapshots()}
    return fill_store(
        replace(target, registry=source.registry),
        {name: stored.rounding.precision for name, stored in held.items()},
        grace,
        lambda done: report("store", 0.5 + 0.45 * done),
        lambda name: _answers_of(held[name]) if name in held else None,
    )


def _answers_of(stored: StoredSnapshot) -> Expected:
    return lambda batch: stored.gather(batch.entity, batch.ids).vectors
