"""Dockerfile, docker-compose.yml and the proxy's file do what docs/deployment.md says.

No container engine is needed: the files are carried out by hand, step by step as they are written,
against a PostgreSQL and a Redis of the test's own that ask for their passwords.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import httpx2
import numpy as np
import psycopg
import pytest
from redis import Redis
from redis.exceptions import AuthenticationError
from sqlalchemy import make_url
from starlette.requests import Request

from backcast.client import Client
from backcast.errors import Overloaded, RegistryError
from backcast.registry import open_registry
from backcast.settings import Settings
from service import problems
from tests.e2e.documents import ROOT, blocks
from tests.e2e.images import TOOLS, Builder, Image
from tests.e2e.stack import REPLICAS, Stack, running, status_of, wait
from tests.service_support import ODD_IDS, assert_served, bearer, publish_ids
from tests.support import Home, build_home

USER = 10001
STOP_S = 30
NO_COPY = "must be superuser or have privileges|permission denied to COPY"  # PostgreSQL 15; 16


@contextmanager
def empty_folder() -> Iterator[Path]:
    """Make a folder below /tmp, where the image's user can reach it."""
    folder = Path(mkdtemp(prefix="backcast-", dir="/tmp"))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        subprocess.run(["chmod", "--recursive", "u+w", folder], check=True)
        subprocess.run(["rm", "--recursive", folder], check=True)  # Python takes far longer


@contextmanager
def built(stage: str) -> Iterator[Image]:
    """Build a stage; no index is named."""
    with empty_folder() as folder:
        yield Builder(folder, TORCH_INDEX="").build(stage)


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """The serving image: nothing can be written but the volume and /tmp."""
    with built("serve") as image:
        subprocess.run(["chmod", "--recursive", "a-w", image.root], check=True)
        Path(image.environ["BACKCAST_HOME"]).chmod(0o755)
        Path(image.environ["HOME"]).chmod(0o1777)
        yield image


@pytest.fixture(scope="module")
def stack(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Healthy databases, and the registry's schema."""
    with running(image, tmp_path_factory.mktemp("stack")) as stack:
        assert stack.postgres_is_healthy()
        assert stack.redis_is_healthy()
        migrated = stack.run(service="migrate")
        assert migrated.returncode == 0, migrated.stderr
        yield stack


@dataclass(frozen=True)
class Served:
    """Replicas behind the proxy."""

    stack: Stack
    home: Home
    admin: str
    reader: str
    exits: ExitStack
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)

    def start(self, *replicas: str) -> None:
        for replica in replicas:
            self.processes[replica] = self.exits.enter_context(self.stack.replica(replica))
        for replica in replicas:
            alive = f"http://{self.stack.hosts[f'{replica}:8000']}/livez"
            wait(lambda url=alive: status_of(url) == 200, self.processes[replica])  # type: ignore[misc]
            assert self.stack.healthy(replica)

    def stop(self, replica: str, signum: signal.Signals) -> int:
        self.processes[replica].send_signal(signum)
        return self.processes[replica].wait(STOP_S)

    @contextmanager
    def reading(self) -> Iterator[list[int]]:
        """Yield the statuses of requests that go on until the end, one after the other."""
        statuses: list[int] = []
        over = threading.Event()

        def read() -> None:
            with httpx2.Client(headers=bearer(self.reader)) as client:
                while not over.is_set():
                    answer = client.get(f"{self.stack.url}/embeddings/007?version=0")
                    statuses.append(answer.status_code)

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield statuses
        finally:
            over.set()
            thread.join()


@pytest.fixture(scope="module")
def served(stack: Stack) -> Iterator[Served]:
    """Everything runs; versions 0 and 1 are published, and went live one after the other."""
    folder = Path(stack.image.environ["BACKCAST_HOME"])
    with ExitStack() as exits:
        home = exits.enter_context(
            build_home(folder, (4, 6), bias=True, published=False, **_places(stack))
        )
        for version in home.dims:
            publish_ids(home, version, ODD_IDS)
        _give_away(folder)
        served = Served(stack, home, _new_key(stack, "admin"), _new_key(stack, "read"), exits)
        served.start(*REPLICAS)
        exits.enter_context(stack.proxy())
        _promote_through_the_proxy(served)
        yield served


