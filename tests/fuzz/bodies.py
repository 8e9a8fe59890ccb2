"""Bodies, paths and queries of requests, as strangers send them."""

from collections.abc import Sequence
from typing import Any, cast

import orjson
import pyarrow as pa

from backcast.vectors import VectorBatch
from backcast.versions import Entity
from service.arrow import read_ids, read_vectors
from service.changes import _read_json as read_upsert
from service.documents import BatchRequest, EmbeddingQuery, PromotionRequest, RollbackRequest
from service.documents_changes import EraseRequest
from service.documents_consumers import DeprecationRequest
from service.engine import Engine, View
from service.requests import check_path, parse_query, read_body
from service.wire import negotiate
from tests.fuzz.target import REFUSALS, Target, plain
from tests.service_support import ODD_IDS

_LIMIT = 100


class _Engine:
    """Knows no version, so large bodies have too many values."""

    view = View()

    def refresh(self) -> None:
        """Find nothing new."""


_ENGINE = cast("Engine", _Engine())


def _stream(*batches: Sequence[Any], names: Sequence[str] = ("id",), **options: Any) -> bytes:
    schema = pa.schema([(n, column.type) for n, column in zip(names, batches[0], strict=True)])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as stream:
        for columns in batches:
            stream.write_batch(pa.record_batch(list(columns), schema=schema))
    content: bytes = sink.getvalue().to_pybytes()
    return content


_TEXT = (pa.string(), pa.large_string(), pa.string_view())
_WORDS = pa.array(["item 0", "x", "a longer id than twelve bytes", "a much longer id than that"])


def _id_columns() -> list[pa.Array]:
    return [
        *(_WORDS.cast(kind) for kind in _TEXT),
        *(
            pa.DictionaryArray.from_arrays(pa.array([0, 3, 1, 0]).cast(index), _WORDS.cast(kind))
            for kind in _TEXT
            for index in (pa.int8(), pa.int32(), pa.uint64())
        ),
    ]


def _streams_of_ids() -> list[bytes]:
    grown = [_WORDS[:2].dictionary_encode(), _WORDS.dictionary_encode()]
    v4 = pa.ipc.MetadataVersion.V4
    odd = [
        pa.array(["a", None]),
        pa.array([b"a"]),
        pa.array([["a"], ["b", "c"]]),
        pa.array([["a"]], pa.list_view(pa.string())),
        pa.RunEndEncodedArray.from_arrays([2, 5], ["a", "b"]),
        pa.StructArray.from_arrays([_WORDS], ["id"]),
        pa.DictionaryArray.from_arrays(pa.array([0, 0], pa.int8()), pa.array([["a"]])),
    ]
    return [
        *(_stream([column], [column[1:3]], [column[:0]]) for column in _id_columns()),
        *(_stream([column]) for column in odd),
        _stream(*([one] for one in grown), emit_dictionary_deltas=True),
        _stream(*([one] for one in reversed(grown))),
        _stream([_WORDS], compression="zstd"),
        _stream([_WORDS], compression="lz4"),
        _stream([_WORDS], metadata_version=v4),
        _stream([_WORDS], use_legacy_format=True),
    ]


def _streams_of_vectors() -> list[bytes]:
    def lists(numbers: Any, kind: Any) -> pa.Array:
        return pa.array(numbers, kind)

    fixed = pa.list_(pa.float32(), 2)
    columns = [
        lists([[1, 2]] * 4, fixed),
        lists([[1, 2], None, [1, 2], [1, 2]], fixed),
        lists([[1, None]] * 4, fixed),
        lists([[1]] * 4, pa.list_(pa.float32(), 1)),
        lists([[]] * 4, pa.list_(pa.float32(), 0)),
        lists([[1, 2]] * 4, pa.list_(pa.float32())),
        lists([[1, 2]] * 4, pa.list_(pa.float64(), 2)),
        lists([[[1, 2]]] * 4, pa.list_(fixed, 1)),
    ]
    names = ["id", "vector"]
    return [
        *(_stream([ids, columns[0]], names=names) for ids in _id_columns()),
        *(_stream([_WORDS, column], names=names) for column in columns[1:]),
        _stream([_WORDS, columns[0]], [_WORDS[:1], columns[0][:1]], names=names),
        _stream([_WORDS, columns[0]], names=names, compression="zstd"),
    ]


