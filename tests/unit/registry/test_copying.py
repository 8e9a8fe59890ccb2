"""Copies of a registry, and what one that cannot be copied into is called."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from backcast.errors import Conflict
from backcast.lifecycle import Promote, run_order
from backcast.registry import make_registry
from backcast.versions import Scope
from tests.support import build_home


def test_a_registry_that_is_not_empty_is_named_without_its_password(tmp_path: Path) -> None:
    url = f"sqlite:///file:{tmp_path}/registry.db?uri=true&password=s3cret"
    with make_registry(url) as registry:
        registry.keys.create("ranking", Scope.READ)
        with pytest.raises(Conflict, match=r"registry\.db is not empty: consumers") as raised:
            registry.demand_empty()
    assert "s3cret" not in raised.value.message


def test_what_is_absent_stays_absent(tmp_path: Path) -> None:
    with (
        build_home(tmp_path / "home", live=1) as home,
        make_registry(f"sqlite:///{tmp_path}/copy.db") as copy,
    ):
        run_order(home.backcast, Promote(2), "cli:ann", timeout=30)
        home.backcast.registry.copy_to(copy)
    counts = []
    for place in (tmp_path / "home" / "registry.db", tmp_path / "copy.db"):
        with closing(sqlite3.connect(place)) as database:
            without = "SELECT count(*), count(error) FROM operations"
            counts.append(database.execute(without).fetchone())
    assert counts[0] == counts[1]
    assert counts[0][0] > counts[0][1] == 0
