"""The JSON documents that requests carry and responses show: pydantic at the edge.

Vectors never pass through these models, which would cost more than everything else together;
``service.wire`` writes them, and the models tell OpenAPI what it writes.
"""

from collections.abc import Mapping
from dataclasses import fields
from datetime import datetime
from typing import Annotated, Any, Literal, LiteralString, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from backcast.versions import Entity, OperationState, Version, VersionState

_SNAPSHOT = "v3-20261120T091500-1f0a6c2e.0"
_OPERATION = "5f0c7b8e0d6f4d0c9a4a1b7b5c1d2e3f"
_VERSION_DESCRIPTION = (
    "The version that the vectors must be compatible with, or `live` for the latest. "
    "Without one the consumer's pin is taken; without a pin the answer is 422."
)

_DRIFT_DESCRIPTION = (
    "Also state each vector's drift bound: how far, at most, it is from the last one stored."
)
_BOUND_DESCRIPTION = "Only where `drift` was asked for: the drift bound, null where there is none."

LARGEST_VERSION = 2**31 - 1


def _whole(number: object) -> object:
    return int(number) if isinstance(number, float) and number.is_integer() else number


def in_words(words: LiteralString) -> WrapValidator:
    """Return what says in ``words`` what a value should be, and neither in rules nor in types."""

    def check(value: object, handle: ValidatorFunctionWrapHandler) -> object:
        try:
            return handle(value)
        except ValidationError as error:
            raise PydanticCustomError("not_as_described", words) from error

    return WrapValidator(check)


_NAMED = in_words("a number from 0 to 2147483647, or live")

VersionName = Annotated[Annotated[int, Field(ge=0, le=LARGEST_VERSION)] | Literal["live"], _NAMED]


def _sayable(reason: str) -> str:
    if "\0" in reason:
        raise ValueError("no database keeps a NUL")
    return reason


Reason = Annotated[str, Field(min_length=1, max_length=2000), AfterValidator(_sayable)]
"""Why something is done, in a person's words."""

KEPT = "Why; kept in the audit log."
"""What is said of a reason that goes nowhere else."""

VersionNumber = Annotated[
    StrictInt, Field(ge=0, le=LARGEST_VERSION), BeforeValidator(_whole)
]  # no text and no truth value; but to JSON, and to its schemas, 3.0 is 3
StrictVersionName = Annotated[VersionNumber | Literal["live"], _NAMED]


class Document(BaseModel):
    """Base of what is answered; built from the dataclasses inside by their attributes."""

    model_config = ConfigDict(from_attributes=True)


class RequestDocument(BaseModel):
    """Base of what is asked: a misspelt field is refused, not passed over."""

    model_config = ConfigDict(extra="forbid")


class EmbeddingQuery(RequestDocument):
    """The query of a request for one vector."""

    version: VersionName | None = Field(
        default=None, description=_VERSION_DESCRIPTION, examples=[1, "live"]
    )
    entity: Entity = Field(default=Entity.ITEM, description="What the id stands for.")
    drift: bool = Field(default=False, description=_DRIFT_DESCRIPTION)


