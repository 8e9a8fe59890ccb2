"""The data set folder: what is written is what is read, and nothing else is accepted."""

import hashlib
import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backcast.errors import DataError, InvalidInput
from trainer.data.dataset import (
    Dataset,
    Manifest,
    MultiHot,
    iso_seconds,
    resolve_until,
    write_dataset,
)

Edge = tuple[str, str, float | None, int]

EDGES: list[Edge] = [
    ("ann", "pen", 5.0, 30),
    ("bob", "cup", None, 10),
    ("ann", "cup", 2.0, 20),
    ("cat", "pen", 4.0, 20),
    ("ann", "pen", 1.0, 40),
    ("bob", "ink", 3.5, 40),
]
ITEMS: dict[str, Sequence[Any]] = {
    "item_id": ["hat", "pen", "cup"],
    "brand": ["acme", "bic", None],
    "tags": [["x", "y"], ["y", "", "y", None, "z"], []],
}


def edge_table(edges: Sequence[Edge]) -> pa.Table:
    users, items, ratings, times = zip(*edges, strict=True)
    return pa.table(
        {
            "user_id": pa.array(users, pa.string()),
            "item_id": pa.array(items, pa.string()),
            "rating": pa.array(ratings, pa.float32()),
            "timestamp": pa.array(times, pa.int64()),
        }
    )


def item_table(columns: Mapping[str, Sequence[Any]] = ITEMS) -> pa.Table:
    types = {"tags": pa.list_(pa.string())}
    return pa.table(
        {name: pa.array(values, types.get(name, pa.string())) for name, values in columns.items()}
    )


def written(folder: Path, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "interactions": edge_table(EDGES),
        "items": item_table(),
        "name": "shop",
        "source": {"importer": "test"},
        "counts": {"malformed_interactions": 3},
    }
    write_dataset(folder, **(arguments | changes))
    return folder


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    return written(tmp_path / "shop")


def test_edges_come_in_time_order_and_numbers_follow_first_appearance(shop: Path) -> None:
    dataset = Dataset.read(shop)
    assert dataset.name == "shop"
    assert dataset.folder == shop
    assert dataset.user_ids.tolist() == ["bob", "ann", "cat"]
    assert dataset.item_ids.tolist() == ["cup", "pen", "ink", "hat"]
    assert dataset.users.tolist() == [0, 1, 2, 1, 0]
    assert dataset.items.tolist() == [0, 0, 1, 1, 2]
    assert dataset.timestamps.tolist() == [10, 20, 20, 30, 40]
    np.testing.assert_array_equal(dataset.ratings, np.array([np.nan, 2, 4, 5, 3.5]))


def test_arrays_have_the_stated_types_and_can_be_written(shop: Path) -> None:
    dataset = Dataset.read(shop)
    assert {str(a.dtype) for a in (dataset.users, dataset.items, dataset.timestamps)} == {"int64"}
    assert dataset.ratings.dtype == np.float32
    assert dataset.user_ids.dtype == dataset.item_ids.dtype == np.object_
    # torch.from_numpy warns of arrays that cannot be.
    assert all(a.flags.writeable for a in (dataset.users, dataset.items, dataset.ratings))


def test_attributes_are_lists_of_distinct_values_in_item_order(shop: Path) -> None:
    attributes = Dataset.read(shop).attributes
    assert list(attributes) == ["brand", "tags"]
    brand, tags = attributes["brand"], attributes["tags"]
    assert [brand.of(item) for item in range(4)] == [[], ["bic"], [], ["acme"]]
    assert [tags.of(item) for item in range(4)] == [[], ["y", "z"], [], ["x", "y"]]
    assert tags.offsets.tolist() == [0, 0, 2, 2, 4]
    assert tags.values.tolist() == ["y", "z", "x", "y"]
    assert tags.offsets.dtype == np.int64
    assert len(tags) == 4


def test_counts_say_what_was_done(shop: Path) -> None:
    manifest = Manifest.read(shop)
    assert manifest.counts == {
        "users": 3,
        "items": 4,
        "interactions": 5,
        "unrated_interactions": 1,
        "brand_values": 2,
        "tags_values": 3,
        "duplicate_interactions": 1,
        "unlisted_items": 1,
        "malformed_interactions": 3,
    }
    assert manifest.source == {"importer": "test"}


