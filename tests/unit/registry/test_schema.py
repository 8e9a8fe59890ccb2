"""Which databases a URL names, and how SQLite is made to keep its word."""

from pathlib import Path

import pytest

from backcast.errors import ConfigError
from backcast.registry.schema import make_engine


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("no url at all", "BACKCAST_DATABASE_URL: Could not parse"),
        ("nosuchdb://host/name", "BACKCAST_DATABASE_URL: Can't load plugin"),
        ("mysql+pymysql://host/name", "mysql.pymysql needs the package 'pymysql'"),
    ],
)
def test_url_that_cannot_be_used_is_a_setting_to_correct(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_engine(url)


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
