"""Versions over HTTP: which exist, and which can be asked for."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from backcast.versions import VersionState
from tests.service_support import client_of, gain, set_version
from tests.support import Home, build_home


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """Versions 0 and 2 are on the chain of 2, which is live; 1 is a sibling, 3 is to come."""
    folder = tmp_path_factory.mktemp("home")
    with build_home(folder, dims=(4, 5, 6, 7), parents=(None, 0, 0, 2), live=2) as built:
        yield built


@pytest.fixture(scope="module")
def client(home: Home) -> Iterator[TestClient]:
    with client_of(home) as opened:
        yield opened


def test_every_version_is_listed(home: Home, client: TestClient) -> None:
    document = client.get("/versions").json()
    live = home.backcast.registry.deployments.live()
    assert live is not None
    assert document["live_version"] == 2
    assert document["snapshot"] == f"{live.snapshot}.0"
    assert document["servable_versions"] == [0, 2]
    facts = ("number", "state", "dim", "parent", "servable")
    assert [tuple(version[fact] for fact in facts) for version in document["versions"]] == [
        (0, "superseded", 4, None, True),
        (1, "registered", 5, 0, False),
        (2, "live", 6, 0, True),
        (3, "registered", 7, 2, False),
    ]


def test_one_version_says_how_it_is_reached(home: Home, client: TestClient) -> None:
    document = client.get("/versions/0").json()
    weight, _ = home.maps[2, 0, False]
    assert document["lineage"] == [0]
    assert document["gain"] == pytest.approx(gain(home, 0, 2), rel=1e-6)
    assert document["condition"] == pytest.approx(np.linalg.cond(weight), rel=1e-4)
    assert "drift_bound" not in document


def test_live_version_is_reached_as_it_is(client: TestClient) -> None:
    document = client.get("/versions/2").json()
    assert (document["lineage"], document["gain"], document["condition"]) == ([2, 0], 1.0, 1.0)


@pytest.mark.parametrize(("version", "lineage"), [(1, [1, 0]), (3, [3, 2, 0])])
def test_version_that_is_not_servable_has_a_lineage_only(
    client: TestClient, version: int, lineage: list[int]
) -> None:
    document = client.get(f"/versions/{version}").json()
    assert (document["lineage"], document["gain"], document["condition"]) == (lineage, None, None)


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/versions/9", 404, "unknown-version"),
        ("/versions/-1", 422, "invalid-input"),
        ("/versions/latest", 422, "invalid-input"),
    ],
)
def test_versions_that_are_none(client: TestClient, path: str, status: int, code: str) -> None:
    response = client.get(path)
    assert response.status_code == status
    assert response.json()["type"] == f"urn:backcast:problem:{code}"


def test_map_without_an_inverse_has_no_condition_number(tmp_path: Path) -> None:
    with build_home(tmp_path, dims=(4, 1, 4), live=2) as home, client_of(home) as client:
        document = client.get("/versions/0").json()
        assert document["gain"] == pytest.approx(gain(home, 0, 2), rel=1e-6)
        assert document["condition"] is None or document["condition"] > 1e6


def test_records_show_what_they_hold(tmp_path: Path) -> None:
    with build_home(tmp_path, live=1) as home:
        moment = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
        set_version(home, 0, state=VersionState.RETIRED, retired_at=moment, sunset_at=moment)
        set_version(home, 1, deprecated_at=moment, details={"metrics": {"recall_at_50": 0.25}})
        with client_of(home) as client:
            retired, deprecated, _ = client.get("/versions").json()["versions"]
        assert (retired["state"], retired["servable"]) == ("retired", False)
        assert retired["retired_at"] == retired["sunset_at"] == "2026-11-20T12:00:00Z"
        assert deprecated["deprecated_at"] == "2026-11-20T12:00:00Z"
        assert deprecated["metrics"] == {"recall_at_50": 0.25}


def test_versions_are_listed_before_anything_is_live(tmp_path: Path) -> None:
    with build_home(tmp_path) as home, client_of(home) as client:
        document = client.get("/versions").json()
        assert (document["live_version"], document["snapshot"]) == (None, None)
        assert document["servable_versions"] == []
        assert [version["number"] for version in document["versions"]] == [0, 1, 2]
        assert client.get("/versions/1").json()["lineage"] == [1, 0]
        assert client.get("/versions/9").status_code == 404


@pytest.mark.parametrize(
    "path", ["/versions/{}", "/embeddings/i1?version={}", "/admin/versions/{}/promote"]
)
def test_number_that_no_database_holds_is_refused(client: TestClient, path: str) -> None:
    beyond = 10**20
    if path.startswith("/admin"):
        answer = client.post(path.format(beyond), json={"expected_live": None})
    else:
        answer = client.get(path.format(beyond))
    assert (answer.status_code, answer.json()["type"]) == (
        422,
        "urn:backcast:problem:invalid-input",
    )