def test_the_fingerprint_is_made_of_the_two_checksums(shop: Path) -> None:
    checksums = [
        hashlib.sha256((shop / file).read_bytes()).hexdigest()
        for file in ("interactions.parquet", "items.parquet")
    ]
    assert list(Manifest.read(shop).checksums.values()) == checksums
    expected = hashlib.sha256("".join(checksums).encode()).hexdigest()
    assert Dataset.read(shop).fingerprint == Manifest.read(shop).fingerprint == expected


def test_equal_data_has_an_equal_fingerprint_whatever_its_name(tmp_path: Path, shop: Path) -> None:
    same = written(tmp_path / "same", name="other", counts={}, source={})
    differing = written(tmp_path / "differing", interactions=edge_table(EDGES[:-1]))
    assert Manifest.read(same).fingerprint == Manifest.read(shop).fingerprint
    assert Manifest.read(differing).fingerprint != Manifest.read(shop).fingerprint


def test_the_files_have_the_documented_schema(shop: Path) -> None:
    assert pq.read_schema(shop / "interactions.parquet").equals(
        pa.schema(
            [
                ("user_id", pa.string()),
                ("item_id", pa.string()),
                ("rating", pa.float32()),
                ("timestamp", pa.int64()),
            ]
        )
    )
    assert sorted(path.name for path in shop.iterdir()) == [
        "dataset.json",
        "interactions.parquet",
        "items.parquet",
    ]


def test_related_types_are_cast(tmp_path: Path) -> None:
    edges = pa.table(
        {
            "timestamp": pa.array([2.0, 1.0]),
            "rating": pa.array([math.nan, 4.5], pa.float64()),
            "item_id": pa.array(["pen", "pen"]).dictionary_encode(),
            "user_id": pa.array(["ann", "bob"], pa.large_string()),
        }
    )
    items = pa.table(
        {
            "item_id": pa.array(["pen"], pa.large_string()),
            "brand": pa.array(["bic"]).dictionary_encode(),
            "tags": pa.array([["x"]], pa.large_list(pa.large_string())),
            "colour": pa.nulls(1),
        }
    )
    dataset = Dataset.read(written(tmp_path / "shop", interactions=edges, items=items))
    assert dataset.timestamps.tolist() == [1, 2]
    assert dataset.user_ids.tolist() == ["bob", "ann"]
    np.testing.assert_array_equal(dataset.ratings, np.array([4.5, np.nan]))
    assert {name: values.of(0) for name, values in dataset.attributes.items()} == {
        "brand": ["bic"],
        "tags": ["x"],
        "colour": [],
    }
    assert Manifest.read(tmp_path / "shop").counts["unrated_interactions"] == 1


def changed(table: pa.Table, column: str, values: pa.Array) -> pa.Table:
    return table.set_column(table.column_names.index(column), column, values)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("timestamp", pa.array([5, -5]), "timestamp of row 2 is -5; expected seconds from 0"),
        ("timestamp", pa.array([10**12, 5]), "timestamp of row 1 is 1000000000000; expected sec"),
        ("timestamp", pa.array([5, None]), "timestamp of row 2 is None"),
        ("timestamp", pa.array([5, math.inf]), "timestamp of row 2 is inf; expected whole seconds"),
        ("timestamp", pa.array([math.nan, 1.0]), "timestamp of row 1 is nan; expected whole"),
        ("timestamp", pa.array([5, 1.5]), "timestamp of row 2 is 1.5; expected whole seconds"),
        ("timestamp", pa.array([5, 1e300]), "timestamp cannot be read as int64"),
        ("timestamp", pa.array(["5", "6"]), "timestamp is string; expected int64"),
        ("rating", pa.array([1.0, math.inf]), "rating of row 2 is inf; expected a finite number"),
        ("rating", pa.array(["1", "2"]), "rating is string; expected float"),
        ("user_id", pa.array(["ann", None]), "user_id of row 2 is None; expected a string"),
        ("user_id", pa.array([1, 2]), "user_id is int64; expected string"),
        ("item_id", pa.array(["", "pen"]), "item_id of row 1 is ''; expected a string"),
    ],
)
def test_a_bad_interaction_is_refused(
    tmp_path: Path, column: str, values: pa.Array, message: str
) -> None:
    edges = changed(edge_table(EDGES[:2]), column, values)
    with pytest.raises(DataError, match=f"^interactions: {message}"):
        written(tmp_path / "shop", interactions=edges)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (item_table({"brand": ["x"]}), r"has no column 'item_id'; its columns are \['brand'\]"),
        (item_table().slice(0, 0), "has no rows; a data set needs at least one"),
        (item_table({"item_id": ["pen", "pen"]}), "lists item 'pen' twice. Keep one row"),
        (item_table({"item_id": ["pen", None]}), ": item_id of row 2 is None"),
        (pa.table({"item_id": ["pen"], "price": [3]}), ": price is int64; expected string"),
        (pa.table({"item_id": ["pen"], "x": [[3]]}), r": x is list<.*int64>; expected list<"),
        (pa.table([["pen"], ["a"], ["b"]], ["item_id", "x", "x"]), "names a column twice"),
    ],
)
def test_a_bad_items_table_is_refused(tmp_path: Path, items: pa.Table, message: str) -> None:
    with pytest.raises(DataError, match=f"^items ?{message}"):
        written(tmp_path / "shop", items=items)


