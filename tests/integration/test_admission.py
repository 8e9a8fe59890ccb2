"""Too much at once, too large, too slow: refused as it should be, while others are served."""

import logging
import socket
import threading
import time
from asyncio import BaseTransport
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import httpx2
import orjson
import pytest
from starlette.types import Receive, Send
from starlette.types import Scope as ASGIScope

from backcast.registry.keys import Keys
from backcast.versions import Key, Scope
from service import requests
from service.app import create_app
from service.metrics import families
from service.protocol import LONGEST_HEAD, LONGEST_PIPELINE, Protocol
from service.state import State
from service.wire import Format
from tests.service_support import bearer, running, secret_of
from tests.support import Home, build_home

PATIENCE_S = 20
SINGLE = "/embeddings/item 0?version=0"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with build_home(tmp_path_factory.mktemp("home"), (16, 16), live=1) as built:
        yield built


class Served:
    """A service with Backcast's connections, its state, and an admin's client."""

    def __init__(self, url: str, headers: dict[str, str], states: dict[str, Any]) -> None:
        self.url, self._headers, self._states = url, headers, states
        self.http = httpx2.Client(base_url=url, headers=headers, timeout=PATIENCE_S)

    @property
    def state(self) -> State:
        found: State = self._states["service"]
        return found

    @contextmanager
    def connected(self, sent: bytes = b"", **options: int) -> Iterator[socket.socket]:
        parts = urlsplit(self.url)
        with socket.socket() as client:
            client.settimeout(PATIENCE_S)
            for name, value in options.items():
                client.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
            client.connect((parts.hostname, parts.port))
            client.sendall(sent)
            yield client

    def head(
        self,
        path: str = "/embeddings/batch",
        length: int = 10,
        method: str = "POST",
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> bytes:
        """Return a request's head, which announces a body."""
        lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}"]
        lines += [f"{name}: {value}" for name, value in {**self._headers, **headers}.items()]
        return "\r\n".join([*lines, "", ""]).encode()

    def shedding(self, **expected: int) -> None:
        """Wait until so many were refused, by the limit, and no others."""
        deadline, wanted = time.monotonic() + PATIENCE_S, Counter(expected)
        while (shed := Counter(self.state.shed)) != wanted:
            assert time.monotonic() < deadline, shed
            time.sleep(0.01)

    def holding(self, inside: int) -> None:
        """Wait until so many batches are inside."""
        deadline = time.monotonic() + PATIENCE_S
        while self.state.batches.inside != inside:
            assert time.monotonic() < deadline, self.state.batches.inside
            time.sleep(0.01)


class Unbuffered(Protocol):
    """A connection of which the system keeps little: what is not read stays with the service."""

    def connection_made(self, transport: BaseTransport) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        super().connection_made(transport)


@contextmanager
def serving(home: Home, *, unbuffered: bool = False, **settings: Any) -> Iterator[Served]:
    states: dict[str, Any] = {}
    service = create_app(home.settings.model_copy(update=settings))

    async def app(scope: ASGIScope, receive: Receive, send: Send) -> None:
        states.update(scope.get("state", {}))
        await service(scope, receive, send)

    options = {"http": Unbuffered if unbuffered else Protocol, "timeout_keep_alive": 60}
    headers = bearer(secret_of(home, Scope.ADMIN))
    with running(app, **options) as url:
        served = Served(url, headers, states)
        with served.http as http:
            http.get("/livez")
            yield served


def answer_of(client: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Read an answer to the end, or what there is of it."""
    whole = b""
    while b"\r\n\r\n" not in whole:
        piece = client.recv(65_536)
        assert piece, whole
        whole += piece
    head, _, body = whole.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    while len(body) < int(headers["content-length"]):
        body += client.recv(65_536)
    return int(first.split()[1]), headers, body


def assert_problem(client: socket.socket, status: int, code: str) -> dict[str, str]:
    found, headers, body = answer_of(client)
    assert (found, headers["content-type"]) == (status, "application/problem+json")
    assert orjson.loads(body)["type"] == f"urn:backcast:problem:{code}"
    if status in {429, 503}:
        assert int(headers["retry-after"]) >= 1
    return headers


def all_of(client: socket.socket) -> bytes:
    """Read until the connection is closed."""
    whole = b""
    with suppress(ConnectionResetError):
        while piece := client.recv(1 << 20):
            whole += piece
    return whole


def answers_in(whole: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Return all answers in some bytes, which hold nothing else."""
    found = []
    while whole:
        head, _, rest = whole.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines)
        length = int(headers["content-length"])
        assert len(rest) >= length
        found.append((int(first.removeprefix("HTTP/1.1 ")[:3]), headers, rest[:length]))
        whole = rest[length:]
    return found


