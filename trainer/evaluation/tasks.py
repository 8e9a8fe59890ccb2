"""The five unintended tasks (the paper's section 5.3): whom they are about, and the labels.

The moments of a :class:`Timeline` are t_0 .. t_{K+1}. Consumers of version j see true ver-j vectors
and are tested on later graphs, the version-k graph being that of everything known at t_k:

============  =======================  ===========================  ===============================
input         trained at t_j on        validated on                 tested at
============  =======================  ===========================  ===============================
user          labels from (t_j,        labels from (t_{j+1},        k ≥ j + 2, labels from
              t_{j+1}]                 t_{j+2}], version-(j+1)      (t_k, t_{k+1}]
                                       graph
item          ratings until t_j        ratings until t_{j+1},       k ≥ j + 1, ratings until
                                       version-j graph              t_{k+1}
user ‖ item   edges until t_j          edges in (t_j, t_{j+1}],     k ≥ j + 1, edges in
                                       version-j graph              (t_k, t_{k+1}]
============  =======================  ===========================  ===============================

Who takes part is a matter of the protocol: see :class:`StrictPopulations` and
:class:`PaperPopulations`. An interaction without a rating takes part in no rating task.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol as Interface

import numpy as np
from numpy.typing import NDArray

from backcast.errors import InvalidInput
from trainer.config import Protocol
from trainer.data.dataset import Dataset
from trainer.split import holdout

MORE_RATINGS_THAN = 10
AT_LEAST_RATINGS = 10
"""The paper's text asks for more than 10 ratings, the published code for at least 10."""
GOOD_RATING = 4.0
SPLIT_OPINION = 1.0
"""Ratings of this standard deviation or a larger one are called divided."""

Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Timeline:
    """The moments of a benchmark: version k is trained at t_k and used until t_{k+1}.

    Attributes:
        moments: t_0 .. t_{K+1}, timestamps in seconds, ascending.
        protocol: who takes part in the tasks.
    """

    dataset: Dataset
    moments: Sequence[int]
    protocol: Protocol

    def __post_init__(self) -> None:
        """Refuse moments that are no history."""
        steps = zip(self.moments, self.moments[1:], strict=False)
        if len(self.moments) < 2 or any(later <= earlier for earlier, later in steps):
            raise InvalidInput(
                f"Moments: expected two or more, ascending; got {list(self.moments)}."
            )

    @property
    def versions(self) -> int:
        """How many versions there are: k = 0..K."""
        return len(self.moments) - 1

    @cached_property
    def populations(self) -> "Populations":
        """Who takes part, by this timeline's protocol."""
        return _POPULATIONS[self.protocol](self)

    def edges(self, moment: int) -> int:
        """Return how many leading edges there are until t_moment."""
        return self.dataset.edges_until(self.moments[moment])

    def users(self, moment: int) -> int:
        """Return how many users are known at t_moment: the first so many."""
        return self.dataset.users_known(self.moments[moment])

    def items(self, moment: int) -> int:
        """Return how many items are known at t_moment: the first so many."""
        return self.dataset.items_known(self.moments[moment])

    def past(self, moment: int) -> Numbers:
        """Return the indices of the edges until t_moment."""
        return np.arange(self.edges(moment))

    def interval(self, k: int) -> Numbers:
        """Return the indices of the edges in (t_k, t_{k+1}]."""
        return np.arange(self.edges(k), self.edges(k + 1))


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and labels. The input of row r is the vector of a user, of an item, or both joined.

    Attributes:
        users: int64 (n,), user numbers; None where no user is part of the input.
        items: int64 (n,), item numbers, likewise.
        labels: bool (n,).
    """

    users: Numbers | None
    items: Numbers | None
    labels: Flags

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def has_both_classes(self) -> bool:
        """Whether there is anything to tell apart."""
        return bool(self.labels.any() and not self.labels.all())


@dataclass(frozen=True, eq=False)
class Rated:
    """Items, and the edges whose ratings are counted.

    Attributes:
        items: int64 (n,), item numbers, each with two or more of the ratings.
        edges: int64 (m,), edges with a rating, of these and other items.
    """

    items: Numbers
    edges: Numbers


class Populations(Interface):
    """Who takes part. Edges are given as indices into the interactions of the data set."""

    def __init__(self, timeline: Timeline) -> None: ...

    def users(self, k: int) -> int:
        """Return how many users, the first so many, are looked at on the version-k graph."""

    def labelling(self, k: int) -> Numbers:
        """Return the edges in (t_k, t_{k+1}] that label the users."""

    def training_items(self, version: int) -> Rated:
        """Return the items of t_version and the ratings until then."""

    def validation_items(self, version: int) -> Rated:
        """Return items that the version's graph has, and the ratings until t_{version+1}."""

    def test_items(self, k: int) -> Rated:
        """Return items that the version-k graph has, and the ratings until t_{k+1}."""

    def training_edges(self, version: int) -> Numbers:
        """Return edges of the version's graph."""

    def later_edges(self, k: int) -> Numbers:
        """Return edges in (t_k, t_{k+1}] between nodes of the version-k graph."""


