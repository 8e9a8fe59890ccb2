"""Vectors put and ids erased over HTTP, and what every version answers then."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
from numpy.typing import NDArray
from starlette.testclient import TestClient

from backcast.versions import Entity, Scope
from service import changes, requests
from service.wire import Format
from tests.service_support import (
    assert_served,
    bearer,
    client_of,
    engine_of,
    read_rows,
    secret_of,
)
from tests.support import SHARED_ID, Home, build_home, normal

URL = "/admin/embeddings"
ARROW = {"Content-Type": Format.ARROW.value}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """Versions 0, 1 and 2, of which 2 is live, with biases; a batch holds six ids."""
    with build_home(tmp_path, bias=True, live=2, max_batch=6) as built:
        yield built


@pytest.fixture
def client(home: Home) -> Iterator[TestClient]:
    with client_of(home) as opened:
        yield opened


def code_of(response: Any) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/problem+json", response.text
    return response.status_code, response.json()["type"].removeprefix("urn:backcast:problem:")


def arrow(ids: Any, vectors: Any, **options: Any) -> bytes:
    batch = pa.record_batch({"id": ids, "vector": vectors})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, **options) as stream:
        stream.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def fixed(vectors: NDArray[np.float32]) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def put(
    client: TestClient, home: Home, ids: list[str], entity: Entity = Entity.ITEM, seed: int = 7
) -> Any:
    """Put random vectors, and note them as those that answers must be made from."""
    vectors = normal(np.random.default_rng(seed), len(ids), 8)
    home.vectors[2][entity].update(zip(ids, vectors, strict=True))
    document = {"ids": ids, "vectors": vectors.tolist(), "entity": str(entity)}
    response = client.put(URL, json=document)
    assert response.status_code == 200, response.text
    return response


def erase(client: TestClient, ids: list[str], entity: Entity = Entity.ITEM) -> Any:
    return client.request("DELETE", URL, json={"ids": ids, "entity": str(entity)})


def test_answer_names_what_is_live(home: Home, client: TestClient) -> None:
    response = put(client, home, ["item 0", "new"])
    live = home.backcast.registry.deployments.live()
    assert live is not None
    assert live.delta == 1
    assert response.json() == {
        "snapshot": f"{live.snapshot}.1",
        "live_version": 2,
        "entity": "item",
        "upserted": 2,
    }
    assert response.headers["Backcast-Snapshot"] == f"{live.snapshot}.1"
    assert client.get("/readyz").json()["snapshot"] == f"{live.snapshot}.1"
    [delta] = home.backcast.registry.deltas.of(live.snapshot)
    assert (delta.actor, delta.count) == ("consumer 0", 2)


@pytest.mark.parametrize("format", Format)
@pytest.mark.parametrize("target", [0, 1, 2])
def test_changed_ids_are_the_arithmetic_in_every_version_and_format(
    home: Home, client: TestClient, target: int, format: Format
) -> None:
    put(client, home, ["item 1", "new", SHARED_ID])
    put(client, home, ["item 1", SHARED_ID], Entity.USER, seed=8)
    erase(client, ["item 2", "item 3"])
    accept = {"Accept": format.value}
    ids = ["new", "item 2", "item 1", "item 4", SHARED_ID, "item 1"]
    response = client.post(
        "/embeddings/batch", json={"ids": ids, "version": target}, headers=accept
    )
    rows = read_rows(response)
    assert response.headers["Backcast-Missing"] == "1"
    assert np.isnan(rows[1]).all()
    kept = [0, 2, 3, 4, 5]
    assert_served(rows[kept], home, [ids[at] for at in kept], target, live=2)
    for entity, id in ((Entity.ITEM, "new"), (Entity.ITEM, "item 4"), (Entity.USER, SHARED_ID)):
        query = {"version": f"{target}", "entity": str(entity)}
        one = client.get(f"/embeddings/{id}", params=query, headers=accept)
        assert_served(read_rows(one), home, [id], target, entity, live=2)
    gone = client.get("/embeddings/item 3", params={"version": target}, headers=accept)
    assert code_of(gone) == (404, "unknown-id")


def test_arrow_stream_is_put(home: Home, client: TestClient) -> None:
    vectors = normal(np.random.default_rng(1), 2, 8)
    users = home.vectors[2][Entity.USER]
    users.update(zip(["user 0", "new"], vectors, strict=True))
    content = arrow(["user 0", "new"], fixed(vectors))
    query = {"entity": "user", "expected_live": "2"}
    response = client.put(URL, content=content, headers=ARROW, params=query)
    assert (response.json()["upserted"], response.json()["entity"]) == (2, "user")
    answer = client.post(
        "/embeddings/batch", json={"ids": ["new", "user 0"], "version": 1, "entity": "user"}
    )
    assert_served(read_rows(answer), home, ["new", "user 0"], 1, Entity.USER, live=2)


def test_etag_changes_with_the_vector(home: Home, client: TestClient) -> None:
    url, query = "/embeddings/item 0", {"version": 0}
    etag = client.get(url, params=query).headers["ETag"]
    assert client.get(url, params=query, headers={"If-None-Match": etag}).status_code == 304
    put(client, home, ["item 0"])
    assert client.get(url, params=query, headers={"If-None-Match": etag}).status_code == 200


def test_erased_ids_are_gone_from_the_snapshot_that_is_kept(home: Home, client: TestClient) -> None:
    kept = client.get("/readyz").json()["snapshot"]
    home.publish(2, seed=3)
    home.promote(2)
    expect = {"Backcast-Expect-Snapshot": kept.partition(".")[0]}
    query = {"version": 0}
    assert client.get("/embeddings/item 1", params=query, headers=expect).status_code == 200
    with client_of(home, poll_seconds=0.05) as other:
        assert other.get("/embeddings/item 1", params=query, headers=expect).status_code == 200
        report = erase(client, ["item 1"])
        assert report.status_code == 200, report.text
        for headers in (expect, {}):
            gone = client.get("/embeddings/item 1", params=query, headers=headers)
            assert code_of(gone) == (404, "unknown-id")
            there = client.get("/embeddings/item 2", params=query, headers=headers)
            assert there.status_code == 200
        deadline = datetime.now(UTC).timestamp() + 10
        while other.get("/embeddings/item 1", params=query, headers=expect).status_code != 404:
            assert datetime.now(UTC).timestamp() < deadline
    exact = {"Backcast-Expect-Snapshot": kept}  # S.0 holds what was erased, and is no more
    response = client.get("/embeddings/item 2", params=query, headers=exact)
    assert code_of(response) == (412, "snapshot-mismatch")


def test_erasure_reports_what_is_left(home: Home, client: TestClient) -> None:
    document = erase(client, ["item 1", "nobody"]).json()
    live = home.backcast.registry.deployments.live()
    assert live is not None
    assert (document["erased"], document["unknown"]) == (2, ["nobody"])
    assert (document["snapshot"], document["live_version"]) == (f"{live.snapshot}.1", 2)
    states = {(h["what"], h["version"]): h["state"] for h in document["held_by"]}
    assert states == {
        ("snapshot", 0): "superseded",
        ("snapshot", 1): "superseded",
        ("snapshot", 2): "live",
        ("data set", None): None,
    }


@pytest.mark.parametrize(
    ("document", "refusal", "named"),
    [
        ({"ids": ["a"], "vectors": [[1.0] * 7]}, "dimension-mismatch", "expected 8, got 7"),
        ({"ids": ["a"], "vectors": []}, "dimension-mismatch", "vectors: expected 1, got 0"),
        ({"ids": [], "vectors": []}, "invalid-input", "No id is given"),
        (
            {"ids": ["a", "b"], "vectors": [[1.0] * 8, [1.0] * 7]},
            "invalid-input",
            "vector of 'b' has 7 numbers, that of 'a' 8",
        ),
        ({"ids": ["a", "a"], "vectors": [[1.0] * 8] * 2}, "invalid-input", "more than once"),
        ({"ids": ["a"], "vectors": [[1e39] * 8]}, "not-finite", "NaN or infinite"),
        ({"ids": ["a"], "vectors": [["1"] * 8]}, "invalid-input", "vectors.0.0: "),
        ({"ids": ["a"], "vectors": [[1.0] * 8], "x": 1}, "invalid-input", "x: "),
        ({"ids": [7], "vectors": [[1.0] * 8]}, "invalid-input", "ids.0: "),
    ],
)
def test_bad_upserts_are_refused(
    home: Home, client: TestClient, document: dict[str, Any], refusal: str, named: str
) -> None:
    response = client.put(URL, json=document)
    assert code_of(response) == (422, refusal)
    assert named in response.json()["detail"]
    live = home.backcast.registry.deployments.live()
    assert live is not None
    assert live.delta == 0


def test_not_a_number_is_refused(client: TestClient) -> None:
    body = b'{"ids": ["a"], "vectors": [[NaN,1,1,1,1,1,1,1]]}'
    assert client.put(URL, content=body).status_code == 422


ONES = np.ones((2, 8), np.float32)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not an Arrow stream"),
        (arrow(["a", "b"], fixed(ONES))[:-60], "not an Arrow stream"),
        (
            arrow(["a", "b"], fixed(ONES), options=pa.ipc.IpcWriteOptions(compression="zstd")),
            "compressed",
        ),
        (arrow(["a", None], fixed(ONES)), "an id is null"),
        (arrow(["a", "b"], pa.array([[1.0] * 8, None], pa.list_(pa.float32(), 8))), "is null"),
        (
            arrow(["a"], pa.array([[None] + [1.0] * 7], pa.list_(pa.float32(), 8))),
            "a number in one, is null",
        ),
        (arrow(["a"], pa.array([[1.0] * 8])), "list<item: double>, not fixed_size_list"),
        (arrow([1, 2], fixed(ONES)), "of type int64, not string"),
        (arrow(["a", "b"], fixed(ONES[:, :7])), "expected 8, got 7"),
        (arrow(["a", "b"], fixed(ONES * np.float32("inf"))), "NaN or infinite"),
    ],
)
def test_bad_streams_are_refused(client: TestClient, content: bytes, named: str) -> None:
    response = client.put(URL, content=content, headers=ARROW)
    assert code_of(response)[0] == 422
    assert named in response.json()["detail"]


def test_limits(home: Home, client: TestClient) -> None:
    ids = [f"{n}" for n in range(7)]
    many = {"ids": ids, "vectors": [[1.0] * 8] * 7}
    assert code_of(client.put(URL, json=many)) == (413, "batch-too-large")
    content = arrow(ids, fixed(np.ones((7, 8), np.float32)))
    assert code_of(client.put(URL, content=content, headers=ARROW)) == (413, "batch-too-large")
    assert code_of(erase(client, ids)) == (413, "batch-too-large")
    for method in ("PUT", "DELETE"):
        text = client.request(method, URL, content=b"x", headers={"Content-Type": "text/csv"})
        assert code_of(text) == (415, "unsupported-media-type")
        beside = client.request(method, URL, json=many, params={"entity": "user"})
        assert code_of(beside) == (422, "invalid-input")
    with client_of(home, max_changed=2) as narrow:
        put(narrow, home, ["a", "b"])
        response = narrow.put(URL, json={"ids": ["c"], "vectors": [[1.0] * 8]})
        assert code_of(response) == (409, "conflict")
        assert "backcast refresh --compact" in response.json()["detail"]
        assert erase(narrow, ["c", "d"]).status_code == 200


def test_vectors_of_another_version_are_refused(client: TestClient) -> None:
    document = {"ids": ["a"], "vectors": [[1.0] * 8], "expected_live": 1}
    response = client.put(URL, json=document)
    assert code_of(response) == (409, "promotion-conflict")
    assert response.json()["current_version"] == 2


@pytest.mark.parametrize(
    ("method", "body"),
    [
        ("PUT", b'{"ids":["a"],"vectors":[[' + b"1," * 600_000 + b"1]]}"),
        ("PUT", b'{"ids":["a"],"vectors":[' + b"[]," * 400_000 + b"[]]}"),
        ("PUT", b'{"ids":[' + b'"",' * 400_000 + b'""],"vectors":[]}'),
        ("PUT", b'{"ids":["a"],"vectors":' + b"[" * 90_000),
        ("PUT", b'{"ids":["a"],"vectors":' + b'{"":' * 30_000),
        ("DELETE", b'{"ids":[' + b'"",' * 400_000 + b'""]}'),
    ],
    ids=["numbers", "vectors", "ids", "lists in lists", "objects in objects", "ids to erase"],
)
def test_body_of_more_values_than_a_batch_has_is_not_read(
    client: TestClient, method: str, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "read_body", None)
    response = client.request(method, URL, content=body, headers={"Content-Type": Format.JSON})
    assert code_of(response) == (413, "content-too-large")
    assert "send several batches" in response.json()["detail"]


def test_version_that_just_came_may_have_longer_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = iter([4])  # as long as the replica has not heard of version 1
    monkeypatch.setattr(changes, "_widest", lambda _engine: next(known, 256))
    with (
        build_home(tmp_path, dims=(4, 256), live=1, max_batch=9) as home,
        client_of(home) as client,
    ):
        document = {"ids": [f"n{n}" for n in range(9)], "vectors": [[0.5] * 256] * 9}
        body = orjson.dumps(document) + b" " * (64 << 10)
        response = client.put(URL, content=body, headers={"Content-Type": Format.JSON})
        assert response.status_code == 200, response.text
        assert next(known, None) is None


def test_large_body_with_as_many_values_as_a_batch_has_is_read(
    home: Home, client: TestClient
) -> None:
    vectors = normal(np.random.default_rng(3), 6, home.dims[2])
    document = {"ids": [f"new {n}" for n in range(6)], "vectors": vectors.tolist()}
    body = orjson.dumps(document) + b" " * (2 << 20)
    response = client.put(URL, content=body, headers={"Content-Type": Format.JSON})
    assert response.status_code == 200, response.text
    assert response.json()["upserted"] == 6


def test_nothing_is_live(tmp_path: Path) -> None:
    with build_home(tmp_path, dims=(4,)) as home, client_of(home) as client:
        response = client.put(URL, json={"ids": ["a"], "vectors": [[1.0] * 4]})
        assert code_of(response) == (409, "conflict")
        answer = erase(client, ["item 1"])
        assert (answer.status_code, answer.json()["snapshot"]) == (200, None)
        assert "Backcast-Snapshot" not in answer.headers


def test_readers_change_nothing(home: Home, client: TestClient) -> None:
    reader = bearer(secret_of(home, Scope.READ))
    for method in ("PUT", "DELETE"):
        refused = client.request(method, URL, content=b"{}", headers=reader)
        assert code_of(refused) == (403, "forbidden")
        unknown = client.request(method, URL, content=b"{}", headers={"Authorization": ""})
        assert code_of(unknown) == (401, "unauthorized")


def test_engine_follows_what_another_replica_was_told(home: Home, client: TestClient) -> None:
    engine = engine_of(home)
    first = engine.current()
    put(client, home, ["new", "item 0"])
    erase(client, ["item 1"])
    assert not first.vectors(Entity.ITEM, ["new"], 0).found.any()  # a request keeps its snapshot
    engine.refresh()
    current = engine.current()
    assert current.live.delta == 2
    assert current.maps is first.maps
    served = current.vectors(Entity.ITEM, ["new", "item 0"], 0)
    assert_served(served.vectors, home, ["new", "item 0"], 0, live=2)
    assert current.store.counts[Entity.ITEM] == 12
    again = engine_of(home).current()
    assert again.name == current.name
    assert not again.vectors(Entity.ITEM, ["item 1"], 2).found.any()
