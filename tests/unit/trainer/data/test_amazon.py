"""Import of the Amazon review dumps: both layouts, what is dropped and counted, what is refused."""

import ast
import gzip
import hashlib
import json
import random
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from backcast.errors import DataError, InvalidInput
from trainer.data.amazon import AmazonSource, import_amazon
from trainer.data.cli import app
from trainer.data.dataset import Dataset, Manifest

Record = dict[str, Any]

DAY = 86_400
SEPTEMBER = 1_472_688_000
"""2016-09-01."""


def review(user: str, item: str, rating: float = 5, time: str = "09 1, 2016") -> Record:
    return {"overall": rating, "reviewTime": time, "reviewerID": user, "asin": item}


def in_2014(user: str, item: str, rating: float, time: int) -> Record:
    return {"reviewerID": user, "asin": item, "overall": rating, "unixReviewTime": time}


def product(item: str, brand: str = "", *categories: str) -> Record:
    return {"category": list(categories), "brand": brand, "asin": item}


def as_json(records: Iterable[Record]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def as_literals(records: Iterable[Record]) -> bytes:
    return b"".join(repr(record).encode() + b"\n" for record in records)


REVIEWS = as_json([review("ann", "pen"), review("bob", "cup", 2, "12 31, 2015")])
META = as_json([product("pen", "bic", "Office"), product("cup", "ikea", "Home", "Kitchen")])


def source(folder: Path, reviews: bytes, meta: bytes, **options: Any) -> AmazonSource:
    (folder / "reviews.json").write_bytes(reviews)
    (folder / "meta.json").write_bytes(meta)
    options = {"min_value_count": 1, **options}
    return AmazonSource(folder / "reviews.json", folder / "meta.json", **options)


def imported(folder: Path, reviews: bytes = REVIEWS, meta: bytes = META, **options: Any) -> Dataset:
    dumps = source(folder, reviews, meta, **options)
    found = import_amazon(dumps, folder / "shop", name="shop", overwrite=True)
    assert found == Manifest.read(folder / "shop").counts
    return Dataset.read(folder / "shop")


def counts(folder: Path) -> dict[str, int]:
    return dict(Manifest.read(folder / "shop").counts)


def rows(dataset: Dataset) -> list[tuple[str, str, float, int]]:
    return [
        (dataset.user_ids[user], dataset.item_ids[item], float(rating), int(time))
        for user, item, rating, time in zip(
            dataset.users, dataset.items, dataset.ratings, dataset.timestamps, strict=True
        )
    ]


def values(dataset: Dataset, attribute: str) -> dict[str, list[str]]:
    found = dataset.attributes[attribute]
    return {item: found.of(number) for number, item in enumerate(dataset.item_ids)}


def refusal(folder: Path, reviews: bytes = REVIEWS, meta: bytes = META, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        imported(folder, reviews, meta, **options)
    assert not (folder / "shop").exists()
    assert "\n" not in caught.value.message
    return caught.value.message.replace(f"{folder}/", "")


# --- layouts --------------------------------------------------------------------------------------


def test_the_layout_of_2018(tmp_path: Path) -> None:
    dataset = imported(tmp_path)
    assert rows(dataset) == [
        ("bob", "cup", 2, SEPTEMBER - 245 * DAY),
        ("ann", "pen", 5, SEPTEMBER),
    ]
    assert list(dataset.attributes) == ["brand", "categories"]
    assert values(dataset, "brand") == {"cup": ["ikea"], "pen": ["bic"]}
    assert values(dataset, "categories") == {"cup": ["Home", "Kitchen"], "pen": ["Office"]}
    assert counts(tmp_path) == {
        "users": 2,
        "items": 2,
        "interactions": 2,
        "unrated_interactions": 0,
        "brand_values": 2,
        "categories_values": 3,
        "duplicate_interactions": 0,
        "unlisted_items": 0,
        "malformed_interactions": 0,
        "malformed_items": 0,
        "interactions_without_metadata": 0,
        "items_without_metadata": 0,
        "disagreeing_times": 0,
        "duplicate_items": 0,
        "markup_brand_values": 0,
        "markup_categories_values": 0,
        "rare_brand_values": 0,
        "rare_categories_values": 0,
    }


def test_the_layout_of_2014(tmp_path: Path) -> None:
    reviews = [in_2014("ann", "pen", 5, SEPTEMBER), in_2014("bob", "cup", 2, SEPTEMBER - 245 * DAY)]
    meta = [
        {"asin": "pen", "title": 'The "pen"', "brand": "bic", "categories": [["Office"]]},
        {"asin": "cup", "categories": [["Home", "Kitchen"], ["Home"]], "brand": "ikea"},
    ]
    older = imported(tmp_path, as_json(reviews), as_literals(meta))
    assert older.fingerprint == imported(tmp_path).fingerprint


def test_python_literals_may_hold_what_json_may_not(tmp_path: Path) -> None:
    meta = (
        b"{'asin': u'pen', 'brand': \"O'Neill\", 'price': None,"
        b" 'categories': [['\\x42\\d', 'B\\\\d']]}\n"
        b"{'asin': 'cup', 'brand': 'Caf\xc3\xa9', 'categories': (('Home',),)}\n"
    )
    dataset = imported(tmp_path, meta=meta)
    assert values(dataset, "brand") == {"cup": ["Café"], "pen": ["O'Neill"]}
    assert values(dataset, "categories") == {"cup": ["Home"], "pen": ["B\\d"]}


def test_both_layouts_may_stand_in_one_file(tmp_path: Path) -> None:
    first, second = META.splitlines(keepends=True)
    mixed = first + as_literals([ast.literal_eval(second.decode())])
    assert imported(tmp_path, meta=mixed).fingerprint == imported(tmp_path).fingerprint


@pytest.mark.parametrize(
    "dressed",
    [
        pytest.param(gzip.compress, id="gzip"),
        pytest.param(
            lambda text: b"".join(gzip.compress(line) for line in text.splitlines(keepends=True)),
            id="gzip in members",
        ),
        pytest.param(lambda text: gzip.compress(text) + bytes(64), id="padded gzip"),
        pytest.param(lambda text: b"\xef\xbb\xbf" + text, id="byte order mark"),
        pytest.param(lambda text: text.replace(b"\n", b"\r\n"), id="carriage returns"),
        pytest.param(lambda text: text.rstrip(), id="no last line end"),
        pytest.param(lambda text: b"\n" + text.replace(b"\n", b"\n \r\n\n"), id="empty lines"),
    ],
)
def test_the_same_data_in_other_clothes(tmp_path: Path, dressed: Any) -> None:
    plain = imported(tmp_path).fingerprint
    assert imported(tmp_path, dressed(REVIEWS), dressed(META)).fingerprint == plain
    assert counts(tmp_path)["malformed_interactions"] == 0


# --- interactions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "expected", "disagreeing"),
    [
        ({"reviewTime": "09 1, 2016"}, SEPTEMBER, 0),
        ({"reviewTime": " 9 01, 2016 "}, SEPTEMBER, 0),
        ({"reviewTime": "09 1, 2016", "unixReviewTime": SEPTEMBER + 5}, SEPTEMBER, 0),
        ({"reviewTime": "09 1, 2016", "unixReviewTime": SEPTEMBER + DAY}, SEPTEMBER, 1),
        ({"reviewTime": "09 1, 2016", "unixReviewTime": None}, SEPTEMBER, 0),
        ({"reviewTime": "", "unixReviewTime": SEPTEMBER}, SEPTEMBER, 0),
        ({"reviewTime": None, "unixReviewTime": SEPTEMBER + DAY - 1}, SEPTEMBER, 0),
        ({"unixReviewTime": float(SEPTEMBER)}, SEPTEMBER, 0),
        ({"unixReviewTime": 0}, 0, 0),
        ({"reviewTime": "01 1, 1970"}, 0, 0),
    ],
)
def test_a_review_has_a_day(tmp_path: Path, times: Record, expected: int, disagreeing: int) -> None:
    record = {"reviewerID": "ann", "asin": "pen", "overall": 5, **times}
    assert imported(tmp_path, as_json([record])).timestamps.tolist() == [expected]
    assert counts(tmp_path)["disagreeing_times"] == disagreeing


def test_the_reviews_of_a_day_keep_the_order_of_the_file(tmp_path: Path) -> None:
    times = ["09 2, 2016", "09 1, 2016", "09 2, 2016", "09 1, 2016"]
    reviews = [review(user, "pen", time=time) for user, time in zip("abcd", times, strict=True)]
    late = {**reviews[1], "reviewerID": "e", "unixReviewTime": SEPTEMBER + DAY}
    users = [user for user, *_ in rows(imported(tmp_path, as_json([*reviews, late])))]
    assert users == ["b", "d", "e", "a", "c"]


def test_only_the_earliest_of_repeated_reviews_is_kept(tmp_path: Path) -> None:
    reviews = [
        review("ann", "pen", 1, "09 3, 2016"),
        review("ann", "pen", 2, "09 1, 2016"),
        review("ann", "cup", 3, "09 2, 2016"),
        review("ann", "pen", 4, "09 1, 2016"),
    ]
    assert rows(imported(tmp_path, as_json(reviews))) == [
        ("ann", "pen", 2, SEPTEMBER),
        ("ann", "cup", 3, SEPTEMBER + DAY),
    ]
    assert counts(tmp_path)["duplicate_interactions"] == 2


@pytest.mark.parametrize("absent", [{}, {"overall": None}])
def test_a_rating_may_be_absent(tmp_path: Path, absent: Record) -> None:
    record = {k: v for k, v in review("ann", "pen").items() if k != "overall"} | absent
    assert np.isnan(imported(tmp_path, as_json([record])).ratings).all()
    assert counts(tmp_path)["unrated_interactions"] == 1


def test_items_without_metadata_go_with_their_reviews(tmp_path: Path) -> None:
    reviews = [review("ann", "ink"), review("bob", "ink"), review("ann", "pen"), review("b", "hat")]
    dataset = imported(tmp_path, as_json(reviews))
    assert rows(dataset) == [("ann", "pen", 5, SEPTEMBER)]
    assert list(dataset.item_ids) == ["pen"]  # nobody has reviewed the cup
    found = counts(tmp_path)
    assert (found["items_without_metadata"], found["interactions_without_metadata"]) == (2, 3)
    assert (found["users"], found["unlisted_items"]) == (1, 0)


# --- attributes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("Fender", ["Fender"]),
        ("  Fender \t", ["Fender"]),
        ("by\n    \n    Fender", ["by Fender"]),
        ("Bang &amp; Olufsen", ["Bang & Olufsen"]),
        ("Rock&#39;n&nbsp;Roll", ["Rock'n Roll"]),
        ("A < B > C", ["A < B > C"]),
        ("<3 Hearts", ["<3 Hearts"]),
        ("", []),
        (" \n ", []),
    ],
)
def test_values_are_written_as_a_person_reads_them(
    tmp_path: Path, written: str, expected: list[str]
) -> None:
    dataset = imported(tmp_path, meta=as_json([product("pen", written, written)]))
    assert values(dataset, "brand") == values(dataset, "categories") == {"pen": expected}
    assert counts(tmp_path)["markup_brand_values"] == 0


