"""What a promotion diff costs: ``python -m benchmarks.diff [--items 100000,1000000] [--dim 128]``.

Makes two versions of random vectors on disk, loads one into an embedded store, and compares the
other with it in a process of its own, with and without drift bounds, as a promotion does. Prints
seconds, vectors a second, and by how much that process grew, beyond the store's pages that it
shares with others. Loading the same vectors into a store stands beside it: a promotion does both.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread

import numpy as np
import orjson

from backcast.artifacts import dump_tensors
from backcast.cli.output import print_table
from backcast.lifecycle import (
    compare_with_live,
    load_snapshot,
    open_backcast,
    promote,
    publish,
    register_version,
)
from backcast.registry import VersionDraft
from backcast.settings import Settings
from backcast.vectors import VectorBatch
from backcast.versions import Entity, Transform
from benchmarks.measuring import machine

ROWS = 16_384


@dataclass(frozen=True)
class Figures:
    """Seconds, and MiB by which the process grew at most: all pages, and those of no file."""

    seconds: float
    rss: float
    own: float


def vectors(items: int, dim: int, seed: int) -> Iterator[VectorBatch]:
    """Yield random vectors; one id in a hundred is of this version only."""
    rng = np.random.default_rng(seed)
    for start in range(0, items, ROWS):
        rows = range(start, min(start + ROWS, items))
        ids = [f"B{n:09}" if n % 100 else f"V{seed}-{n:09}" for n in rows]
        yield VectorBatch(Entity.ITEM, ids, rng.standard_normal((len(rows), dim), dtype=np.float32))


def prepare(settings: Settings, items: int, dim: int) -> None:
    """Register two versions, publish both, and promote the first."""
    rng = np.random.default_rng(0)
    with open_backcast(settings) as backcast:
        for number in (0, 1):
            weight = rng.standard_normal((dim, dim)).astype(np.float32) / np.sqrt(dim, dtype="f4")
            own = [Transform(1, 0, False, dim, dim, False, "transform.safetensors")][:number]
            draft = VersionDraft(
                number, number - 1 if number else None, dim, "random", 0, 0, "none", "0" * 64, "",
                {}, {}, own,
            )  # fmt: skip
            files = {"transform.safetensors": dump_tensors({"weight": weight})}
            register_version(backcast.registry, backcast.artifacts, draft, files)
            rows = vectors(items, dim, number)
            publish(backcast.registry, backcast.artifacts, number, rows, details={})
        promote(backcast, 0, actor="benchmark")


def measure(home: Path, what: str) -> Figures:
    """Do it in this process, and watch how it grows."""
    with open_backcast(settings_of(home)) as backcast:
        found = backcast.registry.snapshots.latest(1)
        assert found is not None
        acts: dict[str, Callable[[], object]] = {
            "diff": partial(compare_with_live, backcast, 1),
            "promotion": partial(promote, backcast, 1, actor="benchmark"),
            "load": partial(load_snapshot, backcast, found.id),
        }
        with Watch() as watch:
            started = time.perf_counter()
            acts[what]()
            seconds = time.perf_counter() - started
        if what == "load":
            backcast.store.drop(found.id)
    return Figures(seconds, *watch.grown)


class Watch:
    """Looks at this process's memory every few milliseconds."""

    def __init__(self) -> None:
        self._stop, self._before = Event(), _memory()
        self.grown = (0.0, 0.0)
        self._thread = Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.02):
            now = _memory()
            rss, own = (n - b for n, b in zip(now, self._before, strict=True))
            self.grown = max(self.grown[0], rss), max(self.grown[1], own)


def _memory() -> tuple[float, float]:
    """Return MiB resident, and those that no file backs. Linux."""
    fields = dict(
        line.split(":")
        for line in Path("/proc/self/status").read_text().splitlines()
        if ":" in line
    )
    return tuple(int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]


def settings_of(home: Path) -> Settings:
    """Return the settings of a home where random vectors may be promoted."""
    return Settings(home=home, gate_coverage=0, gate_change=1e9)


def in_process(home: Path, what: str) -> Figures:
    """Return what ``measure`` finds in a new process."""
    command = [sys.executable, "-m", "benchmarks.diff", "--one", str(home), what]
    ended = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return Figures(**orjson.loads(ended.stdout))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", default="100000,1000000", help="with commas")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--folder", type=Path, help="where the vectors are made for a while")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        home, what = arguments.one
        sys.stdout.buffer.write(orjson.dumps(asdict(measure(Path(home), what))))
        return
    print(machine())
    rows = []
    for items in map(int, arguments.items.split(",")):
        with TemporaryDirectory(dir=arguments.folder) as folder:
            prepare(settings_of(Path(folder)), items, arguments.dim)
            for what in ("load", "diff", "promotion"):
                found = in_process(Path(folder), what)
                rows.append(
                    (
                        f"{items:,}",
                        what,
                        f"{found.seconds:.1f}",
                        f"{items / found.seconds:,.0f}",
                        f"{found.rss:.0f}",
                        f"{found.own:.0f}",
                    )
                )
    columns = ("vectors", "what", "seconds", "vectors/s", "grew, MiB", "of it in no file, MiB")
    print_table(columns, rows, title=f"A promotion of {arguments.dim} dimensions, two versions")
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"Largest process: {largest:.0f} MiB")


if __name__ == "__main__":
    main()
