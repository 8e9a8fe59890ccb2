"""A version's end: announced to its consumers, taken back, or done."""

import logging
from datetime import UTC, datetime, timedelta

from backcast.errors import InvalidInput
from backcast.lifecycle.places import Backcast
from backcast.registry.database import utc_now
from backcast.versions import Version

logger = logging.getLogger(__name__)

_LAST = datetime.max.replace(tzinfo=UTC)


def deprecate(
    backcast: Backcast,
    version: int,
    *,
    sunset_at: datetime,
    actor: str,
    reason: str | None = None,
) -> Version:
    """Announce that ``version`` is served until ``sunset_at`` (with zone) for certain, not longer.

    Every answer says so from then on, within the replicas' poll time. Where it is announced
    already, date and reason are replaced.

    Raises:
        InvalidInput: the moment has no zone, or is over.
        UnknownVersion, VersionRetired, VersionOffChain, Conflict: the version is not served.
    """
    if sunset_at.tzinfo is None:
        raise InvalidInput(f"The sunset {sunset_at.isoformat()} has no zone; add Z or +00:00.")
    if sunset_at > _LAST:
        raise InvalidInput(f"The sunset {sunset_at.isoformat()} is after the year 9999 in UTC.")
    if sunset_at <= utc_now():
        raise InvalidInput(
            f"The sunset {sunset_at.isoformat()} is over; name a moment that is to come."
        )
    ending = backcast.registry.retirements.deprecate(version, sunset_at, reason)
    logger.info("version %d is deprecated until %s, by %s", version, sunset_at, actor)
    return ending


def withdraw_deprecation(backcast: Backcast, version: int, *, actor: str) -> Version:
    """Take an announcement back; without one nothing changes.

    Raises:
        UnknownVersion, VersionRetired, VersionOffChain, Conflict: the version is not served.
    """
    kept = backcast.registry.retirements.withdraw(version)
    logger.info("version %d is not deprecated any more, by %s", version, actor)
    return kept


def retire(
    backcast: Backcast,
    version: int,
    *,
    actor: str,
    idle: timedelta,
    force: bool = False,
    reason: str | None = None,
) -> Version:
    """Stop serving ``version``: 410 from every replica within its poll time. Its maps stay.

    ``force`` retires a version that somebody is pinned to, that was used within ``idle`` or whose
    announced sunset is to come, and needs a ``reason``. Retiring twice changes nothing.

    Raises:
        VersionInUse: somebody is in the way; the error names them.
        Conflict: the version is live, or was never served.
        UnknownVersion, VersionOffChain: there is nothing to retire.
    """
    if force and not reason:
        raise InvalidInput("A forced retirement needs a reason.")
    since = (utc_now() - idle).date()
    retired = backcast.registry.retirements.retire(
        version, unused_since=since, forced=force, reason=reason
    )
    logger.info("version %d is retired, by %s%s", version, actor, ", forced" if force else "")
    return retired
