"""Errors on the wire: one table from errors to status codes, and RFC 9457 problem documents."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import quote

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from backcast import errors, logs
from backcast.errors import BackcastError
from service.metrics.notes import PROBLEM

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:backcast:problem:"

STATUS: Mapping[type[BackcastError], HTTPStatus] = {
    errors.InvalidInput: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.BatchTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    errors.NotFound: HTTPStatus.NOT_FOUND,
    errors.Conflict: HTTPStatus.CONFLICT,
    errors.VersionRetired: HTTPStatus.GONE,
    errors.SnapshotMismatch: HTTPStatus.PRECONDITION_FAILED,
    errors.Unauthorized: HTTPStatus.UNAUTHORIZED,
    errors.Forbidden: HTTPStatus.FORBIDDEN,
    errors.NotReady: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.Overloaded: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.RateLimited: HTTPStatus.TOO_MANY_REQUESTS,
    errors.ArtifactError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.StoreError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.RegistryError: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.SchemaMismatch: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.ConfigError: HTTPStatus.INTERNAL_SERVER_ERROR,
    errors.ServiceError: HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""The status of each error class; a class that is not named has that of its nearest ancestor."""

HTTP_CODES: Mapping[int, str] = {
    400: "bad-request",
    404: errors.NotFound.code,
    405: "method-not-allowed",
    406: "not-acceptable",
    408: "request-timeout",
    413: "content-too-large",
    415: "unsupported-media-type",
    431: "request-header-fields-too-large",
    500: "internal-server-error",
}
"""The code of what the framework itself refuses."""

HEADERS: Mapping[HTTPStatus, Mapping[str, str]] = {
    HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": "Bearer"},
    HTTPStatus.SERVICE_UNAVAILABLE: {"Retry-After": "1"},
}

GONE = 499
"""Of a request whose client has gone: nobody is answered, no server sends it, and others log it."""

METHODS = ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
"""Of HTTP; any other is nobody's, and is not to become a name in metrics or traces."""

_MOST_ERRORS = 20  # of a request that is wrong everywhere
_IN_WORDS = {"model_attributes_type": "a JSON object is needed"}
"""What is said of a type of error whose own message speaks of Python."""

_LONGEST = 40  # characters of a field's name, as a stranger spelt it
_LONGEST_PATH = 2000  # characters of a path, and more than any that leads somewhere
_SLACK = 500  # beyond them: a secret that begins within them is mostly seen whole


def status_of(error: type[BackcastError]) -> HTTPStatus:
    """Return the status code of an error class."""
    known = (STATUS[ancestor] for ancestor in error.__mro__ if ancestor in STATUS)
    return next(known, HTTPStatus.INTERNAL_SERVER_ERROR)


def code_of(error: Exception) -> str:
    """Return the code that a refusal is answered with."""
    if isinstance(error, BackcastError):
        return error.code
    if isinstance(error, HTTPException):
        return HTTP_CODES.get(error.status_code, f"http-{error.status_code}")
    return errors.InvalidInput.code


def install(app: FastAPI) -> None:
    """Answer every error with a problem document."""
    app.add_exception_handler(BackcastError, _on_backcast_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_unforeseen)


def problem(
    request: Request,
    status: HTTPStatus,
    code: str,
    detail: str,
    *,
    data: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return a problem document, with ``data`` as extension members."""
    request.scope[PROBLEM] = code
    standard = {
        "type": f"{TYPE_PREFIX}{code}",
        "title": code.replace("-", " ").capitalize(),
        "status": status,
        "detail": detail,
        "instance": _instance(request),
        **_request_id(),
    }
    return Response(
        orjson.dumps({**standard, **(data or {}), **standard}, default=str),
        status,
        media_type=MEDIA_TYPE,
        headers={**HEADERS.get(status, {}), **(headers or {})},
    )


def _instance(request: Request) -> str:
    # Decoded, a key is seen however it was written; a head that was refused has no such path.
    path: str = request.scope.get("path", "")
    raw: bytes = request.scope["raw_path"]
    if "bc_" in path or len(raw) > 2 * _LONGEST_PATH:
        return quote(_shown(path))
    return raw.decode("ascii", errors="replace")


def _shown(path: str) -> str:
    shown = logs.redact(path[: _LONGEST_PATH + _SLACK])
    return shown if len(shown) <= _LONGEST_PATH else f"{shown[: _LONGEST_PATH - 1]}…"


def _request_id() -> dict[str, str]:
    id = logs.request_id.get()
    return {} if id is None else {"request_id": id}


def describe(request: Request, error: BackcastError) -> Response:
    """Return the problem document of an error, with the headers that its status asks for."""
    return problem(
        request,
        status_of(type(error)),
        error.code,
        error.message,
        data=error.data,
        headers=_rate_headers(error) if isinstance(error, errors.RateLimited) else None,
    )


def _rate_headers(error: errors.RateLimited) -> dict[str, str]:
    # The fields of draft-ietf-httpapi-ratelimit-headers-10.
    name, after = error.data["unit"], error.data["retry_after"]
    return {
        "Retry-After": f"{after}",
        "RateLimit-Policy": f'"{name}";q={error.data["limit"]};w={error.data["seconds"]}',
        "RateLimit": f'"{name}";r=0;t={after}',
    }


async def _on_backcast_error(request: Request, raised: Exception) -> Response:
    return describe(request, cast("BackcastError", raised))


async def _on_invalid_request(request: Request, raised: Exception) -> Response:
    found = _described(cast("RequestValidationError", raised).errors()[:_MOST_ERRORS])
    where, *inside = found[0]["loc"]
    named = inside if any(isinstance(part, str) for part in inside) else [where, *inside]
    first = ".".join(str(part) for part in named)
    return problem(
        request,
        status_of(errors.InvalidInput),
        code_of(raised),
        f"{first}: {found[0]['msg']}.",
        data={"errors": found},
    )


def _described(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    # What was sent is left out: it may be long, and it may be secret. Names of fields are sent too.
    return [
        {"loc": [_short(part) for part in error["loc"]], "msg": _said(error), "type": error["type"]}
        for error in found
    ]


def _said(error: Mapping[str, Any]) -> str:
    if tuple(error["loc"]) == ("body",) and error["type"] == "missing":
        return "a JSON body is needed"
    return _IN_WORDS.get(error["type"]) or str(error["msg"])


def _short(part: str | int) -> str | int:
    return part if isinstance(part, int) or len(part) <= _LONGEST else f"{part[:_LONGEST]}…"


async def _on_http_exception(request: Request, raised: Exception) -> Response:
    error = cast("HTTPException", raised)
    status = HTTPStatus(error.status_code)
    detail = error.detail
    if detail == status.phrase:  # which says nothing
        detail = f"{request.method} {_shown(request.scope['path'])}: {detail}"
    headers = error.headers
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        headers = {**(headers or {}), "Allow": ", ".join(_methods(request))}
    return problem(request, status, code_of(error), detail, headers=headers)


def _methods(request: Request) -> list[str]:
    """Return the methods of a path; the framework names those of its first route only."""
    routes = request.app.routes
    asked = ({**request.scope, "method": method} for method in METHODS)
    return [
        scope["method"]
        for scope in asked
        if any(route.matches(scope)[0] is Match.FULL for route in routes)
    ]


async def _on_unforeseen(request: Request, _raised: Exception) -> Response:
    # The error goes on to the server, which logs it with its traceback.
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    detail = "An unforeseen error; the log has it, under this request's id."
    return problem(request, status, HTTP_CODES[status], detail)
