"""Register, publish, promote, sweep: on one host's backends and on those for many."""

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import psycopg
import pytest
from sqlalchemy import event

from backcast.artifacts import dump_json
from backcast.chains import load_chain
from backcast.errors import (
    ArtifactUnwritable,
    BackcastError,
    Conflict,
    DimensionMismatch,
    InvalidInput,
    NothingPublished,
    PromotionConflict,
    RegistryError,
    SnapshotNotLoaded,
    UnknownVersion,
    VersionRetired,
)
from backcast.lifecycle import (
    Backcast,
    Expected,
    load_snapshot,
    plan_promotion,
    promote,
    publish,
    register_version,
    sweep,
)
from backcast.registry import OperationDraft, Registry, Switch
from backcast.registry.schema import make_engine
from backcast.registry.versions import set_state
from backcast.versions import Claim, Entity, Live, Version, VersionState
from tests.support import Home, batches, build_home, draft, dump_map, normal_map, transform

GATES = ("lineage", "maps", "snapshot", "finite", "coverage-item", "coverage-user")
NOW, HOUR = timedelta(0), timedelta(hours=1)


@pytest.fixture
def home(tmp_path: Path, backends: dict[str, Any]) -> Iterator[Home]:
    """Versions 0 to 2, published; 0 is live."""
    with build_home(tmp_path, live=0, **backends) as home:
        yield home


@pytest.fixture
def local_home(tmp_path: Path) -> Iterator[Home]:
    """The same, for what does not depend on the backends."""
    with build_home(tmp_path, live=0) as home:
        yield home


def artifact_folders(home: Home) -> list[str]:
    return sorted(path.name for path in Path(home.settings.artifacts_root).glob("*/*"))


def live(home: Home) -> Live:
    found = home.backcast.registry.deployments.live()
    assert found is not None
    return found


def states(home: Home) -> list[str]:
    return [str(v.state) for v in home.backcast.registry.versions.all()]


def reopened(home: Home) -> Backcast:
    """The same places through an engine of the test's own."""
    return replace(home.backcast, registry=Registry(make_engine(home.settings.registry_url)))


def engine_of(backcast: Backcast) -> Any:
    return backcast.registry._engine


def test_every_version_is_served_from_the_latest(tmp_path: Path, backends: dict[str, Any]) -> None:
    with build_home(tmp_path, (), **backends) as home:
        for number, dim in enumerate((4, 6, 8, 5, 7)):
            parent = number - 1 if number else None
            home.register(dim, parent=parent, bias=True, direct=[1] if number == 4 else [])
            home.publish(number)
            home.promote(number)
            home.check_served(number)
        assert states(home) == ["superseded"] * 4 + ["live"]


def test_chain_skips_a_rolled_back_version(tmp_path: Path, backends: dict[str, Any]) -> None:
    with build_home(tmp_path, (4, 6, 9, 8), parents=(None, 0, 1, 1), live=2, **backends) as home:
        home.promote(3, force=True, reason="2 was worse")
        home.check_served(3)
        assert states(home) == ["superseded", "superseded", "rolled_back", "live"]


def test_newest_snapshot_is_promoted(home: Home) -> None:
    home.publish(1, seed=1)
    newest = home.publish(1, seed=2)
    assert home.promote(1) == newest.id
    home.check_served(1)


def test_promotion_reports_its_steps(home: Home) -> None:
    steps: list[tuple[str, float]] = []
    home.promote(1, report=lambda step, fraction: steps.append((step, fraction)))
    assert list(dict(steps)) == ["check", "load", "switch"]
    fractions = [fraction for _, fraction in steps]
    assert fractions == sorted(fractions)
    assert fractions[0] == 0 < fractions[-1] < 1


