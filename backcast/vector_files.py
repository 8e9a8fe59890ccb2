"""Files of vectors that come from outside, Parquet or Arrow's file format, and that go there.

Columns: ``id`` string, ``vector`` a list of numbers, all of one length, and where users and items
are mixed ``entity``. The schema's metadata may name the ``version`` whose model made the vectors.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from backcast.errors import DimensionMismatch, InvalidInput
from backcast.vectors import VectorBatch
from backcast.versions import Entity

_ARROW = b"ARROW1"
_COLUMNS = ({"id", "vector"}, {"id", "vector", "entity"})


@dataclass(frozen=True, eq=False)
class VectorFile:
    """What a file holds: one batch an entity kind, and the version that it names, if it does."""

    batches: Sequence[VectorBatch]
    version: int | None


def read_vector_file(path: Path, entity: Entity, limit: int) -> VectorFile:
    """Read a file of at most ``limit`` vectors, of ``entity`` where no column says it.

    Raises:
        InvalidInput, DimensionMismatch: it is none, or holds what is no vector.
        OSError: it cannot be read.
    """
    try:
        table = _read_table(path, limit)
        _check_columns(path, table)
        kinds = table.column("entity") if "entity" in table.column_names else None
        if kinds is None:
            return VectorFile([_batch(path, entity, table)], _version_of(path, table))
        found = [kind for kind in Entity if pc.any(pc.equal(kinds, str(kind))).as_py()]
        parts = [(kind, table.filter(pc.equal(kinds, str(kind)))) for kind in found]
        if sum(len(part) for _, part in parts) != len(table):
            raise InvalidInput(f"{path}: column entity holds other than {', '.join(Entity)}.")
        batches = [_batch(path, kind, part) for kind, part in parts]
        return VectorFile(batches, _version_of(path, table))
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise _unreadable(path, error) from error  # Arrow's way to say that bytes are damaged


def _unreadable(path: Path, error: Exception) -> InvalidInput:
    return InvalidInput(f"{path} cannot be read as Parquet or Arrow: {str(error).rstrip('.')}.")


def _read_table(path: Path, limit: int) -> pa.Table:
    with path.open("rb") as file:
        is_arrow = file.read(len(_ARROW)) == _ARROW
    if is_arrow:
        with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
            rows = sum(reader.get_batch(n).num_rows for n in range(reader.num_record_batches))
            _demand_few(path, rows, limit)
            table = reader.read_all()
            table.validate(full=True)  # or offsets may lead out of the file, and out of memory
            return table
    with pq.ParquetFile(path) as parquet:
        _demand_few(path, parquet.metadata.num_rows, limit)
        return parquet.read()


def _demand_few(path: Path, rows: int, limit: int) -> None:
    if rows > limit:
        raise InvalidInput(
            f"{path} holds {rows} vectors; at most BACKCAST_MAX_CHANGED={limit} can be changed. "
            "Publish a snapshot instead."
        )


def _check_columns(path: Path, table: pa.Table) -> None:
    if set(table.column_names) not in _COLUMNS or len(set(table.column_names)) < table.num_columns:
        raise InvalidInput(
            f"{path} has columns {', '.join(table.column_names)}; "
            "expected are id, vector and perhaps entity."
        )
    kind = table.schema.field("id").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise InvalidInput(f"{path}: column id is of type {kind}, not string.")
    for name in table.column_names:
        if table.column(name).null_count:
            raise InvalidInput(f"{path}: column {name} holds nulls.")


def _batch(path: Path, entity: Entity, table: pa.Table) -> VectorBatch:
    ids = table.column("id").to_pylist()
    return VectorBatch(entity, ids, _matrix(path, table.column("vector")))


def _matrix(path: Path, column: pa.ChunkedArray) -> NDArray[np.float32]:
    kind = column.type
    is_list = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    if not any(test(kind) for test in is_list) or not pa.types.is_floating(kind.value_type):
        raise InvalidInput(f"{path}: column vector is of type {kind}, not a list of floats.")
    lengths = pc.unique(pc.list_value_length(column)).to_pylist()
    if len(lengths) > 1:
        raise DimensionMismatch(f"{path}: vectors", "one length", f"lengths {sorted(lengths)[:4]}")
    numbers = pc.list_flatten(column)
    if numbers.null_count:
        raise InvalidInput(f"{path}: a number in column vector is null.")
    flat: NDArray[np.float32] = numbers.cast(pa.float32()).to_numpy()
    return flat.reshape(len(column), lengths[0] if lengths else 0)


def write_vector_file(
    out: Path,
    dim: int,
    batches: Iterable[VectorBatch],
    about: Mapping[str, object],
    advance: Callable[[int], None] = lambda _rows: None,
) -> int:
    """Write vectors to a Parquet file, batch by batch, and return how many there were.

    The file is there whole, in the place of an older one, or not at all. ``about`` becomes the
    schema's metadata; ``advance`` is told how many vectors are written.
    """
    columns = [
        ("entity", pa.string()),
        ("id", pa.string()),
        ("vector", pa.list_(pa.float32(), dim)),
    ]
    schema = pa.schema(columns, metadata={name: str(value) for name, value in about.items()})
    rows = 0
    with _replacing(out) as unfinished, pq.ParquetWriter(unfinished, schema) as parquet:
        for batch in batches:
            if batch.dim != dim:
                raise DimensionMismatch("vectors", dim, batch.dim)
            arrays = [
                pa.repeat(pa.scalar(str(batch.entity)), len(batch.ids)),
                pa.array(batch.ids, pa.string()),
                pa.FixedSizeListArray.from_arrays(pa.array(batch.vectors.reshape(-1)), dim),
            ]
            parquet.write_table(pa.Table.from_arrays(arrays, schema=schema))
            rows += len(batch.ids)
            advance(rows)
    return rows


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    if out.exists() and not out.is_file():  # a device would be gone
        raise InvalidInput(f"{out} is no file that could be replaced; name another one.")
    unfinished = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        unfinished.touch(exist_ok=False)
    except OSError as error:  # of a name that nobody gave
        raise OSError(error.errno, error.strerror, str(out)) from error
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)


def _version_of(path: Path, table: pa.Table) -> int | None:
    text = (table.schema.metadata or {}).get(b"version")
    if text is None:
        return None
    try:
        return int(text)
    except ValueError as error:
        raise InvalidInput(f"{path} names version {text.decode()!r}, which is none.") from error
