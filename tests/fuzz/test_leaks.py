"""What is secret stays so: in logs, in problem documents, in what commands say."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import make_url

from backcast.versions import Scope
from tests.servers import free_port
from tests.service_support import bearer, publish_ids, secret_of
from tests.support import Home, build_home

COMMAND = [sys.executable, "-c", "from backcast.cli import main; main()"]
START_S, STOP_S = 90, 30
CANARY = "hunter2canary"
"""In every secret that the server never asked for."""


@dataclass(frozen=True)
class Served:
    """A service run by its command, with its own logging, and where its log is."""

    home: Home
    url: str
    log: Path
    secrets: tuple[str, ...]
    admin: str


def environment(**variables: str) -> dict[str, str]:
    kept = {name: v for name, v in os.environ.items() if not name.startswith("BACKCAST_")}
    return {**kept, **variables}


@pytest.fixture
def served(tmp_path: Path, empty_registry: str, empty_redis: str) -> Iterator[Served]:
    database = make_url(empty_registry).set(password=CANARY).render_as_string(hide_password=False)
    with build_home(
        tmp_path, published=False, database_url=empty_registry, store_url=empty_redis
    ) as home:
        publish_ids(home, 0, ["0"])
        publish_ids(home, 1, ["0"])
        home.promote(0)
        read, admin = secret_of(home), secret_of(home, Scope.ADMIN)
        revoked = secret_of(home)
        home.backcast.registry.keys.revoke(home.backcast.registry.keys.all()[-1].prefix)
        port, log = free_port(), tmp_path / "service.log"
        variables = {
            "BACKCAST_HOME": str(tmp_path),
            "BACKCAST_DATABASE_URL": database,
            "BACKCAST_STORE_URL": f"{empty_redis}?client_name={CANARY}",
            "BACKCAST_KEY": CANARY,
        }
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*COMMAND, "serve", "--port", str(port)],
                env=environment(**variables),
                stdout=output,
                stderr=output,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(url, process, log)
            yield Served(home, url, log, (read, admin, revoked, CANARY), admin)
        finally:
            process.terminate()
            process.wait(STOP_S)


def _wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        try:
            if httpx2.get(f"{url}/readyz").is_success:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.1)


def requests_with(secret: str) -> Iterator[dict[str, Any]]:
    """Yield failing requests that carry a secret where it may, and where it should not be."""
    paths = ("/embeddings/0", "/admin/usage", "/versions/9", "/nowhere", "/admin/operations/x")
    schemes = (f"Bearer {secret}x", f"Basic {secret}", secret, f"Bearer  {secret} {secret}")
    for path, scheme in itertools.product(paths, schemes):
        yield {"method": "GET", "url": path, "headers": {"Authorization": scheme}}
    for name in ("key", "version", "entity", secret):
        yield {"method": "GET", "url": "/embeddings/0", "params": {name: secret}}
    for name in ("Cookie", "X-Api-Key", "Backcast-Key", "Accept", "If-None-Match"):
        yield {"method": "GET", "url": "/embeddings/0?version=9", "headers": {name: secret}}
    for body in ({"key": secret}, {"ids": secret}, {"ids": ["0"], "version": secret}, secret):
        for path in ("/embeddings/batch", "/admin/rollback", "/admin/versions/1/promote"):
            yield {"method": "POST", "url": path, "json": body}
        yield {"method": "PUT", "url": "/admin/embeddings", "json": body}
        yield {"method": "DELETE", "url": "/admin/embeddings", "json": body}
    arrow = {"Content-Type": "application/vnd.apache.arrow.stream"}
    content = secret.encode()
    yield {"method": "POST", "url": "/embeddings/batch", "content": content, "headers": arrow}
    yield {"method": "PUT", "url": "/admin/embeddings", "content": content, "headers": arrow}


def test_no_key_is_said_again(served: Served) -> None:
    tried = 0
    with httpx2.Client(base_url=served.url) as client:
        for secret in served.secrets:
            for request in requests_with(secret):
                admin = {**bearer(served.admin), **request.get("headers", {})}
                for headers in (request.get("headers", {}), admin):
                    response = client.request(**{**request, "headers": headers})
                    told = f"{response.text}\n{response.headers}"
                    assert 400 <= response.status_code < 500, request
                    assert "Traceback" not in told
                    assert str(served.home.settings.home) not in told
                    if secret not in request.get("params", {}):  # the name of a field is told
                        assert secret not in told, request
                    tried += 1
        for secret in served.secrets:  # a path is said again, to whom it came from
            client.get(f"/embeddings/{secret}?version=0", headers=bearer(served.admin))
            client.get(f"/nowhere/{secret}")
        order = {"expected_live": 0, "force": True, "reason": "forced", "snapshot": None}
        client.post("/admin/versions/1/promote", json=order, headers=bearer(served.admin))
    assert tried > 300
    log = served.log.read_text()
    assert "live from" in log
    assert "Traceback" not in log
    assert [secret for secret in served.secrets if secret in log] == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("DATABASE_URL", f"postgresql+psycopg://u:{CANARY}@127.0.0.1:1/x"),
        ("DATABASE_URL", f"postgresql+psycopg://127.0.0.1:1/x?password={CANARY}"),
        ("DATABASE_URL", f"postgresql+psycopg://u:{CANARY}@127.0.0.1:port/x"),
        ("DATABASE_URL", f"postgresql+psycopg//u:{CANARY}@127.0.0.1/x"),
        ("DATABASE_URL", f"nosuch://u:{CANARY}@h/x"),
        ("STORE_URL", f"redis://:{CANARY}@127.0.0.1:1/0"),
        ("STORE_URL", f"redis://:{CANARY}@127.0.0.1:port/0"),
        ("STORE_URL", f"redis://127.0.0.1:1/0?password={CANARY}"),
        ("STORE_URL", f"rdis://u:{CANARY}@h"),
        ("ARTIFACTS_URL", f"nosuch://u:{CANARY}@h/x"),
        ("KYE", CANARY),
    ],
)
def test_no_command_says_a_password(tmp_path: Path, variable: str, value: str) -> None:
    variables = {"BACKCAST_HOME": str(tmp_path), f"BACKCAST_{variable}": value}
    ended = subprocess.run(
        [*COMMAND, "gc", "--dry-run"], env=environment(**variables), capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert CANARY not in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
