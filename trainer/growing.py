"""Growing a model out of a smaller one, so that it begins with all that the smaller one knows.

The way is that of Net2Net (Chen, Goodfellow and Shlens, ICLR 2016): a function-preserving start. A
wider model has the parent's units, which see nothing of the new ones, beside freshly initialised
ones, which see everything. A deeper one has more layers at the end that pass the parent's vectors
on: they are lifted above zero, where ReLU is the identity, and lowered again by the last BatchNorm.
"""

from typing import cast

import torch
from torch import Tensor

from trainer.archive import ArchivedModel
from trainer.features import Vocabulary
from trainer.graph import Graph
from trainer.model import GraphSAGE, set_statistics


def can_grow(model: GraphSAGE, parent: GraphSAGE) -> bool:
    """Tell whether ``model`` is at least as wide and as deep as ``parent``."""
    return model.width >= parent.width and model.layers >= parent.layers


@torch.no_grad()
def grow(
    model: GraphSAGE, vocabulary: Vocabulary, parent: ArchivedModel, z: Tensor, graph: Graph
) -> None:
    """Let ``model``, freshly initialised, begin as ``parent``: z_k starts with z_{k-1}.

    The first D_{k-1} coordinates are then the parent's, up to what changes around them: BatchNorm
    takes its statistics from the new graph; values that the parent did not know count as zero where
    it left them out of an item's mean; and values that M_k knows no more are gone.

    Args:
        model: M_k, for which :func:`can_grow` holds.
        vocabulary: that of M_k.
        parent: M_{k-1}.
        z: z_{k-1}, the parent's vectors on ``graph``, (U + I, D_{k-1}).
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
    for at, (convolution, norm) in enumerate(model.stack):
        messages, own = convolution.lin_l, convolution.lin_r
        for weight in (messages.weight, messages.bias, own.weight):
            weight[:width] = 0.0
        if at < old.layers:
            copied, copied_norm = old.stack[at]
            messages.weight[:width, :width] = copied.lin_l.weight
            messages.bias[:width] = copied.lin_l.bias
            own.weight[:width, :width] = copied.lin_r.weight
            norm.weight[:width] = copied_norm.weight
            norm.bias[:width] = copied_norm.bias
        else:
            own.weight[:width, :width] = torch.eye(width, device=z.device)
    if model.layers > old.layers:
        _pass_on(model, old.layers, z, graph)
    set_statistics(model, graph)


def _pass_on(model: GraphSAGE, first: int, z: Tensor, graph: Graph) -> None:
    """Make the layers from ``first`` on the identity on z, lifted so far that none is below 0."""
    width = z.shape[1]
    lift = z.std(dim=0) - z.min(dim=0).values + 1e-3  # at 0 itself ReLU passes no gradient on
    norms = [norm for _, norm in model.stack]
    norms[first - 1].bias[:width] += lift
    for norm in norms[first:]:
        set_statistics(model, graph)
        mean, variance = cast("Tensor", norm.running_mean), cast("Tensor", norm.running_var)
        norm.weight[:width] = (variance[:width] + norm.eps).sqrt()
        norm.bias[:width] = mean[:width]
    norms[-1].bias[:width] -= lift
