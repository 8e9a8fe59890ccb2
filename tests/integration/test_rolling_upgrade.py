"""A next release changes the schema while replicas of this one serve: expand, roll, contract.

The next releases are copies of this one with further migrations, run as processes of their own.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from threading import Event

import httpx2
import numpy as np
import pytest
from sqlalchemy import Engine, event, text

import migrations
from backcast.registry.revisions import Revision
from backcast.registry.schema import found_revision, make_engine, upgrade
from backcast.registry.tables import SCHEMA_REVISION
from backcast.versions import Scope
from benchmarks.soak_replicas import Replica, replica_environment
from tests.service_support import bearer, secret_of
from tests.support import Home, build_home, check_books

ROOT = Path(__file__).parents[2]
OWN, OLDEST = Revision.parse(SCHEMA_REVISION).number, Revision.parse(SCHEMA_REVISION).oldest
EXPANDED = f"{OWN + 1:04d}_for_{OLDEST:04d}"
CONTRACTED = f"{OWN + 2:04d}_for_{OWN + 1:04d}"

EXPAND = f"""
import sqlalchemy as sa
from alembic import op

revision, down_revision = "{EXPANDED}", "{SCHEMA_REVISION}"


def upgrade() -> None:
    for table in ("versions", "snapshots", "live", "operations", "deployments", "api_keys"):
        op.add_column(table, sa.Column("added", sa.Text(), nullable=True))
    op.add_column("deltas", sa.Column("size", sa.Integer(), nullable=False, server_default="0"))
    op.create_table("tags", sa.Column("version", sa.Integer, sa.ForeignKey("versions.number")))
    op.create_index("ix_usage_day", "usage", ["day"])


def downgrade() -> None:
    raise NotImplementedError
"""
CONTRACT = f"""
from alembic import op

revision, down_revision = "{CONTRACTED}", "{EXPANDED}"


def upgrade() -> None:
    op.alter_column("versions", "note", new_column_name="remark")


def downgrade() -> None:
    raise NotImplementedError