@pytest.mark.parametrize(
    "markup",
    [
        "</span></span></span>",
        '<span class="a-list-item">',
        "Guitars <br/>",
        "&lt;b&gt;Guitars&lt;/b&gt;",
        "<!-- a comment -->",
        "Guitars</spa",
    ],
)
def test_markup_is_no_value(tmp_path: Path, markup: str) -> None:
    meta = [product("pen", markup, "Office", markup, markup), product("cup", "", markup)]
    dataset = imported(tmp_path, meta=as_json(meta))
    assert values(dataset, "brand") == {"cup": [], "pen": []}
    assert values(dataset, "categories") == {"cup": [], "pen": ["Office"]}
    found = counts(tmp_path)
    assert (found["markup_brand_values"], found["markup_categories_values"]) == (1, 2)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"category": None}, []),
        ({"category": []}, []),
        ({"category": ""}, []),
        ({"category": "Office"}, ["Office"]),
        ({"category": ["Office", "Pens", "Office"]}, ["Office", "Pens"]),
        ({"category": ["Pens &amp; Ink", "Pens & Ink "]}, ["Pens & Ink"]),
        ({"categories": [["Office", "Pens"], ["Gifts", "Pens"]]}, ["Office", "Pens", "Gifts"]),
        ({"categories": [[]], "category": ["Office"]}, []),
    ],
)
def test_categories(tmp_path: Path, fields: Record, expected: list[str]) -> None:
    dataset = imported(tmp_path, meta=as_json([{"asin": "pen", **fields}]))
    assert values(dataset, "categories") == {"pen": expected}
    assert values(dataset, "brand") == {"pen": []}


