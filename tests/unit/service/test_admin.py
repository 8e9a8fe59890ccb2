"""What administrators do over HTTP, and who is no administrator."""

import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
from starlette.testclient import TestClient
from starlette.types import Message

from backcast.errors import StoreError
from backcast.lifecycle import (
    Backcast,
    open_backcast,
    plan_promotion,
    publish,
    sweep,
    upsert,
)
from backcast.registry import OperationDraft
from backcast.settings import Settings
from backcast.stores import StoredSnapshot
from backcast.vectors import VectorBatch
from backcast.versions import Claim, Entity, Scope, VersionState
from service.openapi import render
from tests.service_support import WatchedStore, bearer, client_of, secret_of, set_version
from tests.support import Home, build_home


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """Versions 0, 1 and 2, of which 1 is live; 3 is a sibling of 2, 4 has no snapshot."""
    parents = (None, 0, 1, 0)
    with build_home(tmp_path, dims=(4, 5, 6, 7), parents=parents, live=1) as built:
        built.register(8, parent=2)
        yield built


@pytest.fixture
def client(home: Home) -> Iterator[TestClient]:
    with client_of(home) as opened:
        yield opened


def promote(client: TestClient, version: int, **order: Any) -> Any:
    return client.post(f"/admin/versions/{version}/promote", json=order)


def finished(client: TestClient, response: Any) -> dict[str, Any]:
    """Follow the operation that a response tells of until it has ended."""
    assert response.status_code == 202, response.text
    assert response.headers["Location"] == f"/admin/operations/{response.json()['id']}"
    deadline = time.monotonic() + 30
    while True:
        operation: dict[str, Any] = client.get(response.headers["Location"]).json()
        if operation["state"] in {"succeeded", "failed"}:
            assert operation["finished_at"] is not None
            return operation
        assert time.monotonic() < deadline
        time.sleep(0.01)


def code_of(response: Any) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/problem+json"
    return response.status_code, response.json()["type"].removeprefix("urn:backcast:problem:")


def test_promotion_is_an_operation(home: Home, client: TestClient) -> None:
    operation = finished(client, promote(client, 2, expected_live=1, reason="better"))
    live = home.backcast.registry.deployments.live()
    assert live is not None
    assert live.version == 2
    assert (operation["kind"], operation["state"], operation["progress"]) == (
        "promote",
        "succeeded",
        1.0,
    )
    assert operation["request"] == {
        "version": 2,
        "expected_live": 1,
        "force": False,
        "reason": "better",
    }
    assert operation["result"] == {
        "live_version": 2,
        "snapshot": f"{live.snapshot}.0",
        "stored": {"precision": "float32", "mean_error": 0.0, "largest_error": 0.0},
    }
    assert operation["error"] is None
    assert operation["actor"] == "consumer 0"
    # This replica serves it from the moment that the operation has succeeded.
    assert client.get("/readyz").json()["live_version"] == 2
    latest = client.get("/admin/deployments").json()["deployments"][0]
    assert (latest["version"], latest["from_version"], latest["kind"]) == (2, 1, "promote")
    assert (latest["operation"], latest["actor"]) == (operation["id"], "consumer 0")
    assert (latest["forced"], latest["reason"]) == (False, "better")
    assert set(latest["gates"]) >= {"lineage", "maps", "snapshot"}


