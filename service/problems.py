"""Errors on the wire: one table from errors to status codes, and RFC 9457 problem documents."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, cast

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from backcast import errors
from backcast.errors import BackcastError

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
    413: "content-too-large",
    415: "unsupported-media-type",
    500: "internal-server-error",
}
"""The code of what the framework itself refuses."""

HEADERS: Mapping[HTTPStatus, Mapping[str, str]] = {
    HTTPStatus.UNAUTHORIZED: {"WWW-Authenticate": "Bearer"},
    HTTPStatus.SERVICE_UNAVAILABLE: {"Retry-After": "1"},
}

_MOST_ERRORS = 20  # of a request that is wrong everywhere


def status_of(error: type[BackcastError]) -> HTTPStatus:
    """Return the status code of an error class."""
    known = (STATUS[ancestor] for ancestor in error.__mro__ if ancestor in STATUS)
    return next(known, HTTPStatus.INTERNAL_SERVER_ERROR)


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
    standard = {
        "type": f"{TYPE_PREFIX}{code}",
        "title": code.replace("-", " ").capitalize(),
        "status": status,
        "detail": detail,
        "instance": request.scope["raw_path"].decode("ascii", errors="replace"),
    }
    return Response(
        orjson.dumps({**standard, **(data or {}), **standard}, default=str),
        status,
        media_type=MEDIA_TYPE,
        headers={**HEADERS.get(status, {}), **(headers or {})},
    )


async def _on_backcast_error(request: Request, raised: Exception) -> Response:
    error = cast("BackcastError", raised)
    return problem(request, status_of(type(error)), error.code, error.message, data=error.data)


async def _on_invalid_request(request: Request, raised: Exception) -> Response:
    found = _described(cast("RequestValidationError", raised).errors())
    first = ".".join(str(part) for part in found[0]["loc"])
    return problem(
        request,
        status_of(errors.InvalidInput),
        errors.InvalidInput.code,
        f"{first}: {found[0]['msg']}.",
        data={"errors": found[:_MOST_ERRORS]},
    )


def _described(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    # What was sent is left out: it may be long, and it may be secret.
    return [{name: error[name] for name in ("loc", "msg", "type")} for error in found]


async def _on_http_exception(request: Request, raised: Exception) -> Response:
    error = cast("HTTPException", raised)
    status = HTTPStatus(error.status_code)
    code = HTTP_CODES.get(status, f"http-{status}")
    said_nothing = error.detail == status.phrase
    detail = (
        f"{request.method} {request.url.path}: {error.detail}" if said_nothing else error.detail
    )
    return problem(request, status, code, detail, headers=error.headers)


async def _on_unforeseen(request: Request, _raised: Exception) -> Response:
    # The error goes on to the server, which logs it with its traceback.
    status = HTTPStatus.INTERNAL_SERVER_ERROR
    return problem(request, status, HTTP_CODES[status], "An unforeseen error; the log has it.")
