"""Requests are counted by how they end."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.metrics import families
from service.metrics.meter import Meter
from service.metrics.middleware import Metered


def call(app: ASGIApp, meter: Meter, **scope: Any) -> list[Message]:
    """Call an application behind ``Metered``, and return what it sent."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        sent.append(message)

    state = {"service": SimpleNamespace(meter=meter)}
    asked = {"type": "http", "method": "GET", "path": "/", "state": state}
    asyncio.run(Metered(app)({**asked, **scope}, receive, send))
    return sent


def statuses(meter: Meter) -> list[str]:
    return [values[2] for name, values in meter.counts() if name == families.REQUESTS.name]


def test_an_answer_passes_as_it_is_and_is_in_progress_until_its_end() -> None:
    meter, seen = Meter(), []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 207, "headers": []})
        seen.append(meter.in_progress)
        await send({"type": "http.response.body", "body": b"ab", "more_body": True})
        await send({"type": "http.response.body"})

    assert [message["type"] for message in call(app, meter)] == [
        *("http.response.start", "http.response.body", "http.response.body")
    ]
    assert (seen, meter.in_progress, statuses(meter)) == ([1], 0, ["207"])


def test_what_raises_is_counted_and_raised() -> None:
    meter = Meter()

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise RuntimeError("odd")

    with pytest.raises(RuntimeError, match="odd"):
        call(app, meter)
    assert (meter.in_progress, statuses(meter)) == (0, ["500"])
    assert meter.counts()[families.PROBLEMS.key("internal-server-error")] == [1]


def test_client_that_has_gone_is_counted_and_answered_nothing() -> None:
    meter = Meter()

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ClientDisconnect

    assert call(app, meter) == []
    assert (meter.in_progress, statuses(meter)) == (0, ["499"])


def test_what_is_no_request_is_not_counted() -> None:
    meter = Meter()

    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        pass

    call(app, meter, type="lifespan")
    assert statuses(meter) == []
