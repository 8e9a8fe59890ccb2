"""Alert rules and dashboard in a real Prometheus, which scrapes a real replica."""

import json
import math
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import httpx2
import pytest

from backcast.versions import Scope
from benchmarks.soak_replicas import Replica, replica_environment
from tests.e2e.documents import ROOT
from tests.e2e.stack import status_of, wait
from tests.servers import free_port, unpacked_program
from tests.service_support import bearer, secret_of
from tests.support import Home, build_home

DEPLOY = ROOT / "deploy" / "prometheus"
DASHBOARD = json.loads((ROOT / "deploy/grafana/backcast.json").read_text())
EMPTY = {"Operations A": "none is under way any more"}
"""Queries that find nothing where all is well, and why; a counter that never moved is 0."""

QUERIES = {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel.get("targets", [])
}
STOP_S = 20


@pytest.fixture(scope="module")
def unpacked(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.cache.mkdir("unpacked"))


@pytest.fixture(scope="module")
def promtool(unpacked: Path) -> Path:
    return unpacked_program("promtool", "prometheus", unpacked)


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus that has scraped a replica a few times."""

    url: str
    replica: str

    def get(self, path: str, **parameters: str) -> Any:
        answer = httpx2.get(f"{self.url}/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def value(self, expr: str) -> list[float]:
        """Return the values that a query of the dashboard has now, with everything chosen."""
        for variable, chosen in (("job", ".+"), ("instance", ".+"), ("__rate_interval", "10m")):
            expr = expr.replace(f"${variable}", chosen)
        return [float(found["value"][1]) for found in self.get("query", query=expr)["result"]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with build_home(tmp_path_factory.mktemp("home"), live=0) as built:
        yield built


@pytest.fixture(scope="module")
def replica(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    environ = {**replica_environment(home.settings), "BACKCAST_REQUESTS_PER_SECOND": "20"}
    replica = Replica(1, environ, tmp_path_factory.mktemp("replica"))
    replica.start()
    try:
        replica.wait(Event())
        yield replica
    finally:
        replica.stop()


@pytest.fixture(scope="module")
def prometheus(
    home: Home, replica: Replica, unpacked: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    program, secret = (
        unpacked_program("prometheus", "prometheus", unpacked),
        secret_of(home, Scope.ADMIN),
    )
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    target = replica.url.removeprefix("http://")
    config = (DEPLOY / "prometheus.yml").read_text().replace("15s", "500ms")
    (folder / "prometheus.yml").write_text(config.replace("service-1:8000, service-2:8000", target))
    (folder / "alerts.yml").write_text((DEPLOY / "alerts.yml").read_text())
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [
                program,
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
            text=True,
        )
    try:
        found = Prometheus(f"http://127.0.0.1:{port}", target)
        wait(lambda: status_of(f"{found.url}/-/ready") == 200, process)
        scrapes = "sum(count_over_time(backcast_build_info[10m])) or vector(0)"
        with httpx2.Client(base_url=replica.url, headers=bearer(secret), timeout=30) as client:
            _promote(client)
            for _ in range(2):  # a rate is the difference of two scrapes
                _ask(client, home)
                before = found.value(scrapes)
                wait(lambda: found.value(scrapes) > [before[0] + 1])  # noqa: B023
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_S)


def _promote(client: httpx2.Client) -> None:
    begun = client.post("/admin/versions/1/promote", json={"expected_live": 0})
    assert begun.status_code == 202
    where = f"/admin/operations/{begun.json()['id']}"
    wait(lambda: client.get(where).json()["state"] == "succeeded")
    wait(lambda: client.get("/readyz").json()["live_version"] == 1)


def _ask(client: httpx2.Client, home: Home) -> None:
    """Ask for vectors in every way, for one that is not there, and too often."""
    for version in (0, 1):
        for media in ("application/json", "application/octet-stream"):
            accept = {"Accept": media}
            client.get("/embeddings/item 1", params={"version": version}, headers=accept)
            ids = {"ids": home.ids(version=1), "version": version}
            client.post("/embeddings/batch", json=ids, headers=accept)
    absent = [client.get("/embeddings/nobody", params={"version": 1}) for _ in range(60)]
    assert {answer.status_code for answer in absent} == {404, 429}
    time.sleep(1)  # the window in which so much was asked


@pytest.mark.parametrize(
    "check",
    ["check config prometheus.yml", "check rules alerts.yml", "test rules alerts_test.yml"],
)
def test_promtool_passes(promtool: Path, check: str) -> None:
    done = subprocess.run(
        [promtool, *check.split()], cwd=DEPLOY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_prometheus_scrapes_the_replica_and_evaluates_every_rule(prometheus: Prometheus) -> None:
    (target,) = prometheus.get("targets")["activeTargets"]
    assert (target["labels"]["instance"], target["health"]) == (prometheus.replica, "up")
    (group,) = prometheus.get("rules")["groups"]
    names = [rule["name"] for rule in group["rules"]]
    assert len(names) == (DEPLOY / "alerts.yml").read_text().count("- alert:")
    wait(lambda: {r["health"] for r in prometheus.get("rules")["groups"][0]["rules"]} == {"ok"})


@pytest.mark.parametrize("name", QUERIES)
def test_panel_shows_something(prometheus: Prometheus, name: str) -> None:
    found = prometheus.value(QUERIES[name])
    assert bool(found) is (name not in EMPTY), found
    assert not any(map(math.isnan, found)), found


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Replicas that serve A", [1]),
        ("Workers A", [1]),
        ("Live version A", [1]),
        ("Errors A", [0]),
        ("Releases A", [1]),
        ("Deployment served A", [2]),
    ],
)
def test_panel_shows_what_is_so(prometheus: Prometheus, name: str, shown: list[float]) -> None:
    assert prometheus.value(QUERIES[name]) == shown


def test_dashboard_finds_its_choices(prometheus: Prometheus) -> None:
    (labels,) = prometheus.get("series", **{"match[]": "backcast_build_info"})
    assert (labels["job"], labels["instance"]) == ("backcast", prometheus.replica)
