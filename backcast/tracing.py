"""Traces of what requests and operations spend their time on: nothing, unless they are wanted.

Where they are, ``backcast.otel`` makes spans of OpenTelemetry, which no other module knows.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import ClassVar, Protocol, TypeVar

from sqlalchemy import Engine

from backcast.errors import ConfigError
from backcast.settings import Settings

Attributes = Mapping[str, str | int | float | bool]
Call = TypeVar("Call", bound=Callable[..., object])


class RequestSpan(Protocol):
    """The span of a request that is recorded."""

    def describe(self, name: str, attributes: Attributes, error: str | None) -> None:
        """Say what is known at the end; ``error`` is the kind of error that it ended in."""


class Tracing:
    """Where spans go. These go nowhere."""

    wanted: ClassVar[bool] = False

    def span(self, name: str, attributes: Attributes | None = None) -> AbstractContextManager[None]:
        """Record an operation as part of what is being recorded, or as the beginning of a trace.

        Errors are recorded by their kind, never by their message, which may name ids.
        """
        return nullcontext()

    def part(self, name: str, attributes: Attributes | None = None) -> AbstractContextManager[None]:
        """Record a block where it is part of something that is being recorded."""
        return nullcontext()

    def measured(self, name: str, call: Call, describe: Callable[..., Attributes]) -> Call:
        """Return ``call``, recorded as a part of a request, not of an operation: that makes many.

        ``describe`` makes attributes of its arguments.
        """
        return call

    def request(
        self, method: str, traceparent: str | None, tracestate: str | None
    ) -> AbstractContextManager[RequestSpan | None]:
        """Record a request, as part of the caller's trace; None where it is not recorded."""
        return nullcontext()

    def watch(self, engine: Engine) -> None:
        """Record every statement that is part of something that is being recorded."""


NO_TRACES = Tracing()


class Steps:
    """One span for each step of an operation, until the next one or the end of the block."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing, self._stack = tracing, ExitStack()
        self._step: str | None = None

    def __enter__(self) -> "Steps":
        return self

    def __exit__(self, *raised: object) -> None:
        self._stack.__exit__(*raised)  # type: ignore[arg-type]

    def enter(self, step: str) -> None:
        """Begin a step, if it is another than before."""
        if step != self._step:
            self._stack.close()
            self._stack.enter_context(self._tracing.part(step))
            self._step = step


@contextmanager
def open_tracing(settings: Settings) -> Iterator[Tracing]:
    """Yield what ``settings`` ask for; what was recorded is sent at the end, or soon given up.

    Raises:
        ConfigError: the extra ``otel`` is not installed, or asks for what is not supported.
    """
    if settings.traces == "off":
        yield NO_TRACES
        return
    try:
        from backcast.otel import OtelTracing
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"BACKCAST_TRACES={settings.traces} needs the package {error.name!r}: "
            "pip install 'backcast[otel]'."
        ) from error
    tracing = OtelTracing()
    try:
        yield tracing
    finally:
        tracing.close()
