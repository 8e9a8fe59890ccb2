"""Keys as several replicas know them: processes of their own, one registry on PostgreSQL."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from backcast.versions import Scope
from tests import servers
from tests.integration.test_service import environment, serving
from tests.service_support import bearer, secret_of
from tests.support import Home, build_home

CACHE_S = 2.0
READ = "/embeddings/item 0?version=0"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, postgres_url: str) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("home")
    with (
        servers.postgres(environ={servers.DATABASE_VARIABLE: postgres_url}) as url,
        build_home(folder, live=1, database_url=url) as built,
    ):
        yield built


@pytest.fixture(scope="module")
def variables(home: Home) -> dict[str, str]:
    return {
        "BACKCAST_DATABASE_URL": home.settings.database_url,
        "BACKCAST_KEY_CACHE_SECONDS": f"{CACHE_S}",
    }


@pytest.fixture(scope="module")
def replicas(home: Home, variables: dict[str, str]) -> Iterator[list[httpx2.Client]]:
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(home, workers=1, **variables)) for _ in range(2)]
        yield [stack.enter_context(httpx2.Client(base_url=url)) for url in urls]


def statuses(replicas: list[httpx2.Client], secret: str) -> list[int]:
    return [replica.get(READ, headers=bearer(secret)).status_code for replica in replicas]


def command(home: Home, variables: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from backcast.cli import main; main()", *arguments],
        env=environment(home, **variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_revocation_by_a_command_reaches_every_replica_in_the_stated_time(
    home: Home, variables: dict[str, str], replicas: list[httpx2.Client]
) -> None:
    secret, other = secret_of(home), secret_of(home)
    assert statuses(replicas, secret) == statuses(replicas, other) == [200, 200]
    command(home, variables, "keys", "revoke", secret.split("_")[1])
    time.sleep(CACHE_S)
    assert statuses(replicas, secret) == [401, 401]
    assert statuses(replicas, other) == [200, 200]


@pytest.mark.parametrize("overlap", [0.0, 3.0])
def test_rotation_at_one_replica_reaches_every_other_in_the_stated_time(
    home: Home, replicas: list[httpx2.Client], overlap: float
) -> None:
    old, admin = secret_of(home), bearer(secret_of(home, Scope.ADMIN))
    assert statuses(replicas, old) == [200, 200]
    path = f"/admin/keys/{old.split('_')[1]}/rotate"
    answer = replicas[0].post(path, json={"overlap_seconds": overlap}, headers=admin)
    rotated_at = home.backcast.registry.now()
    assert answer.status_code == 201, answer.text
    new = answer.json()["key"]
    assert statuses(replicas, new) == [200, 200]
    if overlap:
        seen = statuses(replicas, old)
        in_overlap = home.backcast.registry.now() < rotated_at + timedelta(seconds=overlap - 1)
        assert seen == [200, 200] or not in_overlap
    time.sleep(max(CACHE_S, overlap))
    assert statuses(replicas, old) == [401, 401]
    assert statuses(replicas, new) == [200, 200]


def test_every_replica_and_command_writes_one_log(
    home: Home, variables: dict[str, str], replicas: list[httpx2.Client]
) -> None:
    admin = secret_of(home, Scope.ADMIN)
    own = home.backcast.registry.keys.all()[-1]
    for replica in replicas:
        made = replica.post("/admin/keys", json={"consumer": "ads"}, headers=bearer(admin))
        assert made.status_code == 201
    command(home, variables, "keys", "create", "--consumer", "ads", "--reason", "by hand")
    listed = [replica.get("/admin/audit?limit=3", headers=bearer(admin)) for replica in replicas]
    logs: list[Any] = [answer.json()["acts"] for answer in listed]
    assert logs[0] == logs[1]
    assert [(act["key"], act["reason"], act["outcome"]) for act in logs[0]] == [
        (None, "by hand", "succeeded"),
        (own.prefix, None, "succeeded"),
        (own.prefix, None, "succeeded"),
    ]
    assert logs[0][0]["actor"].startswith("cli:")


def test_secrets_are_in_no_log(
    home: Home, variables: dict[str, str], replicas: list[httpx2.Client]
) -> None:
    secret = command(home, variables, "keys", "create", "--consumer", "ads").strip()
    statuses(replicas, secret)
    statuses(replicas, secret + "x")
    random = secret.split("_", 2)[2]
    for log in Path(home.settings.home).glob("service-*.log"):
        assert random not in log.read_text()
