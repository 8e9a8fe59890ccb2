"""Split edges by time: what a model is fitted on, what message passing sees, what is predicted.

Users and items are numbered by first appearance, and edges are in time order, so a moment is a
number of leading edges and "known by then" a number of leading users or items.

A holdout looks from ``past`` edges to ``horizon`` edges. A user who first appears in between gives
all of its edges there but the last to message passing, the last one to be predicted; a user with
a single edge there gives it to message passing. The edges of users known before are predicted.

``protocol="paper"`` (as published) also trains on the new users' edges, and selects the epoch on
the very edges that the result is measured on. ``protocol="strict"`` holds the last 5 % of the edges
until t_k out for selection, trains on the first 95 % alone, and looks beyond t_k for nothing.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from backcast.errors import InvalidInput
from trainer.config import Protocol
from trainer.data.dataset import Dataset

STRICT_FIT_SHARE = 0.95


@dataclass(frozen=True, eq=False)
class Edges:
    """User–item pairs: two int64 arrays of shape (E,)."""

    users: NDArray[np.int64]
    items: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.users)

    def __add__(self, other: "Edges") -> "Edges":
        return Edges(
            np.concatenate([self.users, other.users]), np.concatenate([self.items, other.items])
        )

    def where(self, chosen: NDArray[np.bool_]) -> "Edges":
        """Return the edges at which ``chosen``, bool (E,), is true."""
        return Edges(self.users[chosen], self.items[chosen])


@dataclass(frozen=True, eq=False)
class Holdout:
    """One look from the past to a horizon.

    Attributes:
        past: the edges before.
        support: the new users' edges that message passing may see.
        targets: the edges to be predicted.
        users, items: how many are known at the horizon: the candidates.
    """

    past: Edges
    support: Edges
    targets: Edges
    users: int
    items: int

    @property
    def visible(self) -> Edges:
        """All edges of the graph that predictions are made on."""
        return self.past + self.support


@dataclass(frozen=True, eq=False)
class Split:
    """What fitting version k needs.

    Attributes:
        train: the edges of the training graph, and the positive pairs.
        users, items: how many nodes the training graph has.
        known: all edges of the data that the version may use; what it is first served for, and
            where closed-form maps are fitted. As published, it is the training graph.
        selection: where the best epoch is chosen, None where it has no targets.
        test: where the result is measured, None without later data.
    """

    train: Edges
    users: int
    items: int
    known: Edges
    selection: Holdout | None
    test: Holdout | None


def make_split(dataset: Dataset, until: int, horizon: int | None, protocol: Protocol) -> Split:
    """Split for a version trained at timestamp ``until`` and measured until ``horizon``.

    Raises:
        InvalidInput: there is no edge until then; or the paper's protocol is asked for without a
            horizon, whose edges it trains and selects on.
    """
    known = dataset.edges_until(until)
    if known == 0:
        raise InvalidInput(f"{dataset.folder}: no interaction is as early as {until}.", until=until)
    test = None if horizon is None else holdout(dataset, known, dataset.edges_until(horizon))
    if protocol is Protocol.PAPER:
        if test is None:
            raise InvalidInput(
                "protocol=paper selects on the edges after --until: give --horizon, "
                "or use protocol=strict."
            )
        return Split(test.visible, test.users, test.items, test.visible, test, test)
    fitted = math.ceil(STRICT_FIT_SHARE * known)
    train = _edges(dataset, 0, fitted)
    return Split(
        train,
        _known(train.users),
        _known(train.items),
        _edges(dataset, 0, known),
        holdout(dataset, fitted, known),
        test,
    )


def holdout(dataset: Dataset, past: int, horizon: int) -> Holdout | None:
    """Look from the first ``past`` edges to the first ``horizon``; None without targets."""
    before, interval = _edges(dataset, 0, past), _edges(dataset, past, horizon)
    is_new = interval.users >= _known(before.users)
    last_of_user = _last_of_each(interval.users)
    edges_of_user = np.bincount(interval.users, minlength=1)[interval.users]
    predicted = ~is_new | (last_of_user & (edges_of_user > 1))
    if not predicted.any():
        return None
    return Holdout(
        past=before,
        support=interval.where(~predicted),
        targets=interval.where(predicted),
        users=_known(dataset.users[:horizon]),
        items=_known(dataset.items[:horizon]),
    )


def _edges(dataset: Dataset, start: int, stop: int) -> Edges:
    return Edges(dataset.users[start:stop], dataset.items[start:stop])


def _known(numbers: NDArray[np.int64]) -> int:
    return int(numbers.max()) + 1 if len(numbers) else 0


def _last_of_each(numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
    is_last = np.zeros(len(numbers), dtype=bool)
    _, first_from_end = np.unique(numbers[::-1], return_index=True)
    is_last[len(numbers) - 1 - first_from_end] = True
    return is_last