def test_load_is_followed_by_the_percent(home: Home) -> None:
    record = home.publish(1, items=150_000, users=2)
    told: list[float] = []
    load_snapshot(home.backcast, record.id, told.append)
    cut = [16_384 * n for n in range(1, 10)]  # a snapshot is read in pieces of so many rows
    assert told == [100 * done // 150_002 / 100 for done in (*cut, 150_000)]
    load_snapshot(home.backcast, record.id, told.append)
    assert len(told) == 10


def test_promotion_is_written_down(home: Home) -> None:
    seen = live(home)
    draft = OperationDraft("promote", {}, "ann", "host:1")
    operation = home.backcast.registry.operations.start(draft).id
    claim = Claim(operation, "host:1")
    promote(home.backcast, 1, actor="ann", reason="better", operation=claim)
    newest = home.backcast.registry.deployments.history()[0]
    assert {name: newest[name] for name in ("kind", "actor", "reason", "forced", "operation")} == {
        "kind": "promote",
        "actor": "ann",
        "reason": "better",
        "forced": False,
        "operation": operation,
    }
    assert (newest["from_version"], newest["from_snapshot"]) == (0, seen.snapshot)
    assert list(newest["gates"]) == [*GATES, "change-0", "metric"]
    assert newest["gates"]["lineage"] == {
        "passed": True,
        "finding": "chain 1 → 0",
        "figure": None,
        "threshold": None,
    }


def test_plan_says_what_would_happen_and_changes_nothing(home: Home) -> None:
    seen = live(home)
    plan = plan_promotion(home.backcast, 2)
    assert plan.passed
    assert (plan.version, plan.live, plan.servable) == (2, seen, (0, 1, 2))
    document = plan.document()
    assert dump_json(document)
    passed = {gate["name"]: gate["passed"] for gate in document["gates"]}
    assert passed == dict.fromkeys([*GATES, "change-0", "metric"], True)
    chain = load_chain(home.backcast.registry.deployments.catalog(), home.backcast.artifacts, 2)
    gains = ", ".join(f"{j}: {chain[j].norm:.3g}" for j in (0, 1, 2))
    assert document["gates"][1]["finding"].endswith(gains)
    assert document["gates"][2]["finding"] == "17 vectors of dim 8, digests match"
    assert live(home) == seen
    assert home.held() == [seen.snapshot]


class TestGates:
    """What is not as registered is not served, forced or not."""

    @pytest.fixture
    def home(self, local_home: Home) -> Home:
        return local_home

    def check_refused(self, home: Home, version: int, gate: str, reason: str) -> None:
        seen = live(home)
        held = home.held()
        plan = plan_promotion(home.backcast, version)
        assert {g.name: g.passed for g in plan.gates if not g.passed} == {gate: False}
        for options in ({}, {"force": True, "reason": "in a hurry"}):
            message = f"Version {version} is not promoted: gate {gate}: .*{reason}"
            with pytest.raises(Conflict, match=message) as caught:
                home.promote(version, **options)
            failed = [g["name"] for g in caught.value.data["gates"] if not g["passed"]]
            assert failed == [gate]
        assert live(home) == seen
        assert home.held() == held
        home.check_served(0)

    def path(self, home: Home, folder: str, name: str) -> Path:
        return Path(home.settings.artifacts_root) / folder / name

    @pytest.mark.parametrize("version", [1, 2], ids=["its-own", "an-older-one"])
    def test_damaged_map(self, home: Home, version: int) -> None:
        folder = home.backcast.registry.versions.get(version).folder
        path = self.path(home, folder, "transform.safetensors")
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
        self.check_refused(home, 2, "maps", r"transform\.safetensors is refused: its SHA-256 is")

    def test_swapped_maps(self, home: Home) -> None:
        versions = [home.backcast.registry.versions.get(number) for number in (1, 2)]
        first, second = (self.path(home, v.folder, "transform.safetensors") for v in versions)
        first.rename(first.with_name("t"))
        second.rename(first)
        first.with_name("t").rename(second)
        self.check_refused(home, 2, "maps", "its SHA-256 is")

    def test_missing_map(self, home: Home) -> None:
        folder = home.backcast.registry.versions.get(1).folder
        self.path(home, folder, "transform.safetensors").unlink()
        self.check_refused(home, 1, "maps", "is registered but missing")

    @pytest.mark.parametrize(("bad", "reason"), [(np.nan, "NaN"), (np.inf, "infinite")])
    def test_map_that_is_not_finite(self, home: Home, bad: float, reason: str) -> None:
        weight, bias = normal_map(np.random.default_rng(0), 8, 5, bias=True)
        weight[3, 2] = bad
        described = transform(3, 2, False, (weight, bias))
        files = {"transform.safetensors": dump_map((weight, bias))}
        made = draft(3, 2, 5, [described])
        register_version(home.backcast.registry, home.backcast.artifacts, made, files)
        home.dims[3] = 5
        home.publish(3)
        self.check_refused(home, 3, "maps", reason)

    @pytest.mark.parametrize("name", ["item.parquet", "user.parquet", "manifest.json"])
    def test_damaged_snapshot(self, home: Home, name: str) -> None:
        snapshot = home.backcast.registry.snapshots.latest(1)
        assert snapshot is not None
        path = self.path(home, snapshot.folder, name)
        content = path.read_bytes()
        path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
        self.check_refused(home, 1, "snapshot", f"{name} is refused: its SHA-256 is")

    def test_missing_snapshot(self, home: Home) -> None:
        snapshot = home.backcast.registry.snapshots.latest(1)
        assert snapshot is not None
        home.backcast.artifacts.delete(snapshot.folder)
        self.check_refused(home, 1, "snapshot", r"manifest\.json is registered but missing")


class TestLineage:
    """Leaving the live chain needs force, and force a reason."""

    @pytest.fixture
    def home(self, tmp_path: Path) -> Iterator[Home]:
        with build_home(tmp_path, parents=(None, 0, 0), live=1) as home:
            yield home

    def test_live_version_off_the_new_chain_is_refused(self, home: Home) -> None:
        message = r"chain 2 → 0; live version 1 is not on it, its consumers would get 409"
        with pytest.raises(Conflict, match=message):
            home.promote(2)
        home.check_served(1)

    @pytest.mark.parametrize("reason", [None, ""])
    def test_force_needs_a_reason(self, home: Home, reason: str | None) -> None:
        with pytest.raises(InvalidInput, match="A forced promotion needs a reason"):
            home.promote(2, force=True, reason=reason)
        home.check_served(1)

    def test_force_with_a_reason_is_written_down(self, home: Home) -> None:
        home.promote(2, force=True, reason="1 was trained on wrong data")
        home.check_served(2)
        newest = home.backcast.registry.deployments.history()[0]
        assert (newest["forced"], newest["reason"]) == (True, "1 was trained on wrong data")
        assert states(home) == ["superseded", "rolled_back", "live"]

    def test_force_that_was_not_needed_is_not_written_down(self, home: Home) -> None:
        home.register(5, parent=1)
        home.publish(3)
        home.promote(3, force=True, reason="to be sure")
        assert home.backcast.registry.deployments.history()[0]["forced"] is False


class TestExpectations:
    """A caller that saw another state than the present one changes nothing."""

    @pytest.fixture
    def home(self, local_home: Home) -> Home:
        return local_home

    @pytest.mark.parametrize("expected", [None, 0])
    def test_met(self, home: Home, expected: int | None) -> None:
        home.promote(1, expected_live=expected)
        home.check_served(1)

    @pytest.mark.parametrize(
        ("expected", "named"), [(2, "Version 2"), (7, "Version 7"), (Expected.NOTHING, "Nothing")]
    )
    def test_missed(self, home: Home, expected: int | Expected, named: str) -> None:
        message = f"{named} was expected to be live, version 0 is"
        with pytest.raises(PromotionConflict, match=message) as caught:
            home.promote(1, expected_live=expected)
        wanted = None if expected is Expected.NOTHING else expected
        assert caught.value.data == {"expected_version": wanted, "current_version": 0}
        home.check_served(0)

    def test_nothing_is_live_yet(self, tmp_path: Path) -> None:
        with build_home(tmp_path) as home:
            with pytest.raises(PromotionConflict, match=r"Version 0 was expected .*, nothing is"):
                home.promote(1, expected_live=0)
            home.promote(1, expected_live=Expected.NOTHING)
            home.check_served(1)

    def test_live_version_cannot_be_promoted(self, home: Home) -> None:
        with pytest.raises(PromotionConflict, match="Version 0 is live already"):
            home.promote(0)

    def test_unknown_version(self, home: Home) -> None:
        with pytest.raises(UnknownVersion, match="Version 9"):
            home.promote(9)

    def test_unpublished_version(self, home: Home) -> None:
        home.register(3, parent=2)
        with pytest.raises(NothingPublished, match="backcast publish 3"):
            home.promote(3)

    def test_retired_version(self, home: Home) -> None:
        with engine_of(home.backcast).begin() as connection:
            set_state(connection, [1], VersionState.RETIRED)
        with pytest.raises(VersionRetired, match="Version 1 is retired"):
            home.promote(1)
        plan = plan_promotion(home.backcast, 2)
        assert plan.servable == (0, 2)

    def test_live_version_with_its_newest_snapshot(self, home: Home) -> None:
        home.promote(1)
        with pytest.raises(PromotionConflict, match="Version 1 is live already"):
            home.promote(1)

    def test_rejected_version(self, home: Home) -> None:
        with engine_of(home.backcast).begin() as connection:
            set_state(connection, [1], VersionState.REJECTED)
        with pytest.raises(Conflict, match="Version 1 was rejected"):
            home.promote(1)


def test_newer_snapshot_of_the_live_version_takes_its_place(home: Home) -> None:
    old = home.promote(1)
    home.publish(1)
    new = home.promote(1)
    assert new != old
    home.check_served(1)
    newest = home.backcast.registry.deployments.history()[0]
    assert (newest["kind"], newest["from_snapshot"], newest["snapshot"]) == ("refresh", old, new)
    assert old in sweep(home.backcast, NOW)
    assert home.held() == [new]


def test_one_of_two_promotions_at_once_wins(home: Home) -> None:
    home.register(5, parent=0)
    home.publish(3)
    barrier = Barrier(2)

    def attempt(version: int) -> str:
        def together(step: str, _fraction: float) -> None:
            if step == "switch":
                barrier.wait(timeout=20)

        try:
            return home.promote(version, report=together)
        except PromotionConflict:
            return "lost"

    with ThreadPoolExecutor(2) as pool:
        outcomes = dict(zip((1, 3), pool.map(attempt, (1, 3)), strict=True))
    [(won, snapshot)] = [(v, s) for v, s in outcomes.items() if s != "lost"]
    assert live(home).snapshot == snapshot
    home.check_served(won)


class TestSweep:
    """Only the latest is stored, once its grace period is over."""

    def test_superseded_snapshot_stays_for_its_grace(self, home: Home) -> None:
        old = live(home).snapshot
        new = home.promote(1)
        assert sweep(home.backcast, HOUR) == []
        assert home.held() == sorted([old, new])

    def test_superseded_snapshot_goes_after_its_grace(self, home: Home) -> None:
        old = live(home).snapshot
        new = home.promote(1)
        assert sweep(home.backcast, NOW) == [old]
        assert home.held() == [new]
        assert old not in artifact_folders(home)
        assert new in artifact_folders(home)
        assert home.backcast.registry.snapshots.latest(0) is None
        assert sweep(home.backcast, NOW) == []
        home.check_served(1)

    def test_live_and_unpromoted_snapshots_stay(self, home: Home) -> None:
        before = artifact_folders(home)
        assert sweep(home.backcast, NOW) == []
        assert artifact_folders(home) == before
        home.check_served(0)

    def test_older_snapshots_of_the_version_go_too(self, home: Home) -> None:
        older = home.backcast.registry.snapshots.latest(1)
        assert older is not None
        home.publish(1, seed=1)
        old = live(home).snapshot
        home.promote(1)
        assert sorted(sweep(home.backcast, NOW)) == sorted([old, older.id])
        home.check_served(1)

    def test_rollback_within_the_grace_is_a_switch(self, home: Home) -> None:
        old = live(home).snapshot
        home.promote(1)
        home.backcast.registry.deployments.switch(
            Switch("rollback", live(home), 0, old, actor="ann", reason="worse")
        )
        home.check_served(0)
        [gone] = sweep(home.backcast, NOW)
        assert gone.startswith("v1-")
        home.check_served(0)

    def test_swept_version_must_be_published_again(self, home: Home) -> None:
        home.promote(1)
        sweep(home.backcast, NOW)
        with pytest.raises(NothingPublished):
            home.promote(0, force=True, reason="back")
        home.publish(0)
        home.promote(0, force=True, reason="back")
        home.check_served(0)

    def test_snapshot_that_goes_live_meanwhile_stays(self, home: Home) -> None:
        old = live(home).snapshot
        home.promote(1)
        back = [Switch("rollback", live(home), 0, old, actor="ann")]
        sweeper = reopened(home)

        def meanwhile(_connection: Any, _cursor: Any, sql: str, *_: Any) -> None:
            if "superseded_at <=" in sql and back:
                home.backcast.registry.deployments.switch(back.pop())

        event.listen(engine_of(sweeper), "after_cursor_execute", meanwhile)
        with sweeper.registry:
            assert sweep(sweeper, NOW) == []
        assert back == []
        home.check_served(0)

    def test_sweep_goes_on_where_the_store_failed(
        self, home: Home, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = live(home).snapshot
        home.promote(1)
        with monkeypatch.context() as failing:
            failing.setattr(home.backcast.artifacts, "delete", self.fail)
            with pytest.raises(BackcastError, match="disk"):
                sweep(home.backcast, NOW)
        assert old in artifact_folders(home)
        assert sweep(home.backcast, NOW) == [old]
        assert old not in artifact_folders(home)

    def fail(self, _folder: str) -> None:
        raise BackcastError("the disk failed")


def test_loading_again_is_harmless(home: Home) -> None:
    load_snapshot(home.backcast, live(home).snapshot)
    home.check_served(0)


def test_emptied_store_is_filled_by_promoting_again(home: Home) -> None:
    before, history = live(home), home.backcast.registry.deployments.history()
    home.backcast.store.drop(before.snapshot)
    with pytest.raises(SnapshotNotLoaded):
        home.backcast.store.open(before.snapshot)
    promoted = promote(home.backcast, 0, actor="test")
    assert promoted.live == live(home) == before
    assert home.backcast.registry.deployments.history() == history
    home.check_served(0)
    assert sweep(home.backcast, NOW) == []
    with pytest.raises(PromotionConflict, match="live already"):
        promote(home.backcast, 0, actor="test")


def test_emptied_store_gets_what_is_live_before_anything_newer(home: Home) -> None:
    before = live(home)
    newer = home.publish(0, seed=5)
    home.backcast.store.drop(before.snapshot)
    assert promote(home.backcast, 0, actor="test").live == live(home) == before
    home.backcast.store.open(before.snapshot)
    assert promote(home.backcast, 0, actor="test", force=True, reason="x").live.snapshot == newer.id


class TestRegistration:
    """Artifact first, then the row: whole, or not there."""

    def proposal(self, number: int, parent: int = 2, dim: int = 5, seed: int = 0) -> Any:
        fitted = normal_map(np.random.default_rng(seed), 8, dim, bias=False)
        files = {"transform.safetensors": dump_map(fitted)}
        return draft(number, parent, dim, [transform(number, parent, False, fitted)]), files, fitted

    def register(self, home: Home, *arguments: Any) -> Version:
        registry, artifacts = home.backcast.registry, home.backcast.artifacts
        return register_version(registry, artifacts, *arguments)

    def test_trainers_with_one_number_get_two_and_keep_their_maps(self, home: Home) -> None:
        proposals = [self.proposal(3, seed=seed) for seed in range(3)]
        barrier = Barrier(3)

        def attempt(proposal: Any) -> Version:
            barrier.wait()
            return self.register(home, *proposal[:2])

        with ThreadPoolExecutor(3) as pool:
            versions = list(pool.map(attempt, proposals))
        assert sorted(v.number for v in versions) == [3, 4, 5]
        catalog = home.backcast.registry.deployments.catalog()
        for version, (_, _, (weight, _)) in zip(versions, proposals, strict=True):
            chain = load_chain(catalog, home.backcast.artifacts, version.number)
            assert chain[2].weight.tolist() == weight.tolist()
        folders = {version.folder.partition("/")[2] for version in catalog.versions}
        assert {f for f in artifact_folders(home) if f.count("-") == 1} == folders

    def test_second_first_version_is_refused(self, home: Home) -> None:
        before = artifact_folders(home)
        with pytest.raises(Conflict, match="Version 0 was registered meanwhile"):
            self.register(home, draft(0, None, 4), {"model.safetensors": b""})
        assert artifact_folders(home) == before

    @pytest.mark.parametrize(
        ("number", "parent", "dim", "error"),
        [(9, 7, 5, UnknownVersion), (3, 1, 5, DimensionMismatch), (3, 2, 5, InvalidInput)],
    )
    def test_refused_version_leaves_no_files(
        self, home: Home, number: int, parent: int, dim: int, error: type[BackcastError]
    ) -> None:
        before = artifact_folders(home)
        made, files, _ = self.proposal(number, parent, dim)
        if error is InvalidInput:
            files = {"another.safetensors": files["transform.safetensors"]}
        with pytest.raises(error):
            self.register(home, made, files)
        assert artifact_folders(home) == before
        assert home.backcast.registry.versions.next_number() == 3

    def test_version_whose_files_cannot_be_written_leaves_none(self, home: Home) -> None:
        before = artifact_folders(home)
        made, files, _ = self.proposal(3)
        with pytest.raises(ArtifactUnwritable, match="Is a directory"):
            self.register(home, made, {**files, "": b""})
        assert artifact_folders(home) == before

    def test_files_stay_where_the_answer_to_the_commit_is_lost(
        self, home: Home, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backcast = reopened(home)
        lose_answers(engine_of(backcast), monkeypatch)
        made, files, _ = self.proposal(3)
        vectors = {Entity.ITEM: {"a": np.ones(6, np.float32)}}
        lost = pytest.raises(RegistryError, match="connection lost")
        with backcast.registry as registry:
            with lost:
                register_version(registry, backcast.artifacts, made, files)
            with lost:
                publish(registry, backcast.artifacts, 1, batches(vectors), {})
        catalog = home.backcast.registry.deployments.catalog()
        assert sorted(load_chain(catalog, home.backcast.artifacts, 3)) == [0, 1, 2, 3]
        snapshot = home.backcast.registry.snapshots.latest(1)
        assert snapshot is not None
        assert snapshot.counts == {"item": 1}
        load_snapshot(home.backcast, snapshot.id)


def lose_answers(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit what ``engine`` is told to commit, then fail as if the answer had not come."""
    error = (
        sqlite3.OperationalError if engine.dialect.name == "sqlite" else psycopg.OperationalError
    )

    def commit(connection: Any, real: Callable[[Any], None]) -> None:
        real(connection)
        raise error("connection lost")

    monkeypatch.setattr(engine.dialect, "do_commit", partial(commit, real=engine.dialect.do_commit))
