"""A consumer team's model: the task "item rating avg" of the paper's section 5.3.

Input is an item vector; the label says whether the item's mean rating is at least the median of
mean ratings at t_0. Only items with more than 10 ratings take part. The consumer is trained once,
on ver-0 vectors; whether it still works later is what backward compatibility is about.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchmetrics.functional.classification import binary_auroc

from backcast.errors import DataError
from trainer.data.dataset import Dataset

MORE_RATINGS_THAN = 10


@dataclass(frozen=True, eq=False)
class RatedItems:
    """Much-rated items and their mean ratings.

    Attributes:
        items: int64 (n,), item numbers.
        means: float64 (n,), mean ratings.
    """

    items: NDArray[np.int64]
    means: NDArray[np.float64]

    def labels(self, threshold: float) -> NDArray[np.bool_]:
        """Return bool (n,): whether the mean rating is at least ``threshold``."""
        return self.means >= threshold


def rated_items(dataset: Dataset, *, known_by: int, rated_until: int) -> RatedItems:
    """Return the items with more than 10 ratings by ``known_by``; means until ``rated_until``.

    Both are timestamps in seconds.

    Raises:
        DataError: there is no such item.
    """
    counts, _ = _ratings(dataset, known_by)
    items = np.flatnonzero(counts > MORE_RATINGS_THAN)
    if len(items) == 0:
        raise DataError(f"{dataset.folder}: no item has more than {MORE_RATINGS_THAN} ratings yet.")
    counts, sums = _ratings(dataset, rated_until)
    return RatedItems(items, sums[items] / counts[items])


def _ratings(dataset: Dataset, until: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    edges = dataset.edges_until(until)
    rated = np.flatnonzero(~np.isnan(dataset.ratings[:edges]))
    items, ratings = dataset.items[rated], dataset.ratings[rated].astype(np.float64)
    size = len(dataset.item_ids)
    counts, sums = np.bincount(items, minlength=size), np.bincount(items, ratings, minlength=size)
    return counts.astype(np.int64), sums.astype(np.float64)


@dataclass(frozen=True)
class ConsumerConfig:
    """How consumer models are trained."""

    hidden: int = 128
    dropout: float = 0.25
    epochs: int = 300
    learning_rate: float = 0.001
    seeds: tuple[int, ...] = (0, 1, 2)


class Consumer:
    """Consumer models trained once on vectors of one version, one per seed.

    Args:
        vectors: (n, D) float32, the inputs.
        labels: (n,) bool.
        config: how to train.
    """

    def __init__(
        self,
        vectors: NDArray[np.float32],
        labels: NDArray[np.bool_],
        config: ConsumerConfig | None = None,
    ) -> None:
        config = config or ConsumerConfig()
        self._models = [_train(vectors, labels, config, seed) for seed in config.seeds]

    def roc_auc(self, vectors: NDArray[np.float32], labels: NDArray[np.bool_]) -> float:
        """Return the mean ROC-AUC of the models on ``vectors`` (n, D) against ``labels`` (n,)."""
        return float(np.mean(self.roc_aucs(vectors, labels)))

    def roc_aucs(self, vectors: NDArray[np.float32], labels: NDArray[np.bool_]) -> Sequence[float]:
        """Return the ROC-AUC of each model, by seed."""
        x, y = torch.from_numpy(vectors), torch.from_numpy(labels)
        with torch.no_grad():
            # In float64: torchmetrics squashes logits, and in float32 large ones would tie.
            scores = [model(x).squeeze(1).double() for model in self._models]
        return [float(binary_auroc(score, y.long())) for score in scores]


def _train(
    vectors: NDArray[np.float32], labels: NDArray[np.bool_], config: ConsumerConfig, seed: int
) -> nn.Module:
    x, y = torch.from_numpy(vectors), torch.from_numpy(labels).to(torch.float32)
    with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
        torch.default_generator.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(x.shape[1], config.hidden),
            nn.BatchNorm1d(config.hidden),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, 1),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
        for _ in range(config.epochs):
            optimizer.zero_grad()
            loss = binary_cross_entropy_with_logits(model(x).squeeze(1), y)
            torch.autograd.backward(loss)
            optimizer.step()
    return model.eval()
