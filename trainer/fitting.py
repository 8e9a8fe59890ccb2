"""The training loop: BPR on the intended task, and alignment with the parent if there is one."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from backcast.errors import InvalidInput
from trainer.config import TrainConfig
from trainer.graph import Graph
from trainer.model import GraphSAGE, embed, set_statistics
from trainer.ranking import recall_at_k
from trainer.sampling import PairSampler
from trainer.split import Edges, Holdout


@dataclass(frozen=True, eq=False)
class JointAlignment:
    """What M_k is aligned to while it is trained; only ``transformation`` is trained with it.

    Attributes:
        transformation: B_k, (N, D_k) to (N, T).
        loss: the alignment loss, of B_k(z_k), ``target`` and the nodes' weights.
        target: (U + I, T), of older models in evaluation mode on the training graph: z_{k-1}, or
            the principal components of several versions.
        weights: how much each node counts, (U + I,); None to average over each batch's users,
            positives and negatives, and add up the three, as published.
    """

    transformation: nn.Module
    loss: Callable[[Tensor, Tensor, Tensor], Tensor]
    target: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Selection:
    """Where the best epoch is chosen: a holdout, and the graph its predictions are made on."""

    holdout: Holdout
    graph: Graph

    def recall(self, model: GraphSAGE) -> float:
        """Return Recall@50 of ``model`` on the holdout."""
        return recall_at_k(*embed(model, self.graph), self.holdout)


@dataclass(frozen=True)
class EpochReport:
    """How training goes. ``alignment`` is before λ; ``recall`` is None between evaluations.

    ``kept`` are M_k, and B_k if there is one; where there is a recall, as they were evaluated.
    """

    epoch: int
    epochs: int
    seconds: float
    loss: float
    alignment: float | None
    recall: float | None
    best_recall: float | None
    kept: Sequence[nn.Module]


PAPER_LAMBDA = 16.0
OnEpoch = Callable[[EpochReport], None]


@dataclass(frozen=True)
class FitResult:
    """Which epoch the model was left at, and its Recall@50 on the selection holdout."""

    epoch: int
    recall: float | None
    seconds: float


def fit(
    model: GraphSAGE,
    graph: Graph,
    positives: Edges,
    config: TrainConfig,
    *,
    joint: JointAlignment | None,
    selection: Selection | None,
    on_epoch: OnEpoch,
) -> FitResult:
    """Minimise L_k(M_k) + λ L_align(B_k ∘ M_k, M_{k-1}) and leave the best epoch in ``model``.

    With ``config.averaging`` what is evaluated and left is the average of the weights along the
    way (:class:`WeightAverage`). The epoch is chosen by Recall@50 on ``selection``, not before
    :func:`first_selected`; without one the last epoch stays. With ``config.patience`` training ends
    when an evaluation comes that many epochs after the best one.
    Deterministic for a given seed and number of threads on the CPU: pairs come from a generator
    seeded with ``config.seed``, and nothing else is drawn.
    """
    sampler = PairSampler(positives, graph.items, torch.Generator().manual_seed(config.seed))
    optimizers = _optimizers(model, joint, config)
    trained = nn.ModuleList([model] if joint is None else [model, joint.transformation])
    average = WeightAverage(trained) if config.averaging else None
    kept = trained if average is None else average.modules
    best = _Best(kept)
    first = first_selected(config, joined=joint is not None)
    started = time.perf_counter()
    for epoch in range(1, config.epochs + 1):
        losses = _epoch(model, graph, sampler, optimizers, joint, config, average)
        if not math.isfinite(losses[0]):
            raise InvalidInput(
                f"Training diverged in epoch {epoch}: the loss is {losses[0]}. "
                "Lower learning_rate or alignment_weight; nothing was registered."
            )
        recall = None
        evaluate = epoch % config.evaluate_every == 0 or epoch == config.epochs
        if selection is not None and evaluate:
            if average is not None:
                average.normalise(graph)
            recall = selection.recall(cast("GraphSAGE", kept[0]))
            if epoch >= first:
                best.offer(epoch, recall)
        seconds = time.perf_counter() - started
        report = EpochReport(
            epoch, config.epochs, seconds, *losses, recall, best.recall, tuple(kept)
        )
        on_epoch(report)
        waited = epoch - best.epoch if recall is not None and best.recall is not None else 0
        if waited >= (config.patience or math.inf):
            break
    if best.recall is not None:
        best.restore(trained)
    elif average is not None:
        average.normalise(graph)
        trained.load_state_dict(kept.state_dict())
    epoch = config.epochs if best.recall is None else best.epoch
    return FitResult(epoch, best.recall, time.perf_counter() - started)


def first_selected(config: TrainConfig, *, joined: bool) -> int:
    """Return the first epoch that may be selected, of a fit that trains a map or does not."""
    if config.averaging:
        return min(config.first_selected_epoch, config.epochs * 3 // 4)
    return min(config.first_selected_epoch, config.epochs // 2) if joined else 0


def _optimizers(
    model: GraphSAGE, joint: JointAlignment | None, config: TrainConfig
) -> list[torch.optim.Optimizer]:
    modules: list[nn.Module] = [model] if joint is None else [model, joint.transformation]
    trained = [list(module.parameters()) for module in modules]
    return [
        torch.optim.Adam(
            weights, lr=config.learning_rate, betas=(0.9, config.adam_beta2), fused=True
        )
        for weights in trained
        if weights
    ]


def _epoch(
    model: GraphSAGE,
    graph: Graph,
    sampler: PairSampler,
    optimizers: Sequence[torch.optim.Optimizer],
    joint: JointAlignment | None,
    config: TrainConfig,
    average: "WeightAverage | None",
) -> tuple[float, float | None]:
    """Run one epoch; return the mean loss and the mean alignment loss over its batches."""
    model.train()
    device = model.user.device
    lam = PAPER_LAMBDA if config.alignment_weight is None else config.alignment_weight
    totals, batches = torch.zeros(2, device=device), 0
    for batch in sampler.epoch(config.batch_size):
        rows = [batch.users, batch.positives + graph.users, batch.negatives + graph.users]
        rows = [numbers.to(device, non_blocking=True) for numbers in rows]
        weights = node_weights(rows, graph.users + graph.items)
        z = model(graph)  # (U + I, D_k)
        loss = bpr_loss(z, *rows, weights=weights, weight_decay=config.weight_decay)
        alignment = z.new_zeros(())
        if joint is not None:
            nodes = weights if joint.weights is None else joint.weights
            alignment = joint.loss(joint.transformation(z), joint.target, nodes)
            loss = loss + lam * alignment
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.autograd.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        if average is not None:
            average.update()
        totals += torch.stack([loss.detach(), alignment.detach()])
        batches += 1
    mean_loss, mean_alignment = (totals / batches).tolist()
    return mean_loss, None if joint is None else mean_alignment


def node_weights(rows: Sequence[Tensor], nodes: int) -> Tensor:
    """Return float32 (nodes,): how often a node is a user, a positive or a negative, over b.

    What is averaged over the pairs' users, their positives and their negatives, and added up, is
    the same sum over nodes with these weights, each node looked at once.
    """
    counts = torch.bincount(torch.cat(list(rows)), minlength=nodes)
    return counts.to(torch.float32) / len(rows[0])


def bpr_loss(
    z: Tensor,
    users: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    weights: Tensor,
    weight_decay: float,
) -> Tensor:
    """Return the BPR loss with the decay of the output vectors that the authors use.

    mean softplus(u·n − u·p) + weight_decay · ½ (‖u‖² + ‖p‖² + ‖n‖²) / b, over b pairs.

    Shapes:
        z (N, D); users, positives, negatives int64 (b,), rows of z; weights (N,), from
        :func:`node_weights`; the result is a scalar.
    """
    # Not z[users]: its backward pass adds up in parallel, in an order that changes every time.
    difference = z.index_select(0, positives) - z.index_select(0, negatives)  # (b, D)
    margin = (z.index_select(0, users) * difference).sum(dim=1)  # (b,)
    squares = torch.dot(weights, torch.linalg.vecdot(z, z))
    return softplus(-margin).mean() + weight_decay * 0.5 * squares


class WeightAverage:
    """The average of weights along the way of training, most of it from the last tenth of it.

    w̄_t = w̄_{t-1} + 10/(t + 9) · (w_t − w̄_{t-1}), polynomial-decay averaging with η = 9 (Shamir
    and Zhang, ICML 2013). It does away with most of the noise that a large learning rate leaves.

    Args:
        trained: what is trained; a GraphSAGE first.
    """

    def __init__(self, trained: nn.ModuleList) -> None:
        # What is not trained, such as a target for all nodes, is shared and not copied.
        fixed = [m for m in trained if next(m.parameters(), None) is None]
        shared = {id(buffer): buffer for module in fixed for buffer in module.buffers()}
        self.modules = copy.deepcopy(trained, shared)
        self._steps = 0
        self._from: list[Tensor] = list(trained.parameters())
        self._to: list[Tensor] = list(self.modules.parameters())

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self._steps += 1
        for average, weight in zip(self._to, self._from, strict=True):
            average.lerp_(weight, 10.0 / (self._steps + 9.0))

    def normalise(self, graph: Graph) -> None:
        """Set BatchNorm's statistics, which no average of weights gives, to those of ``graph``."""
        set_statistics(cast("GraphSAGE", self.modules[0]), graph)


class _Best:
    """The best epoch so far, kept as a copy of the weights."""

    def __init__(self, kept: nn.Module) -> None:
        self._kept = kept
        self._state: dict[str, Any] = {}
        self.epoch = 0
        self.recall: float | None = None

    def offer(self, epoch: int, recall: float) -> None:
        if self.recall is None or recall > self.recall:
            self.epoch, self.recall = epoch, recall
            self._state = copy.deepcopy(self._kept.state_dict())

    def restore(self, to: nn.Module) -> None:
        to.load_state_dict(self._state)
