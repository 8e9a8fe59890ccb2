"""Everything is backed up and comes back to the same bits, on any database and store."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from redis import Redis
from sqlalchemy import select

from backcast.acts import Act, Actor
from backcast.artifacts import Artifacts, dump_json
from backcast.errors import (
    ArtifactCorrupt,
    ArtifactError,
    ArtifactMissing,
    Conflict,
    InvalidInput,
    NotFound,
    SchemaMismatch,
    StoreError,
)
from backcast.lifecycle import (
    Listed,
    back_up,
    backups,
    erase,
    faults_of_backup,
    open_backcast,
    open_backup,
    open_new,
    refresh,
    restore,
    sweep,
    upsert,
    verify,
)
from backcast.lifecycle.backups import Copied
from backcast.lifecycle.files import NamedFile, copy_file
from backcast.registry import OperationDraft, Registry, tables
from backcast.registry.copying import differing, fingerprints
from backcast.registry.revisions import Revision
from backcast.registry.schema import downgrade, make_engine
from backcast.settings import Settings
from backcast.versions import Claim, Entity, Scope, Use
from tests.service_support import assert_served, client_of, read_rows
from tests.support import Home, build_home, check_books, exit_codes, normal

HOUR = timedelta(hours=1)


def furnish(home: Home) -> None:
    """Leave something of everything: drift, upserts, erasures, a refresh, keys, pins, usage."""
    backcast = home.backcast
    rng = np.random.default_rng(7)
    for number in range(3):
        vector = normal(rng, 1, home.dims[2])
        upsert(backcast, Entity.ITEM, [f"put {number}"], vector, actor="ann", most_changed=99)
    erase(backcast, Entity.USER, ["user 1", "user 2"], actor="ann", grace=HOUR)
    home.publish(2, seed=5)
    refresh(backcast, actor="ann")
    upsert(backcast, Entity.ITEM, ["put 1"], vector, actor="ann", most_changed=99)
    upsert(backcast, Entity.USER, ["user 2"], vector, actor="ann", most_changed=99)  # is back
    backcast.registry.keys.create("ranking", Scope.READ, pin=0)
    key, _ = backcast.registry.keys.create("ads", Scope.ADMIN)
    backcast.registry.keys.revoke(key.prefix)
    today = backcast.registry.now().date()
    done = backcast.registry.operations.start(OperationDraft("promote", {}, "ann", "host:1"))
    backcast.registry.operations.succeed(Claim(done.id, "host:1"), {"live_version": 2})
    backcast.registry.usage.add([Use("ranking", 0, today, 5_000_000_000, 7)])


@pytest.fixture
def home(tmp_path: Path, backends: dict[str, Any], precision: str) -> Iterator[Home]:
    with build_home(
        tmp_path / "home", bias=True, direct={2: [0]}, live=2, store_precision=precision, **backends
    ) as home:
        furnish(home)
        yield home


@pytest.fixture(params=["float32"])
def precision(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=["postgresql and redis"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings of an empty machine. Its Redis is emptied when ``lose`` is called."""
    places: dict[str, Any] = {}
    if request.param == "postgresql and redis":
        places["database_url"] = request.getfixturevalue("new_postgres")
        places["store_url"] = request.getfixturevalue("empty_redis")
    return Settings.load(home=tmp_path / "machine", gate_coverage=0.0, gate_change=1e9, **places)


def backed_up(home: Home, folder: Path) -> Copied:
    return back_up(home.backcast, Artifacts(str(folder)))


def restored(folder: Path, settings: Settings, **options: Any) -> Copied:
    with open_backup(Artifacts(str(folder))) as backup, open_new(settings) as target:
        return restore(backup, target, grace=HOUR, **options)


def raw_store(settings: Settings) -> dict[str, bytes]:
    """Return every byte of vectors and ids that a store holds, without its manifests."""
    if settings.store_url.startswith("redis"):
        with Redis.from_url(settings.store_url) as redis:
            return {key.decode(): redis.get(key) for key in redis.scan_iter("backcast:*:*")}
    folder = settings.home / "store"
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def lose(settings: Settings) -> None:
    if settings.store_url.startswith("redis"):
        with Redis.from_url(settings.store_url) as redis:
            redis.flushdb()


