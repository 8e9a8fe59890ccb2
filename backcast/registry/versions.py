"""Versions and their transformations."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import Connection, Row, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from backcast.errors import DimensionMismatch, InvalidInput, UnknownVersion
from backcast.logs import redact
from backcast.registry import tables
from backcast.registry.database import Database, utc_now
from backcast.versions import FileDigest, Transform, Version, VersionState


class NumberTaken(Exception):
    """Another trainer registered this version number first."""


@dataclass(frozen=True)
class VersionDraft:
    """A version about to be registered; its files are already durable."""

    number: int
    parent: int | None
    dim: int
    method: str
    until: int
    seed: int
    dataset: str
    dataset_fingerprint: str
    folder: str
    files: Mapping[str, FileDigest]
    details: Mapping[str, Any]
    transforms: Sequence[Transform] = ()

    def __post_init__(self) -> None:
        if any(t.source != self.number for t in self.transforms):
            raise InvalidInput(f"A map of version {self.number} names another version as source.")
        if (self.parent is None) != (self.number == 0):
            raise InvalidInput(
                f"Version {self.number} with parent {self.parent}: "
                "version 0 has no parent, every later one has."
            )
        backward = [t for t in self.transforms if not t.direct]
        if [t.target for t in backward] != ([] if self.parent is None else [self.parent]):
            raise InvalidInput(
                f"Version {self.number} needs exactly one backward map to its parent."
            )


class Versions:
    """Read and register versions. A number, once given, is never given again."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def all(self) -> list[Version]:
        """Return every version, oldest first."""
        with self._db.read() as connection:
            return read_versions(connection)

    def get(self, number: int) -> Version:
        """Return one version; raise UnknownVersion."""
        with self._db.read() as connection:
            row = connection.execute(
                select(tables.versions).where(tables.versions.c.number == number)
            ).first()
        if row is None:
            raise UnknownVersion(number)
        return _version(row)

    def next_number(self) -> int:
        """Return the number after the highest one ever registered."""
        with self._db.read() as connection:
            highest = connection.scalar(select(func.max(tables.versions.c.number)))
        return 0 if highest is None else int(highest) + 1

    def transforms(self) -> list[Transform]:
        """Return every registered map."""
        with self._db.read() as connection:
            return read_transforms(connection)

    def register(self, draft: VersionDraft) -> Version:
        """Write the version and its maps in one transaction.

        Raises:
            NumberTaken: the number was registered meanwhile; nothing was written.
            UnknownVersion: the parent, or the target of a map, does not exist.
            DimensionMismatch: a map does not lead from this dimension to that of its target.
            InvalidInput: the file of a map is not among the version's files.
        """
        now = utc_now()
        values = asdict(draft)
        maps = values.pop("transforms")
        try:
            with self._db.write() as connection:
                _check_maps(connection, draft)
                connection.execute(
                    insert(tables.versions).values(
                        **values, state=VersionState.REGISTERED, created_at=now
                    )
                )
                if maps:
                    connection.execute(
                        insert(tables.transforms), [{**row, "created_at": now} for row in maps]
                    )
        except IntegrityError as error:
            if draft.number in {v.number for v in self.all()}:
                raise NumberTaken(draft.number) from error
            raise
        return self.get(draft.number)

    def note_weights_deleted(self, number: int) -> None:
        """Note that nobody may count on the weights of M_k any more; then they are deleted."""
        row = tables.versions.c
        with self._db.write() as connection:
            connection.execute(
                update(tables.versions)
                .where((row.number == number) & row.weights_deleted_at.is_(None))
                .values(weights_deleted_at=utc_now())
            )


def read_versions(connection: Connection) -> list[Version]:
    """Return every version, oldest first, within the caller's transaction."""
    rows = connection.execute(select(tables.versions).order_by(tables.versions.c.number))
    return [_version(row) for row in rows]


def read_transforms(connection: Connection) -> list[Transform]:
    """Return every map within the caller's transaction."""
    columns = [c for c in tables.transforms.c if c.name != "created_at"]
    return [Transform(**row._mapping) for row in connection.execute(select(*columns))]


def set_note(connection: Connection, numbers: Sequence[int], note: str | None) -> None:
    """Say why ``numbers`` are in their state, to all readers, within the caller's transaction."""
    told = note and redact(note)
    connection.execute(
        update(tables.versions).where(tables.versions.c.number.in_(numbers)).values(note=told)
    )


def hold_version(connection: Connection, number: int) -> Version:
    """Return a version that nobody retires before the caller's transaction has ended.

    Raises:
        UnknownVersion: there is none of this number.
    """
    wanted = select(tables.versions).where(tables.versions.c.number == number)
    row = connection.execute(wanted.with_for_update(read=True)).first()
    if row is None:
        raise UnknownVersion(number)
    return _version(row)


def set_state(connection: Connection, numbers: Sequence[int], state: VersionState) -> None:
    """Set the state of ``numbers`` within the caller's transaction."""
    connection.execute(
        update(tables.versions).where(tables.versions.c.number.in_(numbers)).values(state=state)
    )


def _check_maps(connection: Connection, draft: VersionDraft) -> None:
    dims = {version.number: version.dim for version in read_versions(connection)}
    for t in draft.transforms:
        if t.target not in dims:
            raise UnknownVersion(t.target)
        if (t.rows, t.cols) != (dims[t.target], draft.dim):
            raise DimensionMismatch(
                f"map {t.source} → {t.target}", (dims[t.target], draft.dim), (t.rows, t.cols)
            )
        if t.file not in draft.files:
            raise InvalidInput(f"The map {t.source} → {t.target} has no file {t.file!r}.")


def _version(row: Row[Any]) -> Version:
    values = dict(row._mapping)
    values["state"] = VersionState(values["state"])
    values["files"] = {name: FileDigest(**digest) for name, digest in values["files"].items()}
    return Version(**values)
