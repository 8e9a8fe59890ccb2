"""Which version a new one is aligned to."""

from collections.abc import Mapping
from datetime import UTC, datetime

import pytest

from backcast.errors import Conflict, UnknownVersion
from backcast.registry import Catalog
from backcast.versions import Live, Version, VersionState
from trainer.training import choose_parent

R, L, S = VersionState.REGISTERED, VersionState.LIVE, VersionState.SUPERSEDED
BACK, REJECTED, RETIRED = VersionState.ROLLED_BACK, VersionState.REJECTED, VersionState.RETIRED

Versions = Mapping[int, tuple[int | None, VersionState]]
"""Parent and state by number."""


def catalog(versions: Versions) -> Catalog:
    live = [number for number, (_, state) in versions.items() if state is L]
    return Catalog(
        live=Live(live[0], "snapshot", 0, 1) if live else None,
        versions=[version(number, *facts) for number, facts in versions.items()],
        transforms=[],
    )


def version(number: int, parent: int | None, state: VersionState) -> Version:
    return Version(
        number=number,
        parent=parent,
        state=state,
        dim=4,
        method="bc-aligner",
        until=1,
        seed=0,
        dataset="tests",
        dataset_fingerprint="f" * 64,
        folder="versions/v",
        files={},
        details={},
        created_at=datetime(2024, 1, 1, tzinfo=UTC),
    )


@pytest.mark.parametrize(
    ("versions", "parent"),
    [
        ({}, None),
        ({0: (None, R)}, 0),
        ({0: (None, R), 1: (0, R), 2: (1, R)}, 2),
        ({0: (None, S), 1: (0, L)}, 1),
        ({0: (None, S), 1: (0, L), 2: (1, R)}, 2),
        ({0: (None, S), 1: (0, L), 2: (1, R), 3: (2, REJECTED)}, 2),
        ({0: (None, L), 1: (0, BACK)}, 0),
        ({0: (None, L), 1: (0, BACK), 2: (0, R)}, 2),
        ({0: (None, L), 1: (0, REJECTED), 2: (1, R)}, 2),
        ({0: (None, L), 1: (0, BACK), 2: (1, R)}, 0),
        ({0: (None, S), 1: (0, L), 2: (0, R)}, 1),
        ({0: (None, S), 1: (0, R), 2: (0, L), 3: (1, R), 4: (2, R)}, 4),
        ({0: (None, S), 1: (0, R), 2: (0, L), 3: (1, R)}, 2),
        ({0: (None, RETIRED), 1: (0, L)}, 1),
    ],
    ids=[
        "nothing yet",
        "one",
        "the newest without a live one",
        "the live one",
        "registered after the live one",
        "not the rejected one",
        "not the rolled back one",
        "trained after a rollback",
        "a fit child of a rejected one",
        "no child of a rolled back one",
        "no sibling of the live one",
        "the newest descendant of the live one",
        "no descendant of a sibling",
        "an ancestor that is retired does not matter",
    ],
)
def test_the_newest_fit_version_is_the_parent(versions: Versions, parent: int | None) -> None:
    chosen = choose_parent(catalog(versions), None)
    assert (None if chosen is None else chosen.number) == parent


@pytest.mark.parametrize("state", [R, L, S])
def test_a_fit_version_may_be_asked_for(state: VersionState) -> None:
    found = choose_parent(catalog({0: (None, state), 1: (0, R), 2: (1, R)}), 0)
    assert found is not None
    assert found.number == 0


@pytest.mark.parametrize("state", [BACK, REJECTED, RETIRED])
def test_an_unfit_version_is_refused_by_its_state(state: VersionState) -> None:
    with pytest.raises(Conflict, match=f"Version 1 is {state} and cannot be a parent") as raised:
        choose_parent(catalog({0: (None, L), 1: (0, state)}), 1)
    assert raised.value.data == {"version": 1}


@pytest.mark.parametrize("versions", [{}, {0: (None, R)}], ids=["none", "others"])
def test_a_version_that_does_not_exist_is_refused(versions: Versions) -> None:
    with pytest.raises(UnknownVersion, match="Version 7"):
        choose_parent(catalog(versions), 7)


@pytest.mark.parametrize("state", [BACK, REJECTED, RETIRED])
def test_no_fit_version_at_all_is_refused(state: VersionState) -> None:
    with pytest.raises(Conflict, match="No version is fit to be a parent"):
        choose_parent(catalog({0: (None, state)}), None)
