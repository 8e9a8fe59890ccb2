"""The service keeps what its OpenAPI document promises, whoever asks and whatever is asked."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.document import Tally, all_checks, fuzz, operations
from tests.fuzz.world import World, serving

EXAMPLES = 6  # of each operation, beside those that cover the schema


@pytest.fixture
def world(tmp_path: Path, backends: dict[str, Any]) -> Iterator[World]:
    with serving(tmp_path, **backends) as world:
        yield world


def check(tally: Tally) -> None:
    assert tally.errors == []
    assert tally.failures == {}
    assert set(tally.operations) == operations()
    assert set(tally.checks) == all_checks()
    assert not {status for status in tally.statuses if status >= 500}


@pytest.mark.parametrize("backends", ["postgresql and redis"], indirect=True)
def test_an_administrator(world: World) -> None:
    tally = fuzz(world.url, world.admin, examples=EXAMPLES)
    check(tally)
    assert {200, 404, 405, 409, 422} <= set(tally.statuses)


@pytest.mark.parametrize("backends", ["sqlite and embedded"], indirect=True)
def test_a_reader(world: World) -> None:
    tally = fuzz(world.url, world.read, examples=EXAMPLES)
    check(tally)
    assert {200, 403, 404, 422} <= set(tally.statuses)


@pytest.mark.parametrize("backends", ["sqlite and embedded"], indirect=True)
def test_nobody(world: World) -> None:
    tally = fuzz(world.url, None, examples=EXAMPLES)
    check(tally)
    assert 401 in tally.statuses


@pytest.mark.long
@pytest.mark.parametrize("key", ["admin", "read", None])
def test_for_long(world: World, key: str | None) -> None:
    check(fuzz(world.url, None if key is None else getattr(world, key), seconds=60, examples=200))
