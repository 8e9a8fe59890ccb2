"""A collector of traces, as small as can be: it takes what is sent by OTLP over HTTP."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

PATIENCE_S = 30


@dataclass(frozen=True)
class Recorded:
    """A span as it was sent."""

    name: str
    trace: str
    id: str
    parent: str
    attributes: dict[str, Any]
    failed: bool
    resource: dict[str, Any]


class Collector:
    """What was sent so far; ``sent`` holds the bytes as they came."""

    def __init__(self) -> None:
        self.url = ""
        self.sent: list[bytes] = []

    def spans(self) -> list[Recorded]:
        """Return every span, in the order in which they ended."""
        return [span for content in list(self.sent) for span in _read(content)]

    def wait(self, name: str) -> Recorded:
        """Return the newest span of this name, once there is one."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = [span for span in self.spans() if span.name == name]
            if found:
                return found[-1]
            names = sorted({span.name for span in self.spans()})
            assert time.monotonic() < deadline, f"no {name} among {names}"
            time.sleep(0.05)

    def parts_of(self, span: Recorded) -> list[Recorded]:
        """Return the spans right below one."""
        return [other for other in self.spans() if other.parent == span.id]


@contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector on loopback."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            collector.sent.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _read(content: bytes) -> Iterator[Recorded]:
    for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Recorded(
                    span.name,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    _attributes(span.attributes),
                    span.status.code == span.status.STATUS_CODE_ERROR,
                    _attributes(resource.resource.attributes),
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
