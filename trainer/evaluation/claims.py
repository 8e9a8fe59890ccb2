"""Where the paper's story holds in the measured figures, and where it does not.

Methods are compared seed by seed: they share data, split and M_0, so that much of the noise is
common to both. A difference counts where its mean over the seeds exceeds twice its standard error.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf, sqrt
from statistics import linear_regression

from trainer.evaluation.results import (
    BC_ALIGNER,
    NO_TRANS,
    NON_BC,
    SINGLE_STEP,
    Figure,
    MethodResult,
    Results,
    Row,
    Run,
    Scores,
    is_variant,
    over_seeds,
    rows,
)
from trainer.evaluation.table import label, number, seeds_of, shown

BY_FAR = 1.4
"""Non-BC loses at least this many times what the next row loses, on all data of the paper."""

Metric = Callable[[Run], float | None]
_LESS, _MORE = -1, 1


class Verdict(StrEnum):
    """What the figures say of a statement."""

    HOLDS = "holds"
    FAILS = "does not hold"
    NOISE = "within noise"
    OPEN = "cannot be told"


@dataclass(frozen=True)
class Claim:
    """A statement of the paper, what these results say of it, and the figures behind that."""

    statement: str
    verdict: Verdict
    numbers: str


def claims(results: Results) -> list[Claim]:
    """Put the paper's statements to the test, each method at the λ nearest to the paper's."""
    return [
        _non_bc_is_worst(results),
        _no_trans_costs_more(results),
        *(_sum_is_best(results, name) for name in _aligners(results)),
        _error_grows_more_slowly(results),
    ]


def summary(results: Results) -> str:
    """Say in a paragraph which of the paper's statements hold, and which row is the best."""
    found = claims(results)
    parts = []
    for verdict in Verdict:
        told = [claim.statement for claim in found if claim.verdict == verdict]
        if told:
            parts.append(f"{verdict.capitalize()}: {'; '.join(told)}.")
    return " ".join([*parts, _best_sum(results), _noise_note(results)])


def _noise_note(results: Results) -> str:
    seeds = len(seeds_of(results))
    if seeds < 2:
        return "There is one training seed: noise is not known, and verdicts go by the sign alone."
    return (
        f"Methods are compared seed by seed over {seeds} training seeds, each at the λ nearest to "
        "16; within noise is what does not exceed twice the standard error of the difference."
    )


def _best_sum(results: Results) -> str:
    known = [row for row in rows(results) if not row.stores_all and row.total]
    if not known:
        return "No sum of both losses is known."
    best = max(known, key=_total)
    text = f"Of all rows that keep the latest vectors only, {_sum_of(best)} is the best"
    own = [row for row in known if is_variant(row.name, BC_ALIGNER)]
    if own and best not in own:
        text += f", before {_sum_of(max(own, key=_total))} as the best of BC-Aligner's"
    return f"{text}."


def _total(row: Row) -> float:
    return row.total.mean if row.total else -inf


def _sum_of(row: Row) -> str:
    return f"{label(row)} with a sum of {shown(row.total, 2, len(row.seeds))} %"


def _non_bc_is_worst(results: Results) -> Claim:
    statement = "vectors used as they are (Non-BC) are by far the worst on the unintended tasks"
    metric = Scores.of(results).unintended
    method, rivals = results.near(NON_BC), _keep_latest(results, other_than=NON_BC)
    rival = min(rivals, key=lambda rival: _mean(rival, metric, inf), default=None)
    if method is None or rival is None:
        return _open(statement, NON_BC)
    claim = _compare(statement, metric, method, _LESS, rival)
    ratio = _ratio(_mean(method, metric, inf), _mean(rival, metric, inf))
    if claim.verdict == Verdict.HOLDS and ratio < BY_FAR:
        return Claim(
            statement,
            Verdict.FAILS,
            f"{claim.numbers}; the worst, but by {number(ratio, 1)} times only",
        )
    return claim


def _ratio(lost: float, less: float) -> float:
    return lost / less if less < 0 else inf


