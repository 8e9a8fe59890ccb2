"""Who takes part in the unintended tasks, and the labels, against loops over the interactions."""

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backcast.errors import InvalidInput
from tests.trainer_support import dataset_of
from trainer.config import Protocol
from trainer.data.dataset import Dataset, resolve_until
from trainer.evaluation.results import USER_TASKS
from trainer.evaluation.tasks import (
    EDGE_RATING,
    ITEM_RATING_AVG,
    ITEM_RATING_STD,
    TASKS,
    USER_ACTIVITY,
    USER_POSITIVE_ACTIVITY,
    Examples,
    Task,
    Timeline,
)

protocols = pytest.mark.parametrize("protocol", list(Protocol))
Found = dict[Any, bool]
"""Labels by user, by item, or by (user, item)."""


def found(examples: Examples) -> Found:
    columns = [rows.tolist() for rows in (examples.users, examples.items) if rows is not None]
    keys = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
    assert len(set(keys)) == len(keys) == len(examples)
    return dict(zip(keys, examples.labels.tolist(), strict=True))


@dataclass(frozen=True)
class Edge:
    """One interaction; the moment is the first m with time ≤ t_m."""

    user: int
    item: int
    rating: float
    moment: int

    @property
    def rated(self) -> bool:
        return not math.isnan(self.rating)


class Naive:
    """The five tasks, edge by edge."""

    def __init__(self, timeline: Timeline) -> None:
        data = timeline.dataset
        self.paper = timeline.protocol is Protocol.PAPER
        self.edges = []
        for user, item, rating, time in zip(
            data.users.tolist(),
            data.items.tolist(),
            data.ratings.tolist(),
            data.timestamps.tolist(),
            strict=True,
        ):
            moment = next((m for m, t in enumerate(timeline.moments) if time <= t), 99)
            self.edges.append(Edge(user, item, rating, moment))

    def until(self, moment: int) -> list[Edge]:
        return [edge for edge in self.edges if edge.moment <= moment]

    def interval(self, k: int) -> list[Edge]:
        return [edge for edge in self.edges if edge.moment == k + 1]

    def targets(self, k: int) -> list[Edge]:
        known = {edge.user for edge in self.until(k)}
        of_user: dict[int, list[Edge]] = {}
        for edge in self.interval(k):
            of_user.setdefault(edge.user, []).append(edge)
        chosen = []
        for edge in self.interval(k):
            own = of_user[edge.user]
            if edge.user in known or (len(own) > 1 and edge is own[-1]):
                chosen.append(edge)
        return chosen

    def visible(self, k: int) -> list[Edge]:
        targets = {(edge.user, edge.item) for edge in self.targets(k)}
        return [edge for edge in self.until(k + 1) if (edge.user, edge.item) not in targets]

    def user_labels(self, k: int, *, positive: bool) -> Found:
        labelling = self.targets(k) if self.paper else self.interval(k)
        known = {edge.user for edge in self.until(k + 1 if self.paper else k)}
        counts = [edge for edge in labelling if not positive or (edge.rated and edge.rating >= 4)]
        doers = {edge.user for edge in counts}
        return {user: user in doers for user in known}

    def edge_labels(self, edges: Sequence[Edge]) -> Found:
        return {(edge.user, edge.item): edge.rating >= 4 for edge in edges if edge.rated}

    def training_edges(self, version: int) -> Found:
        return self.edge_labels(self.visible(version) if self.paper else self.until(version))

    def later_edges(self, k: int) -> Found:
        if self.paper:
            return self.edge_labels(self.targets(k))
        users = {edge.user for edge in self.until(k)}
        items = {edge.item for edge in self.until(k)}
        return self.edge_labels(
            [edge for edge in self.interval(k) if edge.user in users and edge.item in items]
        )

    def statistics(
        self, counted: Sequence[Edge], rated: Sequence[Edge], *, deviation: bool
    ) -> dict[int, float]:
        values = {}
        counts = Counter(edge.item for edge in counted if edge.rated)
        for item, count in counts.items():
            if count > 10 or (self.paper and count == 10):
                ratings = [edge.rating for edge in rated if edge.item == item and edge.rated]
                values[item] = statistics.stdev(ratings) if deviation else statistics.mean(ratings)
        return values

    def item_labels(self, version: int, values: dict[int, float], *, deviation: bool) -> Found:
        at_first = self.training_statistics(version, deviation=deviation)
        threshold = 1.0 if deviation else statistics.median(at_first.values())
        return {item: value >= threshold for item, value in values.items()}

    def training_statistics(self, version: int, *, deviation: bool) -> dict[int, float]:
        edges = self.visible(version) if self.paper else self.until(version)
        return self.statistics(edges, edges, deviation=deviation)

    def validation_statistics(self, version: int, *, deviation: bool) -> dict[int, float]:
        edges = self.until(version + 1)
        known = {edge.item for edge in self.until(version + self.paper)}
        values = self.statistics(edges, edges, deviation=deviation)
        return {item: value for item, value in values.items() if item in known}

    def test_statistics(self, k: int, *, deviation: bool) -> dict[int, float]:
        later = self.until(k + 1)
        return self.statistics(later if self.paper else self.until(k), later, deviation=deviation)


