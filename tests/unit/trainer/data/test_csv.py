"""Import from text files: what is read, what is dropped and counted, what is refused and why."""

import gzip
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
import pyarrow.csv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backcast.errors import DataError, InvalidInput
from trainer.data.csv import CsvSource, import_csv
from trainer.data.dataset import Dataset, Manifest
from trainer.data.synth import SynthConfig, synthesize

AMAZON = Path(__file__).parents[5] / "shared" / "data" / "amazon"

GOOD = "user_id,item_id,rating,timestamp\nann,pen,5,30\nbob,cup,4.5,10\n"


def file(folder: Path, text: str | bytes, name: str = "edges.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def imported(folder: Path, text: str | bytes, **options: Any) -> Dataset:
    source = CsvSource(interactions=file(folder, text), **options)
    import_csv(source, folder / "shop", name="shop", overwrite=True)
    return Dataset.read(folder / "shop")


def imported_items(folder: Path, text: str, **options: Any) -> Dataset:
    return imported(folder, GOOD, items=file(folder, text, "items.csv"), **options)


def one_edge(timestamp: str) -> str:
    return f"{GOOD.splitlines()[0]}\nann,pen,5,{timestamp}\n"


def rows(dataset: Dataset) -> list[tuple[str, str, float, int]]:
    return [
        (dataset.user_ids[user], dataset.item_ids[item], float(rating), int(time))
        for user, item, rating, time in zip(
            dataset.users, dataset.items, dataset.ratings, dataset.timestamps, strict=True
        )
    ]


def counts(folder: Path) -> dict[str, int]:
    return dict(Manifest.read(folder / "shop").counts)


def refusal(folder: Path, text: str | bytes, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        imported(folder, text, **options)
    assert not (folder / "shop").exists()
    assert "\n" not in caught.value.message
    return caught.value.message.replace(f"{folder}/", "")


def test_a_plain_file_is_read(tmp_path: Path) -> None:
    dataset = imported(tmp_path, GOOD)
    assert rows(dataset) == [("bob", "cup", 4.5, 10), ("ann", "pen", 5.0, 30)]
    assert dataset.attributes == {}
    assert counts(tmp_path) == {
        "users": 2,
        "items": 2,
        "interactions": 2,
        "unrated_interactions": 0,
        "duplicate_interactions": 0,
        "unlisted_items": 0,
        "malformed_interactions": 0,
    }


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(gzip.compress(GOOD.encode()), id="gzip"),
        pytest.param(gzip.compress(GOOD[:40].encode()) + gzip.compress(GOOD[40:].encode()), id="2"),
        pytest.param(b"\xef\xbb\xbf" + GOOD.encode(), id="byte order mark"),
        pytest.param(GOOD.replace("\n", "\r\n"), id="carriage returns"),
        pytest.param(GOOD.rstrip(), id="no last line end"),
        pytest.param("\n" + GOOD.replace("\n", "\n\n"), id="empty lines"),
        pytest.param(GOOD.replace("ann", '"ann"'), id="quotes"),
        pytest.param(GOOD.replace(",30", ", 30.0 ").replace(",5,", ", 5,"), id="spaces"),
    ],
)
def test_the_same_data_in_other_clothes(tmp_path: Path, text: str | bytes) -> None:
    assert rows(imported(tmp_path, text)) == [("bob", "cup", 4.5, 10), ("ann", "pen", 5.0, 30)]


def test_columns_may_have_other_names_and_order(tmp_path: Path) -> None:
    dataset = imported(
        tmp_path,
        'when;who;note;what;stars\n7;ann;"a;\nb";pen;3\n',
        delimiter=";",
        user_column="who",
        item_column="what",
        rating_column="stars",
        timestamp_column="when",
    )
    assert rows(dataset) == [("ann", "pen", 3.0, 7)]


@pytest.mark.parametrize(
    ("unit", "text", "expected"),
    [
        ("s", "1367366400", 1367366400),
        ("ms", "1367366400999", 1367366400),
        ("ms", "0", 0),
        ("iso", "2013-05-01", 1367366400),
        ("iso", "2013-05-01T02:00:01+02:00", 1367366401),
        ("iso", "2013-05-01 00:00:02Z", 1367366402),
    ],
)
def test_units_of_time(tmp_path: Path, unit: str, text: str, expected: int) -> None:
    dataset = imported(tmp_path, one_edge(text), timestamp_unit=unit)
    assert dataset.timestamps.tolist() == [expected]


