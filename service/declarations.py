"""What OpenAPI is told of: who may call, problem documents, and what the vector endpoints read
and write for themselves.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi.security import HTTPBearer
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service import problems
from service.documents import (
    BatchRequest,
    Document,
    EmbeddingQuery,
    ProblemDocument,
    RequestDocument,
)
from service.documents_changes import EraseRequest, UpsertQuery, UpsertRequest
from service.requests import EXPECT_SNAPSHOT
from service.wire import Format

Responses = dict[int | str, dict[str, Any]]

KEY = HTTPBearer(
    scheme_name="key",
    description="An API key, made by `backcast keys create`; its scope is read or admin.",
    auto_error=False,
)
"""Declares the scheme only: ``service.requests`` reads the header, so that errors are problems."""

_REFERENCE = "#/components/schemas/{model}"
_HEADERS = {
    "Backcast-Version": "The version that the vectors are compatible with.",
    "Backcast-Live-Version": "The version whose stored vectors they were made from.",
    "Backcast-Snapshot": "S.d: the snapshot and delta that they were made from.",
    "Backcast-Dim": "The length of each vector.",
    "Backcast-Shape": "Raw float32 only: `N,D` of a batch, `D` of one vector.",
    "X-Request-Id": "The caller's, else a new one; every answer of the service has one.",
    "Deprecation": "The version is deprecated since then (RFC 9745).",
    "Sunset": "The version may be retired from then on (RFC 8594).",
    "Link": "Of a deprecated version: `deprecation` tells of it, `successor-version` what to use.",
}
_MEANINGS = {
    401: "No key, or none that is in force.",
    403: "The key's scope does not reach this far.",
    404: "What was named does not exist.",
    406: "None of the formats is accepted.",
    408: "The body did not come in time.",
    409: "The present state does not allow it.",
    410: "The version is retired.",
    412: "The expected snapshot is not served (any more).",
    413: "More than one request may carry.",
    415: "A body is of another media type than those that are read.",
    422: "The request breaks a stated rule.",
    429: "The consumer asks for more than its rate.",
    503: "Nothing is live yet, a part that is needed does not answer, or there is too much to do.",
}
_RETRY_AFTER = {
    "Retry-After": {
        "description": "Seconds until it may be asked again.",
        "schema": {"type": "integer"},
    }
}
_BATCH_HEADERS = {"Backcast-Missing": "How many of the ids have no vector."}
_ONE_HEADERS = {
    "Backcast-Drift-Bound": "Where `drift` was asked for: the vector's drift bound, or `unknown`.",
    "ETag": "Of entity, id, version, snapshot and media type, for If-None-Match.",
}


def problem_responses(*statuses: int) -> Responses:
    """Declare problem documents with these status codes."""
    return {
        status: {
            "description": _MEANINGS[status],
            "content": {problems.MEDIA_TYPE: {"schema": _reference(ProblemDocument)}},
            **({"headers": _RETRY_AFTER} if status in {429, 503} else {}),
        }
        for status in statuses
    }


def one_vector(document: type[BaseModel], example: dict[str, Any]) -> Responses:
    """Declare the answer to a request for one vector."""
    raw = "D float32 numbers, little-endian."
    return {
        200: _vectors(document, example, {**_HEADERS, **_ONE_HEADERS}, raw),
        304: {"description": "The client's copy is current."},
    }


def many_vectors(document: type[BaseModel], example: dict[str, Any]) -> Responses:
    """Declare the answer to a batch."""
    raw = "N × D float32 numbers, little-endian, row by row; NaN where an id has no vector."
    return {200: _vectors(document, example, {**_HEADERS, **_BATCH_HEADERS}, raw)}


def one_request() -> dict[str, Any]:
    """Declare what the endpoint for one vector reads."""
    id = {
        "name": "id",
        "in": "path",
        "required": True,
        "description": "The id, percent-encoded; slashes may stay as they are.",
        "schema": {"type": "string", "minLength": 1},
        "example": "B00005N7P0",
    }
    unchanged = _header("If-None-Match", "ETags of copies that the client holds.", 'W/"5f0c7b8e"')
    return {
        "parameters": [
            id,
            *_query(EmbeddingQuery),
            _expect_snapshot(),
            unchanged,
        ],
        **_keyed(),
    }


def batch_request() -> dict[str, Any]:
    """Declare what the batch endpoint reads."""
    arrow = "One column of text, `id`, without nulls; buffers not compressed."
    content = {
        Format.JSON.value: {"schema": _reference(BatchRequest)},
        Format.ARROW.value: {"schema": _binary(arrow)},
    }
    return {
        "parameters": [*_beside_arrow(EmbeddingQuery), _expect_snapshot()],
        "requestBody": {"required": True, "content": content},
        **_keyed(),
    }


def upsert_request() -> dict[str, Any]:
    """Declare what the endpoint for upserts reads."""
    arrow = (
        "Columns `id` of text and `vector` of fixed_size_list<float32>[D], without nulls; "
        "buffers not compressed."
    )
    content = {
        Format.JSON.value: {"schema": _reference(UpsertRequest)},
        Format.ARROW.value: {"schema": _binary(arrow)},
    }
    return {
        "parameters": _beside_arrow(UpsertQuery),
        "requestBody": {"required": True, "content": content},
    }


def erase_request() -> dict[str, Any]:
    """Declare what the endpoint for erasures reads."""
    content = {Format.JSON.value: {"schema": _reference(EraseRequest)}}
    return {"requestBody": {"required": True, "content": content}}


def component_schemas() -> dict[str, Any]:
    """Return the schemas that the declarations above refer to and FastAPI does not see."""
    _, schemas = models_json_schema(
        [
            (ProblemDocument, "serialization"),
            (BatchRequest, "validation"),
            (UpsertRequest, "validation"),
            (EraseRequest, "validation"),
        ],
        ref_template=_REFERENCE,
    )
    components: dict[str, Any] = schemas["$defs"]
    return components


def restore_nulls(document: dict[str, Any], batches: Mapping[str, Any]) -> None:
    """Put the nulls back into the examples of ``document``: FastAPI has left them out.

    ``batches`` are the examples of answers to a batch, by path.
    """
    schemas = document["components"]["schemas"]
    for model in (*_family(Document), *_family(RequestDocument)):
        more = model.model_config.get("json_schema_extra")
        if isinstance(more, dict) and model.__name__ in schemas:
            schemas[model.__name__].update(more)
    for path, example in batches.items():
        answer = document["paths"][path]["post"]["responses"]["200"]
        answer["content"][Format.JSON.value]["example"] = example


def _family(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for child in model.__subclasses__():
        yield from _family(child)


def _vectors(
    document: type[BaseModel], example: dict[str, Any], headers: dict[str, str], raw: str
) -> dict[str, Any]:
    arrow = "Columns id, status and vector: fixed_size_list<float32>[D], null where missing."
    return {
        "description": "Vectors in the format that the client accepts.",
        "model": document,
        "headers": {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in headers.items()
        },
        "content": {
            Format.JSON.value: {"example": example},
            Format.ARROW.value: {"schema": _binary(arrow)},
            Format.RAW.value: {"schema": _binary(raw)},
        },
    }


def _expect_snapshot() -> dict[str, Any]:
    return _header(
        EXPECT_SNAPSHOT,
        "S or S.d: answer from this snapshot or with 412. A superseded one is served during its "
        "grace period.",
        "v3-20261120T091500-1f0a6c2e.0",
    )


def _beside_arrow(model: type[BaseModel]) -> list[dict[str, Any]]:
    said = "Beside a body in Arrow only; one in JSON says it itself."
    return [{**parameter, "description": said} for parameter in _query(model)]


def _query(model: type[BaseModel]) -> list[dict[str, Any]]:
    properties = model.model_json_schema(ref_template=_REFERENCE)["properties"]
    return [{"name": name, "in": "query", "schema": schema} for name, schema in properties.items()]


def _header(name: str, description: str, example: str) -> dict[str, Any]:
    return {
        "name": name,
        "in": "header",
        "description": description,
        "schema": {"type": "string"},
        "example": example,
    }


def _keyed() -> dict[str, Any]:
    return {"security": [{KEY.scheme_name: []}]}


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(model=model.__name__)}


def _binary(description: str) -> dict[str, str]:
    return {"type": "string", "format": "binary", "description": description}
