"""Connections: how many there are, and how long and how large a request's head may be.

uvicorn limits the head neither in time nor in size, and answers what it refuses in plain text.
"""

from asyncio import BaseTransport, TimerHandle
from collections.abc import Awaitable
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from backcast.errors import Overloaded
from service.correlation import Correlation
from service.metrics.middleware import Metered
from service.problems import HTTP_CODES, describe, problem
from service.state import State

LONGEST_HEAD = 64 << 10
"""Most bytes of a request's line and headers, beyond what one read of the socket brings."""

_LAST_S = 0.5  # for a request that is on its way when the server stops
_ALWAYS = ("/livez", "/readyz", "/metrics")  # who looks after a replica is never one too many


class Protocol(HttpToolsProtocol):
    """A connection of uvicorn's, within the limits of the service's settings.

    Over one too many only health checks and scrapes are answered with more than a 503, and it is
    closed. One that does not bring a request's head in time, or does not take the end of an answer,
    is cut.
    """

    _state: State
    _watch: TimerHandle
    _seen: Any = None  # the request at which the connection stood still at the last look
    _in_head = False
    _head = 0
    _number = 0  # of the request that is being read
    _content = 0  # bytes of its body
    _around = 0  # bytes of chunks' sizes and trailers since the last of those

    def connection_made(self, transport: BaseTransport) -> None:
        """Begin, or prepare the refusal of the first request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._state = self.app_state["service"]
        most = self._state.settings.max_connections
        if len(self.connections) > most:
            self.app = _Crowded(self.app, most)
        if len(self.connections) > 2 * most:  # as many are being refused
            self._state.shed["connections"] += 1
            self.transport.abort()
        self._look_later()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read, but no head and no trailers without an end."""
        number, in_head, content = self._number, self._in_head, self._content
        super().data_received(data)
        if number != self._number:
            return
        if in_head and self._in_head:
            self._head += len(data)
            if self._head > LONGEST_HEAD:
                self._refuse_head()
        elif not in_head:
            self._around = self._around + len(data) if content == self._content else 0
            if self._around > LONGEST_HEAD:
                self._state.shed["large heads"] += 1
                self.transport.abort()

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._number += 1
        self._in_head, self._head, self._content, self._around = True, 0, 0, 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; a trailer, which nobody would read, is dropped."""
        if self._in_head:
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._content += len(body)
        super().on_body(body)

    def on_headers_complete(self) -> None:
        """Begin to answer."""
        self._in_head = False
        super().on_headers_complete()

    def shutdown(self) -> None:
        """Close when what is being asked is answered; wait a little where nothing is."""
        if self._is_answering():
            super().shutdown()
        else:
            self.loop.call_later(_LAST_S, super().shutdown)

    def _look_later(self) -> None:
        self._watch = self.loop.call_later(self._state.settings.head_seconds, self._look)

    def _look(self) -> None:
        if self._stands_still() and self._seen is self.scope:
            self._state.shed["slow connections"] += 1
            self.transport.abort()
            return
        self._seen = self.scope if self._stands_still() else self
        self._look_later()

    def _stands_still(self) -> bool:
        """Tell whether the client ought to send or take something now."""
        between_requests = self.timeout_keep_alive_task is not None
        return not self._is_answering() and (not between_requests or self.transport.is_closing())

    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _refuse_head(self) -> None:
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        detail = f"A request's line and headers have at most {LONGEST_HEAD} bytes."
        nowhere = Request({"type": "http", "raw_path": b"", "headers": []})
        response = problem(nowhere, status, HTTP_CODES[status], detail)
        self._state.shed["large heads"] += 1
        self.transport.write(_written(response))
        self.transport.close()


class _Crowded:
    """Answers on a connection too many."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most
        self._refuse = Correlation(Metered(self._say_so))

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        app = self._app if scope["path"] in _ALWAYS else self._refuse
        return app(scope, receive, send)

    async def _say_so(self, scope: Scope, receive: Receive, send: Send) -> None:
        state: State = scope["state"]["service"]
        state.shed["connections"] += 1
        error = Overloaded(f"This worker has {self._most} connections already; try again.")
        response = describe(Request(scope), error)
        response.headers["Connection"] = "close"
        await response(scope, receive, send)


def _written(response: Response) -> bytes:
    """Return the bytes of a response after which the connection is closed."""
    status = HTTPStatus(response.status_code)
    lines = [b"%s: %s" % header for header in response.raw_headers]
    first = f"HTTP/1.1 {status.value} {status.phrase}".encode()
    return b"\r\n".join([first, *lines, b"connection: close", b"", bytes(response.body)])
