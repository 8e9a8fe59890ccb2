"""What a step lends to the strategies: seeds, graphs, older vectors, each made once."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.trainer_support import TINY, make_line, step_of
from trainer.config import Protocol
from trainer.data.dataset import Dataset, resolve_until
from trainer.features import Vocabulary
from trainer.graph import Graph
from trainer.methods import Made, method
from trainer.model import embed
from trainer.split import Edges, make_split

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def made(
    dataset: Dataset,
    one_thread: None,  # noqa: ARG001
) -> Sequence[Made]:
    return make_line(dataset, method("non-bc"), 2, config=TINY.model_copy(update={"epochs": 1}))


def test_a_new_model_follows_from_the_seed_and_the_schedule(
    dataset: Dataset, made: Sequence[Made]
) -> None:
    step = step_of(dataset, made)
    torch.manual_seed(1)
    first = step.new_model()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = step.new_model()
    assert torch.equal(torch.get_rng_state(), before)
    assert (first.width, first.layers) == (TINY.width(2), TINY.depth(2)) == (12, 2)
    same = again.state_dict()
    assert all(torch.equal(same[name], t) for name, t in first.state_dict().items())
    other = step_of(dataset, made, config=TINY.model_copy(update={"seed": 2})).new_model()
    assert not torch.equal(other.user, first.user)


@pytest.mark.parametrize("unit", [True, False])
def test_a_new_model_starts_with_unit_scores_where_told(
    dataset: Dataset, made: Sequence[Made], unit: bool
) -> None:
    config = TINY.model_copy(update={"unit_scores": unit})
    (_, last) = step_of(dataset, made, config=config).new_model().stack[-1]
    assert last.weight.tolist() == pytest.approx([12**-0.25 if unit else 1.0] * 12)


def test_the_vocabulary_is_that_of_the_items_known(dataset: Dataset) -> None:
    step = step_of(dataset)
    assert step.vocabulary == Vocabulary.of(dataset, step.split.items, TINY.min_value_count)
    assert step.vocabulary is step.vocabulary


def test_training_graphs_share_their_message_passing(dataset: Dataset) -> None:
    step, small = step_of(dataset), Vocabulary({"brand": ("brand-0",)})
    one, other = step.training_graph(step.vocabulary), step.training_graph(small)
    expected = Graph.of(dataset, step.split.train, step.split.users, step.split.items, small)
    assert (other.users, other.items) == (step.split.users, step.split.items)
    table = torch.randn(2 * 1 + 3, 4)
    assert torch.equal(other.inputs(table), expected.inputs(table))
    x = torch.randn(one.users + one.items, 4)
    assert torch.equal(one.mean(x), expected.mean(x))
    assert step._mean is step._mean


def test_older_vectors_are_those_served_on_the_new_graph(
    dataset: Dataset, made: Sequence[Made]
) -> None:
    step = step_of(dataset, made)
    for version in (0, 1):
        archived, split = made[version].trained.archived, step.split
        graph = Graph.of(dataset, split.train, split.users, split.items, archived.vocabulary)
        found = step.older(version)
        assert found is not None
        assert torch.equal(found, torch.cat(embed(archived.model, graph)))
        assert not found.requires_grad
        last = found
    assert torch.equal(step.target, last)
    assert step.target.shape == (step.split.users + step.split.items, TINY.width(1))


def test_a_model_that_is_gone_has_no_vectors(dataset: Dataset, made: Sequence[Made]) -> None:
    step = step_of(dataset, made, gone=[0])
    assert step.older(0) is None
    assert step.older(1) is not None


def test_known_vectors_are_those_of_all_nodes_and_edges_up_to_the_cut(
    dataset: Dataset, made: Sequence[Made]
) -> None:
    step, archived = step_of(dataset, made), made[1].trained.archived
    until = resolve_until(dataset, 0.7)
    count = dataset.edges_until(until)
    edges = Edges(dataset.users[:count], dataset.items[:count])
    users, items = len(set(edges.users.tolist())), dataset.items_known(until)
    assert (users, items) > (step.split.users, step.split.items)
    graph = Graph.of(dataset, edges, users, items, archived.vocabulary)
    found = step.known_vectors_of(archived)
    assert found.shape == (users + items, TINY.width(1))
    assert found.dtype == np.float64
    assert np.array_equal(found, torch.cat(embed(archived.model, graph)).double().numpy())


def test_it_looks_at_the_holdouts_of_its_split(dataset: Dataset) -> None:
    plain = step_of(dataset)
    assert plain.test(plain.vocabulary) is None
    until, horizon = resolve_until(dataset, 0.5), resolve_until(dataset, 0.6)
    split = make_split(dataset, until, horizon, Protocol.STRICT)
    step = replace(plain, split=split)
    for found, holdout in (
        (step.selection(step.vocabulary), split.selection),
        (step.test(step.vocabulary), split.test),
    ):
        assert found is not None
        assert holdout is not None
        assert found.holdout is holdout
        assert (found.graph.users, found.graph.items) == (holdout.users, holdout.items)
    assert split.test is not None
    assert split.selection is not None
    assert split.test.items > split.selection.items
