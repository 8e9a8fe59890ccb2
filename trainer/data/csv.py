"""Import of interactions and items from delimited text files, plain or gzip-compressed.

A file is read whole into memory, every column as text; columns are then parsed at once, and only a
row that cannot be parsed is looked up again to say on which line it stands.
"""

import csv
import gzip
import hashlib
import io
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv as arrow_csv

from backcast.errors import DataError, InvalidInput
from trainer.data.dataset import (
    INTERACTION_SCHEMA,
    LAST_SECOND,
    Manifest,
    check_free,
    iso_seconds,
    write_dataset,
)
from trainer.data.files import GZIP_MAGIC, readable, shortened

TimestampUnit = Literal["s", "ms", "iso"]

BLOCK_BYTES = 64 << 20
"""The longest row that can be read."""

_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_COUNT = r"^\d{1,18}(\.0*)?$"
_UNITS: Mapping[TimestampUnit, tuple[int, str]] = {
    "s": (1, "whole seconds since 1970 (milliseconds need --timestamp-unit ms, dates iso)"),
    "ms": (1000, "whole milliseconds since 1970"),
    "iso": (1, "an ISO 8601 date or time after 1970"),
}


@dataclass(frozen=True)
class CsvSource:
    """Which files to import, and what their columns mean.

    Attributes:
        interactions: one row per interaction, with a header line.
        items: one row per item, with a header line; None makes items without attributes.
        user_column, item_column, timestamp_column: columns of ``interactions``.
        rating_column: None for a file without ratings. An empty cell is no rating.
        timestamp_unit: whole seconds ("s") or milliseconds ("ms") since 1970-01-01 UTC, or ISO 8601
            dates or times ("iso", UTC unless they say otherwise).
        item_id_column: the column of ``items`` that holds the id.
        list_columns: columns of ``items`` that hold several values joined by ``separator``.
        attributes: columns of ``items`` to keep besides; None keeps every column.
        delimiter: one character between columns, in both files.
        skip_malformed: drop and count malformed rows instead of refusing the file.

    Ids and attribute values are taken as they stand, surrounding spaces included.
    """

    interactions: Path
    items: Path | None = None
    user_column: str = "user_id"
    item_column: str = "item_id"
    rating_column: str | None = "rating"
    timestamp_column: str = "timestamp"
    timestamp_unit: TimestampUnit = "s"
    item_id_column: str = "item_id"
    list_columns: tuple[str, ...] = ()
    separator: str = "|"
    attributes: tuple[str, ...] | None = None
    delimiter: str = ","
    skip_malformed: bool = False

    def __post_init__(self) -> None:
        if len(self.delimiter.encode()) != 1 or self.delimiter in '"\r\n':
            raise InvalidInput(f"--delimiter is {self.delimiter!r}; expected one ASCII character.")
        if not self.separator:
            raise InvalidInput("--separator is empty; expected the text between two values.")
        if self.timestamp_unit not in _UNITS:
            raise InvalidInput(
                f"--timestamp-unit is {self.timestamp_unit!r}; expected one of {list(_UNITS)}."
            )
        if self.items is None and (self.list_columns or self.attributes):
            raise InvalidInput("Attribute columns are named, but no items file. Add --items FILE.")
        _check_distinct(list(self.interaction_columns.values()))
        _check_distinct([self.item_id_column, *self.list_columns])
        _check_distinct([self.item_id_column, *(self.attributes or ())])

    @property
    def interaction_columns(self) -> dict[str, str]:
        """The columns to read from ``interactions``, by the option that names each."""
        columns = {
            "--user-column": self.user_column,
            "--item-column": self.item_column,
            "--timestamp-column": self.timestamp_column,
        }
        rating = {} if self.rating_column is None else {"--rating-column": self.rating_column}
        return columns | rating


