"""What is let in: how many at once, how large a body, and how long it may all take.

A request that is too much is refused before its body is read. The bodies and answers in memory at
any moment are therefore at most as many as the gates let in.
"""

import logging
import sys

from anyio import current_time, fail_after, move_on_after
from fastapi import Request
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from backcast.errors import NotFound
from service import problems
from service.gates import PLACE, Gate
from service.routing import BATCH, CHANGES, leads_nowhere
from service.state import State

logger = logging.getLogger(__name__)

LONGEST_ORDER = 64 << 10
"""Most bytes of a body that carries neither ids nor vectors: it is read on the event loop."""

_TOO_LONG = 20  # digits of a length: Python reads some thousands at most

_PIECE = 256 << 10  # of an answer; a reader that is slow keeps no more when its gate has closed


class Admission:
    """Around all that reads a body or answers with many vectors; within what counts refusals."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        state: State = scope["state"]["service"]
        if state.draining.is_set():
            send = saying_goodbye(send)
        if leads_nowhere(scope):  # past the gates, too
            error = NotFound("Nothing is at this path.")
            await problems.describe(Request(scope), error)(scope, receive, send)
            return
        if scope["method"] == "GET":  # nobody reads its body
            await self._app(scope, receive, send)
            return
        gate, settings = _gate(scope, state), state.settings
        most = LONGEST_ORDER if gate is None else settings.max_body
        body = _Body(receive, _declared(scope), most, settings.body_seconds)
        if gate is None:
            await self._app(scope, body, send)
        else:
            await self._pass(gate, scope, body, _InPieces(send))

    async def _pass(self, gate: Gate, scope: Scope, body: "_Body", send: "_InPieces") -> None:
        with gate.opened() as place, move_on_after(gate.seconds) as patience:
            scope[PLACE] = place  # for the endpoint, which finds out whose it is
            await self._app(scope, body, send)
        if not patience.cancelled_caught:
            return
        error = gate.too_slow()
        if send.begun:  # the server closes the connection on an answer without an end
            logger.warning("an answer is cut off: %s", error.message)
        else:
            await problems.describe(Request(scope), error)(scope, body, send)


def _gate(scope: Scope, state: State) -> Gate | None:
    if scope["path"] == BATCH:
        return state.batches
    return state.changes if scope["path"] == CHANGES else None


def _declared(scope: Scope) -> int:
    length = Headers(scope=scope).get("content-length", "").lstrip("0")
    if not length.isdecimal():
        return 0
    return int(length) if len(length) < _TOO_LONG else sys.maxsize


class _Body:
    """Receives no more than ``most`` bytes, in no more than ``seconds`` from the first call on.

    Who reads the body meets the error: a 413, at once where the length is declared, or a 408.
    """

    def __init__(self, receive: Receive, declared: int, most: int, seconds: float) -> None:
        self._receive, self._most, self._seconds = receive, most, seconds
        self._declared, self._read = declared, 0
        self._until: float | None = None
        self._whole = False

    async def __call__(self) -> Message:
        if self._whole:  # all that can come now is that the client has gone
            return await self._receive()
        self._demand(self._declared)
        message = await self._in_time()
        self._read += len(message.get("body", b""))
        self._demand(self._read)
        self._whole = not message.get("more_body", False)
        return message

    def _demand(self, length: int) -> None:
        if length > self._most:
            raise HTTPException(413, f"A request body has at most {self._most} bytes here.")

    async def _in_time(self) -> Message:
        if self._until is None:
            self._until = current_time() + self._seconds
        try:
            with fail_after(self._until - current_time()):
                return await self._receive()
        except TimeoutError as error:
            raise HTTPException(
                408,
                f"The request's body did not come within {self._seconds:g} s.",
                headers={"Connection": "close"},
            ) from error


class _InPieces:
    """Sends long answers piece by piece, each when the client has taken most of the last."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.begun = False

    async def __call__(self, message: Message) -> None:
        self.begun = True
        body = message.get("body", b"")
        if len(body) > _PIECE:
            whole = memoryview(body)
            for at in range(0, len(whole) - _PIECE, _PIECE):
                await self._send({**message, "body": whole[at : at + _PIECE], "more_body": True})
            message = {**message, "body": whole[at + _PIECE :]}
        await self._send(message)


def saying_goodbye(send: Send) -> Send:
    """Let every answer be the last on its connection, so that none is idle after it."""

    async def send_last(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = [*message.get("headers", ()), (b"connection", b"close")]
            message = {**message, "headers": headers}
        await send(message)

    return send_last
