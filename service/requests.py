"""What endpoints read from a request: the caller, the snapshot, the format, the id.

Plain functions of the request: as FastAPI dependencies they would take longer than finding the
vector and mapping it together. ``service.declarations`` tells OpenAPI of what they read.
"""

from collections.abc import Callable, Coroutine
from functools import lru_cache, partial
from http import HTTPStatus
from typing import Any, TypeVar, cast
from urllib.parse import unquote_to_bytes

from anyio import fail_after, to_thread
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException

from backcast.errors import BatchTooLarge, InvalidInput, RegistryError
from backcast.vectors import check_id
from backcast.versions import Key, Scope
from service.arrow import UnreadableIds, read_ids
from service.auth import bearer_secret, demand
from service.documents import BatchRequest, EmbeddingQuery, RequestDocument
from service.engine import Snapshot
from service.state import State, state_of
from service.wire import Format, negotiate

Model = TypeVar("Model", bound=BaseModel)

EXPECT_SNAPSHOT = "Backcast-Expect-Snapshot"
_ADMIN = "backcast.admin"
_REFRESH_S = 5


async def find_reader(request: Request) -> Key | None:
    """Return the caller's key; None for an anonymous caller where reads are open."""
    key = await _find_key(request)
    if key is None and state_of(request).settings.reads == "open":
        return None
    return demand(key, Scope.READ)


def recall_reader(state: State, authorization: str | None) -> Key | None:
    """Return the same without asking the database; raise Unauthorized where that is not enough."""
    secret = bearer_secret(authorization)
    if secret is None and state.settings.reads == "open":
        return None
    return demand(None if secret is None else state.keys.recall(secret), Scope.READ)


async def find_admin(request: Request) -> Key:
    """Return the caller's key, which has scope admin; the registry is asked, once a request."""
    caller: Key | None = request.scope.get(_ADMIN)
    if caller is None:
        secret = bearer_secret(request.headers.get("authorization"))
        found = None if secret is None else await state_of(request).keys.confirm(secret)
        caller = request.scope[_ADMIN] = demand(found, Scope.ADMIN)
    return caller


class AdminRoute(APIRoute):
    """Finds the administrator before anything of a body is read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the framework's handler, behind the key."""
        handle = super().get_route_handler()

        async def handle_for_admin(request: Request) -> Response:
            await find_admin(request)
            return await handle(request)

        return handle_for_admin


async def _find_key(request: Request) -> Key | None:
    secret = bearer_secret(request.headers.get("authorization"))
    return None if secret is None else await state_of(request).keys.identify(secret)


async def choose_snapshot(request: Request) -> Snapshot:
    """Return the one snapshot that this request is answered from."""
    state = state_of(request)
    expected = request.headers.get(EXPECT_SNAPSHOT)
    if expected is None:
        return state.engine.current()
    known = state.engine.view.find(expected)
    if known is not None:
        return known
    try:
        with fail_after(_REFRESH_S):
            return await to_thread.run_sync(
                state.engine.expecting, expected, limiter=state.refreshes, abandon_on_cancel=True
            )
    except TimeoutError as error:
        raise RegistryError(
            f"Whether snapshot {expected} is served could not be found out within {_REFRESH_S} s; "
            "try again."
        ) from error


def choose_format(request: Request) -> Format:
    """Return the format that the client takes; raise 406."""
    chosen = negotiate(",".join(request.headers.getlist("accept")))
    if chosen is None:
        raise HTTPException(
            HTTPStatus.NOT_ACCEPTABLE, f"Vectors come as one of {', '.join(Format)}."
        )
    return chosen


def read_id(request: Request) -> str:
    """Return the id in the path, exactly as it was meant."""
    return check_path(request.scope["raw_path"], request.path_params["id"])


def check_path(raw: bytes, id: str) -> str:
    """Return ``id``, which the server found in the path ``raw``; raise InvalidInput."""
    try:
        (unquote_to_bytes(raw) if b"%" in raw else raw).decode()
    except UnicodeDecodeError as error:  # the server has put U+FFFD in its place
        raise InvalidInput("The id in the path is not percent-encoded UTF-8.") from error
    check_id(id)
    return id


def read_query(request: Request, model: type[Model]) -> Model:
    """Return the query as ``model``, nothing in it twice; raise RequestValidationError."""
    return cast("Model", parse_query(request.scope["query_string"], model))


@lru_cache(maxsize=256)
def parse_query(content: bytes, model: type[BaseModel]) -> BaseModel:
    """Return the query in ``content`` as ``model``, nothing in it twice.

    A query read before is not read again: nobody may change what is returned.

    Raises:
        InvalidInput, RequestValidationError: it is not one.
    """
    parameters = QueryParams(content)
    query = dict(parameters)
    if len(query) != len(parameters.multi_items()):
        raise InvalidInput("A query parameter is given twice.")
    try:
        return model.model_validate(query)
    except ValidationError as error:
        raise _invalid(error, "query") from error


def read_body(content: bytes, model: type[Model]) -> Model:
    """Return a JSON body as ``model``; raise RequestValidationError."""
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise _invalid(error, "body") from error


def batch_reader(request: Request, limit: int) -> Callable[[bytes], BatchRequest]:
    """Return what reads a batch from a body of the request's media type; raise 415.

    Beside an Arrow stream of ids the query says the rest. Beside JSON it says nothing: a version
    in it would be passed over.
    """
    media = request.headers.get("content-type", Format.JSON).partition(";")[0].strip().lower()
    if media == Format.JSON:
        read_query(request, RequestDocument)
        return partial(_read_json_batch, limit)
    if media == Format.ARROW:
        return partial(_read_arrow_batch, limit, read_query(request, EmbeddingQuery))
    raise HTTPException(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        f"A batch comes as {Format.JSON} or {Format.ARROW}, not as {media or 'nothing named'}.",
    )


def _read_json_batch(limit: int, content: bytes) -> BatchRequest:
    batch = read_body(content, BatchRequest)
    if len(batch.ids) > limit:
        raise BatchTooLarge(len(batch.ids), limit)
    return batch


def _read_arrow_batch(limit: int, query: EmbeddingQuery, content: bytes) -> BatchRequest:
    try:
        ids = read_ids(content, limit)
    except UnreadableIds as error:
        found = {"loc": ("body",), "msg": str(error), "type": "arrow_invalid"}
        raise RequestValidationError([found]) from error
    return BatchRequest.model_construct(
        ids=ids, version=query.version, entity=query.entity, drift=query.drift
    )


def _invalid(error: ValidationError, where: str) -> RequestValidationError:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return RequestValidationError([{**one, "loc": (where, *one["loc"])} for one in found])
