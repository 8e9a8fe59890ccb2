"""The names of revisions say which code can run on which schema."""

import pytest

from backcast.registry.revisions import Fit, Revision, fit


@pytest.mark.parametrize(
    ("found", "own", "expected"),
    [
        (None, "0003", Fit.ABSENT),
        ("0003", "0003", Fit.CURRENT),
        ("0003_for_0002", "0003_for_0002", Fit.CURRENT),
        ("0002", "0003_for_0002", Fit.OLDER),
        ("0003_for_0002", "0004_for_0003", Fit.OLDER),
        ("0004_for_0003", "0003", Fit.EXPANDED),
        ("0006_for_0003", "0003_for_0001", Fit.EXPANDED),
        ("0005_for_0004", "0004_for_0003", Fit.EXPANDED),
        ("0005_for_0004", "0003", Fit.NEWER),
        ("0004", "0003", Fit.NEWER),
        ("20270101", "0003", Fit.NEWER),
    ],
)
def test_what_a_schema_is_to_code(found: str | None, own: str, expected: Fit) -> None:
    assert fit(found, own) is expected
    assert expected.runs is (expected in {Fit.CURRENT, Fit.EXPANDED})


@pytest.mark.parametrize("name", ["4", "0003_for_0004", "0004-0003", "0004_for_", "head"])
def test_name_that_breaks_the_rule_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="expected a name such as"):
        Revision.parse(name)


@pytest.mark.parametrize(
    ("before", "after", "ends"),
    [
        ("0003", "0004_for_0003", False),
        ("0004_for_0003", "0005_for_0003", False),
        ("0004_for_0003", "0005_for_0004", True),
        ("0003", "0004", True),
    ],
)
def test_which_step_leaves_older_code_behind(before: str, after: str, ends: bool) -> None:
    assert Revision.parse(after).ends_code_of(Revision.parse(before)) is ends
