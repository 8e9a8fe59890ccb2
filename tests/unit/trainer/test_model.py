"""GraphSAGE against PyG's layer on an edge list, and against dense sums node by node."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.trainer_support import dataset_of, dense_mean, widened
from trainer import graph as graph_module
from trainer.config import Protocol
from trainer.data.dataset import Dataset, resolve_until
from trainer.features import Vocabulary
from trainer.graph import Graph, SparseMatrix
from trainer.model import FullGraphConv, GraphSAGE, embed, unit_scores
from trainer.split import Edges, make_split

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 5


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def shop() -> Dataset:
    """Items with several values, one, none, and unknown ones only; two attributes."""
    edges = [("ann", "v", 1), ("ann", "w", 2), ("bob", "w", 3), ("cat", "x", 4), ("bob", "z", 5)]
    return dataset_of(
        edges,
        {
            "brand": {"v": ["p"], "w": ["q"], "x": ["p"], "z": ["odd"]},
            "tags": {"v": ["s", "t"], "w": ["t", "odd"], "x": [], "z": []},
        },
    )


VOCABULARY = Vocabulary({"brand": ("p", "q"), "tags": ("s", "t", "u")})


def edges_in(dataset: Dataset) -> Edges:
    """Return the edges, the first of them twice."""
    return Edges(np.append(dataset.users, dataset.users[0]), np.append(dataset.items, 0))


def graph_of(
    dataset: Dataset, *, isolated_users: int = 0, vocabulary: Vocabulary = VOCABULARY
) -> Graph:
    """Return the graph of ``dataset`` in float64."""
    users, items = len(dataset.user_ids) + isolated_users, len(dataset.item_ids)
    graph = Graph.of(dataset, edges_in(dataset), users, items, vocabulary)
    return replace(graph, mean=widened(graph.mean), inputs=widened(graph.inputs))


def make_model(layers: int, vocabulary: Vocabulary = VOCABULARY) -> GraphSAGE:
    """Return a float64 model whose norms are not the identity."""
    model = GraphSAGE(WIDTH, layers, vocabulary.sizes).double()
    for norm in model.norms:
        assert isinstance(norm, nn.BatchNorm1d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return model


def item_inputs(model: GraphSAGE, dataset: Dataset) -> Tensor:
    """Return Σ over attributes of the mean of the known values' embeddings, item by item."""
    rows = []
    for item in range(len(dataset.item_ids)):
        total = torch.zeros(WIDTH, dtype=torch.float64)
        for bag, (name, known) in zip(model.attributes, VOCABULARY.values.items(), strict=True):
            values = [v for v in dataset.attributes[name].of(item) if v in known]
            if values:
                weight: Tensor = bag.get_parameter("weight")
                total = total + sum(weight[known.index(v)] for v in values) / len(values)
        rows.append(total)
    return torch.stack(rows)


def reference(model: GraphSAGE, dataset: Dataset, graph: Graph) -> Tensor:
    """Return x ← BatchNorm(W_l mean(neighbours) + b + W_r x), ReLU in between, written out."""
    x = torch.cat([model.user.repeat(graph.users, 1), item_inputs(model, dataset)])
    for depth in range(model.layers):
        layer, norm = model.convolutions[depth], model.norms[depth]
        x = (
            dense_mean(edges_in(dataset), graph.users, x) @ layer.get_parameter("lin_l.weight").T
            + layer.get_parameter("lin_l.bias")
            + x @ layer.get_parameter("lin_r.weight").T
        )
        if model.training:
            mean, variance = x.mean(dim=0), x.var(dim=0, correction=0)
        else:
            mean, variance = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        x = (x - mean) / (variance + 1e-5).sqrt()
        x = x * norm.get_parameter("weight") + norm.get_parameter("bias")
        if depth < model.layers - 1:
            x = x.clamp(min=0)
    return x


