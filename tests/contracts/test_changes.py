"""Deltas and erasures in the registry: numbered, whole, by compare-and-swap, on each database."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import func, insert, select, update

from backcast.errors import UnknownSnapshot
from backcast.registry import (
    Erased,
    Naming,
    Registry,
    StateMoved,
    Switch,
    digest_of,
    open_registry,
    tables,
)
from backcast.registry.database import utc_now
from backcast.settings import Settings
from backcast.versions import DeltaDraft, DeltaKind, DiffDraft, Entity, Live, SnapshotRecord
from tests.contracts.test_registry import add, add_snapshot, change, promote

A, B, C = (digest_of(id) for id in "abc")


@pytest.fixture(params=["sqlite", "postgresql"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Registry]:
    """Version 0 is live from s0, 1 is published as s1."""
    url = "" if request.param == "sqlite" else request.getfixturevalue("empty_registry")
    with open_registry(Settings.load(home=tmp_path, database_url=url)) as registry:
        add(registry, 0)
        add(registry, 1, 0)
        add_snapshot(registry, "s0", 0)
        add_snapshot(registry, "s1", 1)
        promote(registry, 0)
        yield registry


def draft(name: str, kind: DeltaKind = DeltaKind.UPSERT, count: int = 2) -> DeltaDraft:
    return DeltaDraft(kind, Entity.ITEM, count, f"deltas/{name}/delta.parquet", "d" * 64, "ann")


def live(registry: Registry) -> Live:
    found = registry.deployments.live()
    assert found is not None
    return found


def heads(registry: Registry) -> dict[str, int]:
    return {record.id: record.head for record in registry.snapshots.undeleted()}


def erase(
    registry: Registry, *digests: str, snapshots: tuple[str, ...] = ("s0", "s1"), **options: Any
) -> Any:
    ends = {name: draft(f"end-{name}", DeltaKind.ERASE) for name in snapshots}
    return registry.erasures.append(ends, Entity.ITEM, digests, "ann", **options)


def figures(item: str) -> dict[str, Any]:
    kinds = {
        "item": {"most_changed": [{"id": item, "length": 1.5}, {"id": "c", "length": 1}]},
        "user": {"most_changed": [{"id": "a", "length": 2.5}]},
    }
    return {"gain": 1.0, "entities": kinds, "ids": {"item": {"lost_ids": [item, "d"]}}}


class TestDeltas:
    def test_deltas_are_numbered_on_and_come_back(self, registry: Registry) -> None:
        before, seen = utc_now(), live(registry)
        first = registry.deltas.append(seen, [draft("a"), draft("b", count=3)], {})
        assert first == replace(seen, delta=2) == live(registry)
        second = registry.deltas.append(first, [draft("c")], {})
        found = registry.deltas.of("s0")
        assert [(d.number, d.file, d.count) for d in found] == [
            (1, "deltas/a/delta.parquet", 2),
            (2, "deltas/b/delta.parquet", 3),
            (3, "deltas/c/delta.parquet", 2),
        ]
        assert {(d.snapshot, d.kind, d.entity, d.actor, d.sha256) for d in found} == {
            ("s0", DeltaKind.UPSERT, Entity.ITEM, "ann", "d" * 64)
        }
        assert all(before <= d.created_at <= utc_now() for d in found)
        assert [d.number for d in registry.deltas.of("s0", after=1, upto=2)] == [2]
        assert registry.deltas.of("s1") == []
        assert (registry.deltas.changed("s0"), registry.deltas.changed("s1")) == (7, 0)
        assert second.delta == heads(registry)["s0"] == 3

    def test_another_delta_or_switch_in_between_moves_the_state(self, registry: Registry) -> None:
        seen = live(registry)
        registry.deltas.append(seen, [draft("a")], {})
        with pytest.raises(StateMoved):
            registry.deltas.append(seen, [draft("b")], {})
        now = live(registry)
        promote(registry, 1)
        with pytest.raises(StateMoved):
            registry.deltas.append(now, [draft("c")], {})
        assert [d.file for d in registry.deltas.of("s0")] == ["deltas/a/delta.parquet"]
        assert heads(registry) == {"s0": 1, "s1": 0}

    def test_snapshot_that_does_not_exist_has_no_deltas(self, registry: Registry) -> None:
        with pytest.raises(UnknownSnapshot):
            registry.deltas.append(replace(live(registry), snapshot="s9"), [draft("a")], {})

    def test_one_of_many_at_once_wins(self, registry: Registry) -> None:
        seen, barrier = live(registry), Barrier(4)

        def attempt(name: str) -> bool:
            barrier.wait()
            try:
                registry.deltas.append(seen, [draft(name)], {})
            except StateMoved:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            assert sorted(pool.map(attempt, "abcd")) == [False, False, False, True]
        assert live(registry).delta == len(registry.deltas.of("s0")) == 1

    def test_switch_takes_deltas_along_and_names_them(self, registry: Registry) -> None:
        seen = registry.deltas.append(live(registry), [draft("a")], {})
        after = registry.deployments.switch(
            replace(change(seen, 1), carried=[draft("b"), draft("c")])
        )
        assert (after.snapshot, after.delta) == ("s1", 2)
        newest = registry.deployments.history()[0]
        assert (newest["from_delta"], newest["delta"]) == (1, 2)
        with pytest.raises(StateMoved):  # its head is not 0 any more
            registry.deployments.switch(change(after, 1))


class TestErasures:
    def test_erasure_reaches_every_snapshot(self, registry: Registry) -> None:
        now, used = erase(registry, A, B)
        assert now == live(registry)
        assert (now.delta, used) == (1, {"s0", "s1"})
        assert heads(registry) == {"s0": 1, "s1": 1}
        [delta] = registry.deltas.of("s1")
        assert (delta.kind, delta.file) == (DeltaKind.ERASE, "deltas/end-s1/delta.parquet")
        erased = registry.erasures.all()
        assert erased.digests == {Entity.ITEM: {A, B}}
        assert erased.covers(Entity.ITEM, "a")
        assert not erased.covers(Entity.ITEM, "c")
        assert not erased.covers(Entity.USER, "a")

    def test_snapshot_without_a_draft_moves_the_state(self, registry: Registry) -> None:
        with pytest.raises(StateMoved):
            erase(registry, A, snapshots=("s0",))
        assert heads(registry) == {"s0": 0, "s1": 0}
        assert registry.erasures.all() == Erased()

    def test_deleted_snapshot_is_passed_over(self, registry: Registry) -> None:
        promote(registry, 1)
        registry.snapshots.condemn(utc_now())
        assert erase(registry, A)[1] == {"s0", "s1"}  # condemned, its files may still be there
        registry.snapshots.mark_deleted("s0")
        assert erase(registry, B)[1] == {"s1"}
        assert [r.id for r in registry.snapshots.undeleted()] == ["s1"]

    def test_upsert_ends_an_erasure(self, registry: Registry) -> None:
        erase(registry, A, B)
        registry.deltas.append(live(registry), [draft("a")], {Entity.USER: [A]})
        assert registry.erasures.all().digests == {Entity.ITEM: {A, B}}
        registry.deltas.append(live(registry), [draft("b")], {Entity.ITEM: [A, C]})
        assert registry.erasures.all().digests == {Entity.ITEM: {B}}

    def test_numbers_only_grow(self, registry: Registry) -> None:
        erase(registry, A)
        first = registry.erasures.all()
        registry.deltas.append(live(registry), [draft("a")], {Entity.ITEM: [A]})
        erase(registry, B)
        second = registry.erasures.all(after=first.number)
        assert second.number > first.number
        assert second.digests == {Entity.ITEM: {B}}
        erase(registry, B)  # again: it is listed once, as the latest
        assert registry.erasures.all(after=second.number).digests == {Entity.ITEM: {B}}

    def test_more_digests_than_one_statement_holds(self, registry: Registry) -> None:
        many = [digest_of(f"{n}") for n in range(1_200)]
        erase(registry, *many)
        assert registry.erasures.all().digests == {Entity.ITEM: set(many)}
        registry.deltas.append(live(registry), [draft("a")], {Entity.ITEM: many[:-1]})
        assert registry.erasures.all().digests == {Entity.ITEM: {many[-1]}}

    def test_later_erasure_keeps_a_snapshot_from_being_registered(self, registry: Registry) -> None:
        seen, begun = registry.erasures.all(), live(registry)
        erase(registry, A)
        record = SnapshotRecord("s2", 1, 4, {"item": 3}, "snapshots/s2", "c" * 64, 0, utc_now())
        with pytest.raises(StateMoved):
            registry.snapshots.register(record, {}, erased=seen, live=begun)
        with pytest.raises(UnknownSnapshot):
            registry.snapshots.get("s2")
        end = draft("end-s2", DeltaKind.ERASE)
        now = registry.erasures.all()
        about = {"dataset": "shop"}
        registry.snapshots.register(record, about, erased=now, live=live(registry), drafts=[end])
        assert registry.snapshots.get("s2").head == 1
        assert registry.snapshots.details("s2") == {"dataset": "shop"}
        assert [d.file for d in registry.deltas.of("s2")] == [end.file]
        assert registry.snapshots.datasets() == ["shop", "tests"]

    def test_erased_ids_are_named_in_no_diff(self, registry: Registry) -> None:
        about = {"version": 1, "snapshot": "s1", "baseline_snapshot": "s0", "created_at": utc_now()}
        rows = [{**about, "target": n, "figures": figures(id)} for n, id in enumerate("ab")]
        with registry._engine.begin() as connection:
            connection.execute(insert(tables.diffs), rows)
        erase(registry, A)
        with registry._engine.begin() as connection:
            found = connection.scalars(select(tables.diffs.c.figures).order_by("target")).all()
        assert found == [figures("(erased)"), figures("b")]

    def test_what_was_looked_through_is_not_read_while_others_wait(
        self, registry: Registry
    ) -> None:
        about = {"version": 1, "snapshot": "s1", "baseline_snapshot": "s0", "created_at": utc_now()}
        ids = ["b"] * 1_200 + ["a", "b", "a"]
        rows = [{**about, "target": 0, "figures": figures(id)} for id in ids]
        with registry._engine.begin() as connection:
            connection.execute(insert(tables.diffs), rows)
            first = connection.scalar(select(func.min(tables.diffs.c.id)))
        assert first is not None
        naming = registry.erasures.naming(Entity.ITEM, [A])
        assert naming == Naming({first + 1_200, first + 1_202}, first + 1_202)
        with registry._engine.begin() as connection:
            connection.execute(insert(tables.diffs), rows[-2:])
            strange = update(tables.diffs).where(tables.diffs.c.id == first)
            connection.execute(strange.values(figures=figures("a")))
        erase(registry, A, naming=naming)
        with registry._engine.begin() as connection:
            found = connection.scalars(select(tables.diffs.c.figures).order_by("id")).all()
        gone = figures("(erased)")
        assert found[0] == figures("a")
        assert found[1:1_200] == [figures("b")] * 1_199
        assert found[1_200:] == [gone, figures("b"), gone, figures("b"), gone]

    def test_nor_in_one_that_was_measured_before(self, registry: Registry) -> None:
        seen = live(registry)
        erase(registry, A)
        switch = Switch("refresh", seen, 1, "s1", "ann", diffs=[DiffDraft(0, figures("a"))])
        registry.deployments.switch(replace(switch, seen=live(registry), head=1, compared=seen))
        newest = registry.deployments.history()[0]
        (row,) = registry.diffs.of(newest["id"])
        assert row["figures"] == figures("(erased)")

    def test_erasures_beside_registrations_reach_all_of_them(self, registry: Registry) -> None:
        barrier = Barrier(4)

        def publish(n: int) -> None:
            record = SnapshotRecord(
                f"n{n}", 1, 4, {"item": 3}, f"snapshots/n{n}", "c" * 64, 0, utc_now()
            )
            seen, begun = registry.erasures.all(), live(registry)
            barrier.wait()
            try:
                registry.snapshots.register(record, {}, erased=seen, live=begun)
            except StateMoved:
                later = draft(f"late-{n}", DeltaKind.ERASE)
                registry.snapshots.register(record, {}, drafts=[later])

        def end() -> None:
            barrier.wait()
            while True:
                names = tuple(heads(registry))
                try:
                    erase(registry, A, snapshots=names)
                except StateMoved:
                    continue
                return

        with ThreadPoolExecutor(4) as pool:
            acts = [pool.submit(publish, n) for n in range(3)] + [pool.submit(end)]
            for act in acts:
                act.result()
        assert heads(registry) == dict.fromkeys(["s0", "s1", "n0", "n1", "n2"], 1)


def test_digest_is_that_of_the_utf8() -> None:
    assert digest_of("a") == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
