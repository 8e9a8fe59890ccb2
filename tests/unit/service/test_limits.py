"""What a consumer may ask for: how it is counted, lent to workers, and refused."""

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import anyio
import httpx2
import pytest
from starlette.testclient import TestClient

from backcast.errors import ConfigError, RateLimited
from backcast.registry.consumers import ANONYMOUS
from backcast.settings import Settings
from backcast.versions import Key, Scope
from service.limits import REQUESTS, VECTORS, Counts, Limits, Rate, open_limits, rates_of
from service.problems import MEDIA_TYPE
from tests.service_support import bearer, client_of, secret_of
from tests.support import Home, build_home

HOUR = 3600
"""A window in which a test begins and ends."""


def key_of(consumer: str) -> Key:
    return Key("0011", "", Scope.READ, consumer, None, datetime.now(UTC))


def workers(count: int, *rates: Rate) -> tuple[list[Limits], Counter[str]]:
    """Return the limits of workers who count together, and what they refused."""
    counts, shed = Counts(""), Counter[str]()
    return [Limits(rates, counts, shed) for _ in range(count)], shed


def paid(limits: Limits, consumer: str, *costs: int, unit: str = REQUESTS) -> list[bool]:
    """Pay one after another, and return which were let through."""

    async def pay_all() -> list[bool]:
        found = []
        for cost in costs:
            try:
                await limits.pay(key_of(consumer), unit, cost)
            except RateLimited:
                found.append(False)
            else:
                found.append(True)
        return found

    return anyio.run(pay_all)


@pytest.mark.parametrize(
    ("requests", "vectors", "max_batch", "rates"),
    [
        (0, 0, 10_000, []),
        (100, 0, 10_000, [Rate(REQUESTS, 100, 1)]),
        (0, 50_000, 10_000, [Rate(VECTORS, 50_000, 1)]),
        (0, 10_000, 10_000, [Rate(VECTORS, 10_000, 1)]),
        (7, 3_000, 10_000, [Rate(REQUESTS, 7, 1), Rate(VECTORS, 12_000, 4)]),
    ],
)
def test_window_of_vectors_has_room_for_the_largest_batch(
    requests: int, vectors: int, max_batch: int, rates: list[Rate]
) -> None:
    settings = Settings.load(
        requests_per_second=requests, vectors_per_second=vectors, max_batch=max_batch
    )
    assert rates_of(settings) == rates
    assert all(rate.amount >= max_batch for rate in rates if rate.unit == VECTORS)


@pytest.mark.parametrize(("amount", "lease"), [(1, 1), (19, 1), (20, 2), (1000, 100)])
def test_a_lease_is_a_tenth_of_a_second(amount: int, lease: int) -> None:
    assert Rate(REQUESTS, amount, 1).lease == lease
    assert Rate(REQUESTS, amount * 5, 5).lease == lease


def test_each_consumer_gets_its_amount_and_no_more() -> None:
    [limits], shed = workers(1, Rate(REQUESTS, 5, HOUR))
    assert paid(limits, "one", *[1] * 7) == [True] * 5 + [False] * 2
    assert paid(limits, "other", 1) == [True]
    assert shed == {"rate of requests": 2}


def test_what_is_not_limited_costs_nothing() -> None:
    [limits], shed = workers(1, Rate(REQUESTS, 1, HOUR))
    assert paid(limits, "one", *[10**9] * 3, unit=VECTORS) == [True] * 3
    assert not shed


def test_leases_are_spent_without_asking_again() -> None:
    [limits], _ = workers(1, Rate(REQUESTS, 30 * HOUR, HOUR))  # leases of 3
    caller = key_of("one")
    assert not limits.pay_at_once(caller)
    assert paid(limits, "one", 1) == [True]
    assert [limits.pay_at_once(caller) for _ in range(3)] == [True, True, False]
    assert not limits.pay_at_once(key_of("other"))


def test_who_was_refused_a_moment_ago_is_refused_at_once() -> None:
    [limits], shed = workers(1, Rate(REQUESTS, 1, HOUR), Rate(VECTORS, 10**9, HOUR))
    assert paid(limits, "one", 1, 1) == [True, False]
    with pytest.raises(RateLimited) as raised:
        limits.pay_at_once(key_of("one"))
    assert raised.value.data == {
        "consumer": "one",
        "unit": REQUESTS,
        "limit": 1,
        "seconds": HOUR,
        "retry_after": HOUR,
    }
    assert shed["rate of requests"] == 2


def test_one_unit_without_the_other_pays_for_nothing() -> None:
    [limits], _ = workers(1, Rate(REQUESTS, 30 * HOUR, HOUR), Rate(VECTORS, 30 * HOUR, HOUR))
    assert paid(limits, "one", 1) == [True]
    assert not limits.pay_at_once(key_of("one"))
    assert paid(limits, "one", 1, unit=VECTORS) == [True]
    assert [limits.pay_at_once(key_of("one")) for _ in range(3)] == [True, True, False]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_workers_share_one_amount(count: int) -> None:
    all_of_them, _ = workers(count, Rate(REQUESTS, 20 * HOUR + 7, HOUR))  # leases of 2
    left = 20 * HOUR + 7 - 101
    assert paid(all_of_them[0], "one", left) == [True]
    given = [sum(paid(limits, "one", *[1] * 150)) for limits in all_of_them]
    assert sum(given) == 101


