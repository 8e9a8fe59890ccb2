"""Chains follow parents, scopes cover, keys end."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backcast.errors import InvalidInput
from backcast.versions import Key, Lineage, Scope

NOW = datetime(2026, 1, 2, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def key(expires_at: datetime | None = None, revoked_at: datetime | None = None) -> Key:
    return Key("0011", "f" * 64, Scope.READ, "search", None, NOW - SECOND, expires_at, revoked_at)


def test_chain_follows_parents() -> None:
    lineage = Lineage({0: None, 1: 0, 2: 1, 3: 1, 4: 3})
    assert lineage.chain(4) == [4, 3, 1, 0]
    assert lineage.chain(2) == [2, 1, 0]
    assert lineage.chain(0) == [0]


@given(st.lists(st.integers(0, 99), max_size=20))
def test_chain_descends_to_the_first(choices: list[int]) -> None:
    parents: dict[int, int | None] = {0: None}
    parents.update({number: choice % number for number, choice in enumerate(choices, start=1)})
    chain = Lineage(parents).chain(len(choices))
    assert [parents[number] for number in chain] == [*chain[1:], None]


@pytest.mark.parametrize("parents", [{0: None, 1: 1}, {0: None, 1: 2, 2: 0}, {0: 1, 1: 0}])
def test_parent_must_be_older(parents: dict[int, int | None]) -> None:
    with pytest.raises(InvalidInput, match="as parent, not an older one"):
        Lineage(parents).chain(1)


def test_admin_covers_read_but_not_the_reverse() -> None:
    assert {(a, b): Scope(a).covers(Scope(b)) for a in Scope for b in Scope} == {
        ("read", "read"): True,
        ("read", "admin"): False,
        ("admin", "read"): True,
        ("admin", "admin"): True,
    }


def test_key_is_in_force_until_it_expires() -> None:
    assert key().in_force(NOW)
    assert key(expires_at=NOW + SECOND).in_force(NOW)
    assert not key(expires_at=NOW).in_force(NOW)


def test_revoked_key_is_not_in_force() -> None:
    assert not key(revoked_at=NOW).in_force(NOW - SECOND)
