"""What nobody needs any more goes, is shown before, and nothing else goes."""

import errno
import os
import signal
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from backcast.artifacts import Artifacts
from backcast.chains import load_chain
from backcast.errors import ArtifactUnwritable, OperationRunning
from backcast.lifecycle import (
    Collector,
    Doomed,
    Policy,
    collect,
    collect_litter,
    load_snapshot,
    open_backcast,
    plan_collection,
    plan_litter,
    rollback,
    sweep,
    upsert,
)
from backcast.lifecycle.collecting import WEIGHTS
from backcast.registry import OperationDraft
from backcast.settings import Settings
from backcast.snapshots import write_snapshot
from backcast.vectors import VectorBatch
from backcast.versions import Claim, Entity, OperationState, SnapshotRecord
from tests.service_support import client_of
from tests.support import Home, batches, build_home, exit_codes, normal

HOUR, NOW = Policy(timedelta(hours=1)), Policy(timedelta(0))
FIT = Policy(timedelta(0), keep_models="fit")


@pytest.fixture
def home(tmp_path: Path, backends: dict[str, Any]) -> Iterator[Home]:
    """Version 1 is live, after 0; 2 is published."""
    with build_home(tmp_path, live=1, **backends) as home:
        yield home


@pytest.fixture
def local_home(tmp_path: Path) -> Iterator[Home]:
    """The same, for what does not depend on the backends."""
    with build_home(tmp_path, live=1) as home:
        yield home


def newest(home: Home, version: int) -> str:
    found = home.backcast.registry.snapshots.latest(version)
    assert found is not None
    return found.id


def folders(home: Home, kind: str) -> list[str]:
    root = Path(home.settings.artifacts_root, kind)
    return sorted(path.name for path in root.glob("*"))


def names(doomed: list[Doomed]) -> list[tuple[str, str]]:
    return [(one.what, one.name) for one in doomed]


def put(home: Home, *ids: str) -> None:
    live = home.backcast.registry.deployments.live()
    assert live is not None
    vectors = normal(np.random.default_rng(7), len(ids), home.dims[live.version])
    upsert(home.backcast, Entity.ITEM, ids, vectors, actor="ann", most_changed=100)


def drift_of(home: Home, snapshot: str) -> str:
    """Return the name of a snapshot's drift bounds."""
    record = home.backcast.registry.drifts.of(snapshot)
    assert record is not None
    return record.id


class TestSnapshots:
    def test_plan_is_what_is_deleted_with_changes_and_drift_bounds(self, home: Home) -> None:
        put(home, "item 1", "new")
        left = newest(home, 1)
        drift = drift_of(home, left)
        home.promote(2)
        assert plan_collection(home.backcast, HOUR) == []
        assert collect(home.backcast, HOUR, "ann") == []
        before = home.backcast.store.snapshots()
        assert drift in before
        plan = plan_collection(home.backcast, NOW)
        oldest = next(name for what, name in names(plan) if name.startswith("v0-"))
        assert names(plan) == [("snapshot", oldest), ("snapshot", left)]
        assert home.backcast.store.snapshots() == before
        root = Path(home.settings.artifacts_root)
        [delta] = folders(home, "deltas")
        size = sum(
            file.stat().st_size
            for folder in (f"snapshots/{left}", f"deltas/{delta}")
            for file in (root / folder).iterdir()
        )
        assert plan[1].bytes == size + home.backcast.store.open(left).size
        assert plan[1].reason.startswith("superseded 20")
        assert collect(home.backcast, NOW, "ann") == plan
        live = newest(home, 2)
        assert home.backcast.store.snapshots() == [live, drift_of(home, live)]
        assert (folders(home, "snapshots"), folders(home, "deltas")) == ([live], [])
        assert folders(home, "drifts") == [drift_of(home, live)]
        assert plan_collection(home.backcast, NOW) == []
        home.check_served(2)

    def test_deltas_of_snapshots_that_stay_stay(self, home: Home) -> None:
        home.publish(1)
        put(home, "new")
        home.promote(1)  # carries the upsert over
        assert len(folders(home, "deltas")) == 2
        collect(home.backcast, NOW, "ann")
        assert len(folders(home, "deltas")) == 1
        live = home.backcast.registry.deployments.live()
        assert live is not None
        [record] = home.backcast.registry.deltas.of(live.snapshot)
        assert record.file.split("/")[1] == folders(home, "deltas")[0]