def test_batches_larger_than_a_lease_are_paid_whole_or_not_at_all() -> None:
    (first, second), _ = workers(2, Rate(VECTORS, 100, HOUR))
    assert paid(first, "one", 60, 60, 40, 1, unit=VECTORS) == [True, False, True, False]
    assert paid(second, "one", 1, unit=VECTORS) == [False]


def test_a_refused_batch_keeps_no_single_away() -> None:
    [limits], _ = workers(1, Rate(VECTORS, 100, HOUR))
    assert paid(limits, "one", 60, 60, 1, unit=VECTORS) == [True, False, True]
    assert not limits.pay_at_once(key_of("one"))


def test_many_at_once_get_no_more_than_one_after_another() -> None:
    [limits], _ = workers(1, Rate(REQUESTS, 40, HOUR))
    given: list[bool] = []

    async def pay() -> None:
        try:
            await limits.pay(key_of("one"), REQUESTS)
        except RateLimited:
            given.append(False)
        else:
            given.append(True)

    async def all_at_once() -> None:
        async with anyio.create_task_group() as group:
            for _ in range(100):
                group.start_soon(pay)

    anyio.run(all_at_once)
    assert Counter(given) == {True: 40, False: 60}


@pytest.mark.parametrize("url", ["redis://[::1", "redis://host:port", "memcached://host", "host"])
def test_redis_that_cannot_be_one(url: str) -> None:
    settings = Settings.load(requests_per_second=1, limits_url=url)
    with pytest.raises(ConfigError, match="BACKCAST_LIMITS_URL"):
        open_limits(settings, Counter())
    open_limits(Settings.load(limits_url=url), Counter())  # nothing is limited


# --- over HTTP: 3,000 vectors in 100 seconds, in leases of 3 --------------------------------------

LIMITED: dict[str, Any] = {"vectors_per_second": 30, "max_batch": 3000}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with build_home(tmp_path_factory.mktemp("home"), live=1) as built:
        yield built


@pytest.fixture
def client(home: Home) -> Iterator[TestClient]:
    with client_of(home, **LIMITED) as opened:
        yield opened


def batch(client: TestClient, count: int, **headers: str) -> httpx2.Response:
    ids = ["item 0"] * count
    return client.post("/embeddings/batch", json={"ids": ids, "version": 0}, headers=headers)


def codes(responses: Sequence[httpx2.Response]) -> list[int]:
    return [response.status_code for response in responses]


def test_batch_costs_its_ids(home: Home, client: TestClient) -> None:
    assert codes([batch(client, 1800), batch(client, 1800)]) == [200, 429]
    assert batch(client, 1800, **bearer(secret_of(home))).status_code == 200


def test_refusal_says_what_is_allowed_and_when_to_come_again(client: TestClient) -> None:
    batch(client, 2700)
    response = batch(client, 2700)
    assert response.status_code == 429
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.headers["retry-after"] == "90"
    assert response.headers["ratelimit-policy"] == '"vectors";q=3000;w=100'
    assert response.headers["ratelimit"] == '"vectors";r=0;t=90'
    document = response.json()
    assert document["type"] == "urn:backcast:problem:rate-limited"
    assert (document["unit"], document["limit"], document["seconds"]) == ("vectors", 3000, 100)


@pytest.mark.parametrize("name", ["short", "long"])
def test_singles_cost_one_on_either_way(client: TestClient, name: str) -> None:
    headers = {} if name == "short" else {"Backcast-Expect-Snapshot": snapshot_of(client)}
    batch(client, 2950 if name == "short" else 2949)
    answers = [client.get("/embeddings/item 0?version=0", headers=headers) for _ in range(80)]
    assert codes(answers[:50]) == [200] * 50
    assert 429 in codes(answers)  # a window slides on while a test takes its time
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert refused.json()["type"] == "urn:backcast:problem:rate-limited"
    assert refused.headers["retry-after"] == "1"


def snapshot_of(client: TestClient) -> str:
    found: str = client.get("/embeddings/item 0?version=0").headers["Backcast-Snapshot"]
    return found


def test_an_id_that_is_not_there_is_paid_for_once(client: TestClient) -> None:
    batch(client, 2900)
    answers = [client.get("/embeddings/nobody?version=0") for _ in range(90)]
    assert codes(answers) == [404] * 90


def test_what_is_no_read_is_not_limited(home: Home) -> None:
    with client_of(home, requests_per_second=1) as client:
        for path in ("/admin/deployments", "/livez", "/readyz"):
            assert codes([client.get(path) for _ in range(5)]) == [200] * 5
        assert 429 in codes([client.get("/versions") for _ in range(30)])


def test_a_batch_that_finds_no_place_pays_nothing(home: Home) -> None:
    places = {"batches_at_once": 1, "batches_waiting": 1}  # one for each consumer
    with client_of(home, reads="open", requests_per_second=1, **places) as client:
        del client.headers["Authorization"]
        with client.app_state["service"].batches.opened() as place:
            place.take(ANONYMOUS)
            assert codes([batch(client, 1) for _ in range(3)]) == [503] * 3
        assert batch(client, 1).status_code == 200


def test_everybody_without_a_key_is_one_consumer(home: Home) -> None:
    with client_of(home, reads="open", **LIMITED) as client:
        admin = client.headers.pop("Authorization")
        refused = [batch(client, 1800), batch(client, 1800)][1]
        assert refused.json()["consumer"] == "(anonymous)"
        assert batch(client, 1800, Authorization=admin).status_code == 200
