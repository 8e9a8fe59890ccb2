"""A backup: a registry of its own in SQLite, and the files that its rows name.

The rows are copied as of one moment, then the files; last comes a manifest, without which there is
no backup. The store is not backed up: it is filled from the files, to the same bits. Restoring goes
the other way round, files first, the store, and the rows last in one transaction, so that a restore
that was killed can be run again.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import orjson

from backcast import acts
from backcast.acts import Actor
from backcast.artifacts import Artifacts, dump_json
from backcast.drift import bounded_snapshot
from backcast.errors import (
    ArtifactCorrupt,
    ArtifactMissing,
    Conflict,
    InvalidInput,
    NotFound,
    OperationAbandoned,
    SnapshotNotLoaded,
)
from backcast.lifecycle.erasing import Listed, erase_listed
from backcast.lifecycle.files import check_rows, copy_files, faults_of_files, named_files
from backcast.lifecycle.loading import load_snapshot
from backcast.lifecycle.operations import settle
from backcast.lifecycle.places import Backcast, Report
from backcast.lifecycle.verifying import Expected, check_bounds, check_stored
from backcast.registry import Registry, make_registry, schema
from backcast.registry.audit import note_act
from backcast.registry.database import utc_now
from backcast.registry.tables import SCHEMA_REVISION
from backcast.stores import Precision

FORMAT = 1
_FOLDER, _DATABASE, _MANIFEST = "registry", "registry.db", "backup.json"


@dataclass(frozen=True)
class Copied:
    """What a backup holds, or what a restore brought back.

    Attributes:
        live: S.d; None where nothing is.
        rows: of the registry.
        files, bytes: of artifacts.
        vectors: in the store, each compared with the files; None of a backup.
    """

    live: str | None
    rows: int
    files: int
    bytes: int
    vectors: int | None = None


@dataclass(frozen=True)
class Backup:
    """An opened backup.

    Attributes:
        registry: its rows, a copy of this process's own.
        stored: the precision of each snapshot that the store held.
    """

    artifacts: Artifacts
    registry: Registry
    created_at: datetime
    stored: Mapping[str, Precision]


def back_up(
    backcast: Backcast, to: Artifacts, report: Report = lambda _step, _done: None
) -> Copied:
    """Write a backup of everything to an empty place; others may change anything meanwhile.

    One that was broken off is carried on: files that are there already are not copied again.

    Raises:
        Conflict: there is a backup already, or something else.
        InvalidInput: it is the place of the artifacts, lies within it or around it.
        ArtifactMissing, ArtifactCorrupt: a file is gone, or not what was registered.
        ArtifactUnwritable: the place cannot be written to.
    """
    if to.overlaps(backcast.artifacts):
        raise InvalidInput("A backup among the artifacts themselves is none; name another place.")
    _demand_no_backup(to, backcast.registry)
    with TemporaryDirectory(prefix="backcast-") as folder:
        path = Path(folder) / _DATABASE
        copied, stored = _copy(backcast, to, path, report)
        content = path.read_bytes()
    digest = to.write(_FOLDER, {_DATABASE: content})[_DATABASE]
    backup = {
        "format": FORMAT,
        "release": version("backcast"),
        "schema": SCHEMA_REVISION,
        "created_at": utc_now(),
        "registry_sha256": digest.sha256,
        "stored": stored,
    }
    to.write(_FOLDER, {_MANIFEST: dump_json({"backup": backup, "sha256": _digest(backup)})})
    return copied


def _copy(
    backcast: Backcast, to: Artifacts, path: Path, report: Report
) -> tuple[Copied, dict[str, Precision]]:
    missing: str | None = None
    while True:
        with make_registry(f"sqlite:///{path}") as copy:
            read = backcast.registry.copy_to(copy)
            _settle(replace(backcast, registry=copy))
            try:
                files = list(named_files(copy, backcast.artifacts))
                copy_files(backcast.artifacts, to, files, lambda done: report("files", done))
            except ArtifactMissing as error:
                # What was over its grace period may have gone since the rows were copied.
                if error.message == missing:
                    raise
                missing = error.message
            else:
                rows = sum(table.rows for table in read.values())
                size = sum(file.size for file in files)
                live = _live(copy)
                return Copied(live, rows, len(files), size), _stored(backcast, copy)
        path.unlink()


def _settle(copied: Backcast) -> None:
    active = copied.registry.operations.active()
    if active is not None:
        reason = "The registry was copied while this ran; nothing was switched in the copy."
        settle(copied, active, OperationAbandoned(reason, owner=active.owner))


def _live(registry: Registry) -> str | None:
    live = registry.deployments.live()
    return None if live is None else live.name


def _stored(backcast: Backcast, copy: Registry) -> dict[str, Precision]:
    stored = {}
    for snapshot in copy.snapshots.undeleted():
        try:
            stored[snapshot.id] = backcast.store.open(snapshot.id).rounding.precision
        except SnapshotNotLoaded:
            continue
    return stored


def _digest(backup: Mapping[str, Any]) -> str:
    return hashlib.sha256(dump_json(backup)).hexdigest()


def _demand_no_backup(to: Artifacts, registry: Registry) -> None:
    """Raise Conflict where the place holds more than a backup of this that was broken off."""
    if to.exists(_FOLDER, _MANIFEST):
        where = to.url(_FOLDER, _MANIFEST)
        raise Conflict(f"There is a backup already: {where}. Name an empty place.")
    known = registry.named_folders() | {_FOLDER}
    # Bounds may have been measured again since.
    strange = sorted(f for f in to.folders() if f not in known and not f.startswith("drifts/"))
    if strange:
        where = to.url(strange[0], "")
        raise Conflict(
            f"There are files already that are no part of this backup, in {where}; nothing was "
            "changed. Name an empty place."
        )


@contextmanager
def open_backup(place: Artifacts) -> Iterator[Backup]:
    """Open a backup, of this release or an older one, and check its manifest and registry.

    Raises:
        NotFound: there is none, or it was broken off before its end.
        ArtifactCorrupt: its manifest or its registry is not what was written, or holds what is
            never written.
        SchemaMismatch: a newer release wrote it.
    """
    manifest = _read_manifest(place)
    with _as_written(place.url(_FOLDER, _MANIFEST)):
        stored = {name: Precision(value) for name, value in manifest["stored"].items()}
        created_at = datetime.fromisoformat(manifest["created_at"])
        digest = str(manifest["registry_sha256"])
    content = place.read(_FOLDER, _DATABASE, digest)
    with TemporaryDirectory(prefix="backcast-") as folder:
        path = Path(folder) / _DATABASE
        path.write_bytes(content)
        schema.upgrade_url(f"sqlite:///{path}")
        with make_registry(f"sqlite:///{path}") as registry:
            with _as_written(place.url(_FOLDER, _DATABASE)):
                check_rows(registry)
            yield Backup(place, registry, created_at, stored)


@contextmanager
def _as_written(where: str) -> Iterator[None]:
    """Raise ArtifactCorrupt where the block finds something missing, or of another type."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactCorrupt(where, f"it holds what no backup does ({error})") from error