"""


@dataclass(frozen=True)
class Release:
    """A checkout with its own code and migrations."""

    folder: Path

    @classmethod
    def after_this(cls, folder: Path, revision: str, *scripts: str) -> "Release":
        for package in ("backcast", "service", "trainer", "migrations"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, folder / package, ignore=ignored)
        tables = folder / "backcast" / "registry" / "tables.py"
        own = f'SCHEMA_REVISION = "{SCHEMA_REVISION}"'
        assert own in tables.read_text()
        tables.write_text(tables.read_text().replace(own, f'SCHEMA_REVISION = "{revision}"'))
        for number, script in enumerate(scripts):
            (folder / "migrations" / "versions" / f"next_{number}.py").write_text(script)
        return cls(folder)

    def environment(self, home: Home) -> dict[str, str]:
        paths = replica_environment(home.settings)["PYTHONPATH"]
        return {
            **replica_environment(home.settings),
            "PYTHONPATH": os.pathsep.join([str(self.folder), paths]),
        }

    def run(self, home: Home, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "backcast", *arguments],
            env=self.environment(home),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.fixture(scope="module")
def this() -> Release:
    return Release(ROOT)


@pytest.fixture(scope="module")
def expanding(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return Release.after_this(tmp_path_factory.mktemp("next"), EXPANDED, EXPAND)


@pytest.fixture(scope="module")
def contracting(tmp_path_factory: pytest.TempPathFactory) -> Release:
    folder = tmp_path_factory.mktemp("the one after")
    return Release.after_this(folder, CONTRACTED, EXPAND, CONTRACT)


@dataclass
class Traffic:
    """Readers and writers of one replica, who note everything that is not as it should be."""

    home: Home
    url: str
    secret: str
    putting: bool = True
    done: int = 0
    wrong: list[str] = field(default_factory=list)
    _stopping: Event = field(default_factory=Event)

    @contextmanager
    def flowing(self) -> Iterator["Traffic"]:
        threads = [threading.Thread(target=act) for act in (self._read, self._administer)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self._stopping.set()
            for thread in threads:
                thread.join()

    def more(self, requests: int) -> None:
        """Wait for further requests, all of which must be answered as they should."""
        wanted, deadline = self.done + requests, time.monotonic() + 60
        while self.done < wanted and not self.wrong:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert self.wrong == []

    def _read(self) -> None:
        with httpx2.Client(base_url=self.url, headers=bearer(self.secret), timeout=30) as http:
            while not self._stopping.is_set():
                self._note(http.get("/embeddings/item 1", params={"version": 0}), 200)
                self._note(http.get("/versions"), 200)

    def _administer(self) -> None:
        dim = self.home.dims[1]
        with httpx2.Client(base_url=self.url, headers=bearer(self.secret), timeout=30) as http:
            for number in count():
                if self._stopping.is_set():
                    return
                vector = np.full(dim, 1 / (1 + number)).tolist()
                body = {"ids": [f"new {number % 7}"], "vectors": [vector], "entity": "item"}
                if self.putting:
                    self._note(http.put("/admin/embeddings", json=body), 200)
                self._note(http.get("/admin/operations"), 200)
                self._note(http.get("/admin/deployments"), 200)
                self._note(http.get("/admin/consumers"), 200)

    def _note(self, answer: httpx2.Response, expected: int) -> None:
        self.done += 1
        if answer.status_code != expected:
            self.wrong.append(f"{answer.request.url}: {answer.status_code} {answer.text}")


@contextmanager
def serving(release: Release, home: Home, folder: Path, number: int) -> Iterator[Replica]:
    replica = Replica(number, release.environment(home), folder)
    replica.start()
    try:
        replica.wait(Event())
        yield replica
    finally:
        replica.stop()


def wait_for_a_lock(engine: Engine, ended: Sequence[object]) -> None:
    """Wait until somebody waits for a table."""
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    deadline = time.monotonic() + 60
    while True:
        with engine.connect() as connection:
            if connection.scalar(waiting):
                return
        assert not ended, ended
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ordered(replica: Replica, secret: str, path: str, body: dict[str, object]) -> dict[str, object]:
    """Give an order over HTTP and follow it to its end."""
    with httpx2.Client(base_url=replica.url, headers=bearer(secret), timeout=30) as http:
        begun = http.post(path, json=body)
        assert begun.status_code == 202, begun.text
        deadline = time.monotonic() + 60
        while True:
            found: dict[str, object] = http.get(f"/admin/operations/{begun.json()['id']}").json()
            if found["state"] in {"succeeded", "failed"}:
                return found
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_rolling_upgrade_fails_no_request_and_only_its_contraction_ends_older_replicas(
    tmp_path: Path,
    new_postgres: str,
    empty_redis: str,
    this: Release,
    expanding: Release,
    contracting: Release,
) -> None:
    with ExitStack() as stack:
        home = stack.enter_context(
            build_home(tmp_path, live=1, database_url=new_postgres, store_url=empty_redis)
        )
        secret = secret_of(home, Scope.ADMIN)
        old = stack.enter_context(serving(this, home, tmp_path, 1))
        traffic = Traffic(home, old.url, secret)
        with traffic.flowing():
            traffic.more(50)
            # A reader that takes its time holds the table; nobody waits behind the migration.
            engine = make_engine(new_postgres)
            stack.callback(engine.dispose)
            with engine.connect() as reader:
                reader.execute(text("SET idle_in_transaction_session_timeout = 0"))
                reader.execute(text("SELECT * FROM versions"))
                upgrading = threading.Thread(
                    target=lambda: ended.append(expanding.run(home, "db", "upgrade"))
                )
                ended: list[subprocess.CompletedProcess[str]] = []
                upgrading.start()
                wait_for_a_lock(engine, ended)
                until = time.monotonic() + 1.5  # longer than a migration waits at a time
                while time.monotonic() < until:
                    wait_for_a_lock(engine, ended)
                    traffic.more(10)
                assert upgrading.is_alive()
            upgrading.join()
            assert (ended[0].returncode, found_revision(engine)) == (0, EXPANDED), ended[0].stderr
            assert "waits for a table" in ended[0].stderr
            traffic.more(100)

            checked = this.run(home, "db", "check")
            assert (checked.returncode, checked.stderr) == (0, "")
            assert "A newer release has expanded the registry's schema" in checked.stdout
            again = this.run(home, "db", "upgrade")  # as a container does that is started again
            assert (again.returncode, found_revision(engine)) == (0, EXPANDED), again.stderr

            other = stack.enter_context(serving(this, home, tmp_path, 2))
            other.kill()
            other.start()
            other.wait(Event())
            new = stack.enter_context(serving(expanding, home, tmp_path, 3))
            traffic.putting = False  # its vectors are of version 1
            traffic.more(20)
            promoted = ordered(old, secret, "/admin/versions/2/promote", {"expected_live": 1})
            assert promoted["state"] == "succeeded", promoted
            order: dict[str, object] = {"expected_live": 2, "reason": "tried"}
            undone = ordered(new, secret, "/admin/rollback", order)
            assert undone["state"] == "succeeded", undone
            home.promote(2)
            ordered(other, secret, "/admin/rollback", order)
            traffic.more(50)
        new.stop()
        check_books(home)

        refused = contracting.run(home, "db", "upgrade")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert re.fullmatch(
            rf"error: Migration {CONTRACTED} takes away .*backcast db upgrade --contract\.\n",
            refused.stderr,
        )
        done = contracting.run(home, "db", "upgrade", "--contract")
        assert (done.returncode, found_revision(engine)) == (0, CONTRACTED), done.stderr
        self_check = contracting.run(home, "db", "check")
        assert self_check.returncode == 0

        # A replica that was left behind answers what it knows, and changes nothing any more.
        with httpx2.Client(base_url=old.url, headers=bearer(secret), timeout=30) as http:
            assert http.get("/embeddings/item 1?version=0").status_code == 200
            answer = http.post("/admin/versions/2/promote", json={"expected_live": 1})
            assert answer.status_code == 503
            assert answer.json()["type"] == "urn:backcast:problem:registry-error"
            assert "is not this release's any more" in answer.json()["detail"]
        started = this.run(home, "serve", "--port", "1")
        assert (started.returncode, started.stdout) == (1, "")
        assert started.stderr == (
            f"error: The registry's schema is {CONTRACTED}, this release needs {SCHEMA_REVISION}. "
            "Install the release that made it.\n"
        )
        assert this.run(home, "db", "upgrade").stderr == started.stderr
        checked = this.run(home, "db", "check", "--json")
        assert (checked.returncode, '"state": "newer"' in checked.stdout) == (1, True)


# --- what a migration may do ----------------------------------------------------------------------


def forbidden(statements: list[str]) -> list[str]:
    """Return the statements that code of the revision before could trip over."""
    new = {m[1] for s in statements if (m := re.match(r"CREATE TABLE (\w+)", s))}
    new |= {
        f"{m[1]}.{m[2]}"
        for s in statements
        if (m := re.match(r"ALTER TABLE (\w+) ADD COLUMN (\w+)", s))
    }
    return [statement for statement in statements if not _adds(statement, new)]


def _adds(statement: str, new: set[str]) -> bool:
    if added := re.match(r"ALTER TABLE (\w+) ADD COLUMN", statement):
        required = "NOT NULL" in statement and "DEFAULT" not in statement
        return not required or added[1] in new
    if unique := re.match(r"CREATE UNIQUE INDEX \w+ ON (\w+) \((\w+)", statement):
        return unique[1] in new or f"{unique[1]}.{unique[2]}" in new
    if altered := re.match(r"ALTER TABLE (\w+)", statement):
        return altered[1] in new
    return not re.match(r"(DROP|ALTER|DELETE|TRUNCATE|UPDATE (?!alembic_version))", statement)


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE versions DROP COLUMN note",
        "ALTER TABLE versions RENAME note TO remark",
        "ALTER TABLE versions RENAME TO releases",
        "ALTER TABLE versions ALTER COLUMN note TYPE VARCHAR(5)",
        "ALTER TABLE versions ALTER COLUMN note SET NOT NULL",
        "ALTER TABLE versions ADD COLUMN team TEXT NOT NULL",
        "ALTER TABLE versions ADD CONSTRAINT few CHECK (number < 5)",
        "CREATE UNIQUE INDEX ix_versions_dim ON versions (dim)",
        "DROP TABLE usage",
        "DROP INDEX ix_usage_day",
        "DELETE FROM usage",
        "UPDATE versions SET note = ''",
    ],
)
def test_what_older_code_could_trip_over_is_found(statement: str) -> None:
    assert forbidden([statement]) == [statement]


def test_what_only_adds_is_let_through() -> None:
    statements = [
        "CREATE TABLE tags (version INTEGER NOT NULL)",
        "ALTER TABLE tags ADD CONSTRAINT few CHECK (version < 5)",
        "CREATE UNIQUE INDEX ix_tags_version ON tags (version)",
        "ALTER TABLE versions ADD COLUMN team TEXT",
        "ALTER TABLE versions ADD COLUMN size INTEGER DEFAULT '0' NOT NULL",
        "CREATE UNIQUE INDEX ix_versions_team ON versions (team)",
        "CREATE INDEX ix_usage_day ON usage (day)",
        "UPDATE alembic_version SET version_num='0003_for_0002'",
    ]
    assert forbidden(statements) == []


@pytest.fixture
def engine(new_postgres: str) -> Iterator[Engine]:
    engine = make_engine(new_postgres)
    yield engine
    engine.dispose()


def revisions() -> list[str]:
    """Return the revisions, oldest first."""
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    return [s.revision for s in ScriptDirectory.from_config(config).walk_revisions()][::-1]


def test_each_migration_only_adds_unless_its_name_says_that_it_leaves_older_code_behind(
    engine: Engine,
) -> None:
    names = revisions()
    assert [Revision.parse(name).number for name in names] == list(range(1, len(names) + 1))
    statements: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(" ".join(statement.split()))

    for before, name in zip([None, *names], names, strict=False):
        statements.clear()
        upgrade(engine, name)
        known = Revision.parse(name)
        if before is not None and not known.ends_code_of(Revision.parse(before)):
            assert forbidden(statements) == [], name
            assert known.oldest == Revision.parse(before).oldest
    assert found_revision(engine) == SCHEMA_REVISION
