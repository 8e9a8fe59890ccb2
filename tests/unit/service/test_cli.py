"""``backcast serve`` refuses in one line what would end every worker with a traceback."""

import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from backcast.errors import ConfigError, SchemaMismatch, StoreError
from backcast.registry import open_registry
from backcast.settings import Settings
from backcast.versions import Scope
from service import supervisor
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


def test_every_address_of_a_name_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def both(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        assert host == "this-host"
        return [(socket.AF_INET, 1, 6, "", (at, port)) for at in ("127.0.0.1", "192.0.2.7")]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with pytest.raises(ConfigError, match="--host this-host can be reached"):
        check(settings(tmp_path), "this-host", free_port())


def test_key_that_has_expired_lets_nobody_in(tmp_path: Path) -> None:
    chosen, port = settings(tmp_path), free_port()
    with open_registry(chosen) as registry:
        soon = registry.now() + timedelta(seconds=0.3)
        registry.keys.create("ranking", Scope.READ, expires_at=soon)
        time.sleep(0.3)
    with pytest.raises(ConfigError, match="no key is in force"):
        check(chosen, "0.0.0.0", port)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_this_host_needs_no_key(tmp_path: Path, host: str) -> None:
    check(settings(tmp_path), host, free_port())


def test_server_is_started_as_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []
    monkeypatch.setenv("BACKCAST_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else the command would set it for good
    monkeypatch.setattr(supervisor, "run", lambda *args, **options: calls.append((args, options)))
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
