"""Values are counted as a reader of JSON would find them, whatever stands in strings."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service import json_values
from service.json_values import has_more_signs


def signs(value: object) -> int:
    """Return how many of ``,:[{`` the JSON of a value has outside of strings."""
    if isinstance(value, dict):
        return 1 + max(0, len(value) - 1) + len(value) + sum(map(signs, value.values()))
    if isinstance(value, list):
        return 1 + max(0, len(value) - 1) + sum(map(signs, value))
    return 0


VALUES = st.recursive(
    st.none() | st.integers() | st.text(alphabet='",\\\\\\{}[]:aé\n', max_size=12),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text('",\\', max_size=3), inner),
    max_leaves=30,
)


@given(VALUES, st.booleans(), st.integers(1, 9))
def test_signs_between_values_are_counted(value: object, ascii_only: bool, piece: int) -> None:
    content = json.dumps(value, ensure_ascii=ascii_only).encode()
    expected = signs(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_PIECE", piece)
        assert not has_more_signs(content, expected)
        if expected:
            assert has_more_signs(content, expected - 1)


def test_what_is_no_json_is_counted_too() -> None:
    for content in (b"", b"\\" * 1_000_000, b'"' * 1_000_001, b"\xff" * 10, b'"' + b"," * 10):
        assert not has_more_signs(content, 0)
    assert has_more_signs(b",,", 1)
