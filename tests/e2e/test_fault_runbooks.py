"""Every fault that the runbooks have a command for: made, and mended by what stands there.

What users see meanwhile is in tests/integration/test_faults.py.
"""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from redis import Redis
from starlette.testclient import TestClient

from backcast.errors import ArtifactCorrupt, ArtifactUnwritable
from backcast.lifecycle import open_backcast, promote, sweep
from backcast.registry.deployments import Deployments
from backcast.registry.schema import downgrade, make_engine
from backcast.registry.snapshots import Snapshots
from backcast.registry.versions import Versions
from backcast.settings import Settings
from service.app import create_app
from tests.e2e.documents import ROOT
from tests.e2e.stack import status_of, wait
from tests.integration.test_faults import eventually, remove, small_disk, truncate
from tests.integration.test_kill import die
from tests.servers import OwnRedis, free_port, own_redis
from tests.support import exit_codes
from tests.trainer_support import TINY, environment, open_workshop, synthetic, threads
from trainer.data.dataset import Dataset
from trainer.publishing import publish_version

SECONDS = 120
WIDE, SMALL = 256, 300_000
"""The dimension of version 2, and bytes that hold the registry but not all of its vectors."""

ROWS = dict(
    re.findall(
        r"^\| (?!fault|-)(.+?) \| (.+) \|$",
        (ROOT / "docs/operations.md").read_text(),
        re.MULTILINE,
    )
)
COMMANDS = {
    fault: found
    for fault, mend in ROWS.items()
    if (found := re.findall(r"`((?:backcast|cp) .+?)`", mend))
}
"""What the page types at each fault that something is typed at."""

TRIED: set[str] = set()
"""The faults that a test below makes."""

IDS = {
    "item": ["new", *(f"i{number:04d}" for number in range(150))],
    "user": [f"u{number:05d}" for number in range(300)],
}
Answers = dict[tuple[int, str], bytes]


