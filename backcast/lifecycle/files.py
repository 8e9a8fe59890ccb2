"""The files that a registry names: found, copied to other artifacts, and compared with it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from backcast.artifacts import FOLDER, SHA256, Artifacts
from backcast.errors import ArtifactCorrupt, ArtifactError
from backcast.lifecycle.collecting import WEIGHTS
from backcast.lifecycle.folding import PUT_FILE
from backcast.registry import Registry
from backcast.snapshots import Registered, files_of
from backcast.versions import Entity, SnapshotRecord

_CHUNK = 1 << 20

Advance = Callable[[int], None]
"""Told how many bytes more are done."""


@dataclass(frozen=True)
class NamedFile:
    """One file of artifacts, and the SHA-256 that its bytes must have.

    Attributes:
        size: in bytes; 0 where nothing says it.
    """

    folder: str
    name: str
    sha256: str
    size: int = 0


def named_files(registry: Registry, artifacts: Artifacts) -> Iterator[NamedFile]:
    """Yield every file that a row names, but those that are deleted or about to be.

    Raises:
        ArtifactMissing, ArtifactCorrupt: a manifest is gone, or not what was registered.
    """
    yield from _single_files(registry)
    for record in _vectors(registry):
        yield from _files_of(artifacts, record)


def check_rows(registry: Registry) -> None:
    """Raise ValueError unless folders have the names that Backcast gives, and files a digest.

    What a row names is deleted when its time has come, so it must be nothing else. Rows of other
    types raise AttributeError, KeyError or TypeError.
    """
    for folder, kind, id in _named_folders(registry):
        wanted = f"{kind}/{folder.rpartition('/')[2] if id is None else id}"
        if folder != wanted or not FOLDER.fullmatch(folder):
            raise ValueError(f"a row names the folder {folder!r:.80}")
    for file in _single_files(registry):
        if not SHA256.fullmatch(file.sha256) or not isinstance(file.size, int):
            raise ValueError(f"a row names no size or SHA-256 of {file.folder}/{file.name:.80}")
    for record in _vectors(registry):
        if not {Entity(name) for name in record.counts} or record.dim < 1:
            raise ValueError(f"a row has no vectors in {record.folder}")


def _named_folders(registry: Registry) -> Iterator[tuple[str, str, str | None]]:
    """Yield each folder with its kind, and the name that a store has for it."""
    for version in registry.versions.all():
        yield version.folder, "versions", None
    for snapshot in registry.snapshots.everything():
        yield snapshot.folder, "snapshots", snapshot.id
        for delta in registry.deltas.of(snapshot.id):
            yield delta.file.rpartition("/")[0], "deltas", None
        drift = registry.drifts.of(snapshot.id)
        if drift is not None:
            yield drift.folder, "drifts", drift.id


def faults_of_files(registry: Registry, artifacts: Artifacts, advance: Advance) -> Iterator[str]:
    """Yield in a line each what is wrong with the files that a registry names."""
    for file in _single_files(registry):
        yield from _fault(artifacts, file, advance)
    for record in _vectors(registry):
        try:
            files = _files_of(artifacts, record)
        except ArtifactError as error:
            yield error.message
            continue
        for file in files:
            yield from _fault(artifacts, file, advance)


def _fault(artifacts: Artifacts, file: NamedFile, advance: Advance) -> Iterator[str]:
    try:
        check_file(artifacts, file, advance)
    except ArtifactError as error:
        yield error.message


def _kept(registry: Registry) -> list[SnapshotRecord]:
    return [one for one in registry.snapshots.undeleted() if one.condemned_at is None]


def _single_files(registry: Registry) -> Iterator[NamedFile]:
    for version in registry.versions.all():
        for name, digest in version.files.items():
            if name != WEIGHTS or version.weights_deleted_at is None:
                yield NamedFile(version.folder, name, digest.sha256, digest.size)
    for snapshot in _kept(registry):
        put = registry.snapshots.details(snapshot.id).get("put")
        if put is not None:
            yield NamedFile(snapshot.folder, PUT_FILE, put["sha256"])
        for delta in registry.deltas.of(snapshot.id):
            folder, _, name = delta.file.rpartition("/")
            yield NamedFile(folder, name, delta.sha256)


def _vectors(registry: Registry) -> Iterator[Registered]:
    for snapshot in _kept(registry):
        yield snapshot
        drift = registry.drifts.of(snapshot.id)
        if drift is not None:
            yield drift


def _files_of(artifacts: Artifacts, record: Registered) -> list[NamedFile]:
    return [
        NamedFile(record.folder, name, digest.sha256, digest.size)
        for name, digest in files_of(artifacts, record).items()
    ]


def copy_files(
    source: Artifacts,
    target: Artifacts,
    files: Sequence[NamedFile],
    report: Callable[[float], None],
) -> None:
    """Copy files; ``report`` is told the fraction that is done. Raises what ``copy_file`` does."""
    total, done = sum(file.size for file in files) or 1, 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        report(min(1.0, done / total))

    for file in files:
        copy_file(source, target, file, advance)


def copy_file(source: Artifacts, target: Artifacts, file: NamedFile, advance: Advance) -> None:
    """Copy one file, a MiB at a time; what is there already, and right, is left as it is.

    Raises:
        ArtifactMissing, ArtifactCorrupt: the source's is gone, or not what was registered.
        ArtifactUnwritable: the target's cannot be written.
    """
    if target.exists(file.folder, file.name):
        try:
            check_file(target, file, advance)
            return
        except ArtifactCorrupt:
            pass  # a copy that was broken off
    with (
        source.open_unchecked(file.folder, file.name) as original,
        target.create(file.folder, file.name) as copy,
    ):
        while chunk := original.read(_CHUNK):
            copy.write(chunk)
            advance(len(chunk))
            if copy.tell() > file.size > 0:
                break  # nor can it be what was registered
    found = copy.digest.sha256
    if found != file.sha256:
        target.delete_file(file.folder, file.name)
        raise source.corrupt(file.folder, file.name, found, file.sha256)


def check_file(artifacts: Artifacts, file: NamedFile, advance: Advance = lambda _n: None) -> None:
    """Raise ArtifactMissing or ArtifactCorrupt unless a file is what was registered."""
    with artifacts.open(file.folder, file.name, file.sha256):
        advance(file.size)
