"""The OpenAPI document is complete, and the one in docs/ is this one."""

import json
from pathlib import Path
from typing import Any

import pytest

from service.documents import BatchDocument
from service.openapi import render
from service.problems import HTTP_CODES, STATUS
from service.wire import Format

COPY = Path(__file__).parents[3] / "docs" / "openapi.json"
DOCUMENT: dict[str, Any] = json.loads(render())
OPERATIONS = [
    pytest.param(path, operation, id=operation["operationId"])
    for path, methods in DOCUMENT["paths"].items()
    for operation in methods.values()
]
OPEN = {"/livez", "/readyz", "/metrics"}


def test_copy_in_docs_is_current() -> None:
    assert COPY.read_bytes() == render(), (
        "The API is not what docs/openapi.json says. If that is meant, write it anew: "
        "python -m service.openapi > docs/openapi.json"
    )


@pytest.mark.parametrize(("path", "operation"), OPERATIONS)
def test_operation_is_described(path: str, operation: dict[str, Any]) -> None:
    assert operation["summary"]
    assert operation["description"]
    assert operation["tags"]
    assert ("security" in operation) == (path not in OPEN)
    if path not in OPEN:
        assert operation["security"] == [{"key": []}]
        assert {"401", "403", "503"} <= set(operation["responses"])
    for parameter in operation.get("parameters", []):
        assert (
            parameter.get("description")
            or parameter["schema"].get("description")
            or (parameter["in"] == "path")
        )


@pytest.mark.parametrize(("path", "operation"), OPERATIONS)
def test_errors_are_problems(path: str, operation: dict[str, Any]) -> None:
    for status, response in operation["responses"].items():
        if int(status) >= 400:
            assert response["content"] == {
                "application/problem+json": {
                    "schema": {"$ref": "#/components/schemas/ProblemDocument"}
                }
            }, path


@pytest.mark.parametrize(
    ("path", "method"), [("/embeddings/{id}", "get"), ("/embeddings/batch", "post")]
)
def test_vectors_come_in_every_format(path: str, method: str) -> None:
    operation = DOCUMENT["paths"][path][method]
    answer = operation["responses"]["200"]
    assert set(answer["content"]) == set(Format)
    assert answer["content"][Format.JSON]["example"]["embeddings" if method == "post" else "id"]
    names = {parameter["name"] for parameter in operation["parameters"]}
    assert "Backcast-Expect-Snapshot" in names
    assert method == "post" or {"id", "version", "entity"} <= names


def test_every_reference_leads_somewhere() -> None:
    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            own = {node["$ref"]} if "$ref" in node else set()
            return own.union(*(references(child) for child in node.values()))
        if isinstance(node, list):
            return set().union(*(references(child) for child in node))
        return set()

    known = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}
    assert references(DOCUMENT) <= known
    assert "HTTPValidationError" not in DOCUMENT["components"]["schemas"]


def test_scheme_is_a_bearer_key() -> None:
    scheme = DOCUMENT["components"]["securitySchemes"]["key"]
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")


def test_examples_show_null_where_the_service_sends_it() -> None:
    answer = DOCUMENT["paths"]["/embeddings/batch"]["post"]["responses"]["200"]
    example = answer["content"][Format.JSON]["example"]
    assert example["embeddings"][1] == {"id": "B0000AZW7F", "status": "missing", "embedding": None}
    BatchDocument.model_validate(example)
    schemas = DOCUMENT["components"]["schemas"]
    (operation,) = schemas["OperationDocument"]["examples"]
    assert {"result", "error", "finished_at"} <= set(operation)
    assert schemas["PinRequest"]["examples"] == [{"pin": 2}, {"pin": None}]


def test_examples_are_what_they_are_examples_of() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        for example in schema.get("examples", ()):
            missing = set(schema.get("required", ())) - set(example)
            assert not missing, name


def test_what_any_call_may_be_answered_with_is_said() -> None:
    promised = {status for c in OPERATIONS for status in c.values[1]["responses"]}  # type: ignore[index]
    unsaid = {f"{status}" for status in [*STATUS.values(), *HTTP_CODES]} - promised
    assert unsaid == {"400", "405", "431", "500"}
    for status in unsaid - {"405"}:
        assert status in DOCUMENT["info"]["description"]