def test_wrong_columns_and_no_interactions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"interactions has the columns .*; expected"):
        written(tmp_path / "shop", interactions=edge_table(EDGES).drop_columns(["rating"]))
    with pytest.raises(DataError, match="interactions has no rows"):
        written(tmp_path / "shop", interactions=edge_table(EDGES).slice(0, 0))


def test_an_existing_data_set_is_replaced_only_when_told(shop: Path) -> None:
    with pytest.raises(
        DataError, match=r"already holds a data set. Name a new folder, or .* --overwrite"
    ):
        written(shop)
    written(shop, name="second", overwrite=True)
    assert Dataset.read(shop).name == "second"
    assert [path.name for path in shop.parent.iterdir()] == ["shop"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("has_data", [False, True])
def test_a_folder_with_other_files_is_never_touched(
    tmp_path: Path, has_data: bool, overwrite: bool
) -> None:
    folder = written(tmp_path / "shop") if has_data else tmp_path / "shop"
    folder.mkdir(exist_ok=True)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"holds 'thesis.txt' and is not a data set folder"):
        written(folder, overwrite=overwrite)
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_an_empty_folder_and_absent_parents_will_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert Dataset.read(written(tmp_path / "empty")).name == "shop"
    assert Dataset.read(written(tmp_path / "a" / "b")).name == "shop"


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file cannot be a data set folder: Not a directory"):
        written(tmp_path / "file")
    with pytest.raises(DataError, match="inside cannot be a data set folder: Not a directory"):
        written(tmp_path / "file" / "inside")


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 250)  # the draft's name beside it is too long for a file system
    with pytest.raises(DataError, match="cannot be written: File name too long"):
        written(folder)


def test_a_failure_in_the_middle_leaves_what_was_there(shop: Path) -> None:
    with pytest.raises(TypeError):
        written(shop, overwrite=True, name="second", source={"not json": object()})
    assert Dataset.read(shop).name == "shop"
    assert [path.name for path in shop.parent.iterdir()] == ["shop"]