def _no_trans_costs_more(results: Results) -> Claim:
    statement = (
        "joint training without a transformation (Joint-NoTrans) costs the intended task more than "
        "with a linear one"
    )
    metric = Scores.of(results).intended
    method = results.near(NO_TRANS)
    linear = [found for name in (SINGLE_STEP, BC_ALIGNER) if (found := results.near(name))]
    rival = min(linear, key=lambda rival: _mean(rival, metric, inf), default=None)
    if method is None or rival is None:
        return _open(statement, NO_TRANS if method is None else f"{SINGLE_STEP} or {BC_ALIGNER}")
    return _compare(statement, metric, method, _LESS, rival)


def _aligners(results: Results) -> list[str]:
    """Return BC-Aligner and the keep-latest methods made from it."""
    methods = _keep_latest(results)
    found = [method.name for method in methods if is_variant(method.name, BC_ALIGNER)]
    return found or [BC_ALIGNER]


def _sum_is_best(results: Results, name: str) -> Claim:
    method = results.near(name)
    title = method.title if method else name
    statement = f"{title} has the best sum of both losses of all that keep the latest vectors only"
    metric = Scores.of(results).total
    rivals = [rival for rival in _keep_latest(results) if not is_variant(rival.name, BC_ALIGNER)]
    rival = max(rivals, key=lambda rival: _mean(rival, metric, -inf), default=None)
    if method is None or rival is None:
        return _open(statement, name if method is None else "any other such method")
    return _compare(statement, metric, method, _MORE, rival)


def _error_grows_more_slowly(results: Results) -> Claim:
    statement = (
        "the alignment error of ver-0 vectors grows more slowly from version to version under "
        "BC-Aligner than under Joint-Lin-SLoss"
    )
    method, rival = results.near(BC_ALIGNER), results.near(SINGLE_STEP)
    if method is None or rival is None:
        return _open(statement, BC_ALIGNER if method is None else SINGLE_STEP)
    return _compare(statement, error_growth, method, _LESS, rival, " a version", decimals=4)


def error_growth(run: Run) -> float | None:
    """Return the slope over k ≥ 1 of the alignment error of ver-0 vectors; None below two k."""
    errors = [row[0] for row in run.error[1:]]
    if len(errors) < 2:
        return None
    return linear_regression(range(len(errors)), errors).slope


def _keep_latest(results: Results, other_than: str = "") -> list[MethodResult]:
    """Return the methods that keep the latest vectors only, at the λ nearest to the paper's."""
    names = dict.fromkeys(method.name for method in results.methods if not method.stores_all)
    found = [results.near(name) for name in names if name != other_than]
    return [method for method in found if method is not None]


def _mean(method: MethodResult, metric: Metric, unknown: float) -> float:
    figure = over_seeds(method.runs, metric)
    return figure.mean if figure else unknown


def _open(statement: str, missing: str) -> Claim:
    return Claim(statement, Verdict.OPEN, f"{missing} was not run")


def _compare(
    statement: str,
    metric: Metric,
    method: MethodResult,
    sign: int,
    rival: MethodResult,
    unit: str = " %",
    decimals: int = 2,
) -> Claim:
    """Tell whether a metric is larger (``sign`` 1) or smaller (−1) than the rival's."""
    differences = _differences(metric, method, rival)
    if not differences:
        return Claim(statement, Verdict.OPEN, "nothing was tested")
    figures = [
        f"{label(one)}: {shown(over_seeds(one.runs, metric), decimals, len(one.runs))}{unit}"
        for one in (method, rival)
    ]
    apart = shown(Figure.of(differences), decimals, len(differences))
    numbers = f"{figures[0]} against {figures[1]}; difference {apart}"
    return Claim(statement, _verdict([sign * value for value in differences]), numbers)


def _differences(metric: Metric, one: MethodResult, other: MethodResult) -> list[float]:
    """Return one's metric less the other's, for each seed that both have."""
    others = {run.seed: metric(run) for run in other.runs}
    return [
        value - reference
        for run in one.runs
        if (value := metric(run)) is not None and (reference := others.get(run.seed)) is not None
    ]


def _verdict(differences: Sequence[float]) -> Verdict:
    """Judge by differences that are positive where the statement holds."""
    found = Figure.of(differences)
    if abs(found.mean) <= 2 * found.spread / sqrt(len(differences)):
        return Verdict.NOISE
    return Verdict.HOLDS if found.mean > 0 else Verdict.FAILS
