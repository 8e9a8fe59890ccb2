"""Import of the Amazon review dumps of 2014 and 2018: a file of reviews and one of metadata.

A line is a record, written as JSON or, in the metadata of 2014, as a Python literal. The reviews
are read first, into dictionary-encoded columns; then the metadata goes by, and only the brand and
the categories of the items that were reviewed are kept. Neither file is ever held.
"""

import ast
import codecs
import gzip
import hashlib
import html
import io
import math
import re
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from backcast.errors import DataError, InvalidInput
from trainer.data.dataset import (
    INTERACTION_SCHEMA,
    LAST_SECOND,
    Manifest,
    check_free,
    write_dataset,
)
from trainer.data.files import GZIP_MAGIC, readable, shortened

LONGEST_LINE = 8 << 20
"""Bytes; a longer line is malformed, which bounds the memory."""

_READ_AT_ONCE = 1 << 20
_LINES_BETWEEN_REPORTS = 4096
_DAY = 86_400
_LARGEST_RATING = float(np.finfo(np.float32).max)

_LITERAL = re.compile(rb"\s*\{\s*'")
_WRITTEN_DAY = re.compile(r"([0-9]{1,2}) ([0-9]{1,2}), ([0-9]{4})")
_MARKUP = re.compile(r"</?[a-zA-Z!][^<>]*>|</[a-zA-Z]")

_Record = dict[str, Any]


def _nothing(_done: int) -> None: ...


@dataclass(frozen=True)
class AmazonSource:
    """Which dumps to import, and how.

    Attributes:
        reviews: plain or gzip, with reviewerID, asin, overall, and reviewTime ("MM D, YYYY") or
            unixReviewTime (seconds since 1970-01-01 UTC).
        meta: plain or gzip, with asin, brand, and category (2018) or categories (2014).
        min_value_count: a brand or category that fewer items have is dropped.
        skip_malformed: drop and count malformed lines instead of refusing the file.
    """

    reviews: Path
    meta: Path
    min_value_count: int = 5
    skip_malformed: bool = False

    def __post_init__(self) -> None:
        if self.min_value_count < 1:
            raise InvalidInput(f"--min-value-count is {self.min_value_count}; expected at least 1.")

    def size(self) -> int:
        """Return how many bytes there are to read; DataError when a file is absent."""
        return _size(self.reviews) + _size(self.meta)


def import_amazon(
    source: AmazonSource,
    folder: Path,
    *,
    name: str,
    overwrite: bool = False,
    advance: Callable[[int], None] = _nothing,
) -> Mapping[str, int]:
    """Import two dumps into the data set folder ``folder`` and return what was counted.

    Args:
        source: the dumps.
        folder: absent or empty; or a data set folder, with ``overwrite``.
        name: what to call the data set.
        overwrite: replace the data set that is there.
        advance: told how many of ``source.size()`` bytes are read so far.

    Raises:
        DataError: a file cannot be read, and the message names it, the line and the value; or no
            review is of an item with metadata; or the folder holds something else.
    """
    check_free(folder, overwrite)
    source.size()  # an absent metadata file is better told now than after the reviews
    reviews_file = _Dump(source.reviews, source.skip_malformed)
    meta_file = _Dump(source.meta, source.skip_malformed)
    reviews = _Reviews()
    reviews_file.read(reviews.add, advance)
    catalogue = _Catalogue(reviews.items)
    meta_file.read(catalogue.add, lambda done: advance(reviews_file.bytes_read + done))

    listed = catalogue.listed()
    if not listed.any():
        raise DataError(
            f"{source.meta} describes none of the {len(listed)} items of {source.reviews}. "
            "Name the metadata of the same category."
        )
    edges = reviews.of_items(listed)
    items, item_counts = catalogue.to_table(source.min_value_count)
    write_dataset(
        folder,
        edges,
        items,
        name=name,
        source={
            "importer": "amazon",
            "reviews": reviews_file.origin,
            "meta": meta_file.origin,
            "min_value_count": source.min_value_count,
        },
        counts={
            "malformed_interactions": reviews_file.malformed,
            "malformed_items": meta_file.malformed,
            "interactions_without_metadata": len(reviews) - edges.num_rows,
            "items_without_metadata": int(np.count_nonzero(~listed)),
            "disagreeing_times": reviews.disagreeing_times,
            **item_counts,
        },
        overwrite=overwrite,
    )
    return Manifest.read(folder).counts


