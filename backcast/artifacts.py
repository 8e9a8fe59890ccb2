"""Artifacts: immutable files in folders of their own, on any file system that fsspec knows.

A folder's name is unique, so that nothing is ever overwritten and a folder that no registry row
names is only litter. Every file has a SHA-256 that the registry keeps and every read checks.
Tensors are safetensors; nothing is ever unpickled.
"""

import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
import orjson
import safetensors.numpy
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from safetensors import SafetensorError

from backcast.errors import (
    ArtifactCorrupt,
    ArtifactError,
    ArtifactMissing,
    ArtifactUnwritable,
    ConfigError,
)
from backcast.folders import make_private
from backcast.versions import FileDigest

FOLDER = re.compile(r"(versions|snapshots|deltas|drifts)/[^/]+-[0-9a-f]{8}")
"""Every name that ``new_folder`` gives."""

SHA256 = re.compile("[0-9a-f]{64}")
"""A digest as it is written, in the registry and in lists of erasures."""

_CHUNK = 1 << 20


class Artifacts:
    """Folders of files below one root URL."""

    def __init__(self, url: str) -> None:
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            shown = url if "@" not in url else f"{url.partition(':')[0]}:…"  # what may be a secret
            raise ConfigError(f"BACKCAST_ARTIFACTS_URL={shown!r}: {error}.") from error
        self._local = isinstance(self._fs, LocalFileSystem)

    def overlaps(self, other: "Artifacts") -> bool:
        """Return whether both have the same root, or one lies within the other's."""
        one, two = self._place(), other._place()
        return one.startswith(two) or two.startswith(one)

    def _place(self) -> str:
        root = os.path.realpath(self._root) if self._local else self._root
        return f"{self._fs.unstrip_protocol(root)}".rstrip("/") + "/"

    def new_folder(self, kind: str, name: str) -> str:
        """Return the name of a folder that nobody else will be given."""
        return f"{kind}/{name}-{secrets.token_hex(4)}"

    def url(self, *parts: str) -> str:
        """Return where a folder lies, or a file in it, for messages."""
        return str(self._fs.unstrip_protocol(self._path(*parts)))

    def write(self, folder: str, files: Mapping[str, bytes]) -> dict[str, FileDigest]:
        """Write small files; they are durable when this returns."""
        digests = {}
        for name, content in files.items():
            with self.create(folder, name) as file:
                file.write(content)
            digests[name] = file.digest
        return digests

    @contextmanager
    def create(self, folder: str, name: str) -> Iterator["HashingFile"]:
        """Open a new file for writing; durable, and its digest known, when the block ends.

        Raises:
            ArtifactUnwritable: there is no permission, no space or no such place.
        """
        path, url = self._path(folder, name), self.url(folder, name)
        with _translated(url):
            if self._local:
                make_private(Path(self._root))
            self._fs.makedirs(os.path.dirname(path), exist_ok=True)
            raw = self._fs.open(path, "wb")
        file = HashingFile(raw, url)
        try:
            yield file
        except BaseException:
            with suppress(OSError):
                raw.close()
            raise
        with _translated(url), closing(raw):
            raw.flush()
            if self._local:
                os.fsync(raw.fileno())
        if self._local:
            _sync_folders(os.path.dirname(path), self._root)

    def check_writable(self) -> None:
        """Raise ArtifactUnwritable now, and not after hours of training."""
        folder = self.new_folder("versions", "check")
        self.write(folder, {"empty": b""})
        self.delete(folder)

    def read(self, folder: str, name: str, sha256: str) -> bytes:
        """Return a file's content; raise ArtifactMissing or ArtifactCorrupt."""
        with self._open(folder, name) as file:
            content: bytes = file.read()
        self._compare(folder, name, hashlib.sha256(content).hexdigest(), sha256)
        return content

    @contextmanager
    def open(self, folder: str, name: str, sha256: str) -> Iterator[IO[bytes]]:
        """Open a large file for reading, after its digest has been checked in a first pass."""
        with self._open(folder, name) as file:
            hashed = hashlib.sha256()
            while chunk := file.read(_CHUNK):
                hashed.update(chunk)
            self._compare(folder, name, hashed.hexdigest(), sha256)
            file.seek(0)
            yield file

    @contextmanager
    def open_unchecked(self, folder: str, name: str) -> Iterator[IO[bytes]]:
        """Open a large file for reading some of it; what is read was not checked."""
        with self._open(folder, name) as file:
            yield file

    def delete(self, folder: str) -> None:
        """Remove a folder; one that is gone already is fine.

        Raises:
            ArtifactUnwritable: there is no permission.
        """
        path = self._path(folder)
        with _translated(self.url(folder)):
            while self._fs.exists(path):
                with suppress(FileNotFoundError):  # another process may be deleting it too
                    self._fs.rm(path, recursive=True)

    def delete_file(self, folder: str, name: str) -> None:
        """Remove one file; one that is gone already is fine.

        Raises:
            ArtifactUnwritable: there is no permission.
        """
        with _translated(self.url(folder, name)), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(folder, name))

    def exists(self, folder: str, name: str) -> bool:
        """Return whether a file is there; nothing is said of its content.

        Raises:
            ArtifactError: that cannot be told.
        """
        with _reading(self.url(folder, name)):
            found: bool = self._fs.exists(self._path(folder, name))
        return found

    def size(self, folder: str) -> int:
        """Return how many bytes the files of a folder take; 0 for one that is gone.

        Raises:
            ArtifactError: that cannot be told.
        """
        path = self._path(folder)
        with _reading(self.url(folder)), suppress(FileNotFoundError):  # deleted meanwhile
            return int(self._fs.du(path)) if self._fs.exists(path) else 0
        return 0

    def folders(self) -> dict[str, "FoundFolder"]:
        """Return every folder that holds files, by name, whoever wrote it; "" is the root.

        Raises:
            ArtifactError: they cannot be listed.
        """
        self._fs.invalidate_cache()
        found: dict[str, FoundFolder] = {}
        start = len(self._path(""))
        with _reading(self.url("")):
            for path, about in self._fs.find(self._path(""), detail=True).items():
                folder, _, name = path[start:].rpartition("/")
                if name:
                    file = FoundFolder(about["size"], self._fs.modified(path).astimezone(UTC))
                    found[folder] = file if folder not in found else found[folder] + file
        return found

    def now(self) -> datetime:
        """Return the time by the file system's own clock: that of a new file."""
        folder = self.new_folder("versions", "clock")
        self.write(folder, {"empty": b""})
        moment: datetime = self._fs.modified(self._path(folder, "empty"))
        self.delete(folder)
        return moment.astimezone(UTC)

    def read_tensors(self, folder: str, name: str, sha256: str) -> dict[str, NDArray[np.generic]]:
        """Return the arrays of a safetensors file."""
        content = self.read(folder, name, sha256)
        try:
            return safetensors.numpy.load(content)
        except (SafetensorError, ValueError, KeyError) as error:
            raise ArtifactCorrupt(self.url(folder, name), f"not safetensors ({error})") from error

    def read_json(self, folder: str, name: str, sha256: str) -> Any:
        """Return the content of a JSON file."""
        try:
            return orjson.loads(self.read(folder, name, sha256))
        except orjson.JSONDecodeError as error:
            raise ArtifactCorrupt(self.url(folder, name), f"not JSON ({error})") from error

    def _path(self, *parts: str) -> str:
        if any(".." in part.split("/") for part in parts):
            raise ArtifactError(f"{'/'.join(parts)} leads out of the folder of the artifacts.")
        return "/".join((self._root.rstrip("/"), *parts))

    @contextmanager
    def _open(self, folder: str, name: str) -> Iterator[IO[bytes]]:
        path = self._path(folder, name)
        if self._local and os.path.exists(path) and not os.path.isfile(path):
            raise ArtifactError(f"{self.url(folder, name)} cannot be read: it is no regular file.")
        try:
            file = self._fs.open(path, "rb")
        except FileNotFoundError as error:
            raise ArtifactMissing(self.url(folder, name)) from error
        except OSError as error:
            raise _unreadable(self.url(folder, name), error) from error
        with file:
            yield file

    def corrupt(self, folder: str, name: str, found: str, registered: str) -> ArtifactCorrupt:
        """Return the error of a file whose digest is not the one that was registered."""
        return ArtifactCorrupt(
            self.url(folder, name),
            f"its SHA-256 is {found[:12]}…, registered was {registered[:12]}…",
        )

    def _compare(self, folder: str, name: str, found: str, registered: str) -> None:
        if found != registered:
            raise self.corrupt(folder, name, found, registered)