def is_closed(client: socket.socket) -> bool:
    with suppress(ConnectionResetError):
        return client.recv(1) == b""
    return True


# --- batches at once ------------------------------------------------------------------------------


def test_batches_beyond_those_that_may_wait_are_refused_unread(home: Home) -> None:
    other = bearer(secret_of(home))
    with (
        serving(home, batches_at_once=1, batches_waiting=3) as served,
        served.connected(served.head()) as first,
        served.connected(served.head()),
        served.connected(served.head(headers=other)),
        served.connected(served.head(headers=other)),
    ):
        served.holding(4)
        with served.connected(served.head(length=50_000_000)) as third:
            assert_problem(third, 503, "overloaded")
        refused = families.REQUESTS.key("/embeddings/batch", "POST", "503", "none", "none")
        assert served.state.meter.counts()[refused] == [1]
        assert served.http.get(SINGLE).status_code == 200
        assert served.http.delete("/admin/embeddings").status_code == 422  # has a gate of its own
        assert served.state.shed == {"batches": 1}
        first.close()
        served.holding(3)
        body = {"ids": ["item 0"], "version": 0}
        assert served.http.post("/embeddings/batch", json=body).status_code == 200


def test_one_consumer_leaves_half_of_the_places_to_others(home: Home) -> None:
    slow = bearer(secret_of(home))
    batch = {"ids": ["item 0"], "version": 0}
    with ExitStack() as stack:
        settings: dict[str, Any] = {
            "batches_at_once": 1,
            "batches_waiting": 3,
            "key_cache_seconds": 60,
        }
        served = stack.enter_context(serving(home, **settings))
        url = f"{served.url}/embeddings/batch"
        assert httpx2.post(url, json=batch, headers=slow).status_code == 200  # the key is known now
        first, _ = (
            stack.enter_context(served.connected(served.head(headers=slow))) for _ in range(2)
        )
        served.holding(2)
        with served.connected(served.head(headers=slow)) as third:
            assert_problem(third, 503, "overloaded")
        served.holding(2)
        assert served.http.post("/embeddings/batch", json=batch).status_code == 200
        first.close()
        served.holding(1)
        assert httpx2.post(url, json=batch, headers=slow).status_code == 200


def test_all_who_send_no_key_leave_half_of_the_places_to_others(home: Home) -> None:
    with serving(home, reads="open", batches_at_once=1, batches_waiting=3) as served:
        nobody = served.head().replace(b"Authorization", b"X-Other")
        with served.connected(nobody), served.connected(nobody) as second:
            served.holding(2)
            with served.connected(nobody) as third:
                assert_problem(third, 503, "overloaded")
            served.holding(2)
            batch = {"ids": ["item 0"], "version": 0}
            assert served.http.post("/embeddings/batch", json=batch).status_code == 200
            second.close()
            served.holding(1)
            assert httpx2.post(f"{served.url}/embeddings/batch", json=batch).status_code == 200