def test_ratings_may_be_absent(tmp_path: Path) -> None:
    text = "user_id,item_id,timestamp\nann,pen,3\n"
    assert np.isnan(imported(tmp_path, text, rating_column=None).ratings).all()
    assert counts(tmp_path)["unrated_interactions"] == 1


def test_an_empty_rating_is_none(tmp_path: Path) -> None:
    ratings = imported(tmp_path, GOOD.replace("4.5", "")).ratings
    np.testing.assert_array_equal(ratings, np.array([np.nan, 5.0]))
    assert counts(tmp_path)["unrated_interactions"] == 1


@pytest.mark.parametrize("text", ["5", "5.", "+5", "05", "0.5e1", "50e-1", " 5 "])
def test_ways_to_write_five(tmp_path: Path, text: str) -> None:
    assert imported(tmp_path, GOOD.replace(",5,", f",{text},")).ratings[1] == 5


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("cat,ink,3", "3 columns where the header has 4"),
        ("cat,ink,3,7,8", "5 columns where the header has 4"),
        (",ink,3,7", "user_id is ''; expected an id"),
        ("cat,  ,3,7", "item_id is '  '; expected an id"),
        ('"c\rt",ink,3,7', r"user_id is 'c\rt'; expected an id on one line"),
        ('"c\nt",ink,3,7', r"user_id is 'c\nt'; expected an id on one line"),
        ("cat,ink,good,7", "rating is 'good'; expected a finite number"),
        ("cat,ink,nan,7", "rating is 'nan'; expected a finite number"),
        ("cat,ink,-inf,7", "rating is '-inf'; expected a finite number"),
        ("cat,ink,1e39,7", "rating is '1e39'; expected a finite number"),
        ("cat,ink,1e999,7", "rating is '1e999'; expected a finite number"),
        ("cat,ink,3,", "timestamp is ''; expected whole seconds since 1970"),
        ("cat,ink,3,7.5", "timestamp is '7.5'; expected whole seconds since 1970"),
        ("cat,ink,3,-7", "timestamp is '-7'; expected whole seconds since 1970"),
        ("cat,ink,3,2013-05-01", "timestamp is '2013-05-01'; expected whole seconds"),
        ("cat,ink,3,1367366400000", "expected whole seconds since 1970 (milliseconds need --times"),
        ("cat,ink,3," + "9" * 60, f"timestamp is '{'9' * 40}'…; expected"),
    ],
)
def test_a_malformed_row_is_refused_or_dropped(tmp_path: Path, row: str, problem: str) -> None:
    header, first, second = GOOD.splitlines()
    text = "\n".join([header, first, "", row, second, row])
    message = refusal(tmp_path, text)
    assert message.startswith("edges.csv line 4: ")
    assert problem in message
    assert message.endswith(
        "Malformed rows: 2 of 4. Mend it, or drop such rows with --skip-malformed."
    )
    kept = imported(tmp_path, text, skip_malformed=True)
    assert rows(kept) == [("bob", "cup", 4.5, 10), ("ann", "pen", 5.0, 30)]
    assert counts(tmp_path)["malformed_interactions"] == 2


@pytest.mark.parametrize(
    ("unit", "text", "expected"),
    [
        ("ms", "2013-05-01", "whole milliseconds since 1970"),
        ("ms", "253402300800000", "whole milliseconds since 1970"),
        ("iso", "2013-02-30", "an ISO 8601 date or time after 1970"),
        ("iso", "1969-12-31", "an ISO 8601 date or time after 1970"),
        ("iso", "", "an ISO 8601 date or time after 1970"),
    ],
)
def test_a_time_in_another_unit_is_refused(
    tmp_path: Path, unit: str, text: str, expected: str
) -> None:
    message = refusal(tmp_path, one_edge(text), timestamp_unit=unit)
    assert f"edges.csv line 2: timestamp is {text!r}; expected {expected}" in message


def test_the_first_malformed_row_is_the_one_named(tmp_path: Path) -> None:
    text = GOOD + '"d\nd",pen,bad,5\ncat,ink,3\nann,,1,soon\n'
    assert refusal(tmp_path, text).startswith("edges.csv line 4: rating is 'bad'; expected")
    text = GOOD + "cat,ink,3\nann,,1,soon\n"
    assert refusal(tmp_path, text).startswith("edges.csv line 4: 3 columns where")
    text = GOOD + '"d\r\nd,",pen,1,5\nann,,1,soon\ncat,ink,3\n'
    assert "Malformed rows: 3 of 5" in refusal(tmp_path, text)


