"""A database that fails is one kind of error, whoever's driver it was."""

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection, text

from backcast.errors import InvalidInput, RegistryError
from backcast.registry import open_registry
from backcast.registry.database import Database
from backcast.registry.schema import make_engine
from backcast.settings import Settings
from backcast.versions import Scope
from tests import servers


def test_server_that_does_not_answer_is_named_without_its_password() -> None:
    address = f"127.0.0.1:{servers.free_port()}/registry"
    settings = Settings(database_url=f"postgresql+psycopg://ann:s3cret@{address}")
    with pytest.raises(RegistryError) as caught:
        open_registry(settings)
    where = f"The registry postgresql+psycopg://ann:***@{address} does not answer: "
    assert caught.value.message.startswith(where)
    assert "s3cret" not in str(caught.value)
    assert "\n" not in caught.value.message


def test_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "registry.db").mkdir()
    with pytest.raises(RegistryError, match=r"registry\.db does not answer: unable to open"):
        open_registry(Settings(home=tmp_path))


def test_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_text("not a database" * 100)
    with pytest.raises(
        RegistryError, match=r"registry\.db does not answer: file is not a database"
    ):
        open_registry(Settings(home=tmp_path))


def test_file_that_is_deleted_meanwhile_is_told_nothing(tmp_path: Path) -> None:
    with open_registry(Settings(home=tmp_path)) as registry:
        registry.keys.create("ann", Scope.READ)
        for file in tmp_path.glob("registry.db*"):
            file.unlink()
        with pytest.raises(RegistryError, match="no such table"):
            registry.keys.create("bob", Scope.READ)


def test_number_that_is_too_large_is_refused(tmp_path: Path) -> None:
    with (
        open_registry(Settings(home=tmp_path)) as registry,
        pytest.raises(InvalidInput, match=r"registry cannot hold what .* too large"),
    ):
        registry.versions.get(10**30)


def test_broken_transaction_writes_nothing(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path}/registry.db")
    database = Database(engine)
    with database.write() as connection:
        connection.execute(text("CREATE TABLE kept (value INTEGER)"))

    def insert_and(then: Callable[[Connection], object]) -> None:
        with database.write() as connection:
            connection.execute(text("INSERT INTO kept VALUES (1)"))
            then(connection)

    with pytest.raises(RegistryError, match="no such table: nowhere"):
        insert_and(lambda connection: connection.execute(text("SELECT * FROM nowhere")))
    with pytest.raises(ZeroDivisionError):
        insert_and(lambda _: 1 / 0)
    with database.read() as connection:
        assert connection.scalar(text("SELECT count(*) FROM kept")) == 0
    engine.dispose()