def test_made_up_keys_hold_up_neither_batches_nor_administrators(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, answering = Keys.find, threading.Event()

    def find_slowly(keys: Keys, prefix: str) -> Key | None:
        if prefix.startswith("0000"):
            assert answering.wait(PATIENCE_S)
        return find(keys, prefix)

    batch, put = {"ids": ["item 0"], "version": 0}, {"ids": ["x"], "vectors": [[1.0] * 16]}
    with ExitStack() as stack:
        served = stack.enter_context(serving(home, batches_at_once=1, batches_waiting=1))
        assert served.http.get(SINGLE).status_code == 200  # so that the key was seen
        monkeypatch.setattr(Keys, "find", find_slowly)
        stack.callback(answering.set)
        strangers = [
            stack.enter_context(served.connected(served.head(path, method=method, headers=made_up)))
            for number in range(8)
            for made_up in [bearer(f"bc_{number:08x}_guess")]
            for path, method in (("/embeddings/batch", "POST"), ("/admin/embeddings", "PUT"))
        ]
        time.sleep(0.2)  # they are all being looked up, or wait for that
        for _ in range(3):
            assert served.http.post("/embeddings/batch", json=batch).status_code == 200
            assert served.http.put("/admin/embeddings", json=put).status_code == 200
        served.holding(0)
        answering.set()
        for stranger in strangers:
            assert_problem(stranger, 401, "unauthorized")
        assert served.state.shed == Counter()


def test_batch_that_is_not_answered_in_time_is_refused(home: Home) -> None:
    with (
        serving(home, batch_seconds=0.2) as served,
        served.connected(served.head()) as client,
    ):
        assert_problem(client, 503, "overloaded")
        served.holding(0)
        assert served.state.shed == {"slow batches": 1}


@pytest.mark.parametrize(("format", "count"), [(Format.JSON, 100_000), (Format.RAW, 400_000)])
def test_answer_that_nobody_takes_is_cut_off(home: Home, format: Format, count: int) -> None:
    ids = ["item 0"] * count  # 35 MB of JSON or 26 of float32, more than sockets hold
    body = orjson.dumps({"ids": ids, "version": 0})
    with serving(home, batch_seconds=5.0, head_seconds=0.2, max_batch=count) as served:
        request = served.head(length=len(body), headers={"Accept": format}) + body
        with served.connected(request, SO_RCVBUF=4096) as client:
            served.holding(1)
            served.holding(0)
            assert served.state.shed["slow batches"] == 1
            served.shedding(**{"slow batches": 1, "slow connections": 1})
            received, piece = 0, b"first"
            with suppress(ConnectionResetError):
                while piece:
                    piece = client.recv(1 << 20)
                    received += len(piece)
            assert 0 < received < 20_000_000


# --- bodies ---------------------------------------------------------------------------------------


def test_body_that_is_too_long_is_refused_when_it_is_announced(home: Home) -> None:
    with serving(home, max_body=1000) as served:
        for length, path, method in (
            (1001, "/embeddings/batch", "POST"),
            (1001, "/admin/embeddings", "PUT"),
            (1001, "/admin/embeddings", "DELETE"),
            ((64 << 10) + 1, "/admin/rollback", "POST"),
        ):
            with served.connected(served.head(path, length, method)) as client:
                assert_problem(client, 413, "content-too-large")
        served.holding(0)


def test_length_of_a_body_may_have_any_number_of_zeros(home: Home) -> None:
    body = orjson.dumps({"ids": ["item 0"], "version": 0})
    with serving(home, max_body=1000) as served:
        for length, status in ((len(body), 200), (1001, 413), (10**19, 413), (10**4200, 400)):
            head = served.head(length=length).replace(
                b"Content-Length: ", b"Content-Length: " + b"0" * 5000
            )
            with served.connected(head + body) as client:
                assert answer_of(client)[0] == status


def test_body_that_does_not_come_is_not_waited_for(home: Home) -> None:
    with serving(home, body_seconds=0.2) as served:
        for path, method in (("/embeddings/batch", "POST"), ("/admin/rollback", "POST")):
            with served.connected(served.head(path, 10, method) + b"{") as client:
                assert_problem(client, 408, "request-timeout")
                assert is_closed(client)
        served.holding(0)


def test_client_that_goes_away_and_had_asked_for_more_is_no_error_of_the_service(
    home: Home, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n"
    sent = plain % b"openapi.json" * 2 + plain % b"livez" * 2
    with serving(home, unbuffered=True) as served:
        monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
        for _ in range(3):
            with served.connected(sent, SO_RCVBUF=4096) as client:
                assert client.recv(100)
        assert served.http.get("/livez").status_code == 200
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_client_that_goes_away_is_no_error_of_the_service(
    home: Home, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(home) as served:
        monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)
        for rest in (b"{", b"x" * 100):
            head = served.head(length=100).replace(
                b"Content-Length: 100", b"Transfer-Encoding: chunked"
            )
            for begun in (served.head(length=200) + rest, head + b"1\r\n{\r\nnonsense\r\n"):
                with served.connected(begun):
                    pass
        gone = families.REQUESTS.key("/embeddings/batch", "POST", "499", "none", "none")
        deadline = time.monotonic() + PATIENCE_S
        while served.state.meter.counts().get(gone) != [4]:
            assert time.monotonic() < deadline, served.state.meter.counts()
            time.sleep(0.01)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize(
    "body",
    [
        b'{"ids":[' + b"1," * 2_000_000 + b'1],"version":0}',
        b'{"version":0,"ids":["' + b'","' * 2_000_000 + b'"]}',
        b"{" + b'"0":1,' * 2_000_000 + b'"version":0}',
    ],
    ids=["numbers", "strings", "fields"],
)
def test_body_of_more_values_than_a_batch_has_is_not_read(
    home: Home, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(home) as served:
        monkeypatch.setattr(requests, "read_body", None)
        answer = served.http.post("/embeddings/batch", content=body)
        assert answer.status_code == 413
        assert "send several batches" in answer.json()["detail"]


def test_large_batch_of_what_looks_like_many_values_is_answered(home: Home) -> None:
    ids = [f'{n}{"," * 500}"{"," * 500}\\' for n in range(2_000)]
    with serving(home) as served:
        answer = served.http.post("/embeddings/batch", json={"ids": ids, "version": 0})
    assert answer.status_code == 200
    assert len(answer.json()["missing"]) == 2_000


# --- connections ----------------------------------------------------------------------------------


def test_connections_beyond_the_most_are_told_so_and_closed(home: Home) -> None:
    with (
        serving(home, max_connections=2) as served,
        served.connected(served.head()),
        served.connected(served.head()),
    ):
        served.holding(2)
        for _ in range(3):
            with served.connected(served.head(length=0)) as client:
                headers = assert_problem(client, 503, "overloaded")
                assert headers["connection"] == "close"
                assert headers["x-request-id"]
                assert is_closed(client)
        for path in ("/readyz", "/metrics"):
            assert httpx2.get(f"{served.url}{path}").status_code == 200
        assert served.state.shed == {"connections": 3, "idle connections": 1}
        assert served.state.meter.counts()[families.PROBLEMS.key("overloaded")] == [3]


def test_connection_that_was_idle_longest_makes_room(home: Home) -> None:
    plain = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    with ExitStack() as stack:
        served = stack.enter_context(serving(home, max_connections=4))
        clients = [stack.enter_context(served.connected(sent)) for sent in (plain, b"", plain)]
        asked, silent, fresh = clients  # a fourth is that of the tests' client, from before them
        assert answer_of(asked)[0] == answer_of(fresh)[0] == 200
        asked.sendall(plain)
        assert answer_of(asked)[0] == 200
        for _ in range(2):
            batch = stack.enter_context(served.connected(served.head(length=2)))
        served.holding(2)
        assert is_closed(silent)
        for client in (fresh, asked):
            assert answer_of(stack.enter_context(served.connected(plain)))[0] == 200
            assert is_closed(client)
        batch.sendall(b"{}")
        assert answer_of(batch)[0] == 422
        assert served.state.shed == {"idle connections": 4}


def test_connection_that_is_refused_makes_no_room(home: Home) -> None:
    plain = b"GET /versions HTTP/1.1\r\nHost: a\r\n\r\n"
    with ExitStack() as stack:
        served = stack.enter_context(serving(home, max_connections=2))
        for _ in range(2):
            stack.enter_context(served.connected(served.head(length=2)))
        served.holding(2)
        crowd = [stack.enter_context(served.connected()) for _ in range(2)]
        for client in crowd:
            client.sendall(plain)
            assert_problem(client, 503, "overloaded")


@pytest.mark.parametrize("path", ["/livez", "/metrics"])
def test_what_is_answered_on_a_connection_too_many_is_the_last(home: Home, path: str) -> None:
    plain = f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    with ExitStack() as stack:
        served = stack.enter_context(serving(home, max_connections=2))
        for _ in range(2):
            stack.enter_context(served.connected(served.head(length=2)))
        served.holding(2)
        for _ in range(6):
            client = stack.enter_context(served.connected(plain * 2))
            [(status, headers, _)] = answers_in(all_of(client))
            assert (status, headers["connection"]) == (200, "close")
        assert served.state.shed == {"idle connections": 1}


def test_crowd_that_asks_nothing_keeps_no_health_check_out(home: Home) -> None:
    plain = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    with ExitStack() as stack:
        served = stack.enter_context(serving(home, max_connections=2))
        for _ in range(2):
            stack.enter_context(served.connected(served.head(length=2)))
        served.holding(2)
        crowd = [stack.enter_context(served.connected()) for _ in range(3)]
        assert is_closed(crowd[0])
        assert answer_of(stack.enter_context(served.connected(plain)))[0] == 200
        assert is_closed(crowd[1])
        assert answer_of(stack.enter_context(served.connected(plain)))[0] == 200
        crowd[2].sendall(plain)
        assert answer_of(crowd[2])[0] == 200
        assert served.state.shed == {"idle connections": 3}


def test_connection_for_which_room_was_made_is_served_beside_a_crowd(home: Home) -> None:
    plain = b"GET /versions HTTP/1.1\r\nHost: a\r\n\r\n"
    with ExitStack() as stack:
        served = stack.enter_context(serving(home, max_connections=2))
        batches = [stack.enter_context(served.connected(served.head(length=2))) for _ in range(2)]
        served.holding(2)
        for _ in range(2):
            stack.enter_context(served.connected())
        batches[0].sendall(b"{}")
        assert answer_of(batches[0])[0] == 422
        assert answer_of(stack.enter_context(served.connected(plain)))[0] == 401
        assert is_closed(batches[0])
        assert served.state.shed == {"idle connections": 2}


def test_crowd_that_only_keeps_its_connections_keeps_nobody_out(home: Home) -> None:
    plain = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    with ExitStack() as stack:
        served = stack.enter_context(serving(home, max_connections=10))
        for _ in range(50):
            assert answer_of(stack.enter_context(served.connected(plain)))[0] == 200
        assert served.http.get(SINGLE).status_code == 200
        assert served.state.shed.keys() == {"idle connections"}


@pytest.mark.parametrize("sent", [b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: a\r\n"])
def test_request_that_does_not_begin_is_not_waited_for(home: Home, sent: bytes) -> None:
    with serving(home, head_seconds=0.2) as served, served.connected(sent) as client:
        assert is_closed(client)
        assert served.state.shed == {"slow connections": 1}


def test_neither_a_pause_nor_a_long_answer_is_taken_for_a_slow_head(home: Home) -> None:
    request = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    body = orjson.dumps({"ids": ["item 0"], "version": 0})
    with serving(home, head_seconds=0.1) as served, served.connected(request) as client:
        assert answer_of(client)[0] == 200
        time.sleep(0.5)
        client.sendall(served.head(length=len(body)) + body[:5])
        time.sleep(0.5)
        client.sendall(body[5:])
        assert answer_of(client)[0] == 200


def test_rest_of_a_body_that_was_refused_is_not_waited_for(home: Home) -> None:
    with (
        serving(home, head_seconds=0.2, max_body=1000) as served,
        served.connected(served.head(length=5000) + b" " * 10) as client,
    ):
        assert_problem(client, 413, "content-too-large")
        client.sendall(b" " * 10)
        assert is_closed(client)


@pytest.mark.parametrize(
    "next",
    [b"GET /livez", b"GET /openapi.json", b"PUT /admin/embeddings", b"POST /embeddings/batch"],
)
def test_answer_that_nobody_takes_is_not_kept(home: Home, next: bytes) -> None:
    requests = [b"GET /openapi.json", next, b"GET /livez"]
    sent = b"".join(b"%b HTTP/1.1\r\nHost: a\r\n\r\n" % request for request in requests)
    with serving(home, unbuffered=True, head_seconds=0.2) as served:
        with served.connected(sent, SO_RCVBUF=4096):
            served.shedding(**{"slow connections": 1})
        assert served.http.get(SINGLE).status_code == 200


def test_reader_that_is_slow_but_steady_is_not_cut(home: Home) -> None:
    request = b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n"
    with serving(home, unbuffered=True, head_seconds=0.3) as served:
        length = len(served.http.get("/openapi.json").content)
        with served.connected(request * 8, SO_RCVBUF=4096) as client:
            received = 0
            while received < 8 * length:
                piece = client.recv(10_000)
                assert piece
                received += len(piece)
                time.sleep(len(piece) / 1e6)
        assert served.state.shed == Counter()


def test_head_without_an_end_is_refused(home: Home) -> None:
    with serving(home) as served, served.connected(b"GET /livez HTTP/1.1\r\nX: ") as client:
        with suppress(ConnectionError):
            for _ in range(3 * LONGEST_HEAD // 1024):
                client.sendall(b"a" * 1024)
                time.sleep(0.0005)  # in many reads
        found = b""
        with suppress(ConnectionError):
            found = client.recv(65_536)
        assert found.startswith(b"HTTP/1.1 431 ") or served.state.shed["large heads"] == 1
        assert served.http.get("/livez").status_code == 200


def test_head_without_an_end_does_not_fall_into_another_answer(home: Home) -> None:
    body = orjson.dumps({"ids": ["item 0"] * 400_000, "version": 0})
    with serving(home, max_batch=400_000) as served:
        request = served.head(length=len(body), headers={"Accept": Format.RAW}) + body
        with served.connected(request) as client:
            assert client.recv(100, socket.MSG_PEEK | socket.MSG_WAITALL)  # of 26 MB
            client.sendall(b"GET /livez HTTP/1.1\r\nX: ")
            deadline = time.monotonic() + PATIENCE_S
            while not served.state.shed["large heads"]:
                assert time.monotonic() < deadline
                client.sendall(b"a" * 1024)
                time.sleep(0.0005)
            [(status, _, vectors)] = answers_in(all_of(client))
    assert status == 200
    assert vectors == vectors[:64] * 400_000


def test_requests_beyond_the_most_in_a_pipeline_are_not_kept(home: Home) -> None:
    plain = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
    with serving(home) as served:
        with served.connected(plain * 10_000) as client:
            answers = answers_in(all_of(client))
        assert [status for status, *_ in answers] == [200] * (LONGEST_PIPELINE + 1)
        assert "connection" not in answers[0][1]
        assert answers[-1][1]["connection"] == "close"
        assert served.state.shed == {"pipelines": 1}
        with served.connected() as client:
            for _ in range(3):
                client.sendall(plain * LONGEST_PIPELINE)
                found = b""
                while found.count(b"HTTP/1.1 200 OK") < LONGEST_PIPELINE:
                    found += client.recv(65_536)
        assert served.state.shed == {"pipelines": 1}


def test_what_is_no_request_is_told_so(home: Home) -> None:
    with serving(home) as served:
        with served.connected(b"NONSENSE\r\n\r\n") as client:
            headers = assert_problem(client, 400, "bad-request")
            assert headers["connection"] == "close"
            assert len(headers["x-request-id"]) == 16
            assert is_closed(client)
        assert served.state.meter.counts()[families.PROBLEMS.key("bad-request")] == [1]
        plain = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"
        with served.connected(plain + b"NONSENSE\r\n\r\n") as client:
            assert [status for status, *_ in answers_in(all_of(client))] == [200]


@pytest.mark.parametrize("path", ["/livez", "/nowhere", "/embeddings/batch"])
@pytest.mark.parametrize("line", [b"a: b\r\n", b"a: " + b"b" * 60_000 + b"\r\n", b"a"])
def test_trailers_without_an_end_are_cut_off(home: Home, path: str, line: bytes) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serving(home) as served, served.connected(head.encode() + b"1\r\n{\r\n0\r\n") as client:
        sent, piece = 0, line * (65_536 // len(line))
        with suppress(ConnectionError):
            while sent < 64 << 20:
                client.sendall(piece)
                sent += len(piece)
        assert sent < 64 << 20
        assert served.state.shed["large heads"] == 1


def test_small_chunks_and_a_trailer_are_read(home: Home) -> None:
    body = orjson.dumps({"ids": [f"item {n % 5}" for n in range(10_000)], "version": 0})
    chunks = b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in body)
    with serving(home) as served:
        head = served.head(headers={"Accept": Format.RAW})
        head = head.replace(b"Content-Length: 10", b"Transfer-Encoding: chunked")
        end = b"0\r\nX-Sum: 12\r\n\r\n"
        for request in (head + chunks + end, (head + chunks + end) * 2):
            with served.connected(request) as client:
                assert answer_of(client)[0] == 200
        assert served.state.shed == Counter()


def test_nothing_is_shed_without_need(home: Home) -> None:
    with serving(home) as served:
        body = {"ids": ["item 0"], "version": 0}
        for _ in range(20):
            assert served.http.post("/embeddings/batch", json=body).status_code == 200
            assert served.http.get(SINGLE).status_code == 200
        assert served.state.shed == Counter()
