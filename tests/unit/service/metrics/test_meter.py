"""What a worker counts."""

import threading
from collections.abc import Sequence

import pytest

from backcast.errors import InvalidInput, RegistryError, SnapshotNotLoaded, StoreError
from service.metrics import families
from service.metrics.families import FAMILIES, Family
from service.metrics.meter import Meter
from service.metrics.notes import Served
from service.wire import Format

ONE = "/embeddings/{id}"


def counted(meter: Meter, family: Family, *values: str) -> Sequence[float]:
    return meter.counts()[family.key(*values)]


def test_a_request_adds_to_every_series_of_its_labels() -> None:
    meter = Meter()
    meter.answered(ONE, "GET", 200, 0.003, 2048, Served(7, Format.RAW, 1, 4e-6, 3e-6, 2e-5))
    assert counted(meter, families.REQUESTS, ONE, "GET", "200", "7", "raw") == [1]
    assert counted(meter, families.VECTORS, "7", "raw") == [1]
    assert counted(meter, families.BYTES, "7", "raw") == [2048]
    assert histogram(meter, families.REQUEST_SECONDS, ONE, "7", "raw") == ({0.005: 1}, 0.003)
    assert histogram(meter, families.STAGES, ONE, "gather") == ({0.00001: 1}, 4e-6)
    assert histogram(meter, families.STAGES, ONE, "product") == ({0.00001: 1}, 3e-6)
    assert histogram(meter, families.STAGES, ONE, "encode") == ({0.00002: 1}, 2e-5)


def test_a_request_without_vectors_adds_to_no_series_of_vectors() -> None:
    meter = Meter()
    meter.answered("/livez", "GET", 200, 0.1, 15)
    names = {name for (name, _), numbers in meter.counts().items() if any(numbers)}
    assert names == {
        "backcast_requests_total",
        "backcast_request_seconds",
        "backcast_worker_starts_total",
    }
    assert counted(meter, families.REQUESTS, "/livez", "GET", "200", "none", "none") == [1]


def test_a_copy_that_is_current_takes_part_in_no_stage() -> None:
    meter = Meter()
    meter.answered(ONE, "GET", 304, 0.1, 0, Served(7, Format.JSON))
    assert counted(meter, families.REQUESTS, ONE, "GET", "304", "7", "json") == [1]
    assert families.STAGES.key(ONE, "gather") not in meter.counts()


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0.0, 0.0001), (0.0001, 0.0001), (0.00011, 0.0002), (1.0, 1.0), (5.1, float("inf"))],
)
def test_an_observation_falls_into_the_first_bucket_that_holds_it(
    seconds: float, bucket: float
) -> None:
    meter = Meter()
    meter.answered("/livez", "GET", 200, seconds)
    expected = {bucket: 1}, seconds
    assert histogram(meter, families.REQUEST_SECONDS, "/livez", "none", "none") == expected


def test_what_is_counted_stays_when_more_comes() -> None:
    meter = Meter()
    for n in range(1, 4):
        for _ in range(n):
            meter.answered("/livez", "GET", 200, 0.001)
        total = n * (n + 1) // 2
        assert counted(meter, families.REQUESTS, "/livez", "GET", "200", "none", "none") == [total]


def test_a_worker_goes_on_from_what_it_took_over() -> None:
    before = Meter()
    before.answered("/livez", "GET", 200, 0.001)
    after = Meter(before.counts())
    after.answered("/livez", "GET", 200, 0.001)
    assert counted(after, families.REQUESTS, "/livez", "GET", "200", "none", "none") == [2]
    assert counted(after, families.WORKER_STARTS) == [2]
    assert counted(before, families.WORKER_STARTS) == [1]


def test_errors_of_store_and_registry_are_counted_wherever_they_end() -> None:
    meter = Meter()
    failed = meter.failures_of("sweeping")
    assert counted(meter, families.TASK_FAILURES, "sweeping") == [0]
    failed(StoreError("gone"))
    failed(KeyError("odd"))
    meter.answered(ONE, "GET", 503, 0.001, problem=SnapshotNotLoaded.code)
    meter.answered(ONE, "GET", 422, 0.001, problem=InvalidInput.code)
    meter.ended("promote", RegistryError("away"))
    meter.ended("promote", None)
    assert counted(meter, families.TASK_FAILURES, "sweeping") == [2]
    assert counted(meter, families.STORE_ERRORS, "store-error") == [1]
    assert counted(meter, families.STORE_ERRORS, "snapshot-not-loaded") == [1]
    assert counted(meter, families.REGISTRY_ERRORS, "registry-error") == [1]
    assert counted(meter, families.PROBLEMS, "invalid-input") == [1]
    assert counted(meter, families.OPERATIONS, "promote", "failed") == [1]
    assert counted(meter, families.OPERATIONS, "promote", "succeeded") == [1]


def test_every_store_and_registry_error_is_shown_before_it_first_happens() -> None:
    shown = {key for key in Meter().counts() if key[0].endswith("_errors_total")}
    assert shown == {
        families.STORE_ERRORS.key("store-error"),
        families.STORE_ERRORS.key("snapshot-not-loaded"),
        families.REGISTRY_ERRORS.key("registry-error"),
    }


def test_threads_lose_no_request() -> None:
    meter, threads = Meter(), 8

    def answer() -> None:
        for n in range(1000):
            meter.answered("/livez", "GET", 200, 0.001)
            if n % 100 == 0:
                meter.counts()

    working = [threading.Thread(target=answer) for _ in range(threads)]
    for thread in working:
        thread.start()
    for thread in working:
        thread.join()
    counts = counted(meter, families.REQUESTS, "/livez", "GET", "200", "none", "none")
    assert counts == [1000 * threads]


def test_methods_and_versions_beyond_the_known_and_the_most_share_a_label() -> None:
    meter = Meter()
    for n in range(200):
        meter.answered(ONE, f"METHOD{n}", 200, 0.001, 4, Served(n, Format.RAW, 1, 1e-6))
    labels = {key[1] for key in meter.counts() if key[0] == families.REQUESTS.name}
    assert {method for _, method, *_ in labels} == {"other"}
    assert len(labels) == families.MOST_VERSIONS + 1
    beyond = counted(meter, families.REQUESTS, ONE, "other", "200", "other", "raw")
    assert beyond == [200 - families.MOST_VERSIONS]


def test_series_are_bounded_whatever_happens() -> None:
    meter = Meter()
    for n in range(12_000):
        meter.answered(f"/never/{n}", "GET", 200, 0.001)
    assert len(meter.counts()) == 10_000


def test_a_family_takes_as_many_values_as_it_has_labels() -> None:
    with pytest.raises(ValueError, match="backcast_problems_total has the labels"):
        families.PROBLEMS.key("a", "b")
    assert all(name == family.name for name, family in FAMILIES.items())


def histogram(meter: Meter, family: Family, *values: str) -> tuple[dict[float, float], float]:
    """Return the counts of the buckets that are not empty, and the sum."""
    *counts, total = counted(meter, family, *values)
    bounds = [*family.buckets, float("inf")]
    return {b: n for b, n in zip(bounds, counts, strict=True) if n}, total
