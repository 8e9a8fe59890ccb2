"""Snapshots come back bit for bit, or are refused with the reason."""

import hashlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from backcast.artifacts import Artifacts, dump_json
from backcast.errors import ArtifactCorrupt, ArtifactMissing, DimensionMismatch, InvalidInput
from backcast.snapshots import read_snapshot, write_snapshot
from backcast.vectors import VectorBatch
from backcast.versions import Entity, SnapshotRecord
from tests.support import normal

ITEM, USER = Entity.ITEM, Entity.USER

Rows = dict[Entity, list[tuple[str, list[float]]]]

ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.fixture
def artifacts(tmp_path: Path) -> Artifacts:
    return Artifacts(str(tmp_path))


def folders(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.glob("snapshots/*"))


def batch(entity: Entity, names: list[str], dim: int = 3, seed: int = 0) -> VectorBatch:
    return VectorBatch(entity, names, normal(np.random.default_rng(seed), len(names), dim))


def rows(batches: list[VectorBatch]) -> Rows:
    found: Rows = {}
    for one in batches:
        found.setdefault(one.entity, []).extend(zip(one.ids, one.vectors.tolist(), strict=True))
    return found


@st.composite
def batch_lists(draw: Callable[[Any], Any]) -> tuple[int, list[VectorBatch]]:
    """Batches of both kinds, interleaved; no id twice within a kind, some in both."""
    dim = draw(st.integers(1, 4))
    unused = {entity: draw(st.lists(ids, unique=True, max_size=8)) for entity in Entity}
    batches = []
    while any(unused.values()):
        entity = draw(st.sampled_from([entity for entity in Entity if unused[entity]]))
        size = draw(st.integers(0, len(unused[entity])))
        names, unused[entity] = unused[entity][:size], unused[entity][size:]
        values = draw(arrays(np.float32, (size, dim), elements=floats))
        batches.append(VectorBatch(entity, names, values))
        if not size:
            unused[entity] = unused[entity][1:]
    return dim, batches


@given(batch_lists())
def test_vectors_come_back(case: tuple[int, list[VectorBatch]]) -> None:
    dim, batches = case
    wanted = {entity: found for entity, found in rows(batches).items() if found}
    artifacts = Artifacts(f"memory://{secrets.token_hex(8)}")
    if not wanted:
        with pytest.raises(InvalidInput, match="Version 5 has no vectors to publish"):
            write_snapshot(artifacts, 5, dim, batches)
        return
    record = write_snapshot(artifacts, 5, dim, batches)
    assert (record.version, record.dim, record.head) == (5, dim, 0)
    assert record.counts == {str(entity): len(found) for entity, found in wanted.items()}
    assert rows(list(read_snapshot(artifacts, record))) == wanted
    artifacts.delete("snapshots")


def test_more_rows_than_one_piece_come_back(artifacts: Artifacts) -> None:
    many = batch(ITEM, [f"{n:x}" for n in range(40_000)], dim=2)
    record = write_snapshot(artifacts, 0, 2, [many])
    pieces = list(read_snapshot(artifacts, record))
    assert len(pieces) > 1
    assert rows(pieces) == rows([many])


def test_files_are_plain_parquet_with_the_stated_columns(artifacts: Artifacts) -> None:
    record = write_snapshot(artifacts, 2, 3, [batch(USER, ["a/b", "c"])])
    table = pq.read_table(artifacts.url(record.folder, "user.parquet").removeprefix("file://"))
    vector = pa.list_(pa.float32(), 3)
    assert table.schema == pa.schema(
        [("entity", pa.string()), ("id", pa.string()), ("vector", vector)]
    )
    assert table.column("entity").to_pylist() == ["user", "user"]
    assert table.column("id").to_pylist() == ["a/b", "c"]


def test_two_snapshots_of_one_moment_have_two_names(artifacts: Artifacts) -> None:
    first, second = (write_snapshot(artifacts, 1, 3, [batch(ITEM, ["a"])]) for _ in range(2))
    assert first.id != second.id
    assert {first.id[:3], second.id[:3]} == {"v1-"}


def test_one_id_may_be_of_both_kinds(artifacts: Artifacts) -> None:
    both = [batch(ITEM, ["same"], seed=1), batch(USER, ["same"], seed=2)]
    record = write_snapshot(artifacts, 0, 3, both)
    assert rows(list(read_snapshot(artifacts, record))) == rows(both)


def interrupted() -> Iterator[VectorBatch]:
    yield batch(ITEM, ["a"])
    raise KeyboardInterrupt("Ctrl-C")


