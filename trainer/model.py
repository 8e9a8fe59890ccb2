"""GraphSAGE over users and items (the paper's section 5.2), full graph."""

import warnings
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from trainer.graph import Graph, Operator

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

    @property
    def stack(self) -> Sequence[tuple["FullGraphConv", nn.BatchNorm1d]]:
        """Convolution and BatchNorm of each layer."""
        pairs = zip(self.convolutions, self.norms, strict=True)
        return [(cast("FullGraphConv", c), cast("nn.BatchNorm1d", norm)) for c, norm in pairs]

    def table(self, attribute: str) -> Tensor:
        """Return the vectors of an attribute's values, (V, D_k)."""
        bag = self.attributes[self.attribute_names.index(attribute)]
        return cast("nn.EmbeddingBag", bag).weight

    def forward(self, graph: Graph) -> Tensor:
        """Embed all nodes of ``graph``."""
        (first, first_norm), *rest = self.stack
        values = [self.table(name) for name in self.attribute_names]
        table = torch.cat([*values, self.user[None]])  # (V + 1, D)
        messages, own = linear(table, first.lin_l.weight), linear(table, first.lin_r.weight)
        x = graph.inputs(torch.cat([messages, own, first.lin_l.bias[None]]))  # (U + I, D)
        x = first_norm(x)
        for convolution, norm in rest:
            x = norm(convolution(x.relu_(), graph.mean))
        return cast("Tensor", x)


@torch.no_grad()
def unit_scores(model: GraphSAGE) -> None:
    """Let scores of a new model have a standard deviation near 1: the last BatchNorm starts lower.

    It starts at D_k^(-1/4), not at 1. BatchNorm leaves D_k coordinates of variance 1, whose dot
    products have variance D_k: a loss that begins far above ln 2 and takes epochs to come down.
    """
    _, last = model.stack[-1]
    last.weight.fill_(model.width**-0.25)


class FullGraphConv(SAGEConv):  # type: ignore[misc]
    """PyG's SAGEConv with the mean over neighbours as one prepared operator."""

    def forward(self, x: Tensor, mean: Operator) -> Tensor:
        """Map (N, D) to (N, D)."""
        messages = linear(mean(x), self.lin_l.weight, self.lin_l.bias)
        return messages.addmm_(x, self.lin_r.weight.T)


@torch.no_grad()
def set_statistics(model: GraphSAGE, graph: Graph) -> None:
    """Set BatchNorm's statistics to those of ``graph``, of all nodes in one pass."""
    was_training = model.training
    momenta = [norm.momentum for _, norm in model.stack]
    model.train()
    for _, norm in model.stack:
        norm.momentum = 1.0
    model(graph)
    for (_, norm), momentum in zip(model.stack, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)


@torch.no_grad()
def embed(model: GraphSAGE, graph: Graph) -> tuple[Tensor, Tensor]:
    """Return the vectors of users (U, D) and items (I, D) in evaluation mode: what is served."""
    was_training = model.training
    model.eval()
    z = model(graph)
    model.train(was_training)
    users, items = z.split([graph.users, graph.items])
    return users, items
