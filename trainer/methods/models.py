"""How M_k comes about."""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from backcast.alignment import (
    AlignmentLoss,
    BackwardTransformation,
    LeastSquaresHead,
    alignment_gram,
)
from backcast.closed_form import truncation
from backcast.transforms import AffineMap
from trainer.archive import ArchivedModel
from trainer.balance import balanced_weights, spread
from trainer.features import Vocabulary
from trainer.fitting import PAPER_LAMBDA, FitResult, JointAlignment, fit
from trainer.graph import Graph
from trainer.growing import can_grow, grow, renew
from trainer.methods.base import Trained
from trainer.model import GraphSAGE
from trainer.step import Step

_KEPT = 0.75
"""How much of the parent's weights a grown model begins with."""


@dataclass(frozen=True)
class Independent:
    """M_k from scratch, on the intended task alone."""

    default_lambda = None

    def train(self, step: Step) -> Trained:
        """Train M_k."""
        model = step.new_model()
        return _fit(step, model, step.vocabulary, joint=None)


@dataclass(frozen=True)
class Frozen:
    """Always the first model, for every k."""

    default_lambda = None

    def train(self, step: Step) -> Trained:
        """Return the parent's model as it is."""
        return Trained(_parent(step), None, FitResult(0, None, 0.0))