def _read_manifest(place: Artifacts) -> Mapping[str, Any]:
    where = place.url(_FOLDER, _MANIFEST)
    if not place.exists(_FOLDER, _MANIFEST):
        raise NotFound(f"There is no backup, or it was never finished: {where} is missing.")
    with place.open_unchecked(_FOLDER, _MANIFEST) as file:
        try:
            document = orjson.loads(file.read())
            backup: Mapping[str, Any] = document["backup"]
            digest = document["sha256"]
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise ArtifactCorrupt(where, "it is not the manifest of a backup") from error
    if digest != _digest(backup):
        raise ArtifactCorrupt(where, "its content is not what was written")
    with _as_written(where):
        found = backup["format"]
    if found != FORMAT:
        raise ArtifactCorrupt(where, f"format {found!s:.20}, this release reads {FORMAT}")
    return backup


def faults_of_backup(
    backup: Backup, report: Report = lambda _step, _done: None
) -> tuple[Copied, list[str]]:
    """Read every file of a backup; return what it holds, and a line for each that is wrong."""
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        report(f"{done >> 20} MiB", 0.0)

    faults = list(faults_of_files(backup.registry, backup.artifacts, advance))
    files = [] if faults else list(named_files(backup.registry, backup.artifacts))
    return Copied(_live(backup.registry), backup.registry.rows(), len(files), done), faults


