"""A grown model begins as its parent."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer_support import TINY, make_line
from trainer.archive import ArchivedModel
from trainer.data.dataset import Dataset, resolve_until
from trainer.features import Vocabulary
from trainer.graph import Graph
from trainer.growing import can_grow, grow, renew
from trainer.methods import method
from trainer.model import GraphSAGE, embed, set_statistics
from trainer.split import Edges, make_split

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH = 8


class Nursery:
    """A parent of width 8 with weights that are not those of initialisation, and its graph."""

    def __init__(self, dataset: Dataset, layers: int) -> None:
        self.dataset, until = dataset, resolve_until(dataset, 0.6)
        self.split = make_split(dataset, until, None, TINY.protocol)
        self.vocabulary = Vocabulary.of(dataset, self.split.items, 5)
        model = self.model(WIDTH, layers)
        with torch.no_grad():
            for _, norm in model.stack:
                norm.weight.uniform_(0.5, 2.0)
                norm.bias.normal_()
        set_statistics(model, self.graph(self.vocabulary))
        self.parent = ArchivedModel(model.eval(), self.vocabulary)

    def model(self, width: int, layers: int, vocabulary: Vocabulary | None = None) -> GraphSAGE:
        return GraphSAGE(width, layers, (vocabulary or self.vocabulary).sizes)

    def graph(self, vocabulary: Vocabulary) -> Graph:
        split = self.split
        return Graph.of(self.dataset, split.train, split.users, split.items, vocabulary)

    def vectors(self, model: GraphSAGE, vocabulary: Vocabulary | None = None) -> Tensor:
        return torch.cat(embed(model, self.graph(vocabulary or self.vocabulary)))

    def grown(self, width: int, layers: int, vocabulary: Vocabulary | None = None) -> GraphSAGE:
        vocabulary = vocabulary or self.vocabulary
        model, graph = self.model(width, layers, vocabulary), self.graph(vocabulary)
        grow(model, vocabulary, self.parent, graph)
        return model


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(3)


@pytest.fixture(params=[2, 3], ids=lambda n: f"{n}-layers")
def nursery(dataset: Dataset, request: pytest.FixtureRequest) -> Nursery:
    return Nursery(dataset, request.param)


def alike(z: Tensor, parent: Tensor) -> bool:
    """Tell whether they are equal but for n / (n - 1) between a batch's variance and a kept one."""
    return bool((z - parent).norm() < 0.005 * parent.norm())


@pytest.mark.parametrize("width", [WIDTH, WIDTH + 1, 3 * WIDTH])
@pytest.mark.parametrize("more_layers", [0, 1, 2])
def test_it_begins_with_the_parents_vectors(nursery: Nursery, width: int, more_layers: int) -> None:
    layers = nursery.parent.model.layers + more_layers
    z = nursery.vectors(nursery.grown(width, layers))
    parent = nursery.vectors(nursery.parent.model)
    assert alike(z[:, :WIDTH], parent)
    assert z.shape[1] == width
    assert (z[:, WIDTH:].amax(dim=0) - z[:, WIDTH:].amin(dim=0) > 0.1).all()


def test_one_layer_grows_wider(dataset: Dataset) -> None:
    nursery = Nursery(dataset, 1)
    z, parent = nursery.vectors(nursery.grown(9, 1)), nursery.vectors(nursery.parent.model)
    assert alike(z[:, :WIDTH], parent)


def test_nodes_unlike_those_of_training_have_the_parents_vectors_too(nursery: Nursery) -> None:
    grown = nursery.grown(WIDTH + 4, nursery.parent.model.layers + 2)
    split, nobody = nursery.split, np.empty(0, dtype=np.int64)
    lonely = Graph.of(
        nursery.dataset, Edges(nobody, nobody), split.users, split.items, nursery.vocabulary
    )
    z, parent = (torch.cat(embed(model, lonely)) for model in (grown, nursery.parent.model))
    assert alike(z[:, :WIDTH], parent)


