"""The user–item graph as one homogeneous adjacency, and the mean over neighbours."""

import warnings
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from trainer.data.dataset import Dataset
from trainer.features import ItemFeatures, Vocabulary
from trainer.split import Edges


@dataclass(frozen=True, eq=False)
class Adjacency:
    """Row-normalised adjacency of an undirected graph over N nodes, prepared once.

    PyG's scatter over edges moves every message through memory twice; one sparse product with the
    matrix, and one with its transpose on the way back, give the same mean.

    Attributes:
        mean_of: (N, N) sparse CSR float32; row n holds 1/degree(n) at n's neighbours.
        transposed: its transpose.
    """

    mean_of: Tensor
    transposed: Tensor

    @classmethod
    def of(cls, edges: Edges, users: int, items: int) -> Self:
        """Build from user–item edges; users are nodes 0..U-1, items U..U+I-1, both directions."""
        nodes = users + items
        ends = np.concatenate([edges.items + users, edges.users])
        starts = np.concatenate([edges.users, edges.items + users])
        order = np.lexsort((ends, starts))
        columns = torch.from_numpy(ends[order])
        degrees = torch.from_numpy(np.bincount(starts, minlength=nodes))
        rows = torch.cat([torch.zeros(1, dtype=torch.int64), degrees.cumsum(0)])
        inverse = 1.0 / degrees.clamp(min=1).to(torch.float32)
        return cls(
            _csr(rows, columns, inverse.repeat_interleave(degrees), nodes),
            _csr(rows, columns, inverse[columns], nodes),  # the pattern is symmetric
        )

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of each node's neighbours, zero without any; (N, D) to (N, D)."""
        averaged: Tensor = _Mean.apply(x, self)  # type: ignore[no-untyped-call]
        return averaged

    def to(self, device: torch.device) -> "Adjacency":
        """Return the adjacency on ``device``."""
        return Adjacency(self.mean_of.to(device), self.transposed.to(device))


def _csr(rows: Tensor, columns: Tensor, values: Tensor, nodes: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
        return torch.sparse_csr_tensor(
            rows, columns, values, (nodes, nodes), check_invariants=False
        )


class _Mean(torch.autograd.Function):
    # Without this, the backward pass transposes the matrix anew each time.
    @staticmethod
    def forward(ctx: Any, x: Tensor, adjacency: Adjacency) -> Tensor:
        ctx.adjacency = adjacency
        return adjacency.mean_of @ x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.adjacency.transposed @ gradients[0].contiguous(), None


@dataclass(frozen=True, eq=False)
class Graph:
    """What a model is run on: nodes, their neighbours, and the items' attributes."""

    users: int
    items: int
    adjacency: Adjacency
    features: ItemFeatures

    @classmethod
    def of(
        cls, dataset: Dataset, edges: Edges, users: int, items: int, vocabulary: Vocabulary
    ) -> Self:
        """Build the graph of the first ``users`` and ``items`` over ``edges``."""
        return cls(
            users,
            items,
            Adjacency.of(edges, users, items),
            vocabulary.encode(dataset, items),
        )

    def to(self, device: torch.device) -> "Graph":
        """Return the graph on ``device``."""
        return Graph(self.users, self.items, self.adjacency.to(device), self.features.to(device))
