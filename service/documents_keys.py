"""The JSON documents about keys and the audit log."""

from datetime import datetime
from typing import Any, Self

from pydantic import (
    AwareDatetime,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    model_validator,
)
from pydantic_core import PydanticCustomError

from backcast.acts import Outcome
from backcast.versions import Key, KeyState, Scope
from service.documents import (
    KEPT,
    LARGEST_VERSION,
    Document,
    Reason,
    RequestDocument,
    VersionNumber,
)

_SECONDS_OF_A_DAY = 86_400
_SECRET = "bc_1a2b3c4d_ZS1rtRZTBKzrNQS8zPfKUpVGCbUVIn7mUwdLuj1dyvM"
_KEY: dict[str, JsonValue] = {
    "prefix": "1a2b3c4d",
    "consumer": "ranking",
    "scope": "read",
    "pin": 2,
    "state": "in force",
    "created_at": "2026-11-20T09:15:00Z",
    "expires_at": "2027-02-20T00:00:00Z",
    "revoked_at": None,
    "successor": None,
}


class KeyRequest(RequestDocument):
    """A key to be made."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"consumer": "ranking", "scope": "read", "expires_at": "2027-02-20T00:00:00Z"}
            ]
        }
    )

    consumer: str = Field(
        description="Who will use it: 1 to 128 characters that print, with no blank at an end."
    )
    scope: Scope = Field(default=Scope.READ, description="What it may do; `admin` includes `read`.")
    pin: VersionNumber | None = Field(
        default=None,
        description="The version that a new consumer gets, with any of its keys, when it names "
        "none.",
    )
    expires_at: AwareDatetime | None = Field(
        default=None, description="With a zone, and to come; null for never."
    )
    reason: Reason | None = Field(default=None, description=KEPT)


class RotationRequest(RequestDocument):
    """A key to be replaced by another."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"overlap_seconds": 86_400}]})

    overlap_seconds: float = Field(
        default=_SECONDS_OF_A_DAY,
        ge=0,
        le=36_500 * _SECONDS_OF_A_DAY,
        allow_inf_nan=False,
        description="How long the old key is in force yet; 0 revokes it.",
    )
    expires_at: AwareDatetime | None = Field(
        default=None,
        description="When the new key expires; null: it lives as long as the old was made to.",
    )
    reason: Reason | None = Field(default=None, description=KEPT)


class RevocationRequest(RequestDocument):
    """A key to be ended at once."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "left the team"}]})

    force: StrictBool = Field(
        default=False,
        description="Revoke the last key in force with scope admin too. Needs a `reason`.",
    )
    reason: Reason | None = Field(default=None, description=KEPT)

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.force and self.reason is None:
            raise PydanticCustomError("reason_missing", "a forced revocation needs a reason")
        return self


class KeyDocument(Document):
    """A key, without its secret, which nobody keeps."""

    model_config = ConfigDict(json_schema_extra={"examples": [_KEY]})

    prefix: str = Field(description="What the key is named by, and begins with after `bc_`.")
    consumer: str
    scope: Scope
    pin: int | None = Field(description="The default version of the consumer.")
    state: KeyState
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    successor: str | None = Field(description="The prefix of the key that it was rotated to.")

    @classmethod
    def of(cls, key: Key, now: datetime) -> Self:
        """Describe a key as it is at ``now``."""
        names = [name for name in KeyDocument.model_fields if name != "state"]
        return cls(**{name: getattr(key, name) for name in names}, state=key.state(now))


class KeysDocument(Document):
    """Every key, oldest first."""

    keys: list[KeyDocument]


class NewKeyDocument(KeyDocument):
    """A key that was just made, and its secret."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"key": _SECRET, **_KEY}]})

    key: str = Field(description="What `Authorization: Bearer` takes; shown now and never again.")


class ActDocument(Document):
    """Who did what, when and why, and what became of it."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": 17,
                    "at": "2026-11-20T09:15:00Z",
                    "actor": "platform",
                    "key": "1a2b3c4d",
                    "act": "promote",
                    "target": "version 3",
                    "reason": "the holdout is small",
                    "details": {
                        "force": True,
                        "expected_live": 2,
                        "live_version": 3,
                        "snapshot": "v3-20261120T091500-1f0a6c2e.0",
                    },
                    "outcome": "succeeded",
                    "code": None,
                    "ended_at": "2026-11-20T09:15:07Z",
                    "operation": "5f0c7b8e0d6f4d0c9a4a1b7b5c1d2e3f",
                }
            ]
        }
    )

    id: int = Field(description="A later act has a larger one.")
    at: datetime = Field(description="When it was begun, by the clock of the registry's database.")
    actor: str = Field(description="A consumer, or `cli:user@host` of a command.")
    key: str | None = Field(description="The prefix of the consumer's key; null of a command.")
    act: str
    target: str | None = Field(description="What it was done to.")
    reason: str | None
    details: dict[str, Any] = Field(description="A few more facts; never an id or a secret.")
    outcome: Outcome | None = Field(
        description="Null while it goes on, or where its process was killed."
    )
    code: str | None = Field(description="That of the problem, unless it succeeded.")
    ended_at: datetime | None
    operation: str | None = Field(description="The operation that does it or did it.")


class ActsDocument(Document):
    """Acts, newest first."""

    acts: list[ActDocument]


class ActsQuery(RequestDocument):
    """Which acts are asked for."""

    limit: int = Field(default=100, ge=1, le=1000, description="At most so many.")
    before: int | None = Field(
        default=None,
        ge=1,
        le=LARGEST_VERSION,
        description="Only acts before this one: the `id` of the last that was read.",
    )
