"""Which request is which: an id that the answer, its error and every log line of it carry."""

import re
import secrets
from collections.abc import Awaitable, Iterable
from itertools import count

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backcast import logs

HEADER = "X-Request-Id"

_NAME = HEADER.lower().encode()
_SOUND = re.compile(rb"[\x21-\x7e]{1,128}")
_TRACE = re.compile(rb"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class Correlation:
    """Gives every request an id: the caller's, where it is printable ASCII, else a new one.

    The outermost layer, so that every answer has one. A new id is what no other process chose and
    the request's number here: random ones would take longer to make.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._process, self._number = secrets.token_hex(6), count(1)

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Return the application's answer; no coroutine of its own, as that would take longer."""
        if scope["type"] != "http":
            return self._app(scope, receive, send)
        # Each request has a task of its own, and with it a context: nothing is to be taken back.
        # One that was pipelined begins with that of the request before it.
        if logs.trace_id.get() is not None:
            logs.trace_id.set(None)
        id = self._choose(scope["headers"])
        logs.request_id.set(id)
        said = (_NAME, id.encode())

        def send_with_id(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], said]
            return send(message)

        return self._app(scope, receive, send_with_id)

    def _choose(self, given: Iterable[tuple[bytes, bytes]]) -> str:
        headers = dict(given)
        if b"traceparent" in headers:
            _note_trace(headers[b"traceparent"])
        chosen = headers.get(_NAME)
        if chosen is not None and _SOUND.fullmatch(chosen):
            return chosen.decode()
        return f"{self._process}-{next(self._number)}"


def _note_trace(traceparent: bytes) -> None:
    found = _TRACE.fullmatch(traceparent)
    if found is not None:
        logs.trace_id.set(found[1].decode())
