"""Liveness looks at nothing, readiness at what is served."""

from pathlib import Path

from starlette.testclient import TestClient

from tests.service_support import client_of
from tests.support import Home, build_home


def without_key(client: TestClient) -> TestClient:
    del client.headers["Authorization"]
    return client


def test_alive_and_ready(tmp_path: Path) -> None:
    with build_home(tmp_path, live=1) as home, client_of(home) as client:
        live = home.backcast.registry.deployments.live()
        assert live is not None
        assert without_key(client).get("/livez").json() == {"status": "ok"}
        assert client.get("/readyz").json() == {
            "live_version": 1,
            "snapshot": f"{live.snapshot}.0",
        }


def test_alive_but_not_ready(tmp_path: Path) -> None:
    with build_home(tmp_path) as home, client_of(home) as client:
        assert without_key(client).get("/livez").status_code == 200
        response = client.get("/readyz")
        assert (response.status_code, response.json()["type"]) == (
            503,
            "urn:backcast:problem:not-ready",
        )


def test_what_is_live_and_cannot_be_loaded_leaves_it_alive(tmp_path: Path) -> None:
    with build_home(tmp_path, live=1) as home:
        spoil_map(home, 1)
        with client_of(home) as client:
            assert client.get("/livez").status_code == 200
            assert client.get("/readyz").status_code == 503


def spoil_map(home: Home, version: int) -> None:
    folder = home.backcast.registry.versions.get(version).folder
    path = Path(home.settings.artifacts_root) / folder / "transform.safetensors"
    path.write_bytes(b"not it")
