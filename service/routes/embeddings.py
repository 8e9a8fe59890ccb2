"""Vectors: one by its id, or a batch."""

import math
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import datetime
from email.utils import format_datetime
from functools import lru_cache, partial
from time import perf_counter
from typing import NamedTuple, cast

import xxhash
from anyio import Lock, from_thread, to_thread
from anyio.lowlevel import checkpoint
from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.types import Scope

from backcast.errors import BackcastError, InvalidInput, RateLimited, UnknownId, VersionRequired
from backcast.registry.consumers import ANONYMOUS
from backcast.versions import Entity, Key, Version
from service.declarations import (
    batch_request,
    many_vectors,
    one_request,
    one_vector,
    problem_responses,
)
from service.documents import (
    BatchDocument,
    BatchRequest,
    EmbeddingDocument,
    EmbeddingQuery,
)
from service.engine import Embeddings, Snapshot
from service.gates import PLACE, Place
from service.limits import VECTORS
from service.metrics.notes import SERVED, Served
from service.problems import describe
from service.requests import (
    CALLER,
    EXPECT_SNAPSHOT,
    PAID,
    batch_reader,
    check_path,
    choose_format,
    choose_snapshot,
    find_reader,
    find_unpaid_reader,
    parse_query,
    pay_for_one,
    pay_for_request,
    read_id,
    read_query,
    recall_reader,
)
from service.state import State, state_of
from service.usage import UsageMeter
from service.wire import Body, Format, Source, encode_batch, encode_one, negotiate


class _IdConvertor(PathConvertor):
    """Takes every character; that of Starlette takes no newline, and loses one at the end."""

    regex = "(?s:.*)"


register_url_convertor("id", _IdConvertor())
router = APIRouter(tags=["embeddings"])

PREFIX = "/embeddings/"
ROUTE = f"{PREFIX}{{id}}"
"""The template of the path of one vector, by which its requests are counted and recorded."""

BATCH = f"{PREFIX}batch"

Headers = list[tuple[bytes, bytes]]


class Answer(NamedTuple):
    """An answer about one vector, as ASGI takes it, and what it is made of; None: of an error."""

    status: int
    headers: Headers
    content: bytes | memoryview
    served: Served | None


_ABOUT = {
    "version": 1,
    "live_version": 3,
    "snapshot": "v3-20261120T091500-1f0a6c2e.0",
    "entity": "item",
    "dim": 4,
}
_VECTOR = [0.12, -0.5, 0.25, 1.75]
_ONE = {"id": "B00005N7P0", **_ABOUT, "embedding": _VECTOR}
BATCH_EXAMPLE = {
    **_ABOUT,
    "count": 2,
    "missing": ["B0000AZW7F"],
    "embeddings": [
        {"id": "B00005N7P0", "status": "ok", "embedding": _VECTOR},
        {"id": "B0000AZW7F", "status": "missing", "embedding": None},
    ],
}


@router.post(
    BATCH,
    summary="Many vectors",
    response_class=Response,
    responses={
        **many_vectors(BatchDocument, BATCH_EXAMPLE),
        **problem_responses(401, 403, 404, 406, 408, 409, 410, 412, 413, 415, 422, 429, 503),
    },
    openapi_extra=batch_request(),
)
async def post_batch(request: Request) -> Response:
    """Return the vectors of many ids, in their order, duplicates included.

    An id without a vector is no error: it is named in `missing` (JSON), null (Arrow) or a row
    of NaN (raw float32). Beside an Arrow stream of ids, version and entity stand in the query.
    """
    caller = await find_unpaid_reader(request)
    place: Place = request.scope[PLACE]
    place.take(ANONYMOUS if caller is None else caller.consumer)
    await pay_for_request(request, caller)  # who finds no place has paid nothing
    state = state_of(request)
    read = batch_reader(request, state.settings.max_batch)
    format = choose_format(request)
    snapshot = await choose_snapshot(request)
    # Even the reading of ten thousand ids would keep the event loop from everybody else.
    asked = partial(read, await request.body())
    answer = partial(_answer_batch, request.scope, asked, caller, snapshot, format, state)
    return await to_thread.run_sync(answer, limiter=state.batches.at_work)


