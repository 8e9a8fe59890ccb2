"""Bytes on a socket that no client would send, and paths that clients would put right."""

import re
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.fuzz.world import LIVE, World, serving
from tests.service_support import bearer

PATIENCE = 10  # seconds for an answer; none is a failure


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with serving(tmp_path_factory.mktemp("home")) as world:
        yield world


def send(world: World, *pieces: bytes) -> bytes:
    """Return all that the server says to some bytes before it closes, or waits for more."""
    place = urlsplit(world.url)
    assert place.hostname is not None
    with socket.create_connection((place.hostname, place.port or 0), PATIENCE) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except OSError:  # it has heard enough
                break
        connection.settimeout(0.5)
        answer = b""
        try:
            while piece := connection.recv(1 << 16):
                answer += piece
        except (TimeoutError, ConnectionResetError):
            pass
        return answer


def statuses(answer: bytes) -> list[int]:
    return [int(found) for found in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def check_alive(world: World) -> None:
    response = httpx2.get(
        f"{world.url}/embeddings/0?version={LIVE}", headers=bearer(world.read), timeout=PATIENCE
    )
    assert response.status_code == 200


BODY = b'{"ids": ["0"], "version": 3}'
POST = b"POST /embeddings/batch HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
SIZE = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
LAST = b"0\r\n\r\n"
CHUNK = b"%x\r\n" % len(BODY) + BODY + b"\r\n"
SMUGGLED = b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n"

SHAPES = {
    "a length and chunks": POST + SIZE + CHUNKED + b"\r\n" + LAST + SMUGGLED,
    "chunks and a length": POST + CHUNKED + SIZE + b"\r\n" + CHUNK + LAST,
    "two lengths": POST + SIZE + b"Content-Length: 0\r\n\r\n" + BODY,
    "two equal lengths": POST + SIZE + SIZE + b"\r\n" + BODY,
    "a negative length": POST + b"Content-Length: -1\r\n\r\n" + BODY,
    "a length with a sign": POST + b"Content-Length: +28\r\n\r\n" + BODY,
    "an enormous length": POST + b"Content-Length: 99999999999999999999999\r\n\r\n" + BODY,
    "a length that is none": POST + b"Content-Length: 0x1c\r\n\r\n" + BODY,
    "a folded header": POST + b"X-A: b\r\n c\r\n" + SIZE + b"\r\n" + BODY,
    "a folded length": POST + b"Content-Length:\r\n 28\r\n\r\n" + BODY,
    "a space before the colon": POST + b"Content-Length : 28\r\n\r\n" + BODY,
    "another coding": POST + b"Transfer-Encoding: gzip\r\n\r\n" + CHUNK + LAST,
    "two codings": POST + b"Transfer-Encoding: identity, chunked\r\n\r\n" + CHUNK + LAST,
    "a coding that looks like chunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNK,
    "a chunk size that is none": POST + CHUNKED + b"\r\nzz\r\n" + BODY,
    "an enormous chunk size": POST + CHUNKED + b"\r\n" + b"f" * 40 + b"\r\n" + BODY,
    "a negative chunk size": POST + CHUNKED + b"\r\n-1\r\n" + BODY,
    "a chunk extension": POST
    + CHUNKED
    + b"\r\n1c;"
    + b"x" * 10_000
    + b"\r\n"
    + BODY
    + b"\r\n0\r\n\r\n",
    "trailers": POST + CHUNKED + b"\r\n" + CHUNK + b"0\r\nAuthorization: Bearer x\r\n\r\n",
    "a body that is cut off": POST + SIZE + b"\r\n" + BODY[:5],
    "HTTP/1.0": b"GET /livez HTTP/1.0\r\n\r\n",
    "HTTP/0.9": b"GET /livez\r\n\r\n",
    "HTTP/2 at once": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "an unknown version": b"GET /livez HTTP/9.9\r\nHost: a\r\n\r\n",
    "no host": b"GET /livez HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "an unknown method": b"QWERTY /livez HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT": b"CONNECT example.org:443 HTTP/1.1\r\nHost: a\r\n\r\n",
    "OPTIONS *": b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "an absolute target": b"GET http://example.org/livez HTTP/1.1\r\nHost: a\r\n\r\n",
    "an upgrade": b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    "a web socket": b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    "line feeds alone": b"GET /livez HTTP/1.1\nHost: a\n\n",
    "NUL in a header": b"GET /livez HTTP/1.1\r\nHost: a\r\nX-A: \0\r\n\r\n",
    "NUL in the path": b"GET /livez\0 HTTP/1.1\r\nHost: a\r\n\r\n",
    "bytes in a header": b"GET /livez HTTP/1.1\r\nHost: a\r\nAccept: \xff\xfe\r\n\r\n",
    "a long line": b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "a long header": b"GET /livez HTTP/1.1\r\nHost: a\r\nX-A: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "many headers": b"GET /livez HTTP/1.1\r\nHost: a\r\n" + b"X-A: b\r\n" * 50_000 + b"\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "nothing": b"\r\n\r\n\r\n",
    "noise": bytes(range(256)) * 40,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_that_is_no_request(world: World, shape: str) -> None:
    answer = send(world, SHAPES[shape])
    assert all(status < 500 for status in statuses(answer)), answer
    assert b"Traceback" not in answer
    check_alive(world)


def test_a_request_is_not_hidden_in_another(world: World) -> None:
    """What stands behind a body of which length and coding disagree is answered by nobody."""
    answer = send(world, SHAPES["a length and chunks"])
    assert 200 not in statuses(answer), answer


def test_headers_that_come_drop_by_drop(world: World) -> None:
    request = b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    answer = send(world, *(request[at : at + 1] for at in range(len(request))))
    assert statuses(answer) == [200]


def test_a_slow_stranger_holds_up_nobody(world: World) -> None:
    place = urlsplit(world.url)
    strangers = [socket.create_connection((place.hostname, place.port)) for _ in range(50)]
    try:
        for stranger in strangers:
            stranger.sendall(POST + b"X-A: ")
        check_alive(world)
    finally:
        for stranger in strangers:
            stranger.close()
    check_alive(world)


def test_pipelined_requests_are_answered_in_order(world: World) -> None:
    asked = (b"/livez", b"/nowhere", b"/versions")
    line = b"Authorization: Bearer " + world.read.encode() + b"\r\n"
    requests = [b"GET %b HTTP/1.1\r\nHost: a\r\n%b\r\n" % (path, line) for path in asked]
    assert statuses(send(world, b"".join(requests) * 5)) == [200, 404, 200] * 5


PATHS = (
    "../../etc/passwd",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "..%2f..%2fetc%2fpasswd",
    "%252e%252e%252fetc",
    "....//....//etc/passwd",
    "/etc/passwd",
    "//etc//passwd",
    "..\\..\\windows\\win.ini",
    "%5c..%5c..",
    "a%00b",
    "a%0d%0aSet-Cookie:%20b",
    "%c0%ae%c0%ae/",
    "%ff",
    "%e2%80%ae",
    "e%cc%81",
    "\xff\xfe",
    "file:///etc/passwd",
    "%",
    "%zz",
    "~root",
    "${jndi:ldap://a}",
    "' OR 1=1 --",
    "{{7*7}}",
    "x" * 3_000,
)
PLACES = (
    "GET /embeddings/{}?version=3",
    "GET /{}",
    "GET /versions/{}",
    "GET /admin/operations/{}",
    "GET /admin/deployments/{}",
    "PUT /admin/consumers/{}",
    "POST /admin/versions/{}/promote",
    "GET /docs/{}",
    "GET /openapi.json/{}",
)


@pytest.mark.parametrize("place", PLACES)
def test_no_path_leads_out(world: World, place: str) -> None:
    for path in PATHS:
        line = place.format(path.replace(" ", "+")).encode("latin-1")
        answer = send(
            world,
            line + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n"
            b"Authorization: Bearer " + world.admin.encode() + b"\r\n\r\n",
        )
        found = statuses(answer)
        assert found in ([400], [404], [405], [422]), answer
        assert b"root:x:" not in answer
        assert b"\r\nSet-Cookie" not in answer
    check_alive(world)


@pytest.mark.parametrize("name", [p for p in PATHS if len(p) <= 64], ids=repr)
def test_no_name_of_a_snapshot_leads_out(world: World, name: str) -> None:
    with httpx2.Client(base_url=world.url, headers=bearer(world.admin)) as client:
        promotion = {"expected_live": LIVE, "snapshot": name}
        for dry_run in (True, False):
            order = {**promotion, "dry_run": dry_run}
            assert client.post("/admin/versions/5/promote", json=order).status_code == 404
        back = {"expected_live": LIVE, "to_snapshot": name, "dry_run": True}
        assert client.post("/admin/rollback", json=back).status_code in {404, 409}
        expected = {b"Backcast-Expect-Snapshot": name.encode("latin-1")}
        answer = client.get(f"/embeddings/0?version={LIVE}", headers=expected)
        assert answer.status_code == 412
