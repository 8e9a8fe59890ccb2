"""Spans of OpenTelemetry, sent by OTLP over HTTP: the one module that knows it.

Endpoint, headers, sampler and batches are set by the standard variables (``OTEL_…``). Nothing is
registered globally, and no span holds a message, a parameter of a statement, an id or a key.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from importlib.metadata import version
from threading import Thread
from typing import Any, ClassVar, cast

from opentelemetry.context import attach, detach
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    Span,
    SpanKind,
    StatusCode,
    format_trace_id,
    get_current_span,
    set_span_in_context,
    use_span,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from sqlalchemy import Engine, event
from sqlalchemy.engine import ExceptionContext

from backcast import logs
from backcast.errors import BackcastError, ConfigError
from backcast.tracing import Attributes, Call, Tracing

_FLUSH_S = 3.0  # that the last spans may take at the end
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"
_CONTEXT = TraceContextTextMapPropagator()
_DETAILED: ContextVar[bool] = ContextVar("detailed", default=False)
"""Whether single calls are recorded: of a request; an operation makes thousands of them."""

_QUIETLY: dict[str, Any] = {"record_exception": False, "set_status_on_exception": False}


class OtelTracing(Tracing):
    """Sends spans in batches, from a thread of its own; they are dropped where none takes them."""

    wanted: ClassVar[bool] = True

    def __init__(self) -> None:
        for variable in _PROTOCOLS:
            if os.environ.get(variable, _PROTOCOL) != _PROTOCOL:
                raise ConfigError(
                    f"{variable}={os.environ[variable]}: traces are sent as {_PROTOCOL}.",
                    variable=variable,
                )
        try:
            self._exporter = OTLPSpanExporter()
            processor = BatchSpanProcessor(self._exporter)
        except ValueError as error:
            raise ConfigError(f"A variable OTEL_… is wrong: {str(error).rstrip('.')}.") from error
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("backcast", version("backcast"))

    def close(self) -> None:
        """Send what was recorded, for a few seconds at most."""
        last = Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        last.start()
        last.join(_FLUSH_S)
        if last.is_alive():
            self._exporter.shutdown()  # type: ignore[no-untyped-call]

    @contextmanager
    def span(self, name: str, attributes: Attributes | None = None) -> Iterator[None]:
        """Record a block; see ``Tracing``."""
        with _current(self._begin(name, attributes), detailed=False):
            yield

    @contextmanager
    def part(self, name: str, attributes: Attributes | None = None) -> Iterator[None]:
        """Record a block where it is a part; see ``Tracing``."""
        if not get_current_span().is_recording():
            yield
            return
        with _current(self._begin(name, attributes), detailed=_DETAILED.get()):
            yield

    def measured(self, name: str, call: Call, describe: Callable[..., Attributes]) -> Call:
        """Return ``call``, recorded as a part; see ``Tracing``."""

        @wraps(call)
        def recorded(*args: Any, **options: Any) -> object:
            if not _DETAILED.get():
                return call(*args, **options)
            with _current(self._begin(name, describe(*args)), detailed=True):
                return call(*args, **options)

        return cast("Call", recorded)

    @contextmanager
    def request(
        self, method: str, traceparent: str | None, tracestate: str | None
    ) -> Iterator["OtelRequest | None"]:
        """Record a request; see ``Tracing``."""
        given = {"traceparent": traceparent, "tracestate": tracestate}
        carrier = {name: value for name, value in given.items() if value is not None}
        parent = _CONTEXT.extract(carrier)  # never of the request that this one was pipelined after
        span = self._tracer.start_span(method, parent, SpanKind.SERVER)
        if span.is_recording():
            with _current(span, detailed=True):
                yield OtelRequest(span)
            return
        # All that is left to do: whatever it starts is to know that it is not recorded.
        token = attach(set_span_in_context(span))
        try:
            yield None
        finally:
            detach(token)

    def _begin(self, name: str, attributes: Attributes | None) -> Span:
        return self._tracer.start_span(name, attributes=dict(attributes or {}))

    def watch(self, engine: Engine) -> None:
        """Record statements as they are prepared, without their parameters."""
        place = _place(engine)

        @event.listens_for(engine, "before_cursor_execute", named=True)
        def begin(statement: str, context: Any, **_: object) -> None:
            if get_current_span().is_recording():
                act = statement.split(maxsplit=1)[0].upper()
                named = {"db.operation.name": act, "db.query.text": statement}
                context.backcast_span = self._tracer.start_span(
                    f"{act} registry", kind=SpanKind.CLIENT, attributes={**place, **named}
                )

        @event.listens_for(engine, "after_cursor_execute", named=True)
        def end(context: Any, **_: object) -> None:
            if hasattr(context, "backcast_span"):
                context.backcast_span.end()

        @event.listens_for(engine, "handle_error")
        def fail(failed: ExceptionContext) -> None:
            span = getattr(failed.execution_context, "backcast_span", None)
            if span is not None:
                _mark(span, type(failed.original_exception).__name__)
                span.end()


class OtelRequest:
    """The span of a request; see ``RequestSpan``."""

    def __init__(self, span: Span) -> None:
        self._span = span

    def describe(self, name: str, attributes: Attributes, error: str | None) -> None:
        """Say what is known at the end."""
        self._span.update_name(name)
        self._span.set_attributes(dict(attributes))
        if error is not None:
            _mark(self._span, error)


@contextmanager
def _current(span: Span, *, detailed: bool) -> Iterator[None]:
    """Let a span be the one that others are parts of; end it, and mark it with the error."""
    detail = _DETAILED.set(detailed)
    token = logs.trace_id.set(format_trace_id(span.get_span_context().trace_id))
    try:
        with use_span(span, end_on_exit=True, **_QUIETLY):
            try:
                yield
            except BaseException as error:
                kind = error.code if isinstance(error, BackcastError) else type(error).__name__
                _mark(span, kind)
                raise
    finally:
        logs.trace_id.reset(token)
        _DETAILED.reset(detail)


def _mark(span: Span, error: str) -> None:
    span.set_attribute("error.type", error)
    span.set_status(StatusCode.ERROR)


def _resource() -> Resource:
    own: dict[str, Any] = {
        "service.name": "backcast",
        "service.version": version("backcast"),
        "process.pid": os.getpid(),
    }
    return Resource.create({**own, **OTELResourceDetector().detect().attributes})


def _place(engine: Engine) -> Attributes:
    url = engine.url
    found = {
        "db.system.name": engine.dialect.name,
        "db.namespace": url.database,
        "server.address": url.host,
        "server.port": url.port,
    }
    return {name: value for name, value in found.items() if value is not None}
