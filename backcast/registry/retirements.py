"""The end of a version: announced, then done. Its maps stay: they are links of the chain."""

from collections.abc import Sequence
from datetime import date, datetime
from typing import Any

from sqlalchemy import Connection, func, select, update

from backcast.errors import (
    Conflict,
    UnknownVersion,
    VersionInUse,
    VersionOffChain,
    VersionRetired,
)
from backcast.registry import tables
from backcast.registry.database import Database, utc_now
from backcast.registry.versions import hold_version, read_versions, set_note
from backcast.versions import Lineage, Version, VersionState


class Retirements:
    """Deprecate and retire versions. What is checked stays so until the change is made."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def deprecate(self, number: int, sunset_at: datetime, reason: str | None) -> Version:
        """Announce the end of a served version; again, the announcement is changed.

        Raises:
            UnknownVersion, VersionRetired, VersionOffChain, Conflict: the version is not served.
        """
        with self._db.write() as connection:
            version = _served(connection, number)
            since = version.deprecated_at or utc_now()
            _set(connection, number, deprecated_at=since, sunset_at=sunset_at)
            set_note(connection, [number], reason)
            return hold_version(connection, number)

    def withdraw(self, number: int) -> Version:
        """Take the announcement back; without one nothing changes.

        Raises:
            UnknownVersion, VersionRetired, VersionOffChain, Conflict: the version is not served.
        """
        with self._db.write() as connection:
            if _served(connection, number).deprecated_at is not None:
                _set(connection, number, deprecated_at=None, sunset_at=None)
                set_note(connection, [number], None)
            return hold_version(connection, number)

    def retire(
        self, number: int, *, unused_since: date, forced: bool, reason: str | None
    ) -> Version:
        """Stop serving a superseded version; a second time nothing changes.

        It must be unused since the UTC day ``unused_since``, nobody may be pinned to it, and an
        announced sunset must be over, unless it is ``forced``.

        Raises:
            VersionInUse: it is not so.
            UnknownVersion, VersionOffChain, Conflict: the version is not served, or it is live.
        """
        with self._db.write() as connection:
            try:
                version = _served(connection, number)
            except VersionRetired:
                return hold_version(connection, number)
            if version.state is VersionState.LIVE:
                raise Conflict(
                    f"Version {number} is live and cannot be retired; promote its successor first.",
                    version=number,
                )
            if not forced:
                _demand_unused(connection, version, unused_since)
            _set(connection, number, state=VersionState.RETIRED, retired_at=utc_now())
            set_note(connection, [number], reason or version.note)
            return hold_version(connection, number)


def _served(connection: Connection, number: int) -> Version:
    """Return a version on the live chain; none goes live, and nobody is pinned to it, meanwhile."""
    # First the live row, then the version's: the order in which a switch takes them.
    live = connection.scalar(select(tables.live.c.version).with_for_update(key_share=True))
    mine = select(tables.versions.c.number).where(tables.versions.c.number == number)
    if connection.scalar(mine.with_for_update(key_share=True)) is None:
        raise UnknownVersion(number)
    versions = {v.number: v for v in read_versions(connection)}
    version = versions[number]
    if version.state is VersionState.RETIRED:
        raise VersionRetired(number, None, version.note)
    if live is None or version.state is VersionState.REGISTERED:
        raise Conflict(
            f"Version {number} ({version.state}) was never served, so there is nothing to end.",
            version=number,
        )
    chain = Lineage.of(versions.values()).chain(live)
    if number not in chain:
        raise VersionOffChain(number, live, _servable(chain, versions), version.state)
    return version


def _servable(chain: Sequence[int], versions: dict[int, Version]) -> list[int]:
    return [j for j in sorted(chain) if versions[j].state is not VersionState.RETIRED]


def _demand_unused(connection: Connection, version: Version, since: date) -> None:
    consumers, usage = tables.consumers.c, tables.usage.c
    pinned = connection.scalars(
        select(consumers.name).where(consumers.pin == version.number).order_by(consumers.name)
    ).all()
    uses = connection.execute(
        select(consumers.name, func.max(usage.day))
        .join(tables.consumers, consumers.id == usage.consumer)
        .where((usage.version == version.number) & (usage.day >= since))
        .group_by(consumers.name)
        .order_by(consumers.name)
    )
    used = {name: day.isoformat() for name, day in uses}
    promised = version.sunset_at if version.sunset_at and version.sunset_at > utc_now() else None
    if pinned or used or promised:
        raise VersionInUse(
            version.number,
            pinned=pinned,
            used=used,
            sunset_at=promised.isoformat() if promised else None,
        )


def _set(connection: Connection, number: int, **values: Any) -> None:
    connection.execute(
        update(tables.versions).where(tables.versions.c.number == number).values(**values)
    )
