"""Ids, and vectors, out of an Arrow stream that a stranger wrote.

Arrow can say much in few bytes: compressed buffers, one long string that many rows point to, a
number of rows without rows. Nothing is unpacked before it is known to be of a size that the
service would take as JSON too.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from backcast.errors import BatchTooLarge
from backcast.vectors import MAX_ID_BYTES

COLUMN, VECTOR = "id", "vector"
_RECORD_BATCH = 3  # of Message.fbs; a dictionary's batch is one step further down
_IS_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)


class UnreadableIds(ValueError):
    """Why a stream is not one of ids."""


def read_ids(content: bytes, limit: int) -> list[str]:
    """Return the ids of an Arrow stream with one column of text, called ``id``.

    Raises:
        UnreadableIds: it is something else, cut off, compressed, or holds nulls.
        BatchTooLarge: there are more than ``limit`` ids.
    """
    with _readable():
        return _ids_of(_read_table(content, [COLUMN]), limit)


def read_vectors(content: bytes, limit: int) -> tuple[list[str], NDArray[np.float32]]:
    """Return the ids and the vectors, (n, D), of an Arrow stream with columns ``id``, ``vector``.

    Raises:
        UnreadableIds: it is something else, cut off, compressed, or holds nulls.
        BatchTooLarge: there are more than ``limit`` ids.
    """
    with _readable():
        table = _read_table(content, [COLUMN, VECTOR])
        ids, column = _ids_of(table, limit), table.column(VECTOR)
        kind = column.type
        if not pa.types.is_fixed_size_list(kind) or not pa.types.is_float32(kind.value_type):
            raise UnreadableIds(f"column {VECTOR} is of type {kind}, not fixed_size_list<float>")
        column.validate(full=True)
        if any(chunk.null_count or chunk.flatten().null_count for chunk in column.chunks):
            raise UnreadableIds("a vector, or a number in one, is null")
        numbers = [chunk.flatten().to_numpy() for chunk in column.chunks]
        rows = np.concatenate([np.empty(0, np.float32), *numbers])
        return ids, rows.reshape(len(ids), kind.list_size)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, struct.error, UnicodeDecodeError) as error:
        raise UnreadableIds(f"not an Arrow stream that can be read ({error})") from error


def _ids_of(table: pa.Table, limit: int) -> list[str]:
    column = table.column(COLUMN)
    kind = column.type
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_text(text) for is_text in _IS_TEXT):
        raise UnreadableIds(f"column {COLUMN} is of type {kind}, not string")
    if len(column) > limit:
        raise BatchTooLarge(len(column), limit)
    column.validate(full=True)
    if any(map(_has_nulls, column.chunks)):
        raise UnreadableIds("an id is null")
    if sum(map(_bytes_of, column.chunks)) > limit * MAX_ID_BYTES:
        raise UnreadableIds(f"the ids are longer than {MAX_ID_BYTES} bytes on average")
    ids: list[str] = column.to_pylist()
    return ids


def _read_table(content: bytes, names: list[str]) -> pa.Table:
    for message in pa.ipc.MessageReader.open_stream(content):
        if message.type != "schema" and _is_compressed(message.metadata):
            raise UnreadableIds("the stream's buffers are compressed; send them as they are")
    with pa.ipc.open_stream(content) as stream:
        if sorted(stream.schema.names) != names:
            raise UnreadableIds(f"the columns are {stream.schema.names}, not {names}")
        return stream.read_all()


def _has_nulls(ids: pa.Array) -> bool:
    return bool(ids.null_count or (pa.types.is_dictionary(ids.type) and ids.dictionary.null_count))


def _bytes_of(ids: pa.Array) -> int:
    """Return how many bytes the ids have, each counted as often as it comes."""
    if pa.types.is_dictionary(ids.type):
        lengths = _lengths(ids.dictionary)[ids.indices.to_numpy()]
    else:
        lengths = _lengths(ids)
    return int(lengths.sum(dtype=np.int64))


def _lengths(ids: pa.Array) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    if pa.types.is_string_view(ids.type):  # a view of 16 bytes begins with its length
        views = np.frombuffer(ids.buffers()[1] or b"", "<i4").reshape(-1, 4)
        return views[ids.offset : ids.offset + len(ids), 0].astype(np.int64)
    return np.asarray(pc.binary_length(ids), dtype=np.int64)


def _is_compressed(metadata: pa.Buffer) -> bool:
    """Tell whether a batch's flatbuffer, which Arrow has verified, names a compression."""

    def field(table: int, slot: int) -> int:
        vtable = table - struct.unpack_from("<i", metadata, table)[0]
        (size,) = struct.unpack_from("<H", metadata, vtable)
        at = 4 + 2 * slot
        offset: int = struct.unpack_from("<H", metadata, vtable + at)[0] if at < size else 0
        return offset and table + offset

    def follow(at: int) -> int:
        return at + int(struct.unpack_from("<I", metadata, at)[0])

    message = follow(0)
    (kind,) = struct.unpack_from("<B", metadata, field(message, 1))
    header = follow(field(message, 2))
    batch = header if kind == _RECORD_BATCH else follow(field(header, 1))
    return field(batch, 3) != 0