@pytest.mark.long
def test_train_image_knows_the_methods() -> None:
    with built("train") as image:
        shown = image.run([*image.entrypoint, "methods"])
    assert shown.returncode == 0, shown.stderr
    assert "grown-direct" in shown.stdout


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Stack]:
    """A stack of its own, whose image has the packages that run the tests instead of its own."""
    with empty_folder() as folder:
        image = Builder(folder).build("common")
        (image.root / "opt").mkdir()
        (image.root / "opt/backcast").symlink_to(Path(TOOLS).parent)
        shutil.copytree(ROOT / "trainer", image.workdir / "trainer")
        with running(image, tmp_path) as stack:
            yield stack


def test_first_version_comes_about_as_the_guide_says(trainer: Stack) -> None:
    migrated = trainer.run(service="migrate")
    assert migrated.returncode == 0, migrated.stderr
    for line in _typed("trainer"):
        done = trainer.run(*trainer.place(line).split(), service="trainer")
        assert done.returncode == 0, f"{line}: {done.stderr}"
    verified = trainer.run("verify")
    assert verified.returncode == 0, verified.stderr
    assert "vectors of 1 snapshot are what was registered" in verified.stdout
    with open_registry(Settings.load(**_places(trainer))) as registry:
        found = registry.deployments.live()
        assert found is not None
        assert (found.version, found.generation) == (0, 1)


def test_serving_image_lacks_the_training_stack(image: Image) -> None:
    program = """if True:
        from importlib.util import find_spec
        names = "service migrations torch trainer torch_geometric torchmetrics matplotlib"
        print(*(name for name in [*names.split(), "tests", "pytest", "pip"] if find_spec(name)))
    """
    assert image.run(["python", "-c", program]).stdout.split() == ["service", "migrations", "torch"]


def test_serving_image_is_as_large_as_the_guide_says(image: Image) -> None:
    """But for torch, whose builds differ."""
    said = re.search(r"`serve` takes (\d+) MiB", (ROOT / "docs/deployment.md").read_text())
    assert said is not None
    measure = ["du", "-sm", *(f"--exclude={name}" for name in ("torch", "nvidia", "triton"))]
    taken = subprocess.run(
        [*measure, image.root / "opt/backcast"], capture_output=True, text=True, check=True
    )
    assert abs(int(taken.stdout.split()[0]) - int(said[1])) < 0.05 * int(said[1])


def test_serving_image_is_read_only_and_not_roots(image: Image) -> None:
    refused = image.run(["touch", str(image.workdir / "file")])
    assert "Permission denied" in refused.stderr
    ids = image.run(["id", "--user"]).stdout.strip(), image.run(["id", "--group"]).stdout.strip()
    own = f"{os.geteuid()}:{os.getegid()}"
    assert ":".join(ids) == image.user == (own if os.geteuid() else f"{USER}:{USER}")


def test_image_alone_asks_for_a_key_before_others_can_reach_it(image: Image) -> None:
    refused = image.run([*image.entrypoint, *image.command])
    assert refused.returncode == 1
    message = json.loads(refused.stderr)["message"]
    assert message.startswith("--host 0.0.0.0 can be reached from other hosts, and")


