"""The fixed operators against dense matrices, and what they stand for against loops over nodes."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from tests.trainer_support import dataset_of, dense, dense_mean, edges_of, pairs_of, widened
from trainer import graph as graph_module
from trainer.data.dataset import Dataset
from trainer.features import ItemFeatures, Vocabulary
from trainer.graph import Graph, Operator, SparseMatrix, first_layer, mean_over_neighbours
from trainer.split import Edges

pytestmark = pytest.mark.usefixtures("one_thread")

USERS, ITEMS = 5, 4
edge_lists = st.lists(st.tuples(st.integers(0, USERS - 1), st.integers(0, ITEMS - 1)), max_size=20)
"""Edges in any order, some of them repeated, nodes without any."""


def dense_average(edges: Edges) -> Tensor:
    """Return the row-normalised adjacency, (9, 9) float64, repeated edges counted."""
    matrix = torch.zeros(USERS + ITEMS, USERS + ITEMS, dtype=torch.float64)
    for user, item in pairs_of(edges):
        matrix[user, USERS + item] += 1.0
        matrix[USERS + item, user] += 1.0
    return matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)


def mean(edges: Edges) -> Operator:
    """Return the mean over neighbours in float64."""
    return widened(mean_over_neighbours(edges, USERS, ITEMS))


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def vectors(seed: int) -> Tensor:
    return random(seed, USERS + ITEMS, 3)


class TestSparseMatrix:
    @given(
        st.integers(0, 5),
        st.integers(1, 5),
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(-3, 3)), max_size=15),
        st.integers(0, 2**31),
    )
    def test_products_are_those_of_the_dense_matrix(
        self, rows: int, columns: int, entries: Sequence[tuple[int, int, int]], seed: int
    ) -> None:
        inside = [entry for entry in entries if entry[0] < rows and entry[1] < columns]
        expected = torch.zeros(rows, columns, dtype=torch.float64)
        for row, column, value in inside:  # entries at the same place add up
            expected[row, column] += value
        matrix = matrix_of(inside, rows, columns)
        x = random(seed, columns, 3)
        torch.testing.assert_close(matrix.dense().double(), expected)
        torch.testing.assert_close(matrix @ x, expected @ x)
        torch.testing.assert_close(matrix @ x.float(), (expected @ x).float())
        torch.testing.assert_close(matrix.to(torch.device("cpu")) @ x, expected @ x)

    def test_an_array_of_any_strides_may_be_multiplied(self) -> None:
        matrix = matrix_of([(0, 0, 2), (1, 1, 3)], 2, 2)
        turned = random(0, 4, 2).T
        torch.testing.assert_close(matrix @ turned, torch.tensor([[2.0], [3.0]]).double() * turned)

    def test_the_csr_form_is_the_same_matrix(self) -> None:
        # What CUDA multiplies with, made without a device.
        matrix = matrix_of([(2, 1, 2), (0, 3, 1), (2, 0, -1), (2, 1, 5)], 3, 4)
        x = random(0, 4, 2).float()
        torch.testing.assert_close(matrix._csr() @ x, matrix.dense() @ x)


def matrix_of(entries: Sequence[tuple[int, int, int]], rows: int, columns: int) -> SparseMatrix:
    at = np.array(entries, dtype=np.int64).reshape(-1, 3)
    return SparseMatrix.of(at[:, 0], at[:, 1], at[:, 2].astype(np.float32), (rows, columns))


class TestOperator:
    @given(edge_lists, st.integers(0, 2**31))
    def test_gradient_is_that_of_the_dense_product(
        self, pairs: Sequence[tuple[int, int]], seed: int
    ) -> None:
        edges, x = edges_of(*pairs), vectors(seed).requires_grad_()
        upstream = vectors(seed + 1)
        (found,) = torch.autograd.grad(mean(edges)(x), x, upstream)
        (expected,) = torch.autograd.grad(dense_average(edges) @ x, x, upstream)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)

    def test_gradient_is_that_of_finite_differences(self) -> None:
        edges = edges_of((0, 0), (0, 1), (1, 1), (2, 1), (2, 3), (4, 3), (0, 1))
        assert gradcheck(mean(edges), (vectors(0).requires_grad_(),))

    def test_gradient_of_a_broadcast_sum(self) -> None:
        # sum() hands back one number, expanded: a gradient without strides
        edges, x = edges_of((0, 0), (0, 1), (1, 1)), vectors(0).requires_grad_()
        (found,) = torch.autograd.grad(mean(edges)(x).sum(), x)
        torch.testing.assert_close(found, dense_average(edges).sum(dim=0)[:, None].expand(-1, 3))

    @given(edge_lists)
    def test_the_transpose_is_that_of_the_matrix(self, pairs: Sequence[tuple[int, int]]) -> None:
        operator = mean_over_neighbours(edges_of(*pairs), USERS, ITEMS)
        assert torch.equal(dense(operator.transposed), dense(operator.matrix).T)

    def test_a_wide_operator_maps_one_size_to_the_other(self) -> None:
        operator = Operator.of(
            np.array([1, 0]), np.array([4, 2]), np.array([2.0, 3.0], dtype=np.float32), (2, 5)
        )
        x = random(0, 5, 3).float().requires_grad_()
        found = operator(x)
        torch.testing.assert_close(found, torch.stack([3 * x[2], 2 * x[4]]))
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert gradient.tolist() == [[0.0] * 3] * 2 + [[3.0] * 3, [0.0] * 3, [2.0] * 3]

    def test_a_small_operator_becomes_dense_and_a_large_one_does_not(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        operator = mean_over_neighbours(edges_of((0, 0), (0, 1), (1, 1)), USERS, ITEMS)
        entries = (USERS + ITEMS) ** 2
        monkeypatch.setattr(graph_module, "_DENSE_ENTRIES", entries - 1)
        assert operator.dense_if_small() is operator
        monkeypatch.setattr(graph_module, "_DENSE_ENTRIES", entries)
        small = operator.dense_if_small()
        assert isinstance(small.matrix, Tensor)
        assert isinstance(small.transposed, Tensor)
        assert torch.equal(small.matrix, dense(operator.matrix))
        assert torch.equal(small.transposed, dense(operator.matrix).T)
        assert small.dense_if_small() is small

    def test_both_forms_move_to_a_device(self) -> None:
        operator = mean_over_neighbours(edges_of((0, 0), (0, 1), (1, 1)), USERS, ITEMS)
        for form in (operator, operator.dense_if_small()):
            moved = form.to(torch.device("meta"))
            for matrix in (moved.matrix, moved.transposed):
                part = matrix if isinstance(matrix, Tensor) else matrix.values
                assert part.device.type == "meta"


class TestMean:
    @given(edge_lists, st.integers(0, 2**31))
    def test_is_that_of_a_loop(self, pairs: Sequence[tuple[int, int]], seed: int) -> None:
        edges, x = edges_of(*pairs), vectors(seed)
        # weights are float32 before they are widened: 1/3 is not exact
        torch.testing.assert_close(
            mean(edges)(x), dense_mean(edges, USERS, x), rtol=1e-6, atol=1e-7
        )

    def test_repeated_edges_count_as_often_as_they_are_there(self) -> None:
        x = vectors(0)
        averaged = mean(edges_of((0, 0), (0, 0), (0, 1)))(x)
        torch.testing.assert_close(averaged[0], (2 * x[USERS] + x[USERS + 1]) / 3)
        torch.testing.assert_close(averaged[USERS], x[0])

    def test_nodes_without_neighbours_get_zeros(self) -> None:
        x = vectors(0).float()
        averaged = mean_over_neighbours(edges_of((1, 2)), USERS, ITEMS)(x)
        assert averaged[1].tolist() == x[USERS + 2].tolist()
        assert averaged[USERS + 2].tolist() == x[1].tolist()
        others = [n for n in range(USERS + ITEMS) if n not in {1, USERS + 2}]
        assert averaged[others].abs().max() == 0

    def test_a_graph_without_edges(self) -> None:
        averaged = mean_over_neighbours(edges_of(), 2, 1)(torch.ones(3, 4))
        assert averaged.tolist() == [[0.0] * 4] * 3

    def test_the_order_of_the_edges_does_not_matter(self) -> None:
        one = mean_over_neighbours(edges_of((0, 1), (3, 0), (0, 0)), USERS, ITEMS)
        other = mean_over_neighbours(edges_of((0, 0), (0, 1), (3, 0)), USERS, ITEMS)
        x = vectors(0).float()
        assert torch.equal(one(x), other(x))
        assert torch.equal(dense(one.transposed), dense(other.transposed))


def naive_first_layer(edges: Edges, features: ItemFeatures) -> Tensor:
    """Return [A P | P | 1], with P the inputs of all nodes over the table, node by node."""
    inputs = torch.zeros(USERS + features.items, features.table_size + 1)
    inputs[:USERS, -1] = 1.0
    start = 0
    for name, (numbers, offsets) in features.bags.items():
        stops = [*offsets[1:].tolist(), len(numbers)]
        for item, (first, stop) in enumerate(zip(offsets.tolist(), stops, strict=True)):
            for number in numbers[first:stop].tolist():
                inputs[USERS + item, start + number] += 1.0 / (stop - first)
        start += features.sizes[name]
    ones = torch.ones(len(inputs), 1)
    return torch.cat([dense_mean(edges, USERS, inputs), inputs, ones], dim=1)


values = st.lists(st.sampled_from("pqrs"), unique=True, max_size=4)
"""Known are p, q, r and s of one attribute, q and s of the other."""


class TestFirstLayer:
    @given(edge_lists, st.lists(st.tuples(values, values), min_size=ITEMS, max_size=ITEMS))
    def test_is_that_of_a_loop(
        self,
        pairs: Sequence[tuple[int, int]],
        items: Sequence[tuple[Sequence[str], Sequence[str]]],
    ) -> None:
        dataset = dataset_of(
            [("ann", str(n), n) for n in range(ITEMS)],
            {
                name: {str(n): row[at] for n, row in enumerate(items)}
                for at, name in enumerate("ab")
            },
        )
        vocabulary = Vocabulary({"a": tuple("pqrs"), "b": ("q", "s")})
        features = vocabulary.encode(dataset, ITEMS)
        edges = edges_of(*pairs)
        found = first_layer(mean_over_neighbours(edges, USERS, ITEMS), features, USERS)
        torch.testing.assert_close(dense(found.matrix), naive_first_layer(edges, features))
        assert torch.equal(dense(found.transposed), dense(found.matrix).T)

    @pytest.mark.parametrize("known", [62, 63, 64, 65, 130])
    def test_tables_wider_than_a_block_are_put_together(self, known: int) -> None:
        # Columns are made 64 at a time, the users' own last.
        names = tuple(f"{n:03}" for n in range(known))
        brands = {str(n): names[n::ITEMS] for n in range(ITEMS)}
        dataset = dataset_of([("ann", str(n), n) for n in range(ITEMS)], {"brand": brands})
        features = Vocabulary({"brand": names}).encode(dataset, ITEMS)
        edges = edges_of((0, 0), (0, 1), (0, 2), (0, 3), (1, 3), (4, 1))
        operator = first_layer(mean_over_neighbours(edges, USERS, ITEMS), features, USERS)
        torch.testing.assert_close(dense(operator.matrix), naive_first_layer(edges, features))

    def test_both_forms_give_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        edges = edges_of((0, 0), (0, 1), (1, 1), (2, 1), (2, 3), (4, 3))
        made = {limit: limited_graph(monkeypatch, limit, edges) for limit in (0, 1 << 24)}
        assert isinstance(made[0].inputs.matrix, SparseMatrix)
        assert isinstance(made[1 << 24].inputs.matrix, Tensor)
        table = random(0, 2 * 3 + 3, 4).float().requires_grad_()
        upstream = random(1, USERS + ITEMS, 4).float()
        found, expected = (graph.inputs(table) for graph in made.values())
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found, table, upstream),
            torch.autograd.grad(expected, table, upstream),
        )


def limited_graph(monkeypatch: pytest.MonkeyPatch, limit: int, edges: Edges) -> Graph:
    """Make a graph whose matrices are dense up to ``limit`` entries."""
    monkeypatch.setattr(graph_module, "_DENSE_ENTRIES", limit)
    return Graph.of(tagged(), edges, USERS, ITEMS, Vocabulary({"brand": ("p", "q", "r")}))


def tagged() -> Dataset:
    brands = {"0": ["p"], "1": ["q", "r"], "2": [], "3": ["r", "p"]}
    return dataset_of([("ann", str(n), n) for n in range(ITEMS)], {"brand": brands})


class TestGraph:
    def test_is_made_of_the_first_users_and_items(self) -> None:
        attributes = {"brand": {"x": ["p"], "y": ["q"], "z": ["p"]}}
        dataset = dataset_of([("ann", "x", 1), ("bob", "y", 2), ("cat", "z", 3)], attributes)
        graph = Graph.of(dataset, edges_of((0, 1)), 2, 2, Vocabulary({"brand": ("p", "q")}))
        assert (graph.users, graph.items) == (2, 2)
        linked = torch.zeros(4, 4)
        linked[0, 3] = linked[3, 0] = 1.0
        assert torch.equal(dense(graph.mean.matrix), linked)
        # The values p and q and the users' own, of neighbours and of the node itself; and a one.
        assert dense(graph.inputs.matrix).tolist() == [
            [0, 1, 0, 0, 0, 1, 1],
            [0, 0, 0, 0, 0, 1, 1],
            [0, 0, 0, 1, 0, 0, 1],
            [0, 0, 1, 0, 1, 0, 1],
        ]
        numbers, starts = graph.features.bags["brand"]
        assert (numbers.tolist(), starts.tolist()) == ([0, 1], [0, 1])

    def test_models_of_any_vocabulary_share_the_message_passing(self) -> None:
        operator = mean_over_neighbours(edges_of((0, 0), (1, 3)), USERS, ITEMS)
        narrow, wide = (
            Graph.build(operator, Vocabulary({"brand": known}).encode(tagged(), ITEMS), USERS)
            for known in (("p",), ("p", "q", "r"))
        )
        assert narrow.mean is wide.mean is operator
        assert dense(narrow.inputs.matrix).shape == (USERS + ITEMS, 2 * 1 + 3)
        assert dense(wide.inputs.matrix).shape == (USERS + ITEMS, 2 * 3 + 3)

    def test_moves_to_a_device_whole(self) -> None:
        vocabulary = Vocabulary({"brand": ("p", "q", "r")})
        graph = Graph.of(tagged(), edges_of((0, 0)), USERS, ITEMS, vocabulary)
        moved = graph.to(torch.device("meta"))
        assert (moved.users, moved.items, moved.features) == (USERS, ITEMS, graph.features)
        assert isinstance(moved.inputs.matrix, Tensor)
        assert isinstance(moved.mean.matrix, SparseMatrix)
        assert {moved.inputs.matrix.device.type, moved.mean.matrix.values.device.type} == {"meta"}
