"""What ``/metrics`` says of one worker."""

import itertools
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from backcast.versions import Entity
from service.metrics.families import FAMILIES, Kind
from service.routes import embeddings
from service.wire import Format
from tests.metrics_support import Samples, labels_of, samples_of, value
from tests.service_support import bearer, client_of, secret_of
from tests.support import Home, build_home

ONE, BATCH = "/embeddings/{id}", "/embeddings/batch"
REQUESTS, SECONDS = "backcast_requests_total", "backcast_request_seconds"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with build_home(tmp_path, live=1) as built:
        yield built


@pytest.fixture
def client(home: Home) -> Iterator[TestClient]:
    with client_of(home) as opened:
        yield opened


def scraped(client: TestClient) -> Samples:
    return samples_of(client.get("/metrics").text)


def test_anybody_may_look(client: TestClient) -> None:
    del client.headers["Authorization"]
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text",
        'text/plain;version=9!9, Application/OpenMetrics-Text ; Version="1.0.0"',
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;q=0.2",
    ],
)
def test_openmetrics_is_spoken_to_who_asks_for_it(client: TestClient, accept: str) -> None:
    response = client.get("/metrics", headers={"Accept": accept})
    openmetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8"
    assert response.headers["content-type"] == openmetrics
    assert response.text.endswith("# EOF\n")


@pytest.mark.parametrize(
    "accept",
    [
        "",
        "*/*",
        "application/openmetrics-text;version=abc",
        "application/openmetrics-text;version=1.0.1",
        "application/openmetrics-text;version=2.0.0;escaping=dots",
        "application/openmetrics-text;version=" + "1" * 5000,
        "application/openmetrics-text;version",
        "text/plain;version=9!9",
        "text/plain;version=1.0.0;escaping=values",
    ],
)
def test_all_others_get_the_text_format(client: TestClient, accept: str) -> None:
    response = client.get("/metrics", headers={"Accept": accept})
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert value(samples_of(response.text), "backcast_workers") == 1


def test_every_family_is_exposed_with_its_type_and_meaning(client: TestClient) -> None:
    text = client.get("/metrics").text
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    shown = {Kind.AGE: Kind.GAUGE}
    assert types == {name: shown.get(f.kind, f.kind) for name, f in FAMILIES.items()}
    for name, family in FAMILIES.items():
        assert f"# HELP {name} {family.meaning}" in text


@pytest.mark.parametrize("format", Format)
@pytest.mark.parametrize("version", [0, 1])
def test_answers_are_counted_by_version_and_format(
    home: Home, client: TestClient, format: Format, version: int
) -> None:
    ids, name = home.ids(version=1)[:3], format.name.lower()
    accept, labels = {"Accept": format}, {"version": str(version), "format": name}
    one = client.get(f"/embeddings/{ids[0]}?version={version}", headers=accept)
    body = {"ids": [*ids, "nobody"], "version": version}
    many = client.post(BATCH, json=body, headers=accept)
    again = client.get(one.request.url, headers={**accept, "If-None-Match": one.headers["etag"]})
    assert (one.status_code, many.status_code, again.status_code) == (200, 200, 304)

    samples = scraped(client)
    assert value(samples, REQUESTS, route=ONE, method="GET", status="200", **labels) == 1
    assert value(samples, REQUESTS, route=ONE, method="GET", status="304", **labels) == 1
    assert value(samples, REQUESTS, route=BATCH, method="POST", status="200", **labels) == 1
    assert value(samples, "backcast_vectors_total", **labels) == 1 + len(ids)
    sent = len(one.content) + len(many.content)
    assert value(samples, "backcast_response_bytes_total", **labels) == sent
    assert value(samples, f"{SECONDS}_count", route=ONE, **labels) == 2
    assert value(samples, f"{SECONDS}_bucket", route=BATCH, le="+Inf", **labels) == 1


@pytest.mark.parametrize("ahead", [True, False], ids=["at once", "the long way"])
def test_parts_of_answers_are_timed(home: Home, client: TestClient, ahead: bool) -> None:
    headers = {} if ahead else {"Backcast-Expect-Snapshot": snapshot_of(client)}
    for version in (0, 1, 1):
        client.get(f"/embeddings/{home.ids(version=1)[0]}?version={version}", headers=headers)
    samples = scraped(client)
    for stage, times in (("gather", 3), ("product", 1), ("encode", 3)):
        assert value(samples, "backcast_stage_seconds_count", route=ONE, stage=stage) == times
        assert value(samples, "backcast_stage_seconds_sum", route=ONE, stage=stage) > 0
    assert value(samples, f"{REQUESTS}", route=ONE) == 3


def test_a_long_json_answer_is_timed_and_weighed_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(embeddings, "perf_counter", lambda: float(next(ticks)))
    with build_home(tmp_path, dims=(512,), items=200, live=0) as home, client_of(home) as client:
        many = client.post(BATCH, json={"ids": home.ids(version=0), "version": 0})
        assert "content-length" not in many.headers  # it came in pieces
        samples = scraped(client)
    assert value(samples, "backcast_response_bytes_total") == len(many.content)
    assert value(samples, "backcast_stage_seconds_count", route=BATCH, stage="encode") == 1
    # A second for the beginning, for each of nine pieces and for the end of them.
    assert value(samples, "backcast_stage_seconds_sum", route=BATCH, stage="encode") == 11


