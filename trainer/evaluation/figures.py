"""The figures of a benchmark: the paper's three, and the alignment error of every (k, j)."""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from trainer.evaluation.drawing import (
    PAPER,
    NotDrawn,
    Picture,
    beside,
    drawing,
    head,
    line,
    look_of,
    looks,
    spread_note,
    time_axis,
    zero_line,
)
from trainer.evaluation.frontier import frontier
from trainer.evaluation.results import (
    BC_ALIGNER,
    NO_TRANS,
    SINGLE_STEP,
    Figure,
    MethodResult,
    Results,
    Row,
    Run,
    Scores,
    by_method,
    over_seeds,
    pairs,
    rows,
)
from trainer.evaluation.table import label, number

_METRICS = (
    ("Intended task", "change of Recall@50, % vs Keep-All"),
    ("Unintended tasks", "change of ROC-AUC, % vs Keep-All"),
    ("Alignment error of ver-0 vectors", "mean distance, ‖·‖₂, not squared"),
)


def draw(results: Results, detailed: Sequence[MethodResult]) -> list[Picture | NotDrawn]:
    """Draw everything there are results for; heat maps for the ``detailed`` methods."""
    return [
        frontier(results),
        metrics_over_time(results),
        tasks_over_time(results),
        metrics_over_lambda(results),
        *heat_maps(detailed),
    ]


def metrics_over_time(results: Results) -> Picture | NotDrawn:
    """Draw the three metrics over t_k for the three joint methods of the paper."""
    title = "The three metrics over time"
    wanted = (NO_TRANS, SINGLE_STEP, BC_ALIGNER)
    methods = [found for name in wanted if (found := results.near(name))]
    if not methods:
        return NotDrawn(title, f"none of {', '.join(wanted)} was run")
    scores, styles = Scores.of(results), looks(results)
    metrics: list[Callable[[Run, int], float | None]] = [
        scores.intended_at,
        scores.unintended_at,
        lambda run, k: run.error[k][0],
    ]
    with drawing(3, height=3.1) as canvas:
        for axes, metric, (what, unit) in zip(canvas.axes, metrics, _METRICS, strict=True):
            zero_line(axes)
            for at, method in enumerate(methods):
                x, figures = beside(results.trained_at, at, len(methods)), over_time(method, metric)
                line(axes, x, figures, styles[method.name], label(method))
            head(axes, what, unit)
            time_axis(axes, results)
        canvas.legend("outside lower center", columns=3)
        caption = (
            "What the live model loses on its own task, what consumers of ver-0 vectors lose, and "
            "how far their vectors are from the true ones; nearer to zero is better. "
            f"{spread_note(results)}"
        )
        return canvas.picture("fig3_metrics", title, caption)


def over_time(
    method: MethodResult, metric: Callable[[Run, int], float | None]
) -> list[Figure | None]:
    """Return a metric of each version k over the seeds."""

    def at(k: int) -> Figure | None:
        return over_seeds(method.runs, lambda run: metric(run, k))

    return [at(k) for k in range(len(method.runs[0].recall))]


def tasks_over_time(results: Results) -> Picture | NotDrawn:
    """Draw what BC-Aligner costs each unintended task, over t_k."""
    title = "Each unintended task over time"
    method = results.near(BC_ALIGNER)
    if method is None:
        return NotDrawn(title, f"{BC_ALIGNER} was not run")
    scores = Scores.of(results)
    tasks = {task: over_time(method, partial(scores.task_at, task)) for task in method.runs[0].auc}
    tested = {task: figures for task, figures in tasks.items() if any(figures)}
    if not tested:
        return NotDrawn(title, "no task was tested on ver-0 vectors")
    with drawing(height=3.2) as canvas:
        axes = canvas.axes[0]
        zero_line(axes)
        for at, (task, figures) in enumerate(tested.items()):
            x = beside(results.trained_at, at, len(tested))
            line(axes, x, figures, look_of(1 + at), task.replace("-", " "))
        head(axes, label(method), "change of ROC-AUC, % vs true ver-0 vectors")
        time_axis(axes, results)
        canvas.legend("outside right upper")
        caption = (
            f"What consumers of ver-0 vectors lose on each task under {label(method)}; above zero "
            f"the compatible vectors did better than the true ones. {spread_note(results)}"
        )
        return canvas.picture("fig4_tasks", title, caption)


