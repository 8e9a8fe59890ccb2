"""One log line a request, where it is wanted: by its route, without id or key."""

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.problems import GONE
from service.requests import CALLER
from service.routing import route_of

logger = logging.getLogger(__name__)


class AccessLog:
    """Logs what was asked for by whom, what came of it, and how long that took."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, begun, sent = time.perf_counter(), {"status": GONE, "headers": []}, 0

        async def send_noted(message: Message) -> None:
            nonlocal sent
            if message["type"] == "http.response.start":
                begun.update(message)
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, send_noted)
        finally:
            fields = {
                "method": scope["method"],
                "route": route_of(scope),
                "status": begun["status"],
                "ms": round(1e3 * (time.perf_counter() - started), 3),
                "bytes": sent,
                "version": _version(begun["headers"]),
                "consumer": getattr(scope.get(CALLER), "consumer", None),
            }
            line = " ".join(f"{name}={value}" for name, value in fields.items())
            logger.info("%s", line, extra={"fields": fields})


def _version(headers: Any) -> int | None:
    return next((int(value) for name, value in headers if name == b"backcast-version"), None)
