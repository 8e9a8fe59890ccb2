"""Processes killed at every point of a version's life: the old state stays, a retry ends it."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import event, select

from backcast.artifacts import Artifacts
from backcast.lifecycle import Backcast, open_backcast, promote, publish, register_version, sweep
from backcast.registry import VersionDraft
from backcast.registry.snapshots import Snapshots
from backcast.registry.tables import metadata
from backcast.registry.versions import Versions
from backcast.settings import Settings
from backcast.vectors import VectorBatch
from backcast.versions import Entity
from tests.support import Home, build_home, draft, dump_map, exit_codes, normal_map, transform

NOW = timedelta(0)


@pytest.fixture
def home(tmp_path: Path, backends: dict[str, Any]) -> Iterator[Home]:
    """Version 0 is live, 1 is published, 2 is registered."""
    with build_home(tmp_path, published=False, **backends) as home:
        home.publish(0)
        home.publish(1)
        home.promote(0)
        yield home


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(backcast: Backcast, sql: str) -> None:
    """Be killed after the first statement that starts so, in its transaction."""

    def watch(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith(sql):
            die()

    event.listen(backcast.registry._engine, "after_cursor_execute", watch)


def check_killed(act: Callable[..., None], home: Home, *arguments: Any) -> None:
    assert exit_codes(act, (home.settings, *arguments)) == [-signal.SIGKILL]


def rows(home: Home) -> dict[str, list[Any]]:
    with home.backcast.registry._engine.connect() as connection:
        return {
            name: [tuple(row) for row in connection.execute(select(table))]
            for name, table in metadata.tables.items()
        }


def artifact_folders(home: Home, kind: str) -> list[str]:
    return sorted(path.name for path in Path(home.settings.artifacts_root, kind).iterdir())


def third_version() -> tuple[VersionDraft, dict[str, bytes]]:
    fitted = normal_map(np.random.default_rng(0), 8, 5, bias=False)
    made = draft(3, 2, 5, [transform(3, 2, False, fitted)])
    return made, {"transform.safetensors": dump_map(fitted)}


def register_and_die(settings: Settings, sql: str) -> None:
    with open_backcast(settings) as backcast:
        if sql:
            die_after(backcast, sql)
        else:
            Versions.register = die  # type: ignore[assignment,method-assign]
        register_version(backcast.registry, backcast.artifacts, *third_version())


@pytest.mark.parametrize(
    "sql",
    ["", "INSERT INTO versions", "INSERT INTO transforms"],
    ids=["before-the-row", "before-its-maps", "before-the-commit"],
)
def test_registration(home: Home, sql: str) -> None:
    before = rows(home)
    check_killed(register_and_die, home, sql)
    assert rows(home) == before
    assert len(artifact_folders(home, "versions")) == 4  # the fourth is litter
    assert home.register(5, parent=2).number == 3
    home.publish(3)
    home.promote(3)
    home.check_served(3)


def publish_and_die(settings: Settings, point: str) -> None:
    def batches() -> Iterator[VectorBatch]:
        yield VectorBatch(Entity.ITEM, ["a", "b"], np.ones((2, 8), np.float32))
        if point == "files":
            die()

    with open_backcast(settings) as backcast:
        if point == "row":
            Snapshots.register = die  # type: ignore[method-assign]
        else:
            die_after(backcast, "INSERT INTO snapshots")
        publish(backcast.registry, backcast.artifacts, 2, batches(), {})


@pytest.mark.parametrize("point", ["files", "row", "commit"])
def test_publication(home: Home, point: str) -> None:
    before = rows(home)
    check_killed(publish_and_die, home, point)
    assert rows(home) == before
    assert len(artifact_folders(home, "snapshots")) == 3  # the third is litter
    home.publish(2)
    home.promote(2)
    home.check_served(2)


def die_in_load(settings: Settings) -> None:
    def cut_short(batches: Iterable[VectorBatch]) -> Iterator[VectorBatch]:
        for batch in batches:
            yield from batch.slices(3)
            die()

    with open_backcast(settings) as backcast:
        load = backcast.store.load
        type(backcast.store).load = lambda _, snapshot, dim, counts, batches, precision: load(  # type: ignore[assignment,method-assign,misc]
            snapshot, dim, counts, cut_short(batches), precision
        )
        promote(backcast, 1, actor="tests")


def die_before_switch(settings: Settings) -> None:
    def report(step: str, _fraction: float) -> None:
        if step == "switch":
            die()

    with open_backcast(settings) as backcast:
        promote(backcast, 1, actor="tests", report=report)


def die_in_switch(settings: Settings, sql: str) -> None:
    with open_backcast(settings) as backcast:
        die_after(backcast, sql)
        promote(backcast, 1, actor="tests")


@pytest.mark.parametrize(
    ("act", "arguments"),
    [
        (die_in_load, ()),
        (die_before_switch, ()),
        (die_in_switch, ("UPDATE live",)),
        (die_in_switch, ("UPDATE snapshots",)),
        (die_in_switch, ("INSERT INTO deployments",)),
    ],
    ids=["in-load", "before-switch", "after-swap", "after-supersede", "before-commit"],
)
def test_promotion(home: Home, act: Callable[..., None], arguments: tuple[str, ...]) -> None:
    before = rows(home)
    check_killed(act, home, *arguments)
    assert rows(home) == before
    home.check_served(0)
    home.promote(1)
    home.check_served(1)
    sweep(home.backcast, NOW)
    snapshot = home.backcast.registry.snapshots.latest(1)
    assert snapshot is not None
    assert home.held() == [snapshot.id]


def first_promotion_and_die(settings: Settings) -> None:
    with open_backcast(settings) as backcast:
        die_after(backcast, "INSERT INTO live")
        promote(backcast, 0, actor="tests")


def test_first_promotion(tmp_path: Path, backends: dict[str, Any]) -> None:
    with build_home(tmp_path, (4,), **backends) as home:
        check_killed(first_promotion_and_die, home)
        assert home.backcast.registry.deployments.live() is None
        home.promote(0)
        home.check_served(0)


def sweep_and_die(settings: Settings, point: str) -> None:
    delete = Artifacts.delete

    def delete_and_die(artifacts: Artifacts, folder: str) -> None:
        delete(artifacts, folder)
        die()

    with open_backcast(settings) as backcast:
        if point == "store":
            type(backcast.store).drop = die  # type: ignore[method-assign]
        else:
            Artifacts.delete = die if point == "artifacts" else delete_and_die  # type: ignore[assignment,method-assign]
        sweep(backcast, NOW)


@pytest.mark.parametrize("point", ["store", "artifacts", "row"])
def test_sweep(home: Home, point: str) -> None:
    live = home.backcast.registry.deployments.live()
    assert live is not None
    kept = home.promote(1)
    check_killed(sweep_and_die, home, point)
    doomed = home.backcast.registry.snapshots.get(live.snapshot)
    assert doomed.condemned_at is not None
    assert doomed.deleted_at is None
    home.check_served(1)
    assert sweep(home.backcast, NOW) == [live.snapshot]
    assert home.held() == [kept]
    assert artifact_folders(home, "snapshots") == [kept]
    home.check_served(1)
