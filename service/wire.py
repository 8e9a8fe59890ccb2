"""Vectors on the wire: which format a client takes, and how answers are written in each.

No number is ever touched by Python: arrays go to orjson, Arrow or the socket as they are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from backcast.versions import Entity
from service.engine import Embeddings

_NUMBERS = 16_384  # in a piece of JSON: orjson keeps the interpreter for half a millisecond
_STATUS = pa.array(["missing", "ok"])


class Format(StrEnum):
    """The media types of vectors, in the order in which the service prefers them."""

    JSON = "application/json"
    ARROW = "application/vnd.apache.arrow.stream"
    RAW = "application/octet-stream"


@dataclass(frozen=True)
class Source:
    """What every answer says about itself. ``snapshot`` is S.d, ``dim`` is D_j."""

    entity: Entity
    version: int
    live_version: int
    snapshot: str
    dim: int


@dataclass(frozen=True)
class Body:
    """An answer's content: whole, or in pieces that are written when they are asked for.

    ``shape`` is said in a header where the content cannot say it.
    """

    content: bytes | memoryview | Iterator[bytes]
    shape: tuple[int, ...] | None = None


@lru_cache(maxsize=64)
def negotiate(accept: str) -> Format | None:
    """Return the format that an Accept header likes best, None where it takes none of them.

    An empty header takes anything.
    """
    if not accept.strip():
        return Format.JSON
    qualities = _qualities(accept)
    best = max(Format, key=lambda format: _quality(format, qualities))  # the first among equals
    return best if _quality(best, qualities) > 0 else None


def _qualities(accept: str) -> dict[str, float]:
    qualities = {}
    for element in accept.split(","):
        media, *parameters = (part.strip().lower() for part in element.split(";"))
        values = [p.partition("=")[2] for p in parameters if p.partition("=")[0].strip() == "q"]
        qualities[media] = _number(values[0]) if values else 1.0
    return qualities


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        return 0.0
    return number if 0.0 <= number <= 1.0 else 0.0


def _quality(media: str, qualities: dict[str, float]) -> float:
    main = media.partition("/")[0]
    matching = (qualities.get(pattern) for pattern in (media, f"{main}/*", "*/*"))
    return next((quality for quality in matching if quality is not None), 0.0)


def encode_one(
    format: Format,
    source: Source,
    id: str,
    vector: NDArray[np.float32],
    drift: NDArray[np.float32] | None = None,
) -> Body:
    """Write one vector of shape (D,), and its drift bound, of shape (1,), where it is given.

    Raw float32 has no place for that.
    """
    if format is Format.RAW:
        return Body(_little_endian(vector), vector.shape)
    if format is Format.ARROW:
        return Body(_arrow([id], Embeddings(vector[np.newaxis], np.ones(1, np.bool_), drift)))
    document = {
        "id": id,
        "entity": source.entity,
        "version": source.version,
        "live_version": source.live_version,
        "snapshot": source.snapshot,
        "dim": source.dim,
        "embedding": vector,
    }
    if drift is not None:
        document["drift_bound"] = drift[0]  # NaN is written as null
    return Body(orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY))


def encode_batch(format: Format, source: Source, ids: Sequence[str], rows: Embeddings) -> Body:
    """Write the rows of ``ids``, of shape (N, D)."""
    return _BATCH[format](source, ids, rows)


def _json_batch(source: Source, ids: Sequence[str], rows: Embeddings) -> Body:
    missing = [] if rows.found.all() else [ids[at] for at in np.flatnonzero(~rows.found).tolist()]
    head = {
        "version": source.version,
        "live_version": source.live_version,
        "snapshot": source.snapshot,
        "entity": source.entity,
        "dim": source.dim,
        "count": len(ids),
        "missing": list(dict.fromkeys(missing)),
    }
    step = max(1, _NUMBERS // source.dim)
    pieces = _json_pieces(orjson.dumps(head), ids, rows, step)
    return Body(b"".join(pieces) if len(ids) <= step else pieces)


def _json_pieces(head: bytes, ids: Sequence[str], rows: Embeddings, step: int) -> Iterator[bytes]:
    yield head[:-1] + b',"embeddings":['
    for at in range(0, len(ids), step):
        yield (b"," if at else b"") + _json_rows(ids, rows, slice(at, at + step))
    yield b"]}"


def _json_rows(ids: Sequence[str], rows: Embeddings, piece: slice) -> bytes:
    found = rows.found[piece].tolist()
    answers = [
        {"id": id, "status": "ok" if known else "missing", "embedding": row if known else None}
        for id, known, row in zip(ids[piece], found, rows.vectors[piece], strict=True)
    ]
    if rows.drift is not None:
        for answer, bound in zip(answers, rows.drift[piece], strict=True):
            answer["drift_bound"] = bound  # NaN is written as null
    return orjson.dumps(answers, option=orjson.OPT_SERIALIZE_NUMPY)[1:-1]


def _arrow_batch(_source: Source, ids: Sequence[str], rows: Embeddings) -> Body:
    return Body(_arrow(ids, rows))


def _arrow(ids: Sequence[str], rows: Embeddings) -> memoryview:
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(rows.vectors.reshape(-1)), rows.vectors.shape[1], mask=pa.array(~rows.found)
    )
    status = pa.DictionaryArray.from_arrays(pa.array(rows.found.astype(np.int8)), _STATUS)
    columns = {"id": pa.array(ids, pa.string()), "status": status, "vector": vectors}
    if rows.drift is not None:
        columns["drift_bound"] = pa.array(rows.drift, mask=np.isnan(rows.drift))
    batch = pa.record_batch(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    return memoryview(sink.getvalue())


def _raw_batch(_source: Source, _ids: Sequence[str], rows: Embeddings) -> Body:
    return Body(_little_endian(rows.vectors), rows.vectors.shape)


def _little_endian(vectors: NDArray[np.float32]) -> memoryview | bytes:
    numbers = vectors.astype("<f4", copy=False)
    return numbers.data.cast("B") if numbers.size else b""  # Python casts no empty view


_BATCH: dict[Format, Callable[[Source, Sequence[str], Embeddings], Body]] = {
    Format.JSON: _json_batch,
    Format.ARROW: _arrow_batch,
    Format.RAW: _raw_batch,
}
