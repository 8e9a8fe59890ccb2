"""The training loop: BPR on the intended task, and alignment with the parent if there is one."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from backcast.alignment import AlignmentLoss, BackwardTransformation
from backcast.errors import InvalidInput
from trainer.config import TrainConfig
from trainer.graph import Graph
from trainer.model import GraphSAGE, embed
from trainer.ranking import recall_at_k
from trainer.sampling import Batch, PairSampler
from trainer.split import Edges, Holdout


@dataclass(frozen=True, eq=False)
class JointAlignment:
    """What M_k is aligned to while it is trained; only ``transformation`` is trained with it.

    Attributes:
        transformation: B_k.
        loss: the alignment loss, its Gram matrix made of the frozen older maps.
        target: z_{k-1}, (U + I, D_parent): M_{k-1} in evaluation mode on the training graph.
    """

    transformation: BackwardTransformation
    loss: AlignmentLoss
    target: Tensor


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
    """How training goes. ``alignment`` is before λ; ``recall`` is None between evaluations."""

    epoch: int
    epochs: int
    seconds: float
    loss: float
    alignment: float | None
    recall: float | None
    best_recall: float | None


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

    The epoch is chosen by Recall@50 on ``selection``; without one the last epoch stays.
    Deterministic for a given seed and number of threads on the CPU: pairs come from a generator
    seeded with ``config.seed``, and nothing else is drawn.
    """
    sampler = PairSampler(positives, graph.items, torch.Generator().manual_seed(config.seed))
    optimizers = _optimizers(model, joint, config.learning_rate)
    best = _Best(model, None if joint is None else joint.transformation)
    first_selected = min(config.first_selected_epoch, config.epochs // 2) if joint else 0
    started = time.perf_counter()
    for epoch in range(1, config.epochs + 1):
        losses = _epoch(model, graph, sampler, optimizers, joint, config)
        recall = None
        evaluate = epoch % config.evaluate_every == 0 or epoch == config.epochs
        if selection is not None and evaluate:
            recall = selection.recall(model)
            if epoch >= first_selected:
                best.offer(epoch, recall)
        if not math.isfinite(losses[0]):
            raise InvalidInput(
                f"Training diverged in epoch {epoch}: the loss is {losses[0]}. "
                "Lower learning_rate or alignment_weight; nothing was registered."
            )
        seconds = time.perf_counter() - started
        on_epoch(EpochReport(epoch, config.epochs, seconds, *losses, recall, best.recall))
    if best.recall is None:
        return FitResult(config.epochs, None, time.perf_counter() - started)
    best.restore()
    return FitResult(best.epoch, best.recall, time.perf_counter() - started)


def _optimizers(
    model: GraphSAGE, joint: JointAlignment | None, learning_rate: float
) -> list[torch.optim.Optimizer]:
    modules: list[nn.Module] = [model] if joint is None else [model, joint.transformation]
    return [torch.optim.Adam(module.parameters(), lr=learning_rate) for module in modules]


def _epoch(
    model: GraphSAGE,
    graph: Graph,
    sampler: PairSampler,
    optimizers: list[torch.optim.Optimizer],
    joint: JointAlignment | None,
    config: TrainConfig,
) -> tuple[float, float | None]:
    """Run one epoch; return the mean loss and the mean alignment loss over its batches."""
    model.train()
    totals, batches = torch.zeros(2), 0
    for batch in sampler.epoch(config.batch_size):
        rows = _rows(batch, graph)
        z = model(graph)  # (U + I, D_k)
        # Not z[index]: its backward pass adds up in parallel, in an order that changes every time.
        parts = [z.index_select(0, index) for index in rows]  # (b, D_k) each
        intended = bpr_loss(*parts, weight_decay=config.weight_decay)
        alignment = z.new_zeros(())
        if joint is not None:
            for part, index in zip(parts, rows, strict=True):
                alignment = alignment + joint.loss(joint.transformation(part), joint.target[index])
        loss = intended + config.alignment_weight * alignment
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        totals += torch.stack([loss.detach(), alignment.detach()]).cpu()
        batches += 1
    mean_loss, mean_alignment = (totals / batches).tolist()
    return mean_loss, None if joint is None else mean_alignment


def _rows(batch: Batch, graph: Graph) -> list[Tensor]:
    device = graph.adjacency.mean_of.device
    offsets = (0, graph.users, graph.users)
    numbers = (batch.users, batch.positives, batch.negatives)
    return [n.to(device) + offset for n, offset in zip(numbers, offsets, strict=True)]


def bpr_loss(users: Tensor, positives: Tensor, negatives: Tensor, *, weight_decay: float) -> Tensor:
    """Return the BPR loss with the decay of the output vectors that the authors use.

    mean softplus(u·n − u·p) + weight_decay · ½ (‖u‖² + ‖p‖² + ‖n‖²) / b, over b rows.

    Shapes:
        users, positives, negatives (b, D); the result is a scalar.
    """
    margin = (users * positives).sum(dim=1) - (users * negatives).sum(dim=1)  # (b,)
    squares = sum(part.square().sum() for part in (users, positives, negatives))
    return softplus(-margin).mean() + weight_decay * 0.5 * squares / len(users)


class _Best:
    """The best epoch so far, kept as a copy of the weights."""

    def __init__(self, *modules: nn.Module | None) -> None:
        self._modules = [module for module in modules if module is not None]
        self._states: list[dict[str, Any]] = []
        self.epoch = 0
        self.recall: float | None = None

    def offer(self, epoch: int, recall: float) -> None:
        if self.recall is None or recall > self.recall:
            self.epoch, self.recall = epoch, recall
            self._states = [copy.deepcopy(module.state_dict()) for module in self._modules]

    def restore(self) -> None:
        for module, state in zip(self._modules, self._states, strict=True):
            module.load_state_dict(state)
