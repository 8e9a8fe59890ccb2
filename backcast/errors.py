"""Every error that Backcast raises on purpose.

BackcastError
├── InvalidInput                  a value from outside breaks a stated rule
│   ├── VersionRequired           no version asked for and no pin to fall back on
│   ├── BatchTooLarge             more ids than one request may carry
│   ├── NotFinite                 a vector holds NaN or infinite values
│   ├── DataError                 an interaction or item file that cannot be read as stated
│   ├── IdempotencyKeyReused      the key of one request came with another
│   └── DimensionMismatch         two arrays that should fit do not
├── NotFound
│   ├── UnknownVersion
│   ├── UnknownId
│   ├── UnknownOperation
│   ├── UnknownSnapshot
│   ├── UnknownDeployment
│   ├── UnknownKey
│   └── UnknownConsumer
├── Conflict
│   ├── VersionNotPromoted        registered, but newer than what is live
│   ├── VersionOffChain           not an ancestor of the live version
│   ├── PromotionConflict         the live version is not the one the caller saw
│   ├── OperationRunning          one operation at a time, and there is one
│   ├── OperationAbandoned        nobody runs it any more, or not the one who began it
│   │   └── OperationCancelled    an administrator called it off before its switch
│   ├── NothingPublished          a version without a snapshot cannot be promoted
│   ├── LastAdminKey              without it nobody could administer over HTTP
│   └── VersionInUse              somebody is pinned to the version, or used it lately
├── VersionRetired
├── SnapshotMismatch              the snapshot asked for is not served here (any more)
├── Unauthorized
├── Forbidden
├── NotReady                      nothing is live yet
│   └── Draining                  the replica is about to stop
├── Overloaded                    more at once than this replica takes
├── RateLimited                   the consumer asks for more than its rate
├── ArtifactError
│   ├── ArtifactMissing
│   │   └── WeightsDeleted        a model's weights, by policy
│   ├── ArtifactUnwritable
│   └── ArtifactCorrupt           a checksum, a shape or a value is not what was registered
├── StoreError
│   └── SnapshotNotLoaded         the vector store does not hold this snapshot
├── RegistryError                 the registry's database cannot be reached
├── SchemaMismatch                the database was made by another release
├── ConfigError                   settings, or a package that is not installed
└── ServiceError                  an answer of the service that no other class describes

Errors carry their data in ``data`` (JSON-compatible) and know nothing of HTTP: ``service.problems``
holds the one table that maps them to status codes, and ``code`` is the stable name by which the
client finds the class again.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Self


class BackcastError(Exception):
    """Base of all errors. ``code`` is stable; ``data`` holds the facts named in the message."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, **data: Any) -> None:
        super().__init__(message)
        self.message = message
        self.data = data

    @classmethod
    def rebuild(cls, message: str, data: dict[str, Any]) -> Self:
        """Make the error again from its message and data, as the client does."""
        error = cls.__new__(cls)
        BackcastError.__init__(error, message, **data)
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by message and data: each class has an ``__init__`` of its own."""
        return type(self).rebuild, (self.message, self.data)

    @staticmethod
    def by_code(code: str) -> "type[BackcastError] | None":
        """Return the class with this ``code``, or None."""
        return next((c for c in _family(BackcastError) if c.code == code), None)


_MOST_NAMES = 10


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _servable(versions: Sequence[int] | None) -> dict[str, Any]:
    # Who does not know what is served says nothing of it: an empty list would be an answer.
    return {} if versions is None else {"servable_versions": list(versions)}


def _family(cls: type[BackcastError]) -> list[type[BackcastError]]:
    return [cls, *(d for child in cls.__subclasses__() for d in _family(child))]


class InvalidInput(BackcastError):
    """A value from outside breaks a stated rule."""

    code = "invalid-input"


class VersionRequired(InvalidInput):
    """The request names no version, and its consumer has no pin."""

    code = "version-required"

    def __init__(self, servable: Sequence[int]) -> None:
        super().__init__(
            f"Name a version with ?version=, one of {list(servable)} or 'live'. "
            "There is no default: a consumer's dimension must never change silently.",
            servable_versions=list(servable),
        )


class BatchTooLarge(InvalidInput):
    """More ids than one request may carry."""

    code = "batch-too-large"

    def __init__(self, count: int, limit: int) -> None:
        super().__init__(
            f"{count} ids in one batch; at most {limit} are allowed. Send several batches.",
            count=count,
            limit=limit,
        )


class NotFinite(InvalidInput):
    """A vector holds NaN or infinite values."""

    code = "not-finite"

    def __init__(self, count: int, entity: str, id: str) -> None:
        super().__init__(
            f"{count} {'vector holds' if count == 1 else 'vectors hold'} NaN or infinite values; "
            f"the first is that of {entity} {id!r}.",
            count=count,
            entity=entity,
            id=id,
        )


class DataError(InvalidInput):
    """An interaction or item file that cannot be read as stated."""

    code = "bad-data"


class IdempotencyKeyReused(InvalidInput):
    """An idempotency key stands for one request, and this is another."""

    code = "idempotency-key-reused"

    def __init__(self, key: str, operation: str) -> None:
        super().__init__(
            f"The Idempotency-Key {key!r} was sent with another request, which became operation "
            f"{operation}. Send a new key with a new request.",
            operation=operation,
        )


class DimensionMismatch(InvalidInput):
    """Two arrays that should fit do not."""

    code = "dimension-mismatch"

    def __init__(self, what: str, expected: object, got: object) -> None:
        super().__init__(
            f"{what}: expected {expected}, got {got}.",
            what=what,
            expected=str(expected),
            got=str(got),
        )


class NotFound(BackcastError):
    """What was named does not exist."""

    code = "not-found"


class UnknownVersion(NotFound):
    """No version of this number was ever registered."""

    code = "unknown-version"

    def __init__(self, version: int, servable: Sequence[int] | None = None) -> None:
        super().__init__(
            f"Version {version} does not exist; `backcast versions` lists those that do.",
            version=version,
            **_servable(servable),
        )


class UnknownId(NotFound):
    """The live snapshot holds no vector of this id."""

    code = "unknown-id"

    def __init__(self, entity: str, id: str, snapshot: str) -> None:
        super().__init__(
            f"No {entity} {id!r} in snapshot {snapshot}.", entity=entity, id=id, snapshot=snapshot
        )


class UnknownOperation(NotFound):
    """No operation has this id."""

    code = "unknown-operation"

    def __init__(self, operation: str) -> None:
        super().__init__(
            f"No operation {operation!r}; `backcast operations` lists them.", operation=operation
        )


class UnknownSnapshot(NotFound):
    """No snapshot has this id."""

    code = "unknown-snapshot"

    def __init__(self, snapshot: str) -> None:
        super().__init__(
            f"No snapshot {snapshot!r}; `backcast snapshots` lists those that are kept.",
            snapshot=snapshot,
        )


class UnknownDeployment(NotFound):
    """No deployment has this generation."""

    code = "unknown-deployment"

    def __init__(self, generation: int) -> None:
        super().__init__(
            f"No deployment {generation}; `backcast deployments` lists them.",
            generation=generation,
        )


class UnknownKey(NotFound):
    """No key has this prefix."""

    code = "unknown-key"

    def __init__(self, prefix: str) -> None:
        super().__init__(
            f"No key has the prefix {prefix!r}; `backcast keys list` shows them.", prefix=prefix
        )


class UnknownConsumer(NotFound):
    """No consumer has this name."""

    code = "unknown-consumer"

    def __init__(self, consumer: str) -> None:
        super().__init__(
            f"No consumer {consumer!r}; `backcast consumers` lists them. A consumer begins with "
            "its first key.",
            consumer=consumer,
        )


class Conflict(BackcastError):
    """The request is sound, but the present state does not allow it."""

    code = "conflict"


class VersionNotPromoted(Conflict):
    """The version is registered, but newer than what is live."""

    code = "version-not-promoted"

    def __init__(self, version: int, live: int | None, servable: Sequence[int]) -> None:
        now = "nothing" if live is None else f"version {live}"
        super().__init__(
            f"Version {version} is registered but not promoted; live is {now}.",
            version=version,
            current_version=live,
            servable_versions=list(servable),
        )


class VersionOffChain(Conflict):
    """The version is not an ancestor of the live one, so no chain of maps leads to it."""

    code = "version-off-chain"

    def __init__(
        self, version: int, live: int, servable: Sequence[int], state: str, note: str | None = None
    ) -> None:
        because = "" if note is None else f': "{note}"'
        super().__init__(
            f"Version {version} ({state}{because}) is not on the chain of the live version {live}; "
            f"versions {list(servable)} can be served.",
            version=version,
            state=state,
            current_version=live,
            servable_versions=list(servable),
            **({} if note is None else {"reason": note}),
        )


class PromotionConflict(Conflict):
    """The live version is not the one that the caller based its decision on."""

    code = "promotion-conflict"


class OperationRunning(Conflict):
    """One operation runs at a time, whichever replica or command began it."""

    code = "operation-running"

    def __init__(
        self, operation: str, kind: str, step: str, progress: float, owner: str | None
    ) -> None:
        super().__init__(
            f"Operation {operation} ({kind}) is running: step {step or 'not begun'}, "
            f"{100 * progress:.0f} % done, by {owner or 'nobody at the moment'}. "
            "Wait until it has ended, or cancel it, and look again at what is live.",
            operation=operation,
            kind=kind,
            step=step,
            progress=progress,
            owner=owner,
        )


class OperationAbandoned(Conflict):
    """Nobody runs the operation any more, or somebody else than before does."""

    code = "operation-abandoned"


class OperationCancelled(OperationAbandoned):
    """An administrator called the operation off before it had switched anything."""

    code = "operation-cancelled"

    def __init__(self, operation: str, by: str, reason: str | None) -> None:
        because = "" if reason is None else f' ("{reason}")'
        super().__init__(
            f"Operation {operation} was cancelled by {by}{because}; nothing was switched.",
            operation=operation,
            by=by,
            reason=reason,
        )


class NothingPublished(Conflict):
    """A version without a published snapshot cannot be promoted."""

    code = "nothing-published"

    def __init__(self, version: int) -> None:
        super().__init__(
            f"Version {version} has no snapshot. Run `backcast publish {version}` first.",
            version=version,
        )


class LastAdminKey(Conflict):
    """Without this key nobody could administer over HTTP any more."""

    code = "last-admin-key"

    def __init__(self, prefix: str) -> None:
        super().__init__(
            f"Beside key {prefix} none with scope admin is in force, rotated ones aside. Create "
            "another or rotate it, or force it, with a reason: the next one then comes from "
            "`backcast keys create`.",
            prefix=prefix,
        )


class VersionInUse(Conflict):
    """Somebody is pinned to the version, used it lately, or was promised more time."""

    code = "version-in-use"

    def __init__(
        self,
        version: int,
        *,
        pinned: Sequence[str] = (),
        used: Mapping[str, str] = MappingProxyType({}),
        sunset_at: str | None = None,
    ) -> None:
        last_uses = [f"{name} (last on {day})" for name, day in used.items()]
        grounds = [
            *([f"pinned to it: {_listed(pinned)}"] if pinned else []),
            *([f"used it lately: {_listed(last_uses)}"] if used else []),
            *([f"announced to last until {sunset_at}"] if sunset_at else []),
        ]
        super().__init__(
            f"Version {version} cannot be retired yet: {'; '.join(grounds)}. "
            "See `backcast consumers` and `backcast usage`, or force it, with a reason.",
            version=version,
            pinned=list(pinned),
            used=dict(used),
            sunset_at=sunset_at,
        )


class VersionRetired(BackcastError):
    """The version was served once and is not any more."""

    code = "version-retired"

    def __init__(
        self, version: int, servable: Sequence[int] | None, reason: str | None = None
    ) -> None:
        why = "" if reason is None else f" ({reason})"
        others = f"; versions {list(servable)} can be served" if servable else ""
        super().__init__(
            f"Version {version} is retired{why}{others}.",
            version=version,
            reason=reason,
            **_servable(servable),
        )


class SnapshotMismatch(BackcastError):
    """The snapshot that the caller demands is not served here (any more)."""

    code = "snapshot-mismatch"

    def __init__(self, expected: str, current: str) -> None:
        super().__init__(
            f"Snapshot {expected} was demanded, {current} is served. "
            "Start again without the demand to read the current one.",
            expected_snapshot=expected,
            current_snapshot=current,
        )


class Unauthorized(BackcastError):
    """No key, or one that is not in force."""

    code = "unauthorized"


class Forbidden(BackcastError):
    """The key is in force, but its scope does not reach this far."""

    code = "forbidden"

    def __init__(self, scope: str) -> None:
        super().__init__(f"This needs a key with scope {scope}.", required_scope=scope)


class NotReady(BackcastError):
    """Nothing is live yet, or the live snapshot cannot be read now."""

    code = "not-ready"


class Draining(NotReady):
    """The replica is about to stop: it answers what it is asked, and should be asked no more."""

    code = "draining"

    def __init__(self) -> None:
        super().__init__("This replica is about to stop; ask another one.")


class Overloaded(BackcastError):
    """The replica has as much to do as it takes on; nothing was done."""

    code = "overloaded"


class RateLimited(BackcastError):
    """The consumer asks for more than it may in a second; ``retry_after`` is in seconds."""

    code = "rate-limited"

    def __init__(
        self, consumer: str, unit: str, limit: int, seconds: int, retry_after: int
    ) -> None:
        time = "second" if seconds == 1 else f"{seconds} seconds"
        super().__init__(
            f"Consumer {consumer} may have {limit} {unit} in {time}; try again in {retry_after} s.",
            consumer=consumer,
            unit=unit,
            limit=limit,
            seconds=seconds,
            retry_after=retry_after,
        )


class ArtifactError(BackcastError):
    """A stored file is not what was registered."""

    code = "artifact-error"


class ArtifactMissing(ArtifactError):
    """A registered file is gone."""

    code = "artifact-missing"

    def __init__(self, url: str) -> None:
        super().__init__(f"{url} is registered but missing.", url=url)


class WeightsDeleted(ArtifactMissing):
    """The weights of a model were deleted by policy; its maps never are."""

    code = "weights-deleted"

    def __init__(self, version: int, deleted_on: str) -> None:
        BackcastError.__init__(
            self,
            f"The weights of version {version} were deleted on {deleted_on}, as "
            "BACKCAST_KEEP_MODELS=fit demands. Its maps are kept: it is served as before.",
            version=version,
        )


class ArtifactUnwritable(ArtifactError):
    """A file cannot be written: no permission, no space, no such place."""

    code = "artifact-unwritable"

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(
            f"{url} cannot be written: {reason}. Mend that, or set BACKCAST_ARTIFACTS_URL.",
            url=url,
            reason=reason,
        )


class ArtifactCorrupt(ArtifactError):
    """A checksum, a shape or a value is not what was registered."""

    code = "artifact-corrupt"

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url} is refused: {reason}.", url=url, reason=reason)


class StoreError(BackcastError):
    """The vector store cannot be reached or read."""

    code = "store-error"


class SnapshotNotLoaded(StoreError):
    """The vector store does not hold this snapshot."""

    code = "snapshot-not-loaded"

    def __init__(self, snapshot: str, store: str) -> None:
        super().__init__(
            f"The vector store {store} does not hold snapshot {snapshot}. "
            "Where it is live, promoting its version again loads it.",
            snapshot=snapshot,
            store=store,
        )


class RegistryError(BackcastError):
    """The registry's database cannot be reached."""

    code = "registry-error"


class SchemaMismatch(BackcastError):
    """The database was made by another release, and this one cannot run on it."""

    code = "schema-mismatch"

    def __init__(self, found: str | None, expected: str, *, newer: bool = False) -> None:
        mend = "Install the release that made it." if newer else "Run `backcast db upgrade`."
        super().__init__(
            f"The registry's schema is {found or 'absent'}, this release needs {expected}. {mend}",
            found=found,
            expected=expected,
        )


class ConfigError(BackcastError):
    """A setting, a configuration file or a missing package."""

    code = "config-error"


class ServiceError(BackcastError):
    """An answer of the service that no other class describes."""

    code = "service-error"
