"""Files of vectors: what is written is read, and what is none is refused by name."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from backcast.errors import DimensionMismatch, InvalidInput
from backcast.vector_files import read_vector_file, write_vector_file
from backcast.vectors import VectorBatch
from backcast.versions import Entity

ROWS = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
FIXED = pa.array(ROWS, pa.list_(pa.float32(), 2))


def parquet(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def arrow(path: Path, **columns: Any) -> Path:
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("write", [parquet, arrow])
@pytest.mark.parametrize(
    "vectors",
    [
        FIXED,
        pa.array(ROWS),
        pa.array(ROWS, pa.large_list(pa.float32())),
        pa.array(ROWS, pa.list_(pa.float64(), 2)),
    ],
    ids=lambda column: str(column.type),
)
def test_lists_of_any_floats_are_read(tmp_path: Path, write: Any, vectors: pa.Array) -> None:
    path = write(tmp_path / "file", id=["a", "b", "c"], vector=vectors)
    [batch] = read_vector_file(path, Entity.USER, 3).batches
    assert (batch.entity, list(batch.ids)) == (Entity.USER, ["a", "b", "c"])
    assert batch.vectors.dtype == np.float32
    assert batch.vectors.tolist() == ROWS


@pytest.mark.parametrize("write", [parquet, arrow])
def test_column_says_which_kind_an_id_is_of(tmp_path: Path, write: Any) -> None:
    kinds = ["user", "item", "user"]
    path = write(tmp_path / "file", entity=kinds, id=["a", "a", "b"], vector=FIXED)
    found = {b.entity: (list(b.ids), b.vectors.tolist()) for b in _read(path).batches}
    assert found == {
        Entity.ITEM: (["a"], [[3.0, 4.0]]),
        Entity.USER: (["a", "b"], [[1.0, 2.0], [5.0, 6.0]]),
    }


def _read(path: Path) -> Any:
    return read_vector_file(path, Entity.ITEM, 10)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path, told = tmp_path / "file.parquet", list[int]()
    path.write_bytes(b"an older one")
    batches = [
        VectorBatch(Entity.USER, ["a", "b"], np.array(ROWS[:2])),
        VectorBatch(Entity.ITEM, ["a"], np.array(ROWS[2:])),
    ]
    assert write_vector_file(path, 2, batches, {"version": 3}, told.append) == 3
    assert told == [2, 3]
    found = _read(path)
    assert found.version == 3
    assert {b.entity: b.vectors.tolist() for b in found.batches} == {
        Entity.USER: ROWS[:2],
        Entity.ITEM: ROWS[2:],
    }
    assert pq.read_schema(path).field("vector").type == pa.list_(pa.float32(), 2)


def test_file_that_cannot_be_finished_leaves_the_older_one(tmp_path: Path) -> None:
    path = tmp_path / "file.parquet"
    path.write_bytes(b"an older one")
    batches = [VectorBatch(Entity.USER, ["a"], np.ones((1, n), np.float32)) for n in (2, 3)]
    with pytest.raises(DimensionMismatch, match="expected 2, got 3"):
        write_vector_file(path, 2, batches, {})
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"an older one"


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for out in (pipe, tmp_path):
        with pytest.raises(InvalidInput, match="is no file that could be replaced"):
            write_vector_file(out, 2, [], {})
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a"]}, "has columns id; expected are id, vector and perhaps entity"),
        ({"id": ["a"], "vector": FIXED[:1], "more": [1]}, "has columns id, vector, more"),
        ({"id": [1], "vector": FIXED[:1]}, "column id is of type int64, not string"),
        ({"id": [None, "a"], "vector": FIXED[:2]}, "column id holds nulls"),
        ({"id": ["a"], "vector": [1.0]}, "column vector is of type double, not a list of floats"),
        ({"id": ["a"], "vector": [[1]]}, "column vector is of type list<element: int64>"),
        ({"id": ["a"], "vector": [[1.0, None]]}, "a number in column vector is null"),
        ({"id": ["a", "b"], "vector": [[1.0], [1.0, 2.0]]}, r"one length, got lengths \[1, 2\]"),
        ({"id": ["a"], "vector": FIXED[:1], "entity": ["shop"]}, "other than item, user"),
        ({"id": ["a"], "vector": [[float("nan")]]}, "NaN or infinite"),
        ({"id": [f"{n}" for n in range(11)], "vector": [[1.0]] * 11}, "11 vectors; at most"),
    ],
)
def test_what_is_none_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        _read(parquet(tmp_path / "file", **columns))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"", b"id,vector\n", b"ARROW1 and nothing"):
        path.write_bytes(content)
        with pytest.raises(InvalidInput, match="cannot be read as Parquet or Arrow"):
            _read(path)
    table = pa.table({"id": ["a"], "vector": FIXED[:1]}).replace_schema_metadata({"version": "x"})
    pq.write_table(table, path)
    with pytest.raises(InvalidInput, match="names version 'x'"):
        _read(path)