@dataclass(frozen=True)
class StrictPopulations:
    """Who takes part by the paper's text: nobody who is unknown at t_k.

    Items need more than 10 ratings until t_k. In validation they are counted until t_{j+1}, and
    items that the version-j graph does not know yet are left out.
    """

    timeline: Timeline

    def users(self, k: int) -> int:
        """Return how many users are known at t_k."""
        return self.timeline.users(k)

    def labelling(self, k: int) -> Numbers:
        """Return all edges of the interval."""
        return self.timeline.interval(k)

    def training_items(self, version: int) -> Rated:
        """Return the much-rated items at t_version."""
        return self._rated(version, version)

    def validation_items(self, version: int) -> Rated:
        """Return the much-rated items at t_{version+1} among those known at t_version."""
        rated = self._rated(version + 1, version + 1)
        return Rated(rated.items[rated.items < self.timeline.items(version)], rated.edges)

    def test_items(self, k: int) -> Rated:
        """Return the much-rated items at t_k."""
        return self._rated(k, k + 1)

    def training_edges(self, version: int) -> Numbers:
        """Return all edges until t_version."""
        return self.timeline.past(version)

    def later_edges(self, k: int) -> Numbers:
        """Return the edges of the interval whose user and item are both known at t_k."""
        interval, data = self.timeline.interval(k), self.timeline.dataset
        users_known = data.users[interval] < self.timeline.users(k)
        return interval[users_known & (data.items[interval] < self.timeline.items(k))]

    def _rated(self, counted_until: int, rated_until: int) -> Rated:
        data = self.timeline.dataset
        counts = _ratings_of_each(data, _with_rating(data, self.timeline.past(counted_until)))
        edges = _with_rating(data, self.timeline.past(rated_until))
        return Rated(np.flatnonzero(counts > MORE_RATINGS_THAN), edges)


@dataclass(frozen=True)
class PaperPopulations:
    """Who takes part in the published code: everybody seen by t_{k+1}.

    The version-k graph has the visible edges, those of the past and the support of the holdout
    from t_k to t_{k+1}; labels of users and edges come from the holdout's targets alone
    (``trainer.split``). Items need at least 10 ratings, among the visible edges in training and
    among all edges until t_{k+1} in validation and test.
    """

    timeline: Timeline

    def users(self, k: int) -> int:
        """Return how many users are known at t_{k+1}."""
        return self.timeline.users(k + 1)

    def labelling(self, k: int) -> Numbers:
        """Return the targets."""
        return self._targets(k)

    def training_items(self, version: int) -> Rated:
        """Return the much-rated items of the visible edges."""
        return self._rated(self._visible(version))

    def validation_items(self, version: int) -> Rated:
        """Return the much-rated items at t_{version+1}."""
        return self.test_items(version)

    def test_items(self, k: int) -> Rated:
        """Return the much-rated items at t_{k+1}."""
        return self._rated(self.timeline.past(k + 1))

    def training_edges(self, version: int) -> Numbers:
        """Return the visible edges."""
        return self._visible(version)

    def later_edges(self, k: int) -> Numbers:
        """Return the targets."""
        return self._targets(k)

    def _rated(self, edges: Numbers) -> Rated:
        edges = _with_rating(self.timeline.dataset, edges)
        counts = _ratings_of_each(self.timeline.dataset, edges)
        return Rated(np.flatnonzero(counts >= AT_LEAST_RATINGS), edges)

    def _visible(self, k: int) -> Numbers:
        return np.setdiff1d(self.timeline.past(k + 1), self._targets(k), assume_unique=True)

    def _targets(self, k: int) -> Numbers:
        look = holdout(self.timeline.dataset, self.timeline.edges(k), self.timeline.edges(k + 1))
        if look is None:
            return np.array([], dtype=np.int64)
        interval, data = self.timeline.interval(k), self.timeline.dataset
        # A pair occurs once in a data set, so it tells which edge it is.
        wide = len(data.item_ids)
        pairs = data.users[interval] * wide + data.items[interval]
        return interval[np.isin(pairs, look.targets.users * wide + look.targets.items)]