def test_lines_are_counted_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.data.csv.BLOCK_BYTES", 100)
    good = [f'u{number},"a\nb",pen,3,{number}\n\n' for number in range(200)]
    header = "user_id,note,item_id,rating,timestamp\n"
    text = header + "".join(good[:100]) + "short\n" + "".join(good[100:]) + "u7,x,pen,bad,5\n"
    assert refusal(tmp_path, text).startswith("edges.csv line 302: 1 columns where")
    without = text.replace("short\n", "")
    assert refusal(tmp_path, without).startswith("edges.csv line 602: rating is 'bad'")
    kept = imported(tmp_path, text, skip_malformed=True)
    assert [kept.user_ids[user] for user in kept.users] == [f"u{n}" for n in range(200)]
    assert counts(tmp_path)["malformed_interactions"] == 2


def test_a_file_of_malformed_rows_only_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, "\n".join([*GOOD.splitlines()[:1], "x", "y"]), skip_malformed=True)
    assert message == (
        "edges.csv line 2: 1 columns where the header has 4. "
        "Malformed rows: 2 of 2. No row is left."
    )


def test_an_unknown_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    columns = "['user_id', 'item_id', 'rating', 'timestamp']"
    assert refusal(tmp_path, GOOD, user_column="customer") == (
        f"edges.csv has no column 'customer'; its columns are {columns}. "
        "Name the right one with --user-column."
    )
    assert refusal(tmp_path, GOOD, rating_column="stars").endswith(
        "Name the right one with --rating-column or --no-rating."
    )
    assert refusal(tmp_path, GOOD.replace(",", ";")) == (
        "edges.csv has no column 'user_id'; its columns are "
        "['user_id;item_id;rating;timestamp']. "
        "Name the right one with --user-column or --delimiter."
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "edges.csv is empty; expected a header line with the column names."),
        ("\n\n", "edges.csv is empty; expected a header line with the column names."),
        (
            gzip.compress(b"", mtime=0),
            "edges.csv is empty; expected a header line with the column names.",
        ),
        (GOOD.splitlines()[0], "edges.csv has a header and no rows; expected at least one."),
        (GOOD.splitlines()[0] + "\n\n", "edges.csv has a header and no rows; expected at least"),
        ("user_id,item_id,user_id\n", "edges.csv names column 'user_id' twice. Rename one of them"),
        (
            gzip.compress(GOOD.encode(), mtime=0)[:-9],
            "edges.csv ends too soon: the gzip file is cut off.",
        ),
        (b"\x1f\x8b\x09garbage", "edges.csv is a damaged gzip file: "),
        (GOOD.encode() + b"\xe9va,pen,3,4\n", "edges.csv line 4 is not UTF-8 (byte 0xe9). Convert"),
        (GOOD.encode("utf-16"), "edges.csv line 1 is not UTF-8 (byte 0xff)."),
        (GOOD + 'cat,"ink,3,7\ndan,pen,1,8\n', "edges.csv line 4: unexpected end of data; is a "),
        (
            GOOD + 'cat,"ink,3,7\ndan,"pen,1,8\n',
            "edges.csv line 4: ',' expected after '\"'; is a quote left open?",
        ),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_a_file_that_is_no_table_is_refused(
    tmp_path: Path, text: str | bytes, message: str, skip: bool
) -> None:
    assert refusal(tmp_path, text, skip_malformed=skip).startswith(message)


def test_a_row_longer_than_a_block_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.csv.BLOCK_BYTES", 64)
    assert refusal(tmp_path, GOOD + "cat," + "x" * 200 + ",3,7\n").startswith(
        "edges.csv cannot be read as a table: straddling object"
    )


def test_quotes_inside_a_value_are_part_of_it(tmp_path: Path) -> None:
    dataset = imported(tmp_path, GOOD.replace("ann", 'a"n').replace("bob", '"b"",b"'))
    assert dataset.user_ids.tolist() == ['b",b', 'a"n']


