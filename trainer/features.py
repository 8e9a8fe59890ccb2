"""Item attributes as the model sees them, through a vocabulary that travels with the version."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from backcast.errors import DataError
from trainer.data.dataset import Dataset


@dataclass(frozen=True)
class Vocabulary:
    """The values of each attribute that a model knows, attributes and values in a fixed order."""

    values: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        # A model adds up attributes in this order, so that it is the same after a reading back.
        object.__setattr__(self, "values", dict(sorted(self.values.items())))

    @classmethod
    def of(cls, dataset: Dataset, items: int, min_count: int) -> Self:
        """Collect the values seen on at least ``min_count`` of the first ``items`` items.

        Raises:
            DataError: no value is left. A GraphSAGE whose items all start equal cannot tell them
                apart: the mean of equal neighbours is the same everywhere.
        """
        values = {}
        for name, column in dataset.attributes.items():
            counts = Counter(column.values[: column.offsets[items]].tolist())
            values[name] = tuple(sorted(v for v, n in counts.items() if n >= min_count))
        if not any(values.values()):
            raise DataError(
                f"{dataset.folder}: no item attribute has a value on {min_count} items or more, "
                "and without attributes a GraphSAGE cannot tell items apart. "
                "Add attribute columns to the items, or lower min_value_count."
            )
        return cls({name: known for name, known in values.items() if known})

    @property
    def sizes(self) -> dict[str, int]:
        """Number of known values by attribute."""
        return {name: len(known) for name, known in self.values.items()}

    def numbers(self, attribute: str) -> dict[str, int]:
        """Number the known values of an attribute; there are none of an unknown one."""
        return {value: number for number, value in enumerate(self.values.get(attribute, ()))}

    def document(self) -> dict[str, list[str]]:
        """Return the vocabulary as a JSON document."""
        return {name: list(known) for name, known in self.values.items()}

    @classmethod
    def from_document(cls, document: Any) -> Self:
        """Read the vocabulary of a version's artifacts."""
        return cls({str(name): tuple(known) for name, known in document.items()})

    def encode(self, dataset: Dataset, items: int) -> "ItemFeatures":
        """Number the attribute values of the first ``items`` items; unknown ones are counted."""
        bags, unknown = {}, {}
        for name in self.values:
            number = self.numbers(name)
            column = dataset.attributes.get(name)
            if column is None:
                raise DataError(
                    f"{dataset.folder}: the items have no column {name!r}, which this version was "
                    "trained with."
                )
            stop = int(column.offsets[items])
            numbers = np.fromiter((number.get(v, -1) for v in column.values[:stop]), np.int64, stop)
            owners = np.repeat(np.arange(items), np.diff(column.offsets[: items + 1]))
            kept = numbers >= 0
            sizes = np.bincount(owners[kept], minlength=items)
            offsets = np.concatenate([[0], np.cumsum(sizes)])[:-1].astype(np.int64)
            bags[name] = (numbers[kept], offsets)
            unknown[name] = int((~kept).sum())
        return ItemFeatures(items, self.sizes, bags, unknown)


@dataclass(frozen=True, eq=False)
class ItemFeatures:
    """Attribute values of n items by their place in one table of all attributes' values.

    Attributes:
        items: n.
        sizes: by attribute, how many values the table holds; attributes follow one another in it.
        bags: by attribute, value numbers int64 (V,) and bag starts int64 (n,).
        unknown: by attribute, how many values the vocabulary does not hold.
    """

    items: int
    sizes: Mapping[str, int]
    bags: Mapping[str, tuple[NDArray[np.int64], NDArray[np.int64]]]
    unknown: Mapping[str, int]

    @property
    def table_size(self) -> int:
        """Number of values of all attributes."""
        return sum(self.sizes.values())

    def entries(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """Return rows, columns and values of the (n, table) matrix of the items' inputs.

        An item's input is the sum over attributes of the mean of its values' embeddings, so its row
        holds 1/count at each value of an attribute, and nothing for an attribute without values.
        """
        rows, columns, values, start = [], [], [], 0
        for name, (numbers, offsets) in self.bags.items():
            counts = np.diff(np.append(offsets, len(numbers)))
            owners = np.repeat(np.arange(self.items), counts)
            rows.append(owners)
            columns.append(numbers + start)
            values.append((1.0 / counts[owners]).astype(np.float32))
            start += self.sizes[name]
        return np.concatenate(rows), np.concatenate(columns), np.concatenate(values)