def broken() -> Iterator[VectorBatch]:
    yield batch(ITEM, ["a"])
    yield VectorBatch(ITEM, ["b"], np.array([[1, np.nan, 3]], np.float32))


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([batch(ITEM, ["a", "b", "a"])], InvalidInput, "1 item ids come more than once"),
        (
            [batch(USER, ["a", "b"]), batch(ITEM, ["a"]), batch(USER, ["b", "c", "a"])],
            InvalidInput,
            "2 user ids come more than once",
        ),
        ([batch(ITEM, ["a"]), batch(USER, ["u"], dim=4)], DimensionMismatch, "expected 3, got 4"),
        ([], InvalidInput, "Version 1 has no vectors to publish"),
        ([batch(ITEM, [])], InvalidInput, "Version 1 has no vectors to publish"),
        (broken(), InvalidInput, "item 'b'"),
        (interrupted(), KeyboardInterrupt, "Ctrl-C"),
    ],
    ids=["twice", "twice-apart", "dim", "none", "empty", "nan", "interrupt"],
)
def test_refused_snapshot_leaves_no_folder(
    artifacts: Artifacts,
    tmp_path: Path,
    batches: list[VectorBatch],
    error: type[BaseException],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        write_snapshot(artifacts, 1, 3, batches)
    assert folders(tmp_path) == []


@pytest.fixture
def record(artifacts: Artifacts) -> SnapshotRecord:
    return write_snapshot(artifacts, 1, 3, [batch(ITEM, ["a", "b"]), batch(USER, ["a"])])


def altered(artifacts: Artifacts, record: SnapshotRecord, name: str) -> Path:
    return Path(artifacts.url(record.folder, name).removeprefix("file://"))


def signed(
    artifacts: Artifacts, record: SnapshotRecord, changes: dict[str, Any], **items: Any
) -> SnapshotRecord:
    """Alter the manifest (and its entry of items), and register what it is now."""
    path = altered(artifacts, record, "manifest.json")
    manifest = orjson.loads(path.read_bytes())
    manifest.update(changes)
    manifest["files"]["item"].update(items)
    content = dump_json(manifest)
    path.write_bytes(content)
    return replace(record, manifest_sha256=hashlib.sha256(content).hexdigest())


def with_items(
    artifacts: Artifacts, record: SnapshotRecord, names: list[str], values: NDArray[np.float32]
) -> SnapshotRecord:
    """Replace the Parquet file of items by one of these vectors, and sign it."""
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    table = pa.table({"entity": ["item"] * len(names), "id": names, "vector": vectors})
    buffer = BytesIO()
    pq.write_table(table, buffer)
    altered(artifacts, record, "item.parquet").write_bytes(buffer.getvalue())
    return signed(artifacts, record, {}, sha256=hashlib.sha256(buffer.getvalue()).hexdigest())


@pytest.mark.parametrize("name", ["manifest.json", "item.parquet", "user.parquet"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-9],
        lambda content: content[:20] + bytes([content[20] ^ 4]) + content[21:],
    ],
    ids=["truncated", "flipped"],
)
def test_damaged_file_is_refused(
    artifacts: Artifacts, record: SnapshotRecord, name: str, damage: Callable[[bytes], bytes]
) -> None:
    path = altered(artifacts, record, name)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArtifactCorrupt, match=f"{name} is refused: its SHA-256 is"):
        list(read_snapshot(artifacts, record))


@pytest.mark.parametrize("name", ["manifest.json", "item.parquet"])
def test_missing_file_is_named(artifacts: Artifacts, record: SnapshotRecord, name: str) -> None:
    altered(artifacts, record, name).unlink()
    with pytest.raises(ArtifactMissing, match=name):
        list(read_snapshot(artifacts, record))


def test_edited_manifest_is_refused(artifacts: Artifacts, record: SnapshotRecord) -> None:
    signed(artifacts, record, {"version": 2})
    with pytest.raises(ArtifactCorrupt, match=r"manifest\.json is refused: its SHA-256"):
        list(read_snapshot(artifacts, record))


@pytest.mark.parametrize(
    ("changes", "items", "message"),
    [
        ({"format": 2}, {}, "format 2, dim 3"),
        ({"dim": 4}, {}, "format 1, dim 4"),
        ({}, {"count": 3}, "it holds 2 rows, not 3"),
    ],
)
def test_manifest_that_does_not_fit_is_refused(
    artifacts: Artifacts,
    record: SnapshotRecord,
    changes: dict[str, Any],
    items: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ArtifactCorrupt, match=message):
        list(read_snapshot(artifacts, signed(artifacts, record, changes, **items)))


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        (["a", "b"], np.ones((2, 4), np.float32), "its columns are not those of dim 3"),
        (["a", "b"], np.full((2, 3), np.nan, np.float32), "NaN or infinite"),
        (["a", ""], np.ones((2, 3), np.float32), "An id has 1 to"),
        (["a"], np.ones((1, 3), np.float32), "it holds 1 rows, not 2"),
    ],
    ids=["dim", "nan", "id", "count"],
)
def test_signed_file_is_still_checked(
    artifacts: Artifacts,
    record: SnapshotRecord,
    names: list[str],
    values: NDArray[np.float32],
    message: str,
) -> None:
    with pytest.raises(ArtifactCorrupt, match=f"item.parquet is refused: .*{message}"):
        list(read_snapshot(artifacts, with_items(artifacts, record, names, values)))


def test_signed_file_that_is_no_parquet_is_refused(
    artifacts: Artifacts, record: SnapshotRecord
) -> None:
    altered(artifacts, record, "item.parquet").write_bytes(b"id,vector\n")
    forged = signed(artifacts, record, {}, sha256=hashlib.sha256(b"id,vector\n").hexdigest())
    with pytest.raises(ArtifactCorrupt, match=r"item\.parquet is refused"):
        list(read_snapshot(artifacts, forged))
