"""The service's ASGI application."""

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from time import perf_counter
from typing import Any

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from backcast import logs
from backcast.settings import Settings, check_environment
from service import problems
from service.access_log import AccessLog
from service.admission import Admission
from service.correlation import Correlation
from service.declarations import component_schemas, restore_nulls
from service.draining import draining
from service.metrics.meter import Meter
from service.metrics.middleware import Metered
from service.metrics.notes import PROBLEM
from service.routes import admin, changes, consumers, embeddings, health, keys, metrics, versions
from service.state import open_state
from service.tracing import TracedRequests, stages_recorded

logger = logging.getLogger(__name__)

_DESCRIPTION = """
Every historical version of an embedding, served from the latest vectors.

Ask for the version that your model was trained on: the answer has that version's dimension and
says, in `Backcast-*` headers, which version it is compatible with and which snapshot it was made
from. Nothing is ever substituted. Errors are problem documents (RFC 9457) with a stable `type`.

What no call promises, any may be answered with: 500 where something is broken here (the log has it,
under the answer's `X-Request-Id`), and, before it is known which call it is, 400 where a request is
not HTTP and 431 where its line and headers are too long.
"""


def create_app(settings: Settings) -> FastAPI:
    """Return the application; it opens what ``settings`` name when its lifespan begins."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[Mapping[str, Any]]:
        with (
            open_state(settings) as state,
            stages_recorded(state.backcast.tracing),
            draining(state.draining, settings.drain_seconds),
        ):
            yield {"service": state}

    app = _Application(
        layers=_outermost(settings),
        title="Backcast",
        summary="Backward compatible embeddings",
        description=_DESCRIPTION.strip(),
        version=version("backcast"),
        lifespan=lifespan,
        # Pages that show the document fetch scripts from elsewhere, and keys would be typed there.
        docs_url=None,
        redoc_url=None,
        # An id is what it is: a slash at its end is not for the router to add or take away.
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
        # Our own traces name no person and have one switch; the framework's name paths and cost
        # every request 8 µs, only to ask whether anybody wants them.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.add_middleware(Admission)
    app.add_middleware(Metered)  # outside what refuses requests, so that it counts them too
    problems.install(app)
    for module in (embeddings, versions, admin, changes, consumers, keys, health, metrics):
        app.include_router(module.router)
    return app


def from_environment() -> FastAPI:
    """Return the application that the environment's settings describe, as uvicorn's factory."""
    check_environment()
    return create_app(Settings.load())


def _outermost(settings: Settings) -> list[Callable[[ASGIApp], ASGIApp]]:
    """Return what surrounds all else, the innermost first; what is off is not there.

    Who refuses requests even before the short way counts them too: ``Meter.answered``.
    """
    wanted: dict[Callable[[ASGIApp], ASGIApp], bool] = {
        _ShortWay: True,
        TracedRequests: settings.traces != "off",
        AccessLog: settings.access_log == "on",
        Correlation: True,
    }
    return [layer for layer, is_wanted in wanted.items() if is_wanted]


class _Application(FastAPI):
    """Adds to OpenAPI what FastAPI cannot see, and ``layers`` around what the framework does."""

    def __init__(self, *, layers: Sequence[Callable[[ASGIApp], ASGIApp]], **options: Any) -> None:
        super().__init__(**options)
        self._layers = layers

    def build_middleware_stack(self) -> ASGIApp:
        app = super().build_middleware_stack()
        for layer in self._layers:
            app = layer(app)
        return app

    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        document["components"]["schemas"].update(component_schemas())
        restore_nulls(document, {embeddings.BATCH: embeddings.BATCH_EXAMPLE})
        return document


class _ShortWay:
    """Answers plain requests for one vector, most of all, before the framework has its say.

    Its way to an endpoint takes longer than all that the endpoint does.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._trouble = app, logs.Trouble(logger, "answering at once")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = perf_counter()
        answer = self._answer(scope) if _asks_for_one(scope) else None
        if answer is None:
            await self._app(scope, receive, send)
            return
        status, headers, content, served = answer
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})
        seconds = perf_counter() - started
        problem = scope.get(PROBLEM) if served is None else None
        meter: Meter = scope["state"]["service"].meter
        meter.answered(embeddings.ROUTE, "GET", status, seconds, len(content), served, problem)

    def _answer(self, scope: Scope) -> embeddings.Answer | None:
        try:
            return embeddings.answer_at_once(scope)
        except Exception as error:  # the long way answers too, or tells of what is wrong with it
            self._trouble.note(f"{type(error).__name__}", error)
            return None


def _asks_for_one(scope: Scope) -> bool:
    if scope["type"] != "http" or scope["method"] != "GET":
        return False
    path: str = scope["path"]
    return path.startswith(embeddings.PREFIX)


def _operation_id(route: APIRoute) -> str:
    return route.name
