"""The PostgreSQL and the Redis that tests run on: the named one, the local one or a private one.

A server named by ``BACKCAST_TEST_DATABASE_URL`` or ``BACKCAST_TEST_REDIS_URL`` is used or the
tests fail. With no name, the server on the default loopback port is used if it lets us in, and
otherwise a private one is started, whose package is installed first where that is possible.

A test process that is killed outright cleans nothing up: its private servers run on, under
``/tmp/backcast-*``, and its database on a shared server stays behind.
"""

import fcntl
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit
from uuid import uuid4

import psycopg
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

DATABASE_VARIABLE = "BACKCAST_TEST_DATABASE_URL"
REDIS_VARIABLE = "BACKCAST_TEST_REDIS_URL"

# Glob patterns: installing a package adds folders that did not exist when tests began.
SEARCH = (*os.get_exec_path(), "/usr/lib/postgresql/*/bin")

CONNECT_S = 5
START_S = 30
STOP_S = 10
# A claim outlives every test run, and frees the database of a run that was killed.
CLAIM_S = 24 * 3600


class ServerUnavailable(Exception):
    """No server for the tests; the message says what to do."""


@contextmanager
def postgres(
    *,
    environ: Mapping[str, str] = os.environ,
    port: int = 5432,
    search: Sequence[str] = SEARCH,
) -> Iterator[str]:
    """Yield the SQLAlchemy URL of a new, empty database, which is dropped at the end."""
    with ExitStack() as stack:
        if named := environ.get(DATABASE_VARIABLE):
            try:
                server = make_url(named).set(drivername="postgresql+psycopg")
                database = stack.enter_context(_new_database(server))
            except (ArgumentError, ValueError, psycopg.Error) as error:
                raise _unusable(DATABASE_VARIABLE, named, error) from error
        else:
            database = _enter_loopback_postgres(stack, port) or stack.enter_context(
                _new_database(stack.enter_context(_private_postgres(search)))
            )
        yield database.render_as_string(hide_password=False)


@contextmanager
def redis(
    *,
    environ: Mapping[str, str] = os.environ,
    port: int = 6379,
    search: Sequence[str] = SEARCH,
) -> Iterator[str]:
    """Yield the URL of an empty logical database, which is flushed at the end.

    A named database is not claimed: who names it keeps other test runs away from it, and from the
    ones after it, which the other workers of the same run take.
    """
    with ExitStack() as stack:
        if named := environ.get(REDIS_VARIABLE):
            try:
                own = _of_worker(named, environ.get("PYTEST_XDIST_WORKER", "gw0"))
                url = stack.enter_context(_empty_database(own))
            except (ValueError, RedisError, ServerUnavailable) as error:
                raise _unusable(REDIS_VARIABLE, named, error) from error
        else:
            url = _enter_loopback_redis(stack, port) or stack.enter_context(_private_redis(search))
        yield url


def find_program(program: str, search: Sequence[str]) -> Path | None:
    """Find a program; of the folders that one pattern matches, the highest version comes first."""
    folders = [
        folder for pattern in search for folder in sorted(glob(pattern), key=_version, reverse=True)
    ]
    found = shutil.which(program, path=os.pathsep.join(folders))
    return Path(found) if found else None