def rows_of(settings: Settings) -> dict[str, Any]:
    engine = make_engine(settings.registry_url)
    with engine.connect() as connection:
        found = fingerprints(connection)
    engine.dispose()
    return found


def absences(settings: Settings) -> int:
    """Return how many operations have no error; a JSON null is none that is absent."""
    engine = make_engine(settings.registry_url)
    with engine.connect() as connection:
        count = connection.exec_driver_sql("SELECT count(*) FROM operations WHERE error IS NULL")
        found = int(count.scalar_one())
    engine.dispose()
    assert found
    return found


def named_bytes(settings: Settings) -> dict[str, bytes]:
    root = Path(settings.artifacts_root)
    return {
        str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("empty", ["sqlite and embedded", "postgresql and redis"], indirect=True)
@pytest.mark.parametrize("precision", ["float32", "float16"], indirect=True)
def test_restored_on_an_empty_machine_every_bit_is_the_same(
    tmp_path: Path, home: Home, empty: Settings
) -> None:
    same_kind = bool(home.settings.database_url) is bool(empty.database_url)
    with home.backcast.registry.audit.recording(Actor("ann"), Act("pin")):
        pass
    rows, files = rows_of(home.settings), named_bytes(home.settings)
    stored = raw_store(home.settings)
    answers = served(home, home.settings)
    done = backed_up(home, tmp_path / "backup")
    assert rows_of(home.settings) == rows
    lose(home.settings)

    back = restored(tmp_path / "backup", empty)

    assert differing(rows, rows_of(empty)) == ["audit", "audit_outcomes"]  # the restore itself
    assert all(found.rows for found in rows.values()), rows
    assert absences(empty) == absences(home.settings)
    assert named_bytes(empty) == files
    assert "model.safetensors" in {Path(name).name for name in files}
    assert "put.parquet" in {Path(name).name for name in files}
    if same_kind:
        assert raw_store(empty) == stored
    assert served(home, empty) == answers
    assert (back.live, back.rows, back.files, back.bytes) == (
        *(done.live, done.rows),
        *(done.files, done.bytes),
    )
    with open_backcast(empty) as backcast:
        found = verify(backcast)
        assert (found.faults, found.vectors, found.live) == ((), back.vectors, done.live)
    check_books(replace(home, settings=empty))


def served(home: Home, settings: Settings) -> dict[int, bytes]:
    """Return the answers of a service for every version, as raw float32."""
    answers = {}
    with open_backcast(settings) as backcast:
        there = replace(home, settings=settings, backcast=backcast)
        with client_of(there, reads="open") as client:
            for version in range(3):
                body = {"ids": [*home.ids(version=2), "put 0", "put 1"], "version": version}
                raw = {"Accept": "application/octet-stream"}
                answer = client.post("/embeddings/batch", json=body, headers=raw)
                assert answer.status_code == 200, answer.text
                answers[version] = answer.content
        with backcast.registry._database.write() as connection:  # the key that the client made
            key = select(tables.consumers.c.id).where(tables.consumers.c.name.like("consumer %"))
            id = connection.scalar(key)
            for table, column in (("usage", "consumer"), ("api_keys", "consumer")):
                rows = tables.metadata.tables[table]
                connection.execute(rows.delete().where(rows.c[column] == id))
            connection.execute(tables.consumers.delete().where(tables.consumers.c.id == id))
    return answers


def test_life_goes_on_where_it_was_restored(tmp_path: Path, small: Home, empty: Settings) -> None:
    numbers = small.backcast.registry.erasures.all().number
    erase(small.backcast, Entity.ITEM, ["item 3"], actor="ann", grace=HOUR)
    vector = normal(np.random.default_rng(1), 1, small.dims[2])
    upsert(small.backcast, Entity.ITEM, ["item 3"], vector, actor="ann", most_changed=99)
    assert small.backcast.registry.erasures.all().number == numbers  # the last one is over
    backed_up(small, tmp_path / "backup")
    restored(tmp_path / "backup", empty)
    with open_backcast(empty) as backcast:
        there = replace(small, settings=empty, backcast=backcast)
        backcast.registry.keys.create("new consumer", Scope.READ)
        erase(backcast, Entity.ITEM, ["item 4"], actor="ann", grace=HOUR)
        assert backcast.registry.erasures.all().number > numbers + 1  # none is given twice
        there.register(5, parent=2)
        there.publish(3)
        there.promote(3)
        there.vectors[3][Entity.ITEM].pop("item 4", None)
        with client_of(there) as client:
            ids = [id for id in there.ids(version=3) if id != "item 4"]
            body = {"ids": ids, "version": 0}
            answer = client.post("/embeddings/batch", json=body)
            assert_served(read_rows(answer), there, ids, 0, live=3)
            assert client.get("/embeddings/item 4?version=0").status_code == 404
        backcast.registry.deployments.history()
        check_books(there)


# --- kills ----------------------------------------------------------------------------------------


def die_at(step: str, fraction: float) -> Callable[[str, float], None]:
    def report(found: str, done: float) -> None:
        if found == step and done >= fraction:
            os.kill(os.getpid(), signal.SIGKILL)

    return report


def back_up_and_die(settings: Settings, folder: Path, step: str, fraction: float) -> None:
    with open_backcast(settings) as backcast:
        back_up(backcast, Artifacts(str(folder)), die_at(step, fraction))


def restore_and_die(settings: Settings, folder: Path, step: str, fraction: float) -> None:
    restored(folder, settings, report=die_at(step, fraction))


@pytest.mark.parametrize("fraction", [0.2, 0.5, 1.0])
def test_killed_backup_is_none_and_is_carried_on(
    tmp_path: Path, small: Home, fraction: float
) -> None:
    folder = tmp_path / "backup"
    codes = exit_codes(back_up_and_die, (small.settings, folder, "files", fraction))
    assert codes == [-signal.SIGKILL]
    with pytest.raises(NotFound, match="never finished"):
        restored(folder, Settings.load(home=tmp_path / "machine"))
    before = {path: path.stat().st_ino for path in folder.rglob("*.parquet")}
    last = max(before, key=lambda path: path.stat().st_mtime_ns)
    last.write_bytes(last.read_bytes()[:-3])  # as a kill in the middle of a file leaves it
    backed_up(small, folder)
    assert {path: path.stat().st_ino for path in before} == before
    with open_backup(Artifacts(str(folder))) as backup:
        assert faults_of_backup(backup)[1] == []


@pytest.mark.parametrize(("step", "fraction"), [("files", 0.3), ("store", 0.8), ("registry", 0.9)])
def test_killed_restore_is_run_again(
    tmp_path: Path, small: Home, empty: Settings, step: str, fraction: float
) -> None:
    folder = tmp_path / "backup"
    backed_up(small, folder)
    assert exit_codes(restore_and_die, (empty, folder, step, fraction)) == [-signal.SIGKILL]
    with open_new(empty) as backcast:
        assert backcast.registry.versions.all() == []
    restored(folder, empty)
    with open_backcast(empty) as backcast:
        assert verify(backcast).faults == ()
    check_books(replace(small, settings=empty))


# --- what is refused ------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def swap(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.write_bytes(content)


def swap_last(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x01
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Home]:
    with build_home(tmp_path / "home", bias=True, live=2) as home:
        furnish(home)
        yield home


HARMS: Sequence[Callable[[Path], None]] = (truncate, swap, remove)


def test_every_file_of_a_backup_is_checked_and_named(tmp_path: Path, small: Home) -> None:
    folder = tmp_path / "backup"
    backed_up(small, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert len(files) > 20
    for number, path in enumerate(files):
        own = path.parent.name == "registry"
        for harm in HARMS if own else (HARMS[number % 3],):
            content, machine = path.read_bytes(), Settings.load(home=tmp_path / f"{number}")
            harm(path)
            with pytest.raises((ArtifactError, NotFound), match=path.name):
                restored(folder, machine)
            with open_new(machine) as backcast:
                backcast.registry.demand_empty()
            if not own:
                with open_backup(Artifacts(str(folder))) as backup:
                    (fault,) = faults_of_backup(backup)[1]
                    assert path.name in fault
            path.write_bytes(content)
    assert restored(folder, Settings.load(home=tmp_path / "machine")).live is not None


def test_place_that_is_not_empty_is_refused_and_left_as_it_is(tmp_path: Path, small: Home) -> None:
    folder = tmp_path / "backup"
    backed_up(small, folder)
    with pytest.raises(Conflict, match="There is a backup already"):
        backed_up(small, folder)
    before = rows_of(small.settings)
    with pytest.raises(Conflict, match=r"registry sqlite.* is not empty: \w+ has rows"):
        restored(folder, small.settings)
    assert rows_of(small.settings) == before
    with build_home(tmp_path / "other", live=0) as other:
        for places, what in (
            ({"store_url": f"embedded:{tmp_path}/other/store"}, "store holds v0-"),
            ({"artifacts_url": f"{tmp_path}/other/artifacts"}, "artifacts hold "),
        ):
            with pytest.raises(Conflict, match=what):
                restored(folder, Settings.load(home=tmp_path / what, **places))
        other.check_served(0)


@pytest.mark.parametrize("name", ["notes.txt", "versions/v9-01234567/model.safetensors", "a/b"])
def test_backup_among_strange_files_is_refused(tmp_path: Path, small: Home, name: str) -> None:
    strange = tmp_path / "backup" / name
    strange.parent.mkdir(parents=True)
    strange.write_text("mine")
    with pytest.raises(Conflict, match="There are files already that are no part of this backup"):
        backed_up(small, tmp_path / "backup")
    assert [path for path in (tmp_path / "backup").rglob("*") if path.is_file()] == [strange]


def rewrite(folder: Path, statement: str | None = None, **changes: Any) -> None:
    """Change a backup as one who can forge its digests; a change to ... takes a field away."""
    database, place = folder / "registry" / "registry.db", Artifacts(str(folder))
    document = {**backups._read_manifest(place)}
    if statement is not None:
        engine = make_engine(f"sqlite:///{database}")
        with engine.begin() as connection:
            assert connection.exec_driver_sql(statement).rowcount
        engine.dispose()
        written = place.write("registry", {"registry.db": database.read_bytes()})
        document["registry_sha256"] = written["registry.db"].sha256
    document = {name: v for name, v in {**document, **changes}.items() if v is not ...}
    content = {"backup": document, "sha256": backups._digest(document)}
    place.write("registry", {"backup.json": dump_json(content)})


@pytest.mark.parametrize(
    "changes",
    [
        *({name: ...} for name in ("format", "stored", "created_at", "registry_sha256")),
        *({name: None} for name in ("format", "stored", "created_at", "registry_sha256")),
        {"registry_sha256": 7},
        {"created_at": "yesterday"},
        {"stored": {"v2": "float8"}},
        {"stored": ["v2"]},
    ],
)
def test_forged_manifest_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with build_home(tmp_path / "home", live=0) as home:
        backed_up(home, tmp_path / "backup")
    rewrite(tmp_path / "backup", **changes)
    with pytest.raises(ArtifactCorrupt), open_backup(Artifacts(str(tmp_path / "backup"))):
        pass


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE snapshots SET folder = '.' WHERE version = 0",
        "UPDATE snapshots SET folder = '' WHERE version = 0",
        "UPDATE snapshots SET folder = 'snapshots' WHERE version = 0",
        "UPDATE snapshots SET folder = 'versions/v0-01234567' WHERE version = 1",
        "UPDATE drifts SET id = '.' WHERE id = (SELECT min(id) FROM drifts)",
        "UPDATE versions SET folder = 'versions/../a-01234567' WHERE number = 1",
        "UPDATE deltas SET file = 'delta.parquet'",
        "UPDATE versions SET files = '[1]'",
        'UPDATE versions SET files = \'{"a": {"size": "b", "sha256": 1}}\'',
        "UPDATE snapshots SET counts = '{\"a\": 1}'",
        "UPDATE snapshots SET details = '{\"put\": 7}'",
    ],
)
def test_forged_rows_are_refused(tmp_path: Path, kept: Path, statement: str) -> None:
    folder = tmp_path / "forged"
    shutil.copytree(kept, folder)
    rewrite(folder, statement)
    with (
        pytest.raises(ArtifactCorrupt, match=r"registry.db is refused: it holds what no backup"),
        open_backup(Artifacts(str(folder))),
    ):
        pass


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backup that is only read."""
    folder = tmp_path_factory.mktemp("kept")
    with build_home(folder / "home", bias=True, live=2) as home:
        furnish(home)
        backed_up(home, folder / "backup")
    return folder / "backup"


def test_only_regular_files_are_opened(tmp_path: Path, small: Home) -> None:
    folder = tmp_path / "backup"
    backed_up(small, folder)
    weights = next(folder.glob("versions/v0-*/model.safetensors"))
    weights.unlink()
    os.mkfifo(weights)
    with open_backup(Artifacts(str(folder))) as backup:
        (fault,) = faults_of_backup(backup)[1]
    assert fault == f"file://{weights} cannot be read: it is no regular file."


def test_copying_ends_where_a_file_is_longer_than_registered(tmp_path: Path, small: Home) -> None:
    path = next(Path(small.settings.artifacts_root).glob("versions/v0-*/model.safetensors"))
    os.truncate(path, 64 << 20)
    size = small.backcast.registry.versions.get(0).files[path.name].size
    file = NamedFile(f"versions/{path.parent.name}", path.name, "0" * 64, size)
    copied: list[int] = []
    with pytest.raises(ArtifactCorrupt):
        copy_file(small.backcast.artifacts, Artifacts(str(tmp_path / "b")), file, copied.append)
    assert sum(copied) == 1 << 20


def test_backup_lies_apart_from_what_it_is_of(tmp_path: Path, small: Home) -> None:
    artifacts = tmp_path / "home" / "artifacts"
    (tmp_path / "link").symlink_to(artifacts)
    around = tmp_path / "home" / ".." / "home" / "artifacts"
    for place in (artifacts, tmp_path / "link", around, artifacts / "sub", tmp_path / "home"):
        with pytest.raises(InvalidInput, match="among the artifacts themselves"):
            backed_up(small, place)
    assert not list(tmp_path.rglob("registry"))


def test_backup_lies_on_any_file_system(tmp_path: Path, small: Home) -> None:
    place = Artifacts(f"memory://{tmp_path.name}")
    done = back_up(small.backcast, place)
    machine = Settings.load(home=tmp_path / "machine")
    with open_backup(place) as backup, open_new(machine) as target:
        assert faults_of_backup(backup)[1] == []
        assert restore(backup, target, grace=HOUR).live == done.live
    assert named_bytes(machine) == named_bytes(small.settings)


def test_registry_that_a_newer_release_expanded_is_not_backed_up_in_part(
    tmp_path: Path, small: Home
) -> None:
    own = Revision.parse(tables.SCHEMA_REVISION).number
    with small.backcast.registry._engine.begin() as connection:
        name = f"{own + 1:04d}_for_{own:04d}"
        connection.exec_driver_sql(f"UPDATE alembic_version SET version_num = '{name}'")
    with pytest.raises(SchemaMismatch, match="Install the release that made it"):
        backed_up(small, tmp_path / "backup")


def test_lost_file_stops_a_backup_which_names_it(tmp_path: Path, small: Home) -> None:
    (path,) = Path(small.settings.artifacts_root).glob("versions/v1-*/transform.safetensors")
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(ArtifactMissing, match=str(path)):
        backed_up(small, tmp_path / "backup")
    path.write_bytes(content[::-1])
    with pytest.raises(ArtifactCorrupt, match=str(path)):
        backed_up(small, tmp_path / "backup")
    path.write_bytes(content)
    backed_up(small, tmp_path / "backup")


# --- what happens meanwhile -----------------------------------------------------------------------


def test_what_is_collected_meanwhile_is_left_out(tmp_path: Path, small: Home) -> None:
    collected: list[str] = []

    def collect_once(_step: str, _done: float) -> None:
        if not collected:
            collected.extend(sweep(small.backcast, timedelta(0)))

    back_up(small.backcast, Artifacts(str(tmp_path / "backup")), collect_once)
    assert len(collected) == 3
    machine = Settings.load(home=tmp_path / "machine", grace_seconds=0)
    restored(tmp_path / "backup", machine)
    with open_backcast(machine) as backcast:
        assert verify(backcast).faults == ()
        assert {s.id for s in backcast.registry.snapshots.undeleted()}.isdisjoint(collected)
    check_books(replace(small, settings=machine))


def test_operation_that_ran_meanwhile_has_ended_in_the_copy(tmp_path: Path, small: Home) -> None:
    operations = small.backcast.registry.operations
    running = operations.start(OperationDraft("promote", {"version": 1}, "ann", "host:1", True))
    backed_up(small, tmp_path / "backup")
    machine = Settings.load(home=tmp_path / "machine")
    restored(tmp_path / "backup", machine)
    with open_backcast(machine) as backcast:
        ended = backcast.registry.operations.get(running.id)
        assert (ended.state, ended.error and ended.error["code"]) == (
            *("failed", "operation-abandoned"),
        )
        assert backcast.registry.operations.active() is None
    assert operations.get(running.id).state == "pending"


def test_erasures_since_the_backup_are_done_again(
    tmp_path: Path, small: Home, empty: Settings
) -> None:
    folder, listed = tmp_path / "backup", tmp_path / "erasures.json"
    backed_up(small, folder)
    erase(small.backcast, Entity.ITEM, ["item 1", "put 2"], actor="ann", grace=HOUR)
    erase(small.backcast, Entity.ITEM, ["never seen"], actor="ann", grace=HOUR)
    Listed(small.backcast.registry.erasures.all()).write(listed)
    assert "item 1" not in listed.read_text()
    restored(folder, empty, erased=Listed.read(listed))
    with open_backcast(empty) as backcast:
        there = replace(small, settings=empty, backcast=backcast)
        with client_of(there) as client:
            for id, status in (("item 1", 404), ("put 2", 404), ("item 2", 200), ("put 1", 200)):
                assert client.get(f"/embeddings/{id}?version=1").status_code == status
        ours, theirs = (r.erasures.all().digests for r in (backcast.registry, registry(small)))
        assert ours == theirs
        (act,) = backcast.registry.audit.recent(1)
        assert (act.act, act.outcome, act.details["erased"]) == ("restore", "succeeded", 2)
        check_books(there)


def registry(home: Home) -> Registry:
    return home.backcast.registry


def test_backup_of_an_older_release_is_restored(tmp_path: Path, small: Home) -> None:
    folder = tmp_path / "backup"
    backed_up(small, folder)
    database = folder / "registry" / "registry.db"
    engine = make_engine(f"sqlite:///{database}")
    downgrade(engine, "0001")
    engine.dispose()
    place = Artifacts(str(folder))
    document = dict(backups._read_manifest(place))
    digest = place.write("registry", {"registry.db": database.read_bytes()})["registry.db"]
    document["registry_sha256"] = digest.sha256
    content = {"backup": document, "sha256": backups._digest(document)}
    place.write("registry", {"backup.json": dump_json(content)})
    machine = Settings.load(home=tmp_path / "machine")
    before = small.backcast.registry.versions.all()
    restored(folder, machine)
    with open_backcast(machine) as backcast:
        assert [v.files for v in backcast.registry.versions.all()] == [v.files for v in before]
        assert verify(backcast).faults == ()


# --- verify ---------------------------------------------------------------------------------------


def test_verify_finds_every_fault(tmp_path: Path, small: Home) -> None:
    root = Path(small.settings.artifacts_root)
    live = small.backcast.registry.deployments.live()
    assert live is not None
    assert verify(small.backcast).faults == ()
    (weights,) = root.glob("versions/v0-*/model.safetensors")
    swap(weights)
    manifest = next(root.glob("snapshots/v1-*/manifest.json"))
    manifest.unlink()
    vectors = tmp_path / "home" / "store" / live.snapshot / "item.vectors.npy"
    swap(vectors)
    faults = verify(small.backcast).faults
    for part in (str(weights), str(manifest), "The store holds another vector of item"):
        assert sum(part in fault for fault in faults) == 1, faults
    small.backcast.store.drop(live.snapshot)
    assert any("Run `backcast promote 2`" in fault for fault in verify(small.backcast).faults)


def test_verify_looks_at_drift_bounds(tmp_path: Path, small: Home) -> None:
    live = small.backcast.registry.deployments.live()
    assert live is not None
    drift = small.backcast.registry.drifts.of(live.snapshot)
    assert drift is not None
    stored = tmp_path / "home" / "store" / drift.id
    swap_last(stored / "item.vectors.npy")
    (fault,) = verify(small.backcast).faults
    assert fault.startswith("The store holds another vector of item")
    assert fault.endswith(f" of {drift.folder}.")
    shutil.rmtree(stored)
    (fault,) = verify(small.backcast).faults
    assert f"does not hold snapshot {drift.id}" in fault


def test_restore_compares_drift_bounds(tmp_path: Path, small: Home) -> None:
    backed_up(small, tmp_path / "backup")
    machine = Settings.load(home=tmp_path / "machine")
    for stored in (tmp_path / "home" / "store").glob("*-drift-*"):
        copied = shutil.copytree(stored, machine.home / "store" / stored.name)
        swap_last(copied / "item.vectors.npy")
    with pytest.raises(StoreError, match=r"holds another vector of item .* of drifts/"):
        restored(tmp_path / "backup", machine)


def test_verify_names_all_that_cannot_be_read(small: Home) -> None:
    root = Path(small.settings.artifacts_root)
    weights = [next(root.glob(f"versions/v{number}-*/model.safetensors")) for number in (0, 1)]
    manifest = next(root.glob("snapshots/v1-*/manifest.json"))
    for path in (*weights, manifest):
        path.unlink()
        path.mkdir()
    faults = verify(small.backcast).faults
    for path in (*weights, manifest):
        assert sum(str(path) in fault for fault in faults) == 1, faults


def test_verify_is_not_misled_by_what_is_deleted_meanwhile(small: Home) -> None:
    steps: list[str] = []

    def collect_once(step: str, _done: float) -> None:
        if not steps:
            sweep(small.backcast, timedelta(0))
        steps.append(step)

    assert verify(small.backcast, collect_once).faults == ()
    assert len(steps) > 3


def test_restore_that_fills_the_store_with_something_else_is_refused(
    tmp_path: Path, small: Home
) -> None:
    backed_up(small, tmp_path / "backup")
    live = small.backcast.registry.deployments.live()
    assert live is not None
    machine = Settings.load(home=tmp_path / "machine")
    with open_new(machine) as target:
        record = small.backcast.registry.snapshots.get(live.snapshot)
        with other_vectors(small) as batches:
            counts = {Entity(name): n for name, n in record.counts.items()}
            target.store.load(live.snapshot, record.dim, counts, batches)
    with pytest.raises(StoreError, match="holds another vector of"):
        restored(tmp_path / "backup", machine)
    with open_new(machine) as target:
        target.registry.demand_empty()


@contextmanager
def other_vectors(home: Home) -> Iterator[Any]:
    from backcast.snapshots import read_snapshot
    from backcast.vectors import VectorBatch

    live = home.backcast.registry.deployments.live()
    assert live is not None
    record = home.backcast.registry.snapshots.get(live.snapshot)
    rows = read_snapshot(home.backcast.artifacts, record)
    yield (VectorBatch(b.entity, b.ids, b.vectors + np.float32(1e-3)) for b in rows)
