"""``backcast serve``: check everything that can be checked, then hand over to uvicorn.

uvicorn and torch are imported by the command that needs them: `--help` works without them.
"""

import ipaddress
import os
import socket
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from backcast.errors import ConfigError
from backcast.lifecycle import Backcast, open_backcast
from backcast.logs import configuration
from backcast.registry.database import utc_now
from backcast.settings import Settings
from service.cores import share_cores
from service.metrics.sheets import claimed

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def service() -> None:
    """Serve embeddings over HTTP."""


@app.command(epilog="Example: backcast serve --port 8000 --workers 4")
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="Port to listen on.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the port.")] = 1,
    without_key: Annotated[
        bool,
        typer.Option("--without-key", help="Listen beyond this host although no key is in force."),
    ] = False,
) -> None:
    """Serve until interrupted. Settings come from the environment, see BACKCAST_HOME and others.

    The workers share the cores; OMP_NUM_THREADS gives each of them another number of threads.
    Beyond this host it listens only where a key is in force: before, nobody could use it but by
    open reads.
    """
    from service import supervisor

    share_cores(workers)
    settings = Settings.load()
    check(settings, host, port, without_key=without_key)
    with sharing_metrics(settings, workers):
        supervisor.run(
            "service.app:from_environment",
            factory=True,
            host=host,
            port=port,
            workers=workers,
            log_config=configuration(settings.log_format),
            # Paths hold ids of users; who may log those decides in front of this service. Our own
            # (BACKCAST_ACCESS_LOG) names routes.
            access_log=False,
            server_header=False,
            http="service.protocol:Protocol",
            ws="none",
            timeout_keep_alive=settings.keep_alive_seconds,
            timeout_graceful_shutdown=settings.shutdown_seconds,
        )


@contextmanager
def sharing_metrics(
    settings: Settings, workers: int, environ: MutableMapping[str, str] = os.environ
) -> Iterator[None]:
    """Name a folder to several workers, in which they put their metrics together.

    They inherit it with the environment. One worker alone has nobody to share with.
    """
    if workers == 1 or settings.metrics_folder is not None:
        yield
        return
    with TemporaryDirectory(prefix="backcast-metrics-") as folder:
        environ["BACKCAST_METRICS_FOLDER"] = folder
        try:
            yield
        finally:
            del environ["BACKCAST_METRICS_FOLDER"]  # the folder goes too


def check(settings: Settings, host: str, port: int, *, without_key: bool = False) -> None:
    """Raise what would otherwise end every worker with a traceback, or open it to everybody.

    A new SQLite registry is made here too, before the workers could all try.

    Raises:
        ConfigError: a setting is wrong, the address cannot be listened on, or others can reach it
            and no key is in force.
        SchemaMismatch, RegistryError, StoreError: registry or store cannot be opened.
    """
    from backcast.devices import choose_device

    choose_device(settings.device)
    if settings.metrics_folder is not None:
        with claimed(settings.metrics_folder):
            pass
    found = _find_addresses(host, port)
    with open_backcast(settings) as backcast:
        if not without_key and not all(_is_loopback(address) for _, address in found):
            _demand_key(backcast, host)
    _try_to_listen(*found[0], host, port)


def _find_addresses(host: str, port: int) -> list[tuple[int, Any]]:
    """Return every address that ``host`` stands for: the server may listen on each."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _unusable(host, port, error) from error
    return [(family, address) for family, *_, address in found]


def _is_loopback(address: Any) -> bool:
    return ipaddress.ip_address(address[0].partition("%")[0]).is_loopback


def _demand_key(backcast: Backcast, host: str) -> None:
    now = utc_now()
    if not any(key.in_force(now) for key in backcast.registry.keys.all()):
        raise ConfigError(
            f"--host {host} can be reached from other hosts, and no key is in force. Make one "
            "(backcast keys create --help), or say --without-key."
        )


def _try_to_listen(family: int, address: Any, host: str, port: int) -> None:
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise _unusable(host, port, error) from error


def _unusable(host: str, port: int, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    return ConfigError(
        f"{host}:{port} cannot be listened on: {reason}. Choose another --host or --port."
    )
