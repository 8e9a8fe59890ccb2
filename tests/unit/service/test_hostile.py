"""What strangers may send, and how little it costs."""

import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from service.openapi import render
from tests.service_support import client_of
from tests.support import build_home

JSON = {"Content-Type": "application/json"}
CALLS = [
    (method.upper(), re.sub(r"\{[kj]\}", "0", path).replace("{id}", "i0001"), call)
    for path, methods in json.loads(render())["paths"].items()
    for method, call in methods.items()
]
NUMBER = "version: a number from 0 to 2147483647, or live."
ORDERS = [
    (method, path)
    for method, path, call in CALLS
    if path.startswith("/admin") and "requestBody" in call
]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("home")
    with build_home(folder, (4,), live=0) as home, client_of(home) as client:
        yield client


@pytest.mark.parametrize(
    "body",
    [
        b"\xff",
        b"[" * 50_000,
        b'{"expected_live": NaN}',
        '{"expected_live": 0, "reason": "x"}'.encode("utf-16"),
        b'{"expected_live": ' + b"9" * 5_000 + b"}",
    ],
    ids=["no UTF-8", "deep", "NaN", "UTF-16", "digits"],
)
def test_an_order_that_is_no_json(client: TestClient, body: bytes) -> None:
    response = client.post("/admin/rollback", content=body, headers=JSON)
    assert response.status_code == 422
    assert response.json()["type"] == "urn:backcast:problem:invalid-input"


def test_an_order_without_end(client: TestClient) -> None:
    response = client.post("/admin/rollback", json={"reason": "x" * (1 << 16)})
    assert response.status_code == 413
    assert "at most 65536 bytes" in response.json()["detail"]


@pytest.mark.parametrize("number", [0, 0.0, -0.0])
def test_a_whole_number_is_one_however_it_is_spelt(client: TestClient, number: float) -> None:
    response = client.post("/embeddings/batch", json={"ids": [], "version": number})
    assert response.status_code == 200
    assert response.json()["version"] == 0


@pytest.mark.parametrize("number", [0.5, True, "0"])
def test_no_other_value_is_a_number(client: TestClient, number: object) -> None:
    response = client.post("/embeddings/batch", json={"ids": [], "version": number})
    assert response.status_code == 422


def test_unknown_fields_are_counted_beyond_measure(client: TestClient) -> None:
    response = client.post(
        "/embeddings/batch", json={"ids": [], **{f"k{n}": 0 for n in range(5_000)}}
    )
    assert response.status_code == 422
    assert response.json()["detail"] == "body: 5000 fields are unknown or wrong."


def test_a_long_name_is_cut(client: TestClient) -> None:
    response = client.post("/embeddings/batch", json={"ids": [], "k" * 100_000: 0})
    assert response.status_code == 422
    assert len(response.content) < 1_000


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/admin/embeddings", "DELETE, PUT"),
        ("/admin/versions/0/deprecate", "DELETE, POST"),
        ("/embeddings/batch", "GET, POST"),
        ("/versions", "GET"),
    ],
)
def test_all_methods_of_a_path_are_named(client: TestClient, path: str, methods: str) -> None:
    response = client.patch(path)
    assert response.status_code == 405
    assert response.headers["allow"] == methods


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/embeddings/batch"),
        ("PUT", "/admin/embeddings"),
        ("DELETE", "/admin/embeddings"),
        ("POST", "/admin/versions/0/retire"),
        ("GET", "/admin/keys"),
        ("PUT", "/admin/consumers/ads"),
        ("GET", "/versions/0"),
        ("GET", "/metrics"),
        ("GET", "/livez"),
        ("GET", "/openapi.json"),
    ],
)
@pytest.mark.parametrize("end", ["%0A", "%0a", "%0D%0A"])
def test_a_path_with_a_line_feed_at_its_end_is_no_other(
    client: TestClient, method: str, path: str, end: str
) -> None:
    response = client.request(method, path + end, json={"ids": ["item 0"], "version": 0})
    assert response.status_code == 404
    assert response.json()["type"] == "urn:backcast:problem:not-found"
    assert response.json()["instance"] == path + end


@pytest.mark.parametrize("id", ["batch\n", "item 0\n"])
def test_an_id_may_end_with_a_line_feed(client: TestClient, id: str) -> None:
    response = client.get(f"/embeddings/{quote(id)}?version=0")
    assert (response.status_code, response.json()["id"]) == (404, id)


