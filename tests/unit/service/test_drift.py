"""Drift bounds over HTTP: stated where they are asked for, and nowhere else."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from starlette.testclient import TestClient

from backcast.lifecycle import upsert
from backcast.versions import Entity
from service.wire import Format
from tests.service_support import arrow_ids, client_of, engine_of
from tests.support import Home, build_home, normal


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Versions 0 to 2, of which 2 is live; an item was put, and another one is new."""
    with build_home(tmp_path_factory.mktemp("home"), live=2) as built:
        rows = normal(np.random.default_rng(4), 2, built.dims[2])
        ids = ["item 1", "new"]
        upsert(built.backcast, Entity.ITEM, ids, rows, actor="tests", most_changed=10)
        yield built


@pytest.fixture(scope="module")
def client(home: Home) -> Iterator[TestClient]:
    with client_of(home) as opened:
        yield opened


def exact(home: Home, id: str, target: int) -> float:
    """Return the sum of what each promotion since changed, worked out the slow way."""
    moves = range(target + 1, 3)
    served = [home.reference(target, [id], live=k)[0] for k in (target, *moves)]
    return float(sum(np.linalg.norm(b - a) for a, b in pairwise(served)))


@pytest.mark.parametrize("format", Format)
@pytest.mark.parametrize("target", [0, 1, 2])
def test_header_states_the_bound_in_every_format(
    home: Home, client: TestClient, format: Format, target: int
) -> None:
    asked: dict[str, str | int] = {"version": target, "drift": "true"}
    response = client.get("/embeddings/item 3", params=asked, headers={"Accept": format})
    assert response.status_code == 200
    bound = float(response.headers["Backcast-Drift-Bound"])
    assert bound == pytest.approx(exact(home, "item 3", target), rel=1e-5)
    if format is Format.JSON:
        assert response.json()["drift_bound"] == pytest.approx(bound, rel=1e-6)
    if format is Format.ARROW:
        with pa.ipc.open_stream(response.content) as stream:
            assert stream.read_all()["drift_bound"].to_pylist() == pytest.approx([bound], rel=1e-6)


def test_nothing_is_stated_that_was_not_asked_for(client: TestClient) -> None:
    response = client.get("/embeddings/item 3", params={"version": 0})
    assert "Backcast-Drift-Bound" not in response.headers
    assert "drift_bound" not in response.json()
    assert (
        response.headers["ETag"]
        != (client.get("/embeddings/item 3", params={"version": 0, "drift": "1"}).headers["ETag"])
    )
    many = client.post("/embeddings/batch", json={"ids": ["item 3"], "version": 0}).json()
    assert "drift_bound" not in many["embeddings"][0]


def test_vector_that_was_never_stored_has_no_bound(client: TestClient) -> None:
    response = client.get("/embeddings/new", params={"version": 0, "drift": "true"})
    assert response.headers["Backcast-Drift-Bound"] == "unknown"
    assert response.json()["drift_bound"] is None


def test_put_vector_is_bounded_by_how_far_it_was_put(home: Home, client: TestClient) -> None:
    asked: dict[str, str | int] = {"version": 1, "drift": "true"}
    bound = client.get("/embeddings/item 1", params=asked).json()["drift_bound"]
    served = np.array(client.get("/embeddings/item 1", params={"version": 1}).json()["embedding"])
    before = home.reference(1, ["item 1"], live=2)[0]
    further = np.linalg.norm(served - before)
    assert bound == pytest.approx(exact(home, "item 1", 1) + further, rel=1e-4)


def test_batch_states_them_row_by_row(home: Home, client: TestClient) -> None:
    ids = ["item 3", "nobody", "new", "item 2", "item 3"]
    wanted = [exact(home, id, 0) if id.startswith("item") else None for id in ids]
    body = {"ids": ids, "version": 0, "drift": True}
    rows = client.post("/embeddings/batch", json=body).json()["embeddings"]
    found = [row["drift_bound"] for row in rows]
    assert [bound is None for bound in found] == [bound is None for bound in wanted]
    assert [b for b in found if b] == pytest.approx([b for b in wanted if b], rel=1e-5)
    response = client.post(
        "/embeddings/batch",
        params={"version": 0, "drift": "true"},
        content=arrow_ids(pa.array(ids)),
        headers={"Accept": Format.ARROW, "Content-Type": Format.ARROW},
    )
    with pa.ipc.open_stream(response.content) as stream:
        column = stream.read_all()["drift_bound"]
    assert column.type == pa.float32()
    assert column.to_pylist() == [None if b is None else np.float32(b) for b in found]


def test_raw_batch_has_no_place_for_them(client: TestClient) -> None:
    body = {"ids": ["item 3"], "version": 0, "drift": True}
    response = client.post("/embeddings/batch", json=body, headers={"Accept": Format.RAW})
    assert response.status_code == 422
    assert response.json()["detail"] == (
        "A batch in application/octet-stream has no place for drift bounds; "
        "accept application/json or application/vnd.apache.arrow.stream."
    )


def test_version_states_how_they_are_spread(home: Home, client: TestClient) -> None:
    drift = client.get("/versions/0").json()["drift"]
    bounds = [exact(home, id, 0) for id in home.ids(version=2)]
    assert (drift["item"]["known"], drift["item"]["unknown"]) == (12, 0)
    assert drift["item"]["mean"] == pytest.approx(np.mean(bounds), rel=1e-5)
    assert drift["item"]["max"] == pytest.approx(max(bounds), rel=1e-5)
    assert set(drift) == {"item", "user"}
    assert client.get("/versions/2").json()["drift"] is None


def test_lost_bounds_are_unknown_and_vectors_go_on(tmp_path: Path) -> None:
    with build_home(tmp_path, live=1) as home:
        (name,) = set(home.backcast.store.snapshots()) - set(home.held())
        home.backcast.store.drop(name)
        snapshot = engine_of(home).current()
        answer = snapshot.with_drift(Entity.ITEM, ["item 0"], 0)
        assert answer.found.all()
        assert answer.drift is not None
        assert np.isnan(answer.drift).all()


def test_deployment_shows_its_diff_and_the_plan_the_same(home: Home, client: TestClient) -> None:
    detail = client.get("/admin/deployments/3").json()
    assert (detail["version"], detail["from_version"]) == (2, 1)
    assert [found["version"] for found in detail["diff"]["versions"]] == [1, 0]
    change = detail["diff"]["versions"][0]["entities"]["item"]
    moved = [
        np.linalg.norm(home.reference(1, [id], live=2) - home.reference(1, [id], live=1))
        for id in home.ids(version=2)
    ]
    assert change["absolute"]["mean"] == pytest.approx(np.mean(moved), rel=1e-5)
    assert detail["gates"]["change-0"]["passed"] is True
    assert client.get("/admin/deployments/1").json()["diff"] is None
    missing = client.get("/admin/deployments/99")
    assert missing.status_code == 404
    assert missing.json()["type"] == "urn:backcast:problem:unknown-deployment"
    home.publish(2, seed=9)
    plan = client.post("/admin/versions/2/promote", json={"dry_run": True}).json()
    assert [found["version"] for found in plan["diff"]["versions"]] == [2, 1, 0]
    assert {gate["name"] for gate in plan["gates"]} >= {"finite", "coverage-item", "change-2"}