LAYERS = pytest.mark.parametrize("layers", [1, 2, 3])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@pytest.fixture(params=["sparse", "dense"])
def _input_form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply the input operator in one of its forms, whatever its size."""
    monkeypatch.setattr(
        graph_module, "_DENSE_ENTRIES", {"sparse": 0, "dense": 1 << 24}[request.param]
    )


@LAYERS
@TRAINING
@pytest.mark.usefixtures("_input_form")
def test_forward_is_that_of_dense_sums(layers: int, training: bool) -> None:
    dataset = shop()
    graph = graph_of(dataset, isolated_users=1)
    model = make_model(layers).train(training)
    expected = reference(model, dataset, graph)  # before running statistics move
    torch.testing.assert_close(model(graph), expected, rtol=1e-6, atol=1e-6)


@LAYERS
@TRAINING
@pytest.mark.usefixtures("_input_form")
def test_gradients_are_those_of_dense_sums(layers: int, training: bool) -> None:
    dataset = shop()
    graph, model = graph_of(dataset, isolated_users=1), make_model(layers).train(training)
    parameters = list(model.parameters())
    upstream = torch.randn(graph.users + graph.items, WIDTH, dtype=torch.float64)
    expected = torch.autograd.grad(reference(model, dataset, graph), parameters, upstream)
    found = torch.autograd.grad(model(graph), parameters, upstream)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    unknown_tag = found[[n for n, _ in model.named_parameters()].index("attributes.1.weight")][2]
    assert unknown_tag.tolist() == [0.0] * WIDTH  # no item has the value "u"


@LAYERS
@TRAINING
def test_in_single_precision_it_is_the_same_to_its_precision(layers: int, training: bool) -> None:
    dataset = shop()
    model = make_model(layers).train(training)
    expected = reference(model, dataset, graph_of(dataset)).detach()
    graph = Graph.of(dataset, edges_in(dataset), 3, 4, VOCABULARY)
    found = model.float()(graph).detach().double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@TRAINING
def test_the_sparse_and_the_dense_input_give_the_same(
    training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, model = shop(), make_model(2).train(training)
    parameters, results = list(model.parameters()), []
    for limit in (0, 1 << 24):
        monkeypatch.setattr(graph_module, "_DENSE_ENTRIES", limit)
        graph = graph_of(dataset, isolated_users=1)
        assert isinstance(graph.inputs.matrix, SparseMatrix if limit == 0 else Tensor)
        z = model(graph)
        results.append((z, torch.autograd.grad(z.square().sum(), parameters)))
    torch.testing.assert_close(*results)


def edge_index_of(edges: Edges, users: int) -> Tensor:
    """Return PyG's edge list, int64 (2, 2 E), both directions."""
    starts, ends = torch.from_numpy(edges.users), torch.from_numpy(edges.items) + users
    return torch.stack([torch.cat([starts, ends]), torch.cat([ends, starts])])


def test_layer_is_pygs_on_the_edge_list() -> None:
    from torch_geometric.nn import SAGEConv  # at the top its warnings would be errors

    dataset = shop()
    graph = graph_of(dataset, isolated_users=1)
    edge_index = edge_index_of(edges_in(dataset), graph.users)
    ours = FullGraphConv(WIDTH, WIDTH).double()
    theirs = SAGEConv(WIDTH, WIDTH, aggr="mean").double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(graph.users + graph.items, WIDTH, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)

    found, expected = ours(x, graph.mean), theirs(x, edge_index)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        torch.autograd.grad(found, [x, *ours.parameters()], upstream),
        torch.autograd.grad(expected, [x, *theirs.parameters()], upstream),
        rtol=1e-6,
        atol=1e-6,
    )


@LAYERS
@TRAINING
@pytest.mark.usefixtures("_input_form")
def test_a_model_is_pygs_layers_one_after_another(layers: int, training: bool) -> None:
    from torch_geometric.nn import SAGEConv

    dataset, model = shop(), make_model(layers).train(training)
    graph = graph_of(dataset, isolated_users=1)
    edge_index = edge_index_of(edges_in(dataset), graph.users)
    theirs = copy.deepcopy(model)
    found = model(graph)

    bags = [
        bag(*(torch.from_numpy(part) for part in graph.features.bags[name]))
        for name, bag in zip(theirs.attribute_names, theirs.attributes, strict=True)
    ]
    x = torch.cat([theirs.user.expand(graph.users, -1), torch.stack(bags).sum(dim=0)])
    for depth, (layer, norm) in enumerate(zip(theirs.convolutions, theirs.norms, strict=True)):
        convolution = SAGEConv(WIDTH, WIDTH, aggr="mean").double()
        convolution.lin_l, convolution.lin_r = layer.lin_l, layer.lin_r
        x = norm(convolution(x if depth == 0 else x.relu(), edge_index))
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(x)
    torch.testing.assert_close(
        torch.autograd.grad(found, list(model.parameters()), upstream),
        torch.autograd.grad(x, list(theirs.parameters()), upstream),
        rtol=1e-5,
        atol=1e-6,
    )
    torch.testing.assert_close(model.state_dict(), theirs.state_dict())  # running statistics too


def test_an_item_without_known_values_starts_from_zero() -> None:
    dataset = shop()
    model, graph = identity_model(VOCABULARY), graph_of(dataset)
    inputs = model(graph)[graph.users :]
    torch.testing.assert_close(inputs, item_inputs(model, dataset))
    assert dataset.item_ids[3] == "z"  # its only brand is unknown
    assert inputs[3].tolist() == [0.0] * WIDTH
    assert inputs[:3].norm(dim=1).min() > 0