def test_databases_ask_for_the_passwords_in_the_secrets(stack: Stack) -> None:
    host, port = stack.hosts["redis:6379"].split(":")
    with Redis(host=host, port=int(port)) as client, pytest.raises(AuthenticationError):
        client.ping()
    wrong = f"postgresql+psycopg://backcast:guess@{stack.hosts['postgres:5432']}/backcast"
    with pytest.raises(RegistryError, match="password authentication failed"):
        open_registry(Settings.load(database_url=wrong))


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("UPDATE audit SET actor = 'nobody'", "audit is append-only"),
        ("DELETE FROM audit_outcomes", "audit_outcomes is append-only"),
        ("TRUNCATE audit CASCADE", "permission denied for table audit"),
        ("ALTER TABLE audit DISABLE TRIGGER USER", "must be owner of table audit"),
        ("DROP TRIGGER audit_append_only ON audit", "must be owner of relation audit"),
        ("DROP TABLE audit_outcomes", "must be owner of table audit_outcomes"),
        ("DROP FUNCTION refuse_to_change_the_log CASCADE", "must be owner of function"),
        ("SET session_replication_role = replica", "permission denied to set parameter"),
        ("SELECT setval('audit_id_seq', 1)", "permission denied for sequence audit_id_seq"),
        ("CREATE TABLE mine ()", "permission denied for schema public"),
        ("CREATE SCHEMA mine", "permission denied for database backcast"),
        ("SET ROLE backcast_owner", 'permission denied to set role "backcast_owner"'),
        ("ALTER ROLE backcast SUPERUSER", "must be superuser|permission denied to alter role"),
        ("COPY usage FROM PROGRAM 'true'", NO_COPY),
        ("COPY usage TO '/tmp/usage'", NO_COPY),
    ],
)
def test_role_of_the_service_changes_rows_and_nothing_else(
    served: Served, statement: str, why: str
) -> None:
    before = _noted(served.stack)
    assert before
    refused = pytest.raises(psycopg.Error, match=why)
    with _connected(served.stack, "database_url") as connection, refused:
        connection.execute(statement)
    assert _noted(served.stack) == before


def test_owner_of_the_tables_is_no_superuser(stack: Stack) -> None:
    with _connected(stack, "owner_database_url") as connection:
        owned = "SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'public'"
        assert connection.execute(owned).fetchall() == [("backcast_owner",)]
        with pytest.raises(psycopg.Error, match=NO_COPY):
            connection.execute("COPY usage FROM PROGRAM 'true'")


def test_every_command_works_as_the_role_of_the_service(served: Served) -> None:
    """The replicas, which promoted and answered, connect as it too."""
    stack, folder = served.stack, served.stack.image.environ["BACKCAST_HOME"]
    prefix = served.reader.split("_")[1]
    for command in (
        "backup {folder}/kept",
        "verify",
        "erase missing --entity user",
        "refresh --compact",
        "rollback --reason tried",
        "promote 1 --force --reason tried",
        "pin ranking 0",
        "usage --version 0",
        f"keys rotate {prefix} --overlap 1h",
        "deprecate 0 --sunset 2099-01-31",
        "gc",
        "audit",
        "db check",
    ):
        done = stack.run(*command.format(folder=folder).split())
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_secrets_are_kept_by_their_folder(stack: Stack) -> None:
    folder = stack.folder / "secrets"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o444}