class _Malformed(ValueError):
    """What is wrong with a line."""


class _Dump:
    """A file of one record a line, plain or gzip.

    Attributes:
        bytes_read: of the file as it is stored.
        malformed: lines that were dropped; the last one cut off in a cut-off gzip is one of them.
    """

    def __init__(self, path: Path, skip_malformed: bool) -> None:
        self.path = path
        self.bytes_read = 0
        self.malformed = 0
        self._skip_malformed = skip_malformed
        self._sha256 = hashlib.sha256()
        self._line = 0

    @property
    def origin(self) -> dict[str, str]:
        """What the data set records of this file, once it is read."""
        return {"file": self.path.name, "sha256": self._sha256.hexdigest()}

    def read(self, take: Callable[[_Record], None], advance: Callable[[int], None]) -> None:
        """Hand every record to ``take``, which raises _Malformed before it keeps any of it."""
        taken = 0
        for line in self._lines():
            if self._line % _LINES_BETWEEN_REPORTS == 0:
                advance(self.bytes_read)
            if line.isspace():
                continue
            try:
                take(_parse(line))
                taken += 1
            except _Malformed as problem:
                hint = "" if line.endswith(b"\n") else " (is the file cut off here?)"
                self._refuse(f"{problem}{hint}")
        if not taken:
            raise DataError(
                f"{self.path} has no line that can be used; expected one record a line."
            )
        advance(self.bytes_read)

    def _lines(self) -> Iterator[bytes]:
        with readable(self.path), self.path.open("rb", buffering=0) as file:
            stream = _unpacked(_Metered(file, self._note_read))
            try:
                while line := stream.readline(LONGEST_LINE):
                    self._line += 1
                    if len(line) < LONGEST_LINE or line.endswith(b"\n"):
                        yield line if self._line > 1 else line.removeprefix(codecs.BOM_UTF8)
                    else:
                        self._refuse(f"longer than {LONGEST_LINE} bytes")
                        _skip_line(stream)
            except EOFError:
                self._line += 1
                self._refuse("the gzip file is cut off here")

    def _note_read(self, data: memoryview) -> None:
        self.bytes_read += len(data)
        self._sha256.update(data)

    def _refuse(self, problem: str) -> None:
        if not self._skip_malformed:
            raise DataError(
                f"{self.path} line {self._line}: {problem}. "
                "Mend it, or drop such lines with --skip-malformed.",
                path=str(self.path),
                line=self._line,
            )
        self.malformed += 1


class _Stream(Protocol):
    def readline(self, size: int, /) -> bytes: ...


class _Metered(io.RawIOBase):
    """A file that shows what is read from it to ``note``."""

    def __init__(self, file: io.FileIO, note: Callable[[memoryview], None]) -> None:
        self._file, self._note = file, note

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._file.readinto(buffer)
        self._note(memoryview(buffer)[:size])
        return size


class _Reviews:
    """Interactions as columns of E rows, users and items by number.

    Attributes:
        items: number of each item, by its id.
        disagreeing_times: reviews whose unixReviewTime is not on the day of their reviewTime.
    """

    def __init__(self) -> None:
        self.items: dict[str, int] = {}
        self.disagreeing_times = 0
        self._users: dict[str, int] = {}
        self._user_numbers = array("i")
        self._item_numbers = array("i")
        self._ratings = array("f")
        self._timestamps = array("q")

    def __len__(self) -> int:
        return len(self._timestamps)

    def add(self, record: _Record) -> None:
        """Append a review."""
        user, item = _id(record, "reviewerID"), _id(record, "asin")
        rating = _rating(record)
        written, unix = _written_day(record), _unix_day(record)
        day = unix if written is None else written
        if day is None:
            raise _Malformed("reviewTime and unixReviewTime are missing")
        self.disagreeing_times += unix is not None and unix != day
        self._user_numbers.append(self._users.setdefault(user, len(self._users)))
        self._item_numbers.append(self.items.setdefault(item, len(self.items)))
        self._ratings.append(rating)
        self._timestamps.append(day)

    def of_items(self, chosen: NDArray[np.bool_]) -> pa.Table:
        """Return the rows of INTERACTION_SCHEMA whose item is ``chosen`` (I,), in file order."""
        item_numbers = np.array(self._item_numbers)
        kept = chosen[item_numbers]
        columns = [
            _decoded(np.array(self._user_numbers)[kept], self._users),
            _decoded(item_numbers[kept], self.items),
            pa.array(np.array(self._ratings)[kept]),
            pa.array(np.array(self._timestamps)[kept]),
        ]
        return pa.table(columns, names=INTERACTION_SCHEMA.names)