def metrics_over_lambda(results: Results) -> Picture | NotDrawn:
    """Draw the three metrics over λ for every method that was run at several."""
    title = "The three metrics over λ"
    sweeps = _sweeps(results)
    if not sweeps:
        return NotDrawn(title, "no method was run at more than one λ")
    styles = looks(results)
    metrics: list[Callable[[Row], Figure | None]] = [
        lambda row: row.intended,
        lambda row: row.unintended,
        lambda row: row.error,
    ]
    with drawing(3, height=3.3) as canvas:
        for axes, metric, (what, unit) in zip(canvas.axes, metrics, _METRICS, strict=True):
            zero_line(axes)
            for name, sweep in sweeps.items():
                figures = [metric(row) for row in sweep.values()]
                title_of = next(iter(sweep.values())).title
                line(axes, list(sweep), figures, styles[name], title_of)
            head(axes, what, unit)
            _lambda_axis(axes, sorted({lam for sweep in sweeps.values() for lam in sweep}))
        canvas.legend("outside lower center", columns=4)
        caption = (
            "A larger λ buys smaller losses of consumers (middle) and smaller errors (right) with "
            f"the live model's own task (left); averages over time. {spread_note(results)}"
        )
        return canvas.picture("fig5_lambda", title, caption)


def _sweeps(results: Results) -> dict[str, dict[float, Row]]:
    """Return the rows by λ > 0 of every method that has several."""
    found = {
        name: {row.lam: row for row in group if row.lam is not None and row.lam > 0}
        for name, group in by_method(rows(results)).items()
    }
    return {name: sweep for name, sweep in found.items() if len(sweep) > 1}


def _lambda_axis(axes: Axes, lambdas: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lambdas, [f"{lam:g}" for lam in lambdas])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("λ")


def heat_maps(methods: Sequence[MethodResult]) -> list[Picture]:
    """Draw the alignment error of every (k, j), each method on the same scale."""
    errors = [pair.error.mean for method in methods for pair in pairs(method)]
    top = max((error for error in errors if math.isfinite(error)), default=0.0)
    return [_heat_map(method, top or 1.0) for method in methods]


def _heat_map(method: MethodResult, top: float) -> Picture:
    table, seeds = pairs(method), len(method.runs)
    size = 1 + max(pair.k for pair in table)
    means = np.full((size, size), np.nan)  # (k, j)
    for pair in table:
        means[pair.k, pair.j] = pair.error.mean
    with drawing(height=1.1 + 0.5 * size, width=1.3 + 0.75 * size) as canvas:
        axes = canvas.axes[0]
        ground = np.ma.masked_invalid(means)
        axes.pcolormesh(ground, cmap="Blues", vmin=0, vmax=1.15 * top, edgecolor=PAPER, lw=1)
        for pair in table:
            x, y = pair.j + 0.5, pair.k + 0.5
            color = "#fefefe" if pair.error.mean > 0.6 * top else "#101418"
            spread = f"± {number(pair.error.spread, 2)}" if seeds > 1 and pair.k > pair.j else ""
            text: dict[str, Any] = {"ha": "center", "va": "center", "color": color}
            axes.text(x, y - 0.1 * bool(spread), number(pair.error.mean, 2), **text)
            axes.text(x, y + 0.22, spread, fontsize=6.5, **text)
        head(axes, label(method), "mean distance from true ver-j vectors, ‖·‖₂")
        axes.set_xticks(np.arange(size) + 0.5, [str(j) for j in range(size)])
        axes.set_yticks(np.arange(size) + 0.5, [str(k) for k in range(size)])
        axes.set_xlabel("consumers of version j")
        axes.set_ylabel("live version k")
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        caption = (
            "Read along a row what consumers of each older version get while k is live, and down a "
            "column how the error of one version grows with every update; the diagonal is exact."
        )
        name = re.sub(r"[^\w.-]", "-", method.name)
        title = f"Alignment error of every version: {label(method)}"
        return canvas.picture(f"heatmap_{name}", title, caption)
