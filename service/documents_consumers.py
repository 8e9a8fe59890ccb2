"""The JSON documents about versions' ends, consumers and usage."""

from datetime import date, datetime
from typing import Annotated, Self

from pydantic import AwareDatetime, ConfigDict, Field, StrictBool, model_validator
from pydantic_core import PydanticCustomError

from backcast.versions import VersionState
from service.documents import (
    KEPT,
    LARGEST_VERSION,
    Document,
    Reason,
    RequestDocument,
    VersionNumber,
)

_PIN = "The version that requests without one are answered with; null for none."


class DeprecationRequest(RequestDocument):
    """An announcement that a version will not be served for ever."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"sunset_at": "2027-01-31T00:00:00Z", "reason": "use version 3"}]
        }
    )

    sunset_at: AwareDatetime = Field(
        description="The version is served at least until then; with a zone, and to come."
    )
    reason: Reason | None = Field(default=None, description="Why, or what to use instead.")


class WithdrawalQuery(RequestDocument):
    """What is said of a withdrawal: it has no body."""

    reason: Reason | None = Field(default=None, description=KEPT)


class RetirementRequest(RequestDocument):
    """An order to stop serving a version."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"force": False}]})

    force: StrictBool = Field(
        default=False,
        description="Retire it although somebody is pinned to it, used it lately or was promised "
        "more time. Needs a `reason`.",
    )
    reason: Reason | None = Field(default=None, description="Why; its consumers are told.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.force and self.reason is None:
            raise PydanticCustomError("reason_missing", "a forced retirement needs a reason")
        return self


class EndingDocument(Document):
    """How far the end of a version is."""

    number: int
    state: VersionState
    deprecated_at: datetime | None
    sunset_at: datetime | None
    retired_at: datetime | None
    note: str | None = Field(description="The reason that was given.")


class PinRequest(RequestDocument):
    """A consumer's default version to be."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"pin": 2}, {"pin": None}]})

    pin: VersionNumber | None = Field(description=_PIN)
    reason: Reason | None = Field(default=None, description=KEPT)


class PinDocument(Document):
    """A consumer's default version."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"pin": 2}]})

    pin: int | None = Field(description=_PIN)


class ConsumerDocument(Document):
    """Who holds keys, and its default version."""

    name: str
    pin: int | None
    keys_in_force: int
    last_used: date | None = Field(description="The last UTC day with a counted request.")
    created_at: datetime


class ConsumersDocument(Document):
    """Every consumer, by name."""

    consumers: list[ConsumerDocument]


class UseDocument(Document):
    """What one consumer asked of one version on one UTC day."""

    consumer: str = Field(description="`(anonymous)` stands for callers without a key.")
    version: int
    day: date
    requests: int = Field(description="Answered requests, 304 included.")
    vectors: int = Field(description="Vectors that were found for them.")


class UsageQuery(RequestDocument):
    """Which usage is asked for."""

    version: Annotated[int, Field(ge=0, le=LARGEST_VERSION)] | None = Field(
        default=None, description="Of this version only."
    )
    days: int = Field(
        default=30, ge=1, le=36_500, description="How many days back, today included."
    )


class UsageDocument(Document):
    """Usage by consumer, version and UTC day, newest day first."""

    since: date
    usage: list[UseDocument]