class BatchRequest(RequestDocument):
    """A batch of ids of one entity kind."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"ids": ["B00005N7P0", "B0000AZW7F"], "version": 1, "entity": "item"}]
        }
    )

    ids: Annotated[list[str], FailFast()] = Field(
        description="Ids; order and duplicates are kept. At most BACKCAST_MAX_BATCH of them."
    )
    version: StrictVersionName | None = Field(default=None, description=_VERSION_DESCRIPTION)
    entity: Entity = Field(default=Entity.ITEM, description="What the ids stand for.")
    drift: StrictBool = Field(default=False, description=_DRIFT_DESCRIPTION)


class EmbeddingDocument(Document):
    """One vector, and what it was made from."""

    id: str = Field(examples=["B00005N7P0"])
    entity: Entity
    version: int = Field(description="The version that the vector is compatible with.")
    live_version: int = Field(description="The version whose stored vector it was made from.")
    snapshot: str = Field(description="S.d: that vector's snapshot and delta.")
    dim: int
    embedding: list[float] = Field(description="`dim` float32 numbers, exact to the last bit.")
    drift_bound: float | None = Field(default=None, description=_BOUND_DESCRIPTION)


class BatchRow(Document):
    """The answer to one id of a batch."""

    id: str
    status: Literal["ok", "missing"]
    embedding: list[float] | None
    drift_bound: float | None = Field(default=None, description=_BOUND_DESCRIPTION)


class BatchDocument(Document):
    """The vectors of a batch, in the order of its ids."""

    version: int
    live_version: int
    snapshot: str
    entity: Entity
    dim: int
    count: int = Field(description="Number of ids asked for.")
    missing: list[str] = Field(description="Ids without a vector, each once, as first seen.")
    embeddings: list[BatchRow]


class VersionDocument(Document):
    """One registered version."""

    number: int
    state: VersionState
    dim: int
    parent: int | None = Field(description="The version that this one was aligned to.")
    method: str
    until: int = Field(description="Interactions up to this time were used; Unix seconds.")
    created_at: datetime
    servable: bool = Field(description="Whether its vectors can be asked for now.")
    deprecated_at: datetime | None
    sunset_at: datetime | None
    retired_at: datetime | None
    note: str | None = Field(description="Why it is in its state, where a reason was given.")
    metrics: dict[str, Any] = Field(description="What its training measured.")

    @classmethod
    def of(cls, version: Version, *, servable: bool, **more: Any) -> Self:
        """Describe a version record; ``more`` are the fields that a subclass adds."""
        record = {field.name: getattr(version, field.name) for field in fields(version)}
        metrics = dict(version.details.get("metrics") or {})
        return cls(**record, servable=servable, metrics=metrics, **more)


class DriftDocument(Document):
    """How drift bounds are spread; figures are missing where no id has a bound."""

    known: int = Field(description="Ids that have a bound.")
    unknown: int = Field(description="Ids that have none: never stored as this version.")
    mean: float | None = None
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None


class VersionDetailDocument(VersionDocument):
    """One registered version, and how the live one leads back to it."""

    lineage: list[int] = Field(description="This version, its parent, and so on to the first.")
    gain: float | None = Field(
        description="The largest singular value of the map from the live version to this one: "
        "how much longer a vector can become. None where it is not servable, 1 for the live one."
    )
    condition: float | None = Field(
        description="That value over the smallest one; None where it is infinite or not servable."
    )
    drift: dict[Entity, DriftDocument] | None = Field(
        description="How far, at most, vectors of this version are from the last ones stored, by "
        "entity kind, as of the live snapshot's promotion. None for the live version, whose own "
        "vectors are stored, and where nothing is known."
    )


class VersionsDocument(Document):
    """Every version, and what is served now."""

    live_version: int | None
    snapshot: str | None = Field(description="S.d, None while nothing is live.")
    servable_versions: list[int]
    versions: list[VersionDocument]


class PromotionRequest(RequestDocument):
    """An order to make a version live."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"expected_live": 2, "dry_run": False}]}
    )

    expected_live: VersionNumber | None = Field(
        default=None,
        description="The version that the caller saw live, null for none. Required unless "
        "`dry_run`: a promotion rests on what was seen.",
    )
    dry_run: bool = Field(default=False, description="Run every gate and change nothing.")
    force: bool = Field(
        default=False,
        description="Promote although gates fail that may be overridden: lineage, coverage, "
        "change, metric. Needs a `reason`.",
    )
    reason: Reason | None = None
    snapshot: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Which of its snapshots; by default the newest.",
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.dry_run and not self.states_expectation:
            raise PydanticCustomError(
                "expected_live_missing", "expected_live is required; null says that nothing is live"
            )
        if self.force and self.reason is None:
            raise PydanticCustomError("reason_missing", "a forced promotion needs a reason")
        return self

    @property
    def states_expectation(self) -> bool:
        """Whether ``expected_live`` was given, be it null."""
        return "expected_live" in self.model_fields_set


