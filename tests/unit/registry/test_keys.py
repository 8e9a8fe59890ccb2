"""What a secret looks like."""

import pytest

from backcast.registry.keys import split_secret


def test_prefix_is_found_in_a_secret() -> None:
    assert split_secret("bc_00112233_abc_-d") == "00112233"


@pytest.mark.parametrize(
    "text",
    ["", "bc", "bc_", "bc_00112233", "bc_00112233_", "bc_0011_abc", "xy_00112233_abc", "00112233"],
)
def test_other_text_has_no_prefix(text: str) -> None:
    assert split_secret(text) is None
