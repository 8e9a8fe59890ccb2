"""What the vector stores cost: ``python benchmarks/stores.py [--redis URL]``.

Loads random vectors into an embedded store in a temporary folder, and into Redis where its URL is
given, and prints every figure side by side with NumPy's fancy index over the same matrix in memory,
asked for the same random rows, after all rows were asked for once; of Redis also what others who
read there notice of a load. Opening, the first gather and memory are those of a process of its own.
Pages are in the page cache by then, for the load has just written them.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import orjson
from numpy.typing import NDArray

from backcast.cli.output import print_table, progress
from backcast.settings import Settings
from backcast.stores import Precision, StoredSnapshot, VectorStore, open_store
from backcast.vectors import VectorBatch
from backcast.versions import Entity
from benchmarks.measuring import machine
from benchmarks.stores_beside import COLUMNS, beside

SNAPSHOT = "benchmark"
MANY = 1_000
REPEATS = 300
ROWS = 16_384  # of a batch, as a published snapshot is read


def id_of(row: int) -> str:
    """Return the id of a row, made anew as a request's ids are."""
    return f"B{row:09}"


@dataclass(frozen=True)
class Vectors:
    """N vectors and their ids."""

    matrix: NDArray[np.float32]  # (N, D)
    ids: Sequence[str]

    @classmethod
    def random(cls, items: int, dim: int) -> "Vectors":
        """Draw N × D standard normal numbers; ids of ten characters."""
        rng = np.random.default_rng(0)
        matrix = rng.standard_normal((items, dim), dtype=np.float32)
        return cls(matrix, [id_of(n) for n in range(items)])

    def first(self, items: int) -> "Vectors":
        """Return the first N of them."""
        return Vectors(self.matrix[:items], self.ids[:items])

    def batches(self) -> Iterator[VectorBatch]:
        """Yield them as a snapshot would."""
        for start in range(0, len(self.ids), ROWS):
            stop = start + ROWS
            yield VectorBatch(Entity.ITEM, self.ids[start:stop], self.matrix[start:stop])


@dataclass(frozen=True)
class Times:
    """Of many calls, in seconds."""

    best: float
    median: float

    def __str__(self) -> str:
        return f"{1e6 * self.best:.1f} / {1e6 * self.median:.1f}"


@dataclass(frozen=True)
class Fresh:
    """What a process of its own saw: seconds, and MiB by which it grew."""

    open: float
    first_gather: float
    rss: float
    pss: float
    own: float  # what no file backs, and so no other process shares


@dataclass(frozen=True)
class Figures:
    """What one store costs at one precision."""

    load: float  # vectors a second
    size: float  # bytes of the snapshot, over those of its numbers
    per_id: float  # bytes beyond numbers and ids
    fresh: Fresh
    numpy: Times
    many: Times
    numpy_one: Times
    one: Times

    @property
    def ratio(self) -> float:
        """Best against best, for the same random rows."""
        return self.many.best / self.numpy.best


def load(store: VectorStore, vectors: Vectors) -> float:
    """Load the vectors; return how many a second."""
    items, dim = len(vectors.ids), vectors.matrix.shape[1]
    started = time.perf_counter()
    with progress("loading", items) as advance:
        store.load(SNAPSHOT, dim, {Entity.ITEM: items}, _counted(vectors.batches(), advance))
    return items / (time.perf_counter() - started)


def _counted(
    batches: Iterator[VectorBatch], advance: Callable[[int], None]
) -> Iterator[VectorBatch]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch.ids)
        advance(done)


def compare(held: StoredSnapshot, vectors: Vectors, count: int, repeats: int) -> list[Times]:
    """Time NumPy's fancy index and the store's gather in turn, of ``count`` random rows."""
    rng = np.random.default_rng(1)
    taken: tuple[list[float], list[float]] = [], []
    for _ in range(repeats):
        rows = rng.integers(0, len(vectors.ids), count)
        ids = [id_of(row) for row in rows]
        moments = [time.perf_counter()]
        vectors.matrix[rows]
        moments.append(time.perf_counter())
        held.gather(Entity.ITEM, ids)
        moments.append(time.perf_counter())
        for at, seconds in enumerate(np.diff(moments)):
            taken[at].append(float(seconds))
    return [Times(min(times), median(times)) for times in taken]


def fresh(url: str, items: int) -> Fresh:
    """Open and gather in this process, which has not done so yet."""
    ids = [id_of(row) for row in np.random.default_rng(2).integers(0, items, MANY)]
    before = _memory()
    started = time.perf_counter()
    held = open_store(Settings(store_url=url)).open(SNAPSHOT)
    opened = time.perf_counter()
    held.gather(Entity.ITEM, ids)
    gathered = time.perf_counter()
    grown = [after - earlier for after, earlier in zip(_memory(), before, strict=True)]
    return Fresh(opened - started, gathered - opened, *grown)


