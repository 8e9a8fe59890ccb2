"""What the commands upsert, erase, refresh and export do and print."""

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from backcast.lifecycle import export, sweep
from backcast.vector_files import write_vector_file
from backcast.vectors import VectorBatch
from backcast.versions import Entity, VersionState
from tests.service_support import gain, set_version
from tests.support import Home, build_home, normal
from tests.unit.test_cli import Shell


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(tmp_path / "home", monkeypatch, capsys)


@pytest.fixture
def home(shell: Shell) -> Iterator[Home]:
    """Versions 0 to 3, of which 2 is live; 3 is a child of 1."""
    with build_home(
        shell.home, dims=(4, 6, 8, 5), parents=(None, 0, 1, 1), bias=True, live=2
    ) as built:
        yield built


def name(home: Home) -> str:
    live = home.backcast.registry.deployments.live()
    assert live is not None
    return live.name


def put(shell: Shell, home: Home, ids: list[str], entity: Entity, *options: str) -> Any:
    """Put random vectors from a file, and note them."""
    vectors = normal(np.random.default_rng(len(ids)), len(ids), 8)
    home.vectors[2][entity].update(zip(ids, vectors, strict=True))
    write_vector_file(Path("new.parquet"), 8, [VectorBatch(entity, ids, vectors)], {"version": 2})
    return shell("upsert", "new.parquet", *options)


def test_upsert(shell: Shell, home: Home) -> None:
    result = put(shell, home, ["new", "item 0"], Entity.ITEM)
    assert (result.code, result.log) == (0, "")
    said = f"2 items put: {name(home)} is live. Replicas follow within BACKCAST_POLL_SECONDS.\n"
    assert result.output == said
    document = json.loads(put(shell, home, ["you"], Entity.USER, "--json").output)
    assert document == {"snapshot": name(home), "live_version": 2, "upserted": {"user": 1}}
    assert name(home).endswith(".2")


def test_upsert_of_another_version_is_refused(shell: Shell, home: Home) -> None:
    result = put(shell, home, ["new"], Entity.ITEM, "--expected-live", "1")
    assert result.code == 1
    assert result.log == "error: new.parquet holds vectors of version 2, not of 1.\n"
    home.promote(3, force=True, reason="tests")
    result = put(shell, home, ["new"], Entity.ITEM)
    assert result.code == 1
    assert "of version 2, live is version 3" in result.log


def test_erase(shell: Shell, home: Home) -> None:
    result = shell("erase", "item 1", "nobody")
    assert (result.code, result.log) == (0, "")
    first, second, *table = result.output.splitlines()
    assert first == f"1 item id erased: {name(home)} is live."
    assert second == (
        "No item has the id nobody; erased all the same, for vectors to come: "
        f"{name(home)} is live."
    )
    assert "Still held, served from nowhere" in table[0]
    shown = " ".join(" ".join(table).split())
    assert "superseded" in shown
    assert "data set" in shown
    assert shell("erase", "item 2").output.startswith("1 item id erased: ")
    document = json.loads(shell("erase", "user 1", "--entity", "user", "--json").output)
    assert (document["entity"], document["erased"], document["unknown"]) == ("user", 1, [])
    assert document["snapshot"] == name(home)


def test_erasure_of_what_only_the_other_kind_has(shell: Shell, home: Home) -> None:
    put(shell, home, ["you"], Entity.USER)
    shell("erase", "user 2", "--entity", "user")
    result = shell("erase", "user 1", "user 2", "you")
    assert (result.code, result.log) == (0, "")
    first, second, *_ = result.output.splitlines()
    assert first == (
        "No item has the ids user 1, user 2, you; erased all the same, for vectors to come: "
        f"{name(home)} is live."
    )
    assert second == "2 users have user 1, you: --entity user erases there."
    [_, hint, *_] = shell("erase", "item 0", "--entity", "user").output.splitlines()
    assert hint == "One item has item 0: --entity item erases there."


def test_refresh(shell: Shell, home: Home) -> None:
    record = home.publish(2, seed=4)
    result = shell("refresh")
    assert result.code == 0
    said = f"Version 2 is live, from snapshot {record.id}.\nStored as float32, nothing lost.\n"
    assert result.output == said
    assert home.backcast.registry.deployments.history()[0]["kind"] == "refresh"
    again = shell("refresh")
    assert again.code == 1
    assert "live already, with its newest snapshot" in again.log
    assert shell("refresh", "--compact").code == 1
    assert "give one" in shell("refresh", "--compact", "--dry-run").log