_ODD_JSON = (
    b"[" * 100_000,
    b'{"ids":' * 10_000,
    b'{"ids": [NaN, Infinity, -Infinity]}',
    b'{"ids": ["\\ud800", "\\udc00\\ud800", "\\u0000"]}',
    b'{"ids": ["a"], "ids": ["b"], "version": 1, "version": 2}',
    b'\xef\xbb\xbf{"ids": ["a"]}',
    '{"ids": ["a"]}'.encode("utf-16"),
    b'{"ids": ["\xff\xfe", "\xc0\x80", "\xed\xa0\x80"]}',
    b'{"ids": ["a"], "version": ' + b"9" * 5_000 + b"}",
    b'{"ids": ["a"], "version": 1e400}',
    b'{"ids": ["a"], "version": -0.0}',
    b'{"ids": ["a"], "version": true}',
    b'{"ids": [' + b'"a",' * 2_000 + b'"a"]}',
    b'{"ids": ["' + b"a" * 5_000 + b'"]}',
    b"{" + b",".join(b'"k%d": 0' % n for n in range(2_000)) + b"}",
    b'{"' + b"k" * 200_000 + b'": 0}',
    b'{"ids": ["a"]} {}',
    b"null",
    b"",
)


def _batches() -> list[bytes]:
    wanted = [
        {"ids": ["a", "b"], "version": 1, "entity": "item", "drift": True},
        {"ids": list(ODD_IDS), "version": "live", "entity": "user"},
    ]
    return [*map(orjson.dumps, wanted), *_ODD_JSON]


def _upserts() -> list[bytes]:
    wanted = [
        {"ids": ["a", "b"], "vectors": [[1, 2.5], [-1e-9, 3]], "expected_live": 3},
        {"ids": ["a"], "vectors": [[1e39]], "entity": "user"},
        {"ids": ["a", "b"], "vectors": [[1], [1, 2]]},
        {"ids": [], "vectors": []},
        {"ids": ["a"], "vectors": [[]]},
    ]
    return [*map(orjson.dumps, wanted), *_ODD_JSON]


def _orders() -> list[bytes]:
    wanted = [
        {"expected_live": 3, "force": True, "reason": "because", "snapshot": "v3-x"},
        {"expected_live": 3.0, "dry_run": True, "to_snapshot": "../v3"},
        {"sunset_at": "2027-01-31T00:00:00Z", "reason": "use 3"},
        {"sunset_at": 1e300},
    ]
    return [*map(orjson.dumps, wanted), *_ODD_JSON]


def _read_orders(content: bytes) -> None:
    refusals = []
    for model in (PromotionRequest, RollbackRequest, DeprecationRequest, EraseRequest):
        try:
            read_body(content, model)
        except REFUSALS as refusal:
            refusals.append(refusal)
    if len(refusals) == 4:
        raise refusals[0]


def _read_upsert(content: bytes) -> None:
    wanted = read_upsert(_LIMIT, _ENGINE, content)
    VectorBatch(wanted.entity, wanted.ids, wanted.vectors)  # as the endpoint does


def _read_vectors(content: bytes) -> None:
    VectorBatch(Entity.ITEM, *read_vectors(content, _LIMIT))


def _read_ids(content: bytes) -> None:
    ids = read_ids(content, _LIMIT)
    assert len(ids) <= _LIMIT
    assert all(type(id) is str for id in ids)


def _read_head(content: bytes) -> None:
    """Read a path, a query and an Accept header, a line each, as the server hands them over."""
    path, query, accept, *_ = *content.split(b"\n", 2), b"", b""
    negotiate(accept.decode("latin-1"))
    check_path(path, path.decode(errors="replace"))
    parse_query(query, EmbeddingQuery)


_HEADS = (
    b"/embeddings/item%200\nversion=1&entity=item&drift=true\napplication/json;q=0.5, */*;q=0.1",
    b"/embeddings/%2e%2e%2f%2e%2e/etc/passwd\nversion=live\n*/*",
    b"/embeddings/%ff%fe%00\nversion=1&version=2\n;;q=,,/;q=1e999",
    b"/embeddings/a\nversion=%D9%A3&entity=%00\napplication/*; q=nan",
)


TARGETS = (
    Target("Arrow ids", _streams_of_ids, plain(_read_ids)),
    Target("Arrow vectors", _streams_of_vectors, plain(_read_vectors)),
    Target("JSON batch", _batches, plain(lambda content: read_body(content, BatchRequest))),
    Target("JSON upsert", _upserts, plain(_read_upsert)),
    Target("JSON orders", _orders, plain(_read_orders)),
    Target("path, query, Accept", lambda: _HEADS, plain(_read_head)),
)
