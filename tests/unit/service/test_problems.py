"""Every error has a status, and every problem document is one."""

import time
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import pytest
from fastapi import FastAPI, Query
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from backcast import errors
from backcast.errors import BackcastError
from service import problems
from service.problems import MEDIA_TYPE, STATUS, TYPE_PREFIX, status_of


def family(cls: type[BackcastError]) -> list[type[BackcastError]]:
    children = [c for c in cls.__subclasses__() if c.__module__ == errors.__name__]
    return [d for child in children for d in (child, *family(child))]


@pytest.mark.parametrize("cls", family(BackcastError), ids=lambda cls: cls.__name__)
def test_every_error_has_a_status(cls: type[BackcastError]) -> None:
    assert any(ancestor in STATUS for ancestor in cls.__mro__)
    assert 400 <= status_of(cls) < 600


@pytest.mark.parametrize(
    ("cls", "status"),
    [
        (errors.UnknownId, 404),
        (errors.UnknownVersion, 404),
        (errors.UnknownOperation, 404),
        (errors.VersionNotPromoted, 409),
        (errors.VersionOffChain, 409),
        (errors.PromotionConflict, 409),
        (errors.NothingPublished, 409),
        (errors.VersionRetired, 410),
        (errors.SnapshotMismatch, 412),
        (errors.BatchTooLarge, 413),
        (errors.VersionRequired, 422),
        (errors.DimensionMismatch, 422),
        (errors.DataError, 422),
        (errors.Unauthorized, 401),
        (errors.Forbidden, 403),
        (errors.ArtifactCorrupt, 500),
        (errors.SnapshotNotLoaded, 503),
        (errors.RegistryError, 503),
        (errors.NotReady, 503),
        (errors.Draining, 503),
        (errors.Overloaded, 503),
        (errors.RateLimited, 429),
        (BackcastError, 500),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_statuses(cls: type[BackcastError], status: int) -> None:
    assert status_of(cls) == status


def answer(raised: Exception, path: str = "/there") -> Any:
    """Return the response to a request that ends in ``raised``."""
    app = FastAPI()
    problems.install(app)

    @app.get("/there")
    async def fail(number: int = Query(1)) -> int:
        if number:
            raise raised
        return number

    with TestClient(app, raise_server_exceptions=False) as client:
        return client.get(path)


def test_problem_document_holds_the_facts() -> None:
    response = answer(errors.VersionOffChain(2, 3, (0, 3), "rolled_back"))
    assert response.status_code == 409
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.json() == {
        "type": f"{TYPE_PREFIX}version-off-chain",
        "title": "Version off chain",
        "status": 409,
        "detail": "Version 2 (rolled_back) is not on the chain of the live version 3; "
        "versions [0, 3] can be served.",
        "instance": "/there",
        "version": 2,
        "state": "rolled_back",
        "current_version": 3,
        "servable_versions": [0, 3],
    }


def test_data_cannot_pass_itself_off_as_a_standard_member() -> None:
    document = answer(errors.Conflict("no", status=200, type="fine", other=1)).json()
    assert (document["status"], document["type"]) == (409, f"{TYPE_PREFIX}conflict")
    assert document["other"] == 1


@pytest.mark.parametrize(
    ("error", "header", "value"),
    [
        (errors.Unauthorized("no"), "www-authenticate", "Bearer"),
        (errors.NotReady("no"), "retry-after", "1"),
        (errors.StoreError("no"), "retry-after", "1"),
        (errors.RegistryError("no"), "retry-after", "1"),
        (errors.Overloaded("no"), "retry-after", "1"),
        (errors.Draining(), "retry-after", "1"),
        (errors.RateLimited("a", "vectors", 500, 5, 3), "retry-after", "3"),
        (errors.RateLimited("a", "vectors", 500, 5, 3), "ratelimit", '"vectors";r=0;t=3'),
        (errors.RateLimited("a", "vectors", 500, 5, 3), "ratelimit-policy", '"vectors";q=500;w=5'),
    ],
    ids=lambda value: str(value),
)
def test_headers_that_a_status_asks_for(error: BackcastError, header: str, value: str) -> None:
    assert answer(error).headers[header] == value


def test_invalid_request_is_told_without_what_was_sent() -> None:
    response = answer(errors.Conflict("never"), "/there?number=hunter2")
    assert response.status_code == 422
    document = response.json()
    assert document["type"] == f"{TYPE_PREFIX}invalid-input"
    assert [sorted(error) for error in document["errors"]] == [["loc", "msg", "type"]]
    assert document["errors"][0]["loc"] == ["query", "number"]
    assert document["detail"].startswith("number: ")
    assert "hunter2" not in response.text


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, "not-found"), (405, "method-not-allowed"), (406, "not-acceptable"), (418, "http-418")],
)
def test_what_the_framework_refuses_is_a_problem_too(status: int, code: str) -> None:
    response = answer(HTTPException(status, headers={"X-More": "kept"}))
    assert response.status_code == status
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.headers["x-more"] == "kept"
    assert response.json()["type"] == TYPE_PREFIX + code
    assert response.json()["detail"] == f"GET /there: {HTTPStatus(status).phrase}"


def test_unforeseen_error_tells_the_client_nothing() -> None:
    response = answer(RuntimeError("the password is hunter2"))
    assert response.status_code == 500
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.json()["type"] == f"{TYPE_PREFIX}internal-server-error"
    assert "hunter2" not in response.text


def test_unforeseen_error_reaches_the_server_which_logs_it() -> None:
    app = FastAPI()
    problems.install(app)

    @app.get("/")
    async def fail() -> None:
        raise RuntimeError("unforeseen")

    with TestClient(app) as client, pytest.raises(RuntimeError, match="unforeseen"):
        client.get("/")


SECRET = "bc_0011aabb_Zm9vYmFyYmF6cXV4-_Zm9vYmFyYmF6cXV4"


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        (f"/keys/{SECRET}/revoke", "/keys/bc_0011aabb_%E2%80%A6/revoke"),
        (f"/keys/{SECRET.replace('_', '%5F')}", "/keys/bc_0011aabb_%E2%80%A6"),
        (f"/keys/{SECRET.replace('Y', '%59')}/a%20b", "/keys/bc_0011aabb_%E2%80%A6/a%20b"),
        ("/keys/a%20b:@", "/keys/a%20b:@"),
    ],
)
def test_key_in_a_path_is_not_repeated(path: str, shown: str) -> None:
    response = answer(errors.Conflict("never"), path)
    document = response.json()
    assert (document["status"], document["instance"]) == (404, shown)
    assert document["detail"] == f"GET {unquote(shown)}: Not Found"
    assert "Zm9v" not in response.text
    assert "mFyYm" not in response.text


@pytest.mark.parametrize("path", ["/bc_" + "://:" * 16_000, "/" + "a%20" * 16_000])
def test_path_without_end_is_cut_and_soon_answered(path: str) -> None:
    started = time.process_time()
    document = answer(errors.Conflict("never"), path).json()
    assert time.process_time() - started < 0.6  # a look for secrets at each "://:" took 1.3
    shown = unquote(document["instance"])
    assert shown == unquote(path)[:1999] + "…"
    assert document["detail"] == f"GET {shown}: Not Found"
