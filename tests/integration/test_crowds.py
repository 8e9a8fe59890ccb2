"""Many who want to change something at once: they wait for each other, and nobody for them."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from backcast.registry.database import take_turn
from backcast.registry.schema import make_engine
from backcast.versions import Scope
from service.app import create_app
from tests.service_support import bearer, running, secret_of
from tests.support import Home, build_home

CROWD = 24  # more than a process has connections to its registry


@pytest.fixture
def home(tmp_path: Path, backends: dict[str, Any]) -> Iterator[Home]:
    """Versions 0 to 2, published; 1 is live."""
    with build_home(tmp_path, live=1, **backends) as home:
        yield home


@contextmanager
def nobody_else_may_change_anything(home: Home) -> Iterator[None]:
    engine = make_engine(home.settings.registry_url)
    with engine.begin() as connection:
        take_turn(connection)
        yield
    engine.dispose()


def test_changes_that_wait_keep_no_connection_from_others(home: Home) -> None:
    headers = bearer(secret_of(home, Scope.ADMIN))

    def put(number: int) -> int:
        document = {"ids": [f"new {number}"], "vectors": [[float(number)] * 6]}
        with httpx2.Client(base_url=url, headers=headers, timeout=60) as client:
            return client.put("/admin/embeddings", json=document).status_code

    with (
        running(create_app(home.settings)) as url,
        ThreadPoolExecutor(CROWD) as crowd,
        httpx2.Client(base_url=url, headers=headers) as client,
    ):
        with nobody_else_may_change_anything(home):
            waiting = [crowd.submit(put, number) for number in range(CROWD)]
            for _ in range(15):
                answer = client.get("/admin/operations")
                assert answer.status_code == 200, answer.text
                time.sleep(0.1)
            assert not any(answer.done() for answer in waiting)
        assert [answer.result() for answer in waiting] == [200] * CROWD
        found = client.get(f"/embeddings/new {CROWD - 1}?version=1").json()
        assert found["embedding"] == [float(CROWD - 1)] * 6
        assert found["snapshot"].endswith(f".{CROWD}")