def installed_program(program: str, package: str, variable: str, search: Sequence[str]) -> Path:
    """Find a server's program, installing its package when it is missing and root may."""
    found = find_program(program, search)
    apt_get = find_program("apt-get", search)
    if found is None and apt_get is not None and os.geteuid() == 0:
        with _one_at_a_time():
            found = find_program(program, search) or _install(apt_get, package, program, search)
    if found is None:
        raise ServerUnavailable(
            f"no server on the default port that tests can use, and no {program} to start: "
            f"install one (Debian, Ubuntu: apt-get install {package}) or name a running server "
            f"in {variable}"
        )
    return found


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Wait for the other workers of a test run: two installations at once refuse each other."""
    with Path("/tmp/backcast-install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _install(apt_get: Path, package: str, program: str, search: Sequence[str]) -> Path | None:
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # Only the result counts: an update may fail at one mirror and still suffice.
    subprocess.run([apt_get, "update"], env=environ)
    subprocess.run([apt_get, "install", "-y", "--no-install-recommends", package], env=environ)
    return find_program(program, search)


def unpacked_program(
    program: str, package: str, folder: Path, search: Sequence[str] = SEARCH
) -> Path:
    """Find a program, or else unpack its package into ``folder``: no service of it is started."""
    own = str(folder / package / "usr/bin")
    apt_get = find_program("apt-get", search)
    with _one_at_a_time():
        found = find_program(program, [*search, own])
        if found is None and apt_get is not None:
            _unpack(apt_get, package, folder)
            found = find_program(program, [own])
    if found is None:
        raise ServerUnavailable(
            f"no {program} to start: install it (Debian, Ubuntu: apt-get install {package})"
        )
    return found


def _unpack(apt_get: Path, package: str, folder: Path) -> None:
    # Only the result counts, as above. Who is not root has to do without the update.
    subprocess.run([apt_get, "update"])
    subprocess.run([apt_get, "download", package], cwd=folder)
    for archive in folder.glob(f"{package}_*.deb"):
        subprocess.run(["dpkg", "-x", archive.name, package], cwd=folder)
        archive.unlink()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


def _enter_loopback_postgres(stack: ExitStack, port: int) -> URL | None:
    # Without a user name, libpq takes the one of the operating system.
    for user in ("postgres", None):
        with suppress(psycopg.Error):
            return stack.enter_context(_new_database(_postgres_url(port, user)))
    return None


@contextmanager
def _new_database(server: URL) -> Iterator[URL]:
    name = f"backcast_test_{uuid4().hex}"
    # template1 may hold a site's own objects, and cannot be copied while anyone is connected to it.
    _execute(server, f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
    try:
        yield server.set(database=name)
    finally:
        _execute(server, f"DROP DATABASE {name} WITH (FORCE)")


@contextmanager
def _private_postgres(search: Sequence[str]) -> Iterator[URL]:
    with own_postgres(search=search) as server, server.running():
        yield make_url(server.url)


@dataclass(frozen=True)
class OwnPostgres:
    """A PostgreSQL of the test's own, which it may stop and start; port and folder stay the same.

    ``url`` names its only database, which is empty at first.
    """

    url: str
    folder: Path
    _command: Sequence[str]

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        answers = partial(_postgres_answers, make_url(self.url))
        with _serving(self._command, self.folder, answers) as process:
            yield process


@contextmanager
def own_postgres(search: Sequence[str] = SEARCH) -> Iterator[OwnPostgres]:
    """Yield a PostgreSQL that is not running yet; a crash of the machine would lose its data."""
    program = installed_program("postgres", "postgresql", DATABASE_VARIABLE, search)
    server = _postgres_url(free_port(), "postgres")
    with _private_folder() as folder:
        initdb = [str(program.with_name("initdb")), "-D", "data", "-U", "postgres", "-A", "trust"]
        with _started([*initdb, "-E", "UTF8", "--no-locale", "--no-sync"], folder) as process:
            with suppress(subprocess.TimeoutExpired):
                process.wait(START_S)
            if process.poll() != 0:
                raise _failed(initdb, folder)
        command = [str(program), "-D", "data", "-F", "-h", "127.0.0.1", "-p", str(server.port)]
        yield OwnPostgres(
            server.render_as_string(hide_password=False), folder, [*command, "-k", str(folder)]
        )


class Running:
    """A server of the test's own that is stopped and started outside of a ``with``."""

    def __init__(self, server: "OwnPostgres | OwnRedis") -> None:
        self._server, self._stack = server, ExitStack()

    def __enter__(self) -> "Running":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        self.process = self._stack.enter_context(self._server.running())

    def stop(self) -> None:
        self._stack.close()


def _postgres_url(port: int, user: str | None) -> URL:
    return URL.create("postgresql+psycopg", user, host="127.0.0.1", port=port, database="postgres")


def _postgres_answers(server: URL) -> bool:
    try:
        _execute(server, "SELECT 1")
    except psycopg.OperationalError:
        return False
    return True


def _execute(server: URL, statement: str) -> None:
    conninfo = server.set(drivername="postgresql").render_as_string(hide_password=False)
    # CREATE DATABASE and DROP DATABASE refuse to run inside a transaction.
    with psycopg.connect(conninfo, autocommit=True, connect_timeout=CONNECT_S) as connection:
        connection.execute(statement)


def _enter_loopback_redis(stack: ExitStack, port: int) -> str | None:
    if not _redis_keeps_its_keys(f"redis://127.0.0.1:{port}/0"):
        return None
    for number in range(15, 0, -1):  # database 0 holds the claims
        with suppress(RedisError, ServerUnavailable):
            return stack.enter_context(_claimed_database(port, number))
    return None


def _of_worker(url: str, worker: str) -> str:
    """Return the URL of the database that many numbers on; that of worker ``gw0`` is ``url``."""
    later = int(worker.removeprefix("gw"))
    if not later:
        return url
    parts = urlsplit(url)
    return parts._replace(path=f"/{int(parts.path.strip('/') or 0) + later}").geturl()


@contextmanager
def _claimed_database(port: int, number: int) -> Iterator[str]:
    with (
        _client(f"redis://127.0.0.1:{port}/0") as claims,
        claims.lock(f"backcast-test-claim:{number}", timeout=CLAIM_S, blocking=False),
        _empty_database(f"redis://127.0.0.1:{port}/{number}") as url,
    ):
        yield url


@contextmanager
def _empty_database(url: str) -> Iterator[str]:
    with _client(url) as client:
        if client.dbsize():
            raise ServerUnavailable("the database is not empty; flush it or name another")
        try:
            yield url
        finally:
            client.flushdb()


@contextmanager
def _private_redis(search: Sequence[str]) -> Iterator[str]:
    with own_redis(search=search) as server, server.running():
        yield server.url


