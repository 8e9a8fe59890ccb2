"""After the soak: everything is up again, everything is read, and everything can be explained."""

import itertools
import time
from collections.abc import Iterator

from sqlalchemy.exc import SQLAlchemyError

from backcast.versions import Entity
from benchmarks.soak_checker import Fault, Finding, Question
from benchmarks.soak_readers import ARROW, Field, Reader

_SETTLED_S = 60.0


def audit(field: Field) -> None:
    """Read every id from every replica in every version, and the books of the registry."""
    _settle(field)
    live = field.world.live
    with Reader(field, seed=0) as reader:
        for replica, entity in itertools.product(field.replicas, Entity):
            ids = [id for kind, id in field.world.population if kind is entity] + ["nobody"]
            for version in field.world.ledger.models.chain(live.version):
                reader.ask(Question(entity, ids, version), ARROW, replica)
    field.tally.accuse([Finding(Fault.LOST, text) for text in _unexplained(field)])


def _settle(field: Field) -> None:
    """Wait until all replicas serve the newest state."""
    deadline = time.monotonic() + _SETTLED_S
    while time.monotonic() < deadline:
        try:
            field.world.follow()
        except SQLAlchemyError:
            time.sleep(0.1)
            continue
        live = field.world.live.snapshot
        newest = f"{live}.{field.world.ledger.head(live)}"
        active = field.world.backcast.registry.operations.active()
        if active is None and all(replica.serves() == newest for replica in field.replicas):
            return
        time.sleep(0.1)
    served = {replica.name: replica.serves() for replica in field.replicas}
    text = f"{newest} is live, served is {served}, {active} is running"
    field.tally.accuse([Finding(Fault.LOST, text)])


def _unexplained(field: Field) -> Iterator[str]:
    """Say what in the registry has no explanation, once nothing runs any more."""
    registry = field.world.backcast.registry
    live, history = registry.deployments.live(), registry.deployments.history()
    assert live is not None
    newest = history[0]
    if (newest["version"], newest["snapshot"], newest["generation"]) != (
        live.version,
        live.snapshot,
        live.generation,
    ):
        yield f"{live} is live, the last deployment is {newest}"
    if live.delta != registry.snapshots.get(live.snapshot).head:
        yield f"{live} is live, its head is {registry.snapshots.get(live.snapshot).head}"