def test_the_first_metadata_of_an_item_wins(tmp_path: Path) -> None:
    again = as_json([product("pen", "acme", "Toys"), product("hat"), product("hat")])
    assert values(imported(tmp_path, meta=META + again), "brand")["pen"] == ["bic"]
    assert counts(tmp_path)["duplicate_items"] == 1  # the hat is not reviewed
    assert counts(tmp_path)["categories_values"] == 3


def test_rare_values_are_dropped(tmp_path: Path) -> None:
    items = [f"i{number}" for number in range(6)]
    reviews = as_json(review("ann", item) for item in items[:5])
    meta = as_json(
        product(item, "five" if number else "one", "all", "six" if number != 2 else "one")
        for number, item in enumerate(items)
    )
    dataset = imported(tmp_path, reviews, meta, min_value_count=4)
    assert values(dataset, "brand") == {
        item: ["five"] if item != "i0" else [] for item in items[:5]
    }
    assert values(dataset, "categories")["i2"] == ["all"]
    assert values(dataset, "categories")["i3"] == ["all", "six"]
    found = counts(tmp_path)
    assert (found["rare_brand_values"], found["rare_categories_values"]) == (1, 1)
    dataset = imported(tmp_path, reviews, meta, min_value_count=5)  # i5 does not count
    assert values(dataset, "brand") == {item: [] for item in items[:5]}
    assert values(dataset, "categories") == {item: ["all"] for item in items[:5]}
    assert (counts(tmp_path)["rare_brand_values"], counts(tmp_path)["brand_values"]) == (2, 0)
    assert AmazonSource(tmp_path, tmp_path).min_value_count == 5