def test_promotion_tells_what_reduced_precision_cost(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    with client_of(home, store_precision="float16") as client, caplog.at_level(logging.INFO):
        operation = finished(client, promote(client, 2, expected_live=1))
    stored = operation["result"]["stored"]
    assert stored["precision"] == "float16"
    assert 0 < stored["mean_error"] <= stored["largest_error"] < 2**-11
    assert re.search(r"version 2 is live, .* stored as float16, relative error \d", caplog.text)


def test_vector_too_large_for_the_precision_fails_the_promotion(home: Home) -> None:
    vectors = np.full((1, 6), 1e5, np.float32)
    backcast = home.backcast
    batch = VectorBatch(Entity.ITEM, ["large one"], vectors)
    publish(backcast.registry, backcast.artifacts, 2, [batch], details={})
    with client_of(home, store_precision="float16") as client:
        operation = finished(client, promote(client, 2, expected_live=1))
        assert client.get("/readyz").json()["live_version"] == 1
    assert operation["error"]["code"] == "invalid-input"
    assert operation["error"]["message"] == (
        "item 'large one' holds 100000, too large for float16. "
        "Set BACKCAST_STORE_PRECISION=bfloat16."
    )


def test_history_is_newest_first(client: TestClient) -> None:
    deployments = client.get("/admin/deployments").json()["deployments"]
    assert [(d["generation"], d["version"], d["from_version"]) for d in deployments] == [
        (2, 1, 0),
        (1, 0, None),
    ]


def test_first_promotion_expects_nothing(tmp_path: Path) -> None:
    with build_home(tmp_path, dims=(4, 6)) as home, client_of(home) as client:
        assert code_of(promote(client, 0, expected_live=1)) == (409, "promotion-conflict")
        assert finished(client, promote(client, 0, expected_live=None))["state"] == "succeeded"
        response = promote(client, 1, expected_live=None)
        assert code_of(response) == (409, "promotion-conflict")
        assert response.json()["detail"] == "Nothing was expected to be live, version 0 is."
        assert (response.json()["expected_version"], response.json()["current_version"]) == (
            None,
            0,
        )


@pytest.mark.parametrize(
    ("version", "order", "refusal"),
    [
        (9, {"expected_live": 1}, (404, "unknown-version")),
        (2, {"expected_live": 0}, (409, "promotion-conflict")),
        (2, {"expected_live": None}, (409, "promotion-conflict")),
        (1, {"expected_live": 1}, (409, "promotion-conflict")),
        (4, {"expected_live": 1}, (409, "nothing-published")),
        (2, {}, (422, "invalid-input")),
        (2, {"expected_live": True}, (422, "invalid-input")),
        (2, {"expected_live": "1"}, (422, "invalid-input")),
        (2, {"expected_live": -1}, (422, "invalid-input")),
        (2, {"expected_live": 1, "force": True}, (422, "invalid-input")),
        (2, {"expected_live": 1, "force": True, "reason": ""}, (422, "invalid-input")),
        (2, {"expected_live": 1, "dryrun": True}, (422, "invalid-input")),
        (-1, {"expected_live": 1}, (422, "invalid-input")),
    ],
    ids=str,
)
def test_what_can_be_refused_at_once_is(
    home: Home,
    client: TestClient,
    version: int,
    order: dict[str, Any],
    refusal: tuple[int, str],
) -> None:
    before = home.backcast.registry.deployments.live()
    assert code_of(promote(client, version, **order)) == refusal
    assert home.backcast.registry.deployments.live() == before


def test_retired_version_is_refused_at_once(home: Home, client: TestClient) -> None:
    set_version(home, 0, state=VersionState.RETIRED)
    assert code_of(promote(client, 0, expected_live=1)) == (410, "version-retired")


def test_dry_run_answers_with_the_plan(home: Home, client: TestClient) -> None:
    before = home.backcast.registry.deployments.live()
    for order in ({"dry_run": True}, {"dry_run": True, "expected_live": 1}):
        response = promote(client, 2, **order)
        assert response.status_code == 200
        plan = response.json()
        assert (plan["version"], plan["live_version"], plan["passed"]) == (2, 1, True)
        assert plan["servable_versions"] == [0, 1, 2]
        assert {gate["name"] for gate in plan["gates"]} >= {"lineage", "maps", "snapshot"}
    refused = promote(client, 2, dry_run=True, expected_live=0)
    assert code_of(refused) == (409, "promotion-conflict")
    assert promote(client, 3, dry_run=True).json()["passed"] is False
    assert home.backcast.registry.deployments.live() == before


def test_gate_that_fails_fails_the_operation(client: TestClient) -> None:
    operation = finished(client, promote(client, 3, expected_live=1))
    assert operation["state"] == "failed"
    assert operation["result"] is None
    assert operation["error"]["code"] == "conflict"
    assert "lineage" in operation["error"]["message"]
    gates = {gate["name"]: gate["passed"] for gate in operation["error"]["gates"]}
    assert gates["lineage"] is False
    assert gates["maps"] is True
    assert client.get("/readyz").json()["live_version"] == 1


def test_forced_promotion_leaves_the_chain(client: TestClient) -> None:
    order = {"expected_live": 1, "force": True, "reason": "1 was trained on the wrong data"}
    assert finished(client, promote(client, 3, **order))["state"] == "succeeded"
    versions = client.get("/versions").json()
    assert (versions["live_version"], versions["servable_versions"]) == (3, [0, 3])
    assert versions["versions"][1]["state"] == "rolled_back"
    latest = client.get("/admin/deployments").json()["deployments"][0]
    assert (latest["forced"], latest["reason"]) == (True, order["reason"])


def test_dry_runs_wait_for_each_other_and_keep_nobody_else_waiting(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, most, opened = [0], [0], threading.Event()

    def counted(*arguments: Any, **options: Any) -> Any:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        try:
            assert opened.wait(30)
            return plan_promotion(*arguments, **options)
        finally:
            at_once[0] -= 1

    monkeypatch.setattr("service.routes.admin.plan_promotion", counted)
    with ThreadPoolExecutor(45) as pool:  # the service has forty threads for all that may block
        plans = [pool.submit(promote, client, 2, dry_run=True) for _ in range(45)]
        plans.append(
            pool.submit(
                client.post,
                "/admin/versions/1/refresh",
                json={"expected_live": 1, "dry_run": True},
            )
        )
        time.sleep(0.5)
        assert client.get("/admin/operations").status_code == 200
        opened.set()
        answers = [plan.result() for plan in plans]
    assert most == [1]
    assert [a.status_code for a in answers] == [200] * 45 + [409]  # nothing newer to refresh with
    assert all(a.json()["passed"] for a in answers[:45])


def test_unforeseen_error_fails_the_operation_and_is_logged(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(WatchedStore):
        def load(self, *_: object) -> None:
            raise RuntimeError("the password is hunter2")

    @contextmanager
    def open_broken(settings: Settings) -> Iterator[Backcast]:
        with open_backcast(settings) as backcast:
            yield replace(backcast, store=Broken(backcast.store, lambda _: None))

    monkeypatch.setattr("service.state.open_backcast", open_broken)
    with client_of(home) as client, caplog.at_level(logging.ERROR):
        operation = finished(client, promote(client, 2, expected_live=1))
    assert operation["state"] == "failed"
    assert operation["error"]["code"] == "service-error"
    assert "hunter2" not in str(operation)
    assert "hunter2" in caplog.text


def test_promotion_is_done_even_where_this_replica_cannot_follow_it(
    home: Home, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deployments = home.backcast.registry.deployments

    class HalfBlind(WatchedStore):
        def open(self, snapshot: str) -> StoredSnapshot:
            if len(deployments.history()) > 2:  # the promotion is done
                raise StoreError("the vector store does not answer")
            return super().open(snapshot)

    @contextmanager
    def open_half_blind(settings: Settings) -> Iterator[Backcast]:
        with open_backcast(settings) as backcast:
            yield replace(backcast, store=HalfBlind(backcast.store, lambda _: None))

    monkeypatch.setattr("service.state.open_backcast", open_half_blind)
    with client_of(home, poll_seconds=3600.0) as client:
        operation = finished(client, promote(client, 2, expected_live=1))
        assert operation["result"]["live_version"] == 2
        assert client.get("/versions").json()["live_version"] == 1
    assert "version 2 is live, not yet here: the vector store does not answer" in caplog.text


def test_superseded_snapshots_leave_the_store_when_their_grace_is_over(home: Home) -> None:
    with client_of(home, grace_seconds=0.0, poll_seconds=0.01) as client:
        operation = finished(client, promote(client, 2, expected_live=1))
        deadline = time.monotonic() + 30
        while [f"{id}.0" for id in home.held()] != [operation["result"]["snapshot"]]:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_replica_follows_and_sweeps_by_itself(home: Home) -> None:
    with client_of(home, grace_seconds=0.0, poll_seconds=0.01) as client:
        snapshot = home.promote(2)
        deadline = time.monotonic() + 30
        while client.get("/readyz").json()["live_version"] != 2 or home.held() != [snapshot]:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_replicas_that_sweep_at_once_do_not_disturb_each_other(home: Home) -> None:
    with ThreadPoolExecutor() as pool:
        for version in (2, 1, 2, 1):
            home.publish(version)
            snapshot = home.promote(version, force=True, reason="to and fro")
            sweeps = [pool.submit(sweep, home.backcast, timedelta(0)) for _ in range(4)]
            assert sorted(map(len, (done.result() for done in sweeps)))[-1] >= 1
            assert home.held() == [snapshot]


class TestIdempotencyKey:
    """A request sent again leads to the same operation, whatever has become of it."""

    def send(self, client: TestClient, key: str, **order: Any) -> Any:
        path = "/admin/versions/2/promote"
        return client.post(path, json=order, headers={"Idempotency-Key": key})

    def test_same_request_finds_its_operation(self, home: Home, client: TestClient) -> None:
        first = self.send(client, "morning-1", expected_live=1)
        done = finished(client, first)
        again = self.send(client, "morning-1", expected_live=1)
        assert (again.status_code, again.headers["Location"]) == (200, first.headers["Location"])
        assert again.json() == done
        assert len(home.backcast.registry.deployments.history()) == 3
        assert len(client.get("/admin/operations").json()["operations"]) == 1

    def test_another_request_is_refused(self, client: TestClient) -> None:
        done = finished(client, self.send(client, "morning-1", expected_live=1))
        other = self.send(client, "morning-1", expected_live=1, reason="another")
        assert code_of(other) == (422, "idempotency-key-reused")
        assert other.json()["operation"] == done["id"]

    def test_request_refused_at_once_leaves_its_key_free(self, client: TestClient) -> None:
        refused = self.send(client, "morning-1", expected_live=0)
        assert code_of(refused) == (409, "promotion-conflict")
        assert finished(client, self.send(client, "morning-1", expected_live=1))["state"] == (
            "succeeded"
        )

    @pytest.mark.parametrize("key", ["", "two words", "k" * 129])
    def test_keys_that_are_none(self, client: TestClient, key: str) -> None:
        assert code_of(self.send(client, key, expected_live=1)) == (422, "invalid-input")


def test_second_operation_is_refused_while_one_runs(home: Home, client: TestClient) -> None:
    draft = OperationDraft("promote", {"version": 2}, "ann", "host:1")
    running = home.backcast.registry.operations.start(draft)
    home.backcast.registry.operations.progress(Claim(running.id, "host:1"), "load", 0.4)
    for path, order in (
        ("/admin/versions/2/promote", {"expected_live": 1}),
        ("/admin/rollback", {"expected_live": 1, "reason": "worse"}),
    ):
        refused = client.post(path, json=order)
        assert code_of(refused) == (409, "operation-running")
        facts = ("operation", "kind", "step", "progress", "owner")
        assert [refused.json()[fact] for fact in facts] == [
            *(running.id, "promote", "load", 0.4, "host:1")
        ]
    shown = client.get(f"/admin/operations/{running.id}").json()
    assert (shown["owner"], shown["resumable"], shown["step"]) == ("host:1", False, "load")


class TestRollback:
    def test_rollback_is_an_operation(self, home: Home, client: TestClient) -> None:
        order = {"expected_live": 1, "reason": "clicks fell"}
        operation = finished(client, client.post("/admin/rollback", json=order))
        assert (operation["kind"], operation["state"]) == ("rollback", "succeeded")
        assert operation["request"] == {**order, "to_snapshot": None}
        assert operation["result"]["live_version"] == 0
        assert client.get("/readyz").json()["live_version"] == 0
        latest = client.get("/admin/deployments").json()["deployments"][0]
        assert (latest["kind"], latest["reason"], latest["operation"]) == (
            *("rollback", "clicks fell", operation["id"]),
        )
        refused = client.get("/embeddings/item 1?version=1")
        assert code_of(refused) == (409, "version-off-chain")
        assert refused.json()["reason"] == "clicks fell"

    def test_dry_run_answers_with_the_plan(self, home: Home, client: TestClient) -> None:
        before = home.backcast.registry.deployments.live()
        for order in ({"dry_run": True}, {"dry_run": True, "reason": "why not"}):
            plan = client.post("/admin/rollback", json={"expected_live": 1, **order}).json()
            assert (plan["live_version"], plan["version"], plan["loaded"]) == (1, 0, True)
            assert (plan["servable_versions"], plan["refused_versions"]) == ([0], [1])
            assert (plan["lost_ids"], plan["pinned_consumers"]) == ({}, [])
            assert 3000 < plan["grace_left_seconds"] <= 3600
        assert home.backcast.registry.deployments.live() == before

    @pytest.mark.parametrize(
        ("order", "refusal"),
        [
            ({"reason": "worse"}, (422, "invalid-input")),
            ({"expected_live": None, "reason": "worse"}, (422, "invalid-input")),
            ({"expected_live": 1}, (422, "invalid-input")),
            ({"expected_live": 1, "reason": ""}, (422, "invalid-input")),
            ({"expected_live": 1, "reason": " "}, (422, "invalid-input")),
            ({"expected_live": 1, "reason": "x", "to": 0}, (422, "invalid-input")),
            ({"expected_live": 0, "reason": "worse"}, (409, "promotion-conflict")),
            (
                {"expected_live": 1, "reason": "x", "to_snapshot": "v9-a"},
                (404, "unknown-snapshot"),
            ),
        ],
        ids=str,
    )
    def test_what_can_be_refused_at_once_is(
        self, client: TestClient, order: dict[str, Any], refusal: tuple[int, str]
    ) -> None:
        assert code_of(client.post("/admin/rollback", json=order)) == refusal
        assert client.get("/admin/operations").json()["operations"] == []


class TestRefresh:
    def test_compaction_takes_changes_into_a_new_snapshot(
        self, home: Home, client: TestClient
    ) -> None:
        path, order = "/admin/versions/1/refresh", {"expected_live": 1, "compact": True}
        nothing = client.post(path, json=order)
        assert code_of(nothing) == (409, "conflict")
        assert code_of(client.post(path, json={**order, "dry_run": True})) == (
            *(422, "invalid-input"),
        )
        before = home.backcast.registry.deployments.live()
        assert before is not None
        vectors = np.ones((1, 5), np.float32)
        upsert(home.backcast, Entity.ITEM, ["new"], vectors, actor="ann", most_changed=9)
        operation = finished(client, client.post(path, json={**order, "reason": "weekly"}))
        assert (operation["kind"], operation["error"]) == ("refresh", None)
        assert operation["request"] == {
            "version": 1,
            "expected_live": 1,
            "compact": True,
            "reason": "weekly",
        }
        live = home.backcast.registry.deployments.live()
        assert live is not None
        assert live.snapshot != before.snapshot
        assert (live.version, live.delta) == (1, 0)
        assert client.get("/embeddings/new?version=1").json()["embedding"] == [1.0] * 5

    def test_newest_snapshot_of_the_live_version_goes_live(
        self, home: Home, client: TestClient
    ) -> None:
        snapshot = home.publish(1)
        plan = client.post(
            "/admin/versions/1/refresh", json={"expected_live": 1, "dry_run": True}
        ).json()
        assert (plan["snapshot"], plan["passed"]) == (snapshot.id, True)
        response = client.post("/admin/versions/1/refresh", json={"expected_live": 1})
        operation = finished(client, response)
        assert (operation["kind"], operation["state"]) == ("refresh", "succeeded")
        assert operation["result"]["snapshot"] == f"{snapshot.id}.0"
        assert client.get("/readyz").json()["snapshot"] == f"{snapshot.id}.0"

    @pytest.mark.parametrize(
        ("version", "expected", "refusal"),
        [
            (1, 1, (409, "promotion-conflict")),  # no newer snapshot
            (2, 1, (409, "promotion-conflict")),  # not live
            (2, 2, (409, "promotion-conflict")),
            (9, 1, (404, "unknown-version")),
            (1, None, (422, "invalid-input")),
        ],
    )
    def test_what_can_be_refused_at_once_is(
        self, client: TestClient, version: int, expected: int | None, refusal: tuple[int, str]
    ) -> None:
        path = f"/admin/versions/{version}/refresh"
        assert code_of(client.post(path, json={"expected_live": expected})) == refusal


@pytest.mark.parametrize(
    ("path", "refusal"),
    [
        ("/admin/operations/0f", (404, "unknown-operation")),
        ("/admin/operations/%20", (422, "invalid-input")),
        ("/admin/operations/" + "0" * 65, (422, "invalid-input")),
    ],
)
def test_operations_that_are_none(client: TestClient, path: str, refusal: tuple[int, str]) -> None:
    assert code_of(client.get(path)) == refusal


@pytest.mark.parametrize(
    ("method", "path", "order"),
    [
        ("POST", "/admin/versions/9/promote", {"expected_live": 1}),
        ("PUT", "/admin/consumers/consumer%200", {"pin": 9}),
        ("POST", "/admin/keys", {"consumer": "x", "pin": 9}),
        ("POST", "/admin/versions/9/retire", {}),
    ],
)
def test_nothing_is_said_of_what_is_served_where_nobody_looked(
    client: TestClient, method: str, path: str, order: dict[str, Any]
) -> None:
    response = client.request(method, path, json=order)
    assert code_of(response) == (404, "unknown-version")
    assert response.json()["version"] == 9
    assert "servable_versions" not in response.json()


ADMINISTRATION = [
    (method.upper(), re.sub(r"\{[kj]\}", "2", path).replace("{id}", "0f").replace("{name}", "ads"))
    for path, methods in json.loads(render())["paths"].items()
    for method in methods
    if path.startswith("/admin")
]


def test_administration_is_known_here() -> None:
    assert {
        ("POST", "/admin/versions/2/promote"),
        ("POST", "/admin/versions/2/refresh"),
        ("POST", "/admin/rollback"),
        ("GET", "/admin/operations"),
        ("GET", "/admin/operations/0f"),
        ("PUT", "/admin/consumers/ads"),
    } <= set(ADMINISTRATION)


@pytest.mark.parametrize(("method", "path"), ADMINISTRATION)
@pytest.mark.parametrize("reads", ["keyed", "open"])
def test_administration_needs_an_admin_key(home: Home, method: str, path: str, reads: str) -> None:
    with client_of(home, reads=reads) as client:
        reader = bearer(secret_of(home, Scope.READ))
        response = client.request(method, path, headers=reader, json={})
        assert code_of(response) == (403, "forbidden")
        assert response.json()["required_scope"] == "admin"
        del client.headers["Authorization"]
        assert code_of(client.request(method, path, json={})) == (401, "unauthorized")


@pytest.mark.parametrize(("method", "path"), ADMINISTRATION)
def test_body_is_not_read_before_the_key(client: TestClient, method: str, path: str) -> None:
    async def send() -> list[int]:
        async def receive() -> Message:
            raise AssertionError("the body was read")

        started: list[int] = []

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                started.append(message["status"])

        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"content-length", b"9999")],
            "state": dict(client.app_state),
            "app": client.app,
        }
        await client.app(scope, receive, answer)
        return started

    assert anyio.run(send) == [401]
