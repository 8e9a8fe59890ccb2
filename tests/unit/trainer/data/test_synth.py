"""The generated graph: its sizes, its determinism, and each claim made of it."""

from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from backcast.errors import InvalidInput
from trainer.data.synth import EPOCH, SynthConfig, synthesize

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Graph:
    """A generated graph in numbers; users by first appearance, items by their row."""

    config: SynthConfig
    edges: pa.Table
    catalogue: pa.Table
    users: Integers
    items: Integers
    ratings: Floats
    times: Integers
    brands: Integers


def codes(column: pa.ChunkedArray) -> Integers:
    indices = column.combine_chunks().dictionary_encode().indices
    return np.asarray(indices.to_numpy(), dtype=np.int64)


def generated(**settings: Any) -> Graph:
    config = SynthConfig(**settings)
    edges, catalogue = synthesize(config)
    rows = {item: row for row, item in enumerate(catalogue["item_id"].to_pylist())}
    return Graph(
        config,
        edges,
        catalogue,
        users=codes(edges["user_id"]),
        items=np.array([rows[item] for item in edges["item_id"].to_pylist()]),
        ratings=edges["rating"].to_numpy().astype(np.float64),
        times=edges["timestamp"].to_numpy(),
        brands=codes(catalogue["brand"]),
    )


@pytest.fixture(scope="module")
def graph() -> Graph:
    return generated()


def test_sizes_and_schema(graph: Graph) -> None:
    assert (graph.edges.num_rows, graph.catalogue.num_rows) == (40_000, 1000)
    assert len(np.unique(graph.users)) == 2000
    assert len(set(graph.catalogue["item_id"].to_pylist())) == 1000
    assert graph.edges.schema.equals(
        pa.schema(
            [
                ("user_id", pa.string()),
                ("item_id", pa.string()),
                ("rating", pa.float32()),
                ("timestamp", pa.int64()),
            ]
        )
    )
    assert graph.catalogue.schema.equals(
        pa.schema(
            [
                ("item_id", pa.string()),
                ("brand", pa.string()),
                ("categories", pa.list_(pa.string())),
            ]
        )
    )


def test_ids_are_padded(graph: Graph) -> None:
    assert sorted(set(graph.edges["user_id"].to_pylist()))[:2] == ["u00000", "u00001"]
    assert sorted(graph.catalogue["item_id"].to_pylist())[-1] == "i0999"


def test_a_pair_occurs_once(graph: Graph) -> None:
    assert len(np.unique(graph.users * 1000 + graph.items)) == 40_000


def test_times_ascend_and_fill_the_days(graph: Graph) -> None:
    assert (np.diff(graph.times) >= 0).all()
    days = (graph.times - EPOCH) / 86_400
    assert 0 <= days[0] < 1
    assert 1999 < days[-1] < 2000
    # The seventh tenth of the edges ends near the seventh tenth of the time.
    assert 0.6 * 2000 < days[28_000] < 0.8 * 2000


def test_equal_seeds_give_equal_data() -> None:
    small = {"users": 100, "items": 60, "interactions": 900}
    first, second = synthesize(SynthConfig(**small)), synthesize(SynthConfig(**small))
    other = synthesize(SynthConfig(**small, seed=1))
    assert first[0].equals(second[0])
    assert first[1].equals(second[1])
    assert not first[0].equals(other[0])
    assert not first[1].equals(other[1])


def test_many_users_and_items_of_the_last_edges_are_new(graph: Graph) -> None:
    early, late = slice(0, 28_000), slice(28_000, None)
    new_users = np.setdiff1d(graph.users[late], graph.users[early])
    new_items = np.setdiff1d(graph.items[late], graph.items[early])
    assert 0.2 < len(new_users) / len(np.unique(graph.users[late])) < 0.5
    assert 0.1 < len(new_items) / len(np.unique(graph.items[late])) < 0.4