def timeline_of(dataset: Dataset, protocol: Protocol) -> Timeline:
    fractions = ("0.3", "0.5", "0.7", "0.85", "1")
    return Timeline(dataset, [resolve_until(dataset, f) for f in fractions], protocol)


@pytest.fixture(scope="module")
def partly_rated(dataset: Dataset) -> Dataset:
    """The generated data set; one interaction in seven has no rating."""
    ratings = dataset.ratings.copy()
    ratings[np.random.default_rng(3).random(len(ratings)) < 1 / 7] = np.nan
    return replace(dataset, ratings=ratings)


@protocols
@pytest.mark.parametrize("positive", [False, True])
def test_user_tasks_are_those_of_a_loop(
    partly_rated: Dataset, protocol: Protocol, positive: bool
) -> None:
    timeline = timeline_of(partly_rated, protocol)
    naive, task = Naive(timeline), USER_POSITIVE_ACTIVITY if positive else USER_ACTIVITY
    for version in (0, 1):
        assert found(task.training(timeline, version)) == naive.user_labels(
            version, positive=positive
        )
        assert found(task.validation(timeline, version)) == naive.user_labels(
            version + 1, positive=positive
        )
        assert task.validation(timeline, version).has_both_classes
    for k in (2, 3):
        assert found(task.test(timeline, 0, k)) == naive.user_labels(k, positive=positive)


@protocols
@pytest.mark.parametrize("deviation", [False, True])
def test_item_tasks_are_those_of_a_loop(
    partly_rated: Dataset, protocol: Protocol, deviation: bool
) -> None:
    timeline = timeline_of(partly_rated, protocol)
    naive, task = Naive(timeline), ITEM_RATING_STD if deviation else ITEM_RATING_AVG
    for version in (0, 2):
        training = naive.training_statistics(version, deviation=deviation)
        validation = naive.validation_statistics(version, deviation=deviation)
        assert 10 < len(training) < len(validation) < timeline.items(version)
        assert found(task.training(timeline, version)) == naive.item_labels(
            version, training, deviation=deviation
        )
        assert found(task.validation(timeline, version)) == naive.item_labels(
            version, validation, deviation=deviation
        )
        for k in (1, 3):
            assert found(task.test(timeline, version, k)) == naive.item_labels(
                version, naive.test_statistics(k, deviation=deviation), deviation=deviation
            )