def test_a_value_that_an_item_repeats_counts_once(tmp_path: Path) -> None:
    meta = as_json([product("pen", "bic", "Office", "Office"), product("cup", "bic", "Home")])
    dataset = imported(tmp_path, meta=meta, min_value_count=2)
    assert values(dataset, "categories") == {"cup": [], "pen": []}
    assert values(dataset, "brand") == {"cup": ["bic"], "pen": ["bic"]}


# --- broken lines ---------------------------------------------------------------------------------


def changed(**fields: Any) -> bytes:
    return json.dumps(review("cat", "pen") | fields).encode()


BROKEN = [
    (b"{", "not JSON: "),
    (b"nonsense", "not JSON: "),
    (b'{"reviewerID": "c\xff"}', "not JSON: str is not valid UTF-8"),
    (b'{"overall": NaN}', "not JSON: "),
    (b'{"overall": "\\ud800"}', "not JSON: "),
    (b"[" * 5000, "not JSON: "),
    (b"[1, 2]", "[1, 2] is no record"),
    (b"null", "None is no record"),
    (b"{'asin': ", "neither JSON nor a Python literal"),
    (b"{'asin': 'c\xff'}", "not UTF-8, column 12"),
    (b"{'asin': nan}", "neither JSON nor a Python literal"),
    (b"{'asin': '\\ud800'}", "neither JSON nor a Python literal"),
    (b"{'asin': '\x00'}", "neither JSON nor a Python literal"),
    (b"{'asin': {1}}", "neither JSON nor a Python literal"),
    (b"{'asin', 'pen'}", "neither JSON nor a Python literal"),
    (b"{'asin': {[]: 1}}", "neither JSON nor a Python literal"),
    (b"{'asin': " + b"[" * 150 + b"]" * 150 + b"(", "neither JSON nor a Python literal"),
    (b"{'asin': " + b"-" * 50_000 + b"1}", "neither JSON nor a Python literal"),
    (b"{'asin': open('pen')}", "neither JSON nor a Python literal"),
]

