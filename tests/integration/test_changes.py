"""Ids are put and erased between publications: nothing is lost, nothing comes back by itself."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sqlalchemy import update

from backcast.artifacts import Artifacts
from backcast.changes import ChangedSnapshot, read_changes
from backcast.errors import (
    ArtifactUnwritable,
    Conflict,
    DimensionMismatch,
    InvalidInput,
    PromotionConflict,
    RegistryError,
)
from backcast.lifecycle import (
    ErasureReport,
    Listed,
    changing,
    compact,
    erase,
    erase_listed,
    erasing,
    load_snapshot,
    publish,
    refresh,
    rollback,
    sweep,
    upsert,
    upsert_batches,
)
from backcast.lifecycle.carrying import switch_carrying
from backcast.registry import Erased, Switch, digest_of, tables
from backcast.snapshots import read_ids
from backcast.stores import Precision
from backcast.vectors import VectorBatch
from backcast.versions import Entity, Live
from tests.integration.test_lifecycle import engine_of, lose_answers, reopened
from tests.support import Home, as_stored, batches, build_home, normal

HOUR = timedelta(hours=1)


@pytest.fixture
def home(tmp_path: Path, backends: dict[str, Any]) -> Iterator[Home]:
    """Versions 0 to 2, published; 1 is live, the snapshot of 0 is kept."""
    with build_home(tmp_path, live=1, **backends) as home:
        yield home


@pytest.fixture
def local_home(tmp_path: Path) -> Iterator[Home]:
    """The same, for what does not depend on the backends."""
    with build_home(tmp_path, live=1) as home:
        yield home


def live(home: Home) -> Live:
    found = home.backcast.registry.deployments.live()
    assert found is not None
    return found


def put(
    home: Home, ids: list[str], seed: int = 9, **options: Any
) -> dict[str, NDArray[np.float32]]:
    """Upsert random vectors of items and return them."""
    vectors = normal(np.random.default_rng(seed), len(ids), home.dims[live(home).version])
    chosen = {"entity": Entity.ITEM, "actor": "ann", "most_changed": 1000, **options}
    upsert(home.backcast, chosen.pop("entity"), ids, vectors, **chosen)
    return dict(zip(ids, vectors, strict=True))


def remove(home: Home, ids: list[str], entity: Entity = Entity.ITEM) -> ErasureReport:
    return erase(home.backcast, entity, ids, actor="ann", grace=HOUR)


def held(home: Home, snapshot: str, entity: Entity = Entity.ITEM) -> dict[str, NDArray[np.float32]]:
    """Read S.head: all vectors of one entity kind, out of the store."""
    backcast = home.backcast
    changes = read_changes(backcast.artifacts, backcast.registry.deltas.of(snapshot))
    record = backcast.registry.snapshots.get(snapshot)
    written = {id for some in read_ids(backcast.artifacts, record, entity) for id in some}
    ids = sorted(written | set(changes.places.get(entity, {})))
    found = ChangedSnapshot(backcast.store.open(snapshot), changes).gather(entity, ids)
    return {
        id: vector
        for id, vector, there in zip(ids, found.vectors, found.found, strict=True)
        if there
    }


def assert_same(
    found: dict[str, NDArray[np.float32]], wanted: dict[str, NDArray[np.float32]]
) -> None:
    assert sorted(found) == sorted(wanted)
    for id, vector in wanted.items():
        assert found[id].tolist() == vector.tolist(), id


def delta_files(home: Home) -> int:
    folder = Path(home.settings.artifacts_root, "deltas")
    return len(list(folder.iterdir())) if folder.exists() else 0


def test_refresh_of_an_emptied_store_takes_up_the_newest_snapshot(home: Home) -> None:
    live = home.backcast.registry.deployments.live()
    assert live is not None
    home.backcast.store.drop(live.snapshot)
    newer = home.publish(1, seed=3)
    assert refresh(home.backcast, actor="ann").live.snapshot == newer.id
    home.check_served(1)


def test_vectors_that_could_not_be_served_or_stored_are_refused(tmp_path: Path) -> None:
    with build_home(tmp_path, live=1, store_precision="float16") as home:
        put = partial(upsert, home.backcast, Entity.ITEM, actor="ann", most_changed=9)
        for number, reason in ((3e38, "'b' holds numbers beyond 1e.18"), (1e6, "'b' holds 1e.06")):
            vectors = np.ones((2, home.dims[1]), np.float32)
            vectors[1, 0] = number
            with pytest.raises(InvalidInput, match=reason):
                put(["a", "b"], vectors)
        live = home.backcast.registry.deployments.live()
        assert live is not None
        assert live.delta == 0
        assert not list(Path(home.settings.artifacts_root).glob("deltas/*"))


class TestUpsert:
    """New vectors of ids of the live version."""

    def test_new_and_known_ids_are_the_next_delta(self, home: Home) -> None:
        before = live(home)
        rows = put(home, ["item 0", "new"])
        after = live(home)
        assert (after.snapshot, after.delta, after.generation) == (
            before.snapshot,
            before.delta + 1,
            before.generation,
        )
        assert_same(held(home, after.snapshot), {**home.vectors[1][Entity.ITEM], **rows})
        users = home.vectors[1][Entity.USER]
        assert_same(held(home, after.snapshot, Entity.USER), users)

    def test_the_last_of_several_counts(self, home: Home) -> None:
        put(home, ["a", "b"], seed=1)
        rows = {**put(home, ["b", "c"], seed=2), **put(home, ["c"], seed=3)}
        found = held(home, live(home).snapshot)
        assert {id: found[id].tolist() for id in rows} == {
            id: row.tolist() for id, row in rows.items()
        }
        assert live(home).delta == 3

    @pytest.mark.parametrize(
        ("ids", "vectors", "error", "message"),
        [
            ([], np.ones((0, 6)), InvalidInput, "No id is given"),
            (["a", "a"], np.ones((2, 6)), InvalidInput, "The item 'a' comes more than once"),
            (["a", ""], np.ones((2, 6)), InvalidInput, "1 to 1024 bytes"),
            (
                ["a"],
                np.ones((1, 4)),
                DimensionMismatch,
                "live version: expected 6, got 4",
            ),
            (["a"], np.ones((2, 6)), DimensionMismatch, r"expected \(1, D\)"),
            (["a", "b"], np.array([[1] * 6, [np.nan] * 6]), InvalidInput, "that of item 'b'"),
            (["a"], np.full((1, 6), 1e39), InvalidInput, "NaN or infinite"),
        ],
    )
    def test_what_cannot_be_stored_is_refused(
        self,
        local_home: Home,
        ids: list[str],
        vectors: NDArray[np.float32],
        error: type[Exception],
        message: str,
    ) -> None:
        before = live(local_home)
        with pytest.raises(error, match=message):
            upsert(local_home.backcast, Entity.ITEM, ids, vectors, actor="ann", most_changed=10)
        assert live(local_home) == before
        assert delta_files(local_home) == 0

    def test_too_many_changed_ids_are_refused_with_the_mend(self, local_home: Home) -> None:
        put(local_home, ["a", "b"], most_changed=4)
        with pytest.raises(Conflict, match=r"2 ids are changed .* backcast refresh --compact"):
            put(local_home, ["c", "d", "e"], most_changed=4)
        put(local_home, ["c", "d"], most_changed=4)
        assert delta_files(local_home) == 2

    def test_vectors_of_another_version_are_refused(self, local_home: Home) -> None:
        with pytest.raises(PromotionConflict, match="of version 2, live is version 1"):
            put(local_home, ["a"], expected_live=2)
        assert delta_files(local_home) == 0

    def test_nothing_is_live(self, tmp_path: Path) -> None:
        with build_home(tmp_path, (4,)) as home, pytest.raises(Conflict, match="Nothing is live"):
            upsert(
                home.backcast,
                Entity.ITEM,
                ["a"],
                np.ones((1, 4), np.float32),
                actor="ann",
                most_changed=1,
            )

    def test_those_of_many_writers_are_all_kept(self, home: Home) -> None:
        barrier = threading.Barrier(6)

        def write(writer: int) -> dict[str, NDArray[np.float32]]:
            barrier.wait()
            written = {}
            for turn in range(5):
                written.update(put(home, [f"{writer} {turn}"], seed=10 * writer + turn))
            return written

        with ThreadPoolExecutor(6) as pool:
            rows = {id: row for some in pool.map(write, range(6)) for id, row in some.items()}
        assert len(rows) == live(home).delta == 30
        assert_same(held(home, live(home).snapshot), {**home.vectors[1][Entity.ITEM], **rows})


class TestErase:
    """The end of ids, everywhere."""

    def test_every_snapshot_loses_the_id(self, home: Home) -> None:
        put(home, ["new"])
        kept = home.backcast.registry.snapshots.undeleted()
        assert len(kept) == 3
        report = remove(home, ["item 1", "new", "nobody"])
        assert report.live == live(home)
        assert report.unknown == ("nobody",)
        heads = {r.id: r.head for r in home.backcast.registry.snapshots.undeleted()}
        assert list(heads.values()) == [1, 2, 1]
        for record in kept[:2]:
            assert not {"item 1", "new", "nobody"} & set(held(home, record.id))
        home.promote(2)
        gone = {id: v for id, v in home.vectors[2][Entity.ITEM].items() if id != "item 1"}
        assert_same(held(home, live(home).snapshot), gone)
        assert live(home).delta == 1

    def test_the_other_kind_keeps_its_id(self, home: Home) -> None:
        shared = "in both/kinds"
        remove(home, [shared], Entity.USER)
        assert shared in held(home, live(home).snapshot)
        assert shared not in held(home, live(home).snapshot, Entity.USER)

    def test_later_snapshots_leave_it_out(self, home: Home) -> None:
        remove(home, ["item 1", "item 2"])
        home.publish(1)
        home.promote(1)
        assert live(home).delta == 0
        assert not {"item 1", "item 2"} & set(held(home, live(home).snapshot))

    def test_id_that_is_put_again_is_back(self, home: Home) -> None:
        remove(home, ["item 1", "item 2"])
        rows = put(home, ["item 1"])
        assert held(home, live(home).snapshot)["item 1"].tolist() == rows["item 1"].tolist()
        home.publish(1)
        home.promote(1)
        found = held(home, live(home).snapshot)
        assert found["item 1"].tolist() == home.vectors[1][Entity.ITEM]["item 1"].tolist()
        assert "item 2" not in found

    def test_erasure_while_a_snapshot_is_written_reaches_it(self, home: Home) -> None:
        home.publish(1)  # renews the vectors to compare with
        rows = home.vectors[1]

        def erasing() -> Iterator[VectorBatch]:
            for batch in batches(rows):
                yield from batch.slices(5)
                remove(home, ["item 1", "item 9", f"unknown to {batch.entity}"])

        backcast = home.backcast
        record = publish(backcast.registry, backcast.artifacts, 1, erasing(), details={})
        assert record.head == 1
        home.promote(1)
        assert live(home).snapshot == record.id
        wanted = {id: v for id, v in rows[Entity.ITEM].items() if id not in {"item 1", "item 9"}}
        assert_same(held(home, record.id), wanted)

    def test_erasure_after_a_revival_is_seen_too(self, home: Home) -> None:
        # The number of an erasure that is over is not given again.
        remove(home, ["item 1"])

        def moving() -> Iterator[VectorBatch]:
            yield from batches(home.vectors[1])
            put(home, ["item 1"])
            remove(home, ["item 2"])

        backcast = home.backcast
        record = publish(backcast.registry, backcast.artifacts, 1, moving(), details={})
        home.promote(1)
        assert live(home).snapshot == record.id
        found = held(home, record.id)
        assert "item 2" not in found
        assert "item 1" in found  # carried

    def test_report_names_what_still_holds_it_until_all_is_gone(self, home: Home) -> None:
        put(home, ["new"])
        report = remove(home, ["item 1", "new"])
        old, now, candidate = (r.id for r in home.backcast.registry.snapshots.undeleted())
        found = {(h.what, h.name): (h.state, h.ids, h.places) for h in report.holders}
        assert found == {
            ("snapshot", old): ("superseded", 1, ("artifacts", "store")),
            ("snapshot", now): ("live", 1, ("artifacts", "store")),
            ("deltas", now): ("live", 1, ("artifacts",)),
            ("snapshot", candidate): ("published", 1, ("artifacts",)),
            ("data set", "tests"): (None, None, ()),
        }
        ends = {h.name: h.until for h in report.holders}
        superseded_at = home.backcast.registry.snapshots.get(old).superseded_at
        assert superseded_at is not None
        assert ends[old] == superseded_at + HOUR
        assert ends[now] is ends[candidate] is None

        home.publish(1)
        home.promote(1)
        home.publish(2)
        home.promote(2)
        sweep(home.backcast, timedelta(0))
        again = remove(home, ["item 1", "new"])
        assert again.unknown == ("item 1", "new")
        assert {h.what for h in again.holders} == {"data set"}

    @pytest.mark.parametrize("ids", [[], ["a", "a"], [""]])
    def test_ids_that_are_none_are_refused(self, local_home: Home, ids: list[str]) -> None:
        with pytest.raises(InvalidInput):
            remove(local_home, ids)
        assert delta_files(local_home) == 0

    def test_before_the_first_promotion(self, tmp_path: Path) -> None:
        with build_home(tmp_path, (4,)) as home:
            assert remove(home, ["item 1"]).live is None
            home.promote(0)
            assert "item 1" not in held(home, live(home).snapshot)


class TestErasedAndPutAgain:
    """Whoever is back has the vector that was put last, in no version the one before the erasure.

    Put on version 1, which 2 took the place of, erased, and put on 2: that ends the erasure.
    """

    @staticmethod
    def come_back(home: Home, *, compacted: bool = False) -> None:
        put(home, ["back", "kept"], seed=1)
        if compacted:
            compact(home.backcast)
            refresh(home.backcast, actor="ann")
        home.promote(2)
        remove(home, ["back"])
        put(home, ["back"], seed=2)

    @pytest.mark.parametrize("compacted", [False, True])
    def test_is_not_in_vectors_that_are_computed_anew(self, home: Home, compacted: bool) -> None:
        self.come_back(home, compacted=compacted)
        record = home.publish(1, seed=5)
        written = {
            id for some in read_ids(home.backcast.artifacts, record, Entity.ITEM) for id in some
        }
        assert "kept" in written
        assert "back" not in written
        rollback(home.backcast, actor="ann", reason="worse")
        assert "back" not in held(home, live(home).snapshot)
        refresh(home.backcast, actor="ann")
        assert live(home).snapshot == record.id
        assert "back" not in held(home, record.id)

    @pytest.mark.parametrize("compacted", [False, True])
    def test_is_not_in_what_is_promoted_again(self, home: Home, compacted: bool) -> None:
        self.come_back(home, compacted=compacted)
        record = home.publish(1, seed=5)
        home.promote(1, force=True, reason="2 is bad")
        assert live(home).snapshot == record.id
        found = held(home, record.id)
        assert "kept" in found
        assert "back" not in found

    def test_is_not_in_vectors_that_were_begun_before(self, home: Home) -> None:
        put(home, ["back", "kept"], seed=1)
        home.promote(2)

        def meanwhile() -> Iterator[VectorBatch]:
            yield from batches(home.vectors[1])
            remove(home, ["back", "item 1", "item 2"])
            put(home, ["back", "item 1"], seed=2)

        backcast = home.backcast
        record = publish(backcast.registry, backcast.artifacts, 1, meanwhile(), details={})
        home.promote(1, force=True, reason="2 is bad")
        assert live(home).snapshot == record.id
        found = held(home, record.id)
        assert {"kept", "item 3"} <= set(found)
        assert not {"back", "item 1", "item 2"} & set(found)

    def test_vectors_are_refused_where_it_is_not_known_any_more(self, home: Home) -> None:
        backcast = home.backcast

        def meanwhile() -> Iterator[VectorBatch]:
            yield from batches(home.vectors[2])
            home.publish(1, seed=5)
            refresh(backcast, actor="ann")
            sweep(backcast, timedelta(0))  # what was live when these were begun
            remove(home, ["item 3"])
            put(home, ["item 3"], seed=2)

        begun = live(home).snapshot
        folders = backcast.artifacts.folders().keys()
        with pytest.raises(Conflict, match=rf"^Snapshot {begun}, live when .* Publish again\.$"):
            publish(backcast.registry, backcast.artifacts, 2, meanwhile(), details={})
        left = {name for name in backcast.artifacts.folders() if name.startswith("snapshots/v2")}
        assert left == {name for name in folders if name.startswith("snapshots/v2")}
        record = home.publish(2, seed=6)  # again: these are from after the erasure
        assert record.id in {s.id for s in backcast.registry.snapshots.undeleted()}

    def test_and_where_nothing_was_live_when_they_were_begun(
        self, tmp_path: Path, backends: dict[str, Any]
    ) -> None:
        with build_home(tmp_path, **backends) as home:

            def meanwhile() -> Iterator[VectorBatch]:
                yield from batches(home.vectors[1])
                home.promote(0)
                remove(home, ["item 3"])
                put(home, ["item 3"], seed=2)

            registry, artifacts = home.backcast.registry, home.backcast.artifacts
            with pytest.raises(Conflict, match=r"^A version went live while .* Publish again\.$"):
                publish(registry, artifacts, 1, meanwhile(), details={})

    def test_is_there_with_the_new_vector_where_it_was_put_on_the_same_version(
        self, home: Home
    ) -> None:
        put(home, ["back"], seed=1)
        again: dict[str, NDArray[np.float32]] = {}

        def meanwhile() -> Iterator[VectorBatch]:
            yield from batches(home.vectors[1])
            remove(home, ["back"])
            again.update(put(home, ["back"], seed=2))

        backcast = home.backcast
        record = publish(backcast.registry, backcast.artifacts, 1, meanwhile(), details={})
        refresh(backcast, actor="ann")
        assert live(home).snapshot == record.id
        assert held(home, record.id)["back"].tolist() == again["back"].tolist()


def test_what_came_while_a_list_was_applied_is_erased_too(
    local_home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    backcast = local_home.backcast
    registry, row = backcast.registry, {"published": np.ones(local_home.dims[1], np.float32)}
    wanted = {digest_of(id) for id in ("item 1", "published", "put late", "nobody")}
    erase_now, came = changing.erase_digests, list[str]()

    def meanwhile(*arguments: Any, **options: Any) -> None:
        if not came:
            found = publish(registry, backcast.artifacts, 1, batches({Entity.ITEM: row}), {})
            came.append(found.id)
        elif len(came) == 1:
            came.extend(put(local_home, ["put late"]))
        erase_now(*arguments, **options)

    monkeypatch.setattr(erasing, "erase_digests", meanwhile)
    assert erase_listed(backcast, Listed(Erased(1, {Entity.ITEM: wanted})), actor="ann") == 3
    kept = registry.snapshots.undeleted()
    assert came == [kept[-1].id, "put late"]
    for snapshot in kept:
        changes = read_changes(backcast.artifacts, registry.deltas.of(snapshot.id))
        assert sorted(changes.erased(Entity.ITEM)) == ["item 1", "published", "put late"]
    assert registry.erasures.all().digests == {Entity.ITEM: wanted}
    assert delta_files(local_home) == len(kept) + 1  # none is left of what was refused


def test_files_stay_where_the_answer_to_the_commit_is_lost(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = reopened(home)
    lose_answers(engine_of(elsewhere), monkeypatch)
    lost = pytest.raises(RegistryError, match="connection lost")
    with elsewhere.registry:
        with lost:
            upsert(
                elsewhere,
                Entity.ITEM,
                ["a"],
                np.ones((1, 6), np.float32),
                actor="ann",
                most_changed=9,
            )
        with lost:
            erase(elsewhere, Entity.ITEM, ["item 1"], actor="ann", grace=HOUR)
    assert live(home).delta == 2
    found = held(home, live(home).snapshot)
    assert "a" in found
    assert "item 1" not in found


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_full_disk_leaves_nothing(
    local_home: Home, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    before, left = live(local_home), [failing]
    write = Artifacts.write

    def fill_up(artifacts: Artifacts, folder: str, files: dict[str, bytes]) -> Any:
        written = write(artifacts, folder, files)
        if not left[0]:
            raise ArtifactUnwritable(folder, "No space left on device")
        left[0] -= 1
        return written

    monkeypatch.setattr(Artifacts, "write", fill_up)
    with pytest.raises(ArtifactUnwritable, match="No space left"):
        remove(local_home, ["item 1"])  # three snapshots, three files
    ones = np.ones((1, 6), np.float32)
    both = [VectorBatch(entity, ["a"], ones) for entity in Entity]
    left[0] = min(failing, 1)
    with pytest.raises(ArtifactUnwritable, match="No space left"):
        upsert_batches(local_home.backcast, both, actor="ann", most_changed=9)
    assert live(local_home) == before
    assert delta_files(local_home) == 0


class TestRefresh:
    """A newer snapshot of the live version, and what was put meanwhile."""

    def test_upserts_that_the_new_vectors_lack_are_taken_up(self, home: Home) -> None:
        rows = put(home, ["item 0", "new"])
        home.publish(1, seed=5)
        wanted = {**home.vectors[1][Entity.ITEM], "new": rows["new"]}
        refresh(home.backcast, actor="ann")
        assert live(home).delta == 0
        assert_same(held(home, live(home).snapshot), wanted)

    def test_upserts_since_it_was_begun_are_carried(self, home: Home) -> None:
        put(home, ["item 0", "old"], seed=1)
        old = home.publish(1, seed=5)
        rows = put(home, ["item 1", "new"], seed=2)
        remove(home, ["old"])
        refresh(home.backcast, actor="ann")
        wanted = {**home.vectors[1][Entity.ITEM], **rows}
        assert live(home).snapshot == old.id
        assert_same(held(home, old.id), wanted)

    def test_what_is_carried_is_read_before_others_must_wait(
        self, home: Home, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home.publish(1, seed=5)
        rows = put(home, ["new"], seed=2)
        deployments, artifacts = home.backcast.registry.deployments, home.backcast.artifacts
        switch, (delta,) = (
            deployments.switch_in_turn,
            home.backcast.registry.deltas.of(live(home).snapshot),
        )

        def without_the_file(make: Callable[[], Switch]) -> Live:
            artifacts.delete(delta.file.rpartition("/")[0])
            return switch(make)

        monkeypatch.setattr(deployments, "switch_in_turn", without_the_file)
        refresh(home.backcast, actor="ann")
        assert_same(held(home, live(home).snapshot), {**home.vectors[1][Entity.ITEM], **rows})

    def test_upserts_on_a_refresh_between_are_carried_once(self, home: Home) -> None:
        put(home, ["first"], seed=1)
        home.publish(1, seed=5)
        put(home, ["second", "item 0"], seed=2)
        last = home.publish(1, seed=6)  # knows first, second and item 0
        newest = home.vectors[1][Entity.ITEM]
        between = home.backcast.registry.snapshots.undeleted()[-2].id
        load_snapshot(home.backcast, between)
        switch_carrying(home.backcast, Switch("refresh", live(home), 1, between, actor="ann"))
        assert live(home).delta == 1
        third = put(home, ["third"], seed=3)
        refresh(home.backcast, actor="ann")
        assert live(home).snapshot == last.id
        found = held(home, last.id)
        assert {"first", "second", "third"} <= set(found)
        assert found["third"].tolist() == third["third"].tolist()
        assert found["item 0"].tolist() == newest["item 0"].tolist()  # newer than what was put

    def test_going_back_and_forth_keeps_what_was_put(self, home: Home) -> None:
        first = live(home).snapshot
        put(home, ["old"], seed=1)
        second = home.publish(1, seed=5)
        newest = dict(home.vectors[1][Entity.ITEM])
        put(home, ["a"], seed=2)
        refresh(home.backcast, actor="ann")
        rows = put(home, ["b", "item 0"], seed=3)
        rollback(home.backcast, actor="ann", reason="worse", to_snapshot=first)
        assert (live(home).snapshot, live(home).delta) == (first, 3)
        found = held(home, first)
        assert {"old", "a", "b"} <= set(found)
        assert {id: found[id].tolist() for id in rows} == {
            id: row.tolist() for id, row in rows.items()
        }
        late = put(home, ["late"], seed=4)
        refresh(home.backcast, actor="ann")
        assert (live(home).snapshot, live(home).delta) == (second.id, 3)
        kept = {id: found[id] for id in ("old", "a")}
        assert_same(held(home, second.id), {**newest, **kept, **rows, **late})

    def test_vectors_begun_while_another_version_was_live_take_over_what_was_put_on_theirs(
        self, home: Home
    ) -> None:
        first = put(home, ["first", "gone"], seed=1)
        home.promote(2)
        remove(home, ["gone"])
        put(home, ["of another"], seed=2)
        second = home.publish(1, seed=5)
        assert (
            second.base_snapshot == home.backcast.registry.deployments.history()[0]["from_snapshot"]
        )
        rollback(home.backcast, actor="ann", reason="worse")
        late = put(home, ["late"], seed=3)
        newest = dict(home.vectors[1][Entity.ITEM])
        refresh(home.backcast, actor="ann")
        assert live(home).snapshot == second.id
        assert_same(held(home, second.id), {**newest, "first": first["first"], **late})

    def test_what_is_deleted_while_vectors_are_computed_is_said(self, home: Home) -> None:
        put(home, ["first"])
        home.publish(1, seed=4)
        refresh(home.backcast, actor="ann")
        old = live(home).snapshot
        home.promote(2)
        backcast = home.backcast

        def computed() -> Iterator[VectorBatch]:
            yield from batches({Entity.ITEM: {"a": np.ones(home.dims[1], np.float32)}})
            sweep(backcast, timedelta(0))

        with pytest.raises(Conflict, match=rf"Snapshot {old}, whose changes .* Publish again"):
            publish(backcast.registry, backcast.artifacts, 1, computed(), {})
        again = home.publish(1, seed=6)
        assert again.base_snapshot is None

    def test_what_was_put_goes_with_the_snapshot_that_it_was_put_on(self, home: Home) -> None:
        put(home, ["first"])
        home.promote(2)
        sweep(home.backcast, timedelta(0))
        again = home.publish(1, seed=5)
        assert again.base_snapshot is None
        published = read_ids(home.backcast.artifacts, again, Entity.ITEM)
        assert all("first" not in ids for ids in published)

    def test_base_of_another_version_carries_nothing(self, tmp_path: Path) -> None:
        # An older release wrote what was live, whatever its version; the dimensions are the same.
        with build_home(tmp_path, (6, 6), live=0) as home:
            base, begun = live(home), home.backcast.registry.snapshots.latest(1)
            assert begun is not None
            with home.backcast.registry._engine.begin() as connection:
                values = {"base_snapshot": base.snapshot, "base_delta": base.delta}
                connection.execute(
                    update(tables.snapshots).where(tables.snapshots.c.id == begun.id).values(values)
                )
            put(home, ["item 0", "new"])
            home.promote(1)
            assert live(home).snapshot == begun.id
            assert_same(held(home, begun.id), home.vectors[1][Entity.ITEM])

    def test_another_version_takes_nothing_over(self, home: Home) -> None:
        put(home, ["new"])
        home.promote(2)
        assert live(home).delta == 0
        assert "new" not in held(home, live(home).snapshot)

    @pytest.mark.parametrize("precision", ["float32", "float16"])
    def test_compaction_writes_what_is_live(self, tmp_path: Path, precision: str) -> None:
        with build_home(tmp_path, live=1, store_precision=precision) as home:
            rows = put(home, ["item 0", "new"])
            remove(home, ["item 1"])
            before, old = held(home, live(home).snapshot), live(home)
            assert {id: row.tolist() for id, row in rows.items()} == {
                id: before[id].tolist() for id in rows
            }
            record = compact(home.backcast)
            assert (record.base_snapshot, record.base_delta) == (old.snapshot, 2)
            assert home.backcast.registry.snapshots.details(record.id)["compacted"] == (
                f"{old.snapshot}.2"
            )
            late = put(home, ["late"], seed=4)
            refresh(home.backcast, actor="ann", expected_live=1, reason="compaction")
            assert (live(home).snapshot, live(home).delta) == (record.id, 1)
            stored = {
                id: as_stored(row, Precision(precision)) if id in rows else row
                for id, row in before.items()
            }
            assert_same(held(home, record.id), {**stored, **late})
            newest = home.backcast.registry.deployments.history()[0]
            assert (newest["kind"], newest["reason"]) == ("refresh", "compaction")

    def test_nothing_to_do_is_said(self, local_home: Home, tmp_path: Path) -> None:
        with pytest.raises(Conflict, match="Nothing was changed on snapshot v1-"):
            compact(local_home.backcast)
        with pytest.raises(PromotionConflict, match="live already, with its newest snapshot"):
            refresh(local_home.backcast, actor="ann")
        for act in (compact, partial(refresh, actor="ann")):
            with pytest.raises(PromotionConflict, match="Version 2 was expected"):
                act(local_home.backcast, expected_live=2)
        with build_home(tmp_path / "empty", (4,)) as home:
            for act in (compact, partial(refresh, actor="ann")):
                with pytest.raises(Conflict, match="Nothing is live"):
                    act(home.backcast)

    def test_upserts_during_the_switch_are_never_lost(self, home: Home) -> None:
        stop = threading.Event()

        def write(writer: int) -> dict[str, NDArray[np.float32]]:
            written: dict[str, NDArray[np.float32]] = {}
            while not stop.is_set() and len(written) < 300:
                written.update(put(home, [f"{writer} {len(written)}"], seed=len(written)))
            return written

        with ThreadPoolExecutor(3) as pool:
            writers = [pool.submit(write, n) for n in range(3)]
            try:
                for seed in range(3):
                    home.publish(1, seed=seed)
                    refresh(home.backcast, actor="ann")
                    compact(home.backcast)
                    refresh(home.backcast, actor="ann")
            finally:
                stop.set()
            rows = {id: row for writer in writers for id, row in writer.result().items()}
        assert len(home.backcast.registry.deployments.history()) == 8
        wanted = {**home.vectors[1][Entity.ITEM], **rows}
        assert_same(held(home, live(home).snapshot), wanted)
