"""Node weights by which users and items have the same say in a fit.

There are more users than items, and their vectors vary more, so that a plain least-squares fit is
mostly about users; and much of what it explains is that users are not items. Consumers of item
vectors lose by that. Here each kind's error counts as a share of that kind's own variance.
"""

import torch
from torch import Tensor

_NEGLIGIBLE = 1e-9
"""The share of all variance up to which a kind's own may be rounding."""


def balanced_weights(z: Tensor, users: int) -> Tensor:
    """Return (n,), float64: w_n = 1 / (2 Σ_m ‖z_m − z̄‖²), over the nodes m of n's kind.

    So the weighted squares of the vectors' deviations from their kind's mean add up to 1, half of
    it from each kind. A kind of next to no variance is weighted by that of all nodes.

    Args:
        z: (n, D), users first.
        users: how many of the nodes are users.
    """
    z = z.to(torch.float64)
    everything = float(_squares(z).sum()) or 1.0
    parts = []
    for part in (z[:users], z[users:]):
        own = float(_squares(part).sum())
        known = own if own > _NEGLIGIBLE * everything else everything
        parts.append(part.new_full((len(part),), 0.5 / known))
    return torch.cat(parts)


def spread(z: Tensor, users: int, weights: Tensor) -> Tensor:
    """Return the weighted squares of deviations from the mean of each kind, added up: a scalar."""
    squares = torch.cat([_squares(part) for part in (z[:users], z[users:])])
    return torch.dot(weights.to(z), squares)


def _squares(z: Tensor) -> Tensor:
    deviations = z - z.mean(dim=0)
    return (deviations * deviations).sum(dim=1)
