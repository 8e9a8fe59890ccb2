"""docker-compose.yml carried out by hand: its commands and variables, on this host's loopback.

Containers are processes, hosts are ports, and secrets are files below the image's root.
"""

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import yaml
from psycopg import sql
from sqlalchemy import URL, make_url

from tests.e2e.documents import ROOT
from tests.e2e.images import Image, located
from tests.servers import (
    SEARCH,
    OwnPostgres,
    OwnRedis,
    find_program,
    free_port,
    installed_program,
    own_postgres,
    own_redis,
)

START_S, STOP_S = 120, 30
REPLICAS = ("service-1", "service-2")
_PROXY_SEARCH = (*SEARCH, "/usr/sbin")
_PASSWORDS_FOR_ALL_BUT_US = """\
host all postgres 127.0.0.1/32 trust
host all all 127.0.0.1/32 scram-sha-256
"""


def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    """Return a compose file, its anchors followed."""
    document: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return document


@dataclass(frozen=True)
class Stack:
    """The services of docker-compose.yml: the databases run, the others are started one by one.

    Attributes:
        folder: of configuration and logs.
        hosts: where every service answers here, by the host and port that the files name.
    """

    image: Image
    folder: Path
    hosts: Mapping[str, str]
    services: Mapping[str, Any]

    @property
    def url(self) -> str:
        """Where the proxy answers."""
        return f"http://{self.hosts['proxy:8000']}"

    @property
    def admin_url(self) -> str:
        """Where the proxy lets administrators in."""
        return f"http://{self.hosts['proxy:8001']}"

    def port(self, host: str) -> str:
        return self.hosts[host].partition(":")[2]

    def place(self, text: str) -> str:
        """Return ``text`` with the hosts and paths of this machine, and one ``$`` for two."""
        names = "|".join(map(re.escape, self.hosts))
        placed = re.sub(rf"\b(?:{names})\b", lambda name: self.hosts[name[0]], text)
        return located(placed.replace("$$", "$"), self.image.root)

    def environ(self, service: str) -> dict[str, str]:
        return {k: self.place(v) for k, v in self.services[service]["environment"].items()}

    def run(self, *command: str, service: str = "backcast") -> subprocess.CompletedProcess[str]:
        """Run a command, or the service's own, as ``docker compose run`` does."""
        chosen = command or self.services[service]["command"]
        return self.image.run([*self.image.entrypoint, *chosen], self.environ(service))

    @contextmanager
    def replica(self, service: str) -> Iterator[subprocess.Popen[str]]:
        """Start a replica by the image's own command, and stop it by the image's signal."""
        port = self.port(f"{service}:8000")
        command = [port if part == "8000" else part for part in self.image.command]
        with (self.folder / f"{service}.log").open("a") as log:
            process = self.image.start(
                [*self.image.entrypoint, *command], self.environ(service), stdout=log, stderr=log
            )
        with _stopped(process, signal.Signals[self.image.stop_signal]):
            yield process

    def healthy(self, service: str) -> bool:
        """Tell what the image's health check says of a replica."""
        port = self.port(f"{service}:8000")
        return (
            self.image.run([part.replace("8000", port) for part in self.image.health]).returncode
            == 0
        )

    @contextmanager
    def proxy(self) -> Iterator[None]:
        """Start the proxy on the file that its service mounts."""
        program = installed_program("haproxy", "haproxy", "PATH", _PROXY_SEARCH)
        mounted, _, _ = self.services["proxy"]["volumes"][0].partition(":")
        text = (ROOT / mounted).read_text().replace("bind :", "bind proxy:")
        placed = self.folder / "haproxy.cfg"
        placed.write_text(self.place(text))
        with (self.folder / "proxy.log").open("a") as log:
            process = subprocess.Popen(
                [program, "-W", "-db", "-f", placed], stdout=log, stderr=log, text=True
            )
        with _stopped(process, signal.SIGTERM):
            wait(lambda: status_of(f"{self.url}/proxyz") == 200, process)
            yield

    def log(self, service: str) -> str:
        return (self.folder / f"{service}.log").read_text()

    def postgres_is_healthy(self) -> bool:
        server = find_program("postgres", SEARCH)
        assert server is not None
        host, _, port = self.hosts["postgres:5432"].partition(":")
        path = f"{server.parent}:{os.environ['PATH']}"
        return self._checked("postgres", {"PATH": path, "PGHOST": host, "PGPORT": port})

    def redis_is_healthy(self) -> bool:
        return self._checked("redis", {"PATH": os.environ["PATH"]})

    def _checked(self, service: str, environ: Mapping[str, str]) -> bool:
        kind, *command = self.services[service]["healthcheck"]["test"]
        client = f"redis-cli -p {self.port('redis:6379')}"
        placed = [self.place(part).replace("redis-cli", client) for part in command]
        shell = ["sh", "-c"] if kind == "CMD-SHELL" else []
        return subprocess.run([*shell, *placed], env=environ, check=False).returncode == 0