def test_compaction(shell: Shell, home: Home) -> None:
    put(shell, home, ["new", "item 0"], Entity.ITEM)
    shell("erase", "item 1")
    del home.vectors[2][Entity.ITEM]["item 1"]
    document = json.loads(shell("refresh", "--compact", "--expected-live", "2", "--json").output)
    assert document["live_version"] == 2
    assert name(home) == document["snapshot"]
    assert document["snapshot"].endswith(".0")
    home.check_served(2)
    sweep(home.backcast, timedelta(0))
    document = json.loads(shell("erase", "item 1", "--json").output)
    assert [h["what"] for h in document["held_by"]] == ["snapshot", "data set"]  # 3's candidate


def exported(path: str) -> tuple[dict[bytes, bytes], dict[tuple[str, str], list[float]]]:
    table = pq.read_table(path)
    rows = {(r["entity"], r["id"]): r["vector"] for r in table.to_pylist()}
    assert len(rows) == len(table)
    return table.schema.metadata, rows


@pytest.mark.parametrize("target", [0, 1, 2])
def test_export_is_the_arithmetic_of_all_that_is_live(
    shell: Shell, home: Home, target: int
) -> None:
    put(shell, home, ["new", "item 0"], Entity.ITEM)
    shell("erase", "item 1")
    del home.vectors[2][Entity.ITEM]["item 1"]
    result = shell("export", "--version", f"{target}", "--out", "all.parquet", "--json")
    assert result.code == 0
    about, rows = exported("all.parquet")
    assert json.loads(result.output) == {
        "version": target,
        "dim": home.dims[target],
        "live_version": 2,
        "snapshot": name(home),
        "rows": len(rows),
        "out": "all.parquet",
    }
    assert {k: about[k] for k in (b"version", b"live_version", b"snapshot")} == {
        b"version": b"%d" % target,
        b"live_version": b"2",
        b"snapshot": name(home).encode(),
    }
    assert sorted(rows) == sorted(
        (str(e), id) for e, some in home.vectors[2].items() for id in some
    )
    for entity, some in home.vectors[2].items():
        check(home, target, entity, np.array([rows[entity, id] for id in some], np.float32))


def check(home: Home, target: int, entity: Entity, found: NDArray[np.float32]) -> None:
    ids = home.ids(entity, version=2)
    wanted = home.reference(target, ids, entity, live=2)
    norms = np.linalg.norm(home.reference(2, ids, entity, live=2), axis=1)
    errors = np.linalg.norm(found - wanted, axis=1)
    assert np.all(errors <= 1e-5 * gain(home, target, 2) * norms)


@pytest.mark.usefixtures("home")
def test_export_into_no_folder_names_the_file_that_was_asked_for(shell: Shell) -> None:
    result = shell("export", "--version", "0", "--out", "nodir/x.parquet")
    assert (result.code, result.output) == (1, "")
    assert result.log.splitlines()[-1] == "error: nodir/x.parquet: No such file or directory."


def test_export_of_one_kind(shell: Shell, home: Home) -> None:
    result = shell("export", "--version", "0", "--out", "users.parquet", "--entity", "user")
    assert result.output == (
        f"5 vectors of version 0, 4 dimensions, made from {name(home)}: users.parquet\n"
    )
    assert {entity for entity, _ in exported("users.parquet")[1]} == {"user"}


def test_export_reads_a_batch_at_a_time(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backcast.snapshots._ROWS", 5)
    told: list[int] = []
    assert export(home.backcast, 0, tmp_path / "all.parquet", advance=told.append).rows == 17
    assert told == [5, 10, 12, 17]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--version", "9"), "Version 9 does not exist"),
        (("--version", "0"), "Version 0 is retired"),
        (("--version", "3"), "Version 3 is registered but not promoted"),
        (("--version", "1", "--engine", "ray"), "--engine ray is not built yet"),
        (("--version", "1", "--out", "no/such/place"), "No such file"),
    ],
)
def test_export_that_cannot_be_made_says_why(
    shell: Shell, home: Home, arguments: tuple[str, ...], message: str
) -> None:
    set_version(home, 0, state=VersionState.RETIRED)
    result = shell("export", "--out", "all.parquet", *arguments)
    assert (result.code, result.output) == (1, "")
    assert message in result.log.splitlines()[-1]
    assert not Path("all.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("upsert", "absent.parquet"), "absent.parquet: No such file or directory"),
        (("erase", ""), "An id has 1 to 1024 bytes"),
        (("refresh",), "Nothing is live"),
        (("refresh", "--compact"), "Nothing is live"),
        (("export", "--version", "0", "--out", "x"), "Nothing is live"),
    ],
)
def test_nothing_is_there_yet(shell: Shell, arguments: tuple[str, ...], message: str) -> None:
    result = shell(*arguments)
    assert (result.code, result.output) == (1, "")
    assert message in result.log.splitlines()[-1]
