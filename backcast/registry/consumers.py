"""Consumers: who holds keys, and which version each is pinned to."""

from sqlalchemy import Connection, func, or_, select, update

from backcast.errors import UnknownConsumer, VersionRetired
from backcast.registry import tables
from backcast.registry.database import Database, utc_now
from backcast.registry.versions import hold_version
from backcast.versions import Consumer, VersionState

ANONYMOUS = "(anonymous)"
"""Whom the requests of callers without a key are counted for, where reads are open."""


class Consumers:
    """List consumers, and pin them. A consumer begins with its first key."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def all(self) -> list[Consumer]:
        """Return every consumer, by name."""
        consumers, keys, usage = tables.consumers.c, tables.api_keys.c, tables.usage.c
        in_force = (
            select(func.count())
            .where(keys.consumer == consumers.id)
            .where(keys.revoked_at.is_(None))
            .where(or_(keys.expires_at.is_(None), keys.expires_at > utc_now()))
        )
        last_used = select(func.max(usage.day)).where(usage.consumer == consumers.id)
        wanted = select(
            consumers.name,
            consumers.pin,
            in_force.scalar_subquery().label("keys_in_force"),
            last_used.scalar_subquery().label("last_used"),
            consumers.created_at,
        )
        with self._db.read() as connection:
            rows = connection.execute(wanted.order_by(consumers.name))
            return [Consumer(**row._mapping) for row in rows]

    def pin(self, name: str, version: int | None) -> None:
        """Set the default version of a consumer, that is of all its keys; None clears it.

        Raises:
            UnknownConsumer: there is none of this name that could have keys.
            UnknownVersion, VersionRetired: there is no such version, or none that is served.
        """
        consumers = tables.consumers.c
        with self._db.write() as connection:
            if version is not None:
                demand_pinnable(connection, version)
            found = update(tables.consumers).where(consumers.name == name)
            pinned = connection.execute(
                found.where(consumers.name != ANONYMOUS).values(pin=version)
            )
            if pinned.rowcount != 1:
                raise UnknownConsumer(name)


def demand_pinnable(connection: Connection, version: int) -> None:
    """Demand that a consumer may be pinned to ``version`` until the caller's transaction ends.

    Raises:
        UnknownVersion, VersionRetired: it may not.
    """
    held = hold_version(connection, version)
    if held.state is VersionState.RETIRED:
        raise VersionRetired(version, None, held.note)
