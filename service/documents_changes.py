"""The documents of upserts and erasures."""

from datetime import datetime
from typing import Annotated

from pydantic import ConfigDict, FailFast, Field, Strict, WithJsonSchema

from backcast.vectors import MAX_ID_BYTES
from backcast.versions import Entity
from service.documents import (
    KEPT,
    LARGEST_VERSION,
    Document,
    Reason,
    RequestDocument,
    VersionNumber,
)

_SNAPSHOT = "v3-20261120T091500-1f0a6c2e"
_EXPECTED = "The version whose model made the vectors; refused unless it is live. Better given."

Number = Annotated[float, Strict()]

# Declared only: ``check_id`` counts bytes, and says which id it is.
_Id = Annotated[str, WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_ID_BYTES})]


class UpsertQuery(RequestDocument):
    """The query beside an Arrow stream of ids and vectors."""

    entity: Entity = Field(default=Entity.ITEM, description="What the ids stand for.")
    expected_live: Annotated[int, Field(ge=0, le=LARGEST_VERSION)] | None = Field(
        default=None, description=_EXPECTED
    )
    reason: Reason | None = Field(default=None, description=KEPT)


class UpsertRequest(RequestDocument):
    """New vectors of ids of one entity kind."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "ids": ["B00005N7P0"],
                    "vectors": [[0.12, -0.5, 0.25, 1.75]],
                    "entity": "item",
                    "expected_live": 3,
                }
            ]
        }
    )

    ids: Annotated[list[_Id], FailFast()] = Field(
        description="Different ids, known or new. At most BACKCAST_MAX_BATCH of them."
    )
    vectors: Annotated[list[Annotated[list[Number], FailFast()]], FailFast()] = Field(
        description="One vector of the live version for each id, in their order; finite numbers."
    )
    entity: Entity = Field(default=Entity.ITEM, description="What the ids stand for.")
    expected_live: VersionNumber | None = Field(default=None, description=_EXPECTED)
    reason: Reason | None = Field(default=None, description=KEPT)


class EraseRequest(RequestDocument):
    """Ids of one entity kind that shall have no vector any more."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"ids": ["A1KLRMWW2FWPL4"], "entity": "user"}]}
    )

    ids: Annotated[list[_Id], FailFast()] = Field(
        description="Different ids, known or not. At most BACKCAST_MAX_BATCH of them."
    )
    entity: Entity = Field(default=Entity.ITEM, description="What the ids stand for.")
    reason: Reason | None = Field(default=None, description=KEPT)


class UpsertDocument(Document):
    """What is live with the new vectors."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"snapshot": f"{_SNAPSHOT}.1", "live_version": 3, "entity": "item", "upserted": 1}
            ]
        }
    )

    snapshot: str = Field(description="S.d: the snapshot, and the delta that this is.")
    live_version: int
    entity: Entity
    upserted: int = Field(description="How many ids have a new vector.")


class HolderDocument(Document):
    """Files that still hold an erased id or its vector; no answer is made from them."""

    what: str = Field(description="`snapshot`, `deltas` (the changes on it) or `data set`.")
    name: str = Field(description="The snapshot's id, or the data set's folder.")
    version: int | None
    state: str | None = Field(
        description="Of a snapshot: `live`, `superseded`, `published` or `condemned`."
    )
    places: list[str] = Field(description="`artifacts`, `store`, or both.")
    ids: int | None = Field(description="How many of the erased ids; null where not looked at.")
    until: datetime | None = Field(description="When the files go by themselves, if they do.")
    mend: str = Field(description="What makes them go.")


class ErasureDocument(Document):
    """What an erasure did, and what it could not do at once."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "entity": "user",
                    "erased": 1,
                    "snapshot": f"{_SNAPSHOT}.2",
                    "live_version": 3,
                    "unknown": [],
                    "held_by": [
                        {
                            "what": "snapshot",
                            "name": _SNAPSHOT,
                            "version": 3,
                            "state": "live",
                            "places": ["artifacts", "store"],
                            "ids": 1,
                            "until": None,
                            "mend": "backcast refresh --compact",
                        }
                    ],
                }
            ]
        }
    )

    entity: Entity
    erased: int = Field(description="How many ids have no vector from now on.")
    snapshot: str | None = Field(description="S.d: what is live without them, if anything is.")
    live_version: int | None
    unknown: list[str] = Field(description="Ids that no snapshot and no delta holds.")
    held_by: list[HolderDocument]
