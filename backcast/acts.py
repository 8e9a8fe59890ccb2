"""What administrators do, as the audit log tells of it.

Each act is described in one place here, whether it is asked for over HTTP or as a command. None
names an id whose vector is put or erased. Of an erasure there is a digest of all its ids together,
which shows what was carried out to whoever has the order. It hides no id from whoever has a list
that holds it: that of a single id is found by trying them all.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from backcast.errors import (
    BackcastError,
    Conflict,
    Forbidden,
    InvalidInput,
    NotFound,
    NotReady,
    OperationAbandoned,
    SnapshotMismatch,
    Unauthorized,
    VersionRetired,
)


class ActName(StrEnum):
    """What kind of act; those of operations are also the kinds of orders."""

    PROMOTE = "promote"
    REFRESH = "refresh"
    ROLLBACK = "rollback"
    CANCEL = "cancel"
    UPSERT = "upsert"
    ERASE = "erase"
    DEPRECATE = "deprecate"
    WITHDRAW_DEPRECATION = "withdraw-deprecation"
    RETIRE = "retire"
    PIN = "pin"
    CREATE_KEY = "create-key"
    ROTATE_KEY = "rotate-key"
    REVOKE_KEY = "revoke-key"
    TRAIN = "train"
    PUBLISH = "publish"
    GC = "gc"
    RESTORE = "restore"
    MOVE = "move"


VERSION, CONSUMER, KEY, OPERATION = "version", "consumer", "key", "operation"
"""What an act is done to: the first word of its target."""


class Outcome(StrEnum):
    """What became of an act: done, not allowed to be, or begun in vain."""

    SUCCEEDED = "succeeded"
    REFUSED = "refused"
    FAILED = "failed"


_REFUSALS = (
    *(InvalidInput, NotFound, Conflict, VersionRetired, SnapshotMismatch),
    *(Unauthorized, Forbidden, NotReady),
)


def judge(error: BaseException) -> tuple[Outcome, str]:
    """Return what an act came to that raised ``error``, and the code of that."""
    if isinstance(error, KeyboardInterrupt):
        return Outcome.FAILED, "interrupted"
    if not isinstance(error, BackcastError):
        return Outcome.FAILED, "unforeseen"
    refused = isinstance(error, _REFUSALS) and not isinstance(error, OperationAbandoned)
    return Outcome.REFUSED if refused else Outcome.FAILED, error.code


@dataclass(frozen=True)
class Actor:
    """Who acts: a consumer, with the prefix of its key, or ``cli:user@host`` without one."""

    name: str
    key: str | None = None


@dataclass(frozen=True)
class Act:
    """Something that is about to be done.

    Attributes:
        name: what kind of act; see ``ActName``.
        target: what it is done to, in words such as "version 3".
        reason: that was given.
        details: a few more facts, as JSON.
    """

    name: str
    target: str | None = None
    reason: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ActRecord:
    """One act in the audit log; ``outcome`` is None while it goes on, or where it was killed.

    ``operation`` is the one that does it or did it, ``code`` that of the error.
    """

    id: int
    at: datetime
    actor: str
    key: str | None
    act: str
    target: str | None
    reason: str | None
    details: Mapping[str, Any]
    outcome: Outcome | None = None
    code: str | None = None
    ended_at: datetime | None = None
    operation: str | None = None


def ordering(kind: str, order: Mapping[str, Any]) -> Act:
    """Describe an order to change what is live, from its document."""
    told = {name: value for name, value in order.items() if name not in {"version", "reason"}}
    target = f"{VERSION} {order['version']}" if "version" in order else None
    return Act(kind, target, order["reason"], told)


def cancelling(operation: str, reason: str | None) -> Act:
    """Describe that an operation is called off."""
    return Act(ActName.CANCEL, f"{OPERATION} {operation}", reason)


def training(method: str, parent: int | None, reason: str | None) -> Act:
    """Describe the training and registration of a version."""
    return Act(ActName.TRAIN, reason=reason, details={"method": method, "parent": parent})


def publishing(version: int, reason: str | None) -> Act:
    """Describe the publication of a snapshot."""
    return Act(ActName.PUBLISH, f"{VERSION} {version}", reason)


def deprecating(version: int, sunset_at: datetime, reason: str | None) -> Act:
    """Describe the announcement of a version's end."""
    return Act(
        ActName.DEPRECATE, f"{VERSION} {version}", reason, {"sunset_at": sunset_at.isoformat()}
    )


def withdrawing(version: int, reason: str | None) -> Act:
    """Describe that an announcement is taken back."""
    return Act(ActName.WITHDRAW_DEPRECATION, f"{VERSION} {version}", reason)


def retiring(version: int, force: bool, reason: str | None) -> Act:
    """Describe the end of a version."""
    return Act(ActName.RETIRE, f"{VERSION} {version}", reason, {"force": force})


def pinning(consumer: str, version: int | None, reason: str | None) -> Act:
    """Describe that a consumer gets or loses its default version."""
    return Act(ActName.PIN, f"{CONSUMER} {consumer}", reason, {"pin": version})


def upserting(counts: Mapping[str, int], reason: str | None) -> Act:
    """Describe that so many ids of each entity kind get vectors."""
    return Act(ActName.UPSERT, reason=reason, details={"ids": dict(counts)})


def erasing(entity: str, ids: Sequence[str], reason: str | None) -> Act:
    """Describe an erasure: of how many ids, and one digest of them all; see the module."""
    # Ids come as they are; whether they can be any is for the erasure to say.
    digests = sorted(hashlib.sha256(id.encode(errors="surrogatepass")).hexdigest() for id in ids)
    together = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    details = {"ids": {entity: len(ids)}, "sha256": together}
    return Act(ActName.ERASE, reason=reason, details=details)


def erasing_listed(counts: Mapping[str, int], reason: str | None) -> Act:
    """Describe the erasure of what a list names, of so many digests of each entity kind."""
    return Act(ActName.ERASE, reason=reason, details={"listed": dict(counts)})


def restoring(taken_at: datetime, erased: int | None, reason: str | None) -> Act:
    """Describe that a registry is what a backup of that moment held, but so many erased ids.

    ``erased`` is None where no list of erasures was given.
    """
    told = {} if erased is None else {"erased": erased}
    return Act(ActName.RESTORE, reason=reason, details={"backup_of": taken_at.isoformat(), **told})


def moving(reason: str | None) -> Act:
    """Describe that a registry is the copy of another."""
    return Act(ActName.MOVE, reason=reason)


def creating_key(
    consumer: str, scope: str, pin: int | None, expires_at: datetime | None, reason: str | None
) -> Act:
    """Describe the making of a key."""
    details = {"scope": scope, "pin": pin, "expires_at": expires_at and expires_at.isoformat()}
    return Act(ActName.CREATE_KEY, f"{CONSUMER} {consumer}", reason, details)


def rotating_key(prefix: str, overlap_seconds: float, reason: str | None) -> Act:
    """Describe the rotation of a key."""
    return Act(ActName.ROTATE_KEY, f"{KEY} {prefix}", reason, {"overlap_seconds": overlap_seconds})


def revoking_key(prefix: str, force: bool, reason: str | None) -> Act:
    """Describe the revocation of a key."""
    return Act(ActName.REVOKE_KEY, f"{KEY} {prefix}", reason, {"force": force})


def collecting(litter: bool, reason: str | None) -> Act:
    """Describe a collection of what nobody needs."""
    return Act(ActName.GC, reason=reason, details={"litter": litter})
