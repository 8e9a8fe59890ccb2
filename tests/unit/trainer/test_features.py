"""Vocabularies, and items encoded by them, against a loop."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backcast.artifacts import dump_json
from backcast.errors import DataError
from tests.trainer_support import dataset_of
from trainer.data.dataset import Dataset
from trainer.features import Vocabulary


def catalogue(*columns: Sequence[Sequence[str]], names: str = "abc") -> Dataset:
    """Make a data set of items 0, 1, …, each column giving the values of every item."""
    count = len(columns[0])
    return dataset_of(
        [("ann", str(n), n) for n in range(count)],
        {
            name: {str(n): values for n, values in enumerate(column)}
            for name, column in zip(names, columns, strict=False)
        },
    )


def test_values_on_fewer_items_than_asked_for_are_left_out() -> None:
    dataset = catalogue([["q", "p"], ["p"], ["q", "r"], ["p"]])
    assert Vocabulary.of(dataset, 4, 1).values == {"a": ("p", "q", "r")}
    assert Vocabulary.of(dataset, 4, 2).values == {"a": ("p", "q")}
    assert Vocabulary.of(dataset, 4, 3).values == {"a": ("p",)}


def test_items_that_come_later_do_not_count() -> None:
    dataset = catalogue([["p"], ["p", "q"], ["q"], ["r"]])
    assert Vocabulary.of(dataset, 2, 2).values == {"a": ("p",)}
    assert Vocabulary.of(dataset, 3, 2).values == {"a": ("p", "q")}


def test_attributes_are_counted_one_by_one() -> None:
    dataset = catalogue([["p"], []], [["p"], ["p"]])
    assert Vocabulary.of(dataset, 2, 2).values == {"b": ("p",)}


def test_attributes_without_a_value_left_are_dropped() -> None:
    vocabulary = Vocabulary.of(catalogue([["p"], ["q"]], [["r"], ["r"]]), 2, 2)
    assert vocabulary.sizes == {"b": 1}


@pytest.mark.parametrize(
    "dataset",
    [
        catalogue([["p"], ["q"]]),
        catalogue([[], []]),
        dataset_of([("ann", "x", 1), ("ann", "y", 2)]),
    ],
    ids=["all rare", "all empty", "no column"],
)
def test_no_attribute_left_is_refused(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="cannot tell items apart"):
        Vocabulary.of(dataset, 2, 2)


def test_the_order_of_the_columns_does_not_matter() -> None:
    columns = [["p"]], [["q"]], [["r"]]
    one = Vocabulary.of(catalogue(*columns, names="abc"), 1, 1)
    other = Vocabulary.of(catalogue(*reversed(columns), names="cba"), 1, 1)
    assert one == other
    assert list(one.sizes) == list(other.sizes) == ["a", "b", "c"]


values = st.lists(st.sampled_from(["p", "q", "r", "s"]), unique=True, max_size=4)


@given(st.lists(st.tuples(values, values), min_size=1, max_size=8), st.data())
def test_encoding_is_that_of_a_loop(
    rows: Sequence[tuple[Sequence[str], Sequence[str]]], data: st.DataObject
) -> None:
    columns = {name: [row[at] for row in rows] for at, name in enumerate("ab")}
    items = data.draw(st.integers(0, len(rows)))
    known = {name: tuple(data.draw(values)) for name in "ab"}
    encoded = Vocabulary(known).encode(catalogue(*columns.values()), items)

    assert encoded.items == items
    for name, column in columns.items():
        numbers: list[int] = []
        starts: list[int] = []
        unknown = 0
        for row in column[:items]:
            starts.append(len(numbers))
            numbers += [known[name].index(value) for value in row if value in known[name]]
            unknown += sum(value not in known[name] for value in row)
        found_numbers, found_starts = encoded.bags[name]
        assert found_numbers.tolist() == numbers
        assert found_starts.tolist() == starts
        assert encoded.unknown[name] == unknown


@given(st.lists(st.tuples(values, values), min_size=1, max_size=8), st.data())
def test_entries_are_the_shares_of_every_value_in_one_table(
    rows: Sequence[tuple[Sequence[str], Sequence[str]]], data: st.DataObject
) -> None:
    columns = {name: [row[at] for row in rows] for at, name in enumerate("ab")}
    known = {name: tuple(data.draw(values)) for name in "ab"}
    encoded = Vocabulary(known).encode(catalogue(*columns.values()), len(rows))

    table = [(name, value) for name in "ab" for value in known[name]]
    assert encoded.table_size == len(table)
    expected = []
    for item in range(len(rows)):
        for name, column in columns.items():
            owned = [value for value in column[item] if value in known[name]]
            expected += [(item, table.index((name, value)), 1 / len(owned)) for value in owned]
    items, places, shares = encoded.entries()
    assert [part.dtype.name for part in (items, places, shares)] == ["int64", "int64", "float32"]
    found = sorted(zip(items.tolist(), places.tolist(), shares.tolist(), strict=True))
    assert [entry[:2] for entry in found] == [entry[:2] for entry in sorted(expected)]
    assert [entry[2] for entry in found] == pytest.approx([entry[2] for entry in sorted(expected)])


def test_columns_that_came_later_are_ignored() -> None:
    encoded = Vocabulary({"a": ("p",)}).encode(catalogue([["p"]], [["q"]]), 1)
    assert list(encoded.bags) == ["a"]
    assert encoded.unknown == {"a": 0}


def test_a_column_that_is_gone_is_named() -> None:
    with pytest.raises(DataError, match="no column 'b'"):
        Vocabulary({"a": ("p",), "b": ("q",)}).encode(catalogue([["p"]]), 1)


names = st.text(min_size=1, max_size=5).filter(lambda text: text.isprintable())


@given(st.dictionaries(names, st.lists(names, unique=True).map(tuple), max_size=4))
def test_a_vocabulary_survives_being_written(known: dict[str, tuple[str, ...]]) -> None:
    vocabulary = Vocabulary(known)
    read = Vocabulary.from_document(json.loads(dump_json(vocabulary.document())))
    assert read == vocabulary
    assert list(read.values.items()) == list(vocabulary.values.items())  # and their order
