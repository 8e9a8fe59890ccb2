"""Keys over HTTP: made, rotated, revoked, listed, and what is no key."""

import logging
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from backcast.lifecycle import Backcast, open_backcast
from backcast.settings import Settings
from backcast.versions import Scope
from service.routes.embeddings import PREFIX
from tests.service_support import (
    WatchedStore,
    assert_served,
    bearer,
    client_of,
    expire,
    read_rows,
    secret_of,
    set_version,
)
from tests.support import Home, build_home, registry_away_after


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Home, TestClient]]:
    with (
        build_home(tmp_path_factory.mktemp("home"), live=1) as home,
        client_of(home, key_cache_seconds=0.0) as client,
    ):
        yield home, client


@pytest.fixture
def home(served: tuple[Home, TestClient]) -> Home:
    return served[0]


@pytest.fixture
def client(served: tuple[Home, TestClient]) -> TestClient:
    return served[1]


def code_of(response: Any) -> tuple[int, str]:
    assert response.headers["content-type"] == "application/problem+json", response.text
    return response.status_code, response.json()["type"].removeprefix("urn:backcast:problem:")


def made(client: TestClient, **wanted: Any) -> dict[str, Any]:
    response = client.post("/admin/keys", json={"consumer": "ads", **wanted})
    assert response.status_code == 201, response.text
    assert response.headers["Cache-Control"] == "no-store"
    key: dict[str, Any] = response.json()
    return key


def status(client: TestClient, secret: str) -> int:
    read: int = client.get("/embeddings/item 0?version=0", headers=bearer(secret)).status_code
    return read


def listed(client: TestClient, prefix: str) -> dict[str, Any]:
    [key] = [k for k in client.get("/admin/keys").json()["keys"] if k["prefix"] == prefix]
    return dict(key)


def test_key_is_made_and_works_at_once(client: TestClient) -> None:
    key = made(client, scope="read", expires_at="2099-01-31T01:00:00+01:00")
    assert re.fullmatch(rf"bc_{key['prefix']}_[\w-]{{43}}", key["key"])
    assert (key["consumer"], key["scope"], key["state"]) == ("ads", "read", "in force")
    assert key["expires_at"] == "2099-01-31T00:00:00Z"
    assert status(client, key["key"]) == 200
    shown = listed(client, key["prefix"])
    assert shown == {name: value for name, value in key.items() if name != "key"}
    text = client.get("/admin/keys").text
    assert key["key"].split("_", 2)[2] not in text
    assert "sha256" not in text


def test_pin_is_the_consumers(client: TestClient) -> None:
    assert made(client, consumer="pinned", pin=0)["pin"] == 0
    assert made(client, consumer="pinned too", pin=0.0)["pin"] == 0  # to JSON, the same number
    assert made(client, consumer="pinned")["pin"] == 0
    other = client.post("/admin/keys", json={"consumer": "pinned", "pin": 1})
    assert code_of(other) == (409, "conflict")


@pytest.mark.parametrize(
    ("wanted", "refusal"),
    [
        ({}, (422, "invalid-input")),
        ({"consumer": " "}, (422, "invalid-input")),
        ({"consumer": "x" * 129}, (422, "invalid-input")),
        ({"consumer": "(anonymous)"}, (422, "invalid-input")),
        ({"consumer": "q\rINFO forged \x1b[31m"}, (422, "invalid-input")),
        ({"consumer": " cli:root@host"}, (422, "invalid-input")),
        ({"consumer": "x", "scope": "root"}, (422, "invalid-input")),
        ({"consumer": "x", "pin": "0"}, (422, "invalid-input")),
        ({"consumer": "x", "pin": 9}, (404, "unknown-version")),
        ({"consumer": "x", "expires_at": "2020-01-31T00:00:00Z"}, (422, "invalid-input")),
        ({"consumer": "x", "expires_at": "2099-01-31T00:00:00"}, (422, "invalid-input")),
        ({"consumer": "x", "expires": "2099-01-31T00:00:00Z"}, (422, "invalid-input")),
    ],
    ids=str,
)
def test_key_that_cannot_be_made(
    home: Home, client: TestClient, wanted: dict[str, Any], refusal: tuple[int, str]
) -> None:
    before = home.backcast.registry.keys.all()
    assert code_of(client.post("/admin/keys", json=wanted)) == refusal
    assert home.backcast.registry.keys.all() == before


