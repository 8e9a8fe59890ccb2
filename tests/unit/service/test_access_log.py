"""The access log tells what was asked for, never whose vector or by which key."""

import logging
from collections.abc import Iterator
from contextlib import suppress

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.testclient import TestClient

from backcast.versions import Scope
from tests.service_support import bearer, client_of, secret_of
from tests.support import Home, build_home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with build_home(tmp_path_factory.mktemp("home"), live=1) as built:
        yield built


@pytest.fixture(scope="module")
def client(home: Home) -> Iterator[TestClient]:
    with client_of(home, access_log="on") as opened:
        yield opened


def logged(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "service.access_log"]


@pytest.mark.parametrize(
    ("method", "path", "route", "status", "version"),
    [
        ("GET", "/embeddings/item 5?version=0", "/embeddings/{id}", 200, 0),
        ("GET", "/embeddings/hunter2?version=0", "/embeddings/{id}", 404, None),
        ("GET", "/hunter2", None, 404, None),
        ("GET", "/versions/1", "/versions/{j}", 200, None),
        ("GET", "/admin/operations/hunter2", "/admin/operations/{id}", 404, None),
    ],
)
def test_a_request_is_one_line_without_id_and_key(
    home: Home,
    client: TestClient,
    caplog: pytest.LogCaptureFixture,
    method: str,
    path: str,
    route: str | None,
    status: int,
    version: int | None,
) -> None:
    secret = secret_of(home, Scope.ADMIN)
    consumer = home.backcast.registry.keys.all()[-1].consumer
    for _ in range(2):  # the second time by the short way, where there is one
        with caplog.at_level(logging.INFO):
            answer = client.request(method, path, headers=bearer(secret))
        [record] = logged(caplog)
        caplog.clear()
        fields = record.__dict__["fields"]
        assert fields.pop("ms") > 0
        assert fields == {
            "method": method,
            "route": route,
            "status": status,
            "bytes": len(answer.content),
            "version": version,
            "consumer": consumer if route else None,
        }
        for told in ("hunter2", "item 5", "item%205", secret, secret.split("_", 2)[2]):
            assert told not in record.getMessage()


def test_nobody_is_named_without_a_key_that_is_known(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for given in ("Bearer bc_0011aabb_nonsense", "Basic odd", "odd"):
            answer = client.get("/versions", headers={"Authorization": given})
            assert answer.status_code == 401
    assert [record.__dict__["fields"]["consumer"] for record in logged(caplog)] == [None] * 3


def test_a_consumer_is_named_where_no_key_is_remembered(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    opened = client_of(home, access_log="on", key_cache_seconds=0)
    with opened as client, caplog.at_level(logging.INFO):
        for path in ("/embeddings/item 5?version=0", "/admin/keys"):
            client.get(path)
    named = [record.__dict__["fields"]["consumer"] for record in logged(caplog)]
    assert named == [home.backcast.registry.keys.all()[-1].consumer] * 2


def test_a_client_that_has_gone_is_no_error(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def gone(_: object) -> bytes:
        raise ClientDisconnect

    monkeypatch.setattr(Request, "body", gone)
    with caplog.at_level(logging.INFO), suppress(AssertionError):  # the client has no answer
        client.post("/embeddings/batch", json={"ids": ["item 5"], "version": 0})
    [record] = logged(caplog)
    assert record.__dict__["fields"]["status"] == 499


def test_off_nothing_is_logged(home: Home, caplog: pytest.LogCaptureFixture) -> None:
    with client_of(home) as client, caplog.at_level(logging.INFO):
        client.get("/versions")
    assert logged(caplog) == []
