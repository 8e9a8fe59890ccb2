"""Everything that the OpenAPI document promises, tried by schemathesis: all phases, all checks."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import schemathesis
from hypothesis import strategies as st
from schemathesis.checks import CHECKS
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import Status, events, from_schema
from schemathesis.engine.recorder import ScenarioRecorder

from service.wire import Format
from tests.fuzz.world import DIM, IDS

DOCUMENT = Path(__file__).parents[2] / "docs" / "openapi.json"

# Of a request that is well formed the document says that the state may not allow it (409), that a
# version is over (410), or that a snapshot or a format is not to be had (412, 406).
_REFUSED = ["401", "403", "404", "406", "409", "410", "412", "429"]
_MALFORMED = ["400", "413", "415", "422", "405"]

_IN_WORDS = frozenset(
    {"reason_missing", "expected_live_missing", "nothing_to_try", "arrow_invalid"}
)
"""Rules of two fields together, and of a stream's columns: the document tells them in words."""


@dataclass
class Tally:
    """What was tried: responses by operation and by status, checks by name, and what failed."""

    operations: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    checks: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    def add(self, recorder: ScenarioRecorder) -> None:
        """Count one scenario."""
        for case, interaction in recorder.interactions.items():
            self.operations[recorder.cases[case].value.operation.label] += 1
            if interaction.response is not None:
                self.statuses[interaction.response.status_code] += 1
        for case, checks in recorder.checks.items():
            for check in checks:
                self.checks[check.name] += 1
                if check.status is not Status.SUCCESS:
                    label = recorder.cases[case].value.operation.label
                    self.failures.setdefault(f"{label}: {check.name}", _told(check))


def fuzz(
    url: str, key: str | None, *, examples: int, seconds: int | None = None, seed: int | None = None
) -> Tally:
    """Try the document on the service at ``url``, for so many seconds where they are given."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    config = SchemathesisConfig.from_dict(
        {
            "headers": headers,
            "continue-on-failure": True,
            "generation": {"max-examples": examples, "database": "none"},
            "checks": {
                "positive_data_acceptance": {"expected-statuses": ["2xx", "3xx", *_REFUSED]},
                "negative_data_rejection": {"expected-statuses": [*_REFUSED, *_MALFORMED]},
            },
            **({} if seconds is None else {"max-time": seconds}),
            **({} if seed is None else {"seed": seed}),
        }
    )
    schema = schemathesis.openapi.from_path(DOCUMENT, config=config)
    schema.config.update(base_url=url)
    schema.hook(filter_failure)
    tally = Tally()
    for event in from_schema(schema).execute():
        match event:
            case events.ScenarioFinished():
                tally.add(event.recorder)
            case events.NonFatalError():
                tally.errors.append(f"{event.label}: {event.info.format()}")
            case events.FatalError():
                raise event.exception
    return tally


def filter_failure(_context: Any, failure: Any, case: Any, response: Any) -> bool:
    """Return whether a failure is one, and not what a schema cannot say."""
    match type(failure).__name__:
        case "RejectedPositiveData" if response.status_code == 422:
            found = orjson.loads(response.content).get("errors", [])
            return not all(map(_is_beyond_the_schema, found))
        case "AllowHeaderMismatch":  # of the id "batch" there may be a vector
            return bool(case.operation.path != "/embeddings/batch")
    return True


def _is_beyond_the_schema(error: Mapping[str, Any]) -> bool:
    beside_json = error["loc"][0] == "query" and error["type"] == "extra_forbidden"
    return beside_json or error["type"] in _IN_WORDS


def operations() -> set[str]:
    """Return what the document describes."""
    paths: dict[str, dict[str, Any]] = orjson.loads(DOCUMENT.read_bytes())["paths"]
    return {f"{method.upper()} {path}" for path, item in paths.items() for method in item}


def all_checks() -> set[str]:
    """Return the names of all checks that schemathesis has."""
    return set(CHECKS.get_all_names())


def _told(check: Any) -> str:
    info = check.failure_info
    return "the check itself failed" if info is None else f"{info.failure}\n{info.code_sample}"


@st.composite
def _streams(draw: st.DrawFn) -> bytes:
    """Arrow streams of ids, of known ones too; some with vectors of the live version."""
    ids = draw(st.lists(st.sampled_from(IDS) | st.text(st.characters(codec="utf-8")), max_size=5))
    columns: dict[str, Any] = {"id": pa.array(ids, pa.string())}
    if draw(st.booleans()):
        columns["vector"] = pa.array([[0.5] * DIM] * len(ids), pa.list_(pa.float32(), DIM))
    batch = pa.record_batch(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


schemathesis.openapi.media_type(Format.ARROW.value, _streams())
