"""What a benchmark measured, as plain records, and the figures of merit made from them.

A grid is indexed ``[k][j]``, live version k first, and has an entry for every j ≤ k.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Annotated, Any

from pydantic import PlainSerializer, TypeAdapter

from backcast.errors import DataError

KEEP_ALL, NON_BC = "keep-all", "non-bc"
NO_TRANS, SINGLE_STEP, BC_ALIGNER = "joint-notrans", "joint-lin-sloss", "bc-aligner"
USER_TASKS = ("user-activity", "user-positive-activity")
PAPER_LAMBDA = 16.0


def _in_json(value: float) -> float | str:
    """JSON has no word for the condition number of a singular map: "inf" reads back as it was."""
    return value if math.isfinite(value) else str(value)


Number = Annotated[float, PlainSerializer(_in_json, when_used="json")]
Grid = Sequence[Sequence[Number]]
Series = Sequence[Number]


@dataclass(frozen=True)
class Auc:
    """ROC-AUC of one consumer task, averaged over consumer seeds; None where it is not tested.

    Attributes:
        compatible: [k][j], the consumer trained on true ver-j vectors, fed z̃_j.
        true: [k][j], the same consumer fed z_j = M_j run on the version-k graph.
        spread: [k][j], standard deviation of ``compatible`` over the consumer seeds.
    """

    compatible: Sequence[Sequence[float | None]]
    true: Sequence[Sequence[float | None]]
    spread: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Run:
    """One method, one training seed.

    Attributes:
        recall: [k], Recall@50 of M_k on the edges in (t_k, t_{k+1}].
        error: [k][j], mean over users and items of ‖z̃_j − z_j‖₂, not squared.
        error_users, error_items: the same over users alone and items alone.
        norm: [k][j], mean over users and items of ‖z_j‖₂, to read the errors against.
        auc: by task.
        amplification: [k][j], the largest singular value of W_k^j.
        condition: [k][j], its condition number.
        epochs: [k], the epoch that was chosen.
        seconds: [k], training time of version k.
    """

    seed: int
    recall: Series
    error: Grid
    error_users: Grid
    error_items: Grid
    norm: Grid
    auc: Mapping[str, Auc]
    amplification: Grid
    condition: Grid
    epochs: Sequence[int]
    seconds: Series


@dataclass(frozen=True)
class MethodResult:
    """All runs of a method at one λ (None where it has none)."""

    name: str
    title: str
    lam: float | None
    stores_all: bool
    summary: str
    runs: Sequence[Run]


@dataclass(frozen=True)
class Results:
    """Everything that one benchmark measured on one data set under one protocol."""

    dataset: str
    users: int
    items: int
    interactions: int
    fingerprint: str
    preset: str
    protocol: str
    times: Series
    machine: str
    config: Mapping[str, Any]
    methods: Sequence[MethodResult]

    def of(self, name: str, lam: float | None = None) -> MethodResult:
        """Return the result of a method; raise DataError where it was not run."""
        for method in self.methods:
            if method.name == name and (lam is None or method.lam == lam):
                return method
        raise DataError(f"The method {name} was not run.")

    def near(self, name: str, lam: float = PAPER_LAMBDA) -> MethodResult | None:
        """Return the result of a method at the λ nearest to ``lam``, by ratio; None if not run."""
        found = [method for method in self.methods if method.name == name]
        return min(found, key=lambda method: _distance(method.lam, lam), default=None)

    @property
    def trained_at(self) -> Series:
        """t_k of each version k; ``times`` has one moment more, when the last one's use ends."""
        return self.times[: len(self.methods[0].runs[0].recall)]

    def document(self) -> Any:
        """Return the results as a JSON document."""
        return _ADAPTER.dump_python(self, mode="json")

    @classmethod
    def from_document(cls, document: Any) -> "Results":
        """Read the results back."""
        return _ADAPTER.validate_python(document)


_ADAPTER: TypeAdapter[Results] = TypeAdapter(Results)


def _distance(lam: float | None, wanted: float) -> float:
    if lam is None:
        return 0.0
    return abs(math.log2(lam / wanted)) if lam > 0 else math.inf


def is_variant(name: str, base: str) -> bool:
    """Tell whether a method is ``base`` or made from it: bc-aligner-refit of bc-aligner."""
    return name == base or name.startswith(f"{base}-")


@dataclass(frozen=True)
class Figure:
    """A mean over training seeds and its standard deviation (0 for a single seed)."""

    mean: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        """Average ``values``, one per training seed."""
        return cls(fmean(values), stdev(values) if len(values) > 1 else 0.0)

    def times(self, factor: float) -> "Figure":
        """Return the same in another unit."""
        return Figure(factor * self.mean, factor * self.spread)


def over_seeds(runs: Iterable[Run], value: Callable[[Run], float | None]) -> Figure | None:
    """Average ``value`` over the runs that have it; None where none has."""
    values = [found for run in runs if (found := value(run)) is not None]
    return Figure.of(values) if values else None


