"""The task "item rating avg" against loops, and consumers that learn."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from backcast.errors import DataError
from tests.trainer_support import dataset_of
from trainer.consumers import Consumer, ConsumerConfig, RatedItems, rated_items
from trainer.data.dataset import Dataset

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ConsumerConfig(hidden=16, epochs=60, learning_rate=0.01, seeds=(0, 1))


def rated(*ratings: tuple[str, float, int]) -> Dataset:
    """Make a data set of (item, rating, timestamp), each by a user of its own."""
    return dataset_of(
        [(f"u{n}", item, t) for n, (item, _, t) in enumerate(ratings)],
        ratings=[rating for _, rating, _ in ratings],
    )


def test_more_than_ten_ratings_are_needed() -> None:
    dataset = rated(*[("ten", 3.0, 1)] * 10, *[("eleven", float(n % 3), 1) for n in range(11)])
    found = rated_items(dataset, known_by=1, rated_until=1)
    assert dataset.item_ids[found.items].tolist() == ["eleven"]
    assert found.means.tolist() == [sum(n % 3 for n in range(11)) / 11]


def test_edges_without_a_rating_do_not_count() -> None:
    dataset = rated(
        *[("x", math.nan, 1)] * 5, *[("x", 4.0, 1)] * 11, *[("y", 1.0, 1)] * 10, ("y", math.nan, 1)
    )
    found = rated_items(dataset, known_by=1, rated_until=1)
    assert dataset.item_ids[found.items].tolist() == ["x"]
    assert found.means.tolist() == [4.0]


def test_who_takes_part_and_what_the_label_says_are_of_two_moments() -> None:
    dataset = rated(
        *[("x", 1.0, 1)] * 11,
        *[("y", 1.0, 1)] * 10,
        *[("x", 3.0, 2)] * 11,
        ("y", 1.0, 2),
        ("x", 5.0, 3),
    )
    found = rated_items(dataset, known_by=1, rated_until=2)
    assert dataset.item_ids[found.items].tolist() == ["x"]
    assert found.means.tolist() == [2.0]
    later = rated_items(dataset, known_by=2, rated_until=2)
    assert dataset.item_ids[later.items].tolist() == ["x", "y"]


def test_items_are_those_of_a_loop(dataset: Dataset) -> None:
    known_by, rated_until = (int(np.quantile(dataset.timestamps, q)) for q in (0.5, 0.7))
    expected = {}
    for item in range(len(dataset.item_ids)):
        own = dataset.items == item
        if (own & (dataset.timestamps <= known_by)).sum() > 10:
            ratings = dataset.ratings[own & (dataset.timestamps <= rated_until)]
            expected[item] = sum(map(float, ratings)) / len(ratings)
    found = rated_items(dataset, known_by=known_by, rated_until=rated_until)
    assert 10 < len(expected) < len(dataset.item_ids)
    assert found.items.tolist() == list(expected)
    np.testing.assert_allclose(found.means, list(expected.values()), rtol=1e-12)


def test_no_item_with_enough_ratings_is_refused() -> None:
    with pytest.raises(DataError, match="no item has more than 10 ratings"):
        rated_items(rated(*[("x", 3.0, 1)] * 10), known_by=1, rated_until=1)


def test_the_threshold_itself_is_good_enough() -> None:
    found = RatedItems(np.array([3, 5, 7]), np.array([2.9, 3.0, 3.1]))
    assert found.labels(3.0).tolist() == [False, True, True]


def naive_auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the share of pairs in order, ties as halves."""
    positives = [s for s, label in zip(scores, labels, strict=True) if label]
    negatives = [s for s, label in zip(scores, labels, strict=True) if not label]
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives]
    return sum(wins) / len(wins)


def scoring_by(*weights: float) -> Consumer:
    """Make a consumer whose models give a row the score w·x, one model for each w."""
    consumer = Consumer(
        np.zeros((2, 1), dtype=np.float32), np.array([True, False]), ConsumerConfig(epochs=1)
    )
    models = []
    for weight in weights:
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, weight)
        models.append(model)
    consumer._models = list(models)
    return consumer


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=12).filter(
        lambda rows: len({label for _, label in rows}) == 2
    )
)
def test_roc_auc_is_that_of_counted_pairs(rows: Sequence[tuple[int, bool]]) -> None:
    vectors = np.array([[score] for score, _ in rows], dtype=np.float32)
    labels = [label for _, label in rows]
    expected = [naive_auc([w * score for score, _ in rows], labels) for w in (1.0, -2.0)]
    found = scoring_by(1.0, -2.0)
    assert found.roc_aucs(vectors, np.array(labels)) == pytest.approx(expected, rel=1e-6)
    assert found.roc_auc(vectors, np.array(labels)) == pytest.approx(sum(expected) / 2, rel=1e-6)


def test_large_scores_do_not_tie() -> None:
    vectors = np.array([[20.0], [25.0], [30.0]], dtype=np.float32)
    assert scoring_by(1.0).roc_auc(vectors, np.array([False, True, True])) == 1.0


def blobs(seed: int, count: int = 200) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return vectors (n, 4) whose label is whether the first two coordinates agree in sign."""
    vectors = np.random.default_rng(seed).standard_normal((count, 4), dtype=np.float32)
    return vectors, vectors[:, 0] * vectors[:, 1] > 0


def test_a_consumer_learns_what_no_linear_model_could() -> None:
    consumer = Consumer(*blobs(0, 400), FAST)
    assert min(consumer.roc_aucs(*blobs(1))) > 0.9
    shuffled = np.random.default_rng(2).standard_normal((200, 4), dtype=np.float32)
    assert abs(consumer.roc_auc(shuffled, blobs(1)[1]) - 0.5) < 0.1


def test_the_same_seed_gives_the_same_consumer() -> None:
    aucs = []
    for seeds, noise in (((0, 1), 0), ((0, 1), 1), ((1, 0), 0), ((5, 6), 0)):
        torch.manual_seed(noise)  # what is drawn elsewhere must not matter
        config = ConsumerConfig(hidden=8, epochs=5, seeds=seeds)
        aucs.append(list(Consumer(*blobs(0), config).roc_aucs(*blobs(1))))
    first, same, turned, other = aucs
    assert first == same == turned[::-1]
    assert first[0] != first[1]
    assert first != other


def test_a_consumer_answers_alike_every_time() -> None:
    consumer = Consumer(*blobs(0), FAST)  # dropout and batch statistics are for training only
    vectors, labels = blobs(1)
    assert consumer.roc_aucs(vectors, labels) == consumer.roc_aucs(vectors, labels)
    order = np.argsort(vectors[:, 3])
    assert consumer.roc_aucs(vectors[order], labels[order]) == pytest.approx(
        consumer.roc_aucs(vectors, labels), rel=1e-6
    )


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(2024)
    before = torch.get_rng_state()
    Consumer(*blobs(0), FAST)
    assert torch.equal(torch.get_rng_state(), before)
