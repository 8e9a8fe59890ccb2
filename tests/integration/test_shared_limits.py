"""Replicas count what a consumer asks for in one Redis, and each alone while that is away."""

import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest

from benchmarks.serving_processes import backcast_server, environment
from service import limits
from service.app import create_app
from tests.servers import OwnRedis, own_redis
from tests.service_support import bearer, running, secret_of
from tests.support import Home, build_home

RATE, SECONDS, REPLICAS = 50, 4.0, 2
SINGLE = "/embeddings/item 0?version=0"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with build_home(tmp_path, live=1) as built:
        yield built


def test_replicas_give_together_what_one_consumer_may_have(home: Home, empty_redis: str) -> None:
    """In T seconds the rate times T and one second more, and a lease of each worker.

    A replica that was stalled for a quarter of a second may have counted alone for one.
    """
    shared = {"BACKCAST_LIMITS_URL": empty_redis, "BACKCAST_REQUESTS_PER_SECOND": f"{RATE}"}
    headers = bearer(secret_of(home))

    def hammer(url: str) -> tuple[Counter[int], float]:
        statuses: Counter[int] = Counter()
        with httpx2.Client(base_url=url, headers=headers) as http:
            http.get(SINGLE)
            started = time.monotonic()
            while time.monotonic() < started + SECONDS:
                response = http.get(SINGLE)
                statuses[response.status_code] += 1
                assert response.status_code == 200 or response.headers["retry-after"] == "1"
        return statuses, time.monotonic() - started

    with ExitStack() as stack, ThreadPoolExecutor(2 * REPLICAS) as pool:
        environ = environment(home.settings, 1, **shared)
        urls = [stack.enter_context(backcast_server(environ)).url for _ in range(REPLICAS)]
        found = list(pool.map(hammer, urls * 2))
    answered = sum((statuses for statuses, _ in found), Counter[int]())
    seconds = max(taken for _, taken in found)
    assert answered.keys() == {200, 429}
    assert answered[200] <= RATE * (seconds + 1) + REPLICAS * (RATE // 10 + RATE)
    assert answered[200] >= RATE * SECONDS / 2


@pytest.fixture
def redis() -> Iterator[OwnRedis]:
    with own_redis() as found:
        yield found


@pytest.fixture
def http(home: Home, redis: OwnRedis, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx2.Client]:
    """A client that may have 100 vectors in 100 seconds."""
    monkeypatch.setattr(limits, "_PATIENCE_S", 5.0)  # busy machines
    limited = {"limits_url": redis.url, "vectors_per_second": 1, "max_batch": 100}
    with (
        running(create_app(home.settings.model_copy(update=limited))) as url,
        httpx2.Client(base_url=url, headers=bearer(secret_of(home)), timeout=30) as opened,
    ):
        yield opened


def ask(http: httpx2.Client, count: int = 60) -> int:
    body = {"ids": ["item 0"] * count, "version": 0}
    return http.post("/embeddings/batch", json=body).status_code


def test_without_redis_a_replica_counts_alone_and_with_it_together_again(
    http: httpx2.Client, redis: OwnRedis, caplog: pytest.LogCaptureFixture
) -> None:
    with redis.running():
        assert [ask(http), ask(http)] == [200, 429]
    assert [ask(http), ask(http)] == [200, 429]
    assert "without Redis" in caplog.text
    with redis.running():  # which has forgotten everything
        deadline = time.monotonic() + 30
        while ask(http) == 429:
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_redis_that_hangs_keeps_nobody_waiting(http: httpx2.Client, redis: OwnRedis) -> None:
    with redis.running() as process:
        assert ask(http) == 200
        process.send_signal(signal.SIGSTOP)
        try:
            assert [ask(http), ask(http)] == [200, 429]
        finally:
            process.send_signal(signal.SIGCONT)
