"""The diff says what a naive loop over all vectors says."""

import math
import tracemalloc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from backcast.diff import MOST_CHANGED, NAMED, Comparison, Diff, Route
from backcast.stores import Gathered, Rounding
from backcast.transforms import AffineMap, behaviour
from backcast.vectors import VectorBatch
from backcast.versions import Entity
from tests.support import normal

ITEM, USER = Entity.ITEM, Entity.USER
Rows = dict[str, NDArray[np.float32]]


class Held:
    """A stored snapshot in memory."""

    def __init__(self, rows: Mapping[Entity, Rows], dim: int) -> None:
        self.rows, self.dim, self.size = rows, dim, 0
        self.counts = {entity: len(found) for entity, found in rows.items()}
        self.rounding = Rounding()

    def gather(self, entity: Entity, ids: Sequence[str]) -> Gathered:
        known = self.rows.get(entity, {})
        found = np.array([id in known for id in ids], np.bool_)
        zero = np.zeros(self.dim, np.float32)
        vectors = np.array([known.get(id, zero) for id in ids], np.float32)
        return Gathered(vectors.reshape(len(ids), self.dim), found)


def batches(rows: Mapping[Entity, Rows], size: int = 7_000) -> Iterator[VectorBatch]:
    for entity, found in rows.items():
        ids = list(found)
        for start in range(0, len(ids), size):
            some = ids[start : start + size]
            yield VectorBatch(entity, some, np.stack([found[id] for id in some]))


def linear(rng: np.random.Generator, rows: int, cols: int, *, bias: bool = False) -> AffineMap:
    weight = rng.standard_normal((rows, cols)) / math.sqrt(cols)
    return AffineMap(weight, rng.standard_normal(rows) if bias else None)


def compare(
    live: Held, candidate: Iterable[VectorBatch], routes: Sequence[Route]
) -> tuple[Diff, Comparison]:
    comparison = Comparison(live, routes)
    for batch in candidate:
        comparison.take(batch)
    lost = {
        entity: comparison.without(entity, list(rows))[:NAMED] for entity, rows in live.rows.items()
    }
    return comparison.result(lost), comparison


def quantile(numbers: Sequence[float], q: float) -> float:
    return sorted(numbers)[max(0, math.ceil(q * len(numbers)) - 1)]


