"""The data set folder: what every importer writes and the trainer reads.

A folder holds three files:

- ``interactions.parquet``: user_id string, item_id string, rating float32 (nullable), timestamp
  int64 (seconds since 1970-01-01 UTC); ascending in time, one row per (user, item);
- ``items.parquet``: item_id string; every other column, string or list<string>, is a multi-hot
  attribute;
- ``dataset.json``: name, counts, source, and the SHA-256 of the other two.
"""

import hashlib
import json
import math
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from backcast.errors import DataError, InvalidInput

INTERACTIONS_FILE = "interactions.parquet"
ITEMS_FILE = "items.parquet"
MANIFEST_FILE = "dataset.json"
FORMAT = 1

LAST_SECOND = 253_402_300_799
"""The end of the year 9999. A larger timestamp is not in seconds."""

INTERACTION_SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item_id", pa.string()),
        ("rating", pa.float32()),
        ("timestamp", pa.int64()),
    ]
)


@dataclass(frozen=True, eq=False)
class MultiHot:
    """Some values per item, as one flat array cut at offsets.

    Attributes:
        offsets: int64 (N+1,), ascending from 0 to V.
        values: object (V,) of str; those of item n are ``values[offsets[n]:offsets[n + 1]]``, none
            empty, none twice.
    """

    offsets: NDArray[np.int64]
    values: NDArray[np.object_]

    @classmethod
    def from_column(cls, column: pa.ChunkedArray) -> Self:
        """Build from a string or list<string> column of N rows, skipping nulls, "" and repeats."""
        rows = column.combine_chunks()
        if pa.types.is_string(rows.type):
            owners, values = np.arange(len(rows)), rows
        else:
            owners, values = _integers(pc.list_parent_indices(rows)), pc.list_flatten(rows)
        present = _mask(pc.not_equal(values, ""))
        encoded = values.filter(pa.array(present)).dictionary_encode()
        owners = owners[present]
        kept = _first_of_each(owners, _integers(encoded.indices), len(encoded.dictionary))
        sizes = np.bincount(owners[kept], minlength=len(rows))
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return cls(offsets, _strings(encoded.dictionary)[_integers(encoded.indices)[kept]])

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, item: int) -> list[str]:
        """Return the values of item number ``item``, in the order in which they were given."""
        return list(self.values[self.offsets[item] : self.offsets[item + 1]])


