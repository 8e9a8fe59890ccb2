"""What is answered by the framework is counted, errors among it."""

import logging
from collections.abc import Awaitable
from time import perf_counter

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics.meter import NONE, Meter
from service.metrics.notes import PROBLEM, SERVED
from service.problems import GONE
from service.routing import route_of

logger = logging.getLogger(__name__)


class Metered:
    """Counts requests, how they were answered, and how long that took."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        meter: Meter = scope["state"]["service"].meter
        status, size = 500, 0  # of what raises, and is answered by the framework's last resort

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
            _count(meter, scope, status, size, perf_counter() - started)


def _count(meter: Meter, scope: Scope, status: int, size: int, seconds: float) -> None:
    try:
        route = route_of(scope) or NONE
        served, problem = scope.get(SERVED), scope.get(PROBLEM)
        meter.answered(route, scope["method"], status, seconds, size, served, problem)
    except Exception:  # the request was answered, and that counts for more
        logger.exception("a request was not counted")