BROKEN_REVIEWS = [
    *BROKEN,
    (changed(reviewerID=None), "reviewerID is missing"),
    (b'{"reviewerID": "cat", "overall": 5}', "asin is missing"),
    (changed(asin=7), "asin is 7; expected an id on one line"),
    (changed(asin=list(range(99))), "asin is [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1…; expected"),
    (changed(asin=" "), "asin is ' '; expected an id on one line"),
    (changed(reviewerID="c\nt"), r"reviewerID is 'c\nt'; expected an id on one line"),
    (changed(reviewerID="c\rt"), r"reviewerID is 'c\rt'; expected an id on one line"),
    (changed(overall="5.0"), "overall is '5.0'; expected a finite number"),
    (changed(overall=True), "overall is True; expected a finite number"),
    (changed(overall=1e39), "overall is 1e+39; expected a finite number"),
    (changed(overall=-1e39), "overall is -1e+39; expected a finite number"),
    (changed(reviewTime=None), "reviewTime and unixReviewTime are missing"),
    (changed(reviewTime=20160901), "reviewTime is 20160901; expected a day such as '09 1, 2016'"),
    (changed(reviewTime="2016-09-01"), "reviewTime is '2016-09-01'; expected a day such as"),
    (changed(reviewTime="02 30, 2016"), "reviewTime is '02 30, 2016'; expected a day such as"),
    (changed(reviewTime="12 31, 1969"), "reviewTime is '12 31, 1969'; expected a day such as"),
    (changed(unixReviewTime="soon"), "unixReviewTime is 'soon'; expected seconds since 1970"),
    (changed(unixReviewTime=-1), "unixReviewTime is -1; expected seconds since 1970"),
    (changed(unixReviewTime=True), "unixReviewTime is True; expected seconds since 1970"),
    (changed(unixReviewTime=1472688000000), "unixReviewTime is 1472688000000; expected seconds"),
]

BROKEN_META = [
    *BROKEN,
    (b'{"brand": "bic"}', "asin is missing"),
    (b'{"asin": "pen", "brand": ["bic"]}', "brand is ['bic']; expected a string"),
    (b'{"asin": "pen", "brand": 7}', "brand is 7; expected a string"),
    (b'{"asin": "pen", "category": {"a": 1}}', "category is {'a': 1}; expected a list of strings"),
    (b'{"asin": "pen", "category": ["a", null]}', "category is ['a', None]; expected a list"),
    (b'{"asin": "pen", "categories": [[["a"]]]}', "categories is [[['a']]]; expected a list"),
]


def broken(good: bytes, line: bytes) -> bytes:
    first, second = good.splitlines()
    return b"\n".join([first, b"", line, second, line, b""])


MEND = ". Mend it, or drop such lines with --skip-malformed."


@pytest.mark.parametrize(("line", "problem"), BROKEN_REVIEWS)
def test_a_malformed_review_is_refused_or_dropped(
    tmp_path: Path, line: bytes, problem: str
) -> None:
    reviews = broken(REVIEWS, line)
    message = refusal(tmp_path, reviews)
    assert message.startswith(f"reviews.json line 3: {problem}")
    assert message.endswith(MEND)
    kept = imported(tmp_path, reviews, skip_malformed=True)
    assert counts(tmp_path)["malformed_interactions"] == 2
    assert kept.fingerprint == imported(tmp_path).fingerprint


