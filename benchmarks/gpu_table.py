"""The paper's table on a GPU: ``python benchmarks/gpu_table.py --data DIR --out DIR``.

Checks first that one step on CUDA has the loss that it has on the CPU, and times an epoch on both.
Then does what ``backcast benchmark --preset paper --device cuda`` does, and prints the time of each
kind of work. Without a CUDA device it says so and exits with 1.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from backcast.cli.output import print_table
from benchmarks.measuring import machine
from benchmarks.problems import Problem
from trainer.config import TrainConfig
from trainer.data.dataset import Dataset
from trainer.evaluation.benchmark import Plan, phases, run
from trainer.evaluation.consumers import PAPER
from trainer.evaluation.report import write_report
from trainer.fitting import EpochReport, fit
from trainer.methods import methods
from trainer.split import Edges

VERSION = 4
"""The widest and deepest, aligned to its parent."""
TOLERANCE = 1e-3
"""Relative difference between the devices in the loss of a step."""


def problem_on(device: str, data: Path, epochs: int) -> Problem:
    """Return the training of a version on a device."""
    config = TrainConfig.load(
        "paper", recipe="published", protocol="paper", epochs=epochs, device=device
    )
    return Problem(Dataset.read(data), config, VERSION)


def train(problem: Problem, positives: Edges) -> tuple[list[EpochReport], list[float]]:
    """Train; return the report of each epoch, and the moments at which they ended."""
    reports: list[EpochReport] = []
    moments: list[float] = []

    def on_epoch(report: EpochReport) -> None:
        reports.append(report)
        moments.append(time.perf_counter())

    fit(
        problem.model(),
        problem.graph(),
        positives,
        problem.config,
        joint=problem.joint(),
        selection=None,
        on_epoch=on_epoch,
    )
    return reports, moments


def loss_of_step(device: str, data: Path) -> float:
    """Return the loss of the first step."""
    problem = problem_on(device, data, epochs=1)
    train_edges, size = problem.split.train, problem.config.batch_size
    (report,), _ = train(problem, Edges(train_edges.users[:size], train_edges.items[:size]))
    return report.loss


def seconds_of_epoch(device: str, data: Path) -> float:
    """Return the seconds of the second epoch."""
    problem = problem_on(device, data, epochs=2)
    _, (first, second) = train(problem, problem.split.train)
    return second - first


def run_benchmark(plan: Plan) -> dict[str, float]:
    """Run the benchmark, write its report, and return the seconds of each kind of work."""
    kinds = [unit.kind for phase in phases(plan) for unit in phase]
    seconds: dict[str, float] = dict.fromkeys(kinds, 0.0)
    before = time.perf_counter()

    def told(done: int, total: int, note: str) -> None:
        nonlocal before
        now = time.perf_counter()
        seconds[kinds[max(done - 1, 0)]] += now - before
        before = now
        print(f"{done}/{total} {note}", file=sys.stderr)

    results = run(plan, processes=1, told=told)
    write_report(results, plan.out)
    return seconds


def main() -> int:
    """Check, time, and run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="data set folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for report and work")
    parser.add_argument("--protocol", default="strict", help="strict or paper")
    parser.add_argument("--recipe", default="fast", help="fast or published")
    parser.add_argument("--seeds", default="0", help="with commas")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA device here, so there is nothing to measure.", file=sys.stderr)
        return 1
    print(f"{torch.cuda.get_device_name()}; {machine()}")
    cpu, cuda = (loss_of_step(device, arguments.data) for device in ("cpu", "cuda"))
    print(f"Loss of a step of version {VERSION}: {cpu:.6f} on the CPU, {cuda:.6f} on CUDA")
    if not abs(cuda - cpu) <= TOLERANCE * abs(cpu):
        print(f"They differ by more than {TOLERANCE:g}: times would mean nothing.", file=sys.stderr)
        return 1
    slow, fast = (seconds_of_epoch(device, arguments.data) for device in ("cpu", "cuda"))
    print(f"An epoch of it: {slow:.2f} s on the CPU, {fast:.2f} s on CUDA, {slow / fast:.1f} times")
    training = TrainConfig.load(
        "paper", recipe=arguments.recipe, protocol=arguments.protocol, device="cuda"
    )
    plan = Plan(
        data=arguments.data,
        out=arguments.out,
        preset="paper",
        training=training,
        consumers=PAPER,
        methods=tuple(methods()),
        seeds=tuple(int(seed) for seed in arguments.seeds.split(",")),
        lambdas=(),
    )
    seconds = run_benchmark(plan)
    print_table(("work", "seconds"), [(kind, f"{taken:.1f}") for kind, taken in seconds.items()])
    print(f"Report: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
