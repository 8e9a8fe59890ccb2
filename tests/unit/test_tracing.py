"""Traces: nothing where they are off, a clear word where they cannot be, and never a message."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from backcast.errors import ConfigError, UnknownId
from backcast.registry.schema import make_engine
from backcast.settings import Settings
from backcast.tracing import NO_TRACES, Steps, open_tracing
from backcast.versions import Entity
from service.engine import ServedMap
from service.routes import embeddings
from service.tracing import stages_recorded
from tests.collector import Collector, collecting
from tests.servers import free_port

ON = Settings(traces="otlp")


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that is sent what is recorded when tracing is closed."""
    for name in ("OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"):
        monkeypatch.delenv(name, raising=False)
    with collecting() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.url)
        yield running


@pytest.mark.parametrize("module", ["service.app", "backcast.lifecycle", "backcast.cli"])
def test_off_nothing_is_imported(module: str) -> None:
    program = f"import sys, {module}; print('backcast.otel' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout == "False\n", ended.stderr


def test_off_the_stages_are_as_they_are() -> None:
    before = ServedMap.__call__, vars(embeddings)["encode_one"]
    with stages_recorded(NO_TRACES):
        assert (ServedMap.__call__, vars(embeddings)["encode_one"]) == before
    with open_tracing(Settings()) as tracing:
        assert tracing is NO_TRACES
        assert tracing.measured("stage", len, lambda _: {}) is len


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "backcast.otel", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with (
        pytest.raises(ConfigError, match=r"BACKCAST_TRACES=otlp .*'backcast\[otel\]'"),
        open_tracing(ON),
    ):
        pass


@pytest.mark.parametrize(
    "name", ["OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"]
)
def test_another_protocol_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "grpc")
    with pytest.raises(ConfigError, match=rf"{name}=grpc: .* http/protobuf"), open_tracing(ON):
        pass


def test_a_wrong_standard_variable_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "0")
    with pytest.raises(ConfigError, match=r"OTEL_.* max_queue_size must be"), open_tracing(ON):
        pass


def test_an_operation_is_a_trace_of_its_steps_and_statements(
    collector: Collector, tmp_path: Path
) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 'registry.db'}")
    with open_tracing(ON) as tracing:
        tracing.watch(engine)
        with engine.connect() as connection:  # part of nothing: not recorded
            connection.execute(text("SELECT 0"))
        with tracing.span("promote", {"backcast.operation": "o-1"}), Steps(tracing) as steps:
            for step in ("check", "check", "load"):
                steps.enter(step)
            with engine.connect() as connection:
                connection.execute(text("SELECT :secret"), {"secret": "hunter2"})
    engine.dispose()
    promote = collector.wait("promote")
    assert promote.attributes == {"backcast.operation": "o-1"}
    assert [step.name for step in collector.parts_of(promote)] == ["check", "load"]
    begun, selected = collector.parts_of(collector.wait("load"))
    assert (begun.name, selected.name) == ("BEGIN registry", "SELECT registry")
    assert selected.attributes["db.query.text"] == "SELECT ?"
    assert selected.attributes["db.system.name"] == "sqlite"
    assert len(collector.spans()) == 5
    assert {span.trace for span in collector.spans()} == {promote.trace}
    assert promote.resource["service.name"] == "backcast"


def test_errors_are_told_by_their_kind_alone(collector: Collector, tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path / 'registry.db'}")
    with open_tracing(ON) as tracing:
        tracing.watch(engine)
        with pytest.raises(UnknownId), tracing.span("unknown"):
            raise UnknownId(Entity.ITEM, "hunter2", "s.0")
        with pytest.raises(KeyError), tracing.span("odd"):
            raise KeyError("hunter2")
        with (
            pytest.raises(OperationalError),
            tracing.span("statement"),
            engine.connect() as connection,
        ):
            connection.execute(text("SELECT 1 FROM nowhere WHERE id = :id"), {"id": "hunter2"})
    engine.dispose()
    kinds = {span.name: span.attributes.get("error.type") for span in collector.spans()}
    assert kinds == {
        "unknown": "unknown-id",
        "odd": "KeyError",
        "BEGIN registry": None,
        "SELECT registry": "OperationalError",
        "statement": "OperationalError",
    }
    assert all(span.failed for span in collector.spans() if span.name != "BEGIN registry")
    assert b"hunter2" not in b"".join(collector.sent)


def test_the_standard_variables_name_the_service_and_the_sampler(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "vectors")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    with open_tracing(ON) as tracing, tracing.span("unseen"):
        pass
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    with open_tracing(ON) as tracing, tracing.span("seen"):
        pass
    assert [(s.name, s.resource["service.name"]) for s in collector.spans()] == [
        ("seen", "vectors")
    ]


def test_a_collector_that_is_away_keeps_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    started = time.monotonic()
    with open_tracing(ON) as tracing, tracing.span("lost"):
        pass
    assert time.monotonic() - started < 30  # its own patience, of 10 s for each batch, and retries
    assert all(r.name.startswith("opentelemetry") for r in caplog.records)
