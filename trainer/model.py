"""GraphSAGE over users and items (the paper's section 5.2), full graph."""

import warnings
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from trainer.features import ItemFeatures
from trainer.graph import Adjacency, Graph

with warnings.catch_warnings():  # on import PyG calls torch.jit.script, which torch deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch_geometric.nn import SAGEConv


class GraphSAGE(nn.Module):
    """M_k: from a graph to one vector per node.

    x_user = one learned vector, shared by all users, so that new users need nothing of their own;
    x_item = sum over attributes of the mean of the item's value embeddings; then per layer
    x ← BatchNorm(W_l mean(neighbours of x) + b + W_r x), with ReLU between layers.

    Args:
        width: D_k, of input, hidden and output vectors.
        layers: number of layers.
        vocabulary_sizes: number of known values of each attribute.

    Shapes:
        ``forward(graph)`` returns (U + I, D_k), users first.
    """

    def __init__(self, width: int, layers: int, vocabulary_sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.width = width
        self.layers = layers
        self.user = nn.Parameter(0.1 * torch.randn(width))
        # A list: the keys of a ModuleDict may not hold a dot or be the name of a method ("type").
        self.attribute_names = tuple(vocabulary_sizes)
        self.attributes = nn.ModuleList(
            nn.EmbeddingBag(n, width, mode="mean") for n in vocabulary_sizes.values()
        )
        self.convolutions = nn.ModuleList(FullGraphConv(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(layers))

    def forward(self, graph: Graph) -> Tensor:
        """Embed all nodes of ``graph``."""
        items = self.embed_items(graph.features)  # (I, D)
        x = torch.cat([self.user.expand(graph.users, -1), items])  # (U + I, D)
        for depth, (convolution, norm) in enumerate(
            zip(self.convolutions, self.norms, strict=True)
        ):
            x = norm(convolution(x, graph.adjacency))
            if depth < self.layers - 1:
                x = x.relu()
        return x

    def embed_items(self, features: ItemFeatures) -> Tensor:
        """Return the items' input vectors (I, D); an item without known values gets zeros."""
        parts = [
            bag(*features.bags[name])
            for name, bag in zip(self.attribute_names, self.attributes, strict=True)
        ]
        return cast("Tensor", sum(parts))


class FullGraphConv(SAGEConv):  # type: ignore[misc]
    """PyG's SAGEConv with the mean over neighbours taken by :class:`Adjacency`."""

    def forward(self, x: Tensor, adjacency: Adjacency) -> Tensor:
        """Map (N, D) to (N, D)."""
        return cast("Tensor", self.lin_l(adjacency.mean(x)) + self.lin_r(x))


@torch.no_grad()
def embed(model: GraphSAGE, graph: Graph) -> tuple[Tensor, Tensor]:
    """Return the vectors of users (U, D) and items (I, D) in evaluation mode: what is served."""
    was_training = model.training
    model.eval()
    z = model(graph)
    model.train(was_training)
    users, items = z.split([graph.users, graph.items])
    return users, items
