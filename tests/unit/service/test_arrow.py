"""Ids out of Arrow: every spelling of text is read, and nothing is unpacked that is too much."""

import struct
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backcast.errors import BatchTooLarge
from service.arrow import UnreadableIds, read_ids, read_vectors
from tests.service_support import ODD_IDS, arrow_ids

TEXT = [pa.string(), pa.large_string(), pa.string_view()]
IDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=20)


def strings(offsets: list[int], text: bytes) -> pa.Array:
    """Return an array of strings that nobody has looked at."""
    buffers = [None, pa.py_buffer(np.array(offsets, "<i4")), pa.py_buffer(text)]
    return pa.Array.from_buffers(pa.string(), len(offsets) - 1, buffers)


@pytest.mark.parametrize(
    "kind", [*TEXT, *(pa.dictionary(pa.int16(), text) for text in TEXT)], ids=str
)
@given(ids=IDS | st.just([*ODD_IDS]))
def test_ids_stay_what_they_are(kind: pa.DataType, ids: list[str]) -> None:
    assert read_ids(arrow_ids(pa.array(ids).cast(kind)), 100) == ids


@pytest.mark.parametrize("kind", [*TEXT, pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_many_batches_and_slices_are_one_column(kind: pa.DataType) -> None:
    column = pa.array(["a", "b", "c", "d"]).cast(kind)
    assert read_ids(arrow_ids(column[1:3], column[:0], column[3:]), 3) == ["b", "c", "d"]


def test_no_batches_are_no_ids() -> None:
    assert read_ids(arrow_ids(schema=pa.schema([("id", pa.string())])), 1) == []


@pytest.mark.parametrize("kind", [*TEXT, pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_more_ids_than_a_batch_may_have(kind: pa.DataType) -> None:
    with pytest.raises(BatchTooLarge) as raised:
        read_ids(arrow_ids(pa.array(["a", "b"]).cast(kind), pa.array(["c"]).cast(kind)), 2)
    assert raised.value.data == {"count": 3, "limit": 2}


@pytest.mark.parametrize("kind", TEXT[1:], ids=str)
@pytest.mark.parametrize("in_dictionary", [False, True])
def test_one_long_id_many_times_is_not_unpacked(kind: pa.DataType, in_dictionary: bool) -> None:
    once = pa.array(["x" * 200_000]).cast(kind)
    if in_dictionary:
        column = pa.DictionaryArray.from_arrays(np.zeros(100, np.int16), once)
    elif kind == pa.string_view():
        _, views, text = once.buffers()
        many = pa.py_buffer(views.to_pybytes() * 100)
        column = pa.Array.from_buffers(kind, 100, [None, many, text])
    else:
        column = once
    with pytest.raises(UnreadableIds, match="longer than 1024 bytes on average"):
        read_ids(arrow_ids(column), 100)


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_compressed_ids_are_not_unpacked(codec: str, dictionary: bool) -> None:
    column = pa.array(["a" * 1_000] * 50)
    packed = column.dictionary_encode() if dictionary else column
    content = arrow_ids(packed, options=pa.ipc.IpcWriteOptions(compression=codec))
    if dictionary:  # and nothing else
        messages = pa.ipc.MessageReader.open_stream(content)
        kept = [m.serialize() for m in messages if m.type != "record batch"]
        content = b"".join(part.to_pybytes() for part in kept)
    with pytest.raises(UnreadableIds, match="compressed"):
        read_ids(content, 100)


@pytest.mark.parametrize(
    ("column", "why"),
    [
        (pa.array(["a", None]), "null"),
        (pa.array(["a", None]).dictionary_encode(), "null"),
        (pa.DictionaryArray.from_arrays([0, 1], pa.array(["a", None])), "null"),
        (pa.array([None]), "type null"),
        (pa.array([7]), "type int64"),
        (pa.array([b"a"]), "type binary"),
        (pa.array([["a"]]), "type list"),
        (pa.array([7]).dictionary_encode(), "type dictionary"),
        (strings([0, 1], b"\xff"), "UTF8"),
        (strings([0, 8, 4], b"abcd"), "out of bounds"),
    ],
)
def test_columns_that_are_no_ids(column: pa.Array, why: str) -> None:
    with pytest.raises(UnreadableIds, match=why):
        read_ids(arrow_ids(column), 10)


@pytest.mark.parametrize("names", [[], ["ids"], ["id", "id"], ["id", "version"]], ids=str)
def test_other_columns(names: list[str]) -> None:
    schema = pa.schema([(name, pa.string()) for name in names])
    with pytest.raises(UnreadableIds, match="columns"):
        read_ids(arrow_ids(schema=schema), 10)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"ids": []}', b"\xff" * 64, b"ARROW1\0\0"])
def test_what_is_no_stream(content: bytes) -> None:
    with pytest.raises(UnreadableIds):
        read_ids(content, 10)


@given(data=st.data())
def test_stream_that_is_cut_off(data: st.DataObject) -> None:
    content = arrow_ids(pa.array(["item 0", "item 1"]))
    end = len(content) - 8  # of the last batch; the mark behind it may be missing
    cut = data.draw(st.integers(0, end - 1))
    schema_only = len(arrow_ids(schema=pa.schema([("id", pa.string())]))) - 8
    if cut == schema_only:
        return  # a whole stream, without batches
    with pytest.raises(UnreadableIds):
        read_ids(content[:cut], 10)


@given(data=st.data(), dictionary=st.booleans())
def test_damaged_stream_is_refused_or_read(data: Any, dictionary: bool) -> None:
    column = pa.array(["item 0", "item 1", "item 0"])
    content = bytearray(arrow_ids(column.dictionary_encode() if dictionary else column))
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    try:
        ids = read_ids(bytes(content), 10)
    except (UnreadableIds, BatchTooLarge):
        return
    assert all(isinstance(id, str) for id in ids)


def without_compression_field(content: bytes) -> bytes:
    """Return a stream whose compressed batches do not say that they are."""
    changed = bytearray(content)
    for message in pa.ipc.MessageReader.open_stream(content):
        metadata = message.metadata.to_pybytes()
        table = struct.unpack_from("<I", metadata)[0]
        if message.type != "record batch":
            continue
        header = _place(metadata, table, 2)
        header += struct.unpack_from("<I", metadata, header)[0]
        slot = header - struct.unpack_from("<i", metadata, header)[0] + 4 + 2 * 3
        at = content.index(metadata) + slot
        changed[at : at + 2] = bytes(2)
    return bytes(changed)


def _place(metadata: bytes, table: int, slot: int) -> int:
    vtable = table - int(struct.unpack_from("<i", metadata, table)[0])
    return table + int(struct.unpack_from("<H", metadata, vtable + 4 + 2 * slot)[0])


def test_compression_is_not_hidden_in_an_older_format() -> None:
    """Arrow 0.17 named it in the message's own metadata, where nobody else looks."""
    schema = pa.schema([("id", pa.string())])
    v4 = pa.ipc.IpcWriteOptions(metadata_version=pa.ipc.MetadataVersion.V4, compression="zstd")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=v4) as stream:
        batch = pa.record_batch([pa.array(["a" * 100_000])], schema=schema)
        stream.write_batch(batch, custom_metadata={"ARROW:experimental_compression": "zstd"})
    content = without_compression_field(sink.getvalue().to_pybytes())
    with pa.ipc.open_stream(content) as stream:
        assert stream.read_all()["id"].to_pylist() == ["a" * 100_000]  # Arrow does look
    with pytest.raises(UnreadableIds, match=r"before 1\.0"):
        read_ids(content, 1_000)


def test_dictionaries_that_grow_are_refused() -> None:
    columns = [pa.array(["a", "b", "c"][:n]).dictionary_encode() for n in (2, 3)]
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    with pytest.raises(UnreadableIds, match="grows"):
        read_ids(arrow_ids(*columns, options=options), 10)
    assert read_ids(arrow_ids(*columns), 10) == ["a", "b", "a", "b", "c"]  # written anew


def test_a_large_dictionary_of_many_batches_is_not_looked_at_again_and_again() -> None:
    column = pa.DictionaryArray.from_arrays([0], pa.array(["a" * (1 << 20)]))
    with pytest.raises(UnreadableIds, match="share a dictionary"):
        read_ids(arrow_ids(*[column] * 65), 10_000)


def test_more_messages_than_ids_need() -> None:
    with pytest.raises(UnreadableIds, match="more than 3 messages"):
        read_ids(arrow_ids(*[pa.array([], pa.string())] * 3), 1)


def test_metadata_without_end() -> None:
    schema = pa.schema([("id", pa.string())], metadata={"a": "b" * (1 << 20)})
    with pytest.raises(UnreadableIds, match="bytes of metadata"):
        read_ids(arrow_ids(schema=schema), 10)


def test_what_is_refused_is_not_quoted_whole() -> None:
    schema = pa.schema([(f"{'n' * 100} {n}", pa.string()) for n in range(1_000)])
    with pytest.raises(UnreadableIds, match=r"^the columns are .{100}…, not") as raised:
        read_ids(arrow_ids(schema=schema), 10)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("more", [1, 15, 17])
def test_views_with_bytes_behind_them(more: int) -> None:
    column = pa.array(["a", "b"], pa.string_view())
    views = pa.py_buffer(column.buffers()[1].to_pybytes() + bytes(more))
    assert read_ids(arrow_ids(pa.Array.from_buffers(column.type, 2, [None, views])), 2) == [
        "a",
        "b",
    ]


def test_vectors_of_no_length() -> None:
    ids, rows = pa.array(["a"]), pa.array([[]], pa.list_(pa.float32(), 0))
    schema = pa.schema([("id", ids.type), ("vector", rows.type)])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        stream.write_batch(pa.record_batch([ids, rows], schema=schema))
    with pytest.raises(UnreadableIds, match="column vector is of type fixed_size_list"):
        read_vectors(sink.getvalue().to_pybytes(), 1)