def test_secrets_are_not_made_twice(stack: Stack) -> None:
    again = subprocess.run(
        ["sh", Path("deploy/secrets.sh").absolute()],
        cwd=stack.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 1
    assert "delete secrets/ and the volumes" in again.stderr


def test_every_vector_comes_through_the_proxy(served: Served) -> None:
    with Client(served.stack.url, served.reader) as client:
        one = np.stack([client.get(id, version=0) for id in ODD_IDS])
        many = client.get_many(ODD_IDS, version=0)
    for vectors in (one, many.vectors):
        assert_served(vectors, served.home, ODD_IDS, 0, live=1)


def test_headers_pass_the_proxy(served: Served) -> None:
    url, headers = f"{served.stack.url}/embeddings/007?version=1", bearer(served.reader)
    first = httpx2.get(url, headers=headers)
    assert first.headers["Backcast-Live-Version"] == "1"
    again = httpx2.get(url, headers={**headers, "If-None-Match": first.headers["ETag"]})
    assert again.status_code == 304
    other = httpx2.get(url, headers={**headers, "Backcast-Expect-Snapshot": "v0-0"})
    assert other.status_code == 412


@pytest.mark.parametrize("path", ["/metrics", "/metrics?x=1", "/%6Detrics", "/metric%73"])
def test_proxy_keeps_metrics_inside(served: Served, path: str) -> None:
    answer = httpx2.get(f"{served.stack.url}{path}")
    assert answer.status_code == 404
    assert "server" not in answer.headers
    assert answer.headers["content-type"] == "text/html"  # the proxy's own, no problem document


@pytest.mark.parametrize(
    "path", ["/admin/keys", "/admin", "/%61dmin/keys", "/admin%2Fkeys", "/admin/../admin/keys"]
)
def test_administration_comes_by_a_port_of_its_own(served: Served, path: str) -> None:
    headers = bearer(served.admin)
    refused = httpx2.get(f"{served.stack.url}{path}", headers=headers)
    assert (refused.status_code, refused.headers["content-type"]) == (403, "text/html")
    assert httpx2.get(f"{served.stack.admin_url}/admin/keys", headers=headers).status_code == 200
    assert httpx2.get(f"{served.stack.admin_url}/metrics").status_code == 404


def test_one_address_does_not_take_all_connections(served: Served) -> None:
    host, port = served.stack.hosts["proxy:8000"].split(":")

    def answered(connection: socket.socket) -> bool:
        try:
            return connection.recv(12) == b"HTTP/1.1 200"
        except ConnectionError:
            return False

    def asking(source: str) -> socket.socket:
        connection = socket.create_connection((host, int(port)), 30, (source, 0))
        with suppress(ConnectionError):
            connection.sendall(b"GET /livez HTTP/1.1\r\nHost: backcast\r\n\r\n")
        return connection

    with ExitStack() as held:
        many = [held.enter_context(closing(asking("127.0.0.2"))) for _ in range(600)]
        assert 490 <= sum(map(answered, many)) <= 500
        assert answered(held.enter_context(closing(asking("127.0.0.3"))))


def test_one_consumer_does_not_take_all_that_the_replicas_can(served: Served) -> None:
    ids = {"ids": ["007"] * 10_000, "version": 1}
    headers = {**bearer(served.reader), "Accept": "application/octet-stream"}
    with (
        httpx2.Client(base_url=served.stack.url, headers=headers, timeout=30) as client,
        ThreadPoolExecutor(5) as senders,
    ):
        ask = partial(client.post, "/embeddings/batch", json=ids)
        answers = [sent.result() for sent in [senders.submit(ask) for _ in range(40)]]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.json()["type"] for answer in refused} == {"urn:backcast:problem:rate-limited"}
    assert len(refused) < len(answers)
    other = bearer(_new_key(served.stack, "admin"))
    assert httpx2.get(f"{served.stack.url}/embeddings/007?version=0", headers=other).is_success


def test_replicas_come_and_go_without_a_failed_request(served: Served) -> None:
    stack, (first, second) = served.stack, REPLICAS
    with served.reading() as statuses:
        served.stop(second, signal.SIGKILL)
        _wait_for_more(statuses)
        assert not stack.healthy(second)
        served.start(second)
        _wait_until_in_turn(stack, second)
        ended = served.stop(first, signal.Signals[stack.image.stop_signal])
        _wait_for_more(statuses)
        served.start(first)
    assert ended == -signal.SIGTERM  # uvicorn has closed everything, then ends as it was told to
    assert set(statuses) == {200}


def test_what_no_replica_takes_is_told_as_they_would(served: Served) -> None:
    for replica in REPLICAS:
        served.stop(replica, signal.SIGKILL)
    wait(lambda: status_of(f"{served.stack.url}/livez") == 503)
    answer = httpx2.get(f"{served.stack.url}/embeddings/007?version=0")
    served.start(*REPLICAS)
    for replica in REPLICAS:
        _wait_until_in_turn(served.stack, replica)
    said = answer.json()
    told = Overloaded(said["detail"])
    request = Request({"type": "http", "raw_path": b"/", "headers": []})
    expected = problems.describe(request, told)
    assert answer.status_code == expected.status_code
    for name in ("content-type", "retry-after"):
        assert answer.headers[name] == expected.headers[name]
    assert said == {name: json.loads(bytes(expected.body))[name] for name in said}


