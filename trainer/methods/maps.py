"""How the maps of version k come about once M_k is fixed."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from backcast.alignment import AlignmentLoss, BackwardTransformation, alignment_gram
from backcast.closed_form import least_squares, truncation, zero_padded_procrustes
from backcast.transforms import AffineMap
from trainer.balance import balanced_weights
from trainer.fitting import node_weights
from trainer.methods.base import Trained
from trainer.sampling import PairSampler
from trainer.step import Step

Maps = Mapping[int, AffineMap]
_PAIRS = 4096


@dataclass(frozen=True)
class JointlyTrained:
    """The map that was trained with M_k, as training left it."""

    def fit(self, step: Step, trained: Trained) -> Maps:
        """Return the map to the parent."""
        assert trained.joint_map is not None
        return _to_parent(step, trained.joint_map)


@dataclass(frozen=True)
class Truncated:
    """The first D_{k-1} coordinates of z_k, all of them at equal widths."""

    def fit(self, step: Step, trained: Trained) -> Maps:
        """Return the map to the parent."""
        width = trained.archived.model.width
        return _to_parent(step, truncation(width, step.target.shape[1]))


@dataclass(frozen=True)
class LeastSquares:
    """The closed-form optimum over all nodes, on vectors as served.

    Attributes:
        bias: fit an affine map.
        direct: fit a map to every older version whose model is still archived, not to the parent
            alone.
        balanced: users and items have the same say (see ``trainer.balance``).
        ridge: see :func:`backcast.closed_form.least_squares`.
    """

    bias: bool = False
    direct: bool = False
    balanced: bool = False
    ridge: float = 1e-4

    def fit(self, step: Step, trained: Trained) -> Maps:
        """Return the map to the parent, and the direct maps."""
        newer = step.known_vectors_of(trained.archived)
        wanted = step.ancestors if self.direct else step.ancestors[:1]
        models = {version: step.load(version) for version in wanted}
        return {
            version: self._fitted(newer, step.known_vectors_of(model), step.known_users)
            for version, model in models.items()
            if model is not None
        }

    def _fitted(
        self, newer: NDArray[np.float64], older: NDArray[np.float64], users: int
    ) -> AffineMap:
        weights = balanced_weights(torch.from_numpy(older), users) if self.balanced else None
        return least_squares(newer, older, bias=self.bias, ridge=self.ridge, weights=weights)


@dataclass(frozen=True)
class Procrustes:
    """The orthogonal map to the parent's vectors filled up with zeros."""

    def fit(self, step: Step, trained: Trained) -> Maps:
        """Return the map to the parent."""
        assert step.parent is not None
        parent = step.load(step.parent)
        assert parent is not None
        newer, older = step.known_vectors_of(trained.archived), step.known_vectors_of(parent)
        return _to_parent(step, zero_padded_procrustes(newer, older))


@dataclass(frozen=True)
class GradientFitted:
    """A linear map trained by gradient descent, as the paper's post-hoc rows are.

    The pairs, the optimizer and the loss are those of joint training with M_k left alone; the epoch
    is chosen, from the 51st on, by the least mean of the users' and the items' mean squared error
    against z_{k-1}, whatever the loss.
    """

    loss: Literal["single", "multi"]
    epochs: int = 200
    first_selected: int = 51

    def fit(self, step: Step, trained: Trained) -> Maps:
        """Return the map to the parent."""
        newer, target = step.vectors_of(trained.archived), step.target
        older = list(step.chain.values()) if self.loss == "multi" else []
        identity = torch.eye(target.shape[1], dtype=torch.float64)
        gram = alignment_gram([torch.from_numpy(m.weight) for m in older] or [identity])
        loss_of = AlignmentLoss(gram).to(step.device)
        config, split = step.config, step.split
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            chosen = BackwardTransformation(newer.shape[1], target.shape[1]).to(step.device)
        current, least = copy.deepcopy(chosen), torch.inf
        optimizer = torch.optim.Adam(current.parameters(), lr=0.001)
        generator = torch.Generator().manual_seed(config.seed)
        sampler = PairSampler(split.train, split.items, generator)
        for epoch in range(1, self.epochs + 1):
            for batch in sampler.epoch(min(config.batch_size, _PAIRS)):
                rows = [batch.users, batch.positives + split.users, batch.negatives + split.users]
                weights = node_weights(rows, len(newer)).to(step.device)
                optimizer.zero_grad()
                torch.autograd.backward(loss_of(current(newer), target, weights))
                optimizer.step()
            if epoch >= self.first_selected:
                with torch.no_grad():
                    squares = (current(newer) - target).square().mean(dim=1)
                users, items = squares[: split.users], squares[split.users :]
                error = float(users.mean() + items.mean()) / 2
                if error < least:
                    least, chosen = error, copy.deepcopy(current)
        return _to_parent(step, AffineMap(chosen.weight.detach().cpu().numpy()))


def _to_parent(step: Step, found: AffineMap) -> Maps:
    assert step.parent is not None
    return {step.parent: found}
