"""Alignment of a new embedding model with its parent, for any PyTorch training loop.

Notation of Hu et al., "Learning Backward Compatible Embeddings" (KDD 2022): version k has vectors
z_k of dimension D_k, B_k(z) = W_k z leads back to version k-1, and W_{k-1}^j, of shape
(D_j, D_{k-1}), is the composition of the older maps back to version j.

    transformation = BackwardTransformation(D_k, D_parent)
    alignment = AlignmentLoss(alignment_gram(older_maps))
    loss = intended_loss + lam * alignment(transformation(z_k), z_parent)
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from backcast.closed_form import node_shares
from backcast.errors import DimensionMismatch, InvalidInput


class BackwardTransformation(nn.Module):
    """B_k: z ↦ W z (+ b), from D_k back to D_parent.

    Args:
        dim: D_k.
        parent_dim: D_parent.
        bias: learn b of shape (D_parent,) too. The paper's map has none.

    Shapes:
        input (..., D_k), output (..., D_parent), ``weight`` (D_parent, D_k).
    """

    def __init__(self, dim: int, parent_dim: int, *, bias: bool = False) -> None:
        super().__init__()
        self._linear = nn.Linear(dim, parent_dim, bias=bias)

    @property
    def weight(self) -> Tensor:
        """W_k, (D_parent, D_k)."""
        return self._linear.weight

    @property
    def bias(self) -> Tensor | None:
        """b_k, (D_parent,), or None."""
        return self._linear.bias

    def forward(self, z: Tensor) -> Tensor:
        """Map ``z`` of shape (..., D_k) to (..., D_parent)."""
        mapped: Tensor = self._linear(z)
        return mapped


class LeastSquaresHead(nn.Module):
    """B_k solved anew in every pass: the affine least-squares map of the vectors at hand.

    The alignment loss then says how much of z_{k-1} is not a linear function of z_k, whatever the
    scale of its coordinates, and the map needs no training. The solution is taken as a constant
    for the gradient: at the optimum its own gradient is zero, but for the ridge.

    Args:
        target: y, (n, D_parent), what z is mapped to, row by row.
        weights: how much each row counts, (n,), 0 or more; None for all the same.
        ridge: ρ as a share of the mean variance of z's coordinates.

    Shapes:
        input (n, D_k), output (n, D_parent). There are no parameters.

    Raises:
        DimensionMismatch: the numbers of rows differ. InvalidInput: a weight is negative or not
            finite, or all are 0.
    """

    target: Tensor
    share: Tensor

    def __init__(
        self, target: Tensor, *, weights: Tensor | None = None, ridge: float = 1e-4
    ) -> None:
        super().__init__()
        share = node_shares(None if weights is None else weights.cpu().numpy(), len(target))
        self.register_buffer("target", target, persistent=False)
        self.register_buffer("share", torch.from_numpy(share).to(target), persistent=False)
        self.ridge = ridge

    def forward(self, z: Tensor) -> Tensor:
        """Map ``z`` by the least-squares solution for it."""
        if len(z) != len(self.target):
            raise DimensionMismatch("vectors", f"({len(self.target)}, D_k)", tuple(z.shape))
        with torch.no_grad():
            x_mean, y_mean = self.share @ z, self.share @ self.target
            x = z - x_mean
            weighted = (x * self.share[:, None]).T  # (D_k, n)
            covariance = (weighted @ x).to(torch.float64)  # (D_k, D_k)
            scale = covariance.diagonal().mean()
            covariance.diagonal().add_(torch.where(scale > 0.0, self.ridge * scale, 1.0))
            moments = (weighted @ (self.target - y_mean)).to(torch.float64)  # (D_k, D_parent)
            # Unlike solve, solve_ex does not make the CPU wait for a GPU to look for errors.
            solved = torch.linalg.solve_ex(covariance, moments)[0].to(z.dtype)
            shift = y_mean - x_mean @ solved
        return torch.addmm(shift, z, solved)


def alignment_gram(weights: Iterable[Tensor]) -> Tensor:
    """Return G = (1/k) Σ_j (1/D_j) (W_{k-1}^j)ᵀ W_{k-1}^j, the loss as one quadratic form.

    The multi-step loss (the paper's Eq. 10) is, for one node and δ = B_k(z_k) − z_{k-1}, the mean
    over the k steps j = 0..k-1 of ‖W_{k-1}^j δ‖². The authors' code takes the mean over the D_j
    dimensions in place of the sum, and λ = 16 belongs to that scaling, so each term is divided by
    D_j here. Summed into G once, δᵀ G δ costs the same whatever k is.

    The single-step loss is the same with one weight, the identity: G = I / D_{k-1}.

    Args:
        weights: the k composed weights W_{k-1}^j, each (D_j, D_{k-1}); the identity, for
            j = k-1, is one of them.

    Returns:
        (D_{k-1}, D_{k-1}) float64, symmetric, positive semi-definite.

    Raises:
        InvalidInput: no weight is given. DimensionMismatch: the numbers of columns differ.
    """
    weights = [w.detach().to(torch.float64) for w in weights]
    if not weights:
        raise InvalidInput("The alignment loss needs at least one map: the identity.")
    dim = weights[0].shape[-1] if weights[0].ndim else 0
    gram = torch.zeros(dim, dim, dtype=torch.float64, device=weights[0].device)
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != dim:
            raise DimensionMismatch("weight of an older map", f"(D_j, {dim})", tuple(weight.shape))
        gram += weight.T @ weight / weight.shape[0]
    return gram / len(weights)


class AlignmentLoss(nn.Module):
    """Weighted sum, or mean, over nodes of δᵀ G δ, with δ = B_k(z_k) − z_{k-1}.

    Args:
        gram: (D_{k-1}, D_{k-1}), from :func:`alignment_gram`.

    Shapes:
        mapped and target (n, D_{k-1}), weights (n,) or None for the mean; the result is a scalar.
        No gradient flows into ``target``.
    """

    gram: Tensor

    def __init__(self, gram: Tensor) -> None:
        super().__init__()
        self.register_buffer("gram", gram.to(torch.get_default_dtype()))

    def forward(self, mapped: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the alignment loss of ``mapped`` = B_k(z_k) against ``target`` = z_{k-1}."""
        if mapped.shape != target.shape or mapped.shape[-1] != len(self.gram):
            raise DimensionMismatch(
                "mapped and target", f"(n, {len(self.gram)})", (mapped.shape, target.shape)
            )
        error = mapped - target.detach()  # (n, D_{k-1})
        errors = ((error @ self.gram) * error).sum(dim=-1)  # (n,)
        return errors.mean() if weights is None else torch.dot(weights, errors)