@contextmanager
def running(image: Image, folder: Path) -> Iterator[Stack]:
    """Make the secrets, start the databases with them, and yield the stack on top."""
    with own_postgres() as postgres, own_redis() as redis:
        hosts = {
            "postgres:5432": f"127.0.0.1:{make_url(postgres.url).port}",
            "redis:6379": f"127.0.0.1:{make_url(redis.url).port}",
            **{f"{name}:8000": f"127.0.0.1:{free_port()}" for name in ("proxy", *REPLICAS)},
            "proxy:8001": f"127.0.0.1:{free_port()}",
        }
        document = compose()
        stack = Stack(image, folder, hosts, document["services"])
        _mount_secrets(stack, document["secrets"])
        with _postgres(stack, postgres), _redis(stack, redis):
            yield stack


def wait(ready: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait until something is so, which ``process`` is to bring about."""
    deadline = time.monotonic() + START_S
    while not ready():
        assert process is None or process.poll() is None, f"{process.args!r} has ended"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def status_of(url: str) -> int | None:
    """Return the status that a GET is answered with, None where nobody answers."""
    with suppress(httpx2.TransportError):
        return httpx2.get(url).status_code
    return None


def _mount_secrets(stack: Stack, secrets: Mapping[str, Any]) -> None:
    subprocess.run(["sh", ROOT / "deploy/secrets.sh"], cwd=stack.folder, check=True)
    mounted = stack.image.root / "run/secrets"
    mounted.mkdir(parents=True)
    for name, secret in secrets.items():
        (mounted / name).write_text(stack.place((stack.folder / secret["file"]).read_text()))


@contextmanager
def _postgres(stack: Stack, server: OwnPostgres) -> Iterator[None]:
    """Make database and roles, as the image does on an empty volume, and ask for passwords."""
    (server.folder / "data/pg_hba.conf").write_text(_PASSWORDS_FOR_ALL_BUT_US)
    superuser = make_url(server.url).set(drivername="postgresql")
    database = stack.environ("postgres")["POSTGRES_DB"]
    with server.running():
        with psycopg.connect(superuser.render_as_string(), autocommit=True) as connection:
            made = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(database))
            connection.execute(made)
        for volume in stack.services["postgres"]["volumes"]:
            source, _, target = volume.partition(":")
            if target.startswith("/docker-entrypoint-initdb.d/"):
                _initialize(stack, source, superuser.set(database=database))
        yield


def _initialize(stack: Stack, script: str, database: URL) -> None:
    """Run an SQL script as the image's entrypoint does, as the superuser."""
    psql = find_program("psql", SEARCH)
    assert psql is not None
    placed = stack.folder / Path(script).name
    placed.write_text(stack.place((ROOT / script).read_text()))
    strict = ["-v", "ON_ERROR_STOP=1", "--no-password", "--no-psqlrc"]
    named = ["--dbname", database.render_as_string(), "--file", str(placed)]
    subprocess.run([psql, *strict, *named], check=True)


@contextmanager
def _redis(stack: Stack, server: OwnRedis) -> Iterator[None]:
    """Start Redis by the command of its service."""
    port, program = stack.port("redis:6379"), find_program("redis-server", SEARCH)
    *shell, script = stack.services["redis"]["command"]
    placed = stack.place(script).replace(
        "redis-server -", f"{program} - --bind 127.0.0.1 --port {port}"
    )
    url = (stack.image.root / "run/secrets/store_url").read_text()
    with OwnRedis(url, server.folder, [*shell, placed]).running():
        yield


@contextmanager
def _stopped(process: subprocess.Popen[str], signum: signal.Signals) -> Iterator[None]:
    try:
        yield
    finally:
        if process.poll() is None:
            process.send_signal(signum)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