@pytest.mark.parametrize("more_layers", [0, 1, 2])
def test_everything_of_it_can_be_trained(nursery: Nursery, more_layers: int) -> None:
    model = nursery.grown(WIDTH + 2, nursery.parent.model.layers + more_layers).train()
    target = torch.randn(nursery.split.users + nursery.split.items, WIDTH + 2)
    torch.autograd.backward(((model(nursery.graph(nursery.vocabulary)) - target) ** 2).mean())
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        assert weight.requires_grad
        if not name.endswith("lin_l.bias"):  # which BatchNorm takes off again
            assert weight.grad.abs().max() > 1e-7, name
    assert all(weight.grad is None for weight in nursery.parent.model.parameters())


def test_what_the_parent_did_not_know_begins_as_nothing(dataset: Dataset) -> None:
    nursery = Nursery(dataset, 2)
    name, *others = nursery.vocabulary.values
    known = nursery.vocabulary.values[name]
    older = Vocabulary({name: known[1:]})
    model = GraphSAGE(WIDTH, 2, older.sizes)
    set_statistics(model, nursery.graph(older))
    nursery.parent = ArchivedModel(model.eval(), older)
    grown, graph = nursery.model(WIDTH + 2, 2), nursery.graph(nursery.vocabulary)
    z = nursery.vectors(model, older)
    grow(grown, nursery.vocabulary, nursery.parent, graph)
    table = grown.table(name)[:, :WIDTH]
    assert others
    assert not table[0].any()
    assert torch.equal(table[1:], model.table(name))
    assert not any(grown.table(other)[:, :WIDTH].any() for other in others)
    # Items have one value of it each, so that nothing but the graph's statistics is left to differ.
    torch.testing.assert_close(nursery.vectors(grown)[:, :WIDTH], z, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kept", [0.0, 0.25, 1.0])
def test_renewal_stands_between_the_grown_weights_and_fresh_ones(
    nursery: Nursery, kept: float
) -> None:
    width, layers = WIDTH + 4, nursery.parent.model.layers + 1
    model, fresh = nursery.grown(width, layers), nursery.model(width, layers)
    grown = [weight.detach().clone() for weight in model.parameters()]
    renew(model, fresh, kept, nursery.graph(nursery.vocabulary))
    for weight, old, new in zip(model.parameters(), grown, fresh.parameters(), strict=True):
        torch.testing.assert_close(weight.detach(), kept * old + (1 - kept) * new.detach())


def test_a_renewed_model_has_the_statistics_of_its_graph(nursery: Nursery) -> None:
    width, layers = WIDTH + 4, nursery.parent.model.layers + 1
    model, graph = nursery.grown(width, layers), nursery.graph(nursery.vocabulary)
    renew(model, nursery.model(width, layers), 0.5, graph)
    z = nursery.vectors(model)
    set_statistics(model, graph)
    assert torch.equal(nursery.vectors(model), z)


def test_a_model_does_not_shrink_and_one_layer_stays_one() -> None:
    sizes = {"kind": 3}
    model = GraphSAGE(8, 2, sizes)
    assert can_grow(GraphSAGE(9, 1, sizes), GraphSAGE(8, 1, sizes))
    assert not can_grow(GraphSAGE(9, 2, sizes), GraphSAGE(8, 1, sizes))
    assert can_grow(GraphSAGE(8, 2, sizes), model)
    assert can_grow(GraphSAGE(9, 3, sizes), model)
    assert not can_grow(GraphSAGE(7, 3, sizes), model)
    assert not can_grow(GraphSAGE(9, 1, sizes), model)


def test_where_it_cannot_grow_the_model_starts_from_scratch(dataset: Dataset) -> None:
    shrinking = TINY.model_copy(update={"widths": (8, 6), "layers": (2, 1)})
    first, second = make_line(dataset, method("grown-direct"), 2, config=shrinking)
    model = second.trained.archived.model
    assert (model.width, model.layers) == (6, 1)
    assert second.maps[0].weight.shape == (8, 6)
    assert first.trained.archived.model.width == 8