class _Catalogue:
    """The attributes of N items out of the I that are expected; others pass unnoticed."""

    def __init__(self, expected: Mapping[str, int]) -> None:
        self._expected = expected
        self._rows: dict[str, None] = {}
        self._duplicates = 0
        self._brands, self._categories = _Values(), _Values()

    def add(self, record: _Record) -> None:
        """Append an expected item, unless it is there already."""
        item = _id(record, "asin")
        if item not in self._expected:
            return
        brands = _texts(record, "brand", depth=0)
        categories = _texts(record, "categories" if "categories" in record else "category", depth=2)
        if item in self._rows:
            self._duplicates += 1
            return
        self._rows[item] = None
        self._brands.append(brands)
        self._categories.append(categories)

    def listed(self) -> NDArray[np.bool_]:
        """Return a mask (I,) over the expected items: those that were added."""
        return np.array([item in self._rows for item in self._expected], dtype=np.bool_)

    def to_table(self, least: int) -> tuple[pa.Table, dict[str, int]]:
        """Return N rows with the values that ``least`` items have, and what was dropped."""
        brands, rare_brands = self._brands.common(least)
        categories, rare_categories = self._categories.common(least)
        columns = {
            "item_id": pa.array(self._rows, pa.string()),
            "brand": _first_of_each(brands),
            "categories": categories,
        }
        counts = {
            "duplicate_items": self._duplicates,
            "markup_brand_values": self._brands.markup,
            "markup_categories_values": self._categories.markup,
            "rare_brand_values": rare_brands,
            "rare_categories_values": rare_categories,
        }
        return pa.table(columns), counts


class _Values:
    """The values of one attribute for N items, dictionary-encoded.

    Attributes:
        markup: values that were dropped as markup, counted once an item.
    """

    def __init__(self) -> None:
        self.markup = 0
        self._distinct: dict[str, int] = {}
        self._numbers = array("i")
        self._sizes = array("i")

    def append(self, texts: Iterable[str]) -> None:
        """Append the values of the next item; what is left empty is none."""
        values = dict.fromkeys(_as_read(text) for text in texts)
        before = len(self._numbers)
        for value in filter(None, values):
            if _MARKUP.search(value):
                self.markup += 1
            else:
                number = self._distinct.setdefault(value, len(self._distinct))
                self._numbers.append(number)
        self._sizes.append(len(self._numbers) - before)

    def common(self, least: int) -> tuple[pa.ListArray, int]:
        """Return list<string> (N,) of values on ``least`` items or more, and how many had fewer."""
        numbers = np.array(self._numbers)
        rare = np.bincount(numbers, minlength=len(self._distinct)) < least
        kept = ~rare[numbers]
        owners = np.repeat(np.arange(len(self._sizes)), self._sizes)
        sizes = np.bincount(owners[kept], minlength=len(self._sizes))
        offsets = pa.array(np.concatenate([[0], np.cumsum(sizes)]), pa.int32())
        values = _decoded(numbers[kept], self._distinct).cast(pa.string())
        return pa.ListArray.from_arrays(offsets, values), int(np.count_nonzero(rare))


def _parse(line: bytes) -> _Record:
    record = _parse_literal(line) if _LITERAL.match(line) else _parse_json(line)
    if not isinstance(record, dict):
        raise _Malformed(f"{shortened(record)} is no record")
    return record


