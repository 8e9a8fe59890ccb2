"""Processes killed, and many at once, while ids are put and erased."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backcast.changes import ChangedSnapshot, read_changes
from backcast.errors import ArtifactError
from backcast.lifecycle import changing as changing_module
from backcast.lifecycle import compact, erase, open_backcast, refresh, upsert
from backcast.lifecycle import registering as registering_module
from backcast.lifecycle.folding import Folding
from backcast.settings import Settings
from backcast.versions import Entity, Live
from tests.integration.test_kill import check_killed, die, die_after, rows
from tests.service_support import client_of, engine_of
from tests.support import Home, build_home, exit_codes

HOUR = timedelta(hours=1)
ONES = np.ones((2, 6), np.float32)
PUT, GONE = ["item 0", "new"], ["item 1", "item 2"]


@pytest.fixture
def home(tmp_path: Path, backends: dict[str, Any]) -> Iterator[Home]:
    """Version 1 is live, 0 kept, 2 published; "item 3" is erased."""
    with build_home(tmp_path, live=1, **backends) as home:
        erase(home.backcast, Entity.ITEM, ["item 3"], actor="ann", grace=HOUR)
        yield home


def live(home: Home) -> Live:
    found = home.backcast.registry.deployments.live()
    assert found is not None
    return found


def found(home: Home, ids: list[str], snapshot: str | None = None) -> list[bool]:
    name = snapshot or live(home).snapshot
    backcast = home.backcast
    changes = read_changes(backcast.artifacts, backcast.registry.deltas.of(name))
    held = ChangedSnapshot(backcast.store.open(name), changes).gather(Entity.ITEM, ids)
    answer: list[bool] = held.found.tolist()
    return answer


def put(settings: Settings, sql: str = "", ids: tuple[str, ...] = ("item 3", "new")) -> None:
    with open_backcast(settings) as backcast:
        if sql == "before the row":
            changing_module._append = die  # type: ignore[assignment]
        elif sql:
            die_after(backcast, sql)
        upsert(backcast, Entity.ITEM, ids, ONES, actor="ann", most_changed=9)


@pytest.mark.parametrize(
    "sql",
    [
        "before the row",
        "DELETE FROM erasures",
        "UPDATE snapshots",
        "INSERT INTO deltas",
        "UPDATE live",
    ],
)
def test_upsert(home: Home, sql: str) -> None:
    before = rows(home)
    check_killed(put, home, sql)
    assert rows(home) == before
    assert found(home, ["item 3", "new"]) == [False, False]
    put(home.settings)
    assert found(home, ["item 3", "new"]) == [True, True]
    assert live(home).delta == 2


def end(settings: Settings, sql: str = "") -> None:
    with open_backcast(settings) as backcast:
        if sql == "before the row":
            backcast.registry.erasures.append = die  # type: ignore[method-assign,assignment]
        elif sql:
            die_after(backcast, sql)
        erase(backcast, Entity.ITEM, [*GONE, "item 3"], actor="ann", grace=HOUR)


@pytest.mark.parametrize(
    "sql",
    [
        "before the row",
        "UPDATE snapshots",
        "INSERT INTO deltas",
        "UPDATE live",
        "DELETE FROM erasures",
        "INSERT INTO erasures",
    ],
)
def test_erasure(home: Home, sql: str) -> None:
    before = rows(home)
    check_killed(end, home, sql)
    assert rows(home) == before
    assert found(home, GONE) == [True, True]
    end(home.settings)
    for snapshot in home.held():
        assert found(home, GONE, snapshot) == [False, False]
    home.promote(2)
    assert found(home, GONE) == [False, False]


def shrink(settings: Settings, point: str = "") -> None:
    with open_backcast(settings) as backcast:
        if point == "list":
            Folding.write = die  # type: ignore[method-assign,assignment]
        elif point == "row":
            registering_module._register = die  # type: ignore[assignment]
        elif point:
            die_after(backcast, point)
        compact(backcast)
        refresh(backcast, actor="ann")


@pytest.mark.parametrize("point", ["list", "row", "INSERT INTO snapshots", "UPDATE live"])
def test_compaction(home: Home, point: str) -> None:
    put(home.settings, ids=("new", "newer"))
    before = rows(home)
    check_killed(shrink, home, point)
    if point != "UPDATE live":  # then the new snapshot is there, and not live
        assert rows(home) == before
    assert rows(home)["live"] == before["live"]
    shrink(home.settings)
    assert live(home).delta == 0
    assert found(home, ["new", "newer", "item 0", "item 3"]) == [True, True, True, False]


def carry(settings: Settings, sql: str = "") -> None:
    with open_backcast(settings) as backcast:
        if sql:
            die_after(backcast, sql)
        refresh(backcast, actor="ann")


@pytest.mark.parametrize("sql", ["INSERT INTO deltas", "UPDATE live", "INSERT INTO deployments"])
def test_carrying(home: Home, sql: str) -> None:
    home.publish(1)
    put(home.settings)
    before = rows(home)
    check_killed(carry, home, sql)
    assert rows(home) == before
    carry(home.settings)
    assert found(home, ["item 3", "new"]) == [True, True]


def put_many(settings: Settings, writer: int) -> None:
    with open_backcast(settings) as backcast:
        for turn in range(5):
            ids = [f"{writer} {turn}", "everybody's"]
            upsert(backcast, Entity.ITEM, ids, ONES * (writer + 1), actor="ann", most_changed=100)


def test_processes_at_once_lose_nothing(home: Home) -> None:
    assert exit_codes(put_many, *((home.settings, n) for n in range(4))) == [0] * 4
    assert live(home).delta == 21
    engine = engine_of(home)
    for writer in range(4):
        ids = [f"{writer} {turn}" for turn in range(5)]
        served = engine.current().vectors(Entity.ITEM, ids, 1)
        assert served.found.all()
        assert (served.vectors == writer + 1).all()
    assert engine.current().vectors(Entity.ITEM, ["everybody's"], 1).found.all()


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def remove(path: Path) -> None:
    path.unlink()


def swap(path: Path) -> None:
    others = [p for p in path.parents[1].glob("upsert-*/*") if p != path]
    path.write_bytes(others[0].read_bytes())


@pytest.mark.parametrize("harm", [cut_off, remove, swap])
def test_damaged_delta_is_refused_and_what_was_served_goes_on(
    tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    with build_home(tmp_path, live=1) as home:
        engine = engine_of(home)
        put(home.settings, ids=("a", "b"))
        engine.refresh()
        put(home.settings, ids=("c", "d"))
        [_, newest] = home.backcast.registry.deltas.of(live(home).snapshot)
        path = Path(home.settings.artifacts_root, newest.file)
        content = path.read_bytes()
        harm(path)
        with pytest.raises(ArtifactError, match=r"delta\.parquet"):
            engine.refresh()
        served = engine.current()
        assert served.live.delta == 1
        assert served.vectors(Entity.ITEM, ["a", "c"], 0).found.tolist() == [True, False]
        with client_of(home) as client:  # a replica that starts now says so, and serves nothing
            assert client.get("/readyz").status_code == 503
        path.write_bytes(content)
        engine.refresh()
        assert engine.current().vectors(Entity.ITEM, ["a", "c"], 0).found.all()
