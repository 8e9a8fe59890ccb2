"""Every answer has an id, and so have its error and its log lines."""

import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.testclient import TestClient
from starlette.types import Receive, Scope, Send

from backcast import logs
from backcast.logs import JsonFormatter
from backcast.settings import Settings
from service.app import create_app
from service.correlation import Correlation
from tests.service_support import client_of, running
from tests.support import Home, build_home

OWN = re.compile(r"[0-9a-f]{12}-\d+")
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with build_home(tmp_path_factory.mktemp("home"), live=1) as built:
        yield built


@pytest.fixture(scope="module")
def client(home: Home) -> Iterator[TestClient]:
    with client_of(home) as opened:
        yield opened


class Lines(logging.Handler):
    """What is logged, as JSON."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.documents: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.documents.append(json.loads(self.format(record)))


@pytest.fixture
def lines() -> Iterator[Lines]:
    root, handler = logging.getLogger(), Lines()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield handler
    root.removeHandler(handler)
    root.setLevel(before)


ASKED = [
    pytest.param("GET", "/embeddings/item 5?version=0", 200, id="one vector"),
    pytest.param("GET", "/embeddings/nobody?version=0", 404, id="an unknown id"),
    pytest.param("GET", "/versions", 200, id="versions"),
    pytest.param("GET", "/nowhere", 404, id="no route"),
    pytest.param("PATCH", "/versions", 405, id="no method"),
    pytest.param("GET", "/livez", 200, id="health"),
    pytest.param("POST", "/embeddings/batch", 422, id="no body"),
]


@pytest.mark.parametrize(("method", "path", "status"), ASKED)
def test_every_answer_has_an_id_of_its_own(
    client: TestClient, method: str, path: str, status: int
) -> None:
    answers = [client.request(method, path) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [status, status]
    ids = [answer.headers.get_list("x-request-id") for answer in answers]
    assert ids[0] != ids[1]
    assert all(len(found) == 1 and OWN.fullmatch(found[0]) for found in ids)
    if status >= 400:
        assert [answer.json()["request_id"] for answer in answers] == [id for [id] in ids]


@pytest.mark.parametrize(("method", "path", "status"), ASKED)
def test_a_callers_id_is_kept(client: TestClient, method: str, path: str, status: int) -> None:
    answer = client.request(method, path, headers={"X-Request-Id": "caller-7/%"})
    assert answer.headers.get_list("x-request-id") == ["caller-7/%"]
    if status >= 400:
        assert answer.json()["request_id"] == "caller-7/%"


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"two words", b"tab\tbed", "naïve".encode()])
def test_an_odd_id_of_a_caller_is_replaced(client: TestClient, given: bytes) -> None:
    answer = client.get("/livez", headers={b"X-Request-Id": given})
    assert OWN.fullmatch(answer.headers["x-request-id"])


def test_a_304_has_an_id_too(client: TestClient) -> None:
    tag = client.get("/embeddings/item 5?version=0").headers["etag"]
    headers = {"If-None-Match": tag, "X-Request-Id": "again"}
    answer = client.get("/embeddings/item 5?version=0", headers=headers)
    assert (answer.status_code, answer.headers["x-request-id"]) == (304, "again")


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[TestClient]:
    """A client of a service that has a bug, in an endpoint on a thread of its own."""

    def fail(_: Request) -> None:
        logging.getLogger("service.broken").info("about to fail")
        raise RuntimeError("the password is hunter2")

    app = create_app(Settings.load(home=tmp_path))
    app.add_api_route("/broken", fail)
    with TestClient(app, raise_server_exceptions=False) as opened:
        yield opened


def test_an_unforeseen_error_tells_its_client_the_id_alone(broken: TestClient) -> None:
    answer = broken.get("/broken")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert document["request_id"] == answer.headers["x-request-id"]
    assert "log" in document["detail"]
    for told in ("hunter2", "RuntimeError", "Traceback", ".py"):
        assert told not in answer.text


def test_log_lines_of_a_request_have_its_id_and_trace_on_every_thread(
    broken: TestClient, lines: Lines
) -> None:
    sent = {"X-Request-Id": "r-1", "traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}
    broken.get("/broken", headers=sent)
    broken.get("/broken", headers={"traceparent": "00-odd-odd-01"})
    first, second = [d for d in lines.documents if d["logger"] == "service.broken"]
    assert (first["request_id"], first["trace_id"]) == ("r-1", TRACE)
    assert OWN.fullmatch(second["request_id"])
    assert "trace_id" not in second


def test_an_operation_logs_with_the_id_of_its_request(client: TestClient, lines: Lines) -> None:
    headers = {"X-Request-Id": "promotion-1"}
    started = client.post("/admin/versions/2/promote", json={"expected_live": 1}, headers=headers)
    assert started.status_code == 202, started.text
    while client.get(started.headers["location"]).json()["finished_at"] is None:
        pass
    ended = [d for d in lines.documents if d["logger"] == "service.operations"]
    assert [d["request_id"] for d in ended] == ["promotion-1"]
    assert "version 2 is live" in ended[0]["message"]


def test_a_pipelined_request_has_not_the_trace_of_the_one_before(lines: Lines) -> None:
    sent = f"GET /next HTTP/1.1\r\nHost: a\r\ntraceparent: 00-{TRACE}-b7ad6b7169203331-01\r\n\r\n"
    sent += "GET /next HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        logging.getLogger("service.next").info("asked")
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    with running(Correlation(app), interface="asgi3", lifespan="off") as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(sent.encode())
            while client.recv(65_536):
                pass
    first, second = [d for d in lines.documents if d["logger"] == "service.next"]
    assert first["trace_id"] == TRACE
    assert "trace_id" not in second
    assert first["request_id"] != second["request_id"]


def test_outside_of_requests_there_is_no_id() -> None:
    assert logs.request_id.get() is None
    assert logs.trace_id.get() is None
