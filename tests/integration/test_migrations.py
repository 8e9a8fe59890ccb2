"""The schema is made, unmade, checked and made by many at once, on real databases."""

import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, event, inspect, text
from starlette.testclient import TestClient

import migrations
from backcast.errors import SchemaMismatch
from backcast.lifecycle import erase, upsert
from backcast.registry import Registry, open_registry
from backcast.registry.revisions import Revision
from backcast.registry.schema import (
    demand_current,
    downgrade,
    found_revision,
    make_engine,
    upgrade,
)
from backcast.registry.tables import SCHEMA_REVISION, metadata
from backcast.settings import Settings
from backcast.versions import Entity, Scope
from tests.service_support import assert_served, client_of, read_rows
from tests.support import Home, build_home, check_books, draft, exit_codes


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'registry.db'}"
    postgres: str = request.getfixturevalue("new_postgres")
    return postgres


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    engine = make_engine(url)
    yield engine
    engine.dispose()


def tables(engine: Engine) -> set[str]:
    return set(inspect(engine).get_table_names()) - {"alembic_version"}


def constraints(engine: Engine) -> set[str]:
    found = inspect(engine)
    return {
        f"{name}: {item['name']}"
        for name in metadata.tables
        for item in (
            *found.get_check_constraints(name),
            *found.get_unique_constraints(name),
            *found.get_foreign_keys(name),
            found.get_pk_constraint(name),
        )
    }


def at_revision(engine: Engine, revision: str) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = :r"), {"r": revision})


def test_schema_goes_up_down_and_up(engine: Engine) -> None:
    for _ in range(2):
        upgrade(engine)
        assert tables(engine) == set(metadata.tables)
        registry = Registry(engine)
        registry.versions.register(draft(0, None, 4))
        downgrade(engine, "base")
        assert tables(engine) == set()
        assert found_revision(engine) is None


def test_upgrading_again_changes_nothing(engine: Engine) -> None:
    upgrade(engine)
    Registry(engine).versions.register(draft(0, None, 4))
    upgrade(engine)
    assert [v.number for v in Registry(engine).versions.all()] == [0]


def test_migrations_make_exactly_the_tables_of_the_code(engine: Engine) -> None:
    upgrade(engine)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_migrations_make_exactly_the_constraints_of_the_code(engine: Engine) -> None:
    upgrade(engine)
    made = constraints(engine)
    downgrade(engine, "base")
    metadata.create_all(engine)
    assert made == constraints(engine)
    assert "live: ck_live_single_row" in made


def test_code_is_at_the_only_head() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_heads() == [SCHEMA_REVISION]


def test_database_without_a_schema_is_refused(url: str) -> None:
    with pytest.raises(SchemaMismatch, match=r"is absent, .* Run `backcast db upgrade`"):
        open_registry(Settings(database_url=url))


@pytest.mark.parametrize(
    ("revision", "mend"),
    [
        ("0000", "Run `backcast db upgrade`"),
        ("9999", "Install the release that made it"),
        ("9999_for_9998", "Install the release that made it"),
        ("another rule", "Install the release that made it"),
    ],
)
def test_schema_of_another_release_is_refused(
    engine: Engine, url: str, revision: str, mend: str
) -> None:
    upgrade(engine)
    at_revision(engine, revision)
    with pytest.raises(SchemaMismatch, match=mend) as caught:
        open_registry(Settings(database_url=url))
    assert caught.value.data == {"found": revision, "expected": SCHEMA_REVISION}


def test_schema_that_a_newer_release_expanded_is_run_on_and_left_as_it_is(
    engine: Engine, url: str
) -> None:
    upgrade(engine)
    own = Revision.parse(SCHEMA_REVISION).number
    expanded = f"{own + 1:04d}_for_{own:04d}"
    at_revision(engine, expanded)
    with open_registry(Settings(database_url=url)) as registry:
        assert registry.versions.all() == []
    upgrade(engine)
    assert found_revision(engine) == expanded
    with pytest.raises(SchemaMismatch, match="Install the release that made it"):
        demand_current(engine)


def test_new_home_gets_its_schema_on_the_spot(tmp_path: Path) -> None:
    for _ in range(2):
        with open_registry(Settings(home=tmp_path / "home")) as registry:
            assert registry.versions.all() == []


