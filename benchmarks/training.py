"""How fast the trainer is: ``python benchmarks/training.py --data DIR``.

One optimisation step of the published algorithm, a pass over the full graph for each batch of the
published size, by the trainer and by the published loop (``benchmarks/published_loop.py``). Each
row is measured in a process of its own, the two of a pair one after the other, on the same data
and for the same model; what the model is aligned to is random, of true shape.

- A step is the median time from one forward pass to the next inside the real training function,
  stopped after ``--seconds``. An epoch is its steps, and its drawing of pairs.
- Memory is the peak while the graph is built, the model trained and evaluated, beyond what the
  process held before, the data set included.
- The parts of a step are timed separately, on the same tensors, forward and backward, and not by a
  profiler: propagation is the graph's operators alone; products and norms are a pass through the
  model less that; loss is everything from the vectors on, B_k and the alignment included; batches
  are the drawing of an epoch's pairs, by step, and what is made of each batch. Their sum over the
  step as it was measured says how far to trust them.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
import torch
from torch import Tensor

from backcast.cli.output import print_table
from benchmarks.measuring import PeakMemory, machine, seconds_of, seconds_per_step
from benchmarks.problems import Problem
from benchmarks.published_loop import Evaluator, Pairs, train
from trainer.config import Protocol, TrainConfig
from trainer.data.dataset import Dataset
from trainer.features import Vocabulary
from trainer.fitting import PAPER_LAMBDA, JointAlignment, bpr_loss, fit, node_weights
from trainer.graph import Graph, Operator, first_layer, mean_over_neighbours
from trainer.model import GraphSAGE
from trainer.sampling import Batch, PairSampler

BOUND = 0.05
"""The share of a step that making batches, and of training that evaluating, has to stay under."""

OURS, PUBLISHED = "trainer", "published loop"


@dataclass(frozen=True)
class Cost:
    """What one loop takes for one version, in seconds.

    Attributes:
        steps: in an epoch.
        step: one optimisation step.
        draw: drawing the pairs of an epoch.
        evaluation: Recall@50 once.
        memory: peak in MiB, None where it is not known.
    """

    steps: int
    step: float
    draw: float
    evaluation: float
    memory: float | None

    @property
    def epoch(self) -> float:
        """Seconds of an epoch."""
        return self.steps * self.step + self.draw

    @property
    def per_step(self) -> float:
        """Seconds of a step with its share of the drawing."""
        return self.epoch / self.steps

    @property
    def evaluation_share(self) -> float:
        """Share of the training time, evaluating once every 10 epochs."""
        return self.evaluation / (10 * self.epoch + self.evaluation)


@dataclass(frozen=True)
class Parts:
    """Seconds of the parts of one of the trainer's steps, and of what is built once."""

    propagation: float
    dense: float
    loss: float
    batches: float
    optimizer: float
    adjacency: float
    inputs: float

    @property
    def step(self) -> float:
        """The sum over the parts of a step."""
        return self.propagation + self.dense + self.loss + self.batches + self.optimizer


def published_config(preset: str) -> TrainConfig:
    """Return the published recipe, so long that no run ends by itself, without evaluations."""
    return TrainConfig.load(
        preset,
        recipe="published",
        protocol=Protocol.PAPER,
        epochs=10**6,
        evaluate_every=10**6,
        device="cpu",
    )


def cost_of_trainer(problem: Problem, limit: float) -> Cost:
    """Measure the trainer."""
    split, config = problem.split, problem.config
    memory = PeakMemory()
    graph, model, joint = problem.graph(), problem.model(), problem.joint()

    def training() -> None:
        fit(
            model,
            graph,
            split.train,
            config,
            joint=joint,
            selection=None,
            on_epoch=lambda _report: None,
        )

    step = seconds_per_step(training, model, limit)
    selection = problem.selection()
    evaluation = seconds_of(lambda: selection.recall(model))
    peak = memory.mib()
    return Cost(steps_of(problem), step, seconds_of_drawing(problem), evaluation, peak)


def cost_of_published(problem: Problem, limit: float) -> Cost:
    """Measure the published loop."""
    config, holdout = problem.config, problem.split.test
    assert holdout is not None
    memory = PeakMemory()
    data, model = problem.published_data(), problem.published_model()
    alignment = problem.published_alignment()

    def training() -> None:
        train(
            model,
            data,
            holdout,
            epochs=config.epochs,
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            evaluate_every=config.evaluate_every,
            alignment=alignment,
        )

    step = seconds_per_step(training, model, limit)
    evaluator = Evaluator(holdout)
    evaluation = seconds_of(lambda: evaluator.evaluate(model, data))
    peak = memory.mib()
    draw = seconds_of(Pairs(data, config.seed).draw)
    return Cost(steps_of(problem), step, draw, evaluation, peak)