@dataclass(frozen=True)
class Manifest:
    """What ``dataset.json`` says: counts by name, where the data came from, SHA-256 by file."""

    name: str
    counts: Mapping[str, int]
    source: Mapping[str, Any]
    checksums: Mapping[str, str]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read ``dataset.json`` of a data set folder; DataError when it is absent or not one."""
        path = folder / MANIFEST_FILE
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']}, where this release reads {FORMAT}")
            files = {
                file: str(content["checksums"][file]) for file in (INTERACTIONS_FILE, ITEMS_FILE)
            }
            return cls(content["name"], content["counts"], content["source"], files)
        except OSError as error:
            raise DataError(
                f"{folder} is not a data set folder: {MANIFEST_FILE}: {error.strerror}. "
                "Make one with `backcast data`."
            ) from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path} does not describe a data set: {error}. Import the data again."
            ) from error

    def write(self, folder: Path) -> None:
        """Write ``dataset.json`` into ``folder``."""
        content = {"format": FORMAT, **vars(self)}
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the checksums of the two files: equal for equal data."""
        both = self.checksums[INTERACTIONS_FILE] + self.checksums[ITEMS_FILE]
        return hashlib.sha256(both.encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Dataset:
    """A bipartite graph of users and items whose edges arrive in time.

    Users and items are numbered by first appearance in time, so those known at any moment are the
    first so many; items without interactions come last.

    Attributes:
        name: what the importer called it.
        folder: where it was read from.
        fingerprint: SHA-256 over the checksums of both files.
        user_ids: object (U,) of str, by user number.
        item_ids: object (I,) of str, by item number.
        users: int64 (E,), the user number of each edge.
        items: int64 (E,), the item number of each edge.
        ratings: float32 (E,), NaN where there is none.
        timestamps: int64 (E,), seconds since 1970-01-01 UTC, ascending.
        attributes: the values of each attribute by item number.
    """

    name: str
    folder: Path
    fingerprint: str
    user_ids: NDArray[np.object_]
    item_ids: NDArray[np.object_]
    users: NDArray[np.int64]
    items: NDArray[np.int64]
    ratings: NDArray[np.float32]
    timestamps: NDArray[np.int64]
    attributes: Mapping[str, MultiHot]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a data set folder; DataError says which file is not what it should be, and why."""
        folder = Path(folder)
        manifest = Manifest.read(folder)
        edges = _read_parquet(folder / INTERACTIONS_FILE, manifest.checksums[INTERACTIONS_FILE])
        items = _read_parquet(folder / ITEMS_FILE, manifest.checksums[ITEMS_FILE])
        _check_stored(edges, items, folder)

        users = edges["user_id"].combine_chunks().dictionary_encode()
        seen = edges["item_id"].combine_chunks().dictionary_encode()
        items = items.take(_by_appearance(items["item_id"], seen.dictionary))
        return cls(
            name=manifest.name,
            folder=folder,
            fingerprint=manifest.fingerprint,
            user_ids=_strings(users.dictionary),
            item_ids=_strings(items["item_id"]),
            users=_integers(users.indices),
            items=_integers(seen.indices),
            ratings=edges["rating"].to_numpy().astype(np.float32),
            timestamps=_integers(edges["timestamp"]),
            attributes={
                column: MultiHot.from_column(items[column])
                for column in items.column_names
                if column != "item_id"
            },
        )

    def edges_until(self, until: int) -> int:
        """Return how many leading edges have a timestamp of at most ``until`` seconds."""
        return int(np.searchsorted(self.timestamps, until, side="right"))

    def users_known(self, until: int) -> int:
        """Return how many users have an edge at or before ``until``: the first so many."""
        return _known(self.users[: self.edges_until(until)])

    def items_known(self, until: int) -> int:
        """Return how many items have an edge at or before ``until``: the first so many."""
        return _known(self.items[: self.edges_until(until)])


def resolve_until(dataset: Dataset, until: str | float) -> int:
    """Turn what a person calls a moment into a timestamp in seconds.

    A number f in (0, 1] is a fraction of the E edges: the timestamp of edge ceil(f·E), counted
    from 1. A whole number above 1 is a timestamp. Anything else is read as an ISO 8601 date or time
    (UTC unless it says otherwise; a date is its midnight). Moments after the last interaction give
    the last interaction's; those before the first one raise InvalidInput.
    """
    number = _decimal(str(until))
    if number is None:
        moment = iso_seconds(str(until))
    elif 0 < number <= 1:
        edge = math.ceil(Fraction(number) * len(dataset.timestamps)) - 1
        return int(dataset.timestamps[edge])
    else:
        moment = int(number) if number == number.to_integral_value() else None
    if moment is None or not 0 < moment <= LAST_SECOND:
        raise InvalidInput(
            f"{until!r} is no moment. Give a fraction of the edges above 0 and up to 1, "
            "a Unix timestamp in seconds, or a date such as 2013-05-01.",
            until=str(until),
        )
    first, last = int(dataset.timestamps[0]), int(dataset.timestamps[-1])
    if moment < first:
        raise InvalidInput(
            f"{until!r} is before the first interaction of {dataset.name}, at {first} "
            f"({datetime.fromtimestamp(first, UTC):%Y-%m-%d}). Give a later moment.",
            until=str(until),
            first=first,
        )
    return min(moment, last)


def iso_seconds(text: str) -> int | None:
    """Return an ISO 8601 date or time as seconds since 1970 (UTC by default), or None."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return math.floor((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that `write_dataset` would refuse, before there is anything to write."""
    target = Path(folder).resolve()
    try:
        present = {path.name for path in target.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{target} cannot be a data set folder: {error.strerror}.") from error
    strange = sorted(present - {INTERACTIONS_FILE, ITEMS_FILE, MANIFEST_FILE})
    if strange or (present and MANIFEST_FILE not in present):
        raise DataError(
            f"{target} holds {(strange or sorted(present))[0]!r} and is not a data set folder. "
            "Name a new folder."
        )
    if present and not overwrite:
        raise DataError(
            f"{target} already holds a data set. Name a new folder, or replace it with --overwrite."
        )


def write_dataset(
    folder: Path,
    interactions: pa.Table,
    items: pa.Table,
    *,
    name: str,
    source: Mapping[str, Any],
    counts: Mapping[str, int],
    overwrite: bool = False,
) -> None:
    """Write a data set folder, whole or not at all.

    Edges are sorted by time (ties keep their order) and only the earliest of each (user, item) is
    kept. Items that only the interactions name are added without attribute values. A NaN rating
    becomes null.

    Args:
        folder: absent or empty; or a data set folder, with ``overwrite``.
        interactions: user_id and item_id string, rating float or null, timestamp integer seconds.
        items: item_id string, unique; every other column string or list<string>.
        name: what to call the data set.
        source: JSON-compatible facts on where the data came from.
        counts: what the importer counted; stored beside the counts made here.
        overwrite: replace the data set that is there. A kill amid the exchange can leave it under
            the hidden name ``.<folder>.<random>.old`` beside its place, never half of it.

    Raises:
        DataError: a table is empty, or breaks the format; or the folder holds something else.
    """
    check_free(folder, overwrite)
    target = Path(folder).resolve()
    edges, duplicates = _without_duplicates(_by_time(_clean_interactions(interactions)))
    catalogue, added = _with_unlisted(_clean_items(items), edges["item_id"])
    counted = {
        **_count(edges, catalogue),
        "duplicate_interactions": duplicates,
        "unlisted_items": added,
        **counts,
    }
    try:
        with _replacing(target) as draft:
            _write_parquet(edges, draft / INTERACTIONS_FILE)
            _write_parquet(catalogue, draft / ITEMS_FILE)
            checksums = {file: _sha256(draft / file) for file in (INTERACTIONS_FILE, ITEMS_FILE)}
            Manifest(name, counted, source, checksums).write(draft)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror}.") from error


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Give a draft folder beside ``target`` and, on success, put it in the target's place."""
    tag = secrets.token_hex(4)
    draft = target.with_name(f".{target.name}.{tag}.new")
    old = target.with_name(f".{target.name}.{tag}.old")
    draft.mkdir(parents=True)
    try:
        yield draft
        if target.exists():
            target.rename(old)
        draft.rename(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _clean_interactions(table: pa.Table) -> pa.Table:
    """Cast to INTERACTION_SCHEMA, refusing what does not fit."""
    where = "interactions"
    _check_names(table, INTERACTION_SCHEMA.names, where)
    _check_not_empty(table, where)
    timestamps = _whole_numbers(table["timestamp"], where)
    ratings = _cast(table["rating"], pa.float32(), where, "rating")
    ids = [_cast(table[column], pa.string(), where, column) for column in ("user_id", "item_id")]
    ratings = pc.if_else(pc.is_nan(ratings), pa.scalar(None, pa.float32()), ratings)
    clean = pa.table([*ids, ratings, timestamps], schema=INTERACTION_SCHEMA)
    _check_edges(clean, where)
    return clean


def _clean_items(table: pa.Table) -> pa.Table:
    """Cast every column to string or list<string>, refusing what does not fit."""
    where = "items"
    _check_item_names(table, where)
    _check_not_empty(table, where)
    columns = {
        column: _cast(table[column], _attribute_type(table[column].type), where, column)
        for column in table.column_names
    }
    clean = pa.table(columns)
    _check_catalogue(clean, where)
    return clean


def _attribute_type(found: pa.DataType) -> pa.DataType:
    is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
    return pa.list_(pa.string()) if is_list else pa.string()


def _cast(column: pa.ChunkedArray, to: pa.DataType, where: str, name: str) -> pa.ChunkedArray:
    if not _may_become(column.type, to):
        raise DataError(f"{where}: {name} is {column.type}; expected {to}.")
    try:
        return column.cast(to)
    except pa.ArrowInvalid as error:
        raise DataError(f"{where}: {name} cannot be read as {to}: {error}.") from error


def _may_become(found: pa.DataType, to: pa.DataType) -> bool:
    """Whether ``found`` means the same as ``to``; Arrow itself would make strings of anything."""
    if pa.types.is_null(found):
        return True
    if pa.types.is_dictionary(found):
        return _may_become(found.value_type, to)
    if pa.types.is_list(to):
        return hasattr(found, "value_type") and _may_become(found.value_type, to.value_type)
    if pa.types.is_string(to):
        return bool(pa.types.is_string(found) or pa.types.is_large_string(found))
    return bool(pa.types.is_integer(found) or pa.types.is_floating(found))


def _whole_numbers(column: pa.ChunkedArray, where: str) -> pa.ChunkedArray:
    """Cast timestamps to int64; of floats only the whole numbers among them fit."""
    if pa.types.is_floating(column.type):
        whole = pc.and_kleene(pc.is_finite(column), pc.equal(pc.floor(column), column))
        _refuse_first(pc.invert(whole), column, f"{where}: timestamp", "whole seconds")
    return _cast(column, pa.int64(), where, "timestamp")


def _check_stored(edges: pa.Table, items: pa.Table, folder: Path) -> None:
    """Check what the writer guarantees and a checksum does not prove."""
    where = str(folder / INTERACTIONS_FILE)
    _check_names(edges, INTERACTION_SCHEMA.names, where)
    for field in INTERACTION_SCHEMA:
        found = edges.schema.field(field.name).type
        if found != field.type:
            raise DataError(f"{where}: {field.name} is {found}; expected {field.type}.")
    _check_not_empty(edges, where)
    _check_edges(edges, where)
    if np.any(np.diff(_integers(edges["timestamp"])) < 0):
        raise DataError(f"{where} is not in the order of time. Import the data again.")
    if _without_duplicates(edges)[1]:
        raise DataError(f"{where} holds a (user, item) pair twice. Import the data again.")

    where = str(folder / ITEMS_FILE)
    _check_item_names(items, where)
    _check_catalogue(items, where)
    unlisted = _unlisted(items["item_id"], edges["item_id"])
    if len(unlisted):
        raise DataError(f"{where} lacks item {unlisted[0].as_py()!r}. Import the data again.")


def _check_names(table: pa.Table, expected: list[str], where: str) -> None:
    if sorted(table.column_names) != sorted(expected):
        raise DataError(f"{where} has the columns {table.column_names}; expected {expected}.")


def _check_item_names(table: pa.Table, where: str) -> None:
    names = table.column_names
    if "item_id" not in names:
        raise DataError(f"{where} has no column 'item_id'; its columns are {names}.")
    if len(set(names)) < len(names):
        raise DataError(f"{where} names a column twice: {names}.")


def _check_not_empty(table: pa.Table, where: str) -> None:
    if table.num_rows == 0:
        raise DataError(f"{where} has no rows; a data set needs at least one.")


def _check_edges(edges: pa.Table, where: str) -> None:
    for column in ("user_id", "item_id"):
        _check_ids(edges[column], f"{where}: {column}")
    times = edges["timestamp"]
    fits = pc.and_kleene(pc.greater_equal(times, 0), pc.less_equal(times, LAST_SECOND))
    _refuse_first(pc.invert(fits), times, f"{where}: timestamp", f"seconds from 0 to {LAST_SECOND}")
    ratings = edges["rating"]
    odd = pc.fill_null(pc.invert(pc.is_finite(ratings)), False)
    _refuse_first(odd, ratings, f"{where}: rating", "a finite number or null")


def _check_catalogue(items: pa.Table, where: str) -> None:
    for column in items.column_names:
        wanted = pa.string() if column == "item_id" else _attribute_type(items[column].type)
        if items[column].type != wanted:
            raise DataError(f"{where}: {column} is {items[column].type}; expected {wanted}.")
    ids = items["item_id"]
    _check_ids(ids, f"{where}: item_id")
    codes = _integers(ids.combine_chunks().dictionary_encode().indices)
    again = np.setdiff1d(np.arange(len(codes)), np.unique(codes, return_index=True)[1])
    if len(again):
        item = ids[int(again[0])].as_py()
        raise DataError(f"{where} lists item {item!r} twice. Keep one row of each item.")


def _check_ids(ids: pa.ChunkedArray, what: str) -> None:
    _refuse_first(pc.equal(ids, ""), ids, what, "a string that is not empty")


def _refuse_first(bad: pa.ChunkedArray, values: pa.ChunkedArray, what: str, expected: str) -> None:
    """Raise DataError on the first row where ``bad`` is true or null."""
    row = pc.index(pc.fill_null(bad, True), True).as_py()
    if row >= 0:
        raise DataError(f"{what} of row {row + 1} is {values[row].as_py()!r}; expected {expected}.")


def _by_time(edges: pa.Table) -> pa.Table:
    return edges.take(pa.array(np.argsort(_integers(edges["timestamp"]), kind="stable")))


def _without_duplicates(edges: pa.Table) -> tuple[pa.Table, int]:
    """Keep the first row of each (user, item); say how many rows went."""
    users = edges["user_id"].combine_chunks().dictionary_encode()
    items = edges["item_id"].combine_chunks().dictionary_encode()
    kept = _first_of_each(_integers(users.indices), _integers(items.indices), len(items.dictionary))
    dropped = edges.num_rows - len(kept)
    return (edges.take(pa.array(kept)) if dropped else edges), dropped


def _first_of_each(
    left: NDArray[np.int64], right: NDArray[np.int64], size: int
) -> NDArray[np.int64]:
    """Return, ascending, the index at which each distinct pair comes first; right is < size."""
    _, first = np.unique(left * max(size, 1) + right, return_index=True)
    return np.sort(first)


def _unlisted(listed: pa.ChunkedArray, seen: pa.ChunkedArray) -> pa.Array:
    distinct = pc.unique(seen)
    return distinct.filter(pc.invert(pc.is_in(distinct, value_set=listed.combine_chunks())))


def _with_unlisted(items: pa.Table, seen: pa.ChunkedArray) -> tuple[pa.Table, int]:
    """Append the items that only the interactions name; say how many they are."""
    unlisted = _unlisted(items["item_id"], seen)
    bare = pa.table(
        {
            field.name: unlisted if field.name == "item_id" else pa.nulls(len(unlisted), field.type)
            for field in items.schema
        },
        schema=items.schema,
    )
    return pa.concat_tables([items, bare]), len(unlisted)


def _count(edges: pa.Table, items: pa.Table) -> dict[str, int]:
    values = {
        f"{column}_values": len(np.unique(MultiHot.from_column(items[column]).values))
        for column in items.column_names
        if column != "item_id"
    }
    return {
        "users": len(pc.unique(edges["user_id"])),
        "items": items.num_rows,
        "interactions": edges.num_rows,
        "unrated_interactions": edges["rating"].null_count,
        **values,
    }


def _by_appearance(listed: pa.ChunkedArray, seen: pa.Array) -> pa.Array:
    """Return the rows of ``listed`` in the order of ``seen``, then those never seen."""
    rows = _integers(pc.index_in(seen, value_set=listed.combine_chunks()))
    never = np.setdiff1d(np.arange(len(listed)), rows)
    return pa.array(np.concatenate([rows, never]))


def _write_parquet(table: pa.Table, path: Path) -> None:
    pq.write_table(table.replace_schema_metadata(None), path, compression="zstd")


def _read_parquet(path: Path, checksum: str) -> pa.Table:
    try:
        if _sha256(path) != checksum:
            raise DataError(
                f"{path} is not the file that {MANIFEST_FILE} describes: its SHA-256 differs. "
                "Import the data again."
            )
        table = pq.read_table(path)
        table.validate(full=True)  # that text is UTF-8, for one
        str(table.column_names)  # and that names are
        return table
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or 'it is damaged'}. Import the data again."
        ) from error
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not readable Parquet. Import the data again.") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _decimal(text: str) -> Decimal | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _known(numbers: NDArray[np.int64]) -> int:
    return int(numbers.max()) + 1 if len(numbers) else 0


def _integers(column: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.int64).copy()


def _strings(column: pa.Array | pa.ChunkedArray) -> NDArray[np.object_]:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.object_)


def _mask(column: pa.Array) -> NDArray[np.bool_]:
    """Return a boolean column as numpy, null as False."""
    return np.asarray(pc.fill_null(column, False).to_numpy(zero_copy_only=False), dtype=np.bool_)
