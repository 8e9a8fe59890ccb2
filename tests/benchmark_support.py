"""Benchmarks of three versions that take seconds, and what is common to two of them."""

from pathlib import Path
from typing import Any

from tests.trainer_support import TINY
from trainer.evaluation.benchmark import Plan, run
from trainer.evaluation.consumers import ConsumerConfig
from trainer.evaluation.results import Results
from trainer.methods import method

CONSUMERS = ConsumerConfig(
    hidden=(8,), dropout=(0.0,), seeds=(0, 1), epochs=2, batch_size=512, learning_rate=0.01
)
FRACTIONS = (0.5, 0.65, 0.8, 1.0)

CONFIG = """\
widths = [8, 10, 12]
layers = [1, 2, 2]
batch_size = 512
evaluate_every = 2
"""
"""A file for ``--config``."""


def tiny_plan(data: Path, out: Path, *methods: str, **changes: Any) -> Plan:
    """Return a plan for the data of ``synthetic``; ``training`` changes training settings."""
    training = TINY.model_copy(update={"epochs": 2, **changes.pop("training", {})})
    given = {
        "consumers": CONSUMERS,
        "methods": methods,
        "seeds": (0,),
        "lambdas": (4.0,),
        "fractions": FRACTIONS,
        **changes,
    }
    return Plan(data=data, out=out, preset="small", training=training, **given)


def quiet(_done: int, _total: int, _note: str) -> None:
    """Take note of nothing."""


def measured(plan: Plan, processes: int = 1) -> Results:
    """Run a plan."""
    return run(plan, processes=processes, told=quiet)


def without_times(document: Any) -> Any:
    """Leave out of a results document what no two runs have in common: how long it took."""
    config = {key: value for key, value in document["config"].items() if key != "seconds"}
    return {**document, "config": config, "methods": [_timeless(m) for m in document["methods"]]}


def _timeless(found: Any) -> Any:
    return {**found, "runs": [{**run, "seconds": None} for run in found["runs"]]}


def line_folder(plan: Plan, name: str, seed: int = 0) -> Path:
    """Return where the later models of a method lie."""
    (line,) = {row.line for row in plan.rows() if row.method is method(name)}
    return plan.work / f"seed-{seed}" / "models" / line.name