def import_csv(
    source: CsvSource, folder: Path, *, name: str, overwrite: bool = False
) -> Mapping[str, int]:
    """Import text files into the data set folder ``folder`` and return what was counted.

    Raises:
        DataError: a file cannot be read as ``source`` says; the message names the file, the line
            and the value. Or the folder holds something else.
    """
    check_free(folder, overwrite)
    edges_file = _TextFile.open(source.interactions, source.delimiter)
    edges, malformed = _read_interactions(edges_file, source)
    counts = {"malformed_interactions": malformed}
    origin = {"importer": "csv", "interactions": edges_file.origin}
    if source.items is None:
        items = pa.table({"item_id": pc.unique(edges["item_id"])})
    else:
        items_file = _TextFile.open(source.items, source.delimiter)
        items, item_counts = _read_items(items_file, source)
        counts |= item_counts
        origin["items"] = items_file.origin
    write_dataset(
        folder, edges, items, name=name, source=origin, counts=counts, overwrite=overwrite
    )
    return Manifest.read(folder).counts


@dataclass(frozen=True, eq=False)
class _TextFile:
    """A delimited text file, unpacked: UTF-8, a header of distinct names, a row at least."""

    path: Path
    text: bytes
    sha256: str
    delimiter: str
    header: list[str]

    @classmethod
    def open(cls, path: Path, delimiter: str) -> "_TextFile":
        packed = _read_bytes(path)
        text = _unpack(path, packed)
        _check_utf8(path, text)
        _check_quotes(path, text, delimiter)
        first = [fields for _, fields in islice(_records(path, text, delimiter), 2)]
        if not first:
            raise DataError(f"{path} is empty; expected a header line with the column names.")
        header = first[0]
        twice = [column for column, times in Counter(header).items() if times > 1]
        if twice:
            raise DataError(f"{path} names column {twice[0]!r} twice. Rename one of them.")
        if len(first) == 1:
            raise DataError(f"{path} has a header and no rows; expected at least one.")
        return cls(path, text, hashlib.sha256(packed).hexdigest(), delimiter, header)

    @property
    def origin(self) -> dict[str, str]:
        """What the data set records of this file."""
        return {"file": self.path.name, "sha256": self.sha256}

    def require(self, column: str, option: str) -> None:
        """Refuse a file without ``column``, which ``option`` names."""
        if column in self.header:
            return
        hint = " or --no-rating" if option == "--rating-column" else ""
        hint += " or --delimiter" if len(self.header) == 1 else ""
        raise DataError(
            f"{self.path} has no column {column!r}; its columns are {self.header}. "
            f"Name the right one with {option}{hint}.",
            path=str(self.path),
            column=column,
            columns=self.header,
        )

    def line_of(self, record: int) -> int:
        """Return the line on which a record begins; both count from 1, the header is record 1."""
        records = _records(self.path, self.text, self.delimiter)
        return next(line for number, (line, _) in enumerate(records, 1) if number == record)