def check_spread(found: Any, numbers: Sequence[float]) -> None:
    assert found.mean == pytest.approx(math.fsum(numbers) / len(numbers), rel=1e-5)
    for q, value in ((0.5, found.p50), (0.95, found.p95), (0.99, found.p99)):
        assert value == pytest.approx(quantile(numbers, q), rel=0.006)
    assert found.max == pytest.approx(max(numbers), rel=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_figures_are_those_of_a_naive_loop(bias: bool) -> None:
    rng = np.random.default_rng(3)
    live: dict[Entity, Rows] = {
        ITEM: {f"i{n}": normal(rng, 5) for n in range(9_500)},
        USER: {f"u{n}": normal(rng, 5) for n in range(300)},
    }
    candidate: dict[Entity, Rows] = {
        ITEM: {f"i{n}": normal(rng, 6) for n in range(40, 9_530)},
        USER: {f"u{n}": normal(rng, 6) for n in range(300)},
    }
    to_parent, older = linear(rng, 5, 6, bias=bias), linear(rng, 3, 5, bias=bias)
    routes = [Route(1, None, to_parent), Route(0, older, older.after(to_parent))]
    diff, _ = compare(Held(live, 5), batches(candidate), routes)

    items = diff.ids[ITEM]
    assert (items.before, items.after, items.compared) == (9_500, 9_490, 9_460)
    assert (items.gained, items.lost) == (30, 40)
    assert list(items.gained_ids) == [f"i{n}" for n in range(9_500, 9_520)]
    assert list(items.lost_ids) == [f"i{n}" for n in range(20)]
    assert items.coverage == pytest.approx(9_460 / 9_500)
    assert diff.ids[USER].coverage == 1

    assert [target.version for target in diff.targets] == [1, 0]
    for target, route in zip(diff.targets, routes, strict=True):
        for entity in (ITEM, USER):
            absolute, relative, cosines, ids = [], [], [], []
            for id, z in candidate[entity].items():
                if id not in live[entity]:
                    continue
                before = live[entity][id].astype(float)
                before = before if route.before is None else route.before(before)
                assert route.after is not None
                after = route.after(z.astype(float))
                absolute.append(float(np.linalg.norm(after - before)))
                relative.append(absolute[-1] / float(np.linalg.norm(before)))
                cosines.append(
                    float(after @ before / np.linalg.norm(after) / np.linalg.norm(before))
                )
                ids.append(id)
            change = target.entities[entity]
            assert change.compared == len(ids)
            assert (change.without_length, change.not_finite) == (0, 0)
            check_spread(change.absolute, absolute)
            check_spread(change.relative, relative)
            assert change.cosine is not None
            assert change.cosine.mean == pytest.approx(np.mean(cosines), abs=1e-6)
            assert change.cosine.min == pytest.approx(min(cosines), abs=1e-6)
            turned = sorted(1 - cosine for cosine in cosines)
            assert 1 - change.cosine.p05 == pytest.approx(quantile(turned, 0.95), rel=0.006)
            order = sorted(range(len(ids)), key=lambda at: -relative[at])[:MOST_CHANGED]
            assert [mover.id for mover in change.most_changed] == [ids[at] for at in order]
            for mover, at in zip(change.most_changed, order, strict=True):
                figures = (mover.absolute, mover.relative, mover.cosine)
                exact = (absolute[at], relative[at], cosines[at])
                assert figures == pytest.approx(exact, rel=1e-4, abs=1e-6)


def test_distances_come_in_the_order_of_the_ids_and_are_nan_for_new_ones() -> None:
    rng = np.random.default_rng(0)
    live = Held({ITEM: {"a": normal(rng, 3), "c": normal(rng, 3)}}, 3)
    comparison = Comparison(live, [Route(0, None, None)])
    batch = VectorBatch(ITEM, ["a", "b", "c"], normal(rng, 3, 3))
    moved = comparison.take(batch)
    assert moved.found.tolist() == [True, False, True]
    exact = np.linalg.norm(
        batch.vectors[[0, 2]].astype(float) - [live.rows[ITEM]["a"], live.rows[ITEM]["c"]], axis=1
    )
    assert moved.distances[[0, 2], 0] == pytest.approx(exact, rel=1e-6)
    assert np.isnan(moved.distances[1, 0])


def test_nothing_changes_where_nothing_changes() -> None:
    rng = np.random.default_rng(1)
    rows: dict[Entity, Rows] = {ITEM: {f"{n}": normal(rng, 9) for n in range(5_000)}}
    older = linear(rng, 4, 9, bias=True)
    diff, _ = compare(Held(rows, 9), batches(rows, 5_000), [Route(0, older, older)])
    change = diff.targets[0].entities[ITEM]
    assert change.absolute is not None
    assert change.cosine is not None
    assert (change.absolute.max, change.absolute.p99) == (0, 0)
    assert change.cosine.min == 1
    assert change.most_changed == ()


def test_a_vector_without_length_has_no_relative_change_and_no_cosine() -> None:
    zero, one = np.zeros(2, np.float32), np.array([3, 4], np.float32)
    live: dict[Entity, Rows] = {ITEM: {"from 0": zero, "to 0": one, "stays": one}}
    after: dict[Entity, Rows] = {ITEM: {"from 0": one, "to 0": zero, "stays": one}}
    diff, _ = compare(Held(live, 2), batches(after), [Route(0, None, None)])
    change = diff.targets[0].entities[ITEM]
    assert change.absolute is not None
    assert change.relative is not None
    assert change.without_length == 2
    assert change.absolute.max == 5
    assert change.absolute.mean == pytest.approx(10 / 3)
    assert (change.relative.max, change.relative.mean) == (1, 0.5)
    assert change.cosine is not None
    assert change.cosine.min == 1
    assert [mover.id for mover in change.most_changed] == ["to 0"]


def test_products_that_overflow_are_counted_and_left_out() -> None:
    live: dict[Entity, Rows] = {ITEM: {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}}
    after: dict[Entity, Rows] = {
        ITEM: {"a": np.array([3e38, 3e38], np.float32), "b": np.ones(2, np.float32)}
    }
    double = AffineMap(2 * np.eye(2))
    diff, _ = compare(Held(live, 2), batches(after), [Route(0, None, double)])
    change = diff.targets[0].entities[ITEM]
    assert (change.compared, change.not_finite) == (2, 1)
    assert change.relative is not None
    assert change.relative.max == pytest.approx(1)


@pytest.mark.parametrize(
    ("weight", "gain", "condition"),
    [
        (np.diag([3.0, 1.5]), 3, 2),
        (np.array([[3.0, 0, 0], [0, 0.5, 0]]), 3, 6),
        (np.diag([2.0, 0]), 2, None),
        (np.zeros((2, 2)), 0, None),
    ],
)
def test_gain_and_condition(weight: Any, gain: float, condition: float | None) -> None:
    found = behaviour(weight)
    assert found[0] == pytest.approx(gain)
    assert found[1] == (None if condition is None else pytest.approx(condition))


def test_kinds_that_only_one_side_has_are_counted() -> None:
    live: dict[Entity, Rows] = {USER: {"u": np.ones(2, np.float32)}}
    after: dict[Entity, Rows] = {ITEM: {"i": np.ones(2, np.float32)}}
    diff, _ = compare(Held(live, 2), batches(after), [Route(0, None, None)])
    assert (diff.ids[USER].before, diff.ids[USER].lost, diff.ids[USER].coverage) == (1, 1, 0)
    assert (diff.ids[ITEM].gained, diff.ids[ITEM].lost, diff.ids[ITEM].coverage) == (1, 0, 1)
    assert diff.targets[0].entities[ITEM].relative is None


def test_batches_are_taken_one_by_one_and_leave_eight_bytes_an_id() -> None:
    class Echo(Held):
        """Holds whatever it is asked for, so that nothing grows but the comparison."""

        def gather(self, _entity: Entity, ids: Sequence[str]) -> Gathered:
            return Gathered(np.ones((len(ids), 8), np.float32), np.ones(len(ids), np.bool_))

    def stream() -> Iterator[VectorBatch]:
        for start in range(0, 400_000, 4_000):
            ids = [f"{n}" for n in range(start, start + 4_000)]
            yield VectorBatch(ITEM, ids, np.full((4_000, 8), 2, np.float32))

    comparison = Comparison(Echo({ITEM: {}}, 8), [Route(0, None, None)])
    comparison.take(VectorBatch(ITEM, ["first"], np.ones((1, 8), np.float32)))
    tracemalloc.start()
    for batch in stream():
        comparison.take(batch)
    grown, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 8 * 400_000 + 500_000  # and the last batch
    assert peak < grown + 3_000_000
