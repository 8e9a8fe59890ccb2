"""The engine serves the arithmetic, from one snapshot, and nothing in the place of anything."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backcast.errors import (
    ArtifactCorrupt,
    BackcastError,
    ConfigError,
    NotReady,
    SnapshotMismatch,
    StoreError,
    UnknownVersion,
    VersionNotPromoted,
    VersionOffChain,
    VersionRetired,
)
from backcast.lifecycle import erase, retire, sweep
from backcast.versions import Entity, VersionState
from service import engine as engine_module
from service.engine import Engine
from tests.service_support import WatchedStore, assert_served, engine_of, gain, set_version
from tests.support import SHARED_ID, Home, build_home


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    with build_home(tmp_path, bias=True, live=2) as built:
        yield built


@pytest.fixture(scope="module", params=["linear", "affine"])
def either(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Home]:
    folder = tmp_path_factory.mktemp("home")
    with build_home(folder, bias=request.param == "affine", live=2) as built:
        yield built


@pytest.mark.parametrize("entity", Entity)
@pytest.mark.parametrize("target", [0, 1, 2])
def test_every_version_is_the_arithmetic(either: Home, target: int, entity: Entity) -> None:
    ids = either.ids(entity, version=2)
    served = engine_of(either).current().vectors(entity, ids, target)
    assert served.found.all()
    assert_served(served.vectors, either, ids, target, entity, live=2)


def test_wide_vectors_and_long_chains_keep_the_bound(tmp_path: Path) -> None:
    with build_home(tmp_path, dims=(64, 96, 128, 160, 256), items=6, live=4) as home:
        snapshot = engine_of(home).current()
        ids = home.ids(version=4)
        for target in range(5):
            assert_served(
                snapshot.vectors(Entity.ITEM, ids, target).vectors, home, ids, target, live=4
            )


@pytest.mark.parametrize("small", [0, 2**18], ids=["torch", "numpy"])
@pytest.mark.parametrize("target", [0, 1, 2])
def test_one_vector_is_the_arithmetic(
    either: Home, target: int, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "_SMALL", small)
    snapshot = engine_of(either).current()
    for id in either.ids(version=2):
        served = snapshot.vectors(Entity.ITEM, [id], target)
        assert_served(served.vectors, either, [id], target, live=2)
    unknown = snapshot.vectors(Entity.ITEM, ["nobody"], target)
    assert np.isnan(unknown.vectors).all()
    assert not unknown.found.any()


def test_live_version_is_served_as_stored(home: Home) -> None:
    ids = home.ids(version=2)
    served = engine_of(home).current().vectors(Entity.ITEM, ids, 2)
    stored = np.stack([home.vectors[2][Entity.ITEM][id] for id in ids])
    assert served.vectors.tobytes() == stored.tobytes()


def test_direct_map_stands_in_for_the_chain(tmp_path: Path) -> None:
    with build_home(tmp_path, direct={2: [0]}, live=2) as home:
        ids = home.ids(version=2)
        served = engine_of(home).current().vectors(Entity.ITEM, ids, 0)
        assert_served(served.vectors, home, ids, 0, live=2)


def test_same_id_of_two_kinds_are_two_vectors(home: Home) -> None:
    snapshot = engine_of(home).current()
    for entity in Entity:
        served = snapshot.vectors(entity, [SHARED_ID], 0)
        assert_served(served.vectors, home, [SHARED_ID], 0, entity, live=2)


@given(asked=st.lists(st.sampled_from(["item 0", "item 1", SHARED_ID, "item", "", "item 0 "])))
def test_order_duplicates_and_missing_are_kept(
    shared: tuple[Home, Engine], asked: list[str]
) -> None:
    home, engine = shared
    served = engine.current().vectors(Entity.ITEM, asked, 0)
    known = set(home.ids(version=1))
    assert served.vectors.shape == (len(asked), 4)
    assert served.found.tolist() == [id in known for id in asked]
    assert np.isnan(served.vectors[~served.found]).all()
    found = [id for id in asked if id in known]
    assert_served(served.vectors[served.found], home, found, 0, live=1)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Home, Engine]]:
    with build_home(tmp_path_factory.mktemp("home"), live=1) as built:
        yield built, engine_of(built)


def test_large_batches_are_split(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "_ROWS", 5)
    sizes: list[int] = []
    store = WatchedStore(home.backcast.store, lambda ids: sizes.append(len(ids)))
    ids = [*home.ids(version=2), "unknown", "item 0"]
    served = engine_of(home, store).current().vectors(Entity.ITEM, ids, 0)
    assert sizes == [5, 5, 4]
    assert served.found.tolist() == [id != "unknown" for id in ids]
    found = [id for id in ids if id != "unknown"]
    assert_served(served.vectors[served.found], home, found, 0, live=2)


def test_batches_are_multiplied_one_at_a_time_and_single_vectors_do_not_wait(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    addmm, count = torch.addmm, threading.Lock()
    first, go_on = threading.Event(), threading.Event()

    def watched(bias: torch.Tensor, z: torch.Tensor, *rest: Any, **out: Any) -> torch.Tensor:
        if len(z) > 1:
            assert count.acquire(blocking=False)  # nobody else multiplies
            first.set()
            assert go_on.wait(30)
            count.release()
        return addmm(bias, z, *rest, **out)

    monkeypatch.setattr(torch, "addmm", watched)
    monkeypatch.setattr(engine_module, "_SMALL", 0)
    snapshot, ids = engine_of(home).current(), home.ids(version=2)
    with ThreadPoolExecutor(4) as pool:
        batches = [pool.submit(snapshot.vectors, Entity.ITEM, ids, 0) for _ in range(4)]
        assert first.wait(30)
        assert snapshot.vectors(Entity.ITEM, ids[:1], 0).found.all()
        go_on.set()
        for batch in batches:
            assert_served(batch.result().vectors, home, ids, 0, live=2)


def test_composed_weights_are_the_product(home: Home) -> None:
    maps = engine_of(home).current().maps
    (first, _), (second, _) = home.maps[1, 0, False], home.maps[2, 1, False]
    product = first.astype(np.float64) @ second.astype(np.float64)
    assert set(maps) == {0, 1}
    assert maps[0].weight.dtype == torch.float32
    assert np.array_equal(maps[0].weight.numpy(), product.astype(np.float32))
    assert maps[0].behaviour[0] == pytest.approx(gain(home, 0, 2), rel=1e-6)


@pytest.fixture
def branched(tmp_path: Path) -> Iterator[Home]:
    """Version 2 is live, 1 a sibling that was live, 3 a sibling that never was, 4 to come."""
    with build_home(tmp_path, dims=(4, 5, 6, 7, 8), parents=(None, 0, 0, 0, 2), live=1) as built:
        built.promote(3, force=True, reason="a branch")
        built.promote(2, force=True, reason="another")
        set_version(built, 3, state=VersionState.REJECTED)
        built.register(3, parent=2)
        yield built


@pytest.mark.parametrize(
    ("version", "error", "facts"),
    [
        (9, UnknownVersion, {"version": 9}),
        (-1, UnknownVersion, {"version": -1}),
        (4, VersionNotPromoted, {"version": 4, "current_version": 2}),
        (5, VersionNotPromoted, {"version": 5, "current_version": 2}),
        (
            1,
            VersionOffChain,
            {"version": 1, "state": "rolled_back", "current_version": 2, "reason": "a branch"},
        ),
        (
            3,
            VersionOffChain,
            {"version": 3, "state": "rejected", "current_version": 2, "reason": "another"},
        ),
    ],
)
def test_what_cannot_be_served_says_why(
    branched: Home, version: int, error: type[BackcastError], facts: dict[str, object]
) -> None:
    snapshot = engine_of(branched).current()
    with pytest.raises(error) as raised:
        snapshot.vectors(Entity.ITEM, ["item 0"], version)
    assert type(raised.value) is error
    assert raised.value.data == {**facts, "servable_versions": [0, 2]}


def test_older_sibling_that_was_never_promoted_is_off_the_chain(tmp_path: Path) -> None:
    with build_home(tmp_path, parents=(None, 0, 0)) as home:
        home.promote(0)
        home.promote(2)
        with pytest.raises(VersionOffChain, match="registered"):
            engine_of(home).current().resolve(1)


def test_retired_version_is_refused_and_still_composed_through(home: Home) -> None:
    set_version(home, 1, state=VersionState.RETIRED)
    snapshot = engine_of(home).current()
    assert snapshot.servable == (0, 2)
    with pytest.raises(VersionRetired):
        snapshot.resolve(1)
    ids = home.ids(version=2)
    assert_served(snapshot.vectors(Entity.ITEM, ids, 0).vectors, home, ids, 0, live=2)


def test_nothing_is_served_before_the_first_promotion(tmp_path: Path) -> None:
    with build_home(tmp_path) as home:
        engine = engine_of(home)
        with pytest.raises(NotReady):
            engine.current()
        with pytest.raises(NotReady):
            engine.expecting("v0-none")
        assert set(engine.view.versions) == {0, 1, 2}
        home.promote(0)
        engine.refresh()
        assert engine.current().live.version == 0


def test_refresh_follows_promotions(tmp_path: Path) -> None:
    with build_home(tmp_path, live=0) as home:
        engine = engine_of(home)
        for version in (1, 2):
            before = engine.current()
            snapshot = home.promote(version)
            assert engine.current() is before
            engine.refresh()
            assert engine.current().name == f"{snapshot}.0"
            assert engine.current().servable == tuple(range(version + 1))
            assert before.live.version == version - 1


def test_records_are_read_again_and_weights_are_not(home: Home) -> None:
    engine = engine_of(home)
    before = engine.current()
    home.register(3, parent=2)
    set_version(home, 0, state=VersionState.RETIRED)
    engine.refresh()
    after = engine.current()
    assert after.maps is before.maps
    assert after.store is before.store
    with pytest.raises(VersionNotPromoted):
        after.resolve(3)
    with pytest.raises(VersionRetired):
        after.resolve(0)
    assert before.resolve(0).dim == 4


def test_registry_that_does_not_answer_changes_nothing(home: Home, tmp_path: Path) -> None:
    engine = engine_of(home)
    before = engine.view
    (tmp_path / "registry.db").rename(tmp_path / "away")
    home.backcast.registry.close()
    (tmp_path / "registry.db").mkdir()
    with pytest.raises(BackcastError, match="does not answer"):
        engine.refresh()
    assert engine.view is before
    (tmp_path / "registry.db").rmdir()
    (tmp_path / "away").rename(tmp_path / "registry.db")
    engine.refresh()
    assert engine.current().live == home.backcast.registry.deployments.live()


def test_corrupt_map_is_refused_and_the_old_version_served(tmp_path: Path) -> None:
    with build_home(tmp_path, live=1) as home:
        engine = engine_of(home)
        home.promote(2)
        folder = home.backcast.registry.versions.get(2).folder
        (tmp_path / "artifacts" / folder / "transform.safetensors").write_bytes(b"not it")
        with pytest.raises(ArtifactCorrupt):
            engine.refresh()
        assert engine.current().live.version == 1
        ids = home.ids(version=1)
        served = engine.current().vectors(Entity.ITEM, ids, 0)
        assert_served(served.vectors, home, ids, 0, live=1)


def test_erased_and_retired_are_gone_while_what_is_live_cannot_be_loaded(tmp_path: Path) -> None:
    with build_home(tmp_path, live=1) as home:
        backcast, engine = home.backcast, engine_of(home)
        home.promote(2)
        folder = backcast.registry.versions.get(2).folder
        (tmp_path / "artifacts" / folder / "transform.safetensors").write_bytes(b"not it")
        gone, *others = home.ids(version=1)
        erase(backcast, Entity.ITEM, [gone], actor="ann", grace=timedelta(hours=1))
        retire(backcast, 0, actor="ann", idle=timedelta(0), force=True, reason="over")
        with pytest.raises(ArtifactCorrupt):
            engine.refresh()
        served = engine.current()
        assert served.live.version == 1
        assert served.vectors(Entity.ITEM, [gone, *others], 1).found.tolist() == [
            False,
            *[True] * len(others),
        ]
        with pytest.raises(VersionRetired):
            served.resolve(0)


def test_kept_snapshot_whose_changes_cannot_be_read_is_given_up(tmp_path: Path) -> None:
    with build_home(tmp_path, live=1) as home:
        backcast, engine = home.backcast, engine_of(home)
        first = engine.current().live.snapshot
        home.promote(2)
        erase(backcast, Entity.ITEM, ["item 0"], actor="ann", grace=timedelta(hours=1))
        [erasure] = backcast.registry.deltas.of(first)
        (tmp_path / "artifacts" / erasure.file).write_bytes(b"not it")
        engine.refresh()
        assert engine.current().live.version == 2
        assert engine.view.find(first) is None
        with pytest.raises(ArtifactCorrupt):
            engine.expecting(first)


def test_snapshot_of_another_dimension_in_the_store_is_refused(tmp_path: Path) -> None:
    with build_home(tmp_path, dims=(4, 6), live=0) as home:
        engine = engine_of(home)
        snapshot = home.promote(1)
        home.backcast.store.drop(snapshot)
        home.backcast.store.load(snapshot, 5, {}, [])
        with pytest.raises(StoreError, match="has dim 5"):
            engine.refresh()
        assert engine.current().live.version == 0


def test_expected_snapshot_is_found_by_either_name(home: Home) -> None:
    engine = engine_of(home)
    current = engine.current()
    assert engine.expecting(current.live.snapshot) is current
    assert engine.expecting(current.name) is current
    with pytest.raises(SnapshotMismatch) as raised:
        engine.expecting(f"{current.live.snapshot}.1")
    assert raised.value.data["current_snapshot"] == current.name


def test_expected_snapshot_newer_than_the_last_look_is_looked_for(tmp_path: Path) -> None:
    with build_home(tmp_path, live=0) as home:
        engine = engine_of(home)
        snapshot = home.promote(1)
        assert engine.expecting(snapshot).live.version == 1
        assert engine.current().live.version == 1


def test_superseded_snapshot_is_served_in_its_grace_period_only(tmp_path: Path) -> None:
    with build_home(tmp_path, live=1) as home:
        engine = engine_of(home)
        name = engine.current().name
        home.promote(2)
        engine.refresh()
        engine.refresh()
        kept = engine.expecting(name)
        assert kept.live.version == 1
        ids = home.ids(version=1)
        assert_served(kept.vectors(Entity.ITEM, ids, 0).vectors, home, ids, 0, live=1)
        sweep(home.backcast, timedelta(0))
        engine.refresh()
        assert engine.view.kept == {}
        with pytest.raises(SnapshotMismatch):
            engine.expecting(name)


def test_replica_that_began_later_serves_it_in_its_grace_period_too(tmp_path: Path) -> None:
    with build_home(tmp_path, live=1) as home:
        name = engine_of(home).current().name
        home.promote(2)
        engine = engine_of(home)
        kept = engine.expecting(name)
        assert (kept.name, kept.live.version) == (name, 1)
        assert engine.current().live.version == 2
        ids = home.ids(version=1)
        assert_served(kept.vectors(Entity.ITEM, ids, 0).vectors, home, ids, 0, live=1)
        with pytest.raises(VersionOffChain):
            kept.vectors(Entity.ITEM, ids, 2)
        sweep(home.backcast, timedelta(0))
        with pytest.raises(SnapshotMismatch):
            engine_of(home).expecting(name)


def test_snapshot_that_is_live_again_is_not_a_superseded_one(tmp_path: Path) -> None:
    with build_home(tmp_path, live=1) as home:
        engine = engine_of(home)
        name = engine.current().name
        for version in (0, 1):
            home.promote(version, force=True, reason="back and forth")
            engine.refresh()
        assert engine.expecting(name) is engine.current()
        assert {kept.live.version for kept in engine.view.kept.values()} == {0}


def test_no_read_is_torn_while_versions_change(tmp_path: Path) -> None:
    with build_home(tmp_path, live=0) as home:
        engine = engine_of(home)
        ids = home.ids(version=0)
        answers = {live: home.reference(0, ids, live=live) for live in range(3)}
        done = threading.Event()

        def read() -> set[int]:
            seen = set()
            while not done.is_set():
                snapshot = engine.current()
                served = snapshot.vectors(Entity.ITEM, ids, 0)
                seen.add(snapshot.live.version)
                answer = answers[snapshot.live.version]
                np.testing.assert_allclose(served.vectors, answer, atol=1e-4)
            return seen

        with ThreadPoolExecutor(3) as pool:
            readers = [pool.submit(read) for _ in range(3)]
            for version in (1, 2, 0, 1, 2, 0, 1, 2):
                home.promote(version, force=True, reason="round and round")
                engine.refresh()
            done.set()
        assert set.union(*(reader.result() for reader in readers)) == {0, 1, 2}


def test_only_vectors_in_memory_of_this_host_are_at_hand(home: Home) -> None:
    assert engine_of(home).current().at_hand
    elsewhere = WatchedStore(home.backcast.store, lambda _: None)
    assert not engine_of(home, elsewhere).current().at_hand


def test_cuda_is_used_where_it_is_and_refused_where_it_is_not(home: Home) -> None:
    parts = (home.backcast.registry, home.backcast.artifacts, home.backcast.store)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="cuda"):
            Engine(*parts, "cuda")
        return
    engine = Engine(*parts, "cuda")
    engine.refresh()
    ids = home.ids(version=2)
    for target in range(3):
        served = engine.current().vectors(Entity.ITEM, ids, target)
        assert_served(served.vectors, home, ids, target, live=2)