def _parse_json(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _Malformed(f"not JSON: {error.msg}, column {error.colno}") from error


def _parse_literal(line: bytes) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes such as \d
            value = ast.literal_eval(line.decode())
        return orjson.loads(orjson.dumps(value))  # a set, a half of a surrogate pair: refused
    except UnicodeDecodeError as error:
        raise _Malformed(f"not UTF-8, column {error.start + 1}") from error
    # Nesting too deep for the parser is a MemoryError or a RecursionError.
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
        raise _Malformed("neither JSON nor a Python literal") from error


def _id(record: _Record, field: str) -> str:
    value = record.get(field)
    if value is None:
        raise _Malformed(f"{field} is missing")
    if not isinstance(value, str) or not value.strip() or "\n" in value or "\r" in value:
        raise _Malformed(f"{field} is {shortened(value)}; expected an id on one line")
    return value


def _rating(record: _Record) -> float:
    """Return the rating, NaN where there is none."""
    value = record.get("overall")
    if value is None:
        return math.nan
    if type(value) not in (int, float) or abs(value) > _LARGEST_RATING:
        raise _Malformed(f"overall is {shortened(value)}; expected a finite number")
    return float(value)


def _written_day(record: _Record) -> int | None:
    """Return the midnight of reviewTime in seconds, or None where there is none."""
    text = record.get("reviewTime")
    if text is None or text == "":
        return None
    if not isinstance(text, str):
        raise _no_day(text)
    return _midnight(text)


@lru_cache(maxsize=1 << 14)
def _midnight(text: str) -> int:
    found = _WRITTEN_DAY.fullmatch(text.strip())
    if not found:
        raise _no_day(text)
    month, day, year = map(int, found.groups())
    try:
        seconds = (date(year, month, day) - date(1970, 1, 1)).days * _DAY
    except ValueError as error:
        raise _no_day(text) from error
    if seconds < 0:
        raise _no_day(text)
    return seconds


def _no_day(value: object) -> _Malformed:
    return _Malformed(f"reviewTime is {shortened(value)}; expected a day such as '09 1, 2016'")


def _unix_day(record: _Record) -> int | None:
    """Return the midnight before unixReviewTime in seconds, or None where there is none."""
    value = record.get("unixReviewTime")
    if value is None:
        return None
    if type(value) not in (int, float) or not 0 <= value <= LAST_SECOND:
        expected = "seconds since 1970"
        raise _Malformed(f"unixReviewTime is {shortened(value)}; expected {expected}")
    return int(value) // _DAY * _DAY


def _texts(record: _Record, field: str, depth: int) -> list[str]:
    """Return the strings of a field that is one, or a list of them, nested to ``depth``."""
    value = record.get(field)
    if value is None:
        return []
    texts = list(_flattened(value, depth))
    if not all(isinstance(text, str) for text in texts):
        expected = "a list of strings" if depth else "a string"
        raise _Malformed(f"{field} is {shortened(value)}; expected {expected}")
    return texts


def _flattened(value: Any, depth: int) -> Iterator[Any]:
    if depth and isinstance(value, list):
        for part in value:
            yield from _flattened(part, depth - 1)
    else:
        yield value


def _as_read(text: str) -> str:
    """Return a value as a person reads it: entities written out, white space as single spaces."""
    return " ".join(html.unescape(text).split())


def _decoded(numbers: NDArray[np.int32], names: Mapping[str, int]) -> pa.DictionaryArray:
    """Return the strings that ``numbers`` stand for; ``names`` counts them from 0, in order."""
    return pa.DictionaryArray.from_arrays(pa.array(numbers), pa.array(names, pa.string()))


def _first_of_each(lists: pa.ListArray) -> pa.Array:
    """Return the first value of each list, null where there is none."""
    present = pc.greater(pc.list_value_length(lists), 0)
    return lists.values.take(pc.if_else(present, lists.offsets[:-1], None))


def _unpacked(file: io.RawIOBase) -> _Stream:
    packed = io.BufferedReader(file, _READ_AT_ONCE)
    is_gzip = packed.peek(len(GZIP_MAGIC)).startswith(GZIP_MAGIC)
    return gzip.GzipFile(fileobj=packed) if is_gzip else packed


def _skip_line(stream: _Stream) -> None:
    while (rest := stream.readline(LONGEST_LINE)) and not rest.endswith(b"\n"):
        pass


def _size(path: Path) -> int:
    with readable(path):
        return path.stat().st_size