def test_a_damaged_gzip_body_is_refused(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(GOOD.encode()))
    packed[-6] ^= 1  # in the checksum
    assert "edges.csv is a damaged gzip file: CRC check failed" in refusal(tmp_path, bytes(packed))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, reason in [(tmp_path / "no.csv", "does not exist"), (tmp_path, "cannot be read: Is")]:
        with pytest.raises(DataError, match=f"^{re.escape(str(path))} {reason}"):
            import_csv(CsvSource(path), tmp_path / "shop", name="shop")


def test_a_full_folder_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    file(tmp_path / "shop", "x", "notes.txt")
    with pytest.raises(DataError, match=r"holds 'notes.txt' and is not a data set folder"):
        import_csv(CsvSource(tmp_path / "absent.csv"), tmp_path / "shop", name="shop")


def test_duplicates_and_ties(tmp_path: Path) -> None:
    text = (
        "user_id,item_id,rating,timestamp\n"
        "ann,pen,1,50\nbob,pen,2,20\nann,pen,3,20\nann,cup,4,20\nann,pen,5,20\n"
    )
    assert rows(imported(tmp_path, text)) == [
        ("bob", "pen", 2.0, 20),
        ("ann", "pen", 3.0, 20),
        ("ann", "cup", 4.0, 20),
    ]
    assert counts(tmp_path)["duplicate_interactions"] == 2


ITEMS = "item_id,brand,tags,weight\npen,bic,x|y,3\nhat,,|y||y,\npen,acme,z,9\n"


def attributes(dataset: Dataset) -> dict[str, dict[str, list[str]]]:
    return {
        name: {item: values.of(number) for number, item in enumerate(dataset.item_ids)}
        for name, values in dataset.attributes.items()
    }


def test_items_bring_attributes(tmp_path: Path) -> None:
    dataset = imported_items(tmp_path, ITEMS, list_columns=("tags",))
    assert attributes(dataset) == {
        "brand": {"cup": [], "pen": ["bic"], "hat": []},
        "tags": {"cup": [], "pen": ["x", "y"], "hat": ["y"]},
        "weight": {"cup": [], "pen": ["3"], "hat": []},
    }
    found = counts(tmp_path)
    assert found["duplicate_items"] == found["unlisted_items"] == 1
    assert (found["items"], found["tags_values"], found["malformed_items"]) == (3, 2, 0)


def test_attributes_may_be_chosen(tmp_path: Path) -> None:
    dataset = imported_items(tmp_path, ITEMS, list_columns=("tags",), attributes=("weight",))
    assert list(dataset.attributes) == ["tags", "weight"]
    dataset = imported_items(tmp_path, ITEMS, attributes=("brand",))
    assert attributes(dataset) == {"brand": {"cup": [], "pen": ["bic"], "hat": []}}


def test_items_in_another_style(tmp_path: Path) -> None:
    dataset = imported_items(
        tmp_path,
        "kind,sku\na / b,pen\nc,cup\n",
        item_id_column="sku",
        list_columns=("kind",),
        separator=" / ",
    )
    assert attributes(dataset) == {"kind": {"cup": ["c"], "pen": ["a", "b"]}}


