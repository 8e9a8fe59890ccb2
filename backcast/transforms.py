"""Backward transformations and their composition, in float64 NumPy.

Convention: vectors are columns in the equations and rows in arrays. A map from version k to
version j has a weight W of shape (D_j, D_k) and an optional bias b of shape (D_j,); it takes
``z`` of shape (..., D_k) to ``z @ W.T + b`` of shape (..., D_j).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from backcast.errors import DimensionMismatch, InvalidInput
from backcast.versions import Lineage


@dataclass(frozen=True, eq=False)
class AffineMap:
    """z ↦ W z + b, kept in float64.

    Args:
        weight: (D_j, D_k), finite.
        bias: (D_j,), finite, or None for a linear map.

    Raises:
        DimensionMismatch: the shapes do not fit.
        InvalidInput: a value is NaN or infinite.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        weight = np.asarray(self.weight)
        if weight.ndim != 2 or 0 in weight.shape:
            raise DimensionMismatch("weight", "shape (D_j, D_k)", weight.shape)
        object.__setattr__(self, "weight", _finite("weight", weight))
        if self.bias is not None:
            bias = np.asarray(self.bias)
            if bias.shape != weight.shape[:1]:
                raise DimensionMismatch("bias", weight.shape[:1], bias.shape)
            object.__setattr__(self, "bias", _finite("bias", bias))

    @classmethod
    def identity(cls, dim: int) -> "AffineMap":
        """Return the map of a version to itself."""
        return cls(np.eye(dim))

    @property
    def rows(self) -> int:
        """D_j, the dimension that the map leads to."""
        return int(self.weight.shape[0])

    @property
    def cols(self) -> int:
        """D_k, the dimension that the map starts from."""
        return int(self.weight.shape[1])

    @cached_property
    def norm(self) -> float:
        """‖W‖₂, the largest singular value: how much an error can grow."""
        return float(np.linalg.norm(self.weight, ord=2))

    def __call__(self, vectors: ArrayLike) -> NDArray[np.float64]:
        """Map ``vectors`` of shape (..., D_k) to shape (..., D_j)."""
        z = np.asarray(vectors, dtype=np.float64)
        if z.shape[-1:] != (self.cols,):
            raise DimensionMismatch("vectors", f"(..., {self.cols})", z.shape)
        mapped: NDArray[np.float64] = z @ self.weight.T
        return mapped if self.bias is None else mapped + self.bias

    def after(self, inner: "AffineMap") -> "AffineMap":
        """Return ``self ∘ inner``: W = W_self W_inner, b = W_self b_inner + b_self."""
        if inner.rows != self.cols:
            raise DimensionMismatch("inner map", f"{self.cols} rows", f"{inner.rows} rows")
        bias = self.bias
        if inner.bias is not None:
            bias = self.weight @ inner.bias + (0.0 if bias is None else bias)
        return AffineMap(self.weight @ inner.weight, bias)


def _finite(name: str, array: NDArray[Any]) -> NDArray[np.float64]:
    # Before the cast, which warns of a signalling NaN.
    if not np.isfinite(array).all():
        raise InvalidInput(f"The {name} of a map holds NaN or infinite values.")
    return array.astype(np.float64, copy=False)


def behaviour(weight: NDArray[np.float64]) -> tuple[float, float | None]:
    """Return the largest singular value of a map, and its condition number (None: infinite)."""
    values = np.linalg.svd(weight, compute_uv=False)
    largest, smallest = float(values[0]), float(values[-1])
    with np.errstate(divide="ignore", over="ignore"):
        condition = float(np.divide(largest, smallest)) if largest else math.inf
    return largest, condition if math.isfinite(condition) else None


Maps = Mapping[tuple[int, int], AffineMap]
"""Fitted maps by (source version, target version)."""


def compose(live: int, dim: int, lineage: Lineage, maps: Maps) -> dict[int, AffineMap]:
    """Return W_live^j for every version j on the chain of ``live``, the identity for itself.

    W_k^j = W_{j+1} ⋯ W_k (the paper's section 4.1), following parents. A direct map k → j, where
    version k carries one, is used in place of the product.

    Args:
        live: version k, whose vectors are stored.
        dim: D_k.
        lineage: the parent of every version.
        maps: the backward map of each version on the chain, and direct maps.

    Raises:
        InvalidInput: a map of the chain is missing.
        DimensionMismatch: two neighbours do not fit.
    """
    composed = {live: AffineMap.identity(dim)}
    chain = lineage.chain(live)
    for newer, older in pairwise(chain):
        step = maps.get((newer, older))
        if step is None:
            raise InvalidInput(f"Version {newer} has no map back to its parent {older}.")
        direct = maps.get((live, older))
        composed[older] = direct.after(composed[live]) if direct else step.after(composed[newer])
    return composed