def _memory() -> list[float]:
    """Return MiB resident, the process's share of them, and those that no file backs. Linux."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kib = {
        name: float(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)
    }
    return [kib[name] / 1024 for name in ("Rss", "Pss", "Anonymous")]


def in_process(url: str, items: int) -> Fresh:
    """Return what ``fresh`` finds in a new process."""
    command = [sys.executable, "-m", "benchmarks.stores", "--one", url, str(items)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return Fresh(**orjson.loads(ended.stdout))


def measure(url: str, precision: Precision, vectors: Vectors) -> Figures:
    """Load, measure, and drop again."""
    store = open_store(Settings(store_url=url, store_precision=precision.value))
    store.drop(SNAPSHOT)
    speed = load(store, vectors)
    held = store.open(SNAPSHOT)
    numbers = vectors.matrix.size * precision.dtype.itemsize
    ids = sum(map(len, vectors.ids))
    alone = in_process(url, len(vectors.ids))
    for batch in vectors.batches():
        held.gather(Entity.ITEM, batch.ids)
    figures = Figures(
        speed,
        held.size / numbers,
        (held.size - numbers - ids) / len(vectors.ids),
        alone,
        *compare(held, vectors, MANY, REPEATS),
        *compare(held, vectors, 1, 10 * REPEATS),
    )
    store.drop(SNAPSHOT)
    store.close()
    return figures


ROWS_OF_TABLE: dict[str, Callable[[Figures], str]] = {
    "load, vectors/s": lambda f: f"{f.load:,.0f}",
    "bytes, over those of the numbers": lambda f: f"{f.size:.3f}",
    "bytes an id beyond the id": lambda f: f"{f.per_id:.1f}",
    "open, ms": lambda f: f"{1e3 * f.fresh.open:.1f}",
    f"first gather of {MANY}, ms": lambda f: f"{1e3 * f.fresh.first_gather:.1f}",
    "a process that does both: RSS, MiB": lambda f: f"{f.fresh.rss:.1f}",
    "its share of it (PSS), MiB": lambda f: f"{f.fresh.pss:.1f}",
    "its own, shared with nobody, MiB": lambda f: f"{f.fresh.own:.1f}",
    f"NumPy, {MANY} rows, best / median µs": lambda f: str(f.numpy),
    f"gather of {MANY}, best / median µs": lambda f: str(f.many),
    "ratio of the best": lambda f: f"{f.ratio:.2f}",
    "NumPy, 1 row, best / median µs": lambda f: str(f.numpy_one),
    "gather of 1, best / median µs": lambda f: str(f.one),
}


def print_figures(columns: dict[str, Figures], title: str) -> None:
    """Print one column a store."""
    rows = [[name, *map(shown, columns.values())] for name, shown in ROWS_OF_TABLE.items()]
    print_table(("", *columns), rows, title=title)


def print_verdicts(figures: Figures) -> None:
    """Say which bounds of the embedded store are kept."""
    for bound, kept in (
        ("opens in under a second", figures.fresh.open < 1),
        ("takes at most 1.1 times the bytes of the numbers", figures.size <= 1.1),
        ("takes at most 64 bytes an id", figures.per_id <= 64),
        (f"gathers {MANY} within 3 times NumPy", figures.ratio <= 3),
    ):
        print(f"embedded {bound}: {'kept' if kept else 'NOT KEPT'}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--precisions", default="float32", help="with commas")
    parser.add_argument("--folder", type=Path, help="where the embedded store is made for a while")
    parser.add_argument("--redis", metavar="URL", help="a server to compare with")
    parser.add_argument("--redis-items", type=int, default=100_000)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        url, items = arguments.one
        sys.stdout.buffer.write(orjson.dumps(asdict(fresh(url, int(items)))))
        return
    print(machine())
    vectors = Vectors.random(arguments.items, arguments.dim)
    precisions = [Precision(name) for name in arguments.precisions.split(",")]
    with TemporaryDirectory(dir=arguments.folder) as folder:
        url = f"embedded:{folder}"
        columns = {f"{p}": measure(url, p, vectors) for p in precisions}
        tenth = measure(url, precisions[0], vectors.first(len(vectors.ids) // 10))
    columns[f"{precisions[0]}, a tenth"] = tenth
    print_figures(columns, f"embedded, {arguments.items:,} × {arguments.dim}")
    print_verdicts(columns[precisions[0]])
    if arguments.redis:
        fewer = vectors.first(arguments.redis_items)
        columns = {f"{p}": measure(arguments.redis, p, fewer) for p in precisions}
        print_figures(columns, f"Redis, {arguments.redis_items:,} × {arguments.dim}")
        noticed = beside(arguments.redis, SNAPSHOT, list(fewer.batches()))
        print_table(COLUMNS, [one.row() for one in noticed], title="what its readers notice")


if __name__ == "__main__":
    main()
