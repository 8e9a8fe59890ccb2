"""What strangers may send, and how little it costs."""

from collections.abc import Iterator
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from tests.service_support import client_of
from tests.support import build_home

JSON = {"Content-Type": "application/json"}


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