_POPULATIONS: Mapping[Protocol, type[Populations]] = {
    Protocol.STRICT: StrictPopulations,
    Protocol.PAPER: PaperPopulations,
}


class Task(Interface):
    """An unintended task. ``tested_after`` and ``validated_after`` count from the version j.

    ``validation`` is on the graph of version j + ``validated_after``, ``test`` on that of version
    k ≥ j + ``tested_after``.
    """

    @property
    def name(self) -> str:
        """What results call it."""

    @property
    def tested_after(self) -> int:
        """How many versions after its own the task is tested first."""

    @property
    def validated_after(self) -> int:
        """How many versions after its own the task is validated."""

    def training(self, timeline: Timeline, version: int) -> Examples:
        """Return what consumers of ``version`` are trained on."""

    def validation(self, timeline: Timeline, version: int) -> Examples:
        """Return what their best epoch is chosen on."""

    def test(self, timeline: Timeline, version: int, k: int) -> Examples:
        """Return what they are tested on while version k is live."""


@dataclass(frozen=True)
class UserTask:
    """Whether a user does something in the next interval.

    Attributes:
        does: of ratings, float32 (m,) with NaN for none, says which interactions count, bool (m,).
    """

    name: str
    does: Callable[[NDArray[np.float32]], Flags]
    tested_after: int = 2
    validated_after: int = 1

    def training(self, timeline: Timeline, version: int) -> Examples:
        """Return the users at t_version and what they do until t_{version+1}."""
        return self._examples(timeline, version)

    def validation(self, timeline: Timeline, version: int) -> Examples:
        """Return the users at t_{version+1} and what they do until t_{version+2}."""
        return self._examples(timeline, version + self.validated_after)

    def test(self, timeline: Timeline, version: int, k: int) -> Examples:
        """Return the users at t_k and what they do until t_{k+1}."""
        return self._examples(timeline, k)

    def _examples(self, timeline: Timeline, k: int) -> Examples:
        data, edges = timeline.dataset, timeline.populations.labelling(k)
        users = np.arange(timeline.populations.users(k))
        doers = data.users[edges[self.does(data.ratings[edges])]]
        return Examples(users, None, np.isin(users, doers))


@dataclass(frozen=True)
class ItemTask:
    """Whether a statistic of an item's ratings reaches a threshold.

    Attributes:
        statistic: of the ratings of ``Rated`` items, float64 (n,).
        threshold: of the statistics in training; it stays the same afterwards.
    """

    name: str
    statistic: Callable[[Dataset, Rated], NDArray[np.float64]]
    threshold: Callable[[NDArray[np.float64]], float]
    tested_after: int = 1
    validated_after: int = 0

    def training(self, timeline: Timeline, version: int) -> Examples:
        """Return the much-rated items at t_version."""
        return self._examples(timeline, version, timeline.populations.training_items(version))

    def validation(self, timeline: Timeline, version: int) -> Examples:
        """Return much-rated items of the version's graph, with the ratings until t_{version+1}."""
        return self._examples(timeline, version, timeline.populations.validation_items(version))

    def test(self, timeline: Timeline, version: int, k: int) -> Examples:
        """Return much-rated items of the version-k graph, with the ratings until t_{k+1}."""
        return self._examples(timeline, version, timeline.populations.test_items(k))

    def _examples(self, timeline: Timeline, version: int, rated: Rated) -> Examples:
        at_first = timeline.populations.training_items(version)
        threshold = self.threshold(self.statistic(timeline.dataset, at_first))
        labels = self.statistic(timeline.dataset, rated) >= threshold
        return Examples(None, rated.items, labels)


