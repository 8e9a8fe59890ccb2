"""Results of a benchmark that was never run: random figures of plausible size."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.evaluation.results import (
    KEEP_ALL,
    USER_TASKS,
    Auc,
    Grid,
    MethodResult,
    Results,
    Run,
)

TASKS = (*USER_TASKS, "item-rating-avg", "item-rating-std", "edge-rating")
TIMES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LAMBDAS = (1.0, 4.0, 16.0, 32.0)


@dataclass(frozen=True)
class Kind:
    """How a method tends to do: losses in % and the alignment error of its last version.

    A joint method buys a small error with its intended task: at λ it loses ``intended`` times, and
    errs ``error`` over, a root of λ / 16.
    """

    name: str
    title: str
    intended: float
    unintended: float
    error: float
    stores_all: bool = False
    joint: bool = False


KINDS = (
    Kind(KEEP_ALL, "Keep-All", 0, 0, 0, stores_all=True),
    Kind("fix-m0", "Fix-M0", -27, 0, 0),
    Kind("finetune-m0", "Finetune-M0", -9, -7, 1.0),
    Kind("non-bc", "Non-BC", 0, -26, 2.7),
    Kind("post-lin-sloss", "Post-Lin-SLoss", 0, -8, 1.3),
    Kind("post-closed-form", "Post-Closed-Form", 0, -3, 1.2),
    Kind("post-direct", "Post-Direct", 0, -1.4, 1.1, stores_all=True),
    Kind("joint-notrans", "Joint-NoTrans", -9, -0.8, 0.4, joint=True),
    Kind("joint-lin-sloss", "Joint-Lin-SLoss", -3.6, -1.1, 0.5, joint=True),
    Kind("bc-aligner", "BC-Aligner", -3.0, -0.6, 0.38, joint=True),
    Kind("bc-aligner-refit", "BC-Aligner, refitted", -3.0, -0.4, 0.33, joint=True),
)


def random_results(
    *,
    seeds: Sequence[int] = (0, 1, 2),
    lambdas: Sequence[float] = LAMBDAS,
    kinds: Sequence[Kind] = KINDS,
    versions: int = 5,
    dataset: str = "made up",
    counts: tuple[int, int, int] = (6170, 2753, 195791),
) -> Results:
    """Make the results of ``kinds``, the joint ones at every λ; the same call, the same results."""
    rng = random.Random(0)
    users, items, interactions = counts
    bests = {seed: [0.06 + 0.008 * k + rng.gauss(0, 0.002) for k in range(9)] for seed in seeds}
    return Results(
        dataset=dataset,
        users=users,
        items=items,
        interactions=interactions,
        fingerprint="0f" * 32,
        preset="small",
        protocol="paper",
        times=list(TIMES[: versions + 1]),
        machine="2 cores, no GPU",
        config={"widths": [32, 40, 48, 56, 64], "epochs": 100},
        methods=[
            MethodResult(
                kind.name,
                kind.title,
                lam,
                kind.stores_all,
                f"What {kind.title} does.",
                [_run(rng, kind, lam, seed, bests[seed][:versions]) for seed in seeds],
            )
            for kind in kinds
            for lam in (lambdas if kind.joint else (None,))
        ],
    )


def _run(
    rng: random.Random, kind: Kind, lam: float | None, seed: int, best: Sequence[float]
) -> Run:
    versions = len(best)
    root = 1.0 if lam is None else (max(lam, 0.1) / 16) ** 0.5

    def lost(percent: float, k: int) -> float:
        return (1 + percent / 100) * rng.gauss(1, 0.004) if k and percent else 1.0

    def grid(diagonal: float, below: float, growth: float) -> Grid:
        return [
            [
                below * (1 + growth * (k - j - 1)) * rng.gauss(1, 0.05) if j < k else diagonal
                for j in range(k + 1)
            ]
            for k in range(versions)
        ]

    error = grid(0.0, kind.error / root, 0.05)
    return Run(
        seed=seed,
        recall=[r * lost(kind.intended * root, k) for k, r in enumerate(best)],
        error=error,
        error_users=error,
        error_items=error,
        norm=grid(2.16, 2.16, 0.0),
        auc={
            task: _auc(rng, versions, 2 if task in USER_TASKS else 1, kind.unintended / root)
            for task in TASKS
        },
        amplification=grid(1.0, 1.2, 0.1),
        condition=grid(1.0, 30.0, 2.0),
        epochs=[rng.randrange(50, 101, 10) for _ in range(versions)],
        seconds=[rng.uniform(20, 60) for _ in range(versions)],
    )


def _auc(rng: random.Random, versions: int, first: int, lost: float) -> Auc:
    """One task, tested at k ≥ j + ``first``."""
    true: list[list[float | None]] = []
    compatible: list[list[float | None]] = []
    for k in range(versions):
        tested = [k >= j + first for j in range(k + 1)]
        true.append([0.67 + rng.gauss(0, 0.01) if here else None for here in tested])
        compatible.append(
            [
                value * (1 + lost / 100) * rng.gauss(1, 0.002) if value and lost else value
                for value in true[-1]
            ]
        )
    return Auc(compatible, true, [[0.003 if v is not None else None for v in row] for row in true])