@router.get(
    "/embeddings/{id:id}",
    summary="One vector",
    response_class=Response,
    responses={
        **one_vector(EmbeddingDocument, _ONE),
        **problem_responses(401, 403, 404, 406, 409, 410, 412, 422, 429, 503),
    },
    openapi_extra=one_request(),
)
async def get_embedding(request: Request) -> Response:
    """Return the vector of one id, compatible with the version asked for."""
    caller = await find_reader(request)
    await pay_for_one(request, caller)
    id, query = read_id(request), read_query(request, EmbeddingQuery)
    format = choose_format(request)
    snapshot = await choose_snapshot(request)
    held = request.headers.get("if-none-match")
    usage = state_of(request).usage
    make = partial(_answer_one, id, query, caller, snapshot, format, held, usage)
    answer = make() if snapshot.at_hand else await to_thread.run_sync(make)
    request.scope[SERVED] = answer.served
    response = Response(answer.content, status_code=answer.status)
    response.raw_headers = answer.headers
    return response


_READ = {b"accept", b"authorization", b"if-none-match", EXPECT_SNAPSHOT.lower().encode()}


def answer_at_once(scope: Scope) -> Answer | None:
    """Return the answer to a plain GET of one vector; None where it is not plain.

    Plain is a request from a caller seen lately for a vector at hand. All others, errors among
    them, go the long way to :func:`get_embedding`.
    """
    state: State = scope["state"]["service"]
    snapshot = state.engine.view.snapshot
    given = [header for header in scope["headers"] if header[0] in _READ]
    headers = {name.decode(): value.decode("latin-1") for name, value in given}
    unusual = len(headers) < len(given) or EXPECT_SNAPSHOT.lower() in headers
    if snapshot is None or not snapshot.at_hand or unusual:
        return None
    if state.draining.is_set():  # the long way says goodbye
        return None
    try:
        id = check_path(scope["raw_path"], scope["path"].removeprefix(PREFIX))
        caller = scope[CALLER] = recall_reader(state, headers.get("authorization"))
        if state.limits.on:
            if not state.limits.pay_at_once(caller):
                return None
            scope[PAID] = True
        query = cast("EmbeddingQuery", parse_query(scope["query_string"], EmbeddingQuery))
        format = negotiate(headers.get("accept", ""))
        if format is None:
            return None
        held = headers.get("if-none-match")
        return _answer_one(id, query, caller, snapshot, format, held, state.usage)
    except RateLimited as error:  # often the same, and many: they are not to cost more than others
        refusal = describe(Request(scope), error)
        return Answer(refusal.status_code, refusal.raw_headers, bytes(refusal.body), None)
    except (BackcastError, RequestValidationError):
        return None


def _answer_one(
    id: str,
    query: EmbeddingQuery,
    caller: Key | None,
    snapshot: Snapshot,
    format: Format,
    if_none_match: str | None,
    usage: UsageMeter,
) -> Answer:
    version = snapshot.resolve(_wanted(query.version, caller, snapshot))
    answer = _vector_or_304(id, query, version, snapshot, format, if_none_match)
    usage.count(caller, version.number, 1 if answer.status == 200 else 0)
    return answer


def _vector_or_304(
    id: str,
    query: EmbeddingQuery,
    version: Version,
    snapshot: Snapshot,
    format: Format,
    if_none_match: str | None,
) -> Answer:
    source = _source(query.entity, version, snapshot)
    etag, held = _etag(source, id, format, query.drift), _tags(if_none_match)
    said = [
        *_said(source, version.deprecated_at, version.sunset_at, format),
        (b"etag", etag.encode()),
    ]
    if etag.removeprefix("W/") in held:
        # It was made from everything that the answer depends on, and who holds it got it with a
        # vector: nothing needs to be looked up.
        return Answer(304, said[1:], b"", Served(version.number, format))
    look = snapshot.with_drift if query.drift else snapshot.vectors
    rows = look(source.entity, [id], version.number)
    if not rows.found[0]:
        raise UnknownId(source.entity, id, snapshot.name)
    if "*" in held:  # any vector of this id, so there must be one
        return Answer(304, said[1:], b"", Served(version.number, format))
    started = perf_counter()
    body = encode_one(format, source, id, rows.vectors[0], rows.drift)
    served = Served(version.number, format, 1, *rows.seconds, perf_counter() - started)
    assert not isinstance(body.content, Iterator)
    length = (b"content-length", b"%d" % len(body.content))
    return Answer(200, [length, *said, *_shape(body), *_bound(rows)], body.content, served)


def _bound(rows: Embeddings) -> Headers:
    if rows.drift is None:
        return []
    bound = float(rows.drift[0])
    return [(b"backcast-drift-bound", b"unknown" if math.isnan(bound) else b"%.9g" % bound)]