def test_refusals_are_counted_by_route_status_and_code(client: TestClient) -> None:
    client.get("/embeddings/nobody?version=1")
    client.get("/embeddings/nobody?version=9")
    client.get("/embeddings/nobody")
    client.post(BATCH, json={"ids": "none", "version": 0})
    client.post("/versions")
    client.get("/nowhere")
    del client.headers["Authorization"]
    client.get("/admin/deployments")
    samples = scraped(client)
    for route, status, times in (
        *((ONE, 404, 2), (ONE, 422, 1), (BATCH, 422, 1)),
        *(("/versions", 405, 1), ("none", 404, 1), ("/admin/deployments", 401, 1)),
    ):
        found = value(samples, REQUESTS, route=route, status=str(status), version="none")
        assert found == times, (route, status)
    for code, times in (
        *(("unknown-id", 1), ("unknown-version", 1), ("version-required", 1)),
        *(("invalid-input", 1), ("method-not-allowed", 1), ("not-found", 1), ("unauthorized", 1)),
    ):
        assert value(samples, "backcast_problems_total", code=code) == times, code


def test_unforeseen_errors_are_counted_on_the_short_way_too(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("odd")

    monkeypatch.setattr(embeddings, "encode_one", fail)
    for _ in range(2):  # the first goes the long way, as its key was never seen
        with pytest.raises(RuntimeError, match="odd"):
            client.get("/embeddings/item 5?version=1")
    assert value(scraped(client), REQUESTS, route=ONE, status="500") == 2


def test_labels_are_bounded_whatever_is_asked_for(client: TestClient) -> None:
    for n in range(300):
        client.get(f"/embeddings/strange-{n}?version={n}", headers=bearer(f"bc_{n:08x}_x"))
        client.get(f"/embeddings/strange-{n}?version={n}")
        client.get(f"/strange-{n}/path")
        client.request(f"STRANGE{n}", f"/versions/{n}", headers={"Accept": f"strange/{n}"})
        client.get(f"/versions/{n}?entity=strange-{n}", headers={"User-Agent": f"strange-{n}"})
    text = client.get("/metrics").text
    samples = samples_of(text)
    assert labels_of(samples, REQUESTS, "route") == {ONE, "/versions/{j}", "none"}
    assert labels_of(samples, REQUESTS, "method") == {"GET", "other"}
    assert labels_of(samples, REQUESTS, "version") == {"none"}
    assert "strange" not in text.lower()
    assert len(samples) < 500


def test_neither_ids_nor_keys_nor_consumers_are_shown(home: Home, client: TestClient) -> None:
    secret = secret_of(home)
    (consumer,) = {key.consumer for key in home.backcast.registry.keys.all()} - {"consumer 0"}
    ids = home.ids(Entity.USER, version=1)
    for id in ids[:5]:
        client.get(f"/embeddings/{id}?version=1&entity=user", headers=bearer(secret))
    text = client.get("/metrics").text
    for hidden in (*ids[:5], secret, secret.split("_")[1], consumer):
        assert hidden not in text


def test_what_is_live_is_shown_with_its_age(home: Home, client: TestClient) -> None:
    live = home.backcast.registry.deployments.live()
    assert live is not None
    published = home.backcast.registry.snapshots.get(live.snapshot).created_at
    samples = scraped(client)
    assert value(samples, "backcast_serving") == 1
    assert value(samples, "backcast_workers") == 1
    assert value(samples, "backcast_live_version") == live.version
    assert value(samples, "backcast_live_generation") == live.generation
    assert value(samples, "backcast_live_delta") == 0
    assert value(samples, "backcast_snapshot_info", snapshot=live.snapshot, version="1") == 1
    age = (datetime.now(UTC) - published).total_seconds()
    assert 0 <= age - value(samples, "backcast_snapshot_age_seconds") < 10
    assert 0 <= value(samples, "backcast_registry_age_seconds") < 60


def test_nothing_live_is_shown_as_such(tmp_path: Path) -> None:
    with build_home(tmp_path) as home, client_of(home) as client:
        samples = scraped(client)
    assert value(samples, "backcast_serving") == 0
    assert not labels_of(samples, "backcast_snapshot_info", "snapshot")


def test_drift_bounds_are_those_of_the_registry(home: Home) -> None:
    home.promote(2, force=True, reason="to move them")
    live = home.backcast.registry.deployments.live()
    assert live is not None
    drift = home.backcast.registry.drifts.of(live.snapshot)
    assert drift is not None
    with client_of(home) as client:
        samples = scraped(client)
    assert labels_of(samples, "backcast_drift_bound", "version") == set(drift.figures)
    for version, entity in ((v, e) for v in drift.figures for e in drift.figures[v]):
        spread, labels = drift.figures[version][entity], {"version": version, "entity": entity}
        found = [
            value(samples, "backcast_drift_bound", quantile=quantile, **labels)
            for quantile in ("0.5", "0.95", "0.99", "1")
        ]
        np.testing.assert_allclose(found, [spread[name] for name in ("p50", "p95", "p99", "max")])
        unknown = value(samples, "backcast_drift_unknown_vectors", **labels)
        assert unknown == spread["unknown"]


def test_an_operation_is_counted_when_it_has_ended(client: TestClient) -> None:
    body = {"expected_live": 1, "force": True, "reason": "to count it"}
    place = client.post("/admin/versions/2/promote", json=body).headers["Location"]
    deadline = time.monotonic() + 60
    while value(scraped(client), "backcast_operations_total") == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert client.get(place).json()["state"] == "succeeded"
    samples = scraped(client)
    assert value(samples, "backcast_operations_total", kind="promote", outcome="succeeded") == 1
    assert value(samples, "backcast_live_version") == 2


def test_a_store_that_fails_is_counted(home: Home) -> None:
    with client_of(home) as client:
        home.backcast.store.drop(snapshot_of(client).partition(".")[0])
        assert client.get("/readyz").status_code == 503
        samples = scraped(client)
    assert value(samples, "backcast_store_errors_total", code="snapshot-not-loaded") >= 1


def snapshot_of(client: TestClient) -> str:
    name: str = client.get("/readyz").json()["snapshot"]
    return name
