"""Connections: how many there are, and how long and how large a request's head may be.

uvicorn limits the head neither in time nor in size nor in number, and answers what it refuses in
plain text.
"""

import secrets
from asyncio import BaseTransport, TimerHandle, Transport
from collections import OrderedDict
from collections.abc import Awaitable
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from backcast import logs
from backcast.errors import Overloaded
from service.admission import saying_goodbye
from service.correlation import HEADER, Correlation
from service.gates import PLACE, Place
from service.metrics.meter import NONE, OTHER
from service.metrics.middleware import Metered
from service.problems import HTTP_CODES, describe, problem
from service.state import State

LONGEST_HEAD = 64 << 10
"""Most bytes of a request's line and headers, beyond what one read of the socket brings."""

LONGEST_PIPELINE = 16
"""Most requests of a connection that wait for the one that is being answered."""

_LAST_S = 0.5  # for a request that is on its way when the server stops
_ALWAYS = ("/livez", "/readyz", "/metrics")  # who looks after a replica is never one too many


class Protocol(HttpToolsProtocol):
    """A connection of uvicorn's, within the limits of the service's settings.

    For one too many, that is closed which has been idle longest. Where none is, the new one gets
    one answer, which is more than a 503 to health checks and scrapes only. One that does
    not bring a request's head in time, or does not take the end of an answer, is cut, and so is one
    that takes nothing of an answer for as long. One that asks too much at once is closed when it
    was answered what it had asked before.
    """

    _state: State
    _watch: TimerHandle
    _idle: OrderedDict[Transport, None]
    _seen: Any = None  # the request at which the connection stood still at the last look
    _left = 0  # bytes that were too many to write more at the last look, and ever since
    _running: RequestResponseCycle | None = None  # where others wait for it, it is not the last
    _read_on = True
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
        self._idle = self._state.idle
        self._look_later()
        if len(self.connections) > most and not self._make_room():
            self.app, self._idle = _Crowded(self.app, most), self._state.crowd
            if len(self.connections) > 2 * most and not self._make_room():
                self._state.shed["connections"] += 1
                self.transport.abort()
                return
        self._idle[self.transport] = None

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        self._watch.cancel()
        self._idle.pop(self.transport, None)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn tells only the last that was asked
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read, but no head and no trailers without an end."""
        if not self._read_on:
            return
        number, in_head, content = self._number, self._in_head, self._content
        super().data_received(data)
        if number != self._number:
            return
        if in_head and self._in_head:
            self._head += len(data)
            if self._head > LONGEST_HEAD:
                self._state.shed["large heads"] += 1
                most = f"A request's line and headers have at most {LONGEST_HEAD} bytes."
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, most)
        elif not in_head:
            self._around = self._around + len(data) if content == self._content else 0
            if self._around > LONGEST_HEAD:
                self._state.shed["large heads"] += 1
                self.transport.abort()

    def resume_writing(self) -> None:
        """Go on with an answer, of which enough was taken."""
        self._left = 0
        super().resume_writing()

    def on_message_begin(self) -> None:
        """Begin a request; raise where too many wait, so that the parser stops and this is refused.

        uvicorn keeps each that a read brings, and one read may bring 14,000.
        """
        if len(self.pipeline) >= LONGEST_PIPELINE:
            self._state.shed["pipelines"] += 1
            raise OverflowError
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
        self._idle.pop(self.transport, None)
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request, or wait for one."""
        super().on_response_complete()
        if self.timeout_keep_alive_task is not None:
            self._idle[self.transport] = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        """Refuse what the parser cannot read, or was not let read on."""
        self._refuse(HTTPStatus.BAD_REQUEST, msg)

    def shutdown(self) -> None:
        """Close when what is being asked is answered; wait a little where nothing is."""
        if self._is_answering():
            super().shutdown()
        else:
            self.loop.call_later(_LAST_S, super().shutdown)

    def _make_room(self) -> bool:
        """Close the connection on which nothing has been answered for longest, if there is one.

        It takes what it was answered before, but not where those that do so are many, too.
        """
        if not self._idle:
            return False
        transport, _ = self._idle.popitem(last=False)
        self._state.shed["idle connections"] += 1
        if len(self.connections) > 2 * self._state.settings.max_connections:
            transport.abort()
        else:
            transport.close()
        return True

    def _look_later(self) -> None:
        self._watch = self.loop.call_later(self._state.settings.head_seconds, self._look)

    def _look(self) -> None:
        if self._takes_nothing() or (self._stands_still() and self._seen is self.scope):
            self._state.shed["slow connections"] += 1
            self.transport.abort()
            return
        self._seen = self.scope if self._stands_still() else self
        self._look_later()

    def _stands_still(self) -> bool:
        """Tell whether the client ought to send or take something now."""
        between_requests = self.timeout_keep_alive_task is not None
        return self.transport.is_closing() or not (self._is_answering() or between_requests)

    def _takes_nothing(self) -> bool:
        """Tell whether nothing was taken of an answer since the last look."""
        waits = self.flow.write_paused and not self._is_timed()
        before, self._left = self._left, self.transport.get_write_buffer_size() if waits else 0
        return 0 < before <= self._left

    def _is_timed(self) -> bool:
        """Tell whether a gate ends the answer that has begun."""
        if self._running is None or not self._running.response_started:
            return False
        place = self._running.scope.get(PLACE)
        return isinstance(place, Place) and place.ends

    def _is_answering(self) -> bool:
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _refuse(self, status: HTTPStatus, detail: str) -> None:
        """Read no more, and say why; only close where that would fall into another answer."""
        self._read_on = False
        if not self._is_answering() or self._waits_for_body():
            self.transport.write(self._problem(status, detail))
            self.transport.close()
        elif self.cycle.more_body:  # what is being answered, or waits for that, has no end
            self.transport.abort()
        else:
            self.cycle.keep_alive = False

    def _waits_for_body(self) -> bool:
        """Tell whether the only request has no end yet, nor its answer a beginning."""
        return not self.pipeline and self.cycle.more_body and not self.cycle.response_started

    def _problem(self, status: HTTPStatus, detail: str) -> bytes:
        nowhere = Request({"type": "http", "raw_path": b"", "headers": []})
        code, id = HTTP_CODES[status], secrets.token_hex(8)
        logs.request_id.set(id)  # in the context of this connection, which ends
        response = problem(nowhere, status, code, detail)
        response.headers[HEADER] = id
        self._state.meter.answered(NONE, OTHER, status, 0.0, problem=code)
        return _written(response)


class _Crowded:
    """Answers once on a connection too many."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most
        self._refuse = Correlation(Metered(self._say_so))

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        app = self._app if scope["path"] in _ALWAYS else self._refuse
        return app(scope, receive, saying_goodbye(send))

    async def _say_so(self, scope: Scope, receive: Receive, send: Send) -> None:
        state: State = scope["state"]["service"]
        state.shed["connections"] += 1
        error = Overloaded(f"This worker has {self._most} connections already; try again.")
        await describe(Request(scope), error)(scope, receive, send)


def _written(response: Response) -> bytes:
    """Return the bytes of a response after which the connection is closed."""
    status = HTTPStatus(response.status_code)
    lines = [b"%s: %s" % header for header in response.raw_headers]
    first = f"HTTP/1.1 {status.value} {status.phrase}".encode()
    return b"\r\n".join([first, *lines, b"connection: close", b"", bytes(response.body)])