@dataclass(frozen=True)
class Place:
    """A folder with a home of three trained versions, their data and a backup, as the page has it.

    Versions 0 and 1 went live, 2 is published; one item was put on the live snapshot.
    """

    folder: Path
    environ: dict[str, str]

    @property
    def settings(self) -> Settings:
        store = self.environ.get("BACKCAST_STORE_URL", "embedded:")
        home = self.folder / ".backcast"
        return Settings.load(home=home, reads="open", poll_seconds=0.05, store_url=store)

    def file(self, pattern: str) -> Path:
        """Return the only artifact of this pattern, from the folder of all."""
        (found,) = (self.folder / ".backcast/artifacts").glob(pattern)
        return found.relative_to(self.folder / ".backcast/artifacts")

    def artifact(self, file: Path) -> Path:
        return self.folder / ".backcast/artifacts" / file

    def run(self, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-ec", command],
            cwd=self.folder,
            env=self.environ | variables,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )

    def do(self, command: str, **variables: str) -> str:
        """Run what must succeed."""
        done = self.run(command, **variables)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def fail(self, command: str, why: str) -> None:
        """Run what must be refused, and say why."""
        done = self.run(command)
        assert done.returncode == 1, f"{command}\n{done.stdout}\n{done.stderr}"
        assert why in done.stdout + done.stderr

    def type(
        self, commands: list[str], *, k: int = -1, file: Path = Path(), **variables: str
    ) -> list[str]:
        """Run commands of the page, for version K and the artifact FILE; return what they say."""
        return [
            self.do(re.sub(r"\bK\b", str(k), line).replace("FILE", str(file)), **variables)
            for line in commands
        ]

    def on_redis(self, server: OwnRedis) -> "Place":
        """Return the same with its store in Redis, which holds what can be gone back to as well."""
        moved = Place(self.folder, self.environ | {"BACKCAST_STORE_URL": server.url})
        moved.do("rm -r .backcast && backcast restore backups/monday")
        return moved

    @contextmanager
    def serving(self, commands: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
        """Run the page's command that serves until the end, on a port of the test's own."""
        port = str(free_port())
        (command,) = commands
        with (self.folder / "log").open("a") as log:
            process = subprocess.Popen(
                ["bash", "-ec", f"exec {command.replace('8000', port)}"],
                cwd=self.folder,
                env=self.environ,
                text=True,
                stdout=log,
                stderr=log,
            )
        url = f"http://127.0.0.1:{port}"
        try:
            wait(lambda: status_of(f"{url}/readyz") == 200, process)
            yield process, url
        finally:
            process.terminate()
            process.wait()

    @contextmanager
    def served(self) -> Iterator[TestClient]:
        with TestClient(create_app(self.settings)) as client:
            yield client

    def answers(self) -> Answers:
        with self.served() as client:
            return answers(client)


def answers(client: TestClient | httpx2.Client) -> Answers:
    """Return the bytes of every vector, by version and kind."""
    found = {}
    for version in client.get("/versions").json()["servable_versions"]:
        for entity, ids in IDS.items():
            body = {"ids": ids, "version": version, "entity": entity}
            answer = client.post(
                "/embeddings/batch", json=body, headers={"Accept": "application/octet-stream"}
            )
            assert answer.status_code == 200, answer.text
            found[version, entity] = answer.content
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The place before any fault, to be copied."""
    folder = tmp_path_factory.mktemp("made")
    home = folder / ".backcast"
    chosen = {"BACKCAST_GATE_CHANGE": "1e9", "BACKCAST_GATE_METRIC": "0", "BACKCAST_READS": "open"}
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    place = Place(folder, environment(home, PATH=tools, **chosen))
    data = synthetic(folder / "shop")
    place.do("backcast db upgrade")
    with threads(1), open_workshop(home, data) as shop:
        for version, until in enumerate((0.5, 0.6, 0.7)):
            shop.train(until, config=TINY.model_copy(update={"widths": (8, 10, WIDE)}))
            last = int(data.timestamps[-1])
            publish_version(shop.registry, shop.artifacts, version, data, until=last)
    pq.write_table(pa.table({"id": ["new"], "vector": [[0.5] * 10]}), folder / "new.parquet")
    for command in ("promote 0", "promote 1", "upsert new.parquet", "backup backups/monday"):
        place.do(f"backcast {command}")
    return place


@pytest.fixture
def place(made: Place, tmp_path: Path) -> Place:
    folder = tmp_path / "place"
    shutil.copytree(made.folder, folder)
    return Place(folder, made.environ | {"BACKCAST_HOME": str(folder / ".backcast")})


@pytest.fixture(scope="module")
def right(made: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Answers]:
    """What is answered where nothing ever went wrong, by the version that is live."""
    folder = tmp_path_factory.mktemp("right") / "place"
    shutil.copytree(made.folder, folder)
    place = Place(folder, made.environ | {"BACKCAST_HOME": str(folder / ".backcast")})
    answered = {1: place.answers()}
    place.do("backcast promote 2")
    answered[2] = place.answers()
    assert {version for version, _ in answered[2]} == {0, 1, 2}
    return answered


def at(fault: str) -> pytest.MarkDecorator:
    """Hand a test what the page types at a fault."""
    TRIED.add(fault)
    return pytest.mark.parametrize("commands", [COMMANDS[fault]], ids=[fault])


@at("A replica is killed (`kill -9`)")
def test_replica_is_killed(place: Place, right: dict[int, Answers], commands: list[str]) -> None:
    with place.serving(commands) as (replica, url):
        with httpx2.Client(base_url=url) as client:
            assert answers(client) == right[1]
        replica.send_signal(signal.SIGKILL)
        assert replica.wait() == -signal.SIGKILL
        assert status_of(f"{url}/livez") is None
    with place.serving(commands) as (_, url), httpx2.Client(base_url=url) as client:
        assert answers(client) == right[1]


def promote_and_die(settings: Settings) -> None:
    Deployments.switch_in_turn = die  # type: ignore[assignment,method-assign]
    with open_backcast(settings) as backcast:
        promote(backcast, 2, actor="tests", force=True, reason="tried")


@at("A promoting command is killed, at any step")
def test_promotion_is_killed(place: Place, right: dict[int, Answers], commands: list[str]) -> None:
    assert exit_codes(promote_and_die, (place.settings,)) == [-signal.SIGKILL]
    assert place.answers() == right[1]
    place.type(commands, k=2, BACKCAST_OPERATION_TIMEOUT="2")
    assert place.answers() == right[2]


def train_and_die(settings: Settings, data: Path) -> None:
    Versions.register = die  # type: ignore[assignment,method-assign]
    with open_workshop(settings.home, Dataset.read(data)) as shop:
        shop.train(0.8)


def publish_again(settings: Settings, data: Path, version: int = 2) -> None:
    with open_workshop(settings.home, dataset := Dataset.read(data)) as shop:
        last = int(dataset.timestamps[-1])
        publish_version(shop.registry, shop.artifacts, version, dataset, until=last)


def publish_and_die(settings: Settings, data: Path) -> None:
    Snapshots.register = die  # type: ignore[method-assign]
    publish_again(settings, data)


@at("The trainer or `backcast publish` is killed")
def test_training_and_publication_are_killed(
    place: Place, right: dict[int, Answers], commands: list[str]
) -> None:
    for act in (train_and_die, publish_and_die):
        killed = exit_codes(act, (place.settings, place.folder / "shop"))
        assert killed == [-signal.SIGKILL]
    assert place.answers() == right[1]
    trained, published = place.type(commands, k=2)
    assert "Version 3 is registered" in trained
    assert "Snapshot v2-" in published
    place.do("backcast promote 2")
    assert place.answers() == right[2]


@at("Two promotions at once")
def test_two_promotions_at_once(
    place: Place, right: dict[int, Answers], commands: list[str]
) -> None:
    command = ["backcast", "promote", "2", "--expected-live", "1"]
    options = {"cwd": place.folder, "env": place.environ, "stderr": subprocess.DEVNULL}
    both = [subprocess.Popen(command, **options) for _ in range(2)]  # type: ignore[call-overload]
    assert sorted(process.wait() for process in both) == [0, 1]
    (shown,) = place.type(commands)
    assert re.search(r"\b2\b.*\blive\b", shown), shown
    assert place.answers() == right[2]


@at("Redis comes back empty, or was flushed")
def test_redis_is_flushed(place: Place, right: dict[int, Answers], commands: list[str]) -> None:
    with own_redis() as server, server.running(), Redis.from_url(server.url) as redis:
        moved = place.on_redis(server)
        assert moved.answers() == right[1]
        redis.flushall()
        moved.fail("backcast verify", "does not hold")
        moved.type(commands, k=1)
        assert moved.answers() == right[1]


@at("Redis is full (`maxmemory`)")
def test_redis_is_full(place: Place, right: dict[int, Answers], commands: list[str]) -> None:
    with own_redis() as server, server.running(), Redis.from_url(server.url) as redis:
        moved = place.on_redis(server)
        redis.config_set("maxmemory", int(redis.info("memory")["used_memory"]) + 50_000)
        moved.fail("backcast promote 2", "is full")
        assert moved.answers() == right[1]
        redis.config_set("maxmemory", 0)
        moved.type(commands, k=2)
        assert moved.answers() == right[2]


@at("A map, snapshot or manifest is truncated, swapped or missing, at a promotion")
def test_files_are_gone_at_a_promotion(
    place: Place, right: dict[int, Answers], commands: list[str]
) -> None:
    lost = place.file("versions/v2-*/transform.safetensors")
    remove(place.artifact(lost))
    truncate(place.artifact(place.file("snapshots/v2-*/item*.parquet")))
    place.fail("backcast promote 2", str(lost))
    assert place.answers() == right[1]
    place.type(commands, k=2, file=lost)
    assert place.answers() == right[2]


@at("The same when a replica starts")
def test_map_is_gone_when_a_replica_starts(
    place: Place, right: dict[int, Answers], commands: list[str]
) -> None:
    lost = place.file("versions/v1-*/transform.safetensors")
    remove(place.artifact(lost))
    with place.served() as client:
        assert client.get("/readyz").json()["type"].endswith("not-ready")
        place.type(commands, file=lost)
        eventually(lambda: check_ready(client))
        assert answers(client) == right[1]


@at("A change's file (delta) is truncated, swapped or missing")
def test_delta_is_gone(place: Place, right: dict[int, Answers], commands: list[str]) -> None:
    lost = place.file("deltas/*/*")
    truncate(place.artifact(lost))
    with place.served() as client:
        assert client.get("/readyz").json()["type"].endswith("not-ready")
        place.type(commands, file=lost)
        eventually(lambda: check_ready(client, ".1"))
        assert answers(client) == right[1]


@at(
    "The list of what was put (`put.parquet`) is truncated, swapped or missing, on publishing",
)
def test_list_of_what_was_put_is_gone(
    place: Place, right: dict[int, Answers], commands: list[str]
) -> None:
    place.do("backcast refresh --compact && rm -r backups/monday && backcast backup backups/monday")
    lost = place.file("snapshots/*/put.parquet")
    truncate(place.artifact(lost))
    with pytest.raises(ArtifactCorrupt, match=str(lost)):
        publish_again(place.settings, place.folder / "shop", version=1)
    place.type(commands, k=1, file=lost)
    place.do("backcast refresh")
    assert place.answers() == right[1]


@at("What is over its grace period cannot be deleted")
def test_what_is_over_cannot_be_deleted(
    place: Place, right: dict[int, Answers], commands: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object, path: str, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    over = place.artifact(place.file("snapshots/v0-*"))
    with monkeypatch.context() as patch, open_backcast(place.settings) as backcast:
        patch.setattr(LocalFileSystem, "rm", refuse)
        with pytest.raises(ArtifactUnwritable, match=f"{over.name} is not deleted"):
            sweep(backcast, timedelta(0))
    assert over.exists()
    place.type(commands, BACKCAST_GRACE_SECONDS="0")
    assert not over.exists()
    assert place.answers() == right[1]


@at("The disk is full on publishing")
def test_disk_is_full_on_publishing(
    place: Place, right: dict[int, Answers], commands: list[str]
) -> None:
    folder = place.artifact(Path("snapshots"))
    kept = folder.rename(folder.with_name("kept"))
    with small_disk(folder, SMALL), pytest.raises(ArtifactUnwritable):
        publish_again(place.settings, place.folder / "shop")
    folder.rmdir()
    kept.rename(folder)
    place.type(commands, k=2)
    place.do("backcast promote 2")
    assert place.answers() == right[2]


@at("The disk of the embedded store is full")
def test_disk_of_the_store_is_full(
    place: Place, right: dict[int, Answers], commands: list[str]
) -> None:
    store = place.folder / ".backcast/store"
    kept = store.rename(place.folder / "kept")
    with small_disk(store, SMALL):
        shutil.copytree(kept, store, dirs_exist_ok=True)
        place.fail("backcast promote 2", "cannot be changed: ")
        assert place.answers() == right[1]
        shutil.rmtree(kept)
        shutil.copytree(store, kept)
    shutil.rmtree(store, ignore_errors=True)
    kept.rename(store)  # there is room
    place.type(commands, k=2)
    assert place.answers() == right[2]


@at("The schema is older than the code")
def test_schema_is_older(place: Place, right: dict[int, Answers], commands: list[str]) -> None:
    engine = make_engine(place.settings.registry_url)
    downgrade(engine, "0002")
    engine.dispose()
    place.fail("backcast versions", "Run `backcast db upgrade`.")
    place.type(commands)
    assert place.answers() == right[1]


def check_ready(client: TestClient, snapshot: str = "") -> None:
    ready = client.get("/readyz")
    assert ready.status_code == 200
    assert ready.json()["snapshot"].endswith(snapshot)


def test_every_command_of_the_page_is_typed_here() -> None:
    assert COMMANDS.keys() == TRIED
