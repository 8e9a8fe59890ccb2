"""Time and peak memory of one training epoch: ``python benchmarks/training.py --data DIR``.

Each row is a process of its own, so that its peak memory is its own. The first epoch warms up and
is not counted; evaluation is left out.
"""

import argparse
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import orjson
import torch

from backcast.alignment import AlignmentLoss, BackwardTransformation, alignment_gram
from trainer.config import TrainConfig
from trainer.data.dataset import Dataset, resolve_until
from trainer.features import Vocabulary
from trainer.fitting import EpochReport, JointAlignment, fit
from trainer.graph import Graph
from trainer.model import GraphSAGE
from trainer.split import make_split

UNTIL = "0.7"


def measure(data: Path, preset: str, version: int, epochs: int) -> dict[str, float]:
    """Train ``epochs`` + 1 epochs of one version; alignment targets are random, of true shape."""
    dataset = Dataset.read(data)
    config = TrainConfig.load(preset, epochs=epochs + 1)
    split = make_split(dataset, resolve_until(dataset, UNTIL), None, config.protocol)
    vocabulary = Vocabulary.of(dataset, split.items, config.min_value_count)
    graph = Graph.of(dataset, split.train, split.users, split.items, vocabulary)
    before = _peak_mib()
    model = GraphSAGE(config.width(version), config.depth(version), vocabulary.sizes)
    joint = None if version == 0 else _joint(config, version, split.users + split.items)
    moments: list[float] = []

    def on_epoch(_report: EpochReport) -> None:
        moments.append(time.perf_counter())

    fit(model, graph, split.train, config, joint=joint, selection=None, on_epoch=on_epoch)
    return {
        "seconds": (moments[-1] - moments[0]) / epochs,
        "steps": -(-len(split.train) // config.batch_size),
        "edges": len(split.train),
        "peak_mib": _peak_mib(),
        "before_mib": before,
    }


def _joint(config: TrainConfig, version: int, nodes: int) -> JointAlignment:
    widths = [config.width(j) for j in range(version)]
    older = [torch.randn(width, widths[-1], dtype=torch.float64) for width in widths]
    return JointAlignment(
        BackwardTransformation(config.width(version), widths[-1]),
        AlignmentLoss(alignment_gram(older)),
        torch.randn(nodes, widths[-1]),
    )


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _in_process(arguments: argparse.Namespace, preset: str, version: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--data", str(arguments.data), "--epochs"]
    command += [str(arguments.epochs), "--one", preset, str(version)]
    done = subprocess.run(command, capture_output=True, check=True)
    measured: dict[str, float] = orjson.loads(done.stdout)
    return measured


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="data set folder")
    parser.add_argument(
        "--epochs", type=int, default=2, help="epochs to time, after one to warm up"
    )
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        preset, version = arguments.one
        measured = measure(arguments.data, preset, int(version), arguments.epochs)
        sys.stdout.buffer.write(orjson.dumps(measured))
        return
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    print("preset  version  edges   steps  s/epoch  ms/step  peak MiB  of it, model and training")
    for preset in ("small", "paper"):
        for version in (0, 2):
            m = _in_process(arguments, preset, version)
            print(
                f"{preset:7} {version:7} {m['edges']:7.0f} {m['steps']:6.0f} {m['seconds']:8.2f} "
                f"{1000 * m['seconds'] / m['steps']:8.1f} {m['peak_mib']:9.0f} "
                f"{m['peak_mib'] - m['before_mib']:9.0f}"
            )


if __name__ == "__main__":
    main()