def steps_of(problem: Problem) -> int:
    """Return the number of steps of an epoch."""
    return -(-len(problem.split.train) // problem.config.batch_size)


def sampler_of(problem: Problem) -> PairSampler:
    """Return what draws the pairs in ``fit``."""
    split, generator = problem.split, torch.Generator().manual_seed(problem.config.seed)
    return PairSampler(split.train, split.items, generator)


def seconds_of_drawing(problem: Problem) -> float:
    """Return what the pairs of an epoch take."""
    sampler, batch_size = sampler_of(problem), problem.config.batch_size
    return seconds_of(lambda: next(sampler.epoch(batch_size)))


def parts_of_trainer(problem: Problem) -> Parts:
    """Time the parts of a step, and what is built before the first."""
    started = time.perf_counter()
    split, config = problem.split, problem.config
    mean = mean_over_neighbours(split.train, split.users, split.items)
    adjacency = time.perf_counter() - started
    vocabulary = Vocabulary.of(problem.dataset, split.items, config.min_value_count)
    features = vocabulary.encode(problem.dataset, split.items)
    started = time.perf_counter()
    first_layer(mean, features, split.users)
    inputs = time.perf_counter() - started

    graph, model, joint = problem.graph(), problem.model().train(), problem.joint()
    draw = seconds_of_drawing(problem) / steps_of(problem)
    batch, nodes = first_batch(problem), graph.users + graph.items
    propagation = seconds_of_propagation(graph, model)
    return Parts(
        propagation=propagation,
        dense=max(0.0, seconds_of(model_pass(graph, model)) - propagation),
        loss=seconds_of(loss_pass(problem, model(graph).detach(), batch, joint)),
        batches=draw + seconds_of(lambda: node_weights(rows_of(batch, graph.users), nodes)),
        optimizer=seconds_of(optimizer_step(model, joint, config.learning_rate)),
        adjacency=adjacency,
        inputs=inputs,
    )


def first_batch(problem: Problem) -> Batch:
    """Return the first batch that ``fit`` draws."""
    return next(iter(sampler_of(problem).epoch(problem.config.batch_size)))


def rows_of(batch: Batch, users: int) -> list[Tensor]:
    """Return the rows of a batch's users, positives and negatives among all nodes."""
    return [batch.users, batch.positives + users, batch.negatives + users]


def seconds_of_propagation(graph: Graph, model: GraphSAGE) -> float:
    """Return what the graph's operators take in a step, with their transposes."""
    later = model.layers - 1
    return seconds_of(operator_pass(graph.inputs, model.width)) + (
        later * seconds_of(operator_pass(graph.mean, model.width)) if later else 0.0
    )


def operator_pass(operator: Operator, width: int) -> Callable[[], object]:
    """Return one application of an operator and of its transpose."""
    x = torch.randn(operator.matrix.shape[1], width, requires_grad=True)
    gradient = torch.randn(operator.matrix.shape[0], width)
    return lambda: torch.autograd.grad(operator(x), x, gradient)


def model_pass(graph: Graph, model: GraphSAGE) -> Callable[[], object]:
    """Return a forward and a backward pass of the model."""
    weights, gradient = list(model.parameters()), torch.randn_like(model(graph))
    return lambda: torch.autograd.grad(model(graph), weights, gradient)


def loss_pass(
    problem: Problem, z: Tensor, batch: Batch, joint: JointAlignment | None
) -> Callable[[], object]:
    """Return the loss of the vectors ``z``, forward and backward."""
    config, rows = problem.config, rows_of(batch, problem.split.users)
    weights = node_weights(rows, len(z))
    inputs = [z.requires_grad_(), *(joint.transformation.parameters() if joint else ())]

    def run() -> object:
        loss = bpr_loss(z, *rows, weights=weights, weight_decay=config.weight_decay)
        if joint is not None:
            mapped = joint.transformation(z)
            loss = loss + PAPER_LAMBDA * joint.loss(mapped, joint.target, weights)
        return torch.autograd.grad(loss, inputs)

    return run


def optimizer_step(
    model: GraphSAGE, joint: JointAlignment | None, learning_rate: float
) -> Callable[[], object]:
    """Return a step of the optimizers that ``fit`` uses."""
    modules = [model, *([joint.transformation] if joint else [])]
    optimizers = [
        torch.optim.Adam(module.parameters(), lr=learning_rate, fused=True) for module in modules
    ]
    for module in modules:
        for weight in module.parameters():
            weight.grad = torch.randn_like(weight)

    def run() -> None:
        for optimizer in optimizers:
            optimizer.step()

    return run


# Processes and tables


def measure(data: Path, what: str, preset: str, version: int, limit: float) -> Cost | Parts:
    """Measure one row in this process."""
    problem = Problem(Dataset.read(data), published_config(preset), version)
    if what == OURS:
        return cost_of_trainer(problem, limit)
    return cost_of_published(problem, limit) if what == PUBLISHED else parts_of_trainer(problem)


def in_process(arguments: argparse.Namespace, what: str, preset: str, version: int) -> bytes:
    """Measure one row in a process of its own."""
    command = [sys.executable, __file__, "--data", str(arguments.data)]
    command += ["--seconds", str(arguments.seconds), "--one", what, preset, str(version)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout


def cost_rows(version: int, ours: Cost, published: Cost) -> list[list[object]]:
    """Return the rows of a pair, and of the ratio of the published loop to the trainer."""
    rows: list[list[object]] = [
        [
            f"{version} {name}",
            f"{1000 * cost.per_step:.1f}",
            f"{1 / cost.per_step:.2f}",
            f"{cost.epoch:.2f}",
            None if cost.memory is None else f"{cost.memory:.0f}",
            f"{1000 * cost.evaluation:.0f}",
            f"{100 * cost.evaluation_share:.1f}",
        ]
        for name, cost in ((OURS, ours), (PUBLISHED, published))
    ]
    memory = published.memory / ours.memory if published.memory and ours.memory else None
    factors = (
        published.per_step / ours.per_step,
        published.per_step / ours.per_step,
        published.epoch / ours.epoch,
        memory,
        published.evaluation / ours.evaluation,
    )
    shown = [None if factor is None else f"{factor:.1f}×" for factor in factors]
    return [*rows, [f"{version} ratio", *shown, None]]


def parts_row(version: int, parts: Parts, step: float) -> list[object]:
    """Return the shares of a step in %, their sum over the step, and what is built once."""
    shares = (parts.propagation, parts.dense, parts.loss, parts.batches, parts.optimizer)
    return [
        version,
        *(f"{100 * seconds / parts.step:.1f}" for seconds in shares),
        f"{100 * parts.step / step:.0f}",
        f"{1000 * parts.adjacency:.0f}",
        f"{1000 * parts.inputs:.0f}",
    ]


def verdict(preset: str, bound: str, shares: dict[int, float]) -> str:
    """Say whether a bound is kept for every version."""
    largest = max(shares.values())
    kept = "kept" if largest < BOUND else "NOT KEPT"
    return f"{preset}: {bound} under {BOUND:.0%}: {kept}, {largest:.1%} at most."


def print_preset(arguments: argparse.Namespace, preset: str, versions: Sequence[int]) -> None:
    """Measure and print the tables of a preset."""
    costs: list[list[object]] = []
    parts: list[list[object]] = []
    batches: dict[int, float] = {}
    evaluations: dict[int, float] = {}
    for version in versions:
        ours, published = (
            Cost(**orjson.loads(in_process(arguments, what, preset, version)))
            for what in (OURS, PUBLISHED)
        )
        found = Parts(**orjson.loads(in_process(arguments, "parts", preset, version)))
        costs += cost_rows(version, ours, published)
        parts.append(parts_row(version, found, ours.per_step))
        batches[version] = found.batches / found.step
        evaluations[version] = ours.evaluation_share
    config = published_config(preset)
    print_table(
        ("version", "ms/step", "steps/s", "s/epoch", "peak MiB", "evaluation ms", "of training %"),
        costs,
        title=f"Preset {preset}: a step over the full graph for each {config.batch_size} pairs",
    )
    print_table(
        (
            "version",
            "propagation %",
            "products, norms %",
            "loss %",
            "batches %",
            "optimizer %",
            "sum / step %",
            "adjacency, once, ms",
            "inputs, once, ms",
        ),
        parts,
        title=f"Preset {preset}: the parts of the trainer's step",
    )
    print(verdict(preset, "making batches, of a step,", batches))
    print(verdict(preset, "evaluating every 10 epochs, of training,", evaluations))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="data set folder")
    parser.add_argument("--presets", default="small,paper", help="with commas")
    parser.add_argument("--versions", default="0,2,4", help="with commas")
    parser.add_argument("--seconds", type=float, default=20.0, help="time for the steps of a row")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        what, preset, version = arguments.one
        measured = measure(arguments.data, what, preset, int(version), arguments.seconds)
        sys.stdout.buffer.write(orjson.dumps(measured))
        return
    print(machine())
    for preset in arguments.presets.split(","):
        print_preset(arguments, preset, [int(k) for k in arguments.versions.split(",")])


if __name__ == "__main__":
    main()
