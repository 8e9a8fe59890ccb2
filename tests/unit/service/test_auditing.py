"""Every act over HTTP is in the audit log: who, what, when, why, and what became of it."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fastapi.routing import APIRoute
from starlette.testclient import TestClient

from backcast.acts import ActRecord
from backcast.errors import RegistryError
from backcast.registry.audit import Audit
from backcast.settings import Settings
from backcast.versions import Scope, Version
from service import auditing
from service.administration import AdminRoute
from service.app import create_app
from service.auditing import ACTS
from service.routes import admin, changes, consumers, keys
from tests.service_support import bearer, client_of, secret_of
from tests.support import Home, build_home

ROUTES = [
    route
    for module in (admin, changes, consumers, keys)
    for route in module.router.routes
    if isinstance(route, APIRoute)
]


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with build_home(tmp_path, live=1) as built:
        yield built


@pytest.fixture
def client(home: Home) -> Iterator[TestClient]:
    with client_of(home) as opened:
        yield opened


def acts(home: Home) -> list[ActRecord]:
    return home.backcast.registry.audit.recent(100)


def test_every_route_that_acts_is_known() -> None:
    acting = {route.name for route in ROUTES if route.methods != {"GET"}}
    assert acting == set(ACTS)
    assert all(isinstance(route, AdminRoute) for route in ROUTES)
    every = create_app(Settings()).openapi()["paths"]
    documented = {
        operation["operationId"]
        for path, methods in every.items()
        for method, operation in methods.items()
        if path.startswith("/admin/") and method != "get"
    }
    assert documented == acting


def called(route: APIRoute) -> tuple[str, str]:
    """Return a method and a path that lead to a route."""
    [method] = route.methods or {"GET"}
    path = route.path.replace("{name:path}", "consumer 0").replace("{prefix}", "00000000")
    return method, path.replace("{k}", "1").replace("{j}", "1").replace("{id}", "0f")


TARGETS = {
    **{name: "version 1" for name in ACTS if name.endswith(("_version", "_deprecation"))},
    "cancel_operation": "operation 0f",
    "pin_consumer": "consumer consumer 0",
    "rotate_key": "key 00000000",
    "revoke_key": "key 00000000",
}


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_reader_who_tries_is_recorded_by_name(
    home: Home, client: TestClient, route: APIRoute
) -> None:
    secret = secret_of(home, Scope.READ)
    reader = home.backcast.registry.keys.all()[-1]
    method, path = called(route)
    response = client.request(method, path, headers=bearer(secret), json={"ids": ["ann"]})
    assert response.status_code == 403
    if route.methods == {"GET"}:
        assert acts(home) == []
        return
    [act] = acts(home)
    assert (act.actor, act.key) == (reader.consumer, reader.prefix)
    assert (act.act, act.target) == (ACTS[route.name], TARGETS.get(route.name))
    assert (act.outcome, act.code) == ("refused", "forbidden")


def test_reader_who_tries_again_and_again_is_recorded_once_a_minute(
    home: Home, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = [bearer(secret_of(home, Scope.READ)) for _ in range(2)]
    for _ in range(5):
        for headers in readers:
            for path in ("/admin/rollback", "/admin/keys"):
                assert client.post(path, headers=headers, json={}).status_code == 403
    assert len(acts(home)) == 4
    monkeypatch.setattr(auditing, "_FORBIDDEN_S", 0.0)
    client.post("/admin/rollback", headers=readers[0], json={})
    assert len(acts(home)) == 5


def test_reader_who_tries_many_times_at_once_is_recorded_once(
    home: Home, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers, refuse = bearer(secret_of(home, Scope.READ)), Audit.refuse

    def refuse_slowly(*arguments: Any) -> None:
        time.sleep(0.3)
        refuse(*arguments)

    def attempt(_: int) -> int:
        return client.post("/admin/rollback", headers=headers, json={}).status_code

    monkeypatch.setattr(Audit, "refuse", refuse_slowly)
    with ThreadPoolExecutor(8) as crowd:
        assert list(crowd.map(attempt, range(8))) == [403] * 8
    assert len(acts(home)) == 1


def test_reader_who_could_not_be_recorded_is_the_next_time(
    home: Home, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RegistryError("away")

    headers = bearer(secret_of(home, Scope.READ))
    with monkeypatch.context() as patch:
        patch.setattr(Audit, "refuse", fail)
        assert client.post("/admin/rollback", headers=headers, json={}).status_code == 503
    assert client.post("/admin/rollback", headers=headers, json={}).status_code == 403
    assert len(acts(home)) == 1


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
def test_stranger_leaves_no_trace(home: Home, client: TestClient, route: APIRoute) -> None:
    method, path = called(route)
    for headers in ({"Authorization": "Bearer bc_00000000_x"}, {"Authorization": "x"}):
        assert client.request(method, path, headers=headers, json={}).status_code == 401
    assert acts(home) == []


@pytest.mark.parametrize(
    "route", [route for route in ROUTES if route.methods != {"GET"}], ids=lambda route: route.name
)
def test_what_is_no_order_is_refused_and_recorded(
    home: Home, client: TestClient, route: APIRoute
) -> None:
    method, path = called(route)
    path = path.replace("versions/1/deprecate", "versions/x/deprecate")
    assert client.request(method, path, content=b"{").status_code == 422
    [act] = acts(home)
    assert (act.act, act.outcome, act.code) == (ACTS[route.name], "refused", "invalid-input")


def test_other_refusals_before_an_act_are_recorded(home: Home, client: TestClient) -> None:
    put, secret = "/admin/embeddings", "ann@example.org"
    vector = [1.0] * 6
    for content, media, status in (
        (b"x", "text/plain", 415),
        (b'{"ids": [], "vectors": []}', "application/json", 422),
    ):
        response = client.put(put, content=content, headers={"Content-Type": media})
        assert response.status_code == status
    wrong = {"ids": [secret], "vectors": [[*vector, 1.0]], "entity": "user"}
    assert client.put(put, json=wrong).status_code == 422
    assert [(act.act, act.outcome, act.code) for act in acts(home)] == [
        ("upsert", "refused", "dimension-mismatch"),
        ("upsert", "refused", "invalid-input"),
        ("upsert", "refused", "unsupported-media-type"),
    ]
    assert secret not in repr(acts(home))


def test_acts_and_their_outcomes(home: Home, client: TestClient) -> None:
    home.backcast.registry.keys.create("ads", Scope.READ)
    own = home.backcast.registry.keys.all()[0]
    vector = [1.0] * 6
    person = {"ids": ["ann@example.org"], "entity": "user"}
    for method, path, body, status in (
        ("PUT", "/admin/consumers/ads", {"pin": 1}, 200),
        ("PUT", "/admin/consumers/nobody", {"pin": 1}, 404),
        ("PUT", "/admin/embeddings", {**person, "vectors": [vector]}, 200),
        ("PUT", "/admin/embeddings", {**person, "vectors": [vector], "expected_live": 0}, 409),
        ("DELETE", "/admin/embeddings", person, 200),
        ("POST", "/admin/versions/0/deprecate", {"sunset_at": "2099-01-31T00:00:00Z"}, 200),
        ("POST", "/admin/versions/0/retire", {"reason": "old"}, 409),
        ("POST", "/admin/versions/0/retire", {"force": True, "reason": "gone"}, 200),
        ("DELETE", "/admin/versions/0/deprecate", None, 410),
        ("POST", "/admin/keys", {"consumer": "ads", "reason": "new host"}, 201),
    ):
        response = client.request(method, path, json=body)
        assert response.status_code == status, response.text
    recorded = acts(home)
    assert {(act.actor, act.key) for act in recorded} == {(own.consumer, own.prefix)}
    assert [
        (act.act, act.target, act.reason, act.outcome, act.code) for act in reversed(recorded)
    ] == [
        ("pin", "consumer ads", None, "succeeded", None),
        ("pin", "consumer nobody", None, "refused", "unknown-consumer"),
        ("upsert", None, None, "succeeded", None),
        ("upsert", None, None, "refused", "promotion-conflict"),
        ("erase", None, None, "succeeded", None),
        ("deprecate", "version 0", None, "succeeded", None),
        ("retire", "version 0", "old", "refused", "version-in-use"),
        ("retire", "version 0", "gone", "succeeded", None),
        ("withdraw-deprecation", "version 0", None, "refused", "version-retired"),
        ("create-key", "consumer ads", "new host", "succeeded", None),
    ]
    assert recorded[5].details["ids"] == {"user": 1}
    assert recorded[2].details == {"force": True}
    assert "ann@example.org" not in repr(recorded)


VECTOR = [1.0] * 6
REASONED: dict[str, tuple[str, dict[str, Any] | None]] = {
    "promote_version": ("/admin/versions/2/promote", {"expected_live": 1}),
    "refresh_version": ("/admin/versions/1/refresh", {"expected_live": 1}),
    "roll_back": ("/admin/rollback", {"expected_live": 1}),
    "cancel_operation": ("/admin/operations/0f/cancel", {}),
    "put_embeddings": ("/admin/embeddings", {"ids": ["item 1"], "vectors": [VECTOR]}),
    "delete_embeddings": ("/admin/embeddings", {"ids": ["item 1"]}),
    "deprecate_version": ("/admin/versions/0/deprecate", {"sunset_at": "2099-01-31T00:00:00Z"}),
    "withdraw_version_deprecation": ("/admin/versions/0/deprecate", None),
    "retire_version": ("/admin/versions/0/retire", {}),
    "pin_consumer": ("/admin/consumers/ads", {"pin": 1}),
    "create_key": ("/admin/keys", {"consumer": "ads"}),
    "rotate_key": ("/admin/keys/00000000/rotate", {}),
    "revoke_key": ("/admin/keys/00000000/revoke", {}),
}


def ask(client: TestClient, name: str, reason: str, headers: Any = None) -> Any:
    """Ask an endpoint for its act."""
    [route] = [route for route in ROUTES if route.name == name]
    [method] = route.methods or {"GET"}
    path, body = REASONED[name]
    if body is None:
        return client.request(method, path, params={"reason": reason}, headers=headers)
    return client.request(method, path, json={**body, "reason": reason}, headers=headers)


def versions_of(home: Home) -> Sequence[Version]:
    return home.backcast.registry.deployments.catalog().versions


class TestReasons:
    """Every act takes one, of the same length."""

    @pytest.mark.parametrize("name", ACTS)
    def test_reason_of_an_act_is_kept(self, home: Home, client: TestClient, name: str) -> None:
        reason = "it was agreed, " * 133 + "again"
        assert len(reason) == 2000
        response = ask(client, name, reason)
        assert response.status_code in {200, 201, 202, 404, 409}, response.text
        [act] = acts(home)
        assert (act.act, act.reason) == (ACTS[name], reason)

    @pytest.mark.parametrize("name", ACTS)
    @pytest.mark.parametrize(
        "reason", ["", "x" * 2001, "a\0b"], ids=["none", "too long", "not to be kept"]
    )
    def test_what_is_none_is_refused(self, client: TestClient, name: str, reason: str) -> None:
        assert ask(client, name, reason).status_code == 422

    @pytest.mark.parametrize("name", ["roll_back", "deprecate_version", "retire_version"])
    def test_a_secret_in_it_is_told_to_nobody(
        self, home: Home, client: TestClient, name: str
    ) -> None:
        secret = secret_of(home, Scope.READ)
        order = {"force": True} if name == "retire_version" else {}
        path, body = REASONED[name]
        reason = f"{secret} leaked"
        sent = client.post(path, json={**(body or {}), **order, "reason": reason})
        assert sent.status_code in {200, 202}, sent.text
        until = time.monotonic() + 30
        while not any("leaked" in (v.note or "") for v in versions_of(home)):
            assert time.monotonic() < until
            time.sleep(0.02)
        told = repr([versions_of(home), home.backcast.registry.deployments.history(), acts(home)])
        assert "leaked" in told
        assert secret[-20:] not in told

    def test_beside_an_arrow_stream_it_stands_in_the_query(
        self, home: Home, client: TestClient
    ) -> None:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(VECTOR, pa.float32()), 6)
        batch = pa.record_batch([pa.array(["item 1"]), vectors], names=["id", "vector"])
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        for query, status in (({"reason": "mended"}, 200), ({"why": "mended"}, 422)):
            response = client.put(
                "/admin/embeddings",
                params=query,
                content=sink.getvalue().to_pybytes(),
                headers={"Content-Type": "application/vnd.apache.arrow.stream"},
            )
            assert response.status_code == status, response.text
        assert [act.reason for act in acts(home)] == [None, "mended"]

    def test_nothing_else_stands_in_the_query_of_a_withdrawal(self, client: TestClient) -> None:
        path = "/admin/versions/0/deprecate"
        assert client.delete(path, params={"why": "mended"}).status_code == 422


class TestOperations:
    def promote(self, client: TestClient, version: int, **order: Any) -> Any:
        return client.post(f"/admin/versions/{version}/promote", json=order)

    def ended(self, home: Home) -> ActRecord:
        deadline = time.monotonic() + 30
        while (act := acts(home)[0]).outcome is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return act

    def test_outcome_comes_with_the_end(self, home: Home, client: TestClient) -> None:
        order = {"expected_live": 1, "force": True, "reason": "we know"}
        operation = self.promote(client, 2, **order).json()
        act = self.ended(home)
        assert (act.act, act.target, act.reason) == ("promote", "version 2", "we know")
        assert (act.outcome, act.operation) == ("succeeded", operation["id"])
        assert act.ended_at is not None
        assert act.ended_at >= act.at
        assert act.details["force"] is True
        assert act.details["expected_live"] == 1
        assert act.details["live_version"] == 2

    def test_failed_gate_is_a_refusal(self, home: Home, client: TestClient) -> None:
        home.publish(2, items=1)
        with client_of(home, gate_coverage=1.0) as strict:
            operation = self.promote(strict, 2, expected_live=1).json()
            act = self.ended(home)
        assert (act.outcome, act.code, act.operation) == ("refused", "conflict", operation["id"])
        assert act.details["failed_gates"] == ["coverage-item"]

    def test_what_becomes_no_operation_is_refused_at_once(
        self, home: Home, client: TestClient
    ) -> None:
        assert self.promote(client, 2, expected_live=0).status_code == 409
        [act] = acts(home)
        assert (act.outcome, act.code) == ("refused", "promotion-conflict")
        assert act.operation is None

    def test_dry_run_is_no_act(self, home: Home, client: TestClient) -> None:
        for path, order in (
            ("versions/2/promote", {"expected_live": 1}),
            ("versions/2/promote", {"expected_live": 0}),
            ("versions/9/promote", {}),
            ("rollback", {"expected_live": 1}),
            ("versions/1/refresh", {"expected_live": 1}),
        ):
            client.post(f"/admin/{path}", json={**order, "dry_run": True})
        assert acts(home) == []

    def test_request_that_is_sent_again_names_the_first_operation(
        self, home: Home, client: TestClient
    ) -> None:
        key = {"Idempotency-Key": "morning"}
        ids = []
        for _ in range(2):
            answer = client.post(
                "/admin/versions/2/promote", json={"expected_live": 1}, headers=key
            )
            ids.append(answer.json()["id"])
            self.ended(home)
        assert ids[0] == ids[1]
        again, first = acts(home)
        assert (first.outcome, first.operation) == ("succeeded", ids[0])
        assert (again.outcome, again.operation) == ("succeeded", None)
        assert again.details["operation"] == ids[0]


def test_log_is_read_over_http(home: Home, client: TestClient) -> None:
    for number in range(3):
        client.put("/admin/consumers/nobody", json={"pin": number})
    first = client.get("/admin/audit?limit=2").json()["acts"]
    rest = client.get(f"/admin/audit?before={first[-1]['id']}").json()["acts"]
    assert [act["details"]["pin"] for act in [*first, *rest]] == [2, 1, 0]
    assert first[0] == {
        "id": first[0]["id"],
        "at": first[0]["at"],
        "ended_at": first[0]["ended_at"],
        "actor": "consumer 0",
        "key": home.backcast.registry.keys.all()[0].prefix,
        "act": "pin",
        "target": "consumer nobody",
        "reason": None,
        "details": {"pin": 2},
        "outcome": "refused",
        "code": "unknown-consumer",
        "operation": None,
    }
    for query in ("limit=0", "limit=1001", "before=0", "since=x"):
        assert client.get(f"/admin/audit?{query}").status_code == 422


@pytest.mark.parametrize("name", ACTS)
def test_act_is_called_the_same_whether_it_is_begun_or_not(
    home: Home, client: TestClient, name: str
) -> None:
    reader = bearer(secret_of(home, Scope.READ))
    assert ask(client, name, "agreed", reader).status_code == 403
    ask(client, name, "agreed")
    begun, refused = acts(home)
    assert (begun.act, refused.code) == (refused.act, "forbidden")
    assert begun.code not in {"forbidden", "invalid-input"}  # it is the endpoint that tells of it
    assert refused.target in {begun.target, None}  # what only a body names is not read
