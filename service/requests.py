"""What endpoints read from a request: the caller, the snapshot, the format, the id.

Plain functions of the request: as FastAPI dependencies they would take longer than finding the
vector and mapping it together. ``service.declarations`` tells OpenAPI of what they read.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from http import HTTPStatus
from typing import TypeVar, cast
from urllib.parse import unquote_to_bytes

from anyio import fail_after, to_thread
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException

from backcast.errors import BatchTooLarge, InvalidInput, RegistryError, Unauthorized
from backcast.vectors import check_id
from backcast.versions import Key, Scope
from service.arrow import UnreadableIds, read_ids
from service.auth import bearer_secret, demand
from service.documents import BatchRequest, EmbeddingQuery, RequestDocument
from service.documents_changes import EraseRequest, UpsertRequest
from service.engine import Snapshot
from service.json_values import has_more_signs
from service.limits import REQUESTS, VECTORS
from service.state import State, state_of
from service.wire import Format, negotiate

Model = TypeVar("Model", bound=BaseModel)
OfIds = TypeVar("OfIds", BatchRequest, UpsertRequest, EraseRequest)

EXPECT_SNAPSHOT = "Backcast-Expect-Snapshot"
CALLER = "backcast.caller"
"""In the scope of a request: the key that was found for it, None for none."""
PAID = "backcast.paid"
"""In the scope of a request that was paid for on the short way, and then went the long one."""
_REFRESH_S = 5
_TWICE = "A query parameter is given twice."
_LARGE = 64 << 10  # bytes of JSON; reading fewer takes a tenth of a second at worst
_MOST_ERRORS = 1000  # that are described one by one: millions would take minutes


async def find_reader(request: Request) -> Key | None:
    """Return the caller's key; None for an anonymous caller where reads are open.

    Raises:
        Unauthorized, Forbidden: the caller may not read.
        RateLimited: not now.
    """
    caller = await find_unpaid_reader(request)
    await pay_for_request(request, caller)
    return caller


async def find_unpaid_reader(request: Request) -> Key | None:
    """Return the same before it has paid for the request; raise Unauthorized or Forbidden."""
    caller = await _find_key(request)
    if caller is not None or state_of(request).settings.reads != "open":
        caller = demand(caller, Scope.READ)
    return caller


async def pay_for_request(request: Request, caller: Key | None) -> None:
    """Pay for the request itself, whatever it is about; raise RateLimited."""
    limits = state_of(request).limits
    if limits.on and PAID not in request.scope:
        await limits.pay(caller, REQUESTS)


async def pay_for_one(request: Request, caller: Key | None) -> None:
    """Pay for one vector, beside the request; raise RateLimited."""
    limits = state_of(request).limits
    if limits.on and PAID not in request.scope:
        await limits.pay(caller, VECTORS)


def recall_reader(state: State, authorization: str | None) -> Key | None:
    """Return the same without asking the database; raise Unauthorized where that is not enough."""
    secret = bearer_secret(authorization)
    if secret is None and state.settings.reads == "open":
        return None
    return demand(None if secret is None else state.keys.recall(secret), Scope.READ)


async def _find_key(request: Request) -> Key | None:
    secret = find_secret(request)
    found = None if secret is None else await state_of(request).keys.identify(secret)
    request.scope[CALLER] = found
    return found


def find_secret(request: Request) -> str | None:
    """Return the secret that the request carries; raise Unauthorized where it is malformed."""
    given = request.headers.getlist("authorization")
    if len(given) > 1:  # whichever was taken, somebody in front might have checked another
        raise Unauthorized("There is more than one Authorization header; send one.")
    return bearer_secret(given[0] if given else None)


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


def demand_known_query(request: Request) -> None:
    """Raise RequestValidationError where the query has what the route knows nothing of.

    The framework passes over it, and what was mistyped would not be missed.
    """
    route: APIRoute = request.scope["route"]
    declared = (route.openapi_extra or {}).get("parameters", ())  # read by the endpoint itself
    known = {one["name"] for one in declared if one["in"] == "query"}
    for field in route.dependant.query_params:
        known.update(_names(field.field_info.annotation) or [field.alias])
    given = [name for name, _ in request.query_params.multi_items()]
    unknown = [name for name in dict.fromkeys(given) if name not in known]
    if unknown:
        told = f"no parameter of this call, which has {', '.join(sorted(known)) or 'none'}"
        found = [{"loc": ("query", one), "msg": told, "type": "extra_forbidden"} for one in unknown]
        raise RequestValidationError(found)
    if len(set(given)) < len(given):
        raise InvalidInput(_TWICE)


def _names(model: object) -> Iterable[str]:
    """Return the names of a document's fields; of what is no document, none."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        return model.model_fields
    return ()


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
        raise InvalidInput(_TWICE)
    try:
        return model.model_validate(query)
    except ValidationError as error:
        raise _invalid(error, "query") from error