def identity_model(vocabulary: Vocabulary) -> GraphSAGE:
    """Return a float64 model whose vectors are its inputs."""
    model = GraphSAGE(WIDTH, 1, vocabulary.sizes).double().eval()
    layer, norm = model.convolutions[0], model.norms[0]
    assert isinstance(norm, nn.BatchNorm1d)
    norm.eps = 0.0
    for name in ("lin_l.weight", "lin_l.bias"):
        nn.init.zeros_(layer.get_parameter(name))
    nn.init.eye_(layer.get_parameter("lin_r.weight"))
    return model


def test_users_share_one_vector() -> None:
    dataset = shop()
    model = make_model(2).eval()
    graph = graph_of(dataset, isolated_users=2)
    found = model(graph)[: graph.users]
    isolated = found[-2:]
    assert isolated[0].tolist() == isolated[1].tolist()
    assert (found[:-2] - isolated[0]).norm(dim=1).min() > 0  # others differ by their neighbours
    assert model.user.shape == (WIDTH,)


def test_users_with_equal_neighbours_are_equal() -> None:
    dataset = dataset_of(
        [("ann", "v", 1), ("bob", "w", 2), ("cat", "v", 3)],
        {"brand": {"v": ["p"], "w": ["q"]}, "tags": {"v": ["s"], "w": ["t"]}},
    )
    ann, bob, cat = make_model(2).eval()(graph_of(dataset))[:3]
    torch.testing.assert_close(ann, cat)
    assert (ann - bob).norm() > 1e-3


def test_the_user_vector_is_drawn_small_and_the_rest_from_the_same_generator() -> None:
    draws = torch.stack([GraphSAGE(1000, 1, {"brand": 2}).user.detach() for _ in range(5)])
    assert draws.std().item() == pytest.approx(0.1, rel=0.05)
    assert abs(draws.mean().item()) < 0.01
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(GraphSAGE(4, 2, {"brand": 2}).state_dict())
    first, same, other = states
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(
        first["convolutions.0.lin_l.weight"], other["convolutions.0.lin_l.weight"]
    )


@pytest.mark.parametrize(("width", "layers"), [(16, 1), (64, 2), (100, 3)])
def test_scores_start_with_a_standard_deviation_near_one(
    dataset: Dataset, width: int, layers: int
) -> None:
    torch.manual_seed(0)
    split = make_split(dataset, resolve_until(dataset, 0.6), None, Protocol.STRICT)
    vocabulary = Vocabulary.of(dataset, split.items, 1)
    model = GraphSAGE(width, layers, vocabulary.sizes)
    graph = Graph.of(dataset, split.train, split.users, split.items, vocabulary)
    spreads = []
    for scaled in (False, True):
        if scaled:
            unit_scores(model)
        users, items = model(graph).split([split.users, split.items])
        spreads.append((users @ items.T).std().item())
    plain, unit = spreads
    assert unit == pytest.approx(plain / width**0.5, rel=1e-3)
    assert 0.5 < unit < 2.0 < plain
    assert all((norm.weight == 1.0).all() for _, norm in model.stack[:-1])


@pytest.mark.parametrize("name", ["type", "sub.category", "keys", "training", "weight"])
def test_attributes_may_have_any_name(name: str) -> None:
    dataset = dataset_of([("ann", "v", 1), ("bob", "w", 2)], {name: {"v": ["p"], "w": ["q"]}})
    vocabulary = Vocabulary({name: ("p", "q")})
    model = identity_model(vocabulary)
    weight = model.attributes[0].get_parameter("weight")
    assert model(graph_of(dataset, vocabulary=vocabulary))[2:].tolist() == weight.tolist()


def test_width_and_depth_are_as_asked() -> None:
    model = GraphSAGE(7, 3, {"brand": 4, "tags": 2})
    assert (model.width, model.layers) == (7, 3)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["user"] == (7,)
    assert [shapes[f"attributes.{n}.weight"] for n in range(2)] == [(4, 7), (2, 7)]
    assert [shapes[f"convolutions.{n}.lin_r.weight"] for n in range(3)] == [(7, 7)] * 3


class TestEmbed:
    def test_is_the_evaluation_mode(self) -> None:
        graph, model = graph_of(shop()), make_model(2).train()
        users, items = embed(model, graph)
        expected = model.eval()(graph)
        assert torch.equal(torch.cat([users, items]), expected)
        assert (len(users), len(items)) == (graph.users, graph.items)
        assert not torch.allclose(torch.cat([users, items]), model.train()(graph))

    @pytest.mark.parametrize("training", [True, False])
    def test_leaves_the_model_as_it_was(self, training: bool) -> None:
        graph, model = graph_of(shop()), make_model(2).train(training)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        users, items = embed(model, graph)
        assert model.training is training
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        assert not users.requires_grad
        assert not items.requires_grad