class RefreshRequest(RequestDocument):
    """An order to take up the newest snapshot of the live version."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"expected_live": 2}]})

    expected_live: VersionNumber = Field(
        description="The version that the caller saw live; a refresh is of that one."
    )
    compact: bool = Field(
        default=False,
        description="First write what is live, with all its changes, as that snapshot.",
    )
    dry_run: bool = Field(default=False, description="Run every gate and change nothing.")
    reason: Reason | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.compact and self.dry_run:
            raise PydanticCustomError(
                "nothing_to_try", "a dry run writes nothing, so a compaction cannot be tried"
            )
        return self


class RollbackRequest(RequestDocument):
    """An order to go back to what was live before."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"expected_live": 3, "reason": "clicks fell by 4 %"}]}
    )

    expected_live: VersionNumber = Field(
        description="The version that the caller saw live, which is left."
    )
    dry_run: bool = Field(default=False, description="Say what would happen and change nothing.")
    reason: Reason | None = Field(
        default=None,
        description="Why; told to consumers of the version that is left. Required unless "
        "`dry_run`.",
    )
    to_snapshot: str | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="A superseded snapshot in its grace period. Without it: what was live before "
        "the live version was promoted.",
    )

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if not self.dry_run and not (self.reason and self.reason.strip()):
            raise PydanticCustomError(
                "reason_missing",
                "a rollback needs a reason, which consumers of the newer version are told",
            )
        return self


class RollbackPlanDocument(Document):
    """What a rollback would do."""

    live_version: int
    live_snapshot: str = Field(description="S.d, which is left.")
    version: int = Field(description="The version that would be live.")
    snapshot: str = Field(description="S.d, which would be live.")
    servable_versions: list[int]
    refused_versions: list[int] = Field(description="Versions that would answer 409 from then on.")
    pinned_consumers: list[str] = Field(description="Consumers whose pin is one of those.")
    lost_ids: dict[Entity, list[str]] = Field(
        description="Ids upserted since the promotion that the older snapshot lacks: they would "
        "answer 404."
    )
    grace_left_seconds: float = Field(description="How long the older snapshot is sure to stay.")
    loaded: bool = Field(description="The store has it: the rollback is one switch.")


class GateDocument(Document):
    """One check before a promotion, with what it found."""

    name: str
    passed: bool
    finding: str
    figure: float | None = Field(default=None, description="What was measured, if anything.")
    threshold: float | None = Field(default=None, description="What it is held to, if a number.")


class SpreadDocument(Document):
    """How numbers are spread: mean and max exactly, percentiles to half a percent."""

    mean: float
    p50: float
    p95: float
    p99: float
    max: float


class TurnDocument(Document):
    """Cosines between vectors before and after; 5 % are below `p05`."""

    mean: float
    p05: float
    min: float


class MoverDocument(Document):
    """One id, and how its vector changes."""

    id: str
    absolute: float
    relative: float
    cosine: float


class ChangeDocument(Document):
    """How the vectors of one version and one entity kind change."""

    compared: int
    without_length: int = Field(description="Zero vectors: no relative change, or no cosine.")
    not_finite: int = Field(description="Products that overflow; they are in no other figure.")
    absolute: SpreadDocument | None = Field(description="Of ‖after - before‖.")
    relative: SpreadDocument | None = Field(description="Of ‖after - before‖ / ‖before‖.")
    cosine: TurnDocument | None
    most_changed: list[MoverDocument] = Field(description="By relative change, most first.")


class TargetDiffDocument(Document):
    """What the consumers of one version would see change."""

    version: int
    gain: float = Field(description="The largest singular value of the candidate's map to it.")
    condition: float | None = Field(description="That over the smallest; null where infinite.")
    entities: dict[Entity, ChangeDocument]


class OverlapDocument(Document):
    """Ids of one entity kind: live, in the candidate, in both; the first 20 others by name."""

    before: int
    after: int
    compared: int
    gained: int
    lost: int
    gained_ids: list[str]
    lost_ids: list[str]