@protocols
def test_edge_rating_is_that_of_a_loop(partly_rated: Dataset, protocol: Protocol) -> None:
    timeline = timeline_of(partly_rated, protocol)
    naive = Naive(timeline)
    for version in (0, 1):
        assert found(EDGE_RATING.training(timeline, version)) == naive.training_edges(version)
        assert found(EDGE_RATING.validation(timeline, version)) == naive.later_edges(version)
    for k in (1, 3):
        assert found(EDGE_RATING.test(timeline, 0, k)) == naive.later_edges(k)
        assert EDGE_RATING.test(timeline, 0, k).has_both_classes


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """A handful of users and items, and four moments that cut whatever they do."""
    pairs = draw(
        st.lists(
            st.tuples(st.sampled_from("abcde"), st.sampled_from("pqrst")),
            min_size=6,
            max_size=25,
            unique=True,
        )
    )
    count = len(pairs)
    times = sorted(draw(st.lists(st.integers(1, 8), min_size=count, max_size=count)))
    rating = st.sampled_from([1.0, 3.5, 4.0, 5.0, math.nan])
    ratings = draw(st.lists(rating, min_size=count, max_size=count))
    edges = [(user, item, time) for (user, item), time in zip(pairs, times, strict=True)]
    moments = draw(st.lists(st.integers(1, 9), min_size=4, max_size=4, unique=True).map(sorted))
    protocol = draw(st.sampled_from(list(Protocol)))
    return Timeline(dataset_of(edges, ratings=ratings), moments, protocol)


@given(timelines())
def test_small_histories_are_read_as_by_a_loop(timeline: Timeline) -> None:
    naive = Naive(timeline)
    for k in range(timeline.versions):
        for task, positive in ((USER_ACTIVITY, False), (USER_POSITIVE_ACTIVITY, True)):
            assert found(task.training(timeline, k)) == naive.user_labels(k, positive=positive)
            assert found(task.test(timeline, 0, k)) == naive.user_labels(k, positive=positive)
        assert found(EDGE_RATING.training(timeline, k)) == naive.training_edges(k)
        assert found(EDGE_RATING.validation(timeline, k)) == naive.later_edges(k)
        for about_items in (ITEM_RATING_AVG, ITEM_RATING_STD):
            assert len(about_items.training(timeline, k)) == 0
            assert len(about_items.test(timeline, 0, k)) == 0


@given(timelines())
def test_every_row_has_a_vector_on_the_graph_it_is_looked_up_in(timeline: Timeline) -> None:
    later = timeline.protocol is Protocol.PAPER  # its graphs know everybody seen until t_{k+1}
    for k in range(timeline.versions - 1):
        for task in TASKS:
            for examples, graph in (
                (task.training(timeline, k), k),
                (task.validation(timeline, k), k + task.validated_after),
                (task.test(timeline, 0, k), k),
            ):
                known = timeline.users(graph + later), timeline.items(graph + later)
                for rows, count in zip((examples.users, examples.items), known, strict=True):
                    assert rows is None or (rows < count).all()


def rated(*ratings: tuple[str, float, int]) -> Dataset:
    """Make a data set of (item, rating, timestamp), each by a user of its own."""
    return dataset_of(
        [(f"u{n}", item, t) for n, (item, _, t) in enumerate(ratings)],
        ratings=[rating for _, rating, _ in ratings],
    )


def strict(dataset: Dataset, *moments: int) -> Timeline:
    return Timeline(dataset, moments, Protocol.STRICT)


def names(dataset: Dataset, examples: Examples) -> list[str]:
    assert examples.items is not None
    return [str(name) for name in dataset.item_ids[examples.items]]


def test_more_than_ten_ratings_are_needed() -> None:
    dataset = rated(
        *[("ten", 3.0, 1)] * 10,
        *[("unrated", 3.0, 1)] * 10,
        *[("unrated", math.nan, 1)] * 5,
        *[("eleven", 3.0, 1)] * 11,
        ("x", 1.0, 2),
    )
    assert names(dataset, ITEM_RATING_AVG.training(strict(dataset, 1, 2), 0)) == ["eleven"]


