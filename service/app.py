"""The service's ASGI application."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backcast.settings import Settings, check_environment
from backcast.vectors import MAX_ID_BYTES
from service import problems
from service.declarations import component_schemas
from service.routes import admin, changes, consumers, embeddings, health, versions
from service.state import open_state

_DESCRIPTION = """
Every historical version of an embedding, served from the latest vectors.

Ask for the version that your model was trained on: the answer has that version's dimension and
says, in `Backcast-*` headers, which version it is compatible with and which snapshot it was made
from. Nothing is ever substituted. Errors are problem documents (RFC 9457) with a stable `type`.
"""


def create_app(settings: Settings) -> FastAPI:
    """Return the application; it opens what ``settings`` name when its lifespan begins."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        with open_state(settings) as state:
            yield {"service": state}

    app = _Described(
        title="Backcast",
        summary="Backward compatible embeddings",
        description=_DESCRIPTION.strip(),
        version=version("backcast"),
        lifespan=lifespan,
        redoc_url=None,
        # An id is what it is: a slash at its end is not for the router to add or take away.
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
    )
    app.add_middleware(_ShortWay)  # the innermost: others see its answers too
    app.add_middleware(_BodyLimit, most=_largest_body(settings))
    problems.install(app)
    for module in (embeddings, versions, admin, changes, consumers, health):
        app.include_router(module.router)
    return app


def from_environment() -> FastAPI:
    """Return the application that the environment's settings describe, as uvicorn's factory."""
    check_environment()
    return create_app(Settings.load())


class _Described(FastAPI):
    """Adds to OpenAPI what FastAPI cannot see."""

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["components"]["schemas"].update(component_schemas())
        return document


class _ShortWay:
    """Answers plain requests for one vector, most of all, before the framework has its say.

    Its way to an endpoint takes longer than all that the endpoint does.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = embeddings.answer_at_once(scope) if _asks_for_one(scope) else None
        if answer is None:
            await self._app(scope, receive, send)
            return
        start = {"type": "http.response.start", "status": answer.status, "headers": answer.headers}
        await send(start)
        await send({"type": "http.response.body", "body": answer.content})


def _asks_for_one(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    path: str = scope["path"]
    return path.startswith(embeddings.PREFIX)


class _BodyLimit:
    """Reads no more than ``most`` bytes of a body; who reads it meets the error as a 413."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        read = 0

        async def receive_limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._most:
                raise HTTPException(413, f"A request body has at most {self._most} bytes.")
            return message

        await self._app(scope, receive_limited, send)


def _operation_id(route: APIRoute) -> str:
    return route.name


def _largest_body(settings: Settings) -> int:
    # Room for the longest ids in their longest spelling (a byte as \u0000), and then some.
    return max(64 << 20, settings.max_batch * (6 * MAX_ID_BYTES + 8))