def test_home_of_another_release_is_not_changed(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    open_registry(settings).close()
    engine = make_engine(settings.registry_url)
    at_revision(engine, "9999")
    with pytest.raises(SchemaMismatch, match="is 9999"):
        open_registry(settings)
    assert found_revision(engine) == "9999"
    engine.dispose()


def upgrade_url(url: str) -> None:
    engine = make_engine(url)
    upgrade(engine)
    Registry(engine).close()


def test_many_processes_may_upgrade_at_once(engine: Engine, url: str) -> None:
    assert exit_codes(upgrade_url, *[(url,)] * 4) == [0] * 4
    assert tables(engine) == set(metadata.tables)
    assert found_revision(engine) == SCHEMA_REVISION


def open_home(home: str) -> None:
    open_registry(Settings(home=Path(home))).close()


def test_many_processes_may_open_a_new_home_at_once(tmp_path: Path) -> None:
    assert exit_codes(open_home, *[(str(tmp_path),)] * 4) == [0] * 4


def upgrade_and_die(url: str, last: int) -> None:
    engine = make_engine(url)
    statements = 0

    def count(*_: Any) -> None:
        nonlocal statements
        statements += 1
        if statements == last:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(engine, "after_cursor_execute", count)
    upgrade(engine)


@pytest.mark.parametrize("last", [4, 9, 15])
def test_killed_upgrade_leaves_nothing_and_can_be_done_again(
    engine: Engine, url: str, last: int
) -> None:
    assert exit_codes(upgrade_and_die, (url, last)) == [-signal.SIGKILL]
    assert tables(engine) == set()
    upgrade(engine)
    assert tables(engine) == set(metadata.tables)


def revisions() -> list[str]:
    """Return every revision there was, the oldest first."""
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    found = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert found[0] == SCHEMA_REVISION
    return found[::-1]


FIRST, *_ = OLDER = revisions()[:-1]


class TestData:
    """What an older release wrote is all there after an upgrade, and served; and after a way back.

    Rows that no call writes are written by SQL, and what a revision had not yet is taken away, as
    no older release is at hand: there is one of each table at least.
    """

    NOW = "2026-05-04 03:02:01.000000"
    ROWS: ClassVar = {
        "operations": {
            "id": "'op1'",
            "kind": "'promote'",
            "state": "'succeeded'",
            "progress": "1.0",
            "step": "'switch'",
            "request": """'{"version": 1}'""",
            "result": """'{"live_version": 1}'""",
            "actor": "'ann'",
            "owner": "'host:1'",
            "heartbeat_at": f"'{NOW}'",
            "created_at": f"'{NOW}'",
            "finished_at": f"'{NOW}'",
        },
        "usage": {
            "consumer": "(SELECT min(id) FROM consumers)",
            "version": "0",
            "day": "'2026-05-04'",
            "requests": "5000000000",
            "vectors": "7",
        },
    }

    LATER: ClassVar = {"operations": {"beat": "12", "resumable": "true"}}
    """What those rows have since the second revision."""

    @pytest.fixture(params=OLDER)
    def revision(self, request: pytest.FixtureRequest) -> str:
        name: str = request.param
        return name

    @pytest.fixture
    def home(self, tmp_path: Path, url: str, empty_redis: str, revision: str) -> Iterator[Home]:
        """A home of an older release: versions 0 to 2, 1 is live and changed by deltas."""
        places: dict[str, Any] = {"database_url": url}
        if "sqlite" not in url:
            places["store_url"] = empty_redis
        with build_home(tmp_path, bias=True, direct={2: [0]}, live=1, **places) as home:
            home.backcast.registry.keys.create("ranking", Scope.READ, pin=0)
            vector = np.full((1, home.dims[1]), 0.5, np.float32)
            upsert(home.backcast, Entity.ITEM, ["item 1"], vector, actor="ann", most_changed=10)
            erase(home.backcast, Entity.USER, ["user 1"], actor="ann", grace=timedelta(hours=1))
            engine = home.backcast.registry._engine
            downgrade(engine, revision)
            with engine.begin() as connection:
                for table, first in self.ROWS.items():
                    row = first if revision == FIRST else first | self.LATER.get(table, {})
                    names, values = ", ".join(row), ", ".join(row.values())
                    connection.execute(text(f"INSERT INTO {table} ({names}) VALUES ({values})"))
            yield home

    @staticmethod
    def contents(engine: Engine) -> dict[str, list[dict[str, Any]]]:
        """Return every row of every table, as the database has it."""
        found = {}
        with engine.connect() as connection:
            for table in sorted(tables(engine)):
                rows = connection.execute(text(f"SELECT * FROM {table}")).mappings().all()
                found[table] = sorted((dict(row) for row in rows), key=str)
        return found

    def test_every_table_had_data(self, home: Home, revision: str) -> None:
        found = self.contents(home.backcast.registry._engine)
        assert found_revision(home.backcast.registry._engine) == revision
        assert ({"drifts", "erasures"} <= found.keys()) is (revision != FIRST)
        assert all(found.values()), {name for name, rows in found.items() if not rows}
        assert len(found["versions"]) == 3
        assert len(found["transforms"]) == 3

    def test_nothing_is_lost_and_serving_goes_on(self, home: Home) -> None:
        engine = home.backcast.registry._engine
        before = self.contents(engine)
        upgrade(engine)
        after = self.contents(engine)
        assert set(after) == set(metadata.tables)
        for table, rows in before.items():
            assert [pick(row, rows[0]) for row in after[table]] == rows
        home.vectors[1][Entity.ITEM]["item 1"] = np.full(home.dims[1], 0.5, np.float32)
        with client_of(home) as client:
            for live in (1, 2):
                ids = home.ids(version=live)
                for target in range(live + 1):
                    body = {"ids": ids, "version": target}
                    answer = client.post("/embeddings/batch", json=body)
                    assert_served(read_rows(answer), home, ids, target, live=live)
                if live == 1:
                    home.promote(2)
                    wait_for(client, live=2)
                    assert client.get("/embeddings/user 1?version=0&entity=user").status_code == 404
        assert home.backcast.registry.operations.get("op1").actor == "ann"
        check_books(home)

    def test_the_way_down_and_up_again_keeps_it_too(self, home: Home, revision: str) -> None:
        engine = home.backcast.registry._engine
        before = self.contents(engine)
        upgrade(engine)
        downgrade(engine, revision)
        assert self.contents(engine) == before
        upgrade(engine)
        check_books(home)


def pick(row: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in names}


def wait_for(client: TestClient, *, live: int) -> None:
    deadline = time.monotonic() + 30
    while client.get("/readyz").json()["live_version"] != live:
        assert time.monotonic() < deadline
        time.sleep(0.05)
