"""Applying maps on a GPU: ``python benchmarks/gpu.py``, with a CUDA device only.

First the vectors that the engine serves from either device are checked against float64:
‖served − ref‖₂ ≤ 1e-5 · ‖W‖₂ ‖z‖₂ for each. Then vectors per second by batch size, of the map alone
(512 → 256, composed of four): on the CPU; on the GPU with the vectors brought there and back, as
the engine does; on the GPU with vectors that are there already; and of the engine as a whole, ids
looked up and rows gathered included. Without a CUDA device it says so and exits with 1.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.nn.functional import linear

from backcast.chains import load_chain
from backcast.cli.output import print_table
from backcast.lifecycle import Backcast, open_backcast
from backcast.versions import Entity
from benchmarks.measuring import machine, seconds_of
from benchmarks.serving_bench import CHAIN
from benchmarks.serving_data import Deployment, prepare, random_ids
from service.engine import Engine, Snapshot

SIZES = (1, 10, 100, 1_000, 10_000, 100_000)
TOLERANCE = 1e-5
LIVE = len(CHAIN) - 1
SECONDS = 1.0


def snapshot_on(backcast: Backcast, device: str) -> Snapshot:
    """Return what an engine on ``device`` serves."""
    engine = Engine(backcast.registry, backcast.artifacts, backcast.store, device)
    engine.refresh()
    return engine.current()


def largest_error(backcast: Backcast, snapshot: Snapshot, ids: Sequence[str]) -> float:
    """Return the largest ‖served − ref‖₂ ÷ (‖W_k^j‖₂ ‖z_k‖₂) over all versions j and ``ids``."""
    catalog = backcast.registry.deployments.catalog()
    stored = snapshot.store.gather(Entity.ITEM, ids).vectors
    norms = np.linalg.norm(stored, axis=1)
    chain = load_chain(catalog, backcast.artifacts, snapshot.live.version)
    return max(
        float(
            np.max(
                np.linalg.norm(
                    snapshot.vectors(Entity.ITEM, ids, j).vectors - composed(stored), axis=1
                )
                / (composed.norm * norms)
            )
        )
        for j, composed in chain.items()
    )


def rates(cpu: Snapshot, other: Snapshot, ids: Sequence[str]) -> list[float]:
    """Return vectors per second for a batch of ``ids``: see the table's columns."""
    stored = cpu.store.gather(Entity.ITEM, ids).vectors
    applied = other.maps[0]
    out = np.empty((len(ids), len(applied.weight)), np.float32)
    there = torch.from_numpy(stored).to(applied.weight.device)

    def on_device() -> None:
        linear(there, applied.weight, applied.bias)
        if there.is_cuda:
            torch.cuda.synchronize()

    calls: list[Callable[[], object]] = [
        lambda: cpu.maps[0](stored, out),
        lambda: applied(stored, out),
        on_device,
        lambda: cpu.vectors(Entity.ITEM, ids, 0),
        lambda: other.vectors(Entity.ITEM, ids, 0),
    ]
    return [len(ids) / seconds_of(call, SECONDS) for call in calls]


def main() -> int:
    """Check, then time."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=200_000, help="stored vectors")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA device here, so there is nothing to measure.", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}; {machine()}", flush=True)
    with TemporaryDirectory() as folder:
        deployment = Deployment("gpu", CHAIN, LIVE, arguments.items, published=False)
        with open_backcast(prepare(Path(folder), deployment)) as backcast:
            return compare(backcast, random_ids(arguments.items, SIZES[-1]), "cuda")


def compare(backcast: Backcast, ids: Sequence[str], device: str) -> int:
    """Print errors and rates; return 1 where an error is too large for rates to mean anything."""
    cpu, cuda = snapshot_on(backcast, "cpu"), snapshot_on(backcast, device)
    errors = {
        name: largest_error(backcast, snapshot, ids)
        for name, snapshot in (("the CPU", cpu), ("CUDA", cuda))
    }
    for name, error in errors.items():
        print(f"Largest error on {name}: {error:.1e} ‖W‖₂ ‖z‖₂, {TOLERANCE:g} is allowed")
    if not all(error <= TOLERANCE for error in errors.values()):
        print("That is too much: times would mean nothing.", file=sys.stderr)
        return 1
    columns = (
        "batch",
        "CPU",
        "CUDA, copies included",
        "CUDA, without",
        "engine, CPU",
        "engine, CUDA",
    )
    rows = [
        [f"{n:,}", *(f"{r:,.0f}" for r in rates(cpu, cuda, ids[:n]))]
        for n in SIZES
        if n <= len(ids)
    ]
    print_table(columns, rows, title="Vectors per second, 512 → 256")
    return 0


if __name__ == "__main__":
    sys.exit(main())
