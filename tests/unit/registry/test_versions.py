"""A draft that can be made can be registered, as far as it alone can tell."""

from dataclasses import replace

import pytest

from backcast.errors import InvalidInput
from backcast.versions import Transform
from tests.support import draft


def fitted(source: int, target: int, *, direct: bool = False) -> Transform:
    return Transform(source, target, direct, 4, 4, affine=False, file="t")


def test_first_version_stands_alone() -> None:
    assert draft(0, None, 4).transforms == ()


def test_later_version_has_a_map_to_its_parent_and_may_have_direct_ones() -> None:
    maps = (fitted(3, 1), fitted(3, 0, direct=True), fitted(3, 1, direct=True))
    assert draft(3, 1, 4, maps).transforms == maps


@pytest.mark.parametrize(("number", "parent"), [(0, 0), (1, None)])
def test_only_the_first_version_has_no_parent(number: int, parent: int | None) -> None:
    with pytest.raises(InvalidInput, match=f"Version {number} with parent {parent}"):
        draft(number, parent, 4)


@pytest.mark.parametrize(
    "maps",
    [
        (),
        (fitted(3, 0),),
        (fitted(3, 1), fitted(3, 0)),
        (fitted(3, 1), fitted(3, 1)),
        (fitted(3, 1, direct=True),),
    ],
    ids=["none", "other", "two", "twice", "direct-only"],
)
def test_backward_map_is_one_and_to_the_parent(maps: tuple[Transform, ...]) -> None:
    with pytest.raises(InvalidInput, match="Version 3 needs exactly one backward map"):
        draft(3, 1, 4, maps)


def test_first_version_maps_to_nothing() -> None:
    with pytest.raises(InvalidInput, match="Version 0 needs exactly one backward map"):
        replace(draft(0, None, 4), transforms=(fitted(0, -1),))


def test_map_starts_from_its_own_version() -> None:
    with pytest.raises(InvalidInput, match="A map of version 3 names another version as source"):
        draft(3, 1, 4, (fitted(2, 1),))