@dataclass(frozen=True)
class Scores:
    """The three metrics of a run, for consumers of ``version`` (0 in the paper).

    Degradations are in % of Keep-All's figure of the same seed, after averaging. Only k >
    ``version`` counts for the unintended tasks: at k = ``version`` the vectors are exact. A metric
    is None where nothing was tested, or where there is nothing to lose.
    """

    reference: Mapping[int, Run]
    version: int = 0

    @classmethod
    def of(cls, results: Results, version: int = 0) -> "Scores":
        """Measure against the Keep-All of ``results``."""
        return cls({run.seed: run for run in results.of(KEEP_ALL).runs}, version)

    def intended(self, run: Run) -> float | None:
        """Return the change of Recall@50, averaged over k."""
        return degradation(fmean(run.recall), fmean(self._keep_all(run).recall))

    def intended_at(self, run: Run, k: int) -> float | None:
        """Return the change of Recall@50 at version k."""
        return degradation(run.recall[k], self._keep_all(run).recall[k])

    def unintended(self, run: Run) -> float | None:
        """Return the change of ROC-AUC, averaged over k and the tasks."""
        return degradation(mean_auc(run, self.version), mean_auc(run, self.version, true=True))

    def unintended_at(self, run: Run, k: int) -> float | None:
        """Return the change of ROC-AUC at version k, averaged over the tasks tested there."""
        compatible, true = (
            mean_of(auc_at(auc, k, self.version, true=true) for auc in run.auc.values())
            for true in (False, True)
        )
        return degradation(compatible, true)

    def task_at(self, task: str, run: Run, k: int) -> float | None:
        """Return the change of one task's ROC-AUC at version k."""
        compatible, true = (
            auc_at(run.auc[task], k, self.version, true=true) for true in (False, True)
        )
        return degradation(compatible, true)

    def total(self, run: Run) -> float | None:
        """Return the sum of both degradations, the single figure of merit."""
        intended, unintended = self.intended(run), self.unintended(run)
        return None if intended is None or unintended is None else intended + unintended

    def error(self, run: Run) -> float:
        """Return the alignment error averaged over k, the exact 0 at k = ``version`` included."""
        return fmean(by_version(run.error, self.version))

    def _keep_all(self, run: Run) -> Run:
        if run.seed not in self.reference:
            raise DataError(f"The method {KEEP_ALL} was not run with seed {run.seed}.")
        return self.reference[run.seed]


@dataclass(frozen=True)
class Row:
    """A row of the table: relative degradations in %, as section 6 of the method's description.

    ``recall`` and ``auc`` are the absolute figures behind them, as fractions. ``error`` is the mean
    over k of the alignment error of the consumers' vectors, the exact ones at k = j included.
    """

    name: str
    title: str
    lam: float | None
    stores_all: bool
    seeds: Sequence[int]
    recall: Figure
    auc: Figure | None
    intended: Figure | None
    unintended: Figure | None
    error: Figure
    total: Figure | None


def rows(results: Results, version: int = 0) -> list[Row]:
    """Return the table for consumers of ``version`` (0 in the paper), in the methods' order."""
    scores = Scores.of(results, version)
    return [_row(method, scores) for method in results.methods]


def by_method(table: Iterable[Row]) -> dict[str, list[Row]]:
    """Group a table by method, in its order, each group by ascending λ."""
    groups: dict[str, list[Row]] = {}
    for row in table:
        groups.setdefault(row.name, []).append(row)
    return {name: sorted(group, key=lambda row: row.lam or 0.0) for name, group in groups.items()}


def _row(method: MethodResult, scores: Scores) -> Row:
    runs = method.runs
    return Row(
        method.name,
        method.title,
        method.lam,
        method.stores_all,
        [run.seed for run in runs],
        recall=Figure.of([fmean(run.recall) for run in runs]),
        auc=over_seeds(runs, lambda run: mean_auc(run, scores.version)),
        intended=over_seeds(runs, scores.intended),
        unintended=over_seeds(runs, scores.unintended),
        error=Figure.of([scores.error(run) for run in runs]),
        total=over_seeds(runs, scores.total),
    )


@dataclass(frozen=True)
class Pair:
    """How ver-j vectors fare at live version k: alignment error, ‖z_j‖ and the map W_k^j."""

    k: int
    j: int
    error: Figure
    norm: Figure
    amplification: Figure
    condition: Figure


def pairs(method: MethodResult) -> list[Pair]:
    """Return every (k, j), j ≤ k, the exact pairs k = j included."""

    def at(grid: Callable[[Run], Grid], k: int, j: int) -> Figure:
        return Figure.of([grid(run)[k][j] for run in method.runs])

    return [
        Pair(
            k,
            j,
            error=at(lambda run: run.error, k, j),
            norm=at(lambda run: run.norm, k, j),
            amplification=at(lambda run: run.amplification, k, j),
            condition=at(lambda run: run.condition, k, j),
        )
        for k in range(len(method.runs[0].error))
        for j in range(k + 1)
    ]


def degradation(value: float | None, reference: float | None) -> float | None:
    """Return 100 · (value − reference) / reference: negative where something is lost.

    None where either is unknown, or where the reference has nothing to lose.
    """
    if value is None or not reference:
        return None
    return 100.0 * (value - reference) / reference


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def mean_auc(run: Run, version: int = 0, *, true: bool = False) -> float | None:
    """Return the mean over the tested tasks of the mean over k of the AUC."""
    return mean_of(task_auc(auc, version, true=true) for auc in run.auc.values())


def task_auc(auc: Auc, version: int = 0, *, true: bool = False) -> float | None:
    """Return the mean over the tested k > ``version`` of one task's AUC."""
    return mean_of(auc_at(auc, k, version, true=true) for k in range(len(auc.compatible)))


def auc_at(auc: Auc, k: int, version: int = 0, *, true: bool = False) -> float | None:
    """Return one task's AUC at version k; None where it is not tested."""
    return (auc.true if true else auc.compatible)[k][version] if k > version else None


def by_version(grid: Grid, version: int = 0) -> list[float]:
    """Return the column of ver-``version`` vectors: one value per k ≥ ``version``."""
    return [row[version] for row in grid[version:]]
