"""Vectors over HTTP: the right ones, with everything said that a client must know."""

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.testclient import TestClient

from backcast.lifecycle import Backcast, open_backcast, sweep
from backcast.settings import Settings
from backcast.versions import Entity, Scope, VersionState
from service import wire
from service.documents import BatchDocument, EmbeddingDocument
from service.problems import MEDIA_TYPE, TYPE_PREFIX
from service.routes import embeddings
from service.wire import Format
from tests.service_support import (
    WatchedSnapshot,
    WatchedStore,
    arrow_ids,
    assert_served,
    bearer,
    client_of,
    expire,
    read_rows,
    secret_of,
    set_version,
)
from tests.support import SHARED_ID, Home, build_home

ALL_FORMATS = pytest.mark.parametrize("format", Format)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Versions 0, 1 and 2, of which 1 is live; every map has a bias."""
    with build_home(tmp_path_factory.mktemp("home"), bias=True, live=1) as built:
        yield built


@pytest.fixture(scope="module")
def client(home: Home) -> Iterator[TestClient]:
    with client_of(home) as opened:
        yield opened


def get(client: TestClient, id: str, format: Format = Format.JSON, **query: Any) -> httpx2.Response:
    return client.get(f"/embeddings/{id}", params=query, headers={"Accept": format})


def batch(client: TestClient, format: Format = Format.JSON, **body: Any) -> httpx2.Response:
    return client.post("/embeddings/batch", json=body, headers={"Accept": format})


def arrow_batch(
    client: TestClient, ids: pa.Array, format: Format = Format.JSON, **query: Any
) -> httpx2.Response:
    return client.post(
        "/embeddings/batch",
        content=arrow_ids(ids),
        params=query,
        headers={"Accept": format, "Content-Type": Format.ARROW},
    )


def assert_problem(response: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    document: dict[str, Any] = response.json()
    assert response.headers["content-type"] == MEDIA_TYPE
    assert (response.status_code, document["type"]) == (status, TYPE_PREFIX + code)
    assert document["status"] == status
    assert document["detail"]
    return document


@ALL_FORMATS
@pytest.mark.parametrize("entity", Entity)
@pytest.mark.parametrize("version", [0, 1, "live"])
def test_one_vector_is_the_arithmetic(
    home: Home, client: TestClient, version: int | str, entity: Entity, format: Format
) -> None:
    target = 1 if version == "live" else int(version)
    for id in home.ids(entity, version=1)[:3]:
        response = get(client, id, format, version=version, entity=entity)
        assert_served(read_rows(response), home, [id], target, entity, live=1)


@ALL_FORMATS
@pytest.mark.parametrize("entity", Entity)
@pytest.mark.parametrize("version", [0, 1, "live"])
def test_batch_is_the_arithmetic(
    home: Home, client: TestClient, version: int | str, entity: Entity, format: Format
) -> None:
    target = 1 if version == "live" else int(version)
    ids = home.ids(entity, version=1)
    response = batch(client, format, ids=ids, version=version, entity=entity)
    assert_served(read_rows(response), home, ids, target, entity, live=1)


@ALL_FORMATS
def test_answers_say_what_they_are(home: Home, client: TestClient, format: Format) -> None:
    live = home.backcast.registry.deployments.live()
    assert live is not None
    for response in (
        get(client, "item 0", format, version=0),
        batch(client, format, ids=["item 0"], version=0),
    ):
        assert response.headers["content-type"] == format
        assert response.headers["Backcast-Version"] == "0"
        assert response.headers["Backcast-Live-Version"] == "1"
        assert response.headers["Backcast-Snapshot"] == f"{live.snapshot}.0"
        assert response.headers["Backcast-Dim"] == "4"
        assert response.headers["Cache-Control"] == "private"
        assert response.headers["Vary"] == "Accept, Authorization"
        assert "Deprecation" not in response.headers
        assert "Sunset" not in response.headers


def test_json_is_what_openapi_says(client: TestClient) -> None:
    one = get(client, "item 0", version=0, drift=True).json()
    assert list(one) == list(EmbeddingDocument.model_fields)
    unasked = get(client, "item 0", version=0).json()
    assert list(unasked) == [name for name in one if name != "drift_bound"]
    EmbeddingDocument.model_validate(one)
    many = batch(client, ids=["item 0", "nobody"], version=0).json()
    assert list(many) == list(BatchDocument.model_fields)
    BatchDocument.model_validate(many)


@ALL_FORMATS
def test_order_duplicates_and_missing_are_kept(
    home: Home, client: TestClient, format: Format
) -> None:
    ids = ["item 3", "nobody", "item 1", "item 3", "", "nobody", SHARED_ID, "x" * 2000]
    response = batch(client, format, ids=ids, version=0)
    assert response.headers["Backcast-Missing"] == "4"
    rows = read_rows(response)
    known = [0, 2, 3, 6]
    assert_served(rows[known], home, [ids[at] for at in known], 0, live=1)
    assert np.isnan(np.delete(rows, known, axis=0)).all()
    if format is Format.JSON:
        document = response.json()
        assert document["missing"] == ["nobody", "", "x" * 2000]
        assert document["count"] == 8
        assert [row["id"] for row in document["embeddings"]] == ids


@ALL_FORMATS
def test_empty_batch_has_an_empty_answer(client: TestClient, format: Format) -> None:
    response = batch(client, format, ids=[], version=0)
    assert read_rows(response).shape == (0, 4)
    assert response.headers["Backcast-Missing"] == "0"


def test_id_of_the_other_kind_is_unknown(client: TestClient) -> None:
    document = assert_problem(get(client, "user 0", version=0), 404, "unknown-id")
    assert (document["entity"], document["id"]) == ("item", "user 0")
    assert get(client, "user 0", version=0, entity="user").status_code == 200


@pytest.mark.parametrize(
    ("version", "status", "code"),
    [(9, 404, "unknown-version"), (2, 409, "version-not-promoted")],
)
def test_versions_that_cannot_be_had(
    client: TestClient, version: int, status: int, code: str
) -> None:
    for response in (
        get(client, "item 0", version=version),
        batch(client, ids=["item 0"], version=version),
    ):
        document = assert_problem(response, status, code)
        assert document["servable_versions"] == [0, 1]


def test_retired_and_rolled_back_versions(tmp_path: Path) -> None:
    with build_home(tmp_path, parents=(None, 0, 0), live=1) as home:
        home.promote(2, force=True, reason="a branch")
        set_version(home, 0, state=VersionState.RETIRED)
        with client_of(home) as client:
            document = assert_problem(get(client, "item 0", version=0), 410, "version-retired")
            assert document["servable_versions"] == [2]
            document = assert_problem(get(client, "item 0", version=1), 409, "version-off-chain")
            assert document["state"] == "rolled_back"


@pytest.mark.parametrize(
    "query",
    [
        {"version": ""},
        {"version": "newest"},
        {"version": "-1"},
        {"version": "1.5"},
        {"version": "0", "entity": "shop"},
        {"verison": "0"},
    ],
    ids=str,
)
def test_queries_that_are_not_valid(client: TestClient, query: dict[str, str]) -> None:
    response = client.get("/embeddings/item 0", params=query)
    document = assert_problem(response, 422, "invalid-input")
    assert document["errors"][0]["loc"][0] == "query"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"ids": "item 0", "version": 0},
        {"ids": None, "version": 0},
        {"ids": ["item 0", 7], "version": 0},
        {"ids": [True], "version": 0},
        {"ids": [None], "version": 0},
        {"ids": ["item 0"], "version": True},
        {"ids": ["item 0"], "version": "0"},
        {"ids": ["item 0"], "version": 0.5},
        {"ids": ["item 0"], "version": -1},
        {"ids": ["item 0"], "version": 0, "entity": "shop"},
        {"ids": ["item 0"], "verison": 0},
        ["item 0"],
    ],
    ids=json.dumps,
)
def test_batches_that_are_not_valid(client: TestClient, body: Any) -> None:
    response = client.post("/embeddings/batch", json=body)
    document = assert_problem(response, 422, "invalid-input")
    assert document["errors"][0]["loc"][0] == "body"


class TestArrowRequests:
    @ALL_FORMATS
    @pytest.mark.parametrize("entity", Entity)
    @pytest.mark.parametrize("version", [0, 1, "live"])
    def test_is_the_arithmetic(
        self, home: Home, client: TestClient, version: int | str, entity: Entity, format: Format
    ) -> None:
        target = 1 if version == "live" else int(version)
        ids = home.ids(entity, version=1)
        response = arrow_batch(client, pa.array(ids), format, version=version, entity=entity)
        assert_served(read_rows(response), home, ids, target, entity, live=1)

    @given(ids=st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
        ["item 0", "item 1", SHARED_ID, "007", "7", "a/b/../c", "é" * 512, "x" * 2000, "nobody"]
    )))  # fmt: skip
    def test_says_what_json_would_be_told(self, client: TestClient, ids: list[str]) -> None:
        told = batch(client, ids=ids, version=0)
        answer = arrow_batch(client, pa.array(ids, pa.string()), version=0)
        assert answer.content == told.content
        assert answer.headers["Backcast-Missing"] == told.headers["Backcast-Missing"]

    def test_media_type_may_have_parameters(self, client: TestClient) -> None:
        for content, type in (
            (arrow_ids(pa.array(["item 0"])), f"{Format.ARROW.upper()}; v=1"),
            (b'{"ids": ["item 0"], "version": 0}', "application/json; charset=utf-8"),
        ):
            query = "?version=0" if content[:1] != b"{" else ""
            response = client.post(
                f"/embeddings/batch{query}", content=content, headers={"Content-Type": type}
            )
            assert response.status_code == 200

    @pytest.mark.parametrize(
        "type", ["text/plain", "application/x-www-form-urlencoded", "application/octet-stream", "x"]
    )
    def test_other_media_types(self, client: TestClient, type: str) -> None:
        response = client.post(
            "/embeddings/batch", content=b'{"ids": []}', headers={"Content-Type": type}
        )
        document = assert_problem(response, 415, "unsupported-media-type")
        assert type in document["detail"]

    @pytest.mark.parametrize(
        "ids", [pa.array([1]), pa.array(["a", None]), pa.array([b"a"])], ids=["int", "null", "bin"]
    )
    def test_what_is_no_column_of_ids(self, client: TestClient, ids: pa.Array) -> None:
        document = assert_problem(arrow_batch(client, ids, version=0), 422, "invalid-input")
        assert document["errors"][0]["loc"] == ["body"]

    def test_stream_that_is_cut_off(self, client: TestClient) -> None:
        response = client.post(
            "/embeddings/batch?version=0",
            content=arrow_ids(pa.array(["item 0"] * 9))[:-20],
            headers={"Content-Type": Format.ARROW},
        )
        assert_problem(response, 422, "invalid-input")

    @pytest.mark.parametrize("query", [{"version": "new"}, {"verison": 0}, {"entity": "shop"}])
    def test_queries_that_are_not_valid(self, client: TestClient, query: dict[str, Any]) -> None:
        document = assert_problem(
            arrow_batch(client, pa.array(["item 0"]), **query), 422, "invalid-input"
        )
        assert document["errors"][0]["loc"][0] == "query"

    def test_without_a_version_there_is_no_answer(self, client: TestClient) -> None:
        assert_problem(arrow_batch(client, pa.array(["item 0"])), 422, "version-required")

    def test_is_capped(self, home: Home) -> None:
        with client_of(home, max_batch=3) as client:
            assert arrow_batch(client, pa.array(["a"] * 3), version=0).status_code == 200
            response = arrow_batch(client, pa.array(["a"] * 4), version=0)
            document = assert_problem(response, 413, "batch-too-large")
            assert (document["count"], document["limit"]) == (4, 3)


def test_json_in_many_pieces_is_the_arithmetic(
    home: Home, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "_NUMBERS", 12)
    ids = home.ids(version=1)
    response = batch(client, ids=ids, version=0)
    assert "content-length" not in response.headers
    assert_served(read_rows(response), home, ids, 0, live=1)


@pytest.mark.parametrize("content", [b"", b"{", b'{"ids": ["\\ud800"], "version": 0}', b"\xff"])
def test_batches_that_are_not_json(client: TestClient, content: bytes) -> None:
    response = client.post("/embeddings/batch", content=content)
    assert_problem(response, 422, "invalid-input")


def test_query_that_names_two_versions_is_refused(client: TestClient) -> None:
    response = client.get("/embeddings/item 0?version=0&version=1")
    assert_problem(response, 422, "invalid-input")


def test_version_in_the_query_of_a_batch_is_not_passed_over(client: TestClient) -> None:
    response = client.post("/embeddings/batch?version=1", json={"ids": [], "version": 0})
    assert_problem(response, 422, "invalid-input")


def test_batch_is_capped(home: Home) -> None:
    with client_of(home, max_batch=3) as client:
        assert batch(client, ids=["a"] * 3, version=0).status_code == 200
        document = assert_problem(batch(client, ids=["a"] * 4, version=0), 413, "batch-too-large")
        assert (document["count"], document["limit"]) == (4, 3)


def test_body_is_capped(home: Home) -> None:
    with client_of(home, max_body=100) as client:
        pieces = iter([b'{"version": 0, "ids": ["', b"a" * 80, b'"]}'])
        for content in (json.dumps({"ids": ["a" * 100]}), pieces):
            response = client.post("/embeddings/batch", content=content)
            assert_problem(response, 413, "content-too-large")
        assert batch(client, ids=["a" * 50], version=0).status_code == 200


def test_id_that_cannot_be_one(client: TestClient) -> None:
    assert_problem(client.get("/embeddings/?version=0"), 422, "invalid-input")
    assert_problem(get(client, "x" * 1025, version=0), 422, "invalid-input")
    assert_problem(client.get("/embeddings/%FF?version=0"), 422, "invalid-input")


def test_formats_that_are_not_there(client: TestClient) -> None:
    for method, path in (("GET", "/embeddings/item%200"), ("POST", "/embeddings/batch")):
        response = client.request(method, path, headers={"Accept": "text/html"})
        document = assert_problem(response, 406, "not-acceptable")
        assert all(format in document["detail"] for format in Format)


def test_unknown_paths_and_methods(client: TestClient) -> None:
    assert_problem(client.get("/embedding/item"), 404, "not-found")
    assert_problem(client.get("/embeddings"), 404, "not-found")
    assert_problem(client.put("/embeddings/item"), 405, "method-not-allowed")


def test_nothing_is_served_before_the_first_promotion(tmp_path: Path) -> None:
    with build_home(tmp_path, dims=(4,)) as home, client_of(home) as client:
        for response in (get(client, "item 0", version=0), batch(client, ids=[], version=0)):
            assert_problem(response, 503, "not-ready")
            assert response.headers["Retry-After"] == "1"


class TestTheShortWay:
    """Plain requests are answered before the framework; the long way answers the same."""

    REQUESTS = pytest.mark.parametrize(
        ("path", "headers"),
        [
            ("/embeddings/item 0?version=0", {}),
            ("/embeddings/item%200?version=1&entity=item", {}),
            ("/embeddings/in both/kinds?version=live&entity=user", {}),
            ("/embeddings/item 0?version=0", {"If-None-Match": "*"}),
            ("/embeddings/item 0?version=0", {"If-None-Match": 'W/"other"'}),
            *((f"/embeddings/item 0{query}", {}) for query in ("", "?version=2", "?version=x")),
            ("/embeddings/item 0?version=0&version=0", {}),
            ("/embeddings/nobody?version=0", {}),
            ("/embeddings/nobody?version=0", {"If-None-Match": "*"}),
            ("/embeddings/?version=0", {}),
            ("/embeddings/%ff?version=0", {}),
            ("/embeddings/item 0?version=0", {"Accept": "text/html"}),
            ("/embeddings/item 0?version=0", {"Authorization": "Basic x"}),
            ("/embeddings/item 0?version=0", {"Authorization": "Bearer bc_nobody_x"}),
        ],
    )

    @ALL_FORMATS
    @REQUESTS
    def test_both_ways_lead_to_the_same(
        self,
        home: Home,
        client: TestClient,
        monkeypatch: pytest.MonkeyPatch,
        path: str,
        headers: dict[str, str],
        format: Format,
    ) -> None:
        asked = {"Accept": format, "X-Request-Id": "the-same", **headers}
        usual = client.get(path, headers=asked)
        monkeypatch.setattr("service.routes.embeddings.answer_at_once", lambda _scope: None)
        long = client.get(path, headers=asked)
        assert (long.status_code, long.content) == (usual.status_code, usual.content)
        assert sorted(long.headers.multi_items()) == sorted(usual.headers.multi_items())

    def test_plain_requests_take_it(
        self, client: TestClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        etag = get(client, "item 0", version=0).headers["ETag"]

        async def fail(_request: Request) -> None:
            raise AssertionError("the long way")

        monkeypatch.setattr("service.routes.embeddings.find_reader", fail)
        assert get(client, "item 0", version=0).status_code == 200
        known = client.get("/embeddings/item 0?version=0", headers={"If-None-Match": etag})
        assert known.status_code == 304

    def test_a_caller_who_is_not_known_yet_does_not(self, tmp_path: Path) -> None:
        with build_home(tmp_path, live=1, reads="keyed") as home, client_of(home) as client:
            secret = secret_of(home, Scope.READ)
            client.headers.pop("Authorization", None)
            for _ in range(2):  # from the registry, then from memory
                answer = client.get("/embeddings/item 0?version=0", headers=bearer(secret))
                assert answer.status_code == 200
                assert client.get("/embeddings/item 0?version=0").status_code == 401


class TestConditionalRequests:
    def test_copy_that_is_current_is_not_sent_again(self, client: TestClient) -> None:
        first = get(client, "item 0", version=0)
        etag = first.headers["ETag"]
        for value in (etag, f'"other", {etag}', etag.removeprefix("W/"), "*"):
            again = client.get(
                "/embeddings/item 0", params={"version": 0}, headers={"If-None-Match": value}
            )
            assert again.status_code == 304
            assert again.content == b""
            assert "content-type" not in again.headers
            kept = {"etag", "cache-control", "vary", "backcast-snapshot", "backcast-version"}
            assert {name: again.headers[name] for name in kept} == {
                name: first.headers[name] for name in kept
            }

    def test_other_copy_is_replaced(self, client: TestClient) -> None:
        response = client.get(
            "/embeddings/item 0", params={"version": 0}, headers={"If-None-Match": 'W/"other"'}
        )
        assert response.status_code == 200

    @ALL_FORMATS
    def test_current_copy_needs_no_lookup(self, tmp_path: Path, format: Format) -> None:
        with build_home(tmp_path, live=1) as home, client_of(home) as client:
            etag = get(client, "item 0", format, version=0).headers["ETag"]
            state = client.app_state["service"]
            snapshot = state.engine.current()

            def fail(_: Sequence[str]) -> None:
                raise AssertionError("looked up")

            watched = replace(snapshot, store=WatchedSnapshot(snapshot.store, fail))
            state.engine._view = replace(state.engine.view, snapshot=watched)
            headers = {"Accept": format, "If-None-Match": etag}
            again = client.get("/embeddings/item 0?version=0", headers=headers)
            assert again.status_code == 304

    def test_unknown_id_is_unknown_all_the_same(self, client: TestClient) -> None:
        response = client.get(
            "/embeddings/nobody", params={"version": 0}, headers={"If-None-Match": "*"}
        )
        assert_problem(response, 404, "unknown-id")

    def test_etag_names_everything_that_it_stands_for(self, client: TestClient) -> None:
        answers = [
            get(client, SHARED_ID, format, version=version, entity=entity)
            for format in Format
            for version in (0, 1)
            for entity in Entity
        ]
        answers.append(get(client, "item 0", version=0))
        etags = [answer.headers["ETag"] for answer in answers]
        assert len(set(etags)) == len(etags)
        again = get(client, SHARED_ID, Format.JSON, version=0, entity="item")
        assert again.headers["ETag"] == etags[0]

    def test_etag_changes_with_the_snapshot(self, tmp_path: Path) -> None:
        with build_home(tmp_path, live=0) as home:
            with client_of(home) as client:
                before = get(client, "item 0", version=0).headers["ETag"]
            home.promote(1)
            with client_of(home) as client:
                assert get(client, "item 0", version=0).headers["ETag"] != before


def test_deprecated_versions_say_so(tmp_path: Path) -> None:
    with build_home(tmp_path, live=1) as home:
        deprecated = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
        sunset = datetime(2027, 1, 31, 23, 59, 59, tzinfo=UTC)
        set_version(home, 0, deprecated_at=deprecated, sunset_at=sunset)
        with client_of(home) as client:
            for response in (
                get(client, "item 0", version=0),
                batch(client, ids=["item 0"], version=0),
            ):
                assert response.headers["Deprecation"] == "@1795176000"
                assert response.headers["Sunset"] == "Sun, 31 Jan 2027 23:59:59 GMT"
            assert "Deprecation" not in get(client, "item 0", version=1).headers


class TestKeys:
    @pytest.mark.parametrize("value", ["", "Basic dTpw", "Bearer bc_00000000_x", None], ids=repr)
    def test_keys_that_are_none(self, client: TestClient, value: str | None) -> None:
        for method, path in (
            ("GET", "/embeddings/item 0?version=0"),
            ("POST", "/embeddings/batch"),
            ("GET", "/versions"),
            ("GET", "/versions/0"),
        ):
            request = client.build_request(method, path)
            del request.headers["Authorization"]
            if value is not None:
                request.headers["Authorization"] = value
            response = client.send(request)
            assert_problem(response, 401, "unauthorized")
            assert response.headers["WWW-Authenticate"] == "Bearer"

    def test_expired_and_revoked_keys(self, home: Home, client: TestClient) -> None:
        keys = home.backcast.registry.keys
        late, late_secret = keys.create("late", Scope.READ)
        expire(home, late.prefix, datetime.now(UTC) - timedelta(days=1))
        gone, gone_secret = keys.create("gone", Scope.READ)
        keys.revoke(gone.prefix)
        for secret, why in ((late_secret, "has expired"), (gone_secret, "was revoked")):
            response = client.get("/embeddings/item 0?version=0", headers=bearer(secret))
            assert why in assert_problem(response, 401, "unauthorized")["detail"]

    def test_pin_is_the_default_and_only_that(self, home: Home, client: TestClient) -> None:
        pinned = bearer(secret_of(home, pin=0))
        response = client.get("/embeddings/item 0", headers=pinned)
        assert response.headers["Backcast-Version"] == "0"
        response = client.get("/embeddings/item 0?version=1", headers=pinned)
        assert response.headers["Backcast-Version"] == "1"
        response = client.post("/embeddings/batch", json={"ids": ["item 0"]}, headers=pinned)
        assert response.headers["Backcast-Version"] == "0"

    def test_pin_to_a_version_that_is_not_served_is_no_other(
        self, home: Home, client: TestClient
    ) -> None:
        pinned = bearer(secret_of(home, pin=2))
        response = client.get("/embeddings/item 0", headers=pinned)
        assert_problem(response, 409, "version-not-promoted")

    def test_without_version_and_pin_there_is_no_answer(self, client: TestClient) -> None:
        for response in (get(client, "item 0"), batch(client, ids=["item 0"])):
            document = assert_problem(response, 422, "version-required")
            assert document["servable_versions"] == [0, 1]

    def test_open_reads_need_no_key_and_take_one(self, home: Home) -> None:
        with client_of(home, reads="open") as client:
            del client.headers["Authorization"]
            assert client.get("/embeddings/item 0?version=0").status_code == 200
            assert client.get("/versions").status_code == 200
            assert_problem(client.get("/embeddings/item 0"), 422, "version-required")
            pinned = bearer(secret_of(home, pin=0))
            assert client.get("/embeddings/item 0", headers=pinned).status_code == 200
            wrong = bearer("bc_00000000_x")
            assert_problem(client.get("/versions", headers=wrong), 401, "unauthorized")
            assert_problem(client.get("/admin/deployments"), 401, "unauthorized")


class TestExpectedSnapshot:
    def test_current_by_either_name(self, client: TestClient) -> None:
        name = get(client, "item 0", version=0).headers["Backcast-Snapshot"]
        for expected in (name, name.removesuffix(".0")):
            response = client.get(
                "/embeddings/item 0?version=0", headers={"Backcast-Expect-Snapshot": expected}
            )
            assert response.headers["Backcast-Snapshot"] == name

    def test_unknown(self, client: TestClient) -> None:
        headers = {"Backcast-Expect-Snapshot": "v1-gone.0"}
        for response in (
            client.get("/embeddings/item 0?version=0", headers=headers),
            client.post("/embeddings/batch", json={"ids": [], "version": 0}, headers=headers),
        ):
            document = assert_problem(response, 412, "snapshot-mismatch")
            assert document["expected_snapshot"] == "v1-gone.0"
            assert document["current_snapshot"].startswith("v1-")

    def test_newer_than_the_last_look_and_superseded(self, tmp_path: Path) -> None:
        with build_home(tmp_path, live=1) as home, client_of(home, poll_seconds=3600.0) as client:
            old = get(client, "item 0", version=0).headers["Backcast-Snapshot"]
            new = home.promote(2)
            ids = home.ids(version=1)
            for live, expected in ((1, old), (2, new), (1, old)):
                response = client.post(
                    "/embeddings/batch",
                    json={"ids": ids, "version": 0},
                    headers={"Backcast-Expect-Snapshot": expected},
                )
                assert response.headers["Backcast-Live-Version"] == str(live)
                assert_served(read_rows(response), home, ids, 0, live=live)
            sweep(home.backcast, timedelta(0))
            client.get("/embeddings/x", headers={"Backcast-Expect-Snapshot": "look again"})
            response = client.get(
                "/embeddings/item 0?version=0", headers={"Backcast-Expect-Snapshot": old}
            )
            assert_problem(response, 412, "snapshot-mismatch")


class TestSlowStore:
    """A store that must be waited for: nobody else waits."""

    @pytest.fixture
    def held(self, home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
        """Hold every lookup up until the event is set."""
        released = threading.Event()

        @contextmanager
        def open_slowly(settings: Settings) -> Iterator[Backcast]:
            with open_backcast(settings) as backcast:
                store = WatchedStore(backcast.store, lambda _: released.wait(30))
                yield replace(backcast, store=store)

        monkeypatch.setattr("service.state.open_backcast", open_slowly)
        yield released
        released.set()

    @pytest.mark.parametrize("count", [1, 3])
    def test_event_loop_goes_on(self, home: Home, held: threading.Event, count: int) -> None:
        with client_of(home) as client, ThreadPoolExecutor() as pool:
            if count == 1:
                waiting = pool.submit(get, client, "item 0", version=0)
            else:
                waiting = pool.submit(batch, client, ids=["item 0"] * count, version=0)
            for path in ("/livez", "/readyz", "/versions"):
                assert pool.submit(client.get, path).result(timeout=20).status_code == 200
            assert not waiting.done()
            held.set()
            assert waiting.result(timeout=20).status_code == 200


def test_what_fails_on_the_short_way_is_answered_on_the_long_one_and_told_once(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr(embeddings, "parse_query", fail)
    for _ in range(5):
        assert client.get("/embeddings/item 0?version=0").status_code == 200
    [told] = [record for record in caplog.records if record.levelname != "INFO"]
    assert (told.levelname, told.getMessage()) == ("ERROR", "answering at once: RuntimeError")
    assert told.exc_info is not None
