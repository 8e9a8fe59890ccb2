"""Training pairs: a user, an item it chose, and one that it did not."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backcast.errors import DataError
from trainer.split import Edges

_TABLE_BYTES = 1 << 27
"""A table of all pairs, one byte each, is held up to this size; else pairs are searched for."""


@dataclass(frozen=True, eq=False)
class Batch:
    """User, positive and negative item numbers, int64 (b,) each."""

    users: Tensor
    positives: Tensor
    negatives: Tensor


class PairSampler:
    """Draws an epoch at once: as many pairs as there are edges.

    Edges are drawn with weight 1/degree(user), with replacement, so that users are uniform; the
    negative is uniform over all items, drawn again while it is a positive of that user.

    Args:
        edges: the training edges.
        items: number of items.
        generator: the only source of randomness, on the CPU.

    Raises:
        DataError: a user has every item, so that it has no negative.
    """

    def __init__(self, edges: Edges, items: int, generator: torch.Generator) -> None:
        keys = np.unique(edges.users * items + edges.items)
        users, degrees = np.unique(keys // items, return_counts=True)
        if (degrees >= items).any():
            raise DataError(
                f"A user has interacted with each of the {items} items, so that no negative item "
                "is left to train with. Give more items."
            )
        self._users = torch.from_numpy(users)
        self._degrees = torch.from_numpy(degrees)
        self._starts = self._degrees.cumsum(0) - self._degrees
        self._keys = torch.from_numpy(keys)  # sorted, so also grouped by user
        self._table: Tensor | None = None
        size = (int(users[-1]) + 1) * items
        if size <= _TABLE_BYTES:
            self._table = torch.zeros(size, dtype=torch.bool)
            self._table[self._keys] = True
        self._items = items
        self._pairs = len(edges)
        self._generator = generator

    def epoch(self, batch_size: int) -> Iterator[Batch]:
        """Yield the batches of one epoch."""
        drawn = torch.randint(len(self._users), (self._pairs,), generator=self._generator)
        uniform = torch.rand(self._pairs, generator=self._generator, dtype=torch.float64)
        edges = self._starts[drawn] + (uniform * self._degrees[drawn]).long()
        users, positives = self._users[drawn], self._keys[edges] % self._items
        negatives = self._negatives(users)
        for start in range(0, self._pairs, batch_size):
            stop = start + batch_size
            yield Batch(users[start:stop], positives[start:stop], negatives[start:stop])

    def _negatives(self, users: Tensor) -> Tensor:
        drawn = torch.randint(self._items, users.shape, generator=self._generator)
        rejected = self._is_positive(users, drawn).nonzero().squeeze(1)
        while len(rejected):
            drawn[rejected] = torch.randint(self._items, rejected.shape, generator=self._generator)
            rejected = rejected[self._is_positive(users[rejected], drawn[rejected])]
        return drawn

    def _is_positive(self, users: Tensor, items: Tensor) -> Tensor:
        wanted = users * self._items + items
        if self._table is not None:
            return self._table[wanted]
        at = torch.searchsorted(self._keys, wanted).clamp(max=len(self._keys) - 1)
        return self._keys[at] == wanted
