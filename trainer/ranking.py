"""Recall@K of a user–item ranking by dot product."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.split import Edges, Holdout

_SCORES_AT_ONCE = 1 << 24


def recall_at_k(users: Tensor, items: Tensor, holdout: Holdout, k: int = 50) -> float:
    """Return Recall@K on the targets of ``holdout``.

    For each user with targets, all items known at the horizon are ranked by raw score, but for
    those the user has visible edges with; the hits among the first K, over the number of its
    targets, are averaged over users. Score = dot product.

    Args:
        users: (≥ U, D) vectors of the users of the holdout.
        items: (≥ I, D) vectors of its items.
        holdout: what is visible, what is to be predicted, and how many items compete.
        k: length of the list; all items where there are fewer.
    """
    target_keys = _keys(holdout.targets, holdout.items)
    ranked_users, target_counts = np.unique(target_keys // holdout.items, return_counts=True)
    candidates = items[: holdout.items]
    rows_at_once = max(1, _SCORES_AT_ONCE // holdout.items)
    targets = torch.from_numpy(target_keys).to(users.device)
    visible = _keys(holdout.visible, holdout.items)
    hits = []
    for start in range(0, len(ranked_users), rows_at_once):
        numbers = ranked_users[start : start + rows_at_once]
        chunk = torch.from_numpy(numbers).to(users.device)
        scores = users[chunk] @ candidates.T  # (c, I)
        rows, columns = _positions(numbers, visible, holdout.items)
        scores[torch.from_numpy(rows), torch.from_numpy(columns)] = -torch.inf
        best = scores.topk(min(k, holdout.items), dim=1)  # (c, K)
        found = torch.isin(chunk[:, None] * holdout.items + best.indices, targets)
        found &= best.values > -torch.inf  # a long list reaches those that are not ranked
        hits.append(found.sum(dim=1).cpu())
    recalls = torch.cat(hits).to(torch.float64) / torch.from_numpy(target_counts)
    return float(recalls.mean())


def _keys(edges: Edges, items: int) -> NDArray[np.int64]:
    return np.unique(edges.users * items + edges.items)


def _positions(
    numbers: NDArray[np.int64],
    keys: NDArray[np.int64],
    items: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where the sorted ``keys`` lie in the score matrix of the sorted user ``numbers``."""
    starts = np.searchsorted(keys, numbers * items)
    stops = np.searchsorted(keys, (numbers + 1) * items)
    rows = np.repeat(np.arange(len(numbers)), stops - starts)
    inside = np.concatenate([keys[a:b] for a, b in zip(starts, stops, strict=True)])
    return rows, inside % items