@pytest.mark.parametrize(("line", "problem"), BROKEN_META)
def test_a_malformed_item_is_refused_or_dropped(tmp_path: Path, line: bytes, problem: str) -> None:
    meta = broken(META, line)
    message = refusal(tmp_path, meta=meta)
    assert message.startswith(f"meta.json line 3: {problem}")
    assert message.endswith(MEND)
    kept = imported(tmp_path, meta=meta, skip_malformed=True)
    assert counts(tmp_path)["malformed_items"] == 2
    assert kept.fingerprint == imported(tmp_path).fingerprint


def test_metadata_is_not_run(tmp_path: Path) -> None:
    meta = META + f"{{'asin': open({str(tmp_path / 'made')!r}, 'w')}}\n".encode()
    imported(tmp_path, meta=meta, skip_malformed=True)
    assert not (tmp_path / "made").exists()


def test_a_last_line_that_is_cut_off(tmp_path: Path) -> None:
    cut = REVIEWS + REVIEWS[:30]
    message = refusal(tmp_path, cut)
    assert message.startswith("reviews.json line 3: not JSON: ")
    assert message.endswith(f" (is the file cut off here?){MEND}")
    assert rows(imported(tmp_path, cut, skip_malformed=True)) == rows(imported(tmp_path))


def test_a_gzip_file_that_is_cut_off_loses_only_what_is_missing(tmp_path: Path) -> None:
    rng = random.Random(0)
    reviews = as_json(review(f"{rng.random()}", "pen") for _ in range(3000))
    packed = gzip.compress(reviews)[:-20_000]
    there = gzip_prefix(packed)
    whole, cut = there.count(b"\n"), not there.endswith(b"\n")
    assert (1000 < whole < 2900, cut) == (True, True)

    message = refusal(tmp_path, packed)
    assert message == f"reviews.json line {whole + 1}: the gzip file is cut off here{MEND}"
    dataset = imported(tmp_path, packed, skip_malformed=True)
    assert len(dataset.users) == whole
    assert counts(tmp_path)["malformed_interactions"] == 1
    assert dataset.fingerprint == imported(tmp_path, there[: there.rindex(b"\n") + 1]).fingerprint


def gzip_prefix(packed: bytes) -> bytes:
    """Return what can be read of a gzip file that is cut off."""
    return zlib.decompressobj(31).decompress(packed)


@pytest.mark.parametrize("skip_malformed", [False, True])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, skip_malformed: bool) -> None:
    packed = bytearray(gzip.compress(META))
    packed[-6] ^= 1
    message = refusal(tmp_path, meta=bytes(packed), skip_malformed=skip_malformed)
    assert message.startswith("meta.json is a damaged gzip file: CRC check failed")
    message = refusal(tmp_path, b"\x1f\x8b\x09garbage", skip_malformed=skip_malformed)
    assert message.startswith("reviews.json is a damaged gzip file: ")


@pytest.mark.parametrize("wrapped", [bytes, gzip.compress])
def test_a_line_without_end_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: Any
) -> None:
    monkeypatch.setattr("trainer.data.amazon.LONGEST_LINE", 200)
    first, second = META.splitlines(keepends=True)
    longest = first.rstrip().ljust(199) + b"\n"
    meta = wrapped(longest + b"[" * 1001 + b"\n" + second)
    assert refusal(tmp_path, meta=meta) == f"meta.json line 2: longer than 200 bytes{MEND}"
    kept = imported(tmp_path, meta=meta, skip_malformed=True)
    assert counts(tmp_path)["malformed_items"] == 1
    assert kept.fingerprint == imported(tmp_path).fingerprint
    imported(tmp_path, meta=META + b"[" * 200, skip_malformed=True)
    assert counts(tmp_path)["malformed_items"] == 1


@pytest.mark.parametrize("text", [b"", b"\n \n", b"nonsense\n", gzip.compress(b"", mtime=0)])
def test_a_file_without_a_line_of_use_is_refused(tmp_path: Path, text: bytes) -> None:
    expected = "has no line that can be used; expected one record a line."
    assert refusal(tmp_path, text, skip_malformed=True) == f"reviews.json {expected}"
    assert refusal(tmp_path, meta=text, skip_malformed=True) == f"meta.json {expected}"


