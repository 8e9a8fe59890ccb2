"""What nobody needs any more is deleted."""

from datetime import timedelta

from backcast.lifecycle.places import Backcast
from backcast.registry.database import utc_now


def sweep(backcast: Backcast, grace: timedelta) -> list[str]:
    """Delete snapshots superseded longer than ``grace`` ago from store and artifacts.

    Returns their ids. They are condemned first and noted as deleted last, so that a kill half-way
    is finished by the next call, and no transaction is open while files are deleted.
    """
    condemned = backcast.registry.snapshots.condemn(utc_now() - grace)
    for snapshot in condemned:
        backcast.store.drop(snapshot.id)
        backcast.artifacts.delete(snapshot.folder)
        backcast.registry.snapshots.mark_deleted(snapshot.id)
    return [snapshot.id for snapshot in condemned]
