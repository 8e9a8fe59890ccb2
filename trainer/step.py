"""All that making version k may use: data, graph, and what is left of the older versions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backcast.transforms import AffineMap
from trainer.archive import ArchivedModel
from trainer.config import TrainConfig
from trainer.data.dataset import Dataset
from trainer.features import Vocabulary
from trainer.fitting import OnEpoch, Selection
from trainer.graph import Graph, Operator, mean_over_neighbours
from trainer.model import GraphSAGE, embed, unit_scores
from trainer.split import Holdout, Split


@dataclass(frozen=True, eq=False)
class Step:
    """One version to be made.

    Attributes:
        number: k.
        parent: the version to be compatible with, None for the first.
        ancestors: the parent, its parent, and so on.
        chain: W_parent^j by version j on the parent's chain, the identity for itself; made of the
            maps that were trained jointly, where there are any.
        load: reads an older model of the chain; None where its weights are gone.
        on_epoch: told how training goes.
    """

    number: int
    dataset: Dataset
    split: Split
    config: TrainConfig
    device: torch.device
    parent: int | None
    ancestors: Sequence[int]
    chain: Mapping[int, AffineMap]
    load: Callable[[int], ArchivedModel | None]
    on_epoch: OnEpoch

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The attribute values that a model trained from scratch knows."""
        return Vocabulary.of(self.dataset, self.split.items, self.config.min_value_count)

    def new_model(self) -> GraphSAGE:
        """Return M_k of this version's architecture, initialised from the seed."""
        width, depth = self.config.width(self.number), self.config.depth(self.number)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.seed)
            model = GraphSAGE(width, depth, self.vocabulary.sizes).to(self.device)
        if self.config.unit_scores:
            unit_scores(model)
        return model

    def training_graph(self, vocabulary: Vocabulary) -> Graph:
        """Return the graph that is trained on, for a model with this vocabulary."""
        split = self.split
        features = vocabulary.encode(self.dataset, split.items)
        return Graph.build(self._mean, features, split.users).to(self.device)

    @cached_property
    def _mean(self) -> Operator:
        return mean_over_neighbours(self.split.train, self.split.users, self.split.items)

    def selection(self, vocabulary: Vocabulary) -> Selection | None:
        """Return where the best epoch is chosen."""
        return self._look(self.split.selection, vocabulary)

    def test(self, vocabulary: Vocabulary) -> Selection | None:
        """Return where the result is measured."""
        return self._look(self.split.test, vocabulary)

    def _look(self, holdout: Holdout | None, vocabulary: Vocabulary) -> Selection | None:
        if holdout is None:
            return None
        graph = Graph.of(self.dataset, holdout.visible, holdout.users, holdout.items, vocabulary)
        return Selection(holdout, graph.to(self.device))

    def vectors_of(self, archived: ArchivedModel) -> Tensor:
        """Return the vectors of all nodes of the training graph, (U + I, D), as served."""
        graph = self.training_graph(archived.vocabulary)
        return torch.cat(embed(archived.model.to(self.device), graph))

    def older(self, version: int) -> Tensor | None:
        """Return z_j: M_j on version k's training graph, (U + I, D_j); None where M_j is gone."""
        archived = self.load(version)
        return None if archived is None else self.vectors_of(archived)

    @property
    def target(self) -> Tensor:
        """z_{k-1}, which version k is aligned to."""
        assert self.parent is not None
        vectors = self.older(self.parent)
        assert vectors is not None
        return vectors

    def known_vectors_of(self, archived: ArchivedModel) -> NDArray[np.float64]:
        """Return the vectors of all nodes known at t_k, with all their edges, (U + I, D)."""
        mean, users, items = self._known
        features = archived.vocabulary.encode(self.dataset, items)
        graph = Graph.build(mean, features, users).to(self.device)
        z = torch.cat(embed(archived.model.to(self.device), graph))
        return z.to(torch.float64).cpu().numpy()

    @property
    def known_users(self) -> int:
        """How many of the nodes known at t_k are users."""
        return self._known[1]

    @cached_property
    def _known(self) -> tuple[Operator, int, int]:
        edges = self.split.known
        users = max(self.split.users, int(edges.users.max()) + 1)
        items = max(self.split.items, int(edges.items.max()) + 1)
        return mean_over_neighbours(edges, users, items), users, items
