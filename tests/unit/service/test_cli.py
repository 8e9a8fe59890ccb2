"""``backcast serve`` refuses in one line what would end every worker with a traceback."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest
import uvicorn
from typer.testing import CliRunner

from backcast.errors import ConfigError, SchemaMismatch, StoreError
from backcast.registry import open_registry
from backcast.settings import Settings
from backcast.versions import Scope
from service.cli import app, check
from tests.servers import free_port


def settings(folder: Path, **changes: object) -> Settings:
    return Settings.load(**{"home": folder, **changes})


def test_new_home_is_made(tmp_path: Path) -> None:
    check(settings(tmp_path), "127.0.0.1", free_port())
    assert (tmp_path / "registry.db").exists()


def test_port_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127.0.0.1:{port} cannot .* in use.* --port"):
            check(settings(tmp_path), "127.0.0.1", port)


def test_host_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be listened on"):
        check(settings(tmp_path), "no-such-host.invalid", free_port())


def test_places_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    empty = settings(tmp_path, database_url=f"sqlite:///{tmp_path / 'empty.db'}")
    no_folder = settings(tmp_path, store_url=f"embedded:{tmp_path / 'file'}")
    with pytest.raises(SchemaMismatch):
        check(empty, "127.0.0.1", free_port())
    with pytest.raises(StoreError):
        check(no_folder, "127.0.0.1", free_port())


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_hosts_are_let_in_by_key_only(tmp_path: Path, host: str) -> None:
    chosen, port = settings(tmp_path), free_port()
    with pytest.raises(ConfigError, match=rf"--host {host} .* no key .* --without-key"):
        check(chosen, host, port)
    check(chosen, host, port, without_key=True)
    with open_registry(chosen) as registry:
        key, _ = registry.keys.create("ranking", Scope.READ)
        check(chosen, host, port)
        registry.keys.revoke(key.prefix)
    with pytest.raises(ConfigError, match="no key is in force"):
        check(chosen, host, port)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_host_needs_no_key(tmp_path: Path, host: str) -> None:
    check(settings(tmp_path), host, free_port())


def test_server_is_started_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []
    monkeypatch.setenv("BACKCAST_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else the command would set it for good
    monkeypatch.setattr(uvicorn, "run", lambda *args, **options: calls.append((args, options)))
    port = free_port()
    result = CliRunner().invoke(app, ["serve", "--port", str(port), "--workers", "3"])
    assert result.exit_code == 0, result.output
    [(args, options)] = calls
    assert args == ("service.app:from_environment",)
    assert (options["host"], options["port"], options["workers"]) == ("127.0.0.1", port, 3)
    assert options["factory"] is True


@pytest.mark.parametrize("option", [["--port", "0"], ["--port", "65536"], ["--workers", "0"]])
def test_options_out_of_range(option: list[str]) -> None:
    assert CliRunner().invoke(app, ["serve", *option]).exit_code == 2


def test_help_has_an_example() -> None:
    result = CliRunner().invoke(app, ["serve", "--help"])
    assert result.exit_code == 0
    assert "backcast serve --port 8000 --workers 4" in result.output


def test_logging_is_one_line_a_record_on_standard_error() -> None:
    program = (
        "import logging, logging.config; from service.cli import logging_config;"
        "logging.config.dictConfig(logging_config());"
        "logging.getLogger('service.poller').warning('trouble %d', 7)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert "WARNING" in ended.stderr
    assert "service.poller: trouble 7" in ended.stderr
