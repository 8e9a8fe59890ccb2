"""What a promotion would change, its gates, and drift bounds: on both kinds of backends."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from backcast.chains import load_chain
from backcast.errors import (
    ArtifactUnwritable,
    Conflict,
    InvalidInput,
    NothingPublished,
    PromotionConflict,
    StoreError,
    UnknownDeployment,
    UnknownVersion,
)
from backcast.lifecycle import (
    Policy,
    collect,
    compare_with_live,
    deployment_diff,
    erase,
    plan_promotion,
    publish,
    sweep,
    upsert,
)
from backcast.lifecycle.carrying import switch_carrying
from backcast.lifecycle.comparing import LiveSide
from backcast.registry import Switch
from backcast.stores import Precision
from backcast.versions import Entity, Live
from tests.service_support import set_version
from tests.support import Home, Vectors, as_stored, batches, build_home, normal

ITEM, USER = Entity.ITEM, Entity.USER
HOUR = timedelta(hours=1)


@pytest.fixture
def home(tmp_path: Path, backends: dict[str, Any]) -> Iterator[Home]:
    """Versions 0 to 2, published, with a bias; 1 is live."""
    with build_home(tmp_path, bias=True, live=1, **backends) as home:
        yield home


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Home]:
    """The same on one host, with the gates as they are by default but for the change."""
    with build_home(tmp_path, bias=True, live=1, gate_coverage=0.99) as home:
        yield home


def live(home: Home) -> Live:
    found = home.backcast.registry.deployments.live()
    assert found is not None
    return found


def drift_names(home: Home) -> list[str]:
    return sorted(set(home.backcast.store.snapshots()) - set(home.held()))


def drift_folders(home: Home) -> list[str]:
    return sorted(path.name for path in Path(home.settings.artifacts_root).glob("drifts/*"))


def publish_vectors(home: Home, version: int, vectors: Mapping[Entity, Vectors]) -> None:
    home.vectors[version] = {entity: dict(rows) for entity, rows in vectors.items()}
    backcast = home.backcast
    publish(backcast.registry, backcast.artifacts, version, batches(vectors), details={})


def put(home: Home, ids: Sequence[str], seed: int = 0) -> None:
    """Put random vectors of items of the live version."""
    version = live(home).version
    rows = normal(np.random.default_rng([seed, 77]), len(ids), home.dims[version])
    upsert(home.backcast, ITEM, ids, rows, actor="tests", most_changed=1000)
    home.vectors[version][ITEM].update(zip(ids, rows, strict=True))


def bounds(
    home: Home, ids: Sequence[str], version: int, entity: Entity = ITEM
) -> NDArray[np.float32]:
    """Return the drift bounds of what is live now."""
    catalog = home.backcast.registry.deployments.catalog()
    side = LiveSide.open(home.backcast, catalog, live(home))
    return side.drift.of(entity, ids, version)


def changes(
    home: Home, before: int, after: int, target: int, entity: Entity, ids: Sequence[str]
) -> NDArray[np.float64]:
    was = home.reference(target, ids, entity, live=before)
    now = home.reference(target, ids, entity, live=after)
    return np.asarray(np.linalg.norm(now - was, axis=1))


def test_diff_compares_what_is_served_with_what_would_be(home: Home) -> None:
    kept = {entity: dict(list(rows.items())[2:]) for entity, rows in home.vectors[2].items()}
    rng = np.random.default_rng(8)
    kept[ITEM]["new"] = normal(rng, home.dims[2])
    publish_vectors(home, 2, kept)
    put(home, ["item 3", "put"])
    erase(home.backcast, ITEM, ["item 4"], actor="tests", grace=HOUR)
    gone = home.vectors[1][ITEM].pop("item 4"), home.vectors[2][ITEM].pop("item 4")
    assert len(gone) == 2

    compared = compare_with_live(home.backcast, 2)
    document = compared.document()
    target = home.backcast.registry.snapshots.latest(2)
    assert target is not None
    assert (document["version"], document["live_version"]) == (2, 1)
    assert document["snapshot"] == f"{target.id}.1"  # the erasure is a delta on it
    assert document["baseline"] == f"{live(home).snapshot}.2"
    items = compared.diff.ids[ITEM]
    in_both = [id for id in home.vectors[2][ITEM] if id in home.vectors[1][ITEM]]
    assert (items.before, items.after) == (12, 10)
    assert (items.compared, items.gained, items.lost) == (len(in_both), 1, 3)
    assert items.gained_ids == ("new",)
    assert set(items.lost_ids) == {"item 0", "item 1", "put"}
    assert [t.version for t in compared.diff.targets] == [1, 0]
    for found in compared.diff.targets:
        exact = changes(home, 1, 2, found.version, ITEM, in_both)
        change = found.entities[ITEM]
        assert change.absolute is not None
        assert change.absolute.mean == pytest.approx(exact.mean(), rel=1e-5)
        assert change.absolute.max == pytest.approx(exact.max(), rel=1e-5)
        chain = load_chain(home.backcast.registry.deployments.catalog(), home.backcast.artifacts, 2)
        assert found.gain == pytest.approx(chain[found.version].norm)


def test_direct_maps_are_compared_as_they_are_served(tmp_path: Path) -> None:
    with build_home(tmp_path, direct={2: [0]}, live=1) as home:
        compared = compare_with_live(home.backcast, 2)
        ids = home.ids(version=2)
        for found in compared.diff.targets:
            change = found.entities[ITEM]
            assert change.absolute is not None
            exact = changes(home, 1, 2, found.version, ITEM, ids)
            assert change.absolute.mean == pytest.approx(exact.mean(), rel=1e-5)


def test_refresh_is_compared_for_the_live_version_too_and_with_what_it_carries(home: Home) -> None:
    before = {entity: dict(rows) for entity, rows in home.vectors[1].items()}
    home.publish(1, seed=5)
    refreshed = home.vectors[1]
    home.vectors[1] = before
    put(home, ["item 2"])  # newer than the snapshot: it is carried over
    compared = compare_with_live(home.backcast, 1)
    assert [t.version for t in compared.diff.targets] == [1, 0]
    own = compared.diff.targets[0]
    assert (own.gain, own.condition) == (1, 1)
    exact = [
        np.linalg.norm(refreshed[ITEM][id].astype(float) - before[ITEM][id])
        for id in before[ITEM]
        if id != "item 2"
    ]
    change = own.entities[ITEM]
    assert change.compared == 12
    assert change.absolute is not None
    assert change.absolute.mean == pytest.approx(sum(exact) / 12, rel=1e-5)


def test_retired_versions_are_not_compared_nor_bounded(home: Home) -> None:
    set_version(home, 0, state="retired")
    assert [t.version for t in compare_with_live(home.backcast, 2).diff.targets] == [1]
    home.promote(2)
    record = home.backcast.registry.drifts.of(live(home).snapshot)
    assert record is not None
    assert tuple(record.targets) == (1,)


def test_sibling_is_compared_for_the_versions_that_both_serve(tmp_path: Path) -> None:
    with build_home(tmp_path, parents=(None, 0, 0), bias=True, live=1) as home:
        [target] = compare_with_live(home.backcast, 2).diff.targets
        assert target.version == 0
        moved = {kind: changes(home, 1, 2, 0, kind, home.ids(kind, version=2)) for kind in Entity}
        for kind, exact in moved.items():
            before = home.reference(0, home.ids(kind, version=2), kind, live=1)
            change, relative = target.entities[kind].absolute, target.entities[kind].relative
            assert change is not None
            assert relative is not None
            assert change.mean == pytest.approx(exact.mean(), rel=1e-5)
            assert change.max == pytest.approx(exact.max(), rel=1e-5)
            share = exact / np.linalg.norm(before, axis=1)
            assert relative.mean == pytest.approx(share.mean(), rel=1e-5)
        home.promote(2, force=True, reason="1 was trained on the wrong data")
        for kind, exact in moved.items():
            ids = home.ids(kind, version=2)
            exact = exact + changes(home, 0, 1, 0, kind, ids)
            assert bounds(home, ids, 0, kind) == pytest.approx(exact, rel=1e-5)
            assert np.isnan(bounds(home, ids, 1, kind)).all()


def test_what_cannot_be_compared_says_why(home: Home, tmp_path: Path) -> None:
    with pytest.raises(UnknownVersion):
        compare_with_live(home.backcast, 9)
    home.register(3, parent=2)
    with pytest.raises(NothingPublished):
        compare_with_live(home.backcast, 3)
    with pytest.raises(PromotionConflict, match="live already"):
        compare_with_live(home.backcast, 1)
    with (
        build_home(tmp_path / "new") as new,
        pytest.raises(Conflict, match="Nothing is live, so there is nothing to compare version 0"),
    ):
        compare_with_live(new.backcast, 0)


def test_diff_is_kept_with_the_deployment(home: Home) -> None:
    expected = compare_with_live(home.backcast, 2).document()
    plan = plan_promotion(home.backcast, 2)
    assert plan.document()["diff"] == expected
    home.promote(2)
    kept = deployment_diff(home.backcast.registry, 3)
    assert kept is not None
    as_json = {**expected, "versions": [_listed(version) for version in expected["versions"]]}
    as_json["ids"] = _listed(expected["ids"])
    assert kept == as_json
    rows = home.backcast.registry.diffs.of(home.backcast.registry.deployments.get(3)["id"])
    assert [(row["target"], row["version"]) for row in rows] == [(1, 2), (0, 2)]
    assert deployment_diff(home.backcast.registry, 1) is None
    with pytest.raises(UnknownDeployment, match="No deployment 9"):
        deployment_diff(home.backcast.registry, 9)


def _listed(found: Any) -> Any:
    """Return a document as JSON brings it back."""
    if isinstance(found, Mapping):
        return {key: _listed(value) for key, value in found.items()}
    return [_listed(value) for value in found] if isinstance(found, tuple) else found


class TestGates:
    """Each gate fails by itself, with its figures; force overrides some, with a reason."""

    def refused(
        self, home: Home, version: int, name: str, *, forceable: bool, also: str = ""
    ) -> dict[str, Any]:
        kinds = {name.partition("-")[0], also} - {""}
        seen, held = live(home), home.backcast.store.snapshots()
        with pytest.raises(Conflict, match=f"Version {version} is not promoted: gate") as caught:
            home.promote(version)
        failed = {g["name"]: g for g in caught.value.data["gates"] if not g["passed"]}
        assert name in failed
        assert {n.partition("-")[0] for n in failed} == kinds
        assert ("Force, with a reason" in caught.value.message) is forceable
        plan = plan_promotion(home.backcast, version)
        assert {g.name for g in plan.gates if not g.passed} == set(failed)
        assert live(home) == seen
        assert home.backcast.store.snapshots() == held
        assert drift_folders(home) == [
            record.folder.partition("/")[2]
            for record in [home.backcast.registry.drifts.of(seen.snapshot)]
            if record
        ]
        if forceable:
            with pytest.raises(InvalidInput, match="needs a reason"):
                home.promote(version, force=True)
            home.promote(version, force=True, reason="we know")
            newest = home.backcast.registry.deployments.history()[0]
            assert (newest["forced"], newest["reason"]) == (True, "we know")
            assert newest["gates"][name]["passed"] is False
        else:
            with pytest.raises(Conflict):
                home.promote(version, force=True, reason="in a hurry")
        gate: dict[str, Any] = failed[name]
        return gate

    def strict(self, home: Home, **thresholds: float) -> Home:
        chosen = replace(home.backcast.thresholds, **thresholds)
        return replace(home, backcast=replace(home.backcast, thresholds=chosen))

    def test_coverage(self, local: Home) -> None:
        rows = local.vectors[2]
        publish_vectors(local, 2, {ITEM: dict(list(rows[ITEM].items())[3:]), USER: rows[USER]})
        gate = self.refused(local, 2, "coverage-item", forceable=True)
        assert (gate["figure"], gate["threshold"]) == (0.75, 0.99)
        assert gate["finding"] == "9 of 12 live items are in the snapshot, 0 are new"

    def test_change(self, local: Home) -> None:
        gate = self.refused(self.strict(local, change=0.01), 2, "change-0", forceable=True)
        assert gate["threshold"] == 0.01
        worst = max(self.relative_p95(local, entity) for entity in (ITEM, USER))
        assert gate["figure"] == pytest.approx(worst, rel=0.006)

    def relative_p95(self, home: Home, entity: Entity) -> float:
        ids = home.ids(entity, version=1)
        length = np.linalg.norm(home.reference(0, ids, entity, live=1), axis=1)
        relative = changes(home, 1, 2, 0, entity, ids) / length
        return float(np.quantile(relative, 0.95, method="inverted_cdf"))

    def test_metric(self, local: Home) -> None:
        metrics = {"recall_at_50": 0.04, "parent_recall_at_50": 0.05}
        set_version(local, 2, details={"metrics": metrics})
        gate = self.refused(local, 2, "metric", forceable=True)
        assert (gate["figure"], gate["threshold"]) == (pytest.approx(0.8), 0.9)
        assert gate["finding"] == "Recall@50 0.0400, that of version 1 0.0500"

    @pytest.mark.parametrize(
        ("metrics", "finding"),
        [
            ({}, "passed, not measured: training had no --horizon to measure until"),
            ({"recall_at_50": 0.1}, "passed, not measured: training had no --horizon"),
            ({"recall_at_50": 0.05, "parent_recall_at_50": 0.05}, "Recall@50 0.0500, that of"),
            ({"recall_at_50": 0.0, "parent_recall_at_50": 0.0}, "nothing to lose"),
        ],
    )
    def test_metric_that_passes(self, local: Home, metrics: dict[str, float], finding: str) -> None:
        set_version(local, 2, details={"metrics": metrics})
        (gate,) = [g for g in plan_promotion(local.backcast, 2).gates if g.name == "metric"]
        assert gate.passed
        assert finding in gate.finding

    def test_metric_of_a_refresh_was_judged_before(self, local: Home) -> None:
        metrics = {"recall_at_50": 0.0, "parent_recall_at_50": 0.5}
        set_version(local, 1, details={"metrics": metrics})
        local.publish(1, seed=3)
        (gate,) = [g for g in plan_promotion(local.backcast, 1).gates if g.name == "metric"]
        assert (gate.passed, gate.finding) == (
            True,
            "passed, the model of version 1 is live already",
        )

    def test_finite_products(self, local: Home) -> None:
        rows = local.vectors[2]
        huge = np.full(local.dims[2], 3e38, np.float32)
        publish_vectors(local, 2, {ITEM: {**rows[ITEM], "item 1": huge}, USER: rows[USER]})
        gate = self.refused(local, 2, "finite", forceable=False)
        assert gate["figure"] >= 1
        assert "overflow float32" in gate["finding"]

    def test_lost_store_is_no_comparison(self, local: Home) -> None:
        local.backcast.store.drop(live(local).snapshot)
        gate = self.refused(local, 2, "coverage", forceable=True, also="change")
        assert "does not hold snapshot" in gate["finding"]
        assert np.isnan(bounds(local, ["item 0"], 0)).all()
        local.check_served(2)


def test_full_disk_under_the_bounds_is_an_error_and_no_gate(
    local: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = local.backcast.artifacts.create

    def full(folder: str, name: str) -> Any:
        if folder.startswith("drifts/"):
            raise ArtifactUnwritable(folder, "No space left on device")
        return create(folder, name)

    monkeypatch.setattr(local.backcast.artifacts, "create", full)
    with pytest.raises(ArtifactUnwritable, match="No space left"):
        local.promote(2)
    local.check_served(1)


def test_bounds_that_cannot_be_loaded_stop_the_promotion_and_leave_nothing(
    local: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders, load = drift_folders(local), local.backcast.store.load

    def failing(snapshot: str, *rest: Any) -> None:
        if "-drift-" in snapshot:
            raise StoreError("the store is full")
        load(snapshot, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(local.backcast.store, "load", failing)
        with pytest.raises(StoreError, match="full"):
            local.promote(2)
    assert drift_folders(local) == folders
    local.check_served(1)
    local.promote(2)
    local.check_served(2)


class TestDrift:
    """Bounds go with the snapshot that they are of."""

    def test_bounds_of_a_promotion_are_its_changes(self, home: Home) -> None:
        home.promote(2)
        ids = home.ids(version=2)
        first = changes(home, 0, 1, 0, ITEM, ids)
        second = changes(home, 1, 2, 0, ITEM, ids)
        assert bounds(home, ids, 0) == pytest.approx(first + second, rel=1e-5)
        assert bounds(home, ids, 1) == pytest.approx(changes(home, 1, 2, 1, ITEM, ids), rel=1e-5)
        assert bounds(home, ids, 2).tolist() == [0] * len(ids)
        assert np.isnan(bounds(home, ["nobody"], 0)).all()
        record = home.backcast.registry.drifts.of(live(home).snapshot)
        assert record is not None
        figures = record.figures["0"]["item"]
        assert (figures["known"], figures["unknown"]) == (12, 0)
        assert figures["mean"] == pytest.approx((first + second).mean(), rel=1e-5)
        assert figures["max"] == pytest.approx((first + second).max(), rel=1e-5)

    def test_new_ids_have_none(self, home: Home) -> None:
        rows = home.vectors[2]
        new = {"new": normal(np.random.default_rng(0), home.dims[2])}
        publish_vectors(home, 2, {ITEM: {**rows[ITEM], **new}, USER: rows[USER]})
        home.promote(2)
        assert np.isnan(bounds(home, ["new"], 0)).all()
        assert np.isnan(bounds(home, ["new"], 1)).all()
        assert bounds(home, ["new"], 2).tolist() == [0]
        record = home.backcast.registry.drifts.of(live(home).snapshot)
        assert record is not None
        assert record.figures["1"]["item"]["unknown"] == 1

    def test_put_vectors_add_how_far_they_are(self, home: Home) -> None:
        before = {id: vector.copy() for id, vector in home.vectors[1][ITEM].items()}
        ids = ["item 1", "item 2", "put"]
        old = bounds(home, ids, 0)
        put(home, ["item 1", "put"])
        put(home, ["item 1"], seed=1)
        weight = home.maps[1, 0, False][0].astype(float)
        further = np.linalg.norm(weight @ (home.vectors[1][ITEM]["item 1"] - before["item 1"]))
        new = bounds(home, ids, 0)
        assert new[0] == pytest.approx(old[0] + further, rel=1e-5)
        assert new[1] == old[1]
        assert np.isnan(new[2])
        erase(home.backcast, ITEM, ["item 2"], actor="tests", grace=HOUR)
        assert np.isnan(bounds(home, ["item 2"], 0)).all()

    def test_bounds_survive_a_rollback_and_are_made_anew_going_forward(self, home: Home) -> None:
        ids, first = home.ids(version=1), live(home)
        before = bounds(home, ids, 0)
        second = home.promote(2)
        then = bounds(home, ids, 0), bounds(home, ids, 1)
        back = Switch("rollback", live(home), 1, first.snapshot, actor="ann", reason="worse")
        switch_carrying(home.backcast, back)
        assert bounds(home, ids, 0).tobytes() == before.tobytes()
        put(home, ["item 0"])
        assert home.promote(2) == second
        assert bounds(home, ids, 0)[1:] == pytest.approx(then[0][1:])
        assert bounds(home, ids, 1)[1:] == pytest.approx(then[1][1:])
        assert bounds(home, ids, 1)[0] == pytest.approx(
            changes(home, 1, 2, 1, ITEM, ids)[0], rel=1e-5
        )
        assert len([name for name in drift_names(home) if name.startswith(second)]) == 2
        home.publish(2, seed=4)
        home.promote(2)
        collect(home.backcast, Policy(timedelta(0)), "tests")
        assert len(drift_names(home)) == 1

    def test_ids_put_while_the_bounds_are_worked_out_have_none_for_the_live_version(
        self, home: Home
    ) -> None:
        def meanwhile(step: str, _fraction: float) -> None:
            if step == "switch":
                put(home, ["item 1"])

        home.promote(2, report=meanwhile)
        assert np.isnan(bounds(home, ["item 1"], 1)).all()
        others = ["item 0", "item 2"]
        assert bounds(home, others, 1) == pytest.approx(
            changes(home, 1, 2, 1, ITEM, others), rel=1e-5
        )
        assert not np.isnan(bounds(home, ["item 1"], 0)).any()
        deployment = home.backcast.registry.deployments.get(3)
        kept = deployment_diff(home.backcast.registry, 3)
        assert kept is not None
        assert kept["baseline"].endswith(".0")
        assert deployment["from_delta"] == 1

    def test_first_version_and_its_refreshes_have_none(self, tmp_path: Path) -> None:
        with build_home(tmp_path, dims=(4,), live=0) as home:
            home.publish(0, seed=1)
            home.promote(0)
            assert drift_names(home) == []
            assert bounds(home, ["item 0"], 0).tolist() == [0]

    def test_bounds_are_dropped_with_their_snapshot(self, home: Home) -> None:
        (first,) = drift_names(home)
        home.promote(2)
        assert len(drift_names(home)) == 2
        sweep(home.backcast, timedelta(0))
        (second,) = drift_names(home)
        assert second != first
        assert drift_folders(home) == [second]
        home.check_served(2)

    def test_emptied_store_gets_them_back(self, home: Home) -> None:
        expected = bounds(home, home.ids(version=1), 0)
        for name in home.backcast.store.snapshots():
            home.backcast.store.drop(name)
        home.promote(1)
        assert bounds(home, home.ids(version=1), 0).tobytes() == expected.tobytes()

    @pytest.mark.parametrize("precision", ["float16", "bfloat16"])
    def test_bounds_hold_for_vectors_as_they_are_stored(
        self, tmp_path: Path, precision: str
    ) -> None:
        with build_home(tmp_path, live=1, store_precision=precision) as home:
            ids = home.ids(version=1)
            for version in (0, 1):
                for rows in home.vectors[version].values():
                    rows.update({i: as_stored(v, Precision(precision)) for i, v in rows.items()})
            exact = changes(home, 0, 1, 0, ITEM, ids)
            found = bounds(home, ids, 0)
            assert found == pytest.approx(exact, rel=1e-5)
            assert (exact <= found * (1 + 1e-5)).all()


Act = tuple[str, int]
acts = st.lists(
    st.tuples(st.sampled_from(["promote", "refresh", "put"]), st.integers(0, 1000)),
    min_size=1,
    max_size=6,
)


class World:
    """A home, and what became of its ids.

    Attributes:
        stored: the ver-j vectors that were stored last, by version, kind and id.
        followed: the ids that were live ever since, by version and kind.
    """

    def __init__(self, home: Home) -> None:
        self.home = home
        self.followed: dict[int, dict[Entity, set[str]]] = {}
        self.stored: dict[int, dict[Entity, dict[str, NDArray[np.float64]]]] = {}
        self.note()

    def act(self, kind: str, seed: int) -> None:
        home, at = self.home, live(self.home)
        if kind == "promote":
            dim = 2 + seed % 4
            version = home.register(dim, parent=at.version, bias=seed % 2 == 1, seed=seed)
            home.publish(version.number, items=6 + seed % 5, users=4, seed=seed)
            home.promote(version.number)
        elif kind == "refresh":
            home.publish(at.version, items=6 + seed % 5, users=4, seed=seed)
            home.promote(at.version)
        elif kind == "put":
            put(home, [f"item {n}" for n in range(seed % 7, seed % 7 + 2)], seed)
        self.note()

    def note(self) -> None:
        version = live(self.home).version
        kinds = self.stored.setdefault(version, {ITEM: {}, USER: {}})
        for entity, rows in self.home.vectors[version].items():
            kinds[entity].update({id: v.astype(np.float64) for id, v in rows.items()})
            for followed in self.followed.values():
                followed[entity] &= rows.keys()
        now = self.home.vectors[version]
        self.followed[version] = {entity: set(rows) for entity, rows in now.items()}

    def check(self) -> int:
        """Demand that every bound bounds; return how many there were."""
        home, checked = self.home, 0
        version = live(home).version
        for target in home.chain(version):
            for entity, rows in home.vectors[version].items():
                ids = list(rows)
                served = home.reference(target, ids, entity, live=version)
                for id, now, bound in zip(
                    ids, served, bounds(home, ids, target, entity), strict=True
                ):
                    last = self.stored[target][entity].get(id)
                    if last is None:
                        assert np.isnan(bound)
                    elif not np.isnan(bound):
                        assert np.linalg.norm(now - last) <= bound * (1 + 1e-5)
                        checked += 1
        return checked


@settings(max_examples=12)
@given(acts)
def test_bounds_bound_whatever_happens(done: list[Act]) -> None:
    with (
        TemporaryDirectory() as folder,
        build_home(Path(folder), dims=(3,), items=8, users=4, live=0) as home,
    ):
        world = World(home)
        for kind, seed in done:
            world.act(kind, seed)
            assert world.check() > 0