def tail_exponent(sizes: Integers) -> float:
    """Hill's estimate from the largest tenth: near a for a tail x**-a, large for a thin tail."""
    largest = np.sort(sizes)[::-1][: len(sizes) // 10 + 1]
    return float(1 / np.mean(np.log(largest[:-1] / largest[-1])))


def test_activity_and_popularity_have_heavy_tails(graph: Graph) -> None:
    for numbers in (graph.users, graph.items):
        sizes = np.bincount(numbers)
        assert sizes.max() > 10 * np.median(sizes)
        assert np.sort(sizes)[::-1][: len(sizes) // 10].sum() > 0.28 * sizes.sum()
        assert 1.2 < tail_exponent(sizes) < 3
    even = np.bincount(np.random.default_rng(0).integers(2000, size=40_000))
    assert tail_exponent(even) > 5


def test_attribute_values_are_mostly_on_five_items(graph: Graph) -> None:
    categories = graph.catalogue["categories"].combine_chunks()
    sizes = np.bincount(graph.brands), np.bincount(codes(pa.chunked_array([categories.flatten()])))
    assert [len(size) for size in sizes] == [40, 25]
    assert all((size >= 5).mean() >= 0.9 for size in sizes)
    assert all(size.max() > 3 * np.median(size) for size in sizes[:1])
    lists = categories.to_pylist()
    assert {len(values) for values in lists} == {1, 2, 3}
    assert all(len(set(values)) == len(values) for values in lists)


def brand_shares(graph: Graph, edges: Integers) -> Floats:
    shares = np.bincount(graph.brands[graph.items[edges]], minlength=40) / len(edges)
    return np.asarray(shares, dtype=np.float64)


def heavy_users(graph: Graph) -> list[Integers]:
    """The edges of each user with at least 60."""
    sizes = np.bincount(graph.users)
    return [np.flatnonzero(graph.users == user) for user in np.flatnonzero(sizes >= 60)]


def test_brands_match_tastes(graph: Graph) -> None:
    """Two picks of one user are of one brand far more often than two picks of anyone."""
    same = np.mean([(brand_shares(graph, edges) ** 2).sum() for edges in heavy_users(graph)])
    anyone = (brand_shares(graph, np.arange(40_000)) ** 2).sum()
    assert same > 1.6 * anyone


def constancy(graph: Graph) -> float:
    """How alike the brands of a user's first and second half of picks are, beyond anyone's."""
    usual = brand_shares(graph, np.arange(40_000))
    cosines = []
    for edges in heavy_users(graph):
        half = len(edges) // 2
        first, second = (brand_shares(graph, e) - usual for e in (edges[:half], edges[half:]))
        cosines.append(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
    return float(np.mean(cosines))


def test_tastes_drift() -> None:
    still, moving = constancy(generated(drift=0.0)), constancy(generated(drift=1.0))
    assert still > 0.4
    assert moving < still - 0.2


def test_ratings_are_one_to_five(graph: Graph) -> None:
    shares = np.bincount(graph.ratings.astype(int), minlength=6) / 40_000
    assert (graph.ratings == graph.ratings.astype(int)).all()
    assert shares[0] == 0
    assert (shares[1:] > 0.01).all()
    assert 3.3 < graph.ratings.mean() < 4.1


def auc(scores: Floats, labels: NDArray[np.bool_]) -> float:
    ranks = np.argsort(np.argsort(scores)) + 1
    ones, zeros = labels.sum(), (~labels).sum()
    return float((ranks[labels].sum() - ones * (ones + 1) / 2) / (ones * zeros))


def held_out_scores(features: Floats, labels: NDArray[np.bool_]) -> Floats:
    """Scores of a ridge regression, each from a fit on the other four fifths."""
    fold = np.arange(len(labels)) % 5
    inputs = np.hstack([features, np.ones((len(labels), 1))])
    scores = np.zeros(len(labels))
    for number in range(5):
        x, y = inputs[fold != number], labels[fold != number] - 0.5
        weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ y)
        scores[fold == number] = inputs[fold == number] @ weights
    return scores


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_quality_of_an_unseen_item_can_be_learned_from_attributes(seed: int) -> None:
    graph = generated(seed=seed)
    sizes = np.bincount(graph.items, minlength=1000)
    rated = np.flatnonzero(sizes > 10)
    means = np.bincount(graph.items, graph.ratings, minlength=1000)[rated] / sizes[rated]
    lists = graph.catalogue["categories"].combine_chunks()
    hot = np.zeros((1000, 40 + 25))
    hot[np.arange(1000), graph.brands] = 1
    owners = lists.flatten(), lists.value_parent_indices()
    hot[owners[1].to_numpy(), 40 + codes(pa.chunked_array([owners[0]]))] = 1
    labels = means >= np.median(means)
    assert 0.72 < auc(held_out_scores(hot[rated], labels), labels) < 0.92


def test_an_item_keeps_its_quality(graph: Graph) -> None:
    """Mean ratings in even and odd edges agree; in ratings shuffled between edges they do not."""

    often = np.flatnonzero(np.bincount(graph.items, minlength=1000) >= 30)

    def agreement(ratings: Floats) -> float:
        halves = []
        for part in (slice(0, None, 2), slice(1, None, 2)):
            sums = np.bincount(graph.items[part], ratings[part], minlength=1000)
            halves.append(sums[often] / np.bincount(graph.items[part], minlength=1000)[often])
        return float(np.corrcoef(halves[0], halves[1])[0, 1])

    assert agreement(graph.ratings) > 0.8
    assert abs(agreement(np.random.default_rng(0).permutation(graph.ratings))) < 0.2


@pytest.mark.parametrize(
    ("users", "items", "interactions"), [(1, 2, 1), (3, 2, 3), (4, 3, 6), (30, 40, 600), (9, 9, 9)]
)
def test_small_and_dense_graphs(users: int, items: int, interactions: int) -> None:
    edges, catalogue = synthesize(SynthConfig(users, items, interactions, seed=5))
    assert (edges.num_rows, catalogue.num_rows) == (interactions, items)
    assert len(edges["user_id"].unique()) == users
    pairs = edges.group_by(["user_id", "item_id"]).aggregate([])
    assert pairs.num_rows == interactions
    assert set(edges["item_id"].to_pylist()) <= set(catalogue["item_id"].to_pylist())


def test_brands_and_categories_may_be_set() -> None:
    _, items = synthesize(SynthConfig(50, 100, 500, brands=7, categories=4))
    assert sorted(items["brand"].unique().to_pylist()) == [f"brand-{n}" for n in range(7)]
    assert {*chain(*items["categories"].to_pylist())} == {f"category-{n}" for n in range(4)}


def test_progress_is_reported_up_to_the_end() -> None:
    seen: list[int] = []
    synthesize(SynthConfig(100, 100, 3000), seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 3000


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"users": 0}, "users is 0; expected at least 1"),
        ({"items": -1}, "items is -1; expected at least 1"),
        ({"interactions": 0}, "interactions is 0; expected at least 1"),
        ({"days": 0}, "days is 0; expected at least 1"),
        ({"brands": 0}, "brands is 0; expected at least 1"),
        ({"categories": 0}, "categories is 0; expected at least 1"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
        ({"drift": 1.5}, "drift is 1.5; expected a number from 0 to 1"),
        ({"interactions": 1999}, r"is 1999; expected 2000 \(one per user\) to 1000000"),
        ({"users": 10, "items": 10, "interactions": 51}, r"to 50 \(half of all user–item pairs\)"),
    ],
)
def test_impossible_sizes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        SynthConfig(**settings)