@dataclass(frozen=True)
class FineTuned:
    """M_k is M_{k-1}, its architecture and vocabulary included, trained on for half as long."""

    default_lambda = None

    def train(self, step: Step) -> Trained:
        """Train on from the parent's weights."""
        parent = _parent(step)
        model = copy.deepcopy(parent.model).to(step.device).requires_grad_(True)
        epochs = max(1, step.config.epochs // 2)
        return _fit(step, model, parent.vocabulary, joint=None, epochs=epochs)


@dataclass(frozen=True)
class Joint:
    """M_k trained together with its map: L_k(M_k) + λ L_align(B_k ∘ M_k, M_{k-1}).

    Attributes:
        loss: the alignment loss counts the error in z̃_{k-1} alone ("single"), or in every older
            version that it is passed on to ("multi", the paper's Eq. 10).
        transformation: B_k is a trained matrix ("linear"), one with a bias ("affine"), or the first
            D_{k-1} coordinates ("truncation").
    """

    loss: Literal["single", "multi"] = "multi"
    transformation: Literal["linear", "affine", "truncation"] = "linear"

    default_lambda = PAPER_LAMBDA

    def train(self, step: Step) -> Trained:
        """Train M_k and B_k."""
        model, target = step.new_model(), step.target
        transformation = self._transformation(step, model.width, target.shape[1])
        gram = alignment_gram(self._older(step, target.shape[1]))
        loss = AlignmentLoss(gram).to(step.device)
        joint = JointAlignment(transformation.to(step.device), loss, target)
        return _fit(step, model, step.vocabulary, joint=joint)

    def _transformation(self, step: Step, dim: int, parent_dim: int) -> nn.Module:
        if self.transformation == "truncation":
            return Truncation(dim, parent_dim)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(step.config.seed)
            return BackwardTransformation(dim, parent_dim, bias=self.transformation == "affine")

    def _older(self, step: Step, parent_dim: int) -> list[Tensor]:
        if self.loss == "single":
            return [torch.eye(parent_dim, dtype=torch.float64)]
        return [torch.from_numpy(older.weight) for older in step.chain.values()]


@dataclass(frozen=True)
class JointSolved:
    """M_k trained so that older vectors stay linear functions of z_k: no map is trained.

    The alignment loss is what the least-squares affine map from z_k, solved anew in every step (see
    ``backcast.alignment.LeastSquaresHead``), leaves unexplained: the squared errors as a share of
    the older vectors' variance within users and within items, with the same weight for both (see
    ``trainer.balance``). So λ does not depend on the scale of either version's vectors.

    Attributes:
        all_versions: to every older version whose model is archived, on average; otherwise to the
            parent alone.
        grown: M_k begins near the parent (see ``trainer.growing``), not from scratch, where it is
            at least as wide and as deep.
    """

    all_versions: bool = False
    grown: bool = False

    @property
    def default_lambda(self) -> float:
        """Less where M_k begins with the older vectors inside."""
        return 0.2 if self.grown else 0.5

    def train(self, step: Step) -> Trained:
        """Train M_k; its maps are to be fitted afterwards."""
        versions = step.ancestors if self.all_versions else step.ancestors[:1]
        older = [z for version in versions if (z := step.older(version)) is not None]
        parents, users = older[0], step.split.users
        weights = balanced_weights(parents, users).to(parents)
        scaled = [z / spread(z, users, weights).clamp_min(1e-12).sqrt() for z in older]
        target = principal(torch.cat(scaled, dim=1) / len(scaled) ** 0.5, weights)
        # Now the weighted sum of the squared lengths of the nodes' errors is that share.
        head = LeastSquaresHead(target, weights=weights)
        joint = JointAlignment(head, _squared_error, target, weights)
        model, parent = step.new_model(), _parent(step)
        graph = step.training_graph(step.vocabulary)
        if self.grown and can_grow(model, parent.model):
            grow(model, step.vocabulary, parent, graph)
            renew(model, step.new_model(), _KEPT, graph)
        return _fit(step, model, step.vocabulary, joint=joint, graph=graph)


def _squared_error(mapped: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    error = mapped - target
    return torch.dot(weights, torch.linalg.vecdot(error, error))


def principal(y: Tensor, weights: Tensor, negligible: float = 1e-4) -> Tensor:
    """Return the weighted principal components of ``y``, (n, T), as (n, ≤ T).

    Versions that are aligned say much the same thing, so far fewer columns hold all of it. A
    rotation changes no length, and those left out have, together, a negligible share of the
    variance.
    """
    y = y - (weights @ y) / weights.sum()
    covariance = ((y * weights[:, None]).T @ y).to(torch.float64)  # (T, T)
    variances, axes = torch.linalg.eigh(covariance)
    left_out = variances.cumsum(0) <= negligible * variances.sum()
    kept: Tensor = axes[:, ~left_out].to(y)
    return y @ kept


class Truncation(nn.Module):
    """The first ``parent_dim`` of ``dim`` coordinates; nothing is trained."""

    def __init__(self, dim: int, parent_dim: int) -> None:
        super().__init__()
        self.parent_dim = parent_dim
        truncation(dim, parent_dim)

    def forward(self, z: Tensor) -> Tensor:
        """Map (..., dim) to (..., parent_dim)."""
        return z[..., : self.parent_dim]


def _fit(
    step: Step,
    model: GraphSAGE,
    vocabulary: Vocabulary,
    *,
    joint: JointAlignment | None,
    epochs: int | None = None,
    graph: Graph | None = None,
) -> Trained:
    config = step.config if epochs is None else step.config.model_copy(update={"epochs": epochs})
    result = fit(
        model,
        graph or step.training_graph(vocabulary),
        step.split.train,
        config,
        joint=joint,
        selection=step.selection(vocabulary),
        on_epoch=step.on_epoch,
    )
    archived = ArchivedModel(model.eval().requires_grad_(False), vocabulary)
    joint_map = None if joint is None else _map_of(joint.transformation, model)
    return Trained(archived, joint_map, result)


def _map_of(transformation: nn.Module, model: GraphSAGE) -> AffineMap | None:
    if isinstance(transformation, BackwardTransformation):
        weight, bias = transformation.weight, transformation.bias
        return AffineMap(
            weight.detach().cpu().numpy(), None if bias is None else bias.detach().cpu().numpy()
        )
    if isinstance(transformation, Truncation):
        return truncation(model.width, transformation.parent_dim)
    return None


def _parent(step: Step) -> ArchivedModel:
    assert step.parent is not None
    parent = step.load(step.parent)
    assert parent is not None
    return parent
