"""The in-process limit of a batch: ids looked up, rows gathered, one product, bytes.

Run by ``benchmarks/serving.py`` in a process of its own, on the settings in the environment.
"""

import argparse
import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import orjson
import torch

from backcast.lifecycle import open_backcast
from backcast.settings import Settings
from backcast.versions import Entity
from benchmarks.serving_load import pieces
from service.engine import Engine


@dataclass(frozen=True)
class Limit:
    """Seconds of the parts of all calls, one after another in one thread.

    Attributes:
        gather: looking up the ids and gathering their stored vectors.
        product: mapping them.
        copy: writing the answer's bytes.
        vectors: how many were made.
        threads: of the product.
    """

    gather: float
    product: float
    copy: float
    vectors: int
    threads: int

    @property
    def rate(self) -> float:
        """Vectors per second."""
        return self.vectors / (self.gather + self.product + self.copy)

    @property
    def gather_share(self) -> float:
        """The store's share of the time."""
        return self.gather * self.rate / self.vectors

    def __str__(self) -> str:
        parts = (self.gather, self.product, self.copy)
        shown = " + ".join(f"{1e6 * part / self.vectors:.2f}" for part in parts)
        return f"{self.rate:,.0f} vectors/s, {shown} µs a vector (gather, product, bytes)"


def measure(settings: Settings, ids: list[str], size: int, seconds: float) -> Limit:
    """Answer batches of ``size`` ids with ver-0 vectors, for some seconds after a first round."""
    with open_backcast(settings) as backcast:
        engine = Engine(backcast.registry, backcast.artifacts, backcast.store, settings.device)
        engine.refresh()
        snapshot = engine.current()
        stored, applied = snapshot.store, snapshot.maps[0]
        sent = pieces(ids, size)
        mapped = np.empty((size, len(applied.weight)), np.float32)
        for batch in sent[:10]:
            applied(stored.gather(Entity.ITEM, batch).vectors, mapped)
        gather = product = copy = 0.0
        vectors = 0
        for batch in itertools.cycle(sent):
            start = time.perf_counter()
            rows = stored.gather(Entity.ITEM, batch).vectors
            gathered = time.perf_counter()
            applied(rows, mapped)
            multiplied = time.perf_counter()
            mapped.astype("<f4", copy=False).tobytes()
            gather += gathered - start
            product += multiplied - gathered
            copy += time.perf_counter() - multiplied
            vectors += size
            if gather + product + copy > seconds:
                return Limit(gather, product, copy, vectors, torch.get_num_threads())
        raise AssertionError("there are fewer ids than a batch has")


def main() -> None:
    """Print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ids", type=Path, required=True, help="file of ids, one a line")
    parser.add_argument("--size", type=int, required=True, help="ids in a batch")
    parser.add_argument("--seconds", type=float, required=True)
    arguments = parser.parse_args()
    ids = arguments.ids.read_text().split()
    limit = measure(Settings.load(), ids, arguments.size, arguments.seconds)
    sys.stdout.buffer.write(orjson.dumps(limit))


if __name__ == "__main__":
    main()
