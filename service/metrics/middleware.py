"""What is answered by the framework is counted, errors among it."""

from collections.abc import Awaitable
from time import perf_counter

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics.meter import NONE, Meter
from service.metrics.notes import PROBLEM, SERVED
from service.problems import GONE, HTTP_CODES
from service.routing import route_of


class Metered:
    """Counts requests, how they were answered, and how long that took."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        meter: Meter = scope["state"]["service"].meter
        status: int | None = None
        size = 0

        def send_seen(message: Message) -> Awaitable[None]:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                size += len(message.get("body", b""))
            return send(message)

        started = perf_counter()
        meter.in_progress += 1
        try:
            await self._app(scope, receive, send_seen)
        except ClientDisconnect:  # whom nobody can answer; it is no error of the service's
            status = GONE
        finally:
            meter.in_progress -= 1
            problem = scope.get(PROBLEM)
            if status is None:  # it raises, and is answered outside, by the framework's last resort
                status, problem = 500, HTTP_CODES[500]
            seconds, route = perf_counter() - started, route_of(scope) or NONE
            method, served = scope["method"], scope.get(SERVED)
            meter.answered(route, method, status, seconds, size, served, problem)
