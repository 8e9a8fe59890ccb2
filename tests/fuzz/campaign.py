"""Mutated contents, by the thousand, read in a process of its own that may die.

A child has a limit on its memory; where it dies, by a signal or by that limit, the case that it was
at is a failure, and another child goes on behind it.
"""

import faulthandler
import mmap
import os
import resource
import struct
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random

from tests.fuzz.mutations import mutate
from tests.fuzz.target import Target

_MEMORY = 4 << 30  # bytes of addresses; what the libraries map takes about half
_MOST_GROWTH = 256 << 10  # KiB that one case may add to what the process has ever held
_RECORD = struct.Struct("<QQQ")  # the case, how many were tried, how many were accepted
_TOLD = 4096


@dataclass
class Outcome:
    """What became of the cases of one target; failures by what they look like."""

    tried: int = 0
    accepted: int = 0
    failures: dict[str, str] = field(default_factory=dict)


def attack(target: Target, *, cases: int, seed: int = 0, seconds: float | None = None) -> Outcome:
    """Read the seeds, and then mutations of them until ``cases`` or ``seconds`` are over."""
    until = None if seconds is None else time.monotonic() + seconds
    outcome, run = Outcome(), _Run(target, list(target.seeds()), seed, until)
    with mmap.mmap(-1, _RECORD.size + _TOLD) as shared, tempfile.TemporaryDirectory() as folder:
        start = 0
        while start < cases:
            place = Path(tempfile.mkdtemp(dir=folder))
            status = _in_a_child(partial(run.read, range(start, cases), place, shared))
            case, tried, accepted = _RECORD.unpack_from(shared)
            outcome.tried += tried
            outcome.accepted += accepted
            if status == 0:
                break
            told = shared[_RECORD.size :].rstrip(b"\0").decode(errors="replace")
            what = told if os.WIFEXITED(status) else f"killed by signal {os.WTERMSIG(status)}"
            where = f"case {case} of seed {seed}"
            outcome.failures.setdefault(what.splitlines()[-1], f"{where}: {what}")
            shared[:] = bytes(len(shared))
            start = case + 1
    return outcome


def content_of(seeds: list[bytes], seed: int, case: int) -> bytes:
    """Return the content of a case: a seed, and after all of them mutations."""
    return seeds[case] if case < len(seeds) else mutate(Random(f"{seed}/{case}"), seeds)


def _in_a_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # the edge of a process: the parent reads what was told
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


@dataclass(frozen=True)
class _Run:
    """What a child is to read, until a moment of the monotonic clock."""

    target: Target
    seeds: list[bytes]
    seed: int
    until: float | None

    def read(self, cases: range, folder: Path, shared: mmap.mmap) -> None:
        """Read the cases, and say in shared memory which one it is, and how it ended."""
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()  # the parent says of what a child died
        _silence()
        accepts, accepted = self.target.reader(folder), 0
        for tried, case in enumerate(cases, start=1):
            if self.until is not None and time.monotonic() > self.until:
                break
            _RECORD.pack_into(shared, 0, case, tried, accepted)
            try:
                content = content_of(self.seeds, self.seed, case)
                accepted += _at_a_modest_price(accepts, content)
            except BaseException as error:
                told = "".join(traceback.format_exception(error)).strip().encode()[-_TOLD:]
                shared[_RECORD.size : _RECORD.size + len(told)] = told
                raise
            _RECORD.pack_into(shared, 0, case, tried, accepted)


def _at_a_modest_price(accepts: Callable[[bytes], bool], content: bytes) -> bool:
    before = _most_held()
    accepted = accepts(content)
    grown = _most_held() - before
    assert grown < _MOST_GROWTH, f"{len(content)} bytes took {grown} KiB of memory"
    return accepted


def _most_held() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
