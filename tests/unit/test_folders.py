"""Folders and files that Backcast makes are for the user of its process alone."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backcast.artifacts import Artifacts
from backcast.folders import make_private
from backcast.lifecycle import back_up
from backcast.registry.schema import make_engine, upgrade
from backcast.stores.embedded import EmbeddedStore
from tests.support import build_home


@pytest.fixture(autouse=True)
def _everybody_may_read() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


def test_folder_and_those_on_the_way_are_private(tmp_path: Path) -> None:
    make_private(tmp_path / "a" / "b" / "c")
    made = [tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c"]
    assert [mode(folder) for folder in made] == [0o700] * 3


def test_folder_that_is_there_keeps_its_rights(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o2775)
    make_private(shared)
    make_private(shared / "own")
    assert [mode(shared), mode(shared / "own") & 0o777] == [0o2775, 0o700]
    EmbeddedStore(shared)
    Artifacts(str(shared)).write("versions/v0-00000000", {"file": b""})
    assert mode(shared) == 0o2775
    assert mode(shared / "versions") & 0o777 == 0o755  # whoever shares the root shares all of it


def test_one_folder_is_made_by_many_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        for round in range(20):
            list(pool.map(make_private, [tmp_path / f"{round}" / "a" / "b"] * 8))


@pytest.mark.parametrize("below", [(), ("folder",), ("folder", "within")])
def test_file_in_its_place_is_an_error(tmp_path: Path, below: tuple[str, ...]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"exists|Not a directory"):
        make_private(tmp_path.joinpath("file", *below))


def test_home_store_artifacts_and_backup_are_private(tmp_path: Path) -> None:
    with build_home(tmp_path / "srv" / "home", live=1) as home:
        back_up(home.backcast, Artifacts(str(tmp_path / "backups" / "monday")))
        folders = [tmp_path / "srv", tmp_path / "srv" / "home", tmp_path / "backups" / "monday"]
        folders += [Path(home.settings.artifacts_root), tmp_path / "srv" / "home" / "store"]
        assert [oct(mode(folder)) for folder in folders] == ["0o700"] * 5
        files = [tmp_path / "srv" / "home" / f"registry.db{end}" for end in ("", "-wal", "-shm")]
        assert [oct(mode(file)) for file in files] == ["0o600"] * 3


def test_registry_in_a_folder_of_others_is_private(tmp_path: Path) -> None:
    for name in ("new.db", "old.db"):
        if name == "old.db":
            (tmp_path / name).touch(0o644)
        engine = make_engine(f"sqlite:///{tmp_path / name}")
        upgrade(engine)
        engine.dispose()
    assert [mode(tmp_path / name) for name in ("new.db", "old.db")] == [0o600, 0o644]