def test_the_service_has_no_page_that_runs_scripts(client: TestClient) -> None:
    for path in ("/docs", "/docs/oauth2-redirect", "/redoc"):
        assert client.get(path).status_code == 404
    assert client.get("/openapi.json").headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("method", "path"), [(method, path) for method, path, call in CALLS if "security" in call]
)
def test_no_parameter_is_passed_over(client: TestClient, method: str, path: str) -> None:
    path = path.replace("{name}", "ads").replace("{prefix}", "0011aabb")
    path = path.replace("{generation}", "1")
    response = client.request(method, f"{path}?forse=true", content=b"{}", headers=JSON)
    assert response.status_code == 422
    assert response.json()["errors"][0]["loc"] == ["query", "forse"]
    assert response.json()["detail"].startswith("forse: ")


def test_a_parameter_that_is_unknown_is_told_of_those_that_are_not(client: TestClient) -> None:
    def detail(path: str) -> str:
        return str(client.get(path).json()["detail"])

    assert detail("/versions?limit=1") == "limit: no parameter of this call, which has none."
    assert detail("/admin/operations?foo=1") == "foo: no parameter of this call, which has limit."
    assert detail("/admin/usage?day=3").endswith("which has days, version.")
    assert detail("/admin/operations?limit=1&limit=2") == "A query parameter is given twice."


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/metrics"])
def test_probes_may_carry_what_they_like(client: TestClient, path: str) -> None:
    assert client.get(f"{path}?at=1").status_code == 200


@pytest.mark.parametrize("media", ["application/x-www-form-urlencoded", "text/plain", "x"])
@pytest.mark.parametrize(("method", "path"), ORDERS)
def test_an_order_of_another_media_type(
    client: TestClient, method: str, path: str, media: str
) -> None:
    response = client.request(method, path, content=b"{}", headers={"Content-Type": media})
    assert response.status_code == 415
    assert response.json()["type"] == "urn:backcast:problem:unsupported-media-type"
    assert response.json()["detail"].endswith(f"not as {media}.")


@pytest.mark.parametrize(("method", "path"), ORDERS)
@pytest.mark.parametrize("headers", [{}, JSON], ids=["unsaid", "JSON"])
def test_an_order_without_a_body(
    client: TestClient, method: str, path: str, headers: dict[str, str]
) -> None:
    path = path.replace("{prefix}", "0011aabb")
    response = client.request(method, path, headers=headers)
    assert response.status_code == 422
    assert response.json()["detail"] == "body: a JSON body is needed."


def test_an_order_that_is_no_object(client: TestClient) -> None:
    response = client.post("/admin/rollback", json=[])
    assert response.status_code == 422
    assert response.json()["detail"] == "body: a JSON object is needed."


def test_an_order_is_json_where_it_does_not_say_what_it_is(client: TestClient) -> None:
    response = client.post("/admin/rollback", content=b'{"expected_live": 7, "dry_run": true}')
    assert response.status_code == 409


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "loc", "detail"),
    [
        ("GET", "/embeddings/a?version=abc", {}, None, ["query", "version"], NUMBER),
        ("GET", "/embeddings/a?version=-1", {}, None, ["query", "version"], NUMBER),
        ("POST", "/embeddings/batch", {}, {"ids": [], "version": "1"}, ["body", "version"], NUMBER),
        (
            "GET",
            "/admin/operations/%20",
            {},
            None,
            ["path", "id"],
            "id: 1 to 64 letters, digits, hyphens and underscores.",
        ),
        (
            "POST",
            "/admin/keys/search/revoke",
            {},
            {},
            ["path", "prefix"],
            "prefix: 8 of the digits 0 to 9 and a to f, as after bc_ in the key.",
        ),
        (
            "POST",
            "/admin/versions/0/refresh",
            {"Idempotency-Key": "at night"},
            {"expected_live": 0},
            ["header", "Idempotency-Key"],
            "Idempotency-Key: 1 to 128 printable ASCII characters without spaces.",
        ),
    ],
)
def test_what_a_value_should_be_is_said_in_words(
    client: TestClient,
    method: str,
    path: str,
    headers: dict[str, str],
    body: Any,
    loc: list[str],
    detail: str,
) -> None:
    response = client.request(method, path, headers=headers, json=body)
    assert response.status_code == 422
    assert response.json()["detail"] == detail
    assert [error["loc"] for error in response.json()["errors"]] == [loc]


@pytest.mark.parametrize("path", ["/embeddings/i0001?version=0", "/versions", "/admin/keys"])
def test_a_head_alone_is_not_to_be_had(client: TestClient, path: str) -> None:
    response = client.head(path)
    assert response.status_code == 405
    assert "GET" in response.headers["Allow"]
