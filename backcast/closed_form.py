"""Maps between embedding versions fitted in closed form, in float64 NumPy.

Each function takes vectors of the same n nodes under two versions and returns the map from the
newer to the older. No gradient, no seed, no epochs.
"""

from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from backcast.errors import DimensionMismatch, InvalidInput
from backcast.transforms import AffineMap

Array = NDArray[np.float64]


def least_squares(
    newer: ArrayLike,
    older: ArrayLike,
    *,
    bias: bool = False,
    ridge: float = 1e-6,
    weights: ArrayLike | None = None,
) -> AffineMap:
    """Return the map that minimises the mean over nodes of ‖W x + b − y‖² + ρ ‖W‖²_F.

    W = C_yx (C_xx + ρ I)⁻¹ with C_ab = mean of a bᵀ, about the means where there is a bias, which
    is then b = mean(y) − W mean(x). All means are weighted where there are weights. The multi-step
    alignment loss has the same minimiser at ρ = 0: it is δᵀ G δ with an invertible G.

    Args:
        newer: x, (n, D_k), finite.
        older: y, (n, D_j), finite, of the same nodes in the same order.
        bias: fit b too; otherwise the map is linear.
        ridge: ρ as a share of the mean squared coordinate of x, tr(C_xx) / D_k. It keeps the
            solution unique where coordinates of x are dependent.
        weights: how much each node counts, (n,), 0 or more; None for all the same.

    Raises:
        DimensionMismatch: the arrays are not (n, D_k), (n, D_j) and (n,). InvalidInput: there is no
            node, a value is NaN or infinite, a weight is negative or all are 0; or coordinates of x
            are dependent and ``ridge`` is 0.

    Example:
        >>> x = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> least_squares(x, x @ [[2.0], [3.0]]).weight.round(3)
        array([[2., 3.]])
    """
    x, y = _pair(newer, older)
    share = node_shares(weights, len(x))
    x_mean, y_mean = share @ x * bias, share @ y * bias
    x, y = x - x_mean, y - y_mean
    weighted = (x * share[:, None]).T  # (D_k, n)
    covariance = weighted @ x  # (D_k, D_k)
    dim = len(covariance)
    # A version whose vectors are all zero has no scale of its own.
    scale = np.trace(covariance) / dim or 1.0
    covariance[np.diag_indices(dim)] += ridge * scale
    try:
        weight = cast("Array", np.linalg.solve(covariance, weighted @ y).T)  # (D_j, D_k)
    except np.linalg.LinAlgError as error:
        raise InvalidInput(
            "The newer vectors' coordinates are linearly dependent, so that no one map is best. "
            "Give a ridge above 0."
        ) from error
    return AffineMap(weight, y_mean - weight @ x_mean if bias else None)


def zero_padded_procrustes(newer: ArrayLike, older: ArrayLike) -> AffineMap:
    """Return the rows of the orthogonal map closest to taking x to y filled up with zeros.

    With Y = [y 0] of the width of x, R = U Vᵀ from Yᵀ X = U S Vᵀ minimises ‖X Rᵀ − Y‖_F over
    orthogonal R; W is its first D_j rows, so W Wᵀ = I: no error can grow. At equal widths this is
    orthogonal Procrustes and keeps dot products; at a growing width it is not the least-squares
    optimum among maps with orthonormal rows.

    Args:
        newer: x, (n, D_k), finite.
        older: y, (n, D_j), finite, D_j ≤ D_k.

    Raises:
        DimensionMismatch: the arrays do not fit, or D_j > D_k. InvalidInput: as above.
    """
    x, y = _pair(newer, older)
    if y.shape[1] > x.shape[1]:
        raise DimensionMismatch("older vectors", f"at most {x.shape[1]} columns", y.shape[1])
    left, _, right = np.linalg.svd(y.T @ x, full_matrices=True)  # y.T @ x: (D_j, D_k)
    # The zero rows of [y 0]ᵀ x span nothing, so any basis fills up U; only D_j rows are kept.
    return AffineMap(left @ right[: y.shape[1]])


def truncation(dim: int, target_dim: int) -> AffineMap:
    """Return the map to the first ``target_dim`` of ``dim`` coordinates: [I 0].

    Raises:
        DimensionMismatch: there are fewer than ``target_dim``.
    """
    if target_dim > dim:
        raise DimensionMismatch("truncation", f"at least {target_dim} coordinates", dim)
    return AffineMap(np.eye(target_dim, dim))


def _pair(newer: ArrayLike, older: ArrayLike) -> tuple[Array, Array]:
    x, y = np.asarray(newer, dtype=np.float64), np.asarray(older, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise DimensionMismatch("newer and older", "(n, D_k) and (n, D_j)", (x.shape, y.shape))
    if len(x) == 0:
        raise InvalidInput("A map cannot be fitted on no vectors.")
    for name, array in (("newer", x), ("older", y)):
        if not np.isfinite(array).all():
            raise InvalidInput(f"The {name} vectors hold NaN or infinite values.")
    return x, y


def node_shares(weights: ArrayLike | None, nodes: int) -> Array:
    """Return weights of nodes, (n,), None for all the same, so scaled that they add up to 1.

    Raises:
        DimensionMismatch: they are not (n,). InvalidInput: one is negative or not finite, or all
            are 0.
    """
    if weights is None:
        return np.full(nodes, 1.0 / nodes)
    given = np.asarray(weights, dtype=np.float64)
    if given.shape != (nodes,):
        raise DimensionMismatch("weights", f"({nodes},)", given.shape)
    total = given.sum()
    if not (np.isfinite(total) and total > 0.0 and (given >= 0.0).all()):
        raise InvalidInput("Weights of nodes have to be finite, 0 or more, and not all 0.")
    shares: Array = given / total
    return shares
