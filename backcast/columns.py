"""Columns of ids and of vectors out of Parquet files, and what their reading can raise."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from backcast.errors import ArtifactCorrupt, ArtifactError, InvalidInput

_SAID = 300  # characters of what a library says about bytes, which may quote them


@contextmanager
def decoding(where: str) -> Iterator[None]:
    """Raise ArtifactCorrupt where bytes are not what their format, or Backcast, demands.

    Arrow says so with an OSError too; one that has a number is the system's.
    """
    try:
        yield
    except (pa.ArrowException, InvalidInput, UnicodeDecodeError, KeyError) as error:
        raise ArtifactCorrupt(where, _said(error)) from error
    except OSError as error:
        if error.errno is not None:
            raise ArtifactError(f"{where} cannot be read: {error.strerror}.") from error
        raise ArtifactCorrupt(where, _said(error)) from error


def ids_of(column: pa.Array | pa.ChunkedArray) -> list[str]:
    """Return a column of ids; raise InvalidInput where it is of another type or holds nulls."""
    if not pa.types.is_string(column.type):
        raise InvalidInput(f"column id is of type {_said(column.type)}, not string")
    if column.null_count:
        raise InvalidInput("an id is null")
    ids: list[str] = column.to_pylist()
    return ids


def vectors_of(column: pa.Array) -> NDArray[np.float32]:
    """Return a column of vectors, (n, D); raise InvalidInput where it is none, or holds nulls."""
    kind = column.type
    fixed = pa.types.is_fixed_size_list(kind) and pa.types.is_float32(kind.value_type)
    if not fixed or kind.list_size < 1:
        raise InvalidInput(f"column vector is of type {_said(kind)}, not fixed_size_list<float>")
    numbers = column.flatten()
    if column.null_count or numbers.null_count:
        raise InvalidInput("a vector, or a number in one, is null")
    vectors: NDArray[np.float32] = numbers.to_numpy().reshape(len(column), kind.list_size)
    return vectors


def _said(found: object) -> str:
    text = " ".join(str(found).split()).rstrip(".")
    return text if len(text) <= _SAID else f"{text[:_SAID]}…"