@dataclass(frozen=True)
class EdgeTask:
    """Whether a rating is good."""

    name: str
    tested_after: int = 1
    validated_after: int = 0

    def training(self, timeline: Timeline, version: int) -> Examples:
        """Return the rated edges of the version's graph."""
        return self._examples(timeline, timeline.populations.training_edges(version))

    def validation(self, timeline: Timeline, version: int) -> Examples:
        """Return the rated edges between t_version and t_{version+1}."""
        return self._examples(timeline, timeline.populations.later_edges(version))

    def test(self, timeline: Timeline, version: int, k: int) -> Examples:
        """Return the rated edges between t_k and t_{k+1}."""
        return self._examples(timeline, timeline.populations.later_edges(k))

    def _examples(self, timeline: Timeline, edges: Numbers) -> Examples:
        data, edges = timeline.dataset, _with_rating(timeline.dataset, edges)
        return Examples(data.users[edges], data.items[edges], data.ratings[edges] >= GOOD_RATING)


def mean_rating(dataset: Dataset, rated: Rated) -> NDArray[np.float64]:
    """Return the mean rating of each item, (n,)."""
    counts, sums = _counts_and_sums(dataset, rated.edges, dataset.ratings[rated.edges])
    return sums[rated.items] / counts[rated.items]


def rating_deviation(dataset: Dataset, rated: Rated) -> NDArray[np.float64]:
    """Return the sample standard deviation (n - 1 below) of each item's ratings, (n,)."""
    counts, sums = _counts_and_sums(dataset, rated.edges, dataset.ratings[rated.edges])
    means = sums / np.maximum(counts, 1)
    residuals = dataset.ratings[rated.edges] - means[dataset.items[rated.edges]]
    _, squares = _counts_and_sums(dataset, rated.edges, residuals**2)
    deviations: NDArray[np.float64] = np.sqrt(squares[rated.items] / (counts[rated.items] - 1))
    return deviations


def _counts_and_sums(
    dataset: Dataset, edges: Numbers, values: NDArray[np.floating]
) -> tuple[Numbers, NDArray[np.float64]]:
    items, size = dataset.items[edges], len(dataset.item_ids)
    sums = np.bincount(items, values.astype(np.float64), minlength=size)
    return _ratings_of_each(dataset, edges), sums.astype(np.float64)


def _ratings_of_each(dataset: Dataset, edges: Numbers) -> Numbers:
    counts = np.bincount(dataset.items[edges], minlength=len(dataset.item_ids))
    return counts.astype(np.int64)


def _with_rating(dataset: Dataset, edges: Numbers) -> Numbers:
    return edges[~np.isnan(dataset.ratings[edges])]


def _anything(ratings: NDArray[np.float32]) -> Flags:
    return np.ones(len(ratings), dtype=np.bool_)


def _something_good(ratings: NDArray[np.float32]) -> Flags:
    return ratings >= GOOD_RATING  # NaN is not


def _median(values: NDArray[np.float64]) -> float:
    return float(np.median(values)) if len(values) else math.nan


def _split_opinion(_values: NDArray[np.float64]) -> float:
    return SPLIT_OPINION


USER_ACTIVITY = UserTask("user-activity", does=_anything)
USER_POSITIVE_ACTIVITY = UserTask("user-positive-activity", does=_something_good)
ITEM_RATING_AVG = ItemTask("item-rating-avg", statistic=mean_rating, threshold=_median)
ITEM_RATING_STD = ItemTask("item-rating-std", statistic=rating_deviation, threshold=_split_opinion)
EDGE_RATING = EdgeTask("edge-rating")

TASKS: tuple[Task, ...] = (
    USER_ACTIVITY,
    USER_POSITIVE_ACTIVITY,
    ITEM_RATING_AVG,
    ITEM_RATING_STD,
    EDGE_RATING,
)