def _answer_batch(
    scope: Scope,
    read: Callable[[], BatchRequest],
    caller: Key | None,
    snapshot: Snapshot,
    format: Format,
    state: State,
) -> Response:
    batch = read()
    if state.limits.on:
        from_thread.run(state.limits.pay, caller, VECTORS, len(batch.ids))
    if batch.drift and format is Format.RAW:
        raise InvalidInput(
            f"A batch in {Format.RAW} has no place for drift bounds; "
            f"accept {Format.JSON} or {Format.ARROW}."
        )
    version = snapshot.resolve(_wanted(batch.version, caller, snapshot))
    look = snapshot.with_drift if batch.drift else snapshot.vectors
    rows = look(batch.entity, batch.ids, version.number)
    source = _source(batch.entity, version, snapshot)
    found = int(rows.found.sum())
    served = scope[SERVED] = Served(version.number, format, found, *rows.seconds)
    started = perf_counter()
    body = encode_batch(format, source, batch.ids, rows)
    served.encoding = perf_counter() - started
    response = _respond(body, source, version, format, served, state.writing)
    response.headers["Backcast-Missing"] = str(len(rows.found) - found)
    state.usage.count(caller, version.number, found)
    return response


def _wanted(asked: int | str | None, caller: Key | None, snapshot: Snapshot) -> int:
    if asked is None and caller is not None:
        asked = caller.pin
    if asked is None:
        raise VersionRequired(snapshot.servable)
    return snapshot.live.version if isinstance(asked, str) else asked


def _source(entity: Entity, version: Version, snapshot: Snapshot) -> Source:
    return Source(entity, version.number, snapshot.live.version, snapshot.name, version.dim)


def _respond(
    body: Body, source: Source, version: Version, format: Format, served: Served, writing: Lock
) -> Response:
    if isinstance(body.content, Iterator):
        pieces = _timed(body.content, served)
        response: Response = StreamingResponse(_one_at_a_time(pieces, writing))
    else:
        response = Response(body.content)
    response.raw_headers += _said(source, version.deprecated_at, version.sunset_at, format)
    response.raw_headers += _shape(body)
    return response


def _shape(body: Body) -> Headers:
    if body.shape is None:
        return []
    return [(b"backcast-shape", ",".join(str(length) for length in body.shape).encode())]


@lru_cache(maxsize=256)  # as often the same as versions are served; making it took long
def _said(
    source: Source, deprecated_at: datetime | None, sunset_at: datetime | None, format: Format
) -> Headers:
    headers = {
        "content-type": format.value,
        "backcast-version": str(source.version),
        "backcast-live-version": str(source.live_version),
        "backcast-snapshot": source.snapshot,
        "backcast-dim": str(source.dim),
        "cache-control": "private",
        "vary": "Accept, Authorization",
    }
    if deprecated_at is not None:
        headers["deprecation"] = f"@{int(deprecated_at.timestamp())}"
        headers["link"] = _ending_links(source)
    if sunset_at is not None:
        headers["sunset"] = format_datetime(sunset_at, usegmt=True)
    return [(name.encode(), value.encode()) for name, value in headers.items()]


def _ending_links(source: Source) -> str:
    # Why it ends is told by its own page; what to move to is what will last longest.
    page = f"/versions/{source.version}"
    about = f'<{page}>; rel="deprecation"; type="application/json"'
    if source.version == source.live_version:
        return about
    return f'{about}, </versions/{source.live_version}>; rel="successor-version"; anchor="{page}"'


def _timed(pieces: Iterator[bytes], served: Served) -> Iterator[bytes]:
    while True:
        started = perf_counter()
        piece = next(pieces, None)
        served.encoding += perf_counter() - started
        if piece is None:
            return
        yield piece


async def _one_at_a_time(pieces: Iterator[bytes], writing: Lock) -> AsyncIterator[bytes]:
    # On the event loop: whoever writes a piece of JSON keeps the interpreter from everybody,
    # whatever the thread. Between two pieces, of one answer or of two, everybody else has a turn.
    while True:
        async with writing:
            piece = next(pieces, None)
            await checkpoint()
        if piece is None:
            return
        yield piece


def _etag(source: Source, id: str, format: Format, drift: bool) -> str:
    # Weak: another replica's device may differ in the last bit of the same answer.
    named = "\n".join((source.entity, f"{source.version}", source.snapshot, format, id))
    if drift:
        named = f"drift\n{named}"
    return f'W/"{xxhash.xxh3_128_hexdigest(named.encode())}"'


def _tags(if_none_match: str | None) -> set[str]:
    if if_none_match is None:
        return set()
    return {tag.strip().removeprefix("W/") for tag in if_none_match.split(",")}