@dataclass(frozen=True)
class FoundFolder:
    """What the files of a folder take, and when the youngest was written."""

    size: int
    changed_at: datetime

    def __add__(self, other: "FoundFolder") -> "FoundFolder":
        return FoundFolder(self.size + other.size, max(self.changed_at, other.changed_at))


class HashingFile:
    """A file being written that knows its digest."""

    def __init__(self, raw: IO[bytes], url: str) -> None:
        self._raw, self._url = raw, url
        self._hash = hashlib.sha256()
        self._size = 0
        self.closed = False

    @property
    def digest(self) -> FileDigest:
        """Size and SHA-256 of what was written so far."""
        return FileDigest(self._size, self._hash.hexdigest())

    def write(self, data: Any) -> int:
        """Append bytes (or a buffer of them)."""
        view = memoryview(data).cast("B")
        with _translated(self._url):
            self._raw.write(view)
        self._hash.update(view)
        self._size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """Return the number of bytes written."""
        return self._size

    def flush(self) -> None:
        """Nothing to do before the block ends."""

    def close(self) -> None:
        """Nothing to do: the block that opened the file closes it."""


def dump_tensors(arrays: Mapping[str, NDArray[np.generic]]) -> bytes:
    """Return arrays as one safetensors file."""
    return safetensors.numpy.save({name: np.ascontiguousarray(a) for name, a in arrays.items()})


def dump_json(document: Any) -> bytes:
    """Return a document as indented JSON, keys sorted so that equal documents are equal bytes."""
    return orjson.dumps(document, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)


@contextmanager
def _translated(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactUnwritable(url, error.strerror or str(error)) from error


@contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _unreadable(url, error) from error


def _unreadable(url: str, error: OSError) -> ArtifactError:
    return ArtifactError(f"{url} cannot be read: {error.strerror or error}.")


def _sync_folders(folder: str, root: str) -> None:
    # A new file survives a power cut only once the folders that name it are on disk too.
    while len(folder) >= len(root.rstrip("/")) and os.path.isdir(folder):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        folder = os.path.dirname(folder)
