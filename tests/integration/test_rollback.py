"""Going back, and forward again: on one host's backends and on those for many."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backcast.errors import (
    ArtifactCorrupt,
    Conflict,
    InvalidInput,
    NothingPublished,
    PromotionConflict,
    UnknownSnapshot,
    VersionOffChain,
    VersionRetired,
)
from backcast.lifecycle import (
    erase,
    plan_promotion,
    plan_rollback,
    refresh,
    rollback,
    sweep,
    upsert,
)
from backcast.registry.database import utc_now
from backcast.registry.versions import set_state
from backcast.versions import Entity, Live, VersionState
from tests.service_support import client_of, engine_of, secret_of
from tests.support import SHARED_ID, Home, build_home, normal
from trainer.training import choose_parent

NOW, HOUR = timedelta(0), timedelta(hours=1)


@pytest.fixture
def home(tmp_path: Path, backends: dict[str, Any]) -> Iterator[Home]:
    """Version 2 is live, promoted after 1, and 1 after 0; all in their grace."""
    with build_home(tmp_path, live=2, **backends) as home:
        yield home


@pytest.fixture
def local_home(tmp_path: Path) -> Iterator[Home]:
    """The same, for what does not depend on the backends."""
    with build_home(tmp_path, live=2) as home:
        yield home


def live(home: Home) -> Live:
    found = home.backcast.registry.deployments.live()
    assert found is not None
    return found


def newest(home: Home, version: int) -> str:
    found = home.backcast.registry.snapshots.latest(version)
    assert found is not None
    return found.id


def back(home: Home, reason: str = "clicks fell by 4 %", **options: Any) -> Live:
    return rollback(home.backcast, actor="ann", reason=reason, **options)


def put(home: Home, *ids: str, entity: Entity = Entity.ITEM, seed: int = 0) -> np.ndarray[Any, Any]:
    version = live(home).version
    vectors = normal(np.random.default_rng([7, seed]), len(ids), home.dims[version])
    upsert(home.backcast, entity, ids, vectors, actor="ann", most_changed=100)
    return vectors


def states(home: Home) -> list[tuple[str, str | None]]:
    return [(str(v.state), v.note) for v in home.backcast.registry.versions.all()]


def test_rollback_is_a_switch_to_what_was_live_before(home: Home) -> None:
    seen, before = live(home), home.backcast.store.snapshots()
    steps: list[str] = []
    after = back(home, expected_live=2, report=lambda step, _: steps.append(step))
    assert after == live(home) == Live(1, newest(home, 1), 0, seen.generation + 1)
    assert steps == ["check", "load", "switch"]
    assert home.backcast.store.snapshots() == before
    home.check_served(1)
    assert states(home) == [
        ("superseded", None),
        ("live", None),
        ("rolled_back", "clicks fell by 4 %"),
    ]
    row = home.backcast.registry.deployments.history()[0]
    assert (row["kind"], row["actor"], row["reason"]) == ("rollback", "ann", "clicks fell by 4 %")
    assert (row["from_version"], row["from_snapshot"]) == (2, seen.snapshot)


def test_rollback_reads_no_vector_again(home: Home) -> None:
    home.backcast.artifacts.delete(home.backcast.registry.snapshots.get(newest(home, 1)).folder)
    back(home)
    home.check_served(1)


def test_consumers_of_the_newer_version_are_told_the_reason(home: Home) -> None:
    with client_of(home) as client:
        assert client.get("/embeddings/item 1?version=2").status_code == 200
        back(home)
        engine_of(home)
    with client_of(home) as client:
        refused = client.get("/embeddings/item 1?version=2")
        assert refused.status_code == 409
        problem = refused.json()
        assert problem["type"] == "urn:backcast:problem:version-off-chain"
        assert problem["reason"] == "clicks fell by 4 %"
        assert '(rolled_back: "clicks fell by 4 %")' in problem["detail"]
        assert client.get("/embeddings/item 1?version=1").status_code == 200


def test_second_rollback_goes_further_back(home: Home) -> None:
    back(home, reason="2 was bad")
    back(home, reason="1 was bad too")
    home.check_served(0)
    assert states(home) == [
        ("live", None),
        ("rolled_back", "1 was bad too"),
        ("rolled_back", "2 was bad"),
    ]
    with pytest.raises(Conflict, match="Nothing was live before version 0"):
        back(home)


def test_snapshot_further_back_can_be_named(home: Home) -> None:
    back(home, to_snapshot=newest(home, 0))
    home.check_served(0)
    assert [state for state, _ in states(home)] == ["live", "rolled_back", "rolled_back"]
    with pytest.raises(VersionOffChain, match="clicks fell"):
        engine_of(home).current().resolve(1)


def test_version_that_was_left_can_be_promoted_again(home: Home) -> None:
    seen = live(home)
    back(home)
    assert home.promote(2) == seen.snapshot
    home.check_served(2)
    assert states(home) == [("superseded", None), ("superseded", None), ("live", None)]
    engine_of(home).current().resolve(2)


def test_version_that_was_left_is_kept_for_its_grace(home: Home) -> None:
    left = live(home).snapshot
    back(home)
    assert sweep(home.backcast, HOUR) == []
    assert left in sweep(home.backcast, NOW)
    home.check_served(1)
    with pytest.raises(NothingPublished):
        home.promote(2)
    home.publish(2)
    home.promote(2)
    home.check_served(2)


def test_store_that_lost_the_snapshot_is_filled_again(home: Home) -> None:
    home.backcast.store.drop(newest(home, 1))
    plan = plan_rollback(home.backcast, grace=HOUR)
    assert not plan.loaded
    back(home)
    home.check_served(1)


def test_plan_says_all_and_changes_nothing(home: Home) -> None:
    secret_of(home, pin=2)
    secret_of(home, pin=1)
    old = home.ids(version=1)
    put(home, "new a", "item 1", "new b")
    put(home, "new user", SHARED_ID, entity=Entity.USER)
    put(home, "new b", "new c")
    seen = live(home)
    plan = plan_rollback(home.backcast, grace=HOUR, expected_live=2)
    assert "item 1" in old
    assert plan.lost == {Entity.ITEM: ("new a", "new b", "new c"), Entity.USER: ("new user",)}
    assert (plan.version, plan.snapshot) == (1, f"{newest(home, 1)}.0")
    assert (plan.servable, plan.refused, plan.pinned) == ((0, 1), (2,), ("consumer 0",))
    assert timedelta(minutes=59) < plan.grace_left <= HOUR
    assert plan.loaded
    document = plan.document()
    assert document["lost_ids"] == {"item": ["new a", "new b", "new c"], "user": ["new user"]}
    assert document["live_snapshot"] == f"{seen.snapshot}.3"
    assert live(home) == seen
    home.backcast.store.drop(newest(home, 1))  # then it is told from the artifacts
    assert plan_rollback(home.backcast, grace=HOUR).lost == plan.lost


def test_lost_ids_answer_404_and_come_back_when_rolling_forward(home: Home) -> None:
    [vector] = put(home, "new a")
    plan = plan_rollback(home.backcast, grace=HOUR)
    back(home)
    for id in plan.lost[Entity.ITEM]:
        assert not engine_of(home).current().vectors(Entity.ITEM, [id], 1).found.any()
    home.promote(2)
    answer = engine_of(home).current().vectors(Entity.ITEM, ["new a"], 2)
    assert answer.vectors[0].tobytes() == vector.tobytes()


def test_rolling_forward_past_a_bad_publication_takes_the_snapshot_that_is_named(
    home: Home,
) -> None:
    good = live(home).snapshot
    put(home, "new a")
    served = home.vectors[2]
    back(home)
    home.publish(2, seed=9)
    bad = newest(home, 2)
    assert plan_promotion(home.backcast, 2).snapshot == bad
    assert plan_promotion(home.backcast, 2, snapshot=good).snapshot == good
    assert home.promote(2, snapshot=good) == good
    home.vectors[2] = served
    home.check_served(2)
    assert engine_of(home).current().vectors(Entity.ITEM, ["new a"], 2).found.all()


def test_snapshots_that_cannot_be_promoted_by_name(local_home: Home) -> None:
    older, now = newest(local_home, 1), live(local_home).snapshot
    with pytest.raises(InvalidInput, match="is of version 1, not of version 2"):
        local_home.promote(2, snapshot=older)
    with pytest.raises(PromotionConflict, match="rollback --to-snapshot"):
        local_home.promote(2, snapshot=now)
    with pytest.raises(UnknownSnapshot):
        local_home.promote(2, snapshot="none")
    back(local_home)
    sweep(local_home.backcast, NOW)
    with pytest.raises(Conflict, match="over its grace period"):
        local_home.promote(2, snapshot=now)


def test_ids_upserted_before_the_promotion_are_not_lost(home: Home) -> None:
    back(home)
    put(home, "of version 1")
    home.promote(2)
    put(home, "of version 2")
    assert plan_rollback(home.backcast, grace=HOUR).lost == {Entity.ITEM: ("of version 2",)}
    assert back(home).delta == 1
    assert engine_of(home).current().vectors(Entity.ITEM, ["of version 1"], 1).found.all()


def test_bad_refresh_is_undone_and_its_upserts_stay(home: Home) -> None:
    good = live(home).snapshot
    put(home, "before", seed=1)
    home.publish(2, seed=5)
    home.promote(2)
    assert live(home).snapshot != good
    [after] = put(home, "after", seed=2)
    plan = plan_rollback(home.backcast, grace=HOUR, to_snapshot=good)
    assert (plan.version, plan.lost, plan.refused) == (2, {}, ())
    assert back(home, to_snapshot=good).snapshot == good
    answer = engine_of(home).current().vectors(Entity.ITEM, ["before", "after"], 2)
    assert answer.found.all()
    assert answer.vectors[1].tobytes() == after.tobytes()
    assert states(home)[2] == ("live", None)
    home.publish(2)  # what check_served compares with
    assert home.backcast.registry.deployments.history()[0]["kind"] == "rollback"


def test_refresh_between_is_looked_through_for_lost_ids(home: Home) -> None:
    put(home, "on the first")
    home.publish(2, seed=5)
    home.promote(2)
    put(home, "on the second")
    lost = plan_rollback(home.backcast, grace=HOUR).lost
    assert lost == {Entity.ITEM: ("on the first", "on the second")}


def held(home: Home, *ids: str) -> list[bool]:
    found = engine_of(home).current().store.gather(Entity.ITEM, ids).found
    return [bool(known) for known in found]


def test_newer_snapshot_takes_over_what_was_put_before_the_rollback(home: Home) -> None:
    newer = home.publish(2, seed=5).id
    put(home, "kept", "gone")
    back(home)
    erase(home.backcast, Entity.ITEM, ["gone"], actor="ann", grace=HOUR)
    home.promote(2)
    assert live(home).snapshot == newer
    assert held(home, "kept", "gone") == [True, False]


def test_older_snapshot_takes_over_what_was_put_before_another_version_was_live(home: Home) -> None:
    first = live(home).snapshot
    for id in ("early", "gone"):
        home.publish(2, seed=5)
        refresh(home.backcast, actor="ann")
        put(home, id)
    back(home)
    erase(home.backcast, Entity.ITEM, ["gone"], actor="ann", grace=HOUR)
    home.promote(2)
    home.publish(2, seed=6)
    refresh(home.backcast, actor="ann")
    back(home, to_snapshot=first)
    assert held(home, "early", "gone") == [True, False]


def test_what_goes_along_is_not_listed_as_lost(home: Home) -> None:
    back(home)
    first = live(home).snapshot
    home.publish(1, seed=5)
    refresh(home.backcast, actor="ann")
    put(home, "of version 1")
    home.promote(2)
    put(home, "of version 2")
    plan = plan_rollback(home.backcast, grace=HOUR, to_snapshot=first)
    assert plan.lost == {Entity.ITEM: ("of version 2",)}
    back(home, to_snapshot=first)
    assert held(home, "of version 1", "of version 2") == [True, False]


def test_grace_that_is_over_is_refused(home: Home) -> None:
    old = newest(home, 1)
    sweep(home.backcast, NOW)
    with pytest.raises(Conflict, match=r"over its grace period .*\(backcast publish 1\)"):
        back(home)
    with pytest.raises(Conflict, match="over its grace period"):
        plan_rollback(home.backcast, grace=HOUR, to_snapshot=old)
    home.check_served(2)


class TestRefusals:
    """What cannot be gone back to is told from what can, and nothing changes."""

    @pytest.fixture
    def home(self, local_home: Home) -> Home:
        return local_home

    def check_refused(self, home: Home, error: type[Exception], words: str, **options: Any) -> None:
        seen = live(home)
        with pytest.raises(error, match=words):
            back(home, **options)
        assert live(home) == seen

    def test_another_version_is_live(self, home: Home) -> None:
        words = "Version 1 was expected to be live, version 2 is"
        self.check_refused(home, PromotionConflict, words, expected_live=1)

    def test_nothing_is_live(self, tmp_path: Path) -> None:
        nothing = pytest.raises(PromotionConflict, match="Nothing is live")
        with build_home(tmp_path / "other") as home, nothing:
            back(home)

    def test_live_snapshot(self, home: Home) -> None:
        self.check_refused(home, InvalidInput, "is live", to_snapshot=live(home).snapshot)

    def test_snapshot_that_was_never_live(self, home: Home) -> None:
        snapshot = home.publish(2).id
        self.check_refused(home, InvalidInput, "is not yet used", to_snapshot=snapshot)

    def test_unknown_snapshot(self, home: Home) -> None:
        self.check_refused(home, UnknownSnapshot, "v9-x", to_snapshot="v9-x")

    def test_newer_version(self, home: Home) -> None:
        left = live(home).snapshot
        back(home)
        words = "is newer than the live version 1; .* backcast promote 2"
        self.check_refused(home, InvalidInput, words, to_snapshot=left)

    def test_retired_version(self, home: Home) -> None:
        with home.backcast.registry._engine.begin() as connection:
            set_state(connection, [1], VersionState.RETIRED)
        self.check_refused(home, VersionRetired, "Version 1 is retired")

    def test_no_reason(self, home: Home) -> None:
        self.check_refused(home, InvalidInput, "A rollback needs a reason", reason=" ")

    def test_damaged_map(self, home: Home) -> None:
        folder = home.backcast.registry.versions.get(1).folder
        path = Path(home.settings.artifacts_root) / folder / "transform.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
        self.check_refused(home, ArtifactCorrupt, "SHA-256")


class TestTrainingGoesOn:
    """From the version that is live again; numbers are never given twice."""

    @pytest.fixture
    def home(self, local_home: Home) -> Home:
        return local_home

    def parent(self, home: Home) -> int:
        chosen = choose_parent(home.backcast.registry.deployments.catalog(), None)
        assert chosen is not None
        return chosen.number

    def test_from_the_version_that_is_live_again(self, home: Home) -> None:
        assert self.parent(home) == 2
        back(home)
        assert self.parent(home) == 1
        version = home.register(5, parent=self.parent(home))
        assert version.number == 3
        home.publish(3)
        home.promote(3)
        home.check_served(3)
        assert home.chain(3) == [3, 1, 0]
        assert [state for state, _ in states(home)] == [
            *("superseded", "superseded", "rolled_back", "live")
        ]
        assert self.parent(home) == 3

    def test_not_from_a_child_of_a_version_that_was_left(self, home: Home) -> None:
        home.register(5, parent=2)
        assert self.parent(home) == 3
        back(home)
        assert self.parent(home) == 1

    def test_not_from_a_version_between(self, home: Home) -> None:
        back(home, to_snapshot=newest(home, 0))
        assert self.parent(home) == 0


def test_erased_id_is_not_listed_as_lost(home: Home) -> None:
    put(home, "new a", "new b")
    erase(home.backcast, Entity.ITEM, ["new a"], actor="ann", grace=HOUR)
    assert plan_rollback(home.backcast, grace=HOUR).lost == {Entity.ITEM: ("new b",)}


def test_id_that_was_erased_and_put_again_is_listed_as_lost(home: Home) -> None:
    first = live(home).snapshot
    put(home, "back")
    home.publish(2, seed=5)
    refresh(home.backcast, actor="ann")
    erase(home.backcast, Entity.ITEM, ["back"], actor="ann", grace=HOUR)
    back(home, to_snapshot=first)
    put(home, "back")
    assert plan_rollback(home.backcast, grace=HOUR).lost == {Entity.ITEM: ("back",)}


def test_plan_looks_through_what_is_kept(home: Home) -> None:
    put(home, "swept")
    home.publish(2, seed=5)
    refresh(home.backcast, actor="ann")
    sweep(home.backcast, NOW)
    never_live = home.publish(1, seed=5).id
    home.publish(1, seed=6)
    home.promote(1, force=True, reason="2 is bad")
    home.promote(2)
    put(home, "kept")
    plan = plan_rollback(home.backcast, grace=HOUR, to_snapshot=never_live)
    assert plan.lost == {Entity.ITEM: ("kept",)}


def test_promotion_that_fills_a_store_notices_that_another_went_live(home: Home) -> None:
    filled = live(home).snapshot
    home.backcast.store.drop(filled)

    def meanwhile(step: str, fraction: float) -> None:
        if step == "load" and fraction == 0.4:
            back(home)

    with pytest.raises(PromotionConflict, match=r"is not live from .* any more"):
        home.promote(2, report=meanwhile)
    assert filled in home.backcast.store.snapshots()  # in its grace
    home.check_served(1)


def test_what_was_filled_for_nothing_and_is_over_its_grace_is_dropped(home: Home) -> None:
    filled = live(home).snapshot
    home.backcast.store.drop(filled)

    def meanwhile(step: str, fraction: float) -> None:
        if step == "load" and fraction == 0.4:
            back(home)
            home.backcast.registry.snapshots.condemn(utc_now())

    with pytest.raises(PromotionConflict, match=r"is not live from .* any more"):
        home.promote(2, report=meanwhile)
    assert filled not in home.backcast.store.snapshots()
