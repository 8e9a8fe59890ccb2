"""Ids, and vectors, out of an Arrow stream that a stranger wrote.

Arrow can say much in few bytes: compressed buffers, dictionaries that grow a little with every
batch or that all batches share, one long string that many rows point to, a number of rows without
rows. Nothing is unpacked before it is known to be of a size that the service would take as JSON
too, and no column of another type than those that are read is looked into at all.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
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
_MOST_METADATA = 1 << 20  # bytes that describe one message; two columns need a few hundred
_MOST_REPEATED = 64 << 20  # bytes of all batches, a dictionary counted with each that uses it
_VIEW = 16  # bytes, of which the first four are the length of what is viewed


class UnreadableIds(ValueError):
    """Why a stream is not one of ids."""


def read_ids(content: bytes, limit: int) -> list[str]:
    """Return the ids of an Arrow stream with one column of text, called ``id``.

    Raises:
        UnreadableIds: it is something else, cut off, compressed, or holds nulls.
        BatchTooLarge: there are more than ``limit`` ids.
    """
    with _readable():
        return _ids_of(_read_table(content, limit, {COLUMN: _demand_text}), limit)


def read_vectors(content: bytes, limit: int) -> tuple[list[str], NDArray[np.float32]]:
    """Return the ids and the vectors, (n, D), of an Arrow stream with columns ``id``, ``vector``.

    Raises:
        UnreadableIds: it is something else, cut off, compressed, or holds nulls.
        BatchTooLarge: there are more than ``limit`` ids.
    """
    with _readable():
        table = _read_table(content, limit, {COLUMN: _demand_text, VECTOR: _demand_vectors})
        ids, column = _ids_of(table, limit), table.column(VECTOR)
        column.validate(full=True)
        if any(chunk.null_count or chunk.flatten().null_count for chunk in column.chunks):
            raise UnreadableIds("a vector, or a number in one, is null")
        numbers = [chunk.flatten().to_numpy() for chunk in column.chunks]
        rows = np.concatenate([np.empty(0, np.float32), *numbers])
        return ids, rows.reshape(len(ids), column.type.list_size)


@contextmanager
def _readable() -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, struct.error, UnicodeDecodeError) as error:
        raise UnreadableIds(f"not an Arrow stream that can be read ({error})") from error


def _demand_text(kind: pa.DataType) -> None:
    text = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not any(is_text(text) for is_text in _IS_TEXT):
        raise UnreadableIds(f"column {COLUMN} is of type {_few(kind)}, not string")


def _demand_vectors(kind: pa.DataType) -> None:
    fixed = pa.types.is_fixed_size_list(kind) and pa.types.is_float32(kind.value_type)
    if not fixed or kind.list_size < 1:
        raise UnreadableIds(f"column {VECTOR} is of type {_few(kind)}, not fixed_size_list<float>")


def _ids_of(table: pa.Table, limit: int) -> list[str]:
    column = table.column(COLUMN)
    if len(column) > limit:
        raise BatchTooLarge(len(column), limit)
    if sum(chunk.get_total_buffer_size() for chunk in column.chunks) > _MOST_REPEATED:
        raise UnreadableIds("too many batches share a dictionary that large; send one batch")
    column.validate(full=True)
    if any(map(_has_nulls, column.chunks)):
        raise UnreadableIds("an id is null")
    if sum(map(_bytes_of, column.chunks)) > limit * MAX_ID_BYTES:
        raise UnreadableIds(f"the ids are longer than {MAX_ID_BYTES} bytes on average")
    ids: list[str] = column.to_pylist()
    return ids


def _read_table(
    content: bytes, limit: int, columns: Mapping[str, Callable[[pa.DataType], None]]
) -> pa.Table:
    """Return the stream's table, of these columns; what they demand of their types is met."""
    _check_messages(content, most=2 * limit + 1)  # a schema, and a dictionary for each batch
    with pa.ipc.open_stream(content) as stream:
        names = stream.schema.names
        if sorted(names) != sorted(columns):
            raise UnreadableIds(f"the columns are {_few(names)}, not {list(columns)}")
        for name, demand in columns.items():
            demand(stream.schema.field(name).type)
        return stream.read_all()


def _check_messages(content: bytes, most: int) -> None:
    """Raise UnreadableIds where a message's reading could take much more than the message does."""
    for count, message in enumerate(pa.ipc.MessageReader.open_stream(content), start=1):
        if count > most:
            raise UnreadableIds(f"it has more than {most} messages; send larger batches")
        if len(message.metadata) > _MOST_METADATA:
            raise UnreadableIds(f"a message has {len(message.metadata)} bytes of metadata")
        if message.metadata_version != pa.ipc.MetadataVersion.V5:  # may hide its compression
            raise UnreadableIds("it was written in the format of an Arrow before 1.0")
        if message.type != "schema":
            _check_batch(message.metadata)


def _few(found: object) -> str:
    text = str(found)
    return text if len(text) <= 100 else f"{text[:100]}…"


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
    if pa.types.is_string_view(ids.type):
        views = np.frombuffer(ids.buffers()[1] or b"", np.uint8)  # may have a few bytes too many
        whole = views[: len(views) // _VIEW * _VIEW].view("<i4").reshape(-1, _VIEW // 4)
        return whole[ids.offset : ids.offset + len(ids), 0].astype(np.int64)
    return np.asarray(pc.binary_length(ids), dtype=np.int64)


def _check_batch(metadata: pa.Buffer) -> None:
    """Raise UnreadableIds where a batch's flatbuffer, which Arrow has verified, asks for more."""

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
    if field(batch, 3):
        raise UnreadableIds("the stream's buffers are compressed; send them as they are")
    if (
        batch != header
        and (delta := field(header, 2))
        and struct.unpack_from("<B", metadata, delta)[0]
    ):
        raise UnreadableIds("a dictionary grows from batch to batch; send the whole with the first")
