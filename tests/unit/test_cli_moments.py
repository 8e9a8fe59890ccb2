"""Moments and durations as options give them."""

from datetime import UTC, datetime, timedelta, timezone

import pytest

from backcast.cli.moments import read_duration, read_moment, read_moment_or_duration
from backcast.errors import InvalidInput

DAY = datetime(2027, 1, 31, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2027-01-31", DAY),
        ("2027-01-31T18:00Z", DAY + timedelta(hours=18)),
        ("2027-01-31T18:00+01:00", datetime(2027, 1, 31, 18, tzinfo=timezone(timedelta(hours=1)))),
    ],
)
def test_moment_is_a_day_or_has_a_zone(text: str, moment: datetime) -> None:
    assert read_moment("--sunset", text) == read_moment_or_duration("--expires", text) == moment


@pytest.mark.parametrize(
    ("text", "words"),
    [("soon", "'soon' is no moment; write 2027-01-31 or "), ("2027-01-31T18:00", "has no zone")],
)
def test_other_text_is_no_moment(text: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=f"--sunset .*{words}"):
        read_moment("--sunset", text)


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("0", timedelta(0)),
        ("45s", timedelta(seconds=45)),
        ("1.5m", timedelta(seconds=90)),
        ("24h", timedelta(days=1)),
        ("30d", timedelta(days=30)),
        ("2w", timedelta(days=14)),
        ("36500d", timedelta(days=36_500)),
    ],
)
def test_duration_is_a_number_and_a_unit(text: str, duration: timedelta) -> None:
    assert read_duration("--overlap", text) == duration


@pytest.mark.parametrize(
    "text", ["", "24", "-1h", "1 h", "h", "1y", "1e3s", "36501d", "9" * 400 + "d", "1h30m", "٣d"]
)
def test_other_text_is_no_duration(text: str) -> None:
    with pytest.raises(InvalidInput, match=r"--overlap .* is no duration; write a number and one"):
        read_duration("--overlap", text)