@dataclass(frozen=True)
class OwnRedis:
    """A Redis of the test's own, which it may stop and start; port and folder stay the same."""

    url: str
    folder: Path
    _command: Sequence[str]

    def with_options(self, *options: str, url: str | None = None) -> "OwnRedis":
        return OwnRedis(url or self.url, self.folder, [*self._command, *options])

    @contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        answers = partial(_redis_keeps_its_keys, self.url)
        with _serving(self._command, self.folder, answers) as process:
            yield process


@contextmanager
def own_redis(search: Sequence[str] = SEARCH) -> Iterator[OwnRedis]:
    """Yield a Redis that is not running yet; it keeps nothing on disk unless told to."""
    program = installed_program("redis-server", "redis-server", REDIS_VARIABLE, search)
    port = free_port()
    with _private_folder() as folder:
        command = [str(program), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder)]
        command += ["--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"]
        yield OwnRedis(f"redis://127.0.0.1:{port}/0", folder, command)


@contextmanager
def own_tls_redis(*, asks_for_clients: bool = False) -> Iterator[OwnRedis]:
    """Yield a Redis that speaks TLS only, with a certificate that a private authority signed.

    Its folder holds the authority's certificate, ``ca.pem``, and the server's own, ``own.pem`` and
    ``own.key``, which do for a client too. The URL names the authority.
    """
    with own_redis() as plain:
        make_certificates(plain.folder)
        own, ca = plain.folder / "own", plain.folder / "ca.pem"
        port = plain.url.rpartition(":")[2].partition("/")[0]
        options = ["--port", "0", "--tls-port", port, "--tls-ca-cert-file", str(ca)]
        options += ["--tls-cert-file", f"{own}.pem", "--tls-key-file", f"{own}.key"]
        options += ["--tls-auth-clients", "yes" if asks_for_clients else "no"]
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs={ca}"
        if asks_for_clients:
            url += f"&ssl_certfile={own}.pem&ssl_keyfile={own}.key"
        yield plain.with_options(*options, url=url)


def make_certificates(folder: Path) -> None:
    """Make a private authority (``ca.pem``) and a certificate of 127.0.0.1 signed by it."""
    openssl = find_program("openssl", SEARCH)
    if openssl is None:
        raise ServerUnavailable(
            "no openssl to make certificates with: install it (Debian, Ubuntu: apt-get install "
            "openssl)"
        )
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1\n")
    for arguments in (
        "genrsa -out ca.key 2048",
        "req -x509 -key ca.key -out ca.pem -subj /CN=ca -addext keyUsage=critical,keyCertSign",
        "req -newkey rsa:2048 -nodes -keyout own.key -out own.csr -subj /CN=server",
        "x509 -req -in own.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile san -out own.pem",
    ):
        command = [str(openssl), *arguments.split()]
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if ended.returncode:
            raise ServerUnavailable(f"openssl {arguments} failed: {ended.stderr}")
    (folder / "own.key").chmod(0o644)  # the server may run as another user


def _redis_keeps_its_keys(url: str) -> bool:
    try:
        with _client(url) as client:
            return bool(client.info("memory").get("maxmemory_policy") == "noeviction")
    except RedisError:
        return False


def _client(url: str) -> Redis:
    # One retry: a server may have closed a connection that was idle while the tests ran.
    return Redis.from_url(url, socket_timeout=CONNECT_S, retry=Retry(NoBackoff(), 1))


@contextmanager
def _private_folder() -> Iterator[Path]:
    # TMPDIR may be closed to the server's user, or too long for the path of a socket.
    with TemporaryDirectory(prefix="backcast-", dir="/tmp") as folder:
        os.chown(folder, *_server_account())
        yield Path(folder)


def _server_account() -> tuple[int, int]:
    """Choose the user and group ids of private servers, for PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        user = pwd.getpwnam("nobody")
    return user.pw_uid, user.pw_gid


@contextmanager
def _serving(
    command: Sequence[str], folder: Path, answers: Callable[[], bool]
) -> Iterator[subprocess.Popen[bytes]]:
    with _started(command, folder) as process:
        deadline = time.monotonic() + START_S
        while not answers():
            if process.poll() is not None or time.monotonic() > deadline:
                raise _failed(command, folder)
            time.sleep(0.05)
        yield process


@contextmanager
def _started(command: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    user, group = _server_account()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            user=user,
            group=group,
            process_group=0,  # Ctrl-C must not stop a server before the tests have cleaned up
        )
    try:
        yield process
    finally:
        # On SIGTERM, PostgreSQL would wait until its last client has left.
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _failed(command: Sequence[str], folder: Path) -> ServerUnavailable:
    log = (folder / "log").read_text(errors="replace").splitlines()
    return ServerUnavailable("\n".join([f"{command[0]} failed:", *log[-20:]]))


def _unusable(variable: str, url: str, error: Exception) -> ServerUnavailable:
    masked = re.sub(r"(://[^:/]*:).*@", r"\1***@", url)
    return ServerUnavailable(f"{variable} names {masked}, which tests cannot use: {error}")


def _version(folder: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", folder)]