def test_rotation_overlaps(home: Home, client: TestClient) -> None:
    old = made(client, scope="admin")
    response = client.post(f"/admin/keys/{old['prefix']}/rotate", json={"overlap_seconds": 60})
    assert response.status_code == 201
    assert response.headers["Cache-Control"] == "no-store"
    new = response.json()
    assert (new["consumer"], new["scope"], new["successor"]) == ("ads", "admin", None)
    assert [status(client, key["key"]) for key in (old, new)] == [200, 200]
    kept = listed(client, old["prefix"])
    assert (kept["state"], kept["successor"]) == ("in force", new["prefix"])
    left = datetime.fromisoformat(kept["expires_at"]) - home.backcast.registry.now()
    assert timedelta(0) < left <= timedelta(seconds=60)
    again = client.post(f"/admin/keys/{old['prefix']}/rotate", json={})
    assert code_of(again) == (409, "conflict")
    assert again.json()["successor"] == new["prefix"]
    expire(home, old["prefix"], datetime.now(UTC))
    assert [status(client, key["key"]) for key in (old, new)] == [401, 200]


def test_rotation_without_an_overlap(client: TestClient) -> None:
    old = made(client)
    response = client.post(f"/admin/keys/{old['prefix']}/rotate", json={"overlap_seconds": 0})
    assert [status(client, key["key"]) for key in (old, response.json())] == [401, 200]
    assert listed(client, old["prefix"])["state"] == "revoked"


@pytest.mark.parametrize(
    "path", ["", "/{}/rotate", "/{}/revoke"], ids=["create", "rotate", "revoke"]
)
def test_answer_comes_though_the_registry_goes_away_once_it_is_done(
    home: Home, client: TestClient, path: str
) -> None:
    old = made(client)
    statement, body = "INSERT INTO api_keys", {"consumer": "ads"} if path == "" else {}
    if "revoke" in path:
        statement = "UPDATE api_keys"
    with client_of(home) as other, registry_away_after(statement):
        response = other.post(f"/admin/keys{path.format(old['prefix'])}", json=body)
        assert code_of(other.get("/admin/keys")) == (503, "registry-error")
    assert response.is_success, response.text
    shown = response.json()
    assert shown["state"] == listed(client, shown["prefix"])["state"]
    assert status(client, shown.get("key", old["key"])) == (401 if "revoke" in path else 200)
    assert home.backcast.registry.audit.recent(1)[0].outcome is None


@pytest.mark.parametrize("overlap", [-1, "NaN", 1e300, "1h", None])
def test_overlap_that_is_none(client: TestClient, overlap: object) -> None:
    old = made(client)
    body = {"overlap_seconds": overlap}
    response = client.post(f"/admin/keys/{old['prefix']}/rotate", json=body)
    assert code_of(response) == (422, "invalid-input")
    assert listed(client, old["prefix"])["successor"] is None


def test_revoked_key_is_refused_and_stays_listed(client: TestClient) -> None:
    key = made(client)
    told = client.post(f"/admin/keys/{key['prefix']}/revoke", json={"reason": "leaked"}).json()
    assert (told["state"], told["revoked_at"] is not None) == ("revoked", True)
    assert status(client, key["key"]) == 401
    assert client.post(f"/admin/keys/{key['prefix']}/revoke", json={}).json() == told
    for path in ("rotate", "revoke"):
        unknown = client.post(f"/admin/keys/00000000/{path}", json={})
        assert code_of(unknown) == (404, "unknown-key")
        for wrong in (key["key"], "1A2B3C4D", "00000000 ", "0000000"):
            answer = client.post(f"/admin/keys/{wrong}/{path}", json={})
            assert code_of(answer) == (422, "invalid-input")
    for path in ("rotate", "revoke", "revoked"):
        answer = client.post(f"/admin/keys/{key['key']}/{path}", json={})
        assert answer.status_code in {404, 422}
        assert key["key"][-20:] not in answer.text


def test_last_admin_key_is_not_revoked_by_accident(tmp_path: Path) -> None:
    with build_home(tmp_path, published=False) as home, client_of(home) as client:
        [own] = home.backcast.registry.keys.all()
        path = f"/admin/keys/{own.prefix}/revoke"
        refused = client.post(path, json={"reason": "oops"})
        assert code_of(refused) == (409, "last-admin-key")
        assert refused.json()["prefix"] == own.prefix
        assert code_of(client.post(path, json={"force": True})) == (422, "invalid-input")
        second = made(client, scope="admin")
        assert client.post(path, json={}).json()["state"] == "revoked"
        client.headers.update(bearer(second["key"]))
        forced = {"force": True, "reason": "we leave"}
        assert client.post(f"/admin/keys/{second['prefix']}/revoke", json=forced).is_success
        assert code_of(client.get("/admin/keys")) == (401, "unauthorized")
        recorded = home.backcast.registry.audit.recent(9)
        assert [(act.code, act.reason, act.details.get("force")) for act in recorded[:4]] == [
            (None, "we leave", True),
            (None, None, False),
            (None, None, None),
            ("invalid-input", None, None),
        ]


