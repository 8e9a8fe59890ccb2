"""The words both sides share: versions, snapshots, keys and the records the registry keeps."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from typing import Any, Self

from backcast.errors import InvalidInput


class Entity(StrEnum):
    """What an embedding stands for."""

    ITEM = "item"
    USER = "user"


class VersionState(StrEnum):
    """registered → live → superseded → retired; or rolled_back, or rejected."""

    REGISTERED = "registered"
    LIVE = "live"
    SUPERSEDED = "superseded"
    RETIRED = "retired"
    ROLLED_BACK = "rolled_back"
    REJECTED = "rejected"


class Scope(StrEnum):
    """What a key may do; ``admin`` includes ``read``."""

    READ = "read"
    ADMIN = "admin"

    def covers(self, other: "Scope") -> bool:
        """Return whether a key of this scope may do what needs ``other``."""
        return self is Scope.ADMIN or self is other


class KeyState(StrEnum):
    """Whether a key lets its holder in."""

    IN_FORCE = "in force"
    EXPIRED = "expired"
    REVOKED = "revoked"


class OperationState(StrEnum):
    """pending → running → succeeded or failed."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True)
class FileDigest:
    """Size in bytes and SHA-256 (hex) of one artifact file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Version:
    """One registered version k. ``parent`` is the version it was aligned to (None for the first).

    ``folder`` and ``files`` name its artifacts; ``until`` is the timestamp (Unix seconds) up to
    which interactions were used; ``details`` holds configuration, metrics and library versions;
    ``note`` says why it is in its state, where somebody gave a reason; ``weights_deleted_at`` is
    set where the weights of M_k were deleted by policy.
    """

    number: int
    parent: int | None
    state: VersionState
    dim: int
    method: str
    until: int
    seed: int
    dataset: str
    dataset_fingerprint: str
    folder: str
    files: Mapping[str, FileDigest]
    details: Mapping[str, Any]
    created_at: datetime
    deprecated_at: datetime | None = None
    sunset_at: datetime | None = None
    retired_at: datetime | None = None
    note: str | None = None
    weights_deleted_at: datetime | None = None


@dataclass(frozen=True)
class Transform:
    """One registered map from ``source`` vectors to ``target`` vectors (target < source).

    ``direct`` tells a map fitted for that pair from the backward transformation to the parent.
    """

    source: int
    target: int
    direct: bool
    rows: int
    cols: int
    affine: bool
    file: str


@dataclass(frozen=True)
class SnapshotRecord:
    """One immutable set of all ver-k vectors, as the registry knows it.

    ``head`` is the number of its last delta. ``base_snapshot`` and ``base_delta`` are what
    of its version was live last when the writing of it began: changes up to there are older than
    its vectors. A superseded snapshot can go live again until it is condemned; then its files are
    deleted.
    """

    id: str
    version: int
    dim: int
    counts: Mapping[str, int]
    folder: str
    manifest_sha256: str
    head: int
    created_at: datetime
    superseded_at: datetime | None = None
    condemned_at: datetime | None = None
    deleted_at: datetime | None = None
    base_snapshot: str | None = None
    base_delta: int | None = None


class DeltaKind(StrEnum):
    """What a delta does to the ids that it names."""

    UPSERT = "upsert"
    ERASE = "erase"


@dataclass(frozen=True)
class DeltaDraft:
    """A change of a snapshot that is about to be registered; its file is already durable.

    ``file`` is a path below the root of the artifacts, ``count`` the number of ids.
    """

    kind: DeltaKind
    entity: Entity
    count: int
    file: str
    sha256: str
    actor: str


@dataclass(frozen=True)
class DeltaRecord(DeltaDraft):
    """The ``number``-th change of ``snapshot``, counted from 1."""

    snapshot: str
    number: int
    created_at: datetime


@dataclass(frozen=True)
class DiffDraft:
    """What a switch changes for the consumers of version ``target``, measured before it."""

    target: int
    figures: Mapping[str, Any]


@dataclass(frozen=True)
class DriftRecord:
    """The drift bounds of the vectors of ``snapshot``, as the registry knows them.

    Attributes:
        id: the name that the store holds them under.
        targets: the version that each of the numbers of an id belongs to.
        counts: ids by entity kind.
        unsettled: hashes of ids, by version and entity kind, that were put while that version was
            live and the bounds were worked out already: they have none for it.
        figures: how the bounds are spread, by version and entity kind.
    """

    id: str
    snapshot: str
    targets: Sequence[int]
    counts: Mapping[str, int]
    folder: str
    manifest_sha256: str
    unsettled: Mapping[str, Mapping[str, Sequence[int]]]
    figures: Mapping[str, Any]

    @property
    def dim(self) -> int:
        """How many numbers an id has."""
        return len(self.targets)


@dataclass(frozen=True)
class Live:
    """The row that says what is served. ``generation`` grows by one with every change."""

    version: int
    snapshot: str
    delta: int
    generation: int

    @property
    def name(self) -> str:
        """S.d: the snapshot and the last delta on it, as answers name what they were made from."""
        return f"{self.snapshot}.{self.delta}"


@dataclass(frozen=True)
class Operation:
    """A long-running act, visible while it runs and afterwards.

    ``owner`` is who runs it, None where the one who did has handed it back; ``beat`` grows as long
    as the owner lives. ``resumable`` ones are carried on by another replica if it does not.
    """

    id: str
    kind: str
    state: OperationState
    progress: float
    step: str
    request: Mapping[str, Any]
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None
    actor: str
    created_at: datetime
    finished_at: datetime | None = None
    owner: str | None = None
    beat: int = 0
    heartbeat_at: datetime | None = None
    resumable: bool = False
    idempotency_key: str | None = None


@dataclass(frozen=True)
class Claim:
    """An operation, and the one who may act for it."""

    id: str
    owner: str


@dataclass(frozen=True)
class Key:
    """An API key as the registry knows it: never the secret, only its SHA-256.

    ``successor`` is the prefix of the key that it was rotated to.
    """

    prefix: str
    sha256: str
    scope: Scope
    consumer: str
    pin: int | None
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    successor: str | None = None

    def in_force(self, now: datetime) -> bool:
        """Return whether the key is neither revoked nor expired at ``now`` (UTC)."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)

    def state(self, now: datetime) -> KeyState:
        """Return whether the key is in force at ``now`` (UTC), or why it is not."""
        if self.revoked_at is not None:
            return KeyState.REVOKED
        return KeyState.IN_FORCE if self.in_force(now) else KeyState.EXPIRED


@dataclass(frozen=True)
class Consumer:
    """Who holds keys, and the version that its requests are answered with by default.

    ``last_used`` is the last UTC day with a counted request, whatever its version.
    """

    name: str
    pin: int | None
    keys_in_force: int
    last_used: date | None
    created_at: datetime


@dataclass(frozen=True)
class Use:
    """What one consumer asked of one version on one UTC day."""

    consumer: str
    version: int
    day: date
    requests: int
    vectors: int


@dataclass(frozen=True)
class Lineage:
    """Who is whose parent. Chains follow parents, so k-1 need not be the parent of k."""

    parents: Mapping[int, int | None]

    @classmethod
    def of(cls, versions: Iterable[Version]) -> Self:
        """Read the parents off version records."""
        return cls({v.number: v.parent for v in versions})

    def chain(self, version: int) -> list[int]:
        """Return ``[version, parent, grandparent, …, first]``."""
        chain = [version]
        while (parent := self.parents[chain[-1]]) is not None:
            if parent >= chain[-1]:
                raise InvalidInput(
                    f"Version {chain[-1]} names {parent} as parent, not an older one."
                )
            chain.append(parent)
        return chain
