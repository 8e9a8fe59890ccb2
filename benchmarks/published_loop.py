"""The loop of the authors' published code, stated anew, to measure and to test against.

It keeps what that loop does and where its time goes: the adjacency is sorted anew at every step,
pairs are drawn with Python's ``random`` and fetched one by one through a ``DataLoader``, scores of
all users, a hundred at a time, go through a sigmoid before they are ranked, and hits are looked up
user by user. Where it does not follow, it is the faster for it: the transpose that the published
code also takes of each new adjacency is left out, for the graph is symmetric; lists of at most K
items are ranked where the published code ranks 100; and progress is not drawn.
"""

import copy
import random
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus
from torch.utils.data import DataLoader, Dataset

from trainer.features import ItemFeatures
from trainer.split import Edges, Holdout, Split

with warnings.catch_warnings():  # on import PyG calls torch.jit.script, which torch deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch_geometric.nn import SAGEConv

FIRST_SELECTED_JOINT = 51
"""Joint methods choose among the epochs after the fiftieth."""


@dataclass(frozen=True, eq=False)
class GraphData:
    """The training graph as an edge list.

    Attributes:
        users, items: int64 (E,) each.
        user_count, item_count: number of nodes of each kind.
        bags: value numbers int64 (V,) and bag starts int64 (I,) of each attribute of the items.
    """

    users: Tensor
    items: Tensor
    user_count: int
    item_count: int
    bags: Sequence[tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, split: Split, features: ItemFeatures) -> "GraphData":
        """Take the training graph of a split."""
        users, items = torch.from_numpy(split.train.users), torch.from_numpy(split.train.items)
        bags = [(torch.from_numpy(n), torch.from_numpy(at)) for n, at in features.bags.values()]
        return cls(users, items, split.users, split.items, bags)

    def adjacency(self) -> Tensor:
        """Sort the edges, both directions, into a sparse CSR matrix of ones (N, N)."""
        there = torch.stack([self.users, self.items + self.user_count])
        rows, columns = torch.cat([there, there.flip(0)], dim=1)
        nodes = self.user_count + self.item_count
        order = torch.argsort(rows * nodes + columns)
        offsets = torch.bincount(rows, minlength=nodes).cumsum(0)
        offsets = torch.cat([offsets.new_zeros(1), offsets])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            return torch.sparse_csr_tensor(
                offsets,
                columns[order],
                torch.ones(len(rows)),
                (nodes, nodes),
                check_invariants=False,
            )


