"""Logs and traces of the service as it is run: ``backcast serve``, real stores, a collector."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from backcast.settings import Settings
from backcast.versions import Scope
from service.wire import Format
from tests.collector import Collector, Recorded, collecting
from tests.servers import free_port
from tests.service_support import bearer, secret_of
from tests.support import Home, build_home

START_S, STOP_S = 90, 30
COMMAND = [sys.executable, "-c", "from backcast.cli import main; main()"]
ID, PASSWORD = "whose-vector-this-is", "hunter2hunter2"
CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{CALLER}-00f067aa0ba902b7-01"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    """Version 1 is live, 2 can be promoted."""
    with build_home(tmp_path, live=1) as built:
        yield built


def environment(settings: Settings, **changes: str) -> dict[str, str]:
    inherited = {
        name: v for name, v in os.environ.items() if not name.startswith(("BACKCAST_", "OTEL_"))
    }
    return {
        **inherited,
        "BACKCAST_HOME": str(settings.home),
        "BACKCAST_DATABASE_URL": settings.database_url,
        "BACKCAST_STORE_URL": settings.store_url,
        "BACKCAST_GATE_CHANGE": "1e9",
        "BACKCAST_GATE_COVERAGE": "0",
        "BACKCAST_LOG_FORMAT": "json",
        "BACKCAST_TRACES": "otlp",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        **changes,
    }


class Service:
    """A running service, and its log."""

    def __init__(self, url: str, log: Path) -> None:
        self.url, self._log = url, log

    def log(self) -> list[Any]:
        """Return the log, of which every line is a JSON object."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]


@contextmanager
def serving(home: Home, **variables: str) -> Iterator[Service]:
    """Run ``backcast serve`` with two workers."""
    port, log = free_port(), home.settings.home / "service.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*COMMAND, "serve", "--port", str(port), "--workers", "2"],
            env=environment(home.settings, **variables),
            stdout=output,
            stderr=output,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + START_S
        while not ready(url):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield Service(url, log)
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_S)
    finally:
        process.kill()
        process.wait()


def ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz").is_success
    except httpx2.TransportError:
        return False


def names_below(collector: Collector, span: Recorded) -> set[str]:
    """Return the names of everything that a span consists of."""
    parts = collector.parts_of(span)
    return {part.name for part in parts}.union(*(names_below(collector, part) for part in parts))


def test_a_request_an_act_and_an_operation_are_one_trace_each(
    tmp_path: Path, backends: Mapping[str, Any]
) -> None:
    with build_home(tmp_path, live=1, **backends) as home:
        check_traces(home)


def check_traces(home: Home) -> None:
    secret, store = secret_of(home, Scope.ADMIN), home.settings.store_url.partition(":")[0]
    with collecting() as collector:
        with (
            serving(home, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url) as service,
            httpx2.Client(base_url=service.url, headers=bearer(secret)) as http,
        ):
            body = {"ids": ["item 5", ID], "version": 0}
            sent = {"traceparent": TRACEPARENT, "Accept": Format.RAW}
            assert http.post("/embeddings/batch", json=body, headers=sent).is_success
            assert http.get(f"/embeddings/{ID}?version=0").status_code == 404
            promote = "/admin/versions/2/promote"
            assert http.post(promote, json={"expected_live": 1}).status_code == 202
            batch = collector.wait("POST /embeddings/batch")
            act = collector.wait("POST /admin/versions/{k}/promote")
            operation = collector.wait("promote")
        check_batch(collector, batch, store)
        check_promotion(collector, act, operation)
        assert collector.wait("GET /embeddings/{id}").attributes["http.route"] == "/embeddings/{id}"
    exported = b"".join(collector.sent)
    for told in (ID, "item 5", "item%205", secret, secret.split("_", 2)[2], "127.0.0.1:5432@"):
        assert told.encode() not in exported
    check_log(service.log(), secret)


def check_batch(collector: Collector, batch: Recorded, store: str) -> None:
    assert (batch.trace, batch.parent) == (CALLER, "00f067aa0ba902b7")
    assert batch.attributes["http.response.status_code"] == 200
    assert batch.attributes["http.request.method"] == "POST"
    assert batch.attributes["backcast.version"] == "0"
    assert not batch.failed
    parts = {part.name: part for part in collector.parts_of(batch)}
    assert {"gather", "product", "encode"} <= parts.keys()
    [stored] = collector.parts_of(parts["gather"])
    assert (stored.name, stored.attributes["backcast.store"]) == ("store gather", store)
    assert stored.attributes["backcast.ids"] == 2


def check_promotion(collector: Collector, act: Recorded, operation: Recorded) -> None:
    assert operation.parent == act.id
    assert {"SELECT registry", "INSERT registry"} <= names_below(collector, act)
    steps = {part.name: part for part in collector.parts_of(operation)}
    assert {"check", "load", "switch"} <= steps.keys()
    assert "store load" in names_below(collector, steps["load"])
    assert "UPDATE registry" in names_below(collector, steps["switch"])
    # Ids are gathered thousands of times where a promotion compares: not one span each.
    assert "store gather" not in names_below(collector, operation)


def check_log(lines: list[Any], secret: str) -> None:
    workers = {line["process"] for line in lines if line["logger"] == "service.state"}
    assert len(workers) == 2
    [done] = [line for line in lines if line["logger"] == "service.operations"]
    assert {"request_id", "trace_id"} <= done.keys()
    assert {line["level"] for line in lines} == {"INFO"}
    assert secret.split("_", 2)[2] not in json.dumps(lines)


def test_a_collector_that_is_away_slows_nobody_and_floods_no_log(
    home: Home,
) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    small = {"OTEL_BSP_MAX_QUEUE_SIZE": "64", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "64"}
    with (
        serving(home, OTEL_EXPORTER_OTLP_ENDPOINT=away, **small) as service,
        httpx2.Client(base_url=service.url, headers=bearer(secret_of(home))) as http,
    ):
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            assert http.get("/embeddings/item 5?version=0").is_success
    warned = [line for line in service.log() if line["level"] != "INFO"]
    assert warned
    assert all(line["logger"].startswith("opentelemetry") for line in warned)
    assert len(warned) <= 2 * 6  # of two workers: each kind of line once


def test_no_variable_makes_the_framework_send_traces_of_its_own(home: Home) -> None:
    with collecting() as collector:
        wanted = {
            "BACKCAST_TRACES": "off",
            "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        }
        with serving(home, **wanted) as service:
            httpx2.get(f"{service.url}/versions", headers=bearer(secret_of(home)))
        assert collector.sent == []  # the service has ended, and would have sent what it had


def test_a_command_is_a_job_whose_log_is_json(home: Home) -> None:
    with collecting() as collector:
        variables = environment(home.settings, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
        ended = run("promote", "2", "--json", environ=variables)
        refused = run("promote", "7", environ=variables)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["live_version"] == 2
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert {line["level"] for line in lines} == {"INFO"}
    assert lines[-1]["message"].startswith("promoting version 2 ")
    operation = collector.wait("promote")
    assert operation.parent == ""
    steps = [part.name for part in collector.parts_of(operation)]
    assert [s for s in steps if "registry" not in s and "store" not in s] == [
        *("check", "load", "switch")
    ]
    [line] = [json.loads(line) for line in refused.stderr.splitlines()]
    assert (refused.returncode, line["level"]) == (1, "ERROR")
    assert line["message"].startswith("Version 7 does not exist")


def run(*arguments: str, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], env=environ, capture_output=True, text=True)