class _Rows:
    """The rows of a file as text columns, and which of them are malformed."""

    def __init__(self, file: _TextFile, columns: Sequence[str]) -> None:
        self._file = file
        self._ragged: list[tuple[int, int]] = []  # (record, columns found)
        self.table = self._parse(columns)
        self._total = self.table.num_rows + len(self._ragged)
        self._records = np.setdiff1d(np.arange(2, self._total + 2), [at for at, _ in self._ragged])
        self._bad = np.zeros(self.table.num_rows, dtype=np.bool_)
        self._faults = [
            (record, f"{found} columns where the header has {len(file.header)}")
            for record, found in self._ragged[:1]
        ]

    def _parse(self, columns: Sequence[str]) -> pa.Table:
        try:
            return arrow_csv.read_csv(
                pa.BufferReader(self._file.text),
                # Only a single thread says where a row with too many or too few columns stands.
                read_options=arrow_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES),
                parse_options=arrow_csv.ParseOptions(
                    delimiter=self._file.delimiter,
                    newlines_in_values=True,
                    invalid_row_handler=self._note_ragged,
                ),
                convert_options=arrow_csv.ConvertOptions(
                    column_types=dict.fromkeys(columns, pa.string()),
                    include_columns=list(columns),
                    strings_can_be_null=False,
                ),
            )
        except pa.ArrowInvalid as error:
            raise DataError(f"{self._file.path} cannot be read as a table: {error}") from error

    def _note_ragged(self, row: arrow_csv.InvalidRow) -> str:
        self._ragged.append((row.number, row.actual_columns))
        return "skip"

    def refuse(self, column: str, bad: NDArray[np.bool_], expected: str) -> None:
        """Mark the rows where ``bad`` (R,) is true as malformed for their value in ``column``."""
        if bad.any():
            row = int(np.argmax(bad))
            value = self.table[column][row].as_py()
            text = f"{column} is {shortened(value)}; expected {expected}"
            self._faults.append((int(self._records[row]), text))
            self._bad |= bad

    def well_formed(self, skip: bool) -> tuple[pa.Array, int]:
        """Return the mask (R,) of the rows to keep, and how many rows of the file are not kept.

        Raises DataError on the first malformed row unless ``skip``, and when no row is left.
        """
        malformed = len(self._ragged) + int(self._bad.sum())
        if malformed and not (skip and malformed < self._total):
            record, text = min(self._faults)
            mend = (
                "No row is left." if skip else "Mend it, or drop such rows with --skip-malformed."
            )
            raise DataError(
                f"{self._file.path} line {self._file.line_of(record)}: {text}. "
                f"Malformed rows: {malformed} of {self._total}. {mend}",
                path=str(self._file.path),
                malformed=malformed,
            )
        return pa.array(~self._bad), malformed


def _read_interactions(file: _TextFile, source: CsvSource) -> tuple[pa.Table, int]:
    """Return the table of INTERACTION_SCHEMA, and how many malformed rows were dropped."""
    columns = source.interaction_columns
    for option, column in columns.items():
        file.require(column, option)
    rows = _Rows(file, list(columns.values()))
    _refuse_bad_ids(rows, source.user_column)
    _refuse_bad_ids(rows, source.item_column)
    timestamps = _timestamps(rows, source.timestamp_column, source.timestamp_unit)
    ratings = _ratings(rows, source.rating_column)
    users, items = rows.table[source.user_column], rows.table[source.item_column]
    table = pa.table([users, items, ratings, timestamps], schema=INTERACTION_SCHEMA)
    kept, malformed = rows.well_formed(source.skip_malformed)
    return table.filter(kept), malformed


def _read_items(file: _TextFile, source: CsvSource) -> tuple[pa.Table, dict[str, int]]:
    """Return item_id and the attribute columns, and what was counted on the way."""
    file.require(source.item_id_column, "--item-id-column")
    attributes = _attribute_columns(file, source)
    rows = _Rows(file, [source.item_id_column, *attributes])
    _refuse_bad_ids(rows, source.item_id_column)
    kept, malformed = rows.well_formed(source.skip_malformed)
    text = rows.table.filter(kept)
    columns = {"item_id": text[source.item_id_column]}
    for column in attributes:
        as_list = column in source.list_columns
        columns[column] = (
            pc.split_pattern(text[column], source.separator) if as_list else text[column]
        )
    codes = text[source.item_id_column].combine_chunks().dictionary_encode().indices.to_numpy()
    first = np.sort(np.unique(codes, return_index=True)[1])
    counts = {"malformed_items": malformed, "duplicate_items": len(codes) - len(first)}
    return pa.table(columns).take(pa.array(first)), counts


def _attribute_columns(file: _TextFile, source: CsvSource) -> list[str]:
    for column in source.list_columns:
        file.require(column, "--list-column")
    for column in source.attributes or ():
        file.require(column, "--attribute")
    chosen = {*file.header} if source.attributes is None else {*source.attributes}
    chosen = (chosen | {*source.list_columns}) - {source.item_id_column}
    if chosen & {"", "item_id"}:
        raise DataError(
            f"{file.path} has a column without a name, or a second column item_id, which cannot be "
            "an attribute. Name the attributes with --attribute."
        )
    return [column for column in file.header if column in chosen]