def test_readers_have_no_say(home: Home, client: TestClient) -> None:
    reader, key = secret_of(home), made(client)
    for method, path in (
        ("GET", "/admin/keys"),
        ("POST", "/admin/keys"),
        ("POST", f"/admin/keys/{key['prefix']}/rotate"),
        ("POST", f"/admin/keys/{key['prefix']}/revoke"),
        ("GET", "/admin/audit"),
    ):
        response = client.request(method, path, headers=bearer(reader), json={"consumer": "x"})
        assert code_of(response) == (403, "forbidden")
    assert status(client, key["key"]) == 200


def test_pin_to_a_version_that_is_retired_later(home: Home, client: TestClient) -> None:
    key = made(client, consumer="late", pin=0)
    set_version(home, 0, state="retired")
    try:
        refused = client.post("/admin/keys", json={"consumer": "later", "pin": 0})
        assert code_of(refused) == (410, "version-retired")
        new = client.post(f"/admin/keys/{key['prefix']}/rotate", json={}).json()
        assert new["pin"] == 0
    finally:
        set_version(home, 0, state="superseded")


def test_batch_that_runs_is_answered_though_its_key_is_revoked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looking_up, released = threading.Event(), threading.Event()

    def hold(_ids: object) -> None:
        looking_up.set()
        assert released.wait(30)

    @contextmanager
    def open_slowly(settings: Settings) -> Iterator[Backcast]:
        with open_backcast(settings) as backcast:
            yield replace(backcast, store=WatchedStore(backcast.store, hold))

    monkeypatch.setattr("service.state.open_backcast", open_slowly)
    with (
        build_home(tmp_path, live=1) as home,
        client_of(home, key_cache_seconds=0.0) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        secret, ids = secret_of(home), home.ids(version=1)
        body = {"ids": ids, "version": 0}
        ask = partial(client.post, "/embeddings/batch", json=body, headers=bearer(secret))
        asked = pool.submit(ask)
        assert looking_up.wait(30)
        home.backcast.registry.keys.revoke(secret.split("_")[1])
        assert code_of(ask()) == (401, "unauthorized")
        released.set()
        assert_served(read_rows(asked.result(30)), home, ids, 0, live=1)
        assert code_of(ask()) == (401, "unauthorized")


class TestAttacks:
    """Headers that are no key, or one key too many."""

    @pytest.fixture
    def secret(self, home: Home) -> str:
        return secret_of(home, Scope.ADMIN)

    @pytest.mark.parametrize("path", [f"{PREFIX}item 0?version=0", "/versions", "/admin/keys"])
    @pytest.mark.parametrize(
        "change",
        [
            lambda secret: secret[:-1],
            lambda secret: secret[: len(secret) // 2],
            lambda secret: f"{secret}x",
            lambda secret: secret * 2,
            lambda secret: f"{secret} {secret}",
            lambda secret: f"{secret},Bearer {secret}",
            lambda secret: secret.swapcase(),
            lambda secret: secret.replace("_", "-"),
            lambda secret: f"{secret[:12]}{'x' * 60_000}",
            lambda secret: f"bc_{'é' * 8}_x",
            lambda secret: f"{secret}é",
            lambda secret: f"{secret}\xa0",
        ],
        ids=[
            *("cut", "halved", "longer", "doubled", "two words", "two in one", "other case"),
            *("other marks", "very long", "odd prefix", "odd end", "odd space"),
        ],
    )
    def test_other_secrets_are_refused(
        self, client: TestClient, secret: str, path: str, change: Any
    ) -> None:
        for sent, expected in ((secret, 200), (change(secret), 401)):
            headers = {b"Authorization": b"Bearer " + sent.encode("latin-1")}
            response = client.get(path, headers=headers)
            assert response.status_code == expected, response.text
        assert "more than one" not in response.text
        assert secret[-20:] not in response.text

    @pytest.mark.parametrize("path", [f"{PREFIX}item 0?version=0", "/versions", "/admin/keys"])
    def test_one_header_is_enough(self, client: TestClient, secret: str, path: str) -> None:
        own = client.headers["Authorization"]
        sent = [("Authorization", own), ("Authorization", f"Bearer {secret}")]
        del client.headers["Authorization"]
        try:
            for headers in (sent, sent[::-1], [sent[0]] * 2):
                response = client.get(path, headers=headers)
                assert code_of(response) == (401, "unauthorized")
                assert "more than one Authorization" in response.json()["detail"]
            assert client.get(path, headers=sent[:1]).status_code == 200
        finally:
            client.headers["Authorization"] = own

    def test_secret_is_in_no_log(
        self, client: TestClient, secret: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.DEBUG):
            key = made(client, scope="admin")
            for wrong in (key["key"], f"{secret}x"):
                client.get("/admin/keys", headers=bearer(wrong))
            client.post(f"/admin/keys/{key['prefix']}/rotate", json={"reason": key["key"]})
            audit = client.get("/admin/audit").text
        for known in (secret, key["key"]):
            assert known[-20:] not in caplog.text
            assert known[-20:] not in audit
