"""Moments and durations as options give them."""

import re
from datetime import UTC, datetime, timedelta

from backcast.errors import InvalidInput

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION = re.compile(rf"([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?)([{''.join(_UNITS)}])")
_LONGEST = timedelta(days=36_500)


def read_moment(option: str, text: str, *, or_else: str = "") -> datetime:
    """Return a day's beginning in UTC, or a moment with a zone.

    ``or_else`` tells what could have been given too.
    """
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidInput(
            f"{option} {text!r} is no moment; write 2027-01-31 or 2027-01-31T18:00+01:00{or_else}."
        ) from None
    if len(text) == len("2027-01-31"):
        return moment.replace(tzinfo=UTC)
    if moment.tzinfo is None:
        raise InvalidInput(f"{option} {text!r} has no zone; add Z for UTC, or +01:00.")
    return moment


def read_duration(option: str, text: str) -> timedelta:
    """Return a duration such as 30d, 24h, 90m or 0."""
    found = _DURATION.fullmatch("0s" if text == "0" else text)
    duration = timedelta(**{_UNITS[found[2]]: float(found[1])}) if found else None
    if duration is None or duration > _LONGEST:
        raise InvalidInput(
            f"{option} {text!r} is no duration; write a number and one of s, m, h, d, w: 24h."
        )
    return duration


def read_moment_or_duration(option: str, text: str) -> datetime | timedelta:
    """Return what ``text`` is: a number and a unit, or a moment."""
    if _DURATION.fullmatch(text):
        return read_duration(option, text)
    return read_moment(option, text, or_else=", or a duration such as 30d")