def test_malformed_items_are_refused_or_dropped(tmp_path: Path) -> None:
    text = ITEMS + "cup,x\n,acme,z,1\n"
    with pytest.raises(DataError, match=r"items.csv line 5: 2 columns where .* rows: 2 of 5"):
        imported_items(tmp_path, text)
    dataset = imported_items(tmp_path, text, skip_malformed=True)
    assert sorted(dataset.item_ids) == ["cup", "hat", "pen"]
    assert counts(tmp_path)["malformed_items"] == 2


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "items.csv is empty"),
        ("item_id,brand\n", {}, "items.csv has a header and no rows"),
        (ITEMS, {"item_id_column": "sku"}, "no column 'sku'.*with --item-id-column."),
        (ITEMS, {"list_columns": ("kinds",)}, "no column 'kinds'.*with --list-column."),
        (ITEMS, {"attributes": ("size",)}, "no column 'size'.*with --attribute."),
        (",item_id\n0,pen\n", {}, "a column without a name"),
        ("sku,item_id\n0,pen\n", {"item_id_column": "sku"}, "a second column item_id"),
    ],
)
def test_a_bad_items_file_is_refused(
    tmp_path: Path, text: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        imported_items(tmp_path, text, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delimiter": ""}, "--delimiter is ''; expected one ASCII character"),
        ({"delimiter": "||"}, "--delimiter is '||'"),
        ({"delimiter": '"'}, "--delimiter is '\"'"),
        ({"delimiter": "→"}, "--delimiter is '→'"),
        ({"separator": ""}, "--separator is empty"),
        ({"timestamp_unit": "h"}, "--timestamp-unit is 'h'; expected one of ['s', 'ms', 'iso']"),
        ({"item_column": "user_id"}, "Column 'user_id' is named for two purposes"),
        ({"items": Path("i"), "list_columns": ("a", "a")}, "Column 'a' is named for two purposes"),
        ({"items": Path("i"), "attributes": ("item_id",)}, "Column 'item_id' is named for two"),
        ({"attributes": ("brand",)}, "no items file. Add --items FILE"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        CsvSource(Path("edges.csv"), **options)


def test_the_source_is_recorded(tmp_path: Path) -> None:
    imported_items(tmp_path, ITEMS)
    assert Manifest.read(tmp_path / "shop").source == {
        "importer": "csv",
        "interactions": {
            "file": "edges.csv",
            "sha256": hashlib.sha256(GOOD.encode()).hexdigest(),
        },
        "items": {"file": "items.csv", "sha256": hashlib.sha256(ITEMS.encode()).hexdigest()},
    }


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "\n", "\n\n"]),
            st.sampled_from(["ann", '"b\nb"', '"c,""c"', ""]),
            st.sampled_from(["1", "x", "2,3", '"4"']),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_the_line_named_is_that_of_the_first_malformed_row(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[str, str, str]]
) -> None:
    text, malformed = "user_id,item_id,rating,timestamp\n", []
    for empty_lines, user, rating in lines:
        text += empty_lines
        if user in ("", '"b\nb"') or rating in ("x", "2,3"):
            malformed.append(text.count("\n") + 1)
        text += f"{user},pen,{rating},5\n"
    folder = tmp_path_factory.mktemp("lines")
    if malformed:
        expected = f"edges.csv line {malformed[0]}: "
        message = refusal(folder, text)
        assert message.startswith(expected)
        assert f"Malformed rows: {len(malformed)} of {len(lines)}." in message
    else:
        assert len(imported(folder, text).users) <= len(lines)


def real_files(folder: Path) -> tuple[CsvSource, dict[str, int]]:
    """The Amazon review graph where it lies beside the project, else a generated one."""
    if AMAZON.exists():
        files = AMAZON / "interactions.csv.gz", AMAZON / "items.csv.gz"
        expected = {
            "users": 6170,
            "items": 2753,
            "interactions": 195_791,
            "brand_values": 334,
            "categories_values": 22,
        }
    else:
        print(f"{AMAZON} is absent: the import is tested on generated data.")  # noqa: T201
        config = SynthConfig(users=500, items=200, interactions=8000)
        edges, items = synthesize(config)
        joined = pyarrow.compute.binary_join(items["categories"], "|")
        items = items.set_column(2, "categories", joined)
        files = folder / "interactions.csv", folder / "items.csv"
        pyarrow.csv.write_csv(edges, files[0])
        pyarrow.csv.write_csv(items, files[1])
        expected = {
            "users": 500,
            "items": 200,
            "interactions": 8000,
            "brand_values": config.brand_count,
            "categories_values": config.category_count,
        }
    return CsvSource(*files, list_columns=("categories",)), expected


def check_real_files(folder: Path) -> None:
    source, expected = real_files(folder)
    found = import_csv(source, folder / "shop", name="shop")
    dropped = {"duplicate_interactions", "unlisted_items", "malformed_interactions"}
    dropped |= {"malformed_items", "duplicate_items", "unrated_interactions"}
    assert found == expected | dict.fromkeys(dropped, 0)
    dataset = Dataset.read(folder / "shop")
    assert len(dataset.users) == expected["interactions"]
    assert (np.diff(dataset.timestamps) >= 0).all()
    assert set(np.unique(dataset.ratings)) == {1, 2, 3, 4, 5}
    assert (np.diff(dataset.attributes["brand"].offsets) == 1).all()


def test_real_files_are_imported(tmp_path: Path) -> None:
    check_real_files(tmp_path)


def test_the_stand_in_for_the_real_files_works_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"{__name__}.AMAZON", tmp_path / "absent")
    check_real_files(tmp_path)
    assert "absent is absent: the import is tested on generated data." in capsys.readouterr().out