def test_a_failure_of_the_exchange_puts_the_old_data_set_back(
    shop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".new":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(DataError, match="shop cannot be written: Input/output error"):
        written(shop, overwrite=True, name="second")
    assert Dataset.read(shop).name == "shop"
    assert [path.name for path in shop.parent.iterdir()] == ["shop"]


def test_a_kill_leaves_a_whole_data_set(tmp_path: Path) -> None:
    loop = (
        "import sys; from pathlib import Path; from tests.unit.trainer.data.test_dataset import *\n"
        "while True: written(Path(sys.argv[1]), overwrite=True); print(flush=True)"
    )
    root = Path(__file__).parents[4]
    for number in range(2):
        folder = tmp_path / str(number) / "shop"
        command = [sys.executable, "-c", loop, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(0.003 + 0.004 * number)
            process.send_signal(signal.SIGKILL)
        whole = folder if folder.exists() else next(folder.parent.glob(".shop.*.old"))
        assert len(Dataset.read(whole).users) == 5


def spoiled(folder: Path, **changes: Any) -> Path:
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(content | changes))
    return folder


def resealed(folder: Path, file: str, table: pa.Table) -> Path:
    """Write ``table`` in the place of a file, with a checksum that fits."""
    pq.write_table(table, folder / file)
    checksums = dict(Manifest.read(folder).checksums)
    checksums[file] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    return spoiled(folder, checksums=checksums)


def test_a_folder_that_is_no_data_set_is_named(tmp_path: Path, shop: Path) -> None:
    with pytest.raises(DataError, match=r"absent is not a data set folder: dataset.json: No such"):
        Dataset.read(tmp_path / "absent")
    for content in ("{", "[]", "{}", '{"format": 1}', "\xff"):
        (shop / "dataset.json").write_text(content, encoding="latin-1")
        with pytest.raises(DataError, match=r"dataset.json does not describe a data set"):
            Dataset.read(shop)


def test_another_format_is_named(shop: Path) -> None:
    with pytest.raises(DataError, match="format 2, where this release reads 1"):
        Dataset.read(spoiled(shop, format=2))


@pytest.mark.parametrize("file", ["interactions.parquet", "items.parquet"])
def test_a_changed_or_missing_file_is_named(shop: Path, file: str) -> None:
    content = bytearray((shop / file).read_bytes())
    content[len(content) // 2] ^= 1
    (shop / file).write_bytes(content)
    with pytest.raises(DataError, match=rf"{file} is not the file that dataset.json describes"):
        Dataset.read(shop)
    (shop / file).unlink()
    with pytest.raises(DataError, match=rf"{file} cannot be read: No such file"):
        Dataset.read(shop)


def test_a_file_that_is_not_parquet_is_named(shop: Path) -> None:
    (shop / "items.parquet").write_bytes(b"item_id\npen\n")
    checksums = dict(Manifest.read(shop).checksums)
    checksums["items.parquet"] = hashlib.sha256(b"item_id\npen\n").hexdigest()
    with pytest.raises(DataError, match=r"items.parquet is not readable Parquet"):
        Dataset.read(spoiled(shop, checksums=checksums))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (edge_table(EDGES).drop_columns(["rating"]), "has the columns"),
        (
            changed(edge_table(EDGES[:1]), "timestamp", pa.array([1], pa.int32())),
            "timestamp is int32; expected int64",
        ),
        (edge_table(EDGES).slice(0, 0), "has no rows"),
        (edge_table(EDGES[:2]), "is not in the order of time"),
        (edge_table([EDGES[0], EDGES[4]]), r"holds a \(user, item\) pair twice"),
        (edge_table([("ann", "", 1.0, 1)]), "item_id of row 1 is ''"),
        (edge_table([("ann", "car", 1.0, 1)]), "items.parquet lacks item 'car'"),
    ],
)
def test_stored_interactions_that_break_the_format_are_refused(
    shop: Path, table: pa.Table, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Dataset.read(resealed(shop, "interactions.parquet", table))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.table({"brand": ["bic"]}), "has no column 'item_id'"),
        (pa.table([["pen"], ["a"], ["b"]], ["item_id", "x", "x"]), "is not readable Parquet"),
        (pa.table({"item_id": ["pen"], "price": [1.5]}), "price is double; expected string"),
        (pa.table({"item_id": ["pen", "pen"]}), "lists item 'pen' twice"),
        (pa.table({"item_id": [7]}), "item_id is int64; expected string"),
    ],
)
def test_stored_items_that_break_the_format_are_refused(
    shop: Path, table: pa.Table, message: str
) -> None:
    with pytest.raises(DataError, match=rf"items\.parquet:? {message}"):
        Dataset.read(resealed(shop, "items.parquet", table))


def test_what_is_known_at_a_moment_is_a_prefix(shop: Path) -> None:
    dataset = Dataset.read(shop)
    known = {
        until: (
            dataset.edges_until(until),
            dataset.users_known(until),
            dataset.items_known(until),
        )
        for until in (9, 10, 20, 39, 40, 99)
    }
    assert known == {
        9: (0, 0, 0),
        10: (1, 1, 1),
        20: (3, 3, 2),
        39: (4, 3, 2),
        40: (5, 3, 3),
        99: (5, 3, 3),
    }


@pytest.mark.parametrize(
    ("until", "expected"),
    [
        (0.2, 10),
        (0.21, 20),
        ("0.4", 20),
        (0.6, 20),
        (0.8, 30),
        (1, 40),
        (1.0, 40),
        ("1", 40),
        (10, 10),
        (25, 25),
        ("25", 25),
        (25.0, 25),
        (1000, 40),
        ("1970-01-01T00:00:35", 35),
        ("1970-01-01T01:00:35+01:00", 35),
        ("1970-01-02", 40),
    ],
)
def test_a_moment_has_many_names(shop: Path, until: str | float, expected: int) -> None:
    assert resolve_until(Dataset.read(shop), until) == expected


