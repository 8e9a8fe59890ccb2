"""Item attributes as the model sees them, through a vocabulary that travels with the version."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

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
        for name, known in self.values.items():
            number = {value: at for at, value in enumerate(known)}
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
            bags[name] = (torch.from_numpy(numbers[kept]), torch.from_numpy(offsets))
            unknown[name] = int((~kept).sum())
        return ItemFeatures(items, bags, unknown)


@dataclass(frozen=True, eq=False)
class ItemFeatures:
    """Attribute values of n items in the layout of ``torch.nn.EmbeddingBag``.

    Attributes:
        items: n.
        bags: by attribute, value numbers int64 (V,) and bag starts int64 (n,).
        unknown: by attribute, how many values the vocabulary does not hold.
    """

    items: int
    bags: Mapping[str, tuple[Tensor, Tensor]]
    unknown: Mapping[str, int]

    def to(self, device: torch.device) -> "ItemFeatures":
        """Return the features on ``device``."""
        moved = {n: (v.to(device), o.to(device)) for n, (v, o) in self.bags.items()}
        return ItemFeatures(self.items, moved, self.unknown)