def test_the_metadata_of_another_category_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, meta=as_json([product("hat")]))
    assert message == (
        "meta.json describes none of the 2 items of reviews.json. "
        "Name the metadata of the same category."
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "reviews.json").write_bytes(REVIEWS)
    for meta, reason in [("no.json", "does not exist. Check"), ("", "cannot be read: Is a dir")]:
        dumps = AmazonSource(tmp_path / "reviews.json", tmp_path / meta)
        with pytest.raises(DataError, match=reason):
            import_amazon(dumps, tmp_path / "shop", name="shop")


def test_a_folder_in_use_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds 'notes.txt' and is not a data set folder"):
        import_amazon(AmazonSource(tmp_path / "no", tmp_path / "no"), tmp_path / "shop", name="s")


# --- the whole ------------------------------------------------------------------------------------


def generated(seed: int) -> tuple[list[Record], list[Record]]:
    """Reviews and metadata of 2018 with everything in them that is dropped or mended."""
    rng = random.Random(seed)
    items = [f"B{number:03}" for number in range(60)]
    words = [f"w{number}" for number in range(12)]
    reviews = [
        review(
            f"A{rng.randrange(80)}",
            rng.choice(items),
            rng.randint(1, 5),
            f"{rng.randint(1, 12):02} {rng.randint(1, 28)}, {rng.choice([2012, 2013])}",
        )
        for _ in range(900)
    ]
    odd = ["</span>", "", " a &amp; b\n", "<b>x</b>", "a & b"]
    meta = [
        product(item, rng.choice([*words, *odd]), *rng.choices([*words[:6], *odd], k=4))
        for item in [*items[5:], *rng.choices(items, k=9), "B999"]
    ]
    return reviews, meta


def by_hand(
    reviews: list[Record], meta: list[Record], least: int
) -> tuple[list[tuple[str, str, float, int]], Mapping[str, tuple[list[str], list[str]]]]:
    """The rows, and brand and categories by item: the whole import in loops."""
    described: dict[str, tuple[list[str], list[str]]] = {}
    reviewed = {record["asin"] for record in reviews}
    for record in meta:
        if record["asin"] in reviewed and record["asin"] not in described:
            described[record["asin"]] = (
                cleaned([record["brand"]]),
                cleaned(record["category"]),
            )
    for attribute in (0, 1):
        common = Counter(value for both in described.values() for value in both[attribute])
        for both in described.values():
            both[attribute][:] = [value for value in both[attribute] if common[value] >= least]

    kept: dict[tuple[str, str], tuple[str, str, float, int]] = {}
    for record in sorted(reviews, key=seconds):
        pair = record["reviewerID"], record["asin"]
        if record["asin"] in described and pair not in kept:
            kept[pair] = (*pair, record["overall"], seconds(record))
    return list(kept.values()), described


def cleaned(texts: list[str]) -> list[str]:
    found: list[str] = []
    for text in texts:
        value = unescape(text).strip()
        if value and "<" not in value and value not in found:
            found.append(value)
    return found


def seconds(record: Record) -> int:
    moment = datetime.strptime(record["reviewTime"], "%m %d, %Y").replace(tzinfo=UTC)
    return int(moment.timestamp())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("least", [1, 5])
def test_the_import_is_what_loops_make_of_it(tmp_path: Path, seed: int, least: int) -> None:
    reviews, meta = generated(seed)
    dataset = imported(tmp_path, as_json(reviews), as_json(meta), min_value_count=least)
    expected_rows, described = by_hand(reviews, meta, least)
    assert rows(dataset) == expected_rows
    assert values(dataset, "brand") == {item: brand for item, (brand, _) in described.items()}
    assert values(dataset, "categories") == {item: many for item, (_, many) in described.items()}
    found = counts(tmp_path)
    assert found["items_without_metadata"] == len({r["asin"] for r in reviews} - set(described))
    assert (
        found["interactions"]
        + found["duplicate_interactions"]
        + found["interactions_without_metadata"]
    ) == len(reviews)

    older = [
        {k: v for k, v in record.items() if k != "reviewTime"} | {"unixReviewTime": seconds(record)}
        for record in reviews
    ]
    nested = [
        {
            "asin": r["asin"],
            "brand": r["brand"],
            "categories": [r["category"][:2], r["category"][2:]],
        }
        for r in meta
    ]
    again = imported(tmp_path, as_json(older), as_literals(nested), min_value_count=least)
    assert again.fingerprint == dataset.fingerprint


