"""What is recorded of requests where traces are wanted: the request, and the stages of its answer.

After the semantic conventions for HTTP, but for paths, queries and clients' addresses: they may
name a person.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backcast import logs
from backcast.changes import ChangedSnapshot
from backcast.tracing import Attributes, RequestSpan, Tracing
from service.engine import ServedMap
from service.problems import GONE, METHODS
from service.routes import embeddings
from service.routing import route_of
from service.state import State

_SAID = {
    b"backcast-version": "backcast.version",
    b"backcast-live-version": "backcast.live_version",
    b"backcast-snapshot": "backcast.snapshot",
}


class TracedRequests:
    """Records every request; within the layer that gives it its id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: State = scope["state"]["service"]
        method = scope["method"] if scope["method"] in METHODS else "HTTP"
        headers = dict(scope["headers"])
        given = [_text(headers.get(name)) for name in (b"traceparent", b"tracestate")]
        with state.backcast.tracing.request(method, *given) as span:
            if span is None:
                await self._app(scope, receive, send)
            else:
                await self._recorded(span, method, scope, receive, send)

    async def _recorded(
        self, span: RequestSpan, method: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        begun: Message = {"status": GONE, "headers": []}

        async def send_noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                begun.update(message)
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            status, route = begun["status"], route_of(scope)
            span.describe(
                method if route is None else f"{method} {route}",
                {**_asked(scope, method, route), **_answered(begun)},
                str(status) if status >= 500 else None,
            )


def _asked(scope: Scope, method: str, route: str | None) -> Attributes:
    request_id = logs.request_id.get()
    return {
        "http.request.method": "_OTHER" if method == "HTTP" else method,
        "url.scheme": scope["scheme"],
        "network.protocol.version": scope["http_version"],
        **({} if route is None else {"http.route": route}),
        **({} if request_id is None else {"backcast.request_id": logs.redact(request_id)}),
    }


def _answered(begun: Mapping[str, Any]) -> Attributes:
    said = {_SAID[name]: value.decode() for name, value in begun["headers"] if name in _SAID}
    return {"http.response.status_code": begun["status"], **said}


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


@contextmanager
def stages_recorded(tracing: Tracing) -> Iterator[None]:
    """Record how every answer is gathered, mapped and written, in this process, to the block's end.

    They are taken hold of from outside: without traces they are as if there were none.
    """
    if not tracing.wanted:
        yield
        return
    with ExitStack() as stack:
        for owner, name, stage, describe in _STAGES:
            plain = getattr(owner, name)
            stack.callback(setattr, owner, name, plain)
            setattr(owner, name, tracing.measured(stage, plain, describe))
        yield


_STAGES: tuple[tuple[Any, str, str, Any], ...] = (
    (ChangedSnapshot, "gather", "gather", lambda _self, _entity, ids: {"backcast.ids": len(ids)}),
    (ServedMap, "__call__", "product", lambda _self, rows, **_: {"backcast.rows": len(rows)}),
    (embeddings, "encode_one", "encode", lambda format, *_: {"backcast.format": str(format)}),
    (embeddings, "encode_batch", "encode", lambda format, *_: {"backcast.format": str(format)}),
)