class PublishedModel(nn.Module):
    """GraphSAGE over an adjacency that is put together anew in each pass."""

    def __init__(self, width: int, layers: int, vocabulary_sizes: Sequence[int]) -> None:
        super().__init__()
        self.user = nn.Embedding(1, width)
        nn.init.normal_(self.user.weight, std=0.1)
        self.attributes = nn.ModuleList(nn.EmbeddingBag(n, width) for n in vocabulary_sizes)
        self.convolutions = nn.ModuleList(SAGEConv(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(layers))

    def forward(self, data: GraphData) -> tuple[Tensor, Tensor]:
        """Return the vectors of users (U, D) and items (I, D)."""
        adjacency = data.adjacency()
        x_user = self.user(torch.zeros(data.user_count, dtype=torch.long))
        x_item = torch.zeros(())
        for embedding, bag in zip(self.attributes, data.bags, strict=True):
            x_item = x_item + embedding(*bag)
        x = torch.cat([x_user, x_item])  # (U + I, D)
        last = len(self.norms) - 1
        for depth, (layer, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            x = norm(layer(x, adjacency))
            if depth < last:
                x = x.relu()
        return x[: data.user_count], x[data.user_count :]


class Pairs(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """(user, positive, negative), drawn once an epoch, fetched one by one."""

    def __init__(self, data: GraphData, seed: int) -> None:
        self._data = data
        self._chance = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        degrees = torch.bincount(data.users)
        self._weights = (1.0 / degrees[data.users]).tolist()
        self._indices = range(len(data.users))
        self._keys = (data.users * data.item_count + data.items).numpy()

    def draw(self) -> None:
        """Draw the pairs of an epoch: as many as there are edges, users uniform."""
        data = self._data
        drawn = torch.tensor(self._chance.choices(self._indices, self._weights, k=len(self)))
        self.users, self.positives = data.users[drawn], data.items[drawn]
        self.negatives = self._random_items(len(self))
        rejected = torch.arange(len(self))
        while len(rejected):
            keys = self.users[rejected] * data.item_count + self.negatives[rejected]
            rejected = rejected[torch.from_numpy(np.isin(keys.numpy(), self._keys))]
            self.negatives[rejected] = self._random_items(len(rejected))

    def _random_items(self, count: int) -> Tensor:
        return torch.randint(self._data.item_count, (count,), generator=self.generator)

    def __getitem__(self, at: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.users[at], self.positives[at], self.negatives[at]

    def __len__(self) -> int:
        return len(self._indices)


@dataclass(frozen=True, eq=False)
class Alignment:
    """What a joint method adds.

    Attributes:
        users, items: z_{k-1}, (U, D_{k-1}) and (I, D_{k-1}).
        transformation: B_k.
        older: W_{k-1}, W_{k-2}, .., W_1, each (D_{j-1}, D_j).
        weight: λ.
    """

    users: Tensor
    items: Tensor
    transformation: nn.Linear
    older: Sequence[Tensor]
    weight: float

    def loss(self, users: Tensor, items: Tensor, batch: Sequence[Tensor]) -> Tensor:
        """Return the multi-step loss, step by step through the older maps."""
        user, positive, negative = batch
        errors = [
            self.users[user] - self.transformation(users[user]),
            self.items[positive] - self.transformation(items[positive]),
            self.items[negative] - self.transformation(items[negative]),
        ]
        total = _mean_squares(errors)
        for weight in self.older:
            errors = [linear(error, weight) for error in errors]
            total = total + _mean_squares(errors)
        return total / (len(self.older) + 1)


def _mean_squares(errors: Sequence[Tensor]) -> Tensor:
    return torch.stack([error.square().mean() for error in errors]).sum()


def batch_loss(
    model: PublishedModel,
    data: GraphData,
    batch: Sequence[Tensor],
    *,
    weight_decay: float,
    alignment: Alignment | None,
) -> Tensor:
    """Return the loss of one batch: user, positive and negative numbers, int64 (b,) each."""
    users, items = model(data)
    u, p, n = users[batch[0]], items[batch[1]], items[batch[2]]  # (b, D) each
    loss: Tensor = softplus((u * n).sum(dim=1) - (u * p).sum(dim=1)).mean()
    squares = u.norm(2).pow(2) + p.norm(2).pow(2) + n.norm(2).pow(2)
    loss = loss + weight_decay * 0.5 * squares / len(u)
    if alignment is not None:
        loss = loss + alignment.weight * alignment.loss(users, items, batch)
    return loss


class Evaluator:
    """Recall@K on a holdout, a hundred users at a time, hits looked up user by user."""

    def __init__(self, holdout: Holdout) -> None:
        self._seen, self._wanted = _by_user(holdout.visible), _by_user(holdout.targets)

    @torch.no_grad()
    def evaluate(self, model: PublishedModel, data: GraphData) -> float:
        """Return Recall@50 of ``model`` in evaluation mode."""
        model.eval()
        return self.recall(*model(data))

    def recall(self, users: Tensor, items: Tensor, k: int = 50) -> float:
        """Return Recall@K of vectors (U, D) and (I, D)."""
        recalls: list[float] = []
        for start in range(0, len(users), 100):
            scores = torch.sigmoid(users[start : start + 100] @ items.T)  # (100, I)
            numbers = range(start, start + len(scores))
            ranked = [user for user in numbers if user in self._wanted]
            scores = scores[[user in self._wanted for user in numbers]]
            seen = [(row, i) for row, user in enumerate(ranked) for i in self._seen.get(user, ())]
            if seen:
                rows, columns = zip(*seen, strict=True)
                scores[rows, columns] = -1024.0
            top = scores.topk(min(k, len(items))).indices.numpy()
            for user, best in zip(ranked, top, strict=True):
                wanted = self._wanted[user]
                recalls.append(float(np.isin(best, wanted).sum()) / len(wanted))
        return float(np.mean(recalls))


def _by_user(edges: Edges) -> dict[int, list[int]]:
    by_user: dict[int, set[int]] = {}
    for user, item in zip(edges.users.tolist(), edges.items.tolist(), strict=True):
        by_user.setdefault(user, set()).add(item)
    return {user: sorted(items) for user, items in by_user.items()}


@dataclass(frozen=True)
class Progress:
    """State of the loop after an epoch. ``recall`` is None between evaluations."""

    epoch: int
    seconds: float
    loss: float
    recall: float | None


def train(
    model: PublishedModel,
    data: GraphData,
    holdout: Holdout,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float = 0.001,
    weight_decay: float = 0.01,
    evaluate_every: int = 10,
    alignment: Alignment | None = None,
    first_selected: int = 1,
    seed: int = 0,
    on_epoch: Callable[[Progress], None] = lambda _: None,
) -> float:
    """Train as published; leave the best epoch in ``model`` and B_k and return its Recall@50."""
    pairs, evaluator = Pairs(data, seed), Evaluator(holdout)
    loader = DataLoader(pairs, batch_size=batch_size, shuffle=True, generator=pairs.generator)
    modules = [model] if alignment is None else [model, alignment.transformation]
    optimizers = [torch.optim.Adam(m.parameters(), lr=learning_rate) for m in modules]
    best, best_states = 0.0, [copy.deepcopy(m.state_dict()) for m in modules]
    started = time.perf_counter()
    for epoch in range(1, epochs + 1):
        pairs.draw()
        model.train()
        total = 0.0
        for batch in loader:
            loss = batch_loss(model, data, batch, weight_decay=weight_decay, alignment=alignment)
            for optimizer in optimizers:
                optimizer.zero_grad()
            torch.autograd.backward(loss)
            for optimizer in optimizers:
                optimizer.step()
            total += loss.item()
        recall = None
        if epoch % evaluate_every == 0:
            recall = evaluator.evaluate(model, data)
            if recall > best and epoch >= first_selected:
                best, best_states = recall, [copy.deepcopy(m.state_dict()) for m in modules]
        on_epoch(Progress(epoch, time.perf_counter() - started, total / len(loader), recall))
    for module, state in zip(modules, best_states, strict=True):
        module.load_state_dict(state)
    return best
