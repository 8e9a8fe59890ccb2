"""Growing a model out of a smaller one, so that it begins with what the smaller one knows.

The way is that of Net2Net (Chen, Goodfellow and Shlens, ICLR 2016): a function-preserving start. A
wider model has the parent's units, which see nothing of the new ones, beside freshly initialised
ones, which see everything. A deeper one has more layers before the last one: what comes in has
passed a ReLU, so that the identity, followed by ReLU, passes it on.
"""

from typing import cast

import torch
from torch import Tensor

from trainer.archive import ArchivedModel
from trainer.features import Vocabulary
from trainer.graph import Graph
from trainer.model import GraphSAGE, set_statistics


def can_grow(model: GraphSAGE, parent: GraphSAGE) -> bool:
    """Tell whether ``model`` can begin as ``parent``.

    It has to be at least as wide and as deep. A parent of one layer grows no deeper: nothing in it
    has passed a ReLU.
    """
    return model.width >= parent.width and (
        model.layers == parent.layers or model.layers > parent.layers > 1
    )


@torch.no_grad()
def grow(model: GraphSAGE, vocabulary: Vocabulary, parent: ArchivedModel, graph: Graph) -> None:
    """Let ``model``, freshly initialised, begin as ``parent``: z_k starts with z_{k-1}.

    The first D_{k-1} coordinates are then the parent's, up to what changes around them: BatchNorm
    takes its statistics from the new graph; values that the parent did not know count as zero where
    it left them out of an item's mean; and values that M_k knows no more are gone.

    Args:
        model: M_k, for which :func:`can_grow` holds.
        vocabulary: that of M_k.
        parent: M_{k-1}.
        graph: the training graph of M_k.
    """
    old, width = parent.model, parent.model.width
    model.user[:width] = old.user
    for name, values in vocabulary.values.items():
        table = model.table(name)
        table[:, :width] = 0.0
        number = parent.vocabulary.numbers(name)
        kept = [(at, number[value]) for at, value in enumerate(values) if value in number]
        for row, parents_row in kept:
            table[row, :width] = old.table(name)[parents_row]
    for convolution, _ in model.stack:
        messages, own = convolution.lin_l, convolution.lin_r
        for weight in (messages.weight, messages.bias, own.weight):
            weight[:width] = 0.0
    *first, last = model.stack
    added = first[old.layers - 1 :]
    for (convolution, norm), (copied, copied_norm) in zip(
        [*first[: old.layers - 1], last], old.stack, strict=True
    ):
        convolution.lin_l.weight[:width, :width] = copied.lin_l.weight
        convolution.lin_l.bias[:width] = copied.lin_l.bias
        convolution.lin_r.weight[:width, :width] = copied.lin_r.weight
        norm.weight[:width] = copied_norm.weight
        norm.bias[:width] = copied_norm.bias
    for convolution, norm in added:
        convolution.lin_r.weight[:width, :width] = torch.eye(width, device=model.user.device)
        set_statistics(model, graph)
        mean, variance = cast("Tensor", norm.running_mean), cast("Tensor", norm.running_var)
        norm.weight[:width] = (variance[:width] + norm.eps).sqrt()
        norm.bias[:width] = mean[:width]
    set_statistics(model, graph)


@torch.no_grad()
def renew(model: GraphSAGE, fresh: GraphSAGE, kept: float, graph: Graph) -> None:
    """Shrink what ``model`` has learnt and perturb it: θ ← kept · θ + (1 - kept) · fresh.

    A model that goes on from old weights learns less from new data than one that starts anew; this
    gives it room to (Ash and Adams, On Warm-Starting Neural Network Training, NeurIPS 2020).

    Args:
        model: a grown model; it is changed.
        fresh: a freshly initialised model of the same architecture and vocabulary.
        kept: between 0, as good as fresh, and 1, no change.
        graph: the training graph, for BatchNorm's statistics.
    """
    for weight, new in zip(model.parameters(), fresh.parameters(), strict=True):
        weight.lerp_(new, 1.0 - kept)
    set_statistics(model, graph)