def _refuse_bad_ids(rows: _Rows, column: str) -> None:
    ids = rows.table[column]
    rows.refuse(column, _numpy(pc.equal(pc.utf8_trim_whitespace(ids), "")), "an id")
    rows.refuse(column, _numpy(pc.match_substring_regex(ids, r"[\r\n]")), "an id on one line")


def _ratings(rows: _Rows, column: str | None) -> pa.ChunkedArray:
    """Return float32 (R,), null where there is no rating, refusing what is not a finite number."""
    if column is None:
        return pa.chunked_array([pa.nulls(rows.table.num_rows, pa.float32())])
    text = pc.utf8_trim_whitespace(rows.table[column])
    numbers = _where(text, pc.match_substring_regex(text, _NUMBER)).cast(pa.float64())
    numbers = numbers.cast(pa.float32())
    finite = _numpy(pc.fill_null(pc.is_finite(numbers), False))
    rows.refuse(column, ~finite & _numpy(pc.not_equal(text, "")), "a finite number")
    return numbers


def _timestamps(rows: _Rows, column: str, unit: TimestampUnit) -> pa.ChunkedArray:
    """Return int64 (R,) seconds, refusing what is not a moment from 1970 to 9999."""
    per_second, expected = _UNITS[unit]
    text = pc.utf8_trim_whitespace(rows.table[column])
    if unit == "iso":
        seconds = _parse_iso(text)
    else:
        digits = pc.replace_substring_regex(text, r"\.0*$", "")
        digits = _where(digits, pc.match_substring_regex(text, _COUNT))
        seconds = pc.divide(digits.cast(pa.int64()), per_second)
    fits = pc.and_(pc.greater_equal(seconds, 0), pc.less_equal(seconds, LAST_SECOND))
    rows.refuse(column, ~_numpy(pc.fill_null(fits, False)), expected)
    return seconds


def _parse_iso(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return int64 (R,) seconds, null where the text is no date; each text is parsed once."""
    encoded = text.combine_chunks().dictionary_encode()
    seconds = [iso_seconds(value) for value in encoded.dictionary.to_pylist()]
    return pa.chunked_array([pa.array(seconds, pa.int64()).take(encoded.indices)])


def _where(text: pa.ChunkedArray, keep: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.if_else(keep, text, pa.scalar(None, pa.string()))


def _read_bytes(path: Path) -> bytes:
    with readable(path):
        return path.read_bytes()


def _unpack(path: Path, data: bytes) -> bytes:
    if not data.startswith(GZIP_MAGIC):
        return data
    with readable(path):
        return gzip.decompress(data)


def _check_utf8(path: Path, text: bytes) -> None:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        byte = text[error.start]
        raise DataError(
            f"{path} line {line} is not UTF-8 (byte 0x{byte:02x}). Convert the file to UTF-8."
        ) from error


def _check_quotes(path: Path, text: bytes, delimiter: str) -> None:
    """Refuse stray quotes: Arrow would take all rows from one to the next for a single value."""
    if b'"' in text:
        deque(_records(path, text, delimiter), maxlen=0)


def _records(path: Path, text: bytes, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the line on which each record begins, from 1, and its fields; empty lines are none."""
    lines = io.TextIOWrapper(io.BytesIO(text), encoding="utf-8-sig", newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    before = 0
    try:
        for fields in reader:
            if fields:
                yield before + 1, fields
            before = reader.line_num
    except csv.Error as error:
        raise DataError(f"{path} line {before + 1}: {error}; is a quote left open?") from error


def _check_distinct(columns: list[str]) -> None:
    twice = [column for column, times in Counter(columns).items() if times > 1]
    if twice:
        raise InvalidInput(f"Column {twice[0]!r} is named for two purposes. Name two columns.")


def _numpy(mask: pa.ChunkedArray) -> NDArray[np.bool_]:
    return np.asarray(mask.to_numpy(), dtype=np.bool_)
