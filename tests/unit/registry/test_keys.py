"""What a secret looks like."""

import pytest

from backcast.errors import InvalidInput
from backcast.registry.keys import prefix_of, split_secret

SECRET = "bc_00112233_ZS1rtRZTBKzrNQS8zPfKUpVGCbUVIn7mUwdL-j1dy_M"


def test_prefix_is_found_in_a_secret() -> None:
    assert split_secret("bc_00112233_abc_-d") == split_secret(SECRET) == "00112233"


@pytest.mark.parametrize(
    "text",
    [
        *("", "bc", "bc_", "bc_00112233", "bc_00112233_", "bc_0011_abc", "xy_00112233_abc"),
        *("00112233", "bc_0011223G_abc", "bc_0011223A_abc", "bc_\0\0\0\0\0\0\0\0_abc"),
        *("bc_00112233_é", "bc_00112233_a b", "bc_٠٠١١٢٢٣٣_abc", f"{SECRET}\n", f" {SECRET}"),
        *(f"{SECRET}x", f"bc_00112233_{'x' * 1_000_000}"),
    ],
    ids=lambda text: repr(text[:16]),
)
def test_other_text_has_no_prefix(text: str) -> None:
    assert split_secret(text) is None


def test_key_is_named_by_its_prefix_or_its_secret() -> None:
    assert prefix_of("00112233") == prefix_of(SECRET) == "00112233"


@pytest.mark.parametrize("text", ["", SECRET[:-44], f"{SECRET}x", SECRET[1:], "0011223"])
def test_what_names_no_key_is_not_repeated(text: str) -> None:
    with pytest.raises(InvalidInput, match="eight hexadecimal digits") as raised:
        prefix_of(text)
    assert not text or text not in raised.value.message