def test_neither_file_is_held(tmp_path: Path) -> None:
    text = "x" * 5000
    reviews = as_json(review(f"u{n % 50}", f"i{n % 40}") | {"text": text} for n in range(4000))
    meta = as_json(product(f"i{n}", "bic") | {"title": text} for n in range(4000))
    dumps = source(tmp_path, gzip.compress(reviews), gzip.compress(meta))
    tracemalloc.start()
    import_amazon(dumps, tmp_path / "shop", name="shop")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6e6 < len(reviews) / 3


def test_the_source_is_recorded_and_progress_told(tmp_path: Path) -> None:
    reviews = gzip.compress(as_json(review(f"u{n}", "pen") for n in range(10_000)))
    dumps = source(tmp_path, reviews, META)
    told: list[int] = []
    import_amazon(dumps, tmp_path / "shop", name="shop", advance=told.append)
    assert told == sorted(told)
    assert len(told) == 4
    assert told[-1] == dumps.size() == len(reviews) + len(META)
    assert Manifest.read(tmp_path / "shop").source == {
        "importer": "amazon",
        "reviews": {"file": "reviews.json", "sha256": hashlib.sha256(reviews).hexdigest()},
        "meta": {"file": "meta.json", "sha256": hashlib.sha256(META).hexdigest()},
        "min_value_count": 1,
    }


def test_the_threshold_is_at_least_one() -> None:
    with pytest.raises(InvalidInput, match="--min-value-count is 0; expected at least 1"):
        AmazonSource(Path("reviews"), Path("meta"), min_value_count=0)


# --- the command ----------------------------------------------------------------------------------


def ran(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["amazon", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_takes_every_option(tmp_path: Path) -> None:
    dumps = source(tmp_path, REVIEWS + b"nonsense\n", META)
    out = tmp_path / "shop"
    files = ["--reviews", str(dumps.reviews), "--meta", str(dumps.meta), "--out", str(out)]
    with pytest.raises(DataError, match=r"reviews\.json line 3: not JSON"):
        ran(*files)
    table = ran(*files, "--skip-malformed")
    cells = [line.strip("│ ").split("│") for line in table.splitlines()]
    shown = {cell[0].strip(): cell[1].strip() for cell in cells if len(cell) == 2}
    assert shown["malformed interactions"] == "1"
    assert shown["rare categories values"] == "3"
    assert shown["brand values"] == "0"
    assert f"Written to {out}" in table

    with pytest.raises(DataError, match="already holds a data set"):
        ran(*files)
    options = ["--skip-malformed", "--overwrite", "--min-value-count", "1", "--name", "tiny"]
    manifest = json.loads(ran(*files, *options, "--json"))
    assert manifest == {
        "name": "tiny",
        "folder": str(out),
        "fingerprint": Dataset.read(out).fingerprint,
        "counts": counts(tmp_path),
    }
    assert manifest["counts"]["brand_values"] == 2


def test_the_command_names_an_absent_file(tmp_path: Path) -> None:
    dumps = source(tmp_path, REVIEWS, META)
    with pytest.raises(DataError, match=r"no\.json does not exist\. Check the path"):
        ran("--reviews", str(dumps.reviews), "--meta", "no.json", "--out", str(tmp_path / "shop"))


def test_help_has_the_example() -> None:
    lines = [line.strip(" \\") for line in ran("--help").splitlines()]
    assert "backcast data amazon --out instruments" in lines
