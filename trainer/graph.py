"""The user–item graph as fixed linear operators: what message passing and the input layer apply."""

import warnings
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import embedding_bag

from trainer.data.dataset import Dataset
from trainer.features import ItemFeatures, Vocabulary
from trainer.split import Edges

_DENSE_ENTRIES = 1 << 24
"""A matrix of at most so many entries is multiplied as a dense one."""


@dataclass(frozen=True, eq=False)
class SparseMatrix:
    """A fixed sparse matrix in CSR form, prepared for products with dense ones.

    On the CPU a product is a weighted sum over bags of rows, whose kernel is about twice as fast as
    that of torch's sparse CSR matrices; on CUDA it is a CSR product.

    Attributes:
        offsets: int32 (rows + 1,). columns: int32 (nnz,). values: float32 (nnz,).
        shape: (rows, columns).
    """

    offsets: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(
        cls,
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
        values: NDArray[np.float32],
        shape: tuple[int, int],
    ) -> Self:
        """Sort entries given in any order; entries at the same place add up in products."""
        order = np.lexsort((columns, rows))
        offsets = np.concatenate([[0], np.bincount(rows, minlength=shape[0]).cumsum()])
        return cls(
            torch.from_numpy(offsets.astype(np.int32)),
            torch.from_numpy(columns[order].astype(np.int32)),
            torch.from_numpy(values[order].astype(np.float32)),
            shape,
        )

    def __matmul__(self, x: Tensor) -> Tensor:
        """Multiply with ``x`` of shape (columns, D); no gradient flows."""
        if x.is_cuda:
            return self._csr() @ x
        return embedding_bag(
            self.columns,
            x.contiguous(),
            self.offsets,
            mode="sum",
            per_sample_weights=self.values.to(x.dtype),
            include_last_offset=True,
        )

    def _csr(self) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            return torch.sparse_csr_tensor(
                self.offsets, self.columns, self.values, self.shape, check_invariants=False
            )

    def dense(self) -> Tensor:
        """Return the matrix as a dense tensor of its shape."""
        rows = torch.arange(self.shape[0], device=self.offsets.device)
        rows = rows.repeat_interleave(self.offsets.diff())
        full = torch.zeros(self.shape, device=self.values.device)
        return full.index_put_((rows, self.columns.long()), self.values, accumulate=True)

    def to(self, device: torch.device) -> "SparseMatrix":
        """Return the matrix on ``device``."""
        return SparseMatrix(
            self.offsets.to(device), self.columns.to(device), self.values.to(device), self.shape
        )


@dataclass(frozen=True, eq=False)
class Operator:
    """x ↦ A x, differentiable in x, with A and its transpose prepared once."""

    matrix: SparseMatrix | Tensor
    transposed: SparseMatrix | Tensor

    @classmethod
    def of(
        cls,
        rows: NDArray[np.int64],
        columns: NDArray[np.int64],
        values: NDArray[np.float32],
        shape: tuple[int, int],
    ) -> Self:
        """Prepare the matrix with these entries, int64 (nnz,) twice and float32 (nnz,)."""
        return cls(
            SparseMatrix.of(rows, columns, values, shape),
            SparseMatrix.of(columns, rows, values, (shape[1], shape[0])),
        )

    def dense_if_small(self) -> "Operator":
        """Return the operator with dense matrices where they take at most 64 MiB each."""
        matrix = self.matrix
        if isinstance(matrix, Tensor) or matrix.shape[0] * matrix.shape[1] > _DENSE_ENTRIES:
            return self
        dense = matrix.dense()
        return Operator(dense, dense.T.contiguous())

    def __call__(self, x: Tensor) -> Tensor:
        """Apply to ``x`` of shape (columns, D); the result has shape (rows, D)."""
        applied: Tensor = _Apply.apply(x, self)  # type: ignore[no-untyped-call]
        return applied

    def to(self, device: torch.device) -> "Operator":
        """Return the operator on ``device``."""
        return Operator(self.matrix.to(device), self.transposed.to(device))


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, operator: Operator) -> Tensor:
        ctx.operator = operator
        return operator.matrix @ x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.operator.transposed @ gradients[0], None


