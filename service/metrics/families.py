"""Every metric that the service exposes: its name, its labels, and how workers are put together."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from backcast.errors import RegistryError, StoreError

SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)
"""Upper bounds of the buckets of requests."""

STAGE_SECONDS = (0.00001, 0.00002, 0.00005, *SECONDS)
"""Upper bounds of the buckets of parts of a request: most of one vector take microseconds."""

MOST_VERSIONS = 50
"""That have labels of their own: where more are asked for, the others share one."""

Key = tuple[str, tuple[str, ...]]
"""A family's name and the values of its labels: one series."""


class Kind(StrEnum):
    """What a number is. An age is kept as the Unix time since which it grows."""

    COUNTER = "counter"
    HISTOGRAM = "histogram"
    GAUGE = "gauge"
    AGE = "age"


class Workers(StrEnum):
    """How the numbers of one replica's workers become one.

    Those of counters and histograms are added up, of ended workers too; of the rest only living
    workers have a say.
    """

    SUM = "sum"
    LEAST = "least"
    MOST = "most"


@dataclass(frozen=True)
class Family:
    """One metric. ``meaning`` is its help text; ``buckets`` are upper bounds, without infinity."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    workers: Workers = Workers.SUM
    buckets: tuple[float, ...] = ()

    def key(self, *values: str) -> Key:
        """Return the series with these values of the labels, in their order."""
        if len(values) != len(self.labels):
            raise ValueError(f"{self.name} has the labels {self.labels}, not values {values}")
        return self.name, values

    @property
    def width(self) -> int:
        """How many numbers a series is: one, or one for each bucket and the sum."""
        return len(self.buckets) + 2 if self.kind is Kind.HISTOGRAM else 1


REQUESTS = Family(
    "backcast_requests_total",
    Kind.COUNTER,
    "Requests answered; version and format are none where the answer holds no vector.",
    ("route", "method", "status", "version", "format"),
)
REQUEST_SECONDS = Family(
    "backcast_request_seconds",
    Kind.HISTOGRAM,
    "From the head of a request to the last byte of its answer.",
    ("route", "version", "format"),
    buckets=SECONDS,
)
IN_PROGRESS = Family(
    "backcast_requests_in_progress", Kind.GAUGE, "Requests that are being answered."
)
VECTORS = Family(
    "backcast_vectors_total", Kind.COUNTER, "Vectors in answers.", ("version", "format")
)
BYTES = Family(
    "backcast_response_bytes_total",
    Kind.COUNTER,
    "Bytes of the bodies of answers with vectors.",
    ("version", "format"),
)
STAGES = Family(
    "backcast_stage_seconds",
    Kind.HISTOGRAM,
    "Parts of an answer with vectors: gather (lookup and reading), product, encode.",
    ("route", "stage"),
    buckets=STAGE_SECONDS,
)
PROBLEMS = Family(
    "backcast_problems_total", Kind.COUNTER, "Problem documents sent, by their code.", ("code",)
)
SHED = Family(
    "backcast_shed_total",
    Kind.COUNTER,
    "Requests and connections refused because there was too much to do, by the limit.",
    ("limit",),
)
LIMITS = (
    *("batches", "changes", "slow batches", "connections", "slow connections", "large heads"),
    *("idle connections", "pipelines", "rate of requests", "rate of vectors"),
)
STORE_ERRORS = Family(
    "backcast_store_errors_total",
    Kind.COUNTER,
    "Errors of the vector store that ended a request or a task in the background.",
    ("code",),
)
REGISTRY_ERRORS = Family(
    "backcast_registry_errors_total",
    Kind.COUNTER,
    "Errors of the registry's database that ended a request or a task in the background.",
    ("code",),
)
TASK_FAILURES = Family(
    "backcast_background_failures_total",
    Kind.COUNTER,
    "Failures of what a worker does again and again in the background.",
    ("task",),
)
OPERATIONS = Family(
    "backcast_operations_total",
    Kind.COUNTER,
    "Operations that this replica carried out.",
    ("kind", "outcome"),
)
OPERATION_RUNNING = Family(
    "backcast_operation_running",
    Kind.GAUGE,
    "1 while an operation is under way, on any replica or by a command.",
    ("kind",),
    Workers.MOST,
)
SERVING = Family(
    "backcast_serving",
    Kind.GAUGE,
    "1 where every worker has loaded what is live, or was when it looked last.",
    workers=Workers.LEAST,
)
LIVE_VERSION = Family(
    "backcast_live_version",
    Kind.GAUGE,
    "The version that is served as live; the lowest where workers differ.",
    workers=Workers.LEAST,
)
LIVE_GENERATION = Family(
    "backcast_live_generation",
    Kind.GAUGE,
    "The number of the deployment that is served; it grows with promotions and rollbacks.",
    workers=Workers.LEAST,
)
LIVE_DELTA = Family(
    "backcast_live_delta",
    Kind.GAUGE,
    "The d of S.d: how many changes of ids on the live snapshot are served.",
    workers=Workers.LEAST,
)
SNAPSHOT = Family(
    "backcast_snapshot_info",
    Kind.GAUGE,
    "1 for the snapshot that is served; two for a moment while workers follow a promotion.",
    ("snapshot", "version"),
    Workers.MOST,
)
SNAPSHOT_AGE = Family(
    "backcast_snapshot_age_seconds",
    Kind.AGE,
    "Since the live snapshot was published.",
    workers=Workers.LEAST,
)
REGISTRY_AGE = Family(
    "backcast_registry_age_seconds",
    Kind.AGE,
    "Since the registry was last read, by the worker whose reading is oldest.",
    workers=Workers.LEAST,
)
DRIFT = Family(
    "backcast_drift_bound",
    Kind.GAUGE,
    "Drift bounds of the live snapshot's vectors, by the version they are served as.",
    ("version", "entity", "quantile"),
    Workers.MOST,
)
DRIFT_UNKNOWN = Family(
    "backcast_drift_unknown_vectors",
    Kind.GAUGE,
    "Vectors of the live snapshot without a drift bound.",
    ("version", "entity"),
    Workers.MOST,
)
WORKERS = Family("backcast_workers", Kind.GAUGE, "Worker processes that live.")
WORKER_STARTS = Family(
    "backcast_worker_starts_total", Kind.COUNTER, "Worker processes that were started."
)
BUILD = Family(
    "backcast_build_info", Kind.GAUGE, "1; the release that runs.", ("release",), Workers.MOST
)

FAMILIES: Mapping[str, Family] = {
    family.name: family
    for family in (
        *(REQUESTS, REQUEST_SECONDS, IN_PROGRESS, VECTORS, BYTES, STAGES),
        *(PROBLEMS, SHED, STORE_ERRORS, REGISTRY_ERRORS, TASK_FAILURES),
        *(OPERATIONS, OPERATION_RUNNING),
        *(SERVING, LIVE_VERSION, LIVE_GENERATION, LIVE_DELTA),
        *(SNAPSHOT, SNAPSHOT_AGE, REGISTRY_AGE, DRIFT, DRIFT_UNKNOWN),
        *(WORKERS, WORKER_STARTS, BUILD),
    )
}
"""Every family by its name, in the order in which they are shown."""


def error_family(code: str) -> Family | None:
    """Return the family that counts errors with this code beside PROBLEMS, if there is one."""
    if code in STORE_CODES:
        return STORE_ERRORS
    return REGISTRY_ERRORS if code in REGISTRY_CODES else None


def _codes(error: type[StoreError] | type[RegistryError]) -> frozenset[str]:
    return frozenset({error.code}.union(*(_codes(child) for child in error.__subclasses__())))


STORE_CODES, REGISTRY_CODES = _codes(StoreError), _codes(RegistryError)
