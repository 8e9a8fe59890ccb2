"""The mean over neighbours against a loop over nodes."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from tests.trainer_support import dataset_of, dense_mean, edges_of
from trainer.features import Vocabulary
from trainer.graph import Adjacency, Graph
from trainer.split import Edges

pytestmark = pytest.mark.usefixtures("one_thread")

USERS, ITEMS = 5, 4
edge_lists = st.lists(
    st.tuples(st.integers(0, USERS - 1), st.integers(0, ITEMS - 1)), unique=True, max_size=20
)


def dense(edges: Edges) -> Tensor:
    """Return the row-normalised adjacency, (9, 9) float64."""
    matrix = torch.zeros(USERS + ITEMS, USERS + ITEMS, dtype=torch.float64)
    for user, item in zip(edges.users.tolist(), edges.items.tolist(), strict=True):
        matrix[user, USERS + item] = matrix[USERS + item, user] = 1.0
    return matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)


def adjacency(edges: Edges) -> Adjacency:
    """Return the adjacency in float64."""
    single = Adjacency.of(edges, USERS, ITEMS)
    return Adjacency(single.mean_of.double(), single.transposed.double())


def vectors(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(USERS + ITEMS, 3, generator=generator, dtype=torch.float64)


@given(edge_lists, st.integers(0, 2**31))
def test_mean_is_that_of_a_loop(pairs: Sequence[tuple[int, int]], seed: int) -> None:
    edges, x = edges_of(*pairs), vectors(seed)
    # weights are float32 before they are widened: 1/3 is not exact
    torch.testing.assert_close(
        adjacency(edges).mean(x), dense_mean(edges, USERS, x), rtol=1e-6, atol=1e-7
    )


@given(edge_lists, st.integers(0, 2**31))
def test_gradient_is_that_of_the_dense_product(pairs: Sequence[tuple[int, int]], seed: int) -> None:
    edges, x = edges_of(*pairs), vectors(seed).requires_grad_()
    upstream = vectors(seed + 1)
    (found,) = torch.autograd.grad(adjacency(edges).mean(x), x, upstream)
    (expected,) = torch.autograd.grad(dense(edges) @ x, x, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_gradient_is_that_of_finite_differences() -> None:
    edges = edges_of((0, 0), (0, 1), (1, 1), (2, 1), (2, 3), (4, 3))
    assert gradcheck(adjacency(edges).mean, (vectors(0).requires_grad_(),))


def test_gradient_of_a_broadcast_sum() -> None:
    # sum() hands back one number, expanded: a gradient without strides
    edges, x = edges_of((0, 0), (0, 1), (1, 1)), vectors(0).requires_grad_()
    (found,) = torch.autograd.grad(adjacency(edges).mean(x).sum(), x)
    torch.testing.assert_close(found, dense(edges).sum(dim=0)[:, None].expand(-1, 3))


def test_nodes_without_neighbours_get_zeros() -> None:
    averaged = Adjacency.of(edges_of((1, 2)), USERS, ITEMS).mean(vectors(0).float())
    assert averaged[1].tolist() == vectors(0).float()[USERS + 2].tolist()
    assert averaged[USERS + 2].tolist() == vectors(0).float()[1].tolist()
    others = [n for n in range(USERS + ITEMS) if n not in {1, USERS + 2}]
    assert averaged[others].abs().max() == 0


def test_a_graph_without_edges() -> None:
    assert Adjacency.of(edges_of(), 2, 1).mean(torch.ones(3, 4)).tolist() == [[0.0] * 4] * 3


def test_the_order_of_the_edges_does_not_matter() -> None:
    one = Adjacency.of(edges_of((0, 1), (3, 0), (0, 0)), USERS, ITEMS)
    other = Adjacency.of(edges_of((0, 0), (0, 1), (3, 0)), USERS, ITEMS)
    assert torch.equal(one.mean_of.to_dense(), other.mean_of.to_dense())
    assert torch.equal(one.transposed.to_dense(), one.mean_of.to_dense().T)


def test_a_graph_is_made_of_the_first_users_and_items() -> None:
    attributes = {"brand": {"x": ["p"], "y": ["q"], "z": ["p"]}}
    dataset = dataset_of([("ann", "x", 1), ("bob", "y", 2), ("cat", "z", 3)], attributes)
    vocabulary = Vocabulary({"brand": ("p", "q")})
    graph = Graph.of(dataset, edges_of((0, 1)), 2, 2, vocabulary)
    assert (graph.users, graph.items) == (2, 2)
    linked = torch.zeros(4, 4)
    linked[0, 3] = linked[3, 0] = 1.0
    assert torch.equal(graph.adjacency.mean_of.to_dense(), linked)
    numbers, starts = graph.features.bags["brand"]
    assert (numbers.tolist(), starts.tolist()) == ([0, 1], [0, 1])
