"""Which databases a URL names, and how SQLite is made to keep its word."""

import re
import sys
from pathlib import Path

import pytest

from backcast.errors import ConfigError
from backcast.registry.schema import make_engine


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("no url at all", "BACKCAST_DATABASE_URL: Could not parse"),
        ("postgresql+psycopg://u:correct@host:horse/name", "its port is no number"),
        ("postgresql+nosuch://host/name", "BACKCAST_DATABASE_URL: Can't load plugin"),
        ("mysql://host/name", r"SQLite \(sqlite:///…\) or PostgreSQL \(.*\), not mysql\.$"),
        ("nosuchdb+driver://host/name", r"SQLite .* or PostgreSQL .*, not nosuchdb\.$"),
        (
            "postgresql+psycopg2://host/name",
            r"'psycopg2': write .* postgresql\+psycopg://… instead",
        ),
    ],
)
def test_url_that_cannot_be_used_is_a_setting_to_correct(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        make_engine(url)
    assert "horse" not in raised.value.message


def test_driver_that_is_not_installed_comes_with_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ConfigError, match=r"'psycopg': pip install backcast\[service\]\.$"):
        make_engine("postgresql+psycopg://host/name")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://u:secret@horse@127.0.0.1:5432/x",
        "postgresql+psycopg://u:secret@ho/r:se@127.0.0.1:5432/x",
        "postgresql+psycopg://u:secret@horse?x@127.0.0.1/x",
        "postgresql+psycopg://u:secret@horse?x=y@127.0.0.1/x",
        "postgresql+psycopg://u/horse:secret@127.0.0.1/x",
    ],
)
def test_password_that_is_not_encoded_is_shown_in_no_part(url: str) -> None:
    with pytest.raises(ConfigError, match=r"an @ too many\. In a password .* @ %40\.") as raised:
        make_engine(url)
    assert not re.search("horse|ho/r|secret|127", raised.value.message)


@pytest.mark.parametrize(
    ("url", "password", "host"),
    [
        ("postgresql+psycopg://u:hun%40ter2@db/x", "hun@ter2", "db"),
        ("postgresql+psycopg://u@server:a:b/c?d=e@db/x?application_name=y", "a:b/c?d=e", "db"),
        ("postgresql+psycopg://u@server@db/x", None, "db"),
        ("postgresql+psycopg://u:p@[::1]:5432/a%40b", "p", "::1"),
        ("postgresql+psycopg:///x?host=/run/postgresql", None, None),
    ],
)
def test_password_that_can_be_told_from_the_host_is_taken(
    url: str, password: str | None, host: str | None
) -> None:
    engine = make_engine(url)
    assert (engine.url.password, engine.url.host) == (password, host)
    engine.dispose()


def test_folder_of_sqlite_may_be_named_with_an_at(tmp_path: Path) -> None:
    make_engine(f"sqlite:///{tmp_path}/ann@host:1/b@c/registry.db").dispose()
    assert (tmp_path / "ann@host:1" / "b@c").is_dir()


@pytest.mark.parametrize(
    ("url", "folder"),
    [
        ("sqlite:///file:{}/a/b.db?uri=true", "a"),
        ("sqlite:///file://{}/a%2520b/c.db?uri=true&mode=rwc", "a b"),
        ("sqlite:///file:rel/b.db?uri=true", "rel"),
        pytest.param(
            "sqlite:///file:{}/a/b?mode=memory&cache=shared&uri=true",
            None,
            marks=pytest.mark.filterwarnings("ignore:Selection of the SingletonThreadPool"),
        ),
        ("sqlite:///file::memory:?cache=shared&uri=true", None),
        ("sqlite:///:memory:", None),
        ("sqlite://", None),
    ],
)
def test_folder_of_a_sqlite_uri_is_that_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, folder: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    engine = make_engine(url.format(tmp_path))
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE t (x)")
    engine.dispose()
    assert [path.name for path in tmp_path.iterdir()] == ([] if folder is None else [folder])


def test_replaced_file_of_a_sqlite_uri_is_opened_again(tmp_path: Path) -> None:
    file = tmp_path / "registry.db"
    engine = make_engine(f"sqlite:///file:{file}?uri=true")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (x)")
    file.rename(tmp_path / "old.db")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE t (x)")
    engine.dispose()
    assert file.exists()


def test_sqlite_is_durable_and_checks_its_references(tmp_path: Path) -> None:
    engine = make_engine(f"sqlite:///{tmp_path}/new/folder/registry.db")
    pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
    with engine.connect() as connection:
        found = {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas}
    engine.dispose()
    full = 2
    assert found == {
        "journal_mode": "wal",
        "synchronous": full,
        "foreign_keys": 1,
        "busy_timeout": 10_000,
    }