def mean_over_neighbours(edges: Edges, users: int, items: int) -> Operator:
    """Return the (N, N) operator that takes node vectors to the mean of their neighbours.

    Users are nodes 0..U-1, items U..U+I-1; edges count in both directions, repeated ones as often
    as they are there; a node without neighbours gets zeros.
    """
    starts = np.concatenate([edges.users, edges.items + users])
    ends = np.concatenate([edges.items + users, edges.users])
    degrees = np.bincount(starts, minlength=users + items)
    values = (1.0 / degrees[starts]).astype(np.float32)
    return Operator.of(starts, ends, values, (users + items, users + items))


def first_layer(mean: Operator, features: ItemFeatures, users: int) -> Operator:
    """Return the operator from the input tables to what the first layer adds up.

    Every user starts from one shared vector and every item from the sum, over attributes, of the
    mean of its values' embeddings. With T the table of all of them, (V + 1, D), the users' row
    last, inputs are X = P T and neighbour means A X = (A P) T. P and A P never change, so the first
    layer, A X W_lᵀ + X W_rᵀ + b, is one product of the (N, 2 V + 3) matrix [A P | P | 1] with
    [T W_lᵀ ; T W_rᵀ ; b], and no message is passed.
    """
    table = features.table_size + 1
    nodes = users + features.items
    item_rows, item_columns, item_values = features.entries()
    own = SparseMatrix.of(
        np.concatenate([np.arange(users), item_rows + users]),
        np.concatenate([np.full(users, table - 1), item_columns]),
        np.concatenate([np.ones(users, dtype=np.float32), item_values]),
        (nodes, table),
    )
    assert isinstance(mean.matrix, SparseMatrix)
    # A P by columns of P, a few at a time, so that nothing dense of size (N, V) is ever held.
    ones = (np.arange(nodes), np.full(nodes, 2 * table), np.ones(nodes, dtype=np.float32))
    entries = [_entries(own, shift=table), ones]
    for start in range(0, table, 64):
        block = own_columns(own, start, min(start + 64, table))
        product = (mean.matrix @ block).numpy()
        rows, columns = product.nonzero()
        entries.append((rows, columns + start, product[rows, columns]))
    rows, columns, values = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    return Operator.of(rows, columns, values, (nodes, 2 * table + 1)).dense_if_small()


def own_columns(matrix: SparseMatrix, start: int, stop: int) -> Tensor:
    """Return columns ``start`` to ``stop`` of a sparse matrix as a dense (rows, stop - start)."""
    rows = torch.arange(matrix.shape[0]).repeat_interleave(matrix.offsets.diff())
    inside = (matrix.columns >= start) & (matrix.columns < stop)
    block = torch.zeros(matrix.shape[0], stop - start)
    at = (rows[inside], matrix.columns[inside].long() - start)
    return block.index_put_(at, matrix.values[inside], accumulate=True)


def _entries(
    matrix: SparseMatrix, shift: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.offsets.numpy()))
    return rows, matrix.columns.numpy().astype(np.int64) + shift, matrix.values.numpy()


@dataclass(frozen=True, eq=False)
class Graph:
    """What a model is run on.

    Attributes:
        users, items: number of nodes of each kind.
        mean: (N, N), the mean over neighbours.
        inputs: (N, 2 V + 3), see :func:`first_layer`.
        features: the items' attributes.
    """

    users: int
    items: int
    mean: Operator
    inputs: Operator
    features: ItemFeatures

    @classmethod
    def of(
        cls, dataset: Dataset, edges: Edges, users: int, items: int, vocabulary: Vocabulary
    ) -> Self:
        """Build the graph of the first ``users`` and ``items`` over ``edges``."""
        mean = mean_over_neighbours(edges, users, items)
        return cls.build(mean, vocabulary.encode(dataset, items), users)

    @classmethod
    def build(cls, mean: Operator, features: ItemFeatures, users: int) -> Self:
        """Build a graph from its message passing, which models of any vocabulary share."""
        inputs = first_layer(mean, features, users)
        return cls(users, features.items, mean, inputs, features)

    def to(self, device: torch.device) -> "Graph":
        """Return the graph on ``device``."""
        mean, inputs = self.mean.to(device), self.inputs.to(device)
        return Graph(self.users, self.items, mean, inputs, self.features)
