"""The counts of a replica's workers, one file each, in a folder that they share.

A worker locks its file's name for as long as it lives, and the kernel unlocks it however it ends.
Whoever starts next takes over an unlocked name and goes on from what it holds: what was written is
never lost, and there are never more files than workers lived at one time. A file is written whole,
every second and before anything is shown of it, so that nothing that was shown is ever taken back.
"""

import fcntl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO

import orjson
from pydantic import BaseModel, ValidationError

from backcast.errors import ConfigError
from service.metrics.families import FAMILIES, Key


@dataclass(frozen=True)
class Sheet:
    """What one worker has counted, and how it stands.

    Attributes:
        counts: counters, one number each, and histograms: one for each bucket, one for what is
            beyond, and the sum.
        gauges: of a living worker; an age as the Unix time since which it grows.
    """

    counts: Mapping[Key, Sequence[float]] = field(default_factory=dict)
    gauges: Mapping[Key, float] = field(default_factory=dict)


class _Document(BaseModel):
    """A sheet as it is written."""

    counts: list[tuple[Key, list[float]]]
    gauges: list[tuple[Key, float]]


class SheetFile:
    """The file of one worker, in a folder of several."""

    def __init__(self, folder: Path, number: int) -> None:
        self._folder, self._number = folder, number

    def taken_over(self) -> Sheet:
        """Return what an ended worker has left under this name."""
        return _read(self._folder, self._number)

    def write(self, sheet: Sheet) -> None:
        """Replace what others read; raise OSError."""
        written = _path(self._folder, self._number).with_suffix(".new")
        document = {"counts": [*sheet.counts.items()], "gauges": [*sheet.gauges.items()]}
        written.write_bytes(orjson.dumps(document))
        written.replace(_path(self._folder, self._number))

    def others(self) -> list[Sheet]:
        """Return the sheets of the other workers; without gauges of those that have ended."""
        stems = {path.stem for path in self._folder.glob("*.json")}
        numbers = {int(stem) for stem in stems if stem.isdecimal()} - {self._number}
        return [self._other(number) for number in sorted(numbers)]

    def _other(self, number: int) -> Sheet:
        sheet = _read(self._folder, number)
        return sheet if _is_locked(self._folder, number) else Sheet(sheet.counts)


@contextmanager
def claimed(folder: Path) -> Iterator[SheetFile]:
    """Claim the first name that no living worker has, until the block ends; raise ConfigError."""
    try:
        number, lock = _claim(folder)
    except OSError as error:
        raise ConfigError(
            f"BACKCAST_METRICS_FOLDER={str(folder)!r} cannot be used: {error.strerror}. "
            "Name a folder on this host that the service may write to."
        ) from error
    with lock:
        yield SheetFile(folder, number)


def _claim(folder: Path) -> tuple[int, IO[bytes]]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in count():
        lock = _lock_path(folder, number).open("ab")
        if _try_lock(lock, fcntl.LOCK_EX):
            return number, lock
        lock.close()
    raise AssertionError("numbers do not end")


def _read(folder: Path, number: int) -> Sheet:
    """Return what a file says; nothing, where there is none, or none of ours that is whole."""
    try:
        document = _Document.model_validate_json(_path(folder, number).read_bytes())
    except (OSError, ValidationError):
        return Sheet()
    return Sheet(
        {key: numbers for key, numbers in document.counts if _fits(key, len(numbers))},
        {key: number for key, number in document.gauges if _fits(key, 1)},
    )


def _fits(key: Key, width: int) -> bool:
    # The folder may have been another release's.
    family = FAMILIES.get(key[0])
    return family is not None and (len(family.labels), family.width) == (len(key[1]), width)


def _is_locked(folder: Path, number: int) -> bool:
    with _lock_path(folder, number).open("ab") as lock:
        return not _try_lock(lock, fcntl.LOCK_SH)


def _try_lock(lock: IO[bytes], how: int) -> bool:
    try:
        fcntl.flock(lock, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number}.json"


def _lock_path(folder: Path, number: int) -> Path:
    return folder / f"{number}.lock"
