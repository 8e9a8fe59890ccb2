"""The training of one version, stated for the trainer and for the published loop alike."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from backcast.alignment import AlignmentLoss, BackwardTransformation, alignment_gram
from backcast.devices import choose_device
from benchmarks.published_loop import Alignment, GraphData, PublishedModel
from trainer.config import TrainConfig
from trainer.data.dataset import Dataset, resolve_until
from trainer.evaluation.benchmark import FRACTIONS
from trainer.features import Vocabulary
from trainer.fitting import PAPER_LAMBDA, JointAlignment, Selection
from trainer.graph import Graph
from trainer.model import GraphSAGE
from trainer.split import Split, make_split


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw weights from a seed, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@dataclass(frozen=True, eq=False)
class Problem:
    """Version k on the edges until t_k, measured until t_{k+1}.

    What it is aligned to is random and of true shape: z_{k-1}, and the older maps W_1 .. W_{k-1}.
    Version 0 is aligned to nothing. The trainer computes on the configured device, the published
    loop on the CPU.
    """

    dataset: Dataset
    config: TrainConfig
    version: int

    @cached_property
    def split(self) -> Split:
        """Where version k trains and where it is measured."""
        until, horizon = (
            resolve_until(self.dataset, FRACTIONS[k]) for k in (self.version, self.version + 1)
        )
        return make_split(self.dataset, until, horizon, self.config.protocol)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The attribute values that the model knows."""
        return Vocabulary.of(self.dataset, self.split.items, self.config.min_value_count)

    @property
    def _device(self) -> torch.device:
        return choose_device(self.config.device)

    @cached_property
    def maps(self) -> Sequence[Tensor]:
        """W_1 .. W_{k-1}, random, each (D_{j-1}, D_j)."""
        generator = torch.Generator().manual_seed(self.config.seed)
        widths = [self.config.width(j) for j in range(self.version)]
        return [
            torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
            for rows, columns in itertools.pairwise(widths)
        ]

    @cached_property
    def target(self) -> Tensor:
        """z_{k-1}, random: (U + I, D_{k-1})."""
        generator = torch.Generator().manual_seed(self.config.seed)
        nodes = self.split.users + self.split.items
        return torch.randn(nodes, self.config.width(self.version - 1), generator=generator)

    # For the trainer

    def graph(self) -> Graph:
        """Return the training graph."""
        split = self.split
        graph = Graph.of(self.dataset, split.train, split.users, split.items, self.vocabulary)
        return graph.to(self._device)

    def selection(self) -> Selection:
        """Return where Recall@50 is measured."""
        found = self.split.selection
        assert found is not None
        graph = Graph.of(self.dataset, found.visible, found.users, found.items, self.vocabulary)
        return Selection(found, graph.to(self._device))

    def model(self) -> GraphSAGE:
        """Return M_k before training."""
        with seeded(self.config.seed):
            return GraphSAGE(*self._architecture, self.vocabulary.sizes).to(self._device)

    @property
    def _architecture(self) -> tuple[int, int]:
        return self.config.width(self.version), self.config.depth(self.version)

    def joint(self) -> JointAlignment | None:
        """Return what M_k is aligned to, with a new B_k."""
        if self.version == 0:
            return None
        width, parent_width = self.config.width(self.version), self.target.shape[1]
        composed = [torch.eye(parent_width, dtype=torch.float64)]
        for older in reversed(self.maps):
            composed.append(older.to(torch.float64) @ composed[-1])
        with seeded(self.config.seed):
            transformation = BackwardTransformation(width, parent_width).to(self._device)
        loss = AlignmentLoss(alignment_gram(composed)).to(self._device)
        return JointAlignment(transformation, loss, self.target.to(self._device))

    # For the published loop

    def published_data(self) -> GraphData:
        """Return the training graph."""
        features = self.vocabulary.encode(self.dataset, self.split.items)
        return GraphData.of(self.split, features)

    def published_model(self) -> PublishedModel:
        """Return M_k before training."""
        with seeded(self.config.seed):
            return PublishedModel(*self._architecture, list(self.vocabulary.sizes.values()))

    def published_alignment(self) -> Alignment | None:
        """Return what M_k is aligned to, with a new B_k."""
        if self.version == 0:
            return None
        width, parent_width = self.config.width(self.version), self.target.shape[1]
        with seeded(self.config.seed):
            transformation = nn.Linear(width, parent_width, bias=False)
        return Alignment(
            self.target[: self.split.users],
            self.target[self.split.users :],
            transformation,
            list(reversed(self.maps)),
            PAPER_LAMBDA,
        )
