"""Formats: which one a client gets, and that each says exactly what was computed."""

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray

from backcast.versions import Entity
from service import wire
from service.engine import Embeddings
from service.wire import Body, Format, Source, encode_batch, encode_one, negotiate

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
SOURCE = Source(Entity.USER, 1, 3, "v3-a.2", 4)


@pytest.mark.parametrize(
    ("accept", "format"),
    [
        ("", Format.JSON),
        ("  ", Format.JSON),
        ("*/*", Format.JSON),
        ("application/*", Format.JSON),
        ("application/json", Format.JSON),
        ("APPLICATION/JSON", Format.JSON),
        ("application/json; charset=utf-8", Format.JSON),
        ("application/octet-stream", Format.RAW),
        ("application/vnd.apache.arrow.stream", Format.ARROW),
        ("application/octet-stream, application/vnd.apache.arrow.stream", Format.ARROW),
        ("application/json;q=0.5, application/octet-stream", Format.RAW),
        ("application/json;q=0.5, application/octet-stream;q=0.4", Format.JSON),
        ("application/octet-stream ; Q=0.9 , */*;q=0.1", Format.RAW),
        ("application/json;q=0, */*", Format.ARROW),
        ("application/*;q=0.2, application/octet-stream;q=0.3", Format.RAW),
        ("text/html, */*;q=0.1", Format.JSON),
        ("text/html,,", None),
        ("text/html", None),
        ("text/*", None),
        ("application/json;q=0", None),
        ("application/json;q=high", None),
        ("application/json;q=2", None),
        ("application/json;q=nan", None),
        ("application/json;v=1;q=0", None),
        ("json", None),
    ],
)
def test_negotiation(accept: str, format: Format | None) -> None:
    assert negotiate(accept) is format


@given(st.text(alphabet="aplication/json*;q=0.1, ", max_size=60))
def test_negotiation_takes_any_header(accept: str) -> None:
    assert negotiate(accept) in {*Format, None}


def whole(body: Body) -> bytes:
    content = body.content
    return b"".join(content) if isinstance(content, Iterator) else bytes(content)


def rows(vectors: NDArray[np.float32], found: list[bool]) -> Embeddings:
    answered = vectors.copy()
    answered[~np.array(found, np.bool_)] = np.nan
    return Embeddings(answered, np.array(found, np.bool_))


@st.composite
def batches(draw: Callable[..., Any]) -> tuple[list[str], Embeddings]:
    shape = draw(array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6))
    count = draw(st.integers(0, shape[0]))
    vectors = draw(arrays(np.float32, shape, elements=FLOATS))[:count]
    ids = draw(st.lists(st.text(max_size=4), min_size=count, max_size=count))
    found = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return ids, rows(vectors, found)


@given(batches())
def test_json_batch_is_exact(batch: tuple[list[str], Embeddings]) -> None:
    ids, answered = batch
    document = json.loads(whole(encode_batch(Format.JSON, SOURCE, ids, answered)))
    embeddings = document.pop("embeddings")
    missing: list[str] = []
    for id, known in zip(ids, answered.found, strict=True):
        if not known and id not in missing:
            missing.append(id)
    assert document == {
        "version": 1,
        "live_version": 3,
        "snapshot": "v3-a.2",
        "entity": "user",
        "dim": 4,
        "count": len(ids),
        "missing": missing,
    }
    assert [row["id"] for row in embeddings] == ids
    for row, vector, known in zip(embeddings, answered.vectors, answered.found, strict=True):
        assert row["status"] == ("ok" if known else "missing")
        if known:
            assert np.array(row["embedding"], np.float32).tobytes() == vector.tobytes()
        else:
            assert row["embedding"] is None


def test_json_batch_is_one_document_of_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [f"{n}" for n in range(7)]
    answered = rows(np.arange(28, dtype=np.float32).reshape(7, 4), [True] * 6 + [False])
    at_once = encode_batch(Format.JSON, SOURCE, ids, answered).content
    assert isinstance(at_once, bytes)
    monkeypatch.setattr(wire, "_NUMBERS", 12)
    pieces = encode_batch(Format.JSON, SOURCE, ids, answered).content
    assert isinstance(pieces, Iterator)
    begin, *middle, end = pieces
    assert [piece.count(b'"status"') for piece in middle] == [3, 3, 1]
    assert b"".join((begin, *middle, end)) == at_once


@given(batches())
def test_arrow_batch_is_exact(batch: tuple[list[str], Embeddings]) -> None:
    ids, answered = batch
    with pa.ipc.open_stream(whole(encode_batch(Format.ARROW, SOURCE, ids, answered))) as stream:
        table = stream.read_all()
    dim = answered.vectors.shape[1]
    assert table.schema.names == ["id", "status", "vector"]
    assert table.schema.field("vector").type == pa.list_(pa.float32(), dim)
    assert table["id"].to_pylist() == ids
    assert table["status"].to_pylist() == ["ok" if known else "missing" for known in answered.found]
    for vector, expected, known in zip(
        table["vector"].to_pylist(), answered.vectors, answered.found, strict=True
    ):
        assert vector == (expected.tolist() if known else None)


@given(batches())
def test_raw_batch_is_exact(batch: tuple[list[str], Embeddings]) -> None:
    ids, answered = batch
    body = encode_batch(Format.RAW, SOURCE, ids, answered)
    assert body.shape == answered.vectors.shape
    numbers = struct.unpack(f"<{answered.vectors.size}f", whole(body))
    again = np.array(numbers, np.float32).reshape(answered.vectors.shape)
    np.testing.assert_array_equal(again, answered.vectors)
    assert np.isnan(again).all(axis=1).tolist() == (~answered.found).tolist()


@given(st.text(min_size=1), st.lists(FLOATS, min_size=1, max_size=6))
def test_one_vector_is_exact_in_every_format(id: str, numbers: list[float]) -> None:
    vector = np.array(numbers, np.float32)
    document = json.loads(whole(encode_one(Format.JSON, SOURCE, id, vector)))
    assert np.array(document.pop("embedding"), np.float32).tobytes() == vector.tobytes()
    assert document == {
        "id": id,
        "entity": "user",
        "version": 1,
        "live_version": 3,
        "snapshot": "v3-a.2",
        "dim": 4,
    }
    raw = encode_one(Format.RAW, SOURCE, id, vector)
    assert (raw.shape, whole(raw)) == (vector.shape, vector.astype("<f4").tobytes())
    with pa.ipc.open_stream(whole(encode_one(Format.ARROW, SOURCE, id, vector))) as stream:
        table = stream.read_all()
    assert table.to_pylist() == [{"id": id, "status": "ok", "vector": vector.tolist()}]


def test_most_and_least_floats_survive_json() -> None:
    info = np.finfo(np.float32)
    numbers = [info.max, info.min, info.tiny, info.smallest_subnormal, -0.0, 1 / 3, 16777217.0]
    vector = np.array(numbers, np.float32)
    document = json.loads(whole(encode_one(Format.JSON, SOURCE, "id", vector)))
    assert np.array(document["embedding"], np.float32).tobytes() == vector.tobytes()