class DiffDocument(Document):
    """What a promotion changes, for every version that both sides serve."""

    version: int
    snapshot: str
    live_version: int
    baseline: str = Field(description="S.d that it was compared with.")
    ids: dict[Entity, OverlapDocument]
    versions: list[TargetDiffDocument]


class PlanDocument(Document):
    """What a promotion would do, and whether its gates let it."""

    version: int
    snapshot: str
    live_version: int | None
    servable_versions: list[int]
    gates: list[GateDocument]
    passed: bool
    diff: DiffDocument | None = Field(description="Null where nothing was live to compare with.")


class CancellationRequest(RequestDocument):
    """An order to call an operation off."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "roll back first"}]})

    reason: Reason | None = Field(default=None, description="Why; kept with the operation.")


class OperationDocument(Document):
    """A long-running act."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": _OPERATION,
                    "kind": "promote",
                    "state": "running",
                    "progress": 0.2,
                    "step": "load",
                    "request": {"version": 3, "expected_live": 2, "force": False, "reason": None},
                    "result": None,
                    "error": None,
                    "actor": "embedding-team",
                    "owner": "replica on embeddings-1:17:9f03c1",
                    "resumable": True,
                    "heartbeat_at": "2026-11-20T09:20:31Z",
                    "created_at": "2026-11-20T09:20:00Z",
                    "finished_at": None,
                }
            ]
        }
    )

    id: str
    kind: str
    state: OperationState
    progress: float = Field(description="The fraction that is done, 0 to 1.")
    step: str
    request: Mapping[str, Any]
    result: Mapping[str, Any] | None
    error: Mapping[str, Any] | None = Field(
        description="Code, message and data of the error that ended it."
    )
    actor: str
    owner: str | None = Field(
        description="Who runs it, or ran it last; None where a replica that stops has handed it "
        "back, for another to carry on."
    )
    resumable: bool = Field(description="Whether a replica carries it on if its owner dies.")
    heartbeat_at: datetime | None = Field(
        description="When its owner last gave a sign of life, by that host's clock; only to look "
        "at, nothing is decided by it."
    )
    created_at: datetime
    finished_at: datetime | None


class OperationsDocument(Document):
    """Operations, newest first."""

    operations: list[OperationDocument]


class DeploymentDocument(Document):
    """One change of what is live."""

    generation: int
    kind: Literal["promote", "rollback", "refresh"]
    version: int
    snapshot: str
    delta: int = Field(description="The last delta on `snapshot` when it went live.")
    from_version: int | None
    from_snapshot: str | None
    from_delta: int | None
    actor: str
    reason: str | None
    forced: bool
    gates: Mapping[str, Any] = Field(description="What each gate found.")
    operation: str | None
    created_at: datetime


class DeploymentDetailDocument(DeploymentDocument):
    """One change of what is live, and what it changed for the consumers of each version."""

    diff: DiffDocument | None = Field(description="Null where nothing was compared.")


class DeploymentsDocument(Document):
    """Every change of what is live, newest first."""

    deployments: list[DeploymentDocument]


class ReadyDocument(Document):
    """What the replica serves."""

    live_version: int
    snapshot: str = Field(examples=[_SNAPSHOT])


class AliveDocument(Document):
    """The replica answers."""

    status: Literal["ok"] = "ok"


class ProblemDocument(BaseModel):
    """An error, after RFC 9457. Further members hold the facts that the detail names."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:backcast:problem:version-retired",
                    "title": "Version retired",
                    "status": 410,
                    "detail": "Version 0 is retired; versions [1, 2, 3] can be served.",
                    "instance": "/embeddings/B00005N7P0",
                    "request_id": "5f0c7b8e1a2b-7",
                    "version": 0,
                    "servable_versions": [1, 2, 3],
                }
            ]
        },
    )

    type: str = Field(description="`urn:backcast:problem:` and a stable code.")
    title: str
    status: int
    detail: str
    instance: str
    request_id: str = Field(description="`X-Request-Id` of the answer; log lines name it.")