def test_a_fraction_counts_edges_exactly(tmp_path: Path) -> None:
    edges = [("ann", f"i{n}", 1.0, 100 + n) for n in range(30)]
    dataset = Dataset.read(written(tmp_path / "shop", interactions=edge_table(edges)))
    # In floating point 0.1 * 30 is a little more than 3, and its ceiling 4.
    assert resolve_until(dataset, 0.1) == 102
    assert resolve_until(dataset, "0.1000001") == 103
    assert [dataset.edges_until(resolve_until(dataset, f / 10)) for f in range(1, 11)] == [
        3 * f for f in range(1, 11)
    ]


@pytest.mark.parametrize(
    "until",
    [0, "0", -0.5, 1.5, "nan", math.inf, "soon", "", "2013-13-01", 10**12, -7, "0001-01-01"],
)
def test_what_is_no_moment_is_refused(shop: Path, until: str | float) -> None:
    with pytest.raises(InvalidInput, match=r"is no moment. Give a fraction of the edges"):
        resolve_until(Dataset.read(shop), until)


def test_a_moment_before_all_interactions_is_refused(shop: Path) -> None:
    with pytest.raises(InvalidInput, match=r"9 is before the first interaction of shop, at 10 \(1"):
        resolve_until(Dataset.read(shop), 9)


def test_iso_texts() -> None:
    assert iso_seconds("2013-05-01") == 1367366400
    assert iso_seconds("2013-05-01T12:00:00.9Z") == 1367366400 + 43200
    assert iso_seconds("2013-05-01 02:00+02:00") == 1367366400
    assert iso_seconds("1969-12-31T23:59:59.5") == -1
    assert iso_seconds("2013-02-30") is None


def test_multi_hot_of_a_column_without_values() -> None:
    values = MultiHot.from_column(pa.chunked_array([pa.array([None, ""], pa.string())]))
    assert values.offsets.tolist() == [0, 0, 0]
    assert values.of(1) == []


names = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=3)
few = st.sampled_from(["a", "b", "c", "ü", "d e"])
edges_strategy = st.lists(
    st.tuples(
        few,
        few,
        st.none() | st.floats(-10, 10, width=32),
        st.integers(0, 5) | st.integers(0, 253_402_300_799),
    ),
    min_size=1,
    max_size=30,
)
items_strategy = st.dictionaries(
    few | names, st.tuples(st.none() | names, st.lists(names, max_size=4)), min_size=1, max_size=8
)


@settings(deadline=None, max_examples=60)
@given(edges=edges_strategy, items=items_strategy)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    edges: list[Edge],
    items: dict[str, tuple[str | None, list[str]]],
) -> None:
    columns: dict[str, list[Any]] = {
        "item_id": list(items),
        "brand": [brand for brand, _ in items.values()],
        "tags": [tags for _, tags in items.values()],
    }
    folder = tmp_path_factory.mktemp("round") / "shop"
    dataset = Dataset.read(
        written(folder, interactions=edge_table(edges), items=item_table(columns))
    )

    earliest: dict[tuple[str, str], Edge] = {}
    for edge in sorted(edges, key=lambda edge: edge[3]):
        earliest.setdefault((edge[0], edge[1]), edge)
    kept = list(earliest.values())
    seen_users = list(dict.fromkeys(edge[0] for edge in kept))
    seen_items = list(dict.fromkeys(edge[1] for edge in kept))
    all_items = seen_items + [item for item in items if item not in seen_items]

    assert dataset.user_ids.tolist() == seen_users
    assert dataset.item_ids.tolist() == all_items
    assert [
        (
            dataset.user_ids[user],
            dataset.item_ids[item],
            None if math.isnan(rating) else float(rating),
            int(time),
        )
        for user, item, rating, time in zip(
            dataset.users, dataset.items, dataset.ratings, dataset.timestamps, strict=True
        )
    ] == kept
    for number, item in enumerate(all_items):
        brand, tags = items.get(item, (None, []))
        assert dataset.attributes["brand"].of(number) == ([brand] if brand else [])
        assert dataset.attributes["tags"].of(number) == list(dict.fromkeys(tags))
    counts = Manifest.read(folder).counts
    assert counts["duplicate_interactions"] == len(edges) - len(kept)
    assert counts["unlisted_items"] == len(set(seen_items) - set(items))