def restore(
    backup: Backup,
    target: Backcast,
    *,
    grace: timedelta,
    erased: Listed | None = None,
    actor: str = "restore",
    reason: str | None = None,
    report: Report = lambda _step, _done: None,
) -> Copied:
    """Bring a backup back to empty places: files, store, then all rows in one transaction.

    What was live is live again, and what can be gone back to is loaded too, every stored vector
    compared with the files. Ids on the list ``erased`` are erased before anything is served. The
    audit log tells of it.

    Raises:
        Conflict: a place is not empty.
        ArtifactMissing, ArtifactCorrupt: a file of the backup is gone, or not what was registered.
        StoreError: the store cannot be filled.
    """
    registry = backup.registry
    _demand_room(backup, target)
    files = list(named_files(registry, backup.artifacts))
    copy_files(backup.artifacts, target.artifacts, files, lambda done: report("files", 0.6 * done))
    copied = replace(target, registry=registry)
    vectors = fill_store(
        copied, backup.stored, grace, lambda done: report("store", 0.6 + 0.35 * done)
    )
    count = None if erased is None else erase_listed(copied, erased, actor=actor)
    act = acts.restoring(backup.created_at, count, reason)
    report("registry", 0.95)
    read = registry.copy_to(
        target.registry, finish=lambda filled: note_act(filled, Actor(actor), act)
    )
    rows = sum(table.rows for table in read.values())
    size = sum(file.size for file in files)
    return Copied(_live(target.registry), rows, len(files), size, vectors)


def fill_store(
    backcast: Backcast,
    stored: Mapping[str, Precision],
    grace: timedelta,
    report: Callable[[float], None],
    expected: Callable[[str], Expected | None] = lambda _name: None,
) -> int:
    """Load what is live and what can be gone back to, compare all, and return how many vectors.

    ``stored`` are the snapshots that a store held, and at which precision; ``expected`` says by a
    snapshot's name what its vectors must be, where that is not what its files say.
    """
    registry, vectors = backcast.registry, 0
    names = to_load(registry, stored, grace)
    for at, name in enumerate(names):
        load_snapshot(
            backcast,
            name,
            lambda done: report((at + 0.5 * done) / len(names)),  # noqa: B023
            stored.get(name),
        )
        record, there = registry.snapshots.get(name), backcast.store.open(name)
        vectors += check_stored(backcast.artifacts, record, there, expected(name))
        check_bounds(backcast, name)
    return vectors


def to_load(registry: Registry, stored: Mapping[str, Precision], grace: timedelta) -> list[str]:
    """Return the snapshots that a store must hold: the live one first, then those in grace."""
    live = registry.deployments.live()
    if live is None:
        return []
    over = {snapshot.id for snapshot in registry.snapshots.due(registry.now() - grace)}
    kept = (s.id for s in registry.snapshots.undeleted() if s.superseded_at and s.id in stored)
    return [live.snapshot, *(id for id in kept if id not in over and id != live.snapshot)]


def _demand_room(backup: Backup, target: Backcast) -> None:
    target.registry.demand_empty()
    known = {snapshot.id for snapshot in backup.registry.snapshots.everything()}
    strange = [n for n in target.store.snapshots() if bounded_snapshot(n) not in known]
    if strange:
        raise Conflict(
            f"The store holds {strange[0]}, which is not of this backup; nothing was changed. "
            "Name an empty one with BACKCAST_STORE_URL."
        )
    kinds, named = ("versions/", "snapshots/"), backup.registry.named_folders()
    others = [name for name in target.artifacts.folders() if name.startswith(kinds)]
    strange = sorted(set(others) - named)
    if strange:
        raise Conflict(
            f"The artifacts hold {strange[0]}, which is not of this backup; nothing was changed. "
            "Name an empty place with BACKCAST_ARTIFACTS_URL."
        )
