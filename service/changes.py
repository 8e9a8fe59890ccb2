"""What an upsert or an erasure carries, read from a body: JSON, or an Arrow stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from fastapi import Request
from numpy.typing import NDArray

from backcast.errors import DimensionMismatch, InvalidInput
from backcast.versions import Entity
from service.arrow import read_vectors
from service.documents import RequestDocument
from service.documents_changes import EraseRequest, UpsertQuery, UpsertRequest
from service.engine import Engine
from service.requests import (
    arrow_read,
    has_too_many,
    media_of,
    read_few,
    read_query,
    unsupported,
)
from service.state import state_of
from service.wire import Format


@dataclass(frozen=True, eq=False)
class Upsert:
    """Ids, and a vector for each: (n, D) float."""

    entity: Entity
    ids: Sequence[str]
    vectors: NDArray[np.floating]
    expected_live: int | None
    reason: str | None


def upsert_reader(request: Request, limit: int) -> Callable[[bytes], Upsert]:
    """Return what reads an upsert from a body of the request's media type; raise 415.

    Beside an Arrow stream the query says the rest, beside JSON it says nothing.
    """
    media = media_of(request)
    if media == Format.JSON:
        read_query(request, RequestDocument)
        return partial(_read_json, limit, state_of(request).engine)
    if media == Format.ARROW:
        return partial(_read_arrow, limit, read_query(request, UpsertQuery))
    raise unsupported("Vectors to put come", media, Format.JSON, Format.ARROW)


def erasure_reader(request: Request, limit: int) -> Callable[[bytes], EraseRequest]:
    """Return what reads the ids to erase from a JSON body; raise 415."""
    media = media_of(request)
    if media != Format.JSON:
        raise unsupported("Ids to erase come", media, Format.JSON)
    read_query(request, RequestDocument)
    return partial(read_few, model=EraseRequest, limit=limit)


def _read_json(limit: int, engine: Engine, content: bytes) -> Upsert:
    if has_too_many(content, UpsertRequest, limit, _widest(engine)):
        engine.refresh()  # a wider version may have come
    wanted = read_few(content, UpsertRequest, limit, _widest(engine))
    vectors = _matrix(wanted.ids, wanted.vectors)
    return Upsert(wanted.entity, wanted.ids, vectors, wanted.expected_live, wanted.reason)


def _widest(engine: Engine) -> int:
    """Return the most numbers that a vector of any version has."""
    return max((version.dim for version in engine.view.versions.values()), default=0)


def _matrix(ids: Sequence[str], rows: Sequence[Sequence[float]]) -> NDArray[np.float64]:
    if len(rows) != len(ids):
        raise DimensionMismatch("number of vectors", len(ids), len(rows))
    for id, row in zip(ids, rows, strict=True):
        if len(row) != len(rows[0]):
            raise InvalidInput(
                f"The vector of {id!r} has {len(row)} numbers, that of {ids[0]!r} {len(rows[0])}."
            )
    return np.array(rows, np.float64).reshape(len(ids), -1 if rows else 0)


def _read_arrow(limit: int, query: UpsertQuery, content: bytes) -> Upsert:
    with arrow_read():
        ids, vectors = read_vectors(content, limit)
    return Upsert(query.entity, ids, vectors, query.expected_live, query.reason)