def test_the_paper_is_content_with_ten_that_the_graph_shows() -> None:
    again = [("a", "hidden", 2), ("b", "x", 2)]
    dataset = dataset_of(
        [(f"u{n}", "ten", 1) for n in range(10)]
        + [(f"v{n}", "hidden", 1) for n in range(9)]
        + [("a", "ten", 1)]
        + again,
        ratings=[3.0] * 22,
    )
    timeline = Timeline(dataset, [1, 2], Protocol.PAPER)
    assert names(dataset, ITEM_RATING_AVG.training(timeline, 0)) == ["ten"]
    assert names(dataset, ITEM_RATING_AVG.validation(timeline, 0)) == ["ten", "hidden"]


def test_strict_validates_on_no_item_that_the_graph_does_not_know() -> None:
    dataset = rated(
        *[("old", 1.0, 1)] * 11,
        ("young", 4.0, 1),
        *[("new", 5.0, 2)] * 11,
        *[("young", 4.0, 2)] * 10,
    )
    timeline = strict(dataset, 1, 2, 3)
    assert found(ITEM_RATING_AVG.validation(timeline, 0)) == {0: True, 1: True}
    assert names(dataset, ITEM_RATING_AVG.test(timeline, 0, 1)) == ["old", "young", "new"]


def test_who_takes_part_and_what_the_label_says_are_of_two_moments() -> None:
    dataset = rated(
        *[("x", 1.0, 1)] * 11,
        *[("y", 1.0, 1)] * 10,
        *[("z", 2.0, 1)] * 11,
        *[("x", 3.0, 2)] * 11,
        ("y", 1.0, 2),
        ("z", 1.0, 2),
        *[("x", 1.0, 3)] * 23,
    )
    timeline = strict(dataset, 1, 2, 3)
    # The median at t_0 is that of 1 and 2.
    assert found(ITEM_RATING_AVG.training(timeline, 0)) == {0: False, 2: True}
    assert found(ITEM_RATING_AVG.test(timeline, 0, 0)) == {0: True, 2: True}
    assert found(ITEM_RATING_AVG.test(timeline, 0, 1)) == {0: False, 1: False, 2: True}
    assert found(ITEM_RATING_AVG.training(timeline, 1)) == {0: True, 1: False, 2: True}


def test_a_deviation_of_one_is_one_of_divided_opinion() -> None:
    # 11 ratings with a sum of squares of 10 about their mean: the sample deviation is exactly 1.
    divided = [1.0] * 5 + [2.0] + [3.0] * 5
    united = [1.0] * 4 + [2.0] * 3 + [3.0] * 4
    dataset = rated(
        *[("divided", rating, 1) for rating in divided],
        *[("united", rating, 1) for rating in united],
        ("x", 1.0, 2),
    )
    assert found(ITEM_RATING_STD.training(strict(dataset, 1, 2), 0)) == {0: True, 1: False}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@protocols
def test_nobody_there_gives_no_examples(task: Task, protocol: Protocol) -> None:
    dataset = dataset_of([("ann", "x", 2), ("bob", "y", 3)])
    timeline = Timeline(dataset, [1, 2, 3], protocol)
    for examples in (
        task.training(timeline, 0),
        task.validation(timeline, 0),
        task.test(timeline, 0, 1),
    ):
        assert not examples.has_both_classes


def test_versions_and_when_tasks_are_tested_first() -> None:
    dataset = dataset_of([("ann", "x", 1)])
    assert strict(dataset, 1, 2, 3, 4, 5, 6).versions == 5
    assert [task.name for task in TASKS] == [
        *USER_TASKS,
        "item-rating-avg",
        "item-rating-std",
        "edge-rating",
    ]
    assert [task.tested_after for task in TASKS] == [2, 2, 1, 1, 1]
    assert [task.validated_after for task in TASKS] == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("moments", [(), (1,), (1, 1), (2, 1), (1, 3, 2)])
def test_moments_that_are_no_history_are_refused(moments: Sequence[int]) -> None:
    with pytest.raises(InvalidInput, match="two or more, ascending"):
        strict(dataset_of([("ann", "x", 1)]), *moments)