class TestUndeletable:
    """What cannot be deleted is told of, and keeps nothing else from being deleted."""

    @pytest.fixture
    def home(self, local_home: Home) -> Home:
        """Versions 0 and 1 are superseded, and a candidate's vectors are in the store."""
        local_home.promote(2)
        local_home.register(9, parent=2)
        local_home.publish(3)
        load_snapshot(local_home.backcast, newest(local_home, 3))
        return local_home

    @pytest.fixture
    def bad(self, home: Home, monkeypatch: pytest.MonkeyPatch) -> str:
        """The oldest snapshot, whose files cannot be deleted."""
        [bad] = [name for name in home.held() if name.startswith("v0-")]
        rm = LocalFileSystem.rm

        def refuse(self: LocalFileSystem, path: str, **options: Any) -> None:
            if path.endswith(bad):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            rm(self, path, **options)

        monkeypatch.setattr(LocalFileSystem, "rm", refuse)
        return bad

    def check_all_else_is_gone(self, home: Home, bad: str) -> None:
        live = newest(home, 2)
        assert home.held() == [live]
        assert folders(home, "snapshots") == [bad, live, newest(home, 3)]
        assert folders(home, "drifts") == [drift_of(home, live)]
        weights = Path(home.settings.artifacts_root).glob(f"versions/*/{WEIGHTS}")
        assert sorted(path.parent.name[:2] for path in weights) == ["v2", "v3"]
        undeleted = home.backcast.registry.snapshots.undeleted()
        assert [s.id for s in undeleted if s.condemned_at is not None] == [bad]
        home.check_served(2)

    def test_collection_goes_on_and_names_it(self, home: Home, bad: str) -> None:
        with pytest.raises(
            ArtifactUnwritable, match=rf"^Snapshot {bad} is not deleted: .*Permission denied"
        ):
            collect(home.backcast, FIT, "ann")
        self.check_all_else_is_gone(home, bad)

    def test_replica_goes_on_and_names_it_each_time(self, home: Home, bad: str) -> None:
        clock = Clock()
        collector = Collector(home.backcast, FIT, clock)
        for _ in range(12):
            with pytest.raises(ArtifactUnwritable, match=rf"^Snapshot {bad} is not deleted"):
                collector.collect()
            clock.now += Collector.LOOK_SECONDS
        self.check_all_else_is_gone(home, bad)

    def test_once_it_can_be_it_is_deleted(
        self, home: Home, bad: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with pytest.raises(ArtifactUnwritable):
            sweep(home.backcast, timedelta(0))
        monkeypatch.undo()
        assert sweep(home.backcast, timedelta(0)) == [bad]
        assert bad not in folders(home, "snapshots")

    def test_promotion_that_supersedes_it_succeeds(
        self, home: Home, bad: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with client_of(home, grace_seconds=0.0, poll_seconds=0.05) as client:
            begun = client.post("/admin/versions/3/promote", json={"expected_live": 2}).json()
            deadline = time.monotonic() + 30
            while home.held() != [newest(home, 3)] or bad not in caplog.text:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            ended = client.get(f"/admin/operations/{begun['id']}").json()
        assert (ended["state"], ended["error"]) == ("succeeded", None)


def test_what_is_returned_is_what_was_deleted(
    local_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, live = newest(local_home, 0), newest(local_home, 1)
    snapshots = local_home.backcast.registry.snapshots
    condemn = snapshots.condemn

    def later(_moment: datetime) -> list[SnapshotRecord]:
        local_home.promote(2)
        return condemn(local_home.backcast.registry.now())

    monkeypatch.setattr(snapshots, "condemn", later)
    deleted = collect(local_home.backcast, NOW, "ann")
    assert names(deleted) == [("snapshot", left), ("snapshot", live)]


def load_and_die(settings: Settings, snapshot: str) -> None:
    def fatal() -> Iterator[VectorBatch]:
        ids = [f"{n}" for n in range(5000)]
        yield from VectorBatch(Entity.ITEM, ids, np.ones((5000, 2), np.float32)).slices(500)
        os.kill(os.getpid(), signal.SIGKILL)

    with open_backcast(settings) as backcast:
        backcast.store.load(snapshot, 2, {Entity.ITEM: 5001}, fatal())


class TestStored:
    """What the store holds and nobody can be served from."""

    def test_loaded_candidate_goes_and_stays_promotable(self, home: Home) -> None:
        candidate = newest(home, 2)
        load_snapshot(home.backcast, candidate)
        size = home.backcast.store.open(candidate).size
        reason = "in the store, and not live nor in its grace"
        plan = plan_collection(home.backcast, HOUR)
        assert plan == [Doomed("stored", candidate, reason, size)]
        assert collect(home.backcast, HOUR, "ann") == plan
        assert candidate not in home.backcast.store.snapshots()
        [operation] = home.backcast.registry.operations.recent(10)
        assert (operation.kind, operation.state) == ("collect", OperationState.SUCCEEDED)
        home.promote(2)
        home.check_served(2)

    def test_what_a_killed_load_left_goes_and_stays_promotable(self, home: Home) -> None:
        candidate = newest(home, 2)
        assert exit_codes(load_and_die, (home.settings, candidate)) == [-signal.SIGKILL]
        reason = "in the store, and not live nor in its grace"
        plan = plan_collection(home.backcast, HOUR)
        assert plan == [Doomed("stored", candidate, reason, None)]
        assert collect(home.backcast, HOUR, "ann") == plan
        assert home.backcast.store.remains() == []
        home.promote(2)
        home.check_served(2)

    def test_half_a_snapshot_is_nobodys_while_an_operation_runs(self, home: Home) -> None:
        candidate = newest(home, 2)
        assert exit_codes(load_and_die, (home.settings, candidate)) == [-signal.SIGKILL]
        operation = home.backcast.registry.operations.start(
            OperationDraft("promote", {}, "ann", "host:1")
        )
        assert plan_collection(home.backcast, HOUR) == []
        assert collect(home.backcast, HOUR, "ann") == []
        home.backcast.registry.operations.succeed(Claim(operation.id, "host:1"), {})
        assert names(collect(home.backcast, HOUR, "ann")) == [("stored", candidate)]

    def test_what_a_killed_load_of_the_live_snapshot_left_stays(self, home: Home) -> None:
        live = newest(home, 1)
        home.backcast.store.drop(live)
        assert exit_codes(load_and_die, (home.settings, live)) == [-signal.SIGKILL]
        assert home.backcast.store.remains() == [live]
        assert plan_collection(home.backcast, HOUR) == []
        home.promote(1)  # again, which fills the store
        home.check_served(1)

    def test_drift_bounds_that_no_row_names_go(self, home: Home) -> None:
        live = newest(home, 1)
        kept, stray = drift_of(home, live), f"{live}-drift-ffffffff"
        rows = {Entity.ITEM: {"item 1": np.zeros(2, np.float32)}}
        home.backcast.store.load(stray, 2, {Entity.ITEM: 1}, batches(rows))
        home.backcast.artifacts.write(f"drifts/{stray}", {"manifest.json": b"{}"})
        [doomed] = collect(home.backcast, HOUR, "ann")
        assert (doomed.what, doomed.name) == ("stored", stray)
        assert doomed.reason == "drift bounds in the store, of nothing that is live or in its grace"
        assert kept in home.backcast.store.snapshots()
        assert folders(home, "drifts") == [kept]

    def test_nothing_goes_that_an_operation_may_be_loading(self, home: Home) -> None:
        candidate = newest(home, 2)
        load_snapshot(home.backcast, candidate)
        operation = home.backcast.registry.operations.start(
            OperationDraft("promote", {}, "ann", "host:1")
        )
        with pytest.raises(OperationRunning, match=operation.id):
            collect(home.backcast, HOUR, "ann")
        assert candidate in home.backcast.store.snapshots()
        home.backcast.registry.operations.succeed(Claim(operation.id, "host:1"), {})
        collect(home.backcast, HOUR, "ann")
        assert candidate not in home.backcast.store.snapshots()

    def test_what_another_registry_may_know_stays(self, home: Home) -> None:
        rows = {Entity.ITEM: {"item 1": np.zeros(2, np.float32)}}
        home.backcast.store.load("v7-of-others", 2, {Entity.ITEM: 1}, batches(rows))
        assert "v7-of-others" not in {
            name for _, name in names(plan_collection(home.backcast, NOW))
        }
        collect(home.backcast, NOW, "ann")
        assert "v7-of-others" in home.backcast.store.snapshots()
        assert ("stored", "v7-of-others") in names(collect_litter(home.backcast, NOW, "ann"))
        assert "v7-of-others" not in home.backcast.store.snapshots()
        home.check_served(1)

    def test_rolled_back_snapshot_stays_for_its_grace(self, home: Home) -> None:
        left = newest(home, 1)
        rollback(home.backcast, actor="ann", reason="worse")
        assert plan_collection(home.backcast, HOUR) == []
        assert left in home.backcast.store.snapshots()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TestBackground:
    """A replica deletes what it has seen to be unneeded for long, by its own clock."""

    def test_stored_snapshot_goes_after_long_enough(self, home: Home) -> None:
        clock = Clock()
        collector, candidate = Collector(home.backcast, NOW, clock), newest(home, 2)
        load_snapshot(home.backcast, candidate)
        collector.collect()
        for _ in range(9):
            clock.now += Collector.LOOK_SECONDS
            collector.collect()
        assert candidate in home.backcast.store.snapshots()
        clock.now += Collector.LOOK_SECONDS
        collector.collect()
        assert home.backcast.store.snapshots() == [
            newest(home, 1),
            drift_of(home, newest(home, 1)),
        ]

    def test_snapshot_that_was_needed_in_between_is_counted_anew(self, home: Home) -> None:
        clock = Clock()
        collector, candidate = Collector(home.backcast, HOUR, clock), newest(home, 2)
        load_snapshot(home.backcast, candidate)
        collector.collect()
        home.backcast.store.drop(candidate)
        clock.now += 4000
        collector.collect()
        load_snapshot(home.backcast, candidate)
        clock.now += 4000
        collector.collect()
        assert candidate in home.backcast.store.snapshots()

    def test_replica_waits_for_an_operation_that_runs(self, home: Home) -> None:
        clock = Clock()
        collector, candidate = Collector(home.backcast, HOUR, clock), newest(home, 2)
        load_snapshot(home.backcast, candidate)
        collector.collect()
        home.backcast.registry.operations.start(OperationDraft("promote", {}, "ann", "host:1"))
        clock.now += 4000
        collector.collect()
        assert candidate in home.backcast.store.snapshots()


class TestWeights:
    """By policy, models that nothing can be trained on lose their weights, never their maps."""

    @pytest.fixture
    def home(self, local_home: Home) -> Home:
        return local_home

    def weighty(self, home: Home) -> list[int]:
        artifacts = home.backcast.artifacts
        versions = home.backcast.registry.versions.all()
        return [v.number for v in versions if artifacts.exists(v.folder, WEIGHTS)]

    def test_all_are_kept_by_default(self, home: Home) -> None:
        home.promote(2)
        collect(home.backcast, NOW, "ann")
        assert self.weighty(home) == [0, 1, 2]

    def test_those_of_superseded_versions_go_after_the_grace(self, home: Home) -> None:
        version = home.backcast.registry.versions.get(0)
        assert plan_collection(home.backcast, Policy(timedelta(hours=1), "fit")) == []
        collect(home.backcast, NOW, "ann")
        plan = plan_collection(home.backcast, FIT)
        reason = "version 0 is superseded, BACKCAST_KEEP_MODELS=fit"
        size = version.files[WEIGHTS].size
        assert plan == [Doomed("weights", f"{version.folder}/{WEIGHTS}", reason, size)]
        assert collect(home.backcast, FIT, "ann") == plan
        assert self.weighty(home) == [1, 2]  # the live one, and a candidate
        assert home.backcast.registry.versions.get(0).weights_deleted_at is not None
        assert home.backcast.registry.versions.get(1).weights_deleted_at is None
        assert plan_collection(home.backcast, FIT) == []

    def test_maps_are_never_deleted(self, home: Home) -> None:
        home.promote(2)
        for _ in range(2):
            collect(home.backcast, FIT, "ann")
        assert self.weighty(home) == [2]
        catalog = home.backcast.registry.deployments.catalog()
        assert sorted(load_chain(catalog, home.backcast.artifacts, 2)) == [0, 1, 2]
        home.check_served(2)
        home.register(5, parent=2)
        home.publish(3)
        home.promote(3)
        home.check_served(3)

    def test_version_that_can_be_gone_back_to_keeps_them(self, home: Home) -> None:
        collect(home.backcast, Policy(timedelta(hours=1), "fit"), "ann")
        assert self.weighty(home) == [0, 1, 2]
        rollback(home.backcast, actor="ann", reason="worse")
        home.check_served(0)


def weights_and_die(settings: Settings) -> None:
    with open_backcast(settings) as backcast:
        Artifacts.delete_file = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
        collect(backcast, FIT, "ann")


def test_killed_collector_is_finished_by_the_next(home: Home) -> None:
    collect(home.backcast, NOW, "ann")
    assert exit_codes(weights_and_die, (home.settings,)) == [-signal.SIGKILL]
    version = home.backcast.registry.versions.get(0)
    assert version.weights_deleted_at is not None  # nobody counts on them any more
    assert home.backcast.artifacts.exists(version.folder, WEIGHTS)
    collect(home.backcast, FIT, "ann")
    assert not home.backcast.artifacts.exists(version.folder, WEIGHTS)


class TestLitter:
    """Folders that no row names, told by the file system's own time."""

    @pytest.fixture
    def home(self, local_home: Home) -> Home:
        return local_home

    def litter(self, home: Home, hours: float) -> str:
        record = write_snapshot(home.backcast.artifacts, 1, 6, batches(home.vectors[1]))
        folder = Path(home.settings.artifacts_root, record.folder)
        then = time.time() - 3600 * hours
        for file in folder.iterdir():
            os.utime(file, (then, then))
        return record.folder

    def test_old_folders_without_a_row_go(self, home: Home) -> None:
        folder = self.litter(home, 25)
        root = Path(home.settings.artifacts_root)
        size = sum(file.stat().st_size for file in (root / folder).iterdir())
        reason = "no row names it, and it is older than a day"
        assert plan_litter(home.backcast) == [Doomed("folder", folder, reason, size)]
        assert plan_collection(home.backcast, HOUR) == []
        before = {path for path in root.glob("*/*") if str(path) != str(root / folder)}
        collect_litter(home.backcast, HOUR, "ann")
        assert set(root.glob("*/*")) == before
        home.check_served(1)

    def test_young_folders_stay(self, home: Home) -> None:
        self.litter(home, 23)
        assert plan_litter(home.backcast) == []

    def test_folder_that_is_still_written_stays(self, home: Home) -> None:
        folder = self.litter(home, 25)
        (Path(home.settings.artifacts_root) / folder / "user.parquet").touch()
        assert plan_litter(home.backcast) == []

    def test_what_is_not_of_backcast_stays(self, home: Home) -> None:
        root = Path(home.settings.artifacts_root)
        for name in ("notes/readme.txt", "snapshots/by hand/file", "top.txt"):
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("mine")
            os.utime(path, (0, 0))
        assert plan_litter(home.backcast) == []

    def test_folders_with_a_row_stay_however_old(self, home: Home) -> None:
        for file in Path(home.settings.artifacts_root).rglob("*"):
            os.utime(file, (0, 0))
        assert plan_litter(home.backcast) == []