def test_backup_comes_back_by_the_owner_only(served: Served) -> None:
    stack = served.stack
    place = f"{stack.image.environ['BACKCAST_HOME']}/again"
    kept = stack.run("backup", place)
    assert kept.returncode == 0, kept.stderr
    emptied = stack.run("db", "downgrade", "base", service="migrate")
    refused = stack.run("restore", place)
    restored = stack.run("restore", place, service="migrate")
    assert (emptied.returncode, restored.returncode) == (0, 0), emptied.stderr + restored.stderr
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert json.loads(refused.stderr)["message"] == (
        "The role in BACKCAST_DATABASE_URL may not do this: permission denied for schema public. "
        "Use the one that owns the tables."
    )
    again = stack.run("verify")
    assert again.returncode == 0, again.stderr


def test_no_log_shows_a_password(served: Served) -> None:
    logs = "".join(served.stack.log(name) for name in (*REPLICAS, "proxy"))
    assert "Uvicorn running" in logs
    for path in (served.stack.folder / "secrets").iterdir():
        assert path.read_text() not in logs


@contextmanager
def _connected(stack: Stack, secret: str) -> Iterator[psycopg.Connection[Any]]:
    """Connect to the registry by one of the URLs in the secrets."""
    url = make_url((stack.image.root / "run/secrets" / secret).read_text())
    conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(conninfo, autocommit=True) as connection:
        yield connection


def _noted(stack: Stack) -> list[Any]:
    with _connected(stack, "database_url") as connection:
        return connection.execute("SELECT * FROM audit ORDER BY id").fetchall()


def _places(stack: Stack) -> dict[str, Any]:
    secrets = stack.image.root / "run/secrets"
    return {name: (secrets / name).read_text() for name in ("database_url", "store_url")}


def _typed(service: str) -> list[str]:
    """Return the commands that the guide has a service run."""
    lines = "".join(block.text for block in blocks("docs/deployment.md")).splitlines()
    prefix = f"docker compose run --rm {service} "
    return [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]


def _new_key(stack: Stack, scope: str) -> str:
    """Make a key as the guide does."""
    (line,) = (line for line in _typed("backcast") if line.endswith(scope))
    made = stack.run(*line.split())
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def _give_away(folder: Path) -> None:
    """Let the image's user own what the tests have written to its volume."""
    if os.geteuid() == 0:
        subprocess.run(["chown", "--recursive", f"{USER}:{USER}", folder], check=True)


def _promote_through_the_proxy(served: Served) -> None:
    url = served.stack.url
    unready = httpx2.get(f"{url}/readyz")
    assert unready.status_code == 503
    assert unready.headers["content-type"] == "application/problem+json"
    for version, seen in ((0, None), (1, 0)):
        order = {"expected_live": seen, "force": True, "reason": "random vectors"}
        accepted = httpx2.post(
            f"{served.stack.admin_url}/admin/versions/{version}/promote",
            json=order,
            headers=bearer(served.admin),
        )
        assert accepted.status_code == 202, accepted.text
        wait(lambda live=version: {_live(served, name) for name in REPLICAS} == {live})  # type: ignore[misc]
    for replica in REPLICAS:
        _wait_until_in_turn(served.stack, replica)


def _live(served: Served, replica: str) -> object:
    ready = httpx2.get(f"http://{served.stack.hosts[f'{replica}:8000']}/readyz")
    return ready.json().get("live_version")


def _wait_until_in_turn(stack: Stack, replica: str) -> None:
    """Wait until the proxy has had a request answered by a replica, out of those that can serve."""
    answered = f" ready/{replica} "
    before = stack.log("proxy").count(answered)

    def once_more() -> bool:
        httpx2.get(f"{stack.url}/readyz")
        return stack.log("proxy").count(answered) > before

    wait(once_more)


def _wait_for_more(statuses: list[int], more: int = 50) -> None:
    enough = len(statuses) + more
    wait(lambda: len(statuses) >= enough)
