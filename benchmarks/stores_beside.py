"""What readers of a Redis notice while a snapshot is loaded, looked for and dropped there.

A process of its own gets one key every two milliseconds, and writes down when and how long it took.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO

import numpy as np
from numpy.typing import NDArray
from redis import Redis

from backcast.settings import Settings
from backcast.stores import open_store
from backcast.vectors import VectorBatch
from backcast.versions import Entity

PAUSE_S = 0.002
SETTLED_S = 0.5


@dataclass(frozen=True)
class Noticed:
    """How long an act took, and gets of one key beside it: seconds."""

    act: str
    seconds: float
    median: float
    p99: float
    longest: float

    def row(self) -> list[str]:
        """Return a line of the table."""
        gets = (self.median, self.p99, self.longest)
        return [self.act, f"{self.seconds:.2f}", *(f"{1e3 * get:.2f}" for get in gets)]


COLUMNS = ("", "s", "gets beside it: p50 ms", "p99 ms", "longest ms")


def beside(url: str, snapshot: str, batches: Sequence[VectorBatch]) -> list[Noticed]:
    """Do nothing, load, list and drop a snapshot of items while another process reads."""
    counts = {Entity.ITEM: sum(len(batch.ids) for batch in batches)}
    store = open_store(Settings(store_url=url))
    store.drop(snapshot)
    acts: dict[str, Callable[[], object]] = {
        "nothing": lambda: time.sleep(2),
        "load": lambda: store.load(snapshot, batches[0].dim, counts, batches),
        "list the snapshots": store.snapshots,
        "drop": lambda: store.drop(snapshot),
    }
    spans = {}
    with TemporaryFile() as file:
        with _reading(url, file):
            for name, act in acts.items():
                time.sleep(SETTLED_S)
                started = time.time()
                act()
                spans[name] = started, time.time()
            time.sleep(SETTLED_S)
        file.seek(0)
        gets = np.loadtxt(file)
    store.close()
    return [_noticed(name, *span, gets) for name, span in spans.items()]


def _noticed(act: str, begun: float, ended: float, gets: NDArray[np.float64]) -> Noticed:
    """Count the gets that were under way within the act, or began within a few after it."""
    at, took = gets.T
    near = (at + took >= begun) & (at <= ended + 10 * PAUSE_S)
    found = took[near] if near.any() else took[at >= begun][:1]
    return Noticed(act, ended - begun, *(float(np.quantile(found, q)) for q in (0.5, 0.99, 1)))


@contextmanager
def _reading(url: str, file: IO[bytes]) -> Iterator[None]:
    """Read in another process during the block, which writes moments and seconds to a file."""
    reader = subprocess.Popen([sys.executable, "-m", __name__, url], stdout=file)
    try:
        yield
    finally:
        reader.terminate()
        reader.wait()


def main() -> None:
    """Read until this is told to stop."""
    with Redis.from_url(sys.argv[1]) as client, suppress(KeyboardInterrupt):
        while True:
            moment, started = time.time(), time.perf_counter()
            client.get("nothing")
            print(moment, time.perf_counter() - started, flush=True)
            time.sleep(PAUSE_S)


if __name__ == "__main__":
    main()
