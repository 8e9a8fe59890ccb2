"""What an upsert or an erasure carries, read from a body: JSON, or an Arrow stream."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus

import numpy as np
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from numpy.typing import NDArray
from starlette.exceptions import HTTPException

from backcast.errors import BatchTooLarge, DimensionMismatch, InvalidInput
from backcast.versions import Entity
from service.arrow import UnreadableIds, read_vectors
from service.documents import RequestDocument
from service.documents_changes import EraseRequest, UpsertQuery, UpsertRequest
from service.requests import read_body, read_query
from service.wire import Format


@dataclass(frozen=True, eq=False)
class Upsert:
    """Ids, and a vector for each: (n, D) float."""

    entity: Entity
    ids: Sequence[str]
    vectors: NDArray[np.floating]
    expected_live: int | None


def upsert_reader(request: Request, limit: int) -> Callable[[bytes], Upsert]:
    """Return what reads an upsert from a body of the request's media type; raise 415.

    Beside an Arrow stream the query says the rest, beside JSON it says nothing.
    """
    media = _media_of(request)
    if media == Format.JSON:
        read_query(request, RequestDocument)
        return partial(_read_json, limit)
    if media == Format.ARROW:
        return partial(_read_arrow, limit, read_query(request, UpsertQuery))
    raise _unsupported("Vectors to put come", media, Format.JSON, Format.ARROW)


def erasure_reader(request: Request, limit: int) -> Callable[[bytes], EraseRequest]:
    """Return what reads the ids to erase from a JSON body; raise 415."""
    media = _media_of(request)
    if media != Format.JSON:
        raise _unsupported("Ids to erase come", media, Format.JSON)
    read_query(request, RequestDocument)
    return partial(_read_erasure, limit)


def _media_of(request: Request) -> str:
    return request.headers.get("content-type", Format.JSON).partition(";")[0].strip().lower()


def _unsupported(what: str, media: str, *known: Format) -> HTTPException:
    return HTTPException(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        f"{what} as {' or '.join(known)}, not as {media or 'nothing named'}.",
    )


def _read_json(limit: int, content: bytes) -> Upsert:
    wanted = read_body(content, UpsertRequest)
    _demand_few(wanted.ids, limit)
    vectors = _matrix(wanted.ids, wanted.vectors)
    return Upsert(wanted.entity, wanted.ids, vectors, wanted.expected_live)


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
    try:
        ids, vectors = read_vectors(content, limit)
    except UnreadableIds as error:
        found = {"loc": ("body",), "msg": str(error), "type": "arrow_invalid"}
        raise RequestValidationError([found]) from error
    return Upsert(query.entity, ids, vectors, query.expected_live)


def _read_erasure(limit: int, content: bytes) -> EraseRequest:
    wanted = read_body(content, EraseRequest)
    _demand_few(wanted.ids, limit)
    return wanted


def _demand_few(ids: Sequence[str], limit: int) -> None:
    if len(ids) > limit:
        raise BatchTooLarge(len(ids), limit)