def read_body(content: bytes, model: type[Model]) -> Model:
    """Return a JSON body as ``model``; raise RequestValidationError."""
    if not content:
        raise RequestValidationError([{"loc": ("body",), "msg": "missing", "type": "missing"}])
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        raise _invalid(error, "body") from error


def batch_reader(request: Request, limit: int) -> Callable[[bytes], BatchRequest]:
    """Return what reads a batch from a body of the request's media type; raise 415.

    Beside an Arrow stream of ids the query says the rest. Beside JSON it says nothing: a version
    in it would be passed over.
    """
    media = media_of(request)
    if media == Format.JSON:
        read_query(request, RequestDocument)
        return partial(read_few, model=BatchRequest, limit=limit)
    if media == Format.ARROW:
        return partial(_read_arrow_batch, limit, read_query(request, EmbeddingQuery))
    raise unsupported("A batch comes", media, Format.JSON, Format.ARROW)


def media_of(request: Request) -> str:
    """Return the media type of a request's body, JSON where none is named."""
    return request.headers.get("content-type", Format.JSON).partition(";")[0].strip().lower()


def unsupported(what: str, media: str, *known: Format) -> HTTPException:
    """Return the 415 that says how ``what`` is read."""
    return HTTPException(
        HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        f"{what} as {' or '.join(known)}, not as {media or 'nothing named'}.",
    )


def demand_few(ids: Sequence[str], limit: int) -> None:
    """Raise BatchTooLarge where there are more ids than ``limit``."""
    if len(ids) > limit:
        raise BatchTooLarge(len(ids), limit)


@contextmanager
def arrow_read() -> Iterator[None]:
    """Raise RequestValidationError where the block finds an Arrow stream unreadable."""
    try:
        yield
    except UnreadableIds as error:
        found = {"loc": ("body",), "msg": str(error), "type": "arrow_invalid"}
        raise RequestValidationError([found]) from error


def has_too_many(content: bytes, model: type[OfIds], limit: int, dim: int = 0) -> bool:
    """Tell whether a body has more values than so many ids can have; a small one may have them."""
    # A sign before each id, and one before its vector and each of its numbers; of a field two.
    most = limit * (2 + dim if dim else 1) + 3 * len(model.model_fields) + 1
    return len(content) > _LARGE and has_more_signs(content, most)


def read_few(content: bytes, model: type[OfIds], limit: int, dim: int = 0) -> OfIds:
    """Return a JSON body as ``model``: at most ``limit`` ids, each perhaps with ``dim`` numbers.

    Raises:
        HTTPException, BatchTooLarge: it has more; that of a large one is found before it is read.
        RequestValidationError: it is no such document.
    """
    if has_too_many(content, model, limit, dim):
        vectors = f" with vectors of {dim} numbers" if dim else ""
        raise HTTPException(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"The body has more values than a batch of {limit} ids{vectors} can have; send several "
            "batches.",
        )
    found = read_body(content, model)
    demand_few(found.ids, limit)
    return found


def _read_arrow_batch(limit: int, query: EmbeddingQuery, content: bytes) -> BatchRequest:
    with arrow_read():
        ids = read_ids(content, limit)
    return BatchRequest.model_construct(
        ids=ids, version=query.version, entity=query.entity, drift=query.drift
    )


def _invalid(error: ValidationError, where: str) -> RequestValidationError:
    count = error.error_count()
    if count > _MOST_ERRORS:
        told = {"loc": (where,), "msg": f"{count} fields are unknown or wrong", "type": "too_many"}
        return RequestValidationError([told])
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return RequestValidationError([{**one, "loc": (where, *one["loc"])} for one in found])
