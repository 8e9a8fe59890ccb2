"""The derived figures against plain loops over the records."""

import json
import math
from dataclasses import replace
from statistics import mean, stdev

import pytest

from backcast.errors import DataError
from tests.evaluation_support import TASKS, random_results
from trainer.evaluation.results import (
    KEEP_ALL,
    USER_TASKS,
    Figure,
    MethodResult,
    Results,
    Run,
    Scores,
    by_method,
    is_variant,
    mean_auc,
    pairs,
    rows,
    task_auc,
)

VERSIONS = 5


@pytest.fixture(scope="module")
def results() -> Results:
    return random_results()


def aucs_of(run: Run, version: int) -> dict[str, list[tuple[float, float]]]:
    """(compatible, true) AUCs of consumers of ``version``, by task, over all k of a test."""
    found: dict[str, list[tuple[float, float]]] = {}
    for task in TASKS:
        for k in range(version + (2 if task in USER_TASKS else 1), VERSIONS):
            compatible, true = (
                grid[k][version] for grid in (run.auc[task].compatible, run.auc[task].true)
            )
            assert compatible is not None
            assert true is not None
            found.setdefault(task, []).append((compatible, true))
    return found


def close(figure: Figure | None, values: list[float]) -> None:
    assert figure is not None
    assert figure.mean == pytest.approx(mean(values), rel=1e-12, abs=1e-12)
    assert figure.spread == pytest.approx(stdev(values), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("version", range(VERSIONS - 1))
def test_every_column_is_what_a_plain_loop_finds(results: Results, version: int) -> None:
    keep_all = {run.seed: run for run in results.of(KEEP_ALL).runs}
    for method, row in zip(results.methods, rows(results, version), strict=True):
        recall, auc, error, intended, unintended = [], [], [], [], []
        for run in method.runs:
            by_task = aucs_of(run, version)
            compatible = mean(mean(c for c, _ in found) for found in by_task.values())
            true = mean(mean(t for _, t in found) for found in by_task.values())
            best = mean(keep_all[run.seed].recall)
            recall.append(mean(run.recall))
            auc.append(compatible)
            error.append(mean(run.error[k][version] for k in range(version, VERSIONS)))
            intended.append(100 * (mean(run.recall) - best) / best)
            unintended.append(100 * (compatible - true) / true)
        assert (row.name, row.title, row.lam) == (method.name, method.title, method.lam)
        assert (row.stores_all, row.seeds) == (method.stores_all, [0, 1, 2])
        close(row.recall, recall)
        close(row.auc, auc)
        close(row.error, error)
        close(row.intended, intended)
        close(row.unintended, unintended)
        close(row.total, [i + u for i, u in zip(intended, unintended, strict=True)])


def test_a_task_without_any_test_is_left_out_of_the_average(results: Results) -> None:
    run, version = results.of("bc-aligner").runs[0], VERSIONS - 2  # no k is two later
    assert [task_auc(run.auc[task], version) for task in USER_TASKS] == [None, None]
    expected = mean(c for [(c, _)] in aucs_of(run, version).values())
    assert mean_auc(run, version) == pytest.approx(expected)


def test_a_version_without_any_test_has_no_figures(results: Results) -> None:
    for row in rows(results, VERSIONS - 1):
        assert (row.auc, row.unintended, row.total) == (None, None, None)
        assert row.intended is not None
        assert row.error == Figure(0.0, 0.0)


def test_at_every_k_the_tasks_tested_there_are_averaged(results: Results) -> None:
    run, scores = results.of("joint-lin-sloss").runs[1], Scores.of(results)
    [keep_all] = [r for r in results.of(KEEP_ALL).runs if r.seed == run.seed]
    assert scores.unintended_at(run, 0) is None
    for k in range(VERSIONS):
        best = keep_all.recall[k]
        assert scores.intended_at(run, k) == pytest.approx(100 * (run.recall[k] - best) / best)
        by_task = {
            task: found[k - first]
            for task, found in aucs_of(run, 0).items()
            if k >= (first := 2 if task in USER_TASKS else 1)
        }
        for task in TASKS:
            compatible, true = by_task.get(task, (None, None))
            expected = (
                None
                if compatible is None or true is None
                else pytest.approx(100 * (compatible - true) / true)
            )
            assert scores.task_at(task, run, k) == expected
        if by_task:
            compatible = mean(c for c, _ in by_task.values())
            true = mean(t for _, t in by_task.values())
            assert scores.unintended_at(run, k) == pytest.approx(100 * (compatible - true) / true)


def test_where_keep_all_has_nothing_to_lose_there_is_no_degradation(results: Results) -> None:
    method = results.of(KEEP_ALL)
    nothing = replace(method, runs=[replace(run, recall=[0.0] * VERSIONS) for run in method.runs])
    [row] = rows(replace(results, methods=[nothing]))
    assert (row.intended, row.total) == (None, None)
    assert row.unintended == Figure(0.0, 0.0)


def test_one_seed_has_no_spread() -> None:
    for row in rows(random_results(seeds=(3,))):
        assert (row.recall.spread, row.error.spread) == (0.0, 0.0)


def test_without_keep_all_there_is_nothing_to_compare_with(results: Results) -> None:
    others = [method for method in results.methods if method.name != KEEP_ALL]
    with pytest.raises(DataError, match="keep-all was not run"):
        rows(replace(results, methods=others))


def test_a_seed_that_keep_all_was_not_run_with_is_refused(results: Results) -> None:
    first, *others = results.methods
    fewer = replace(first, runs=first.runs[:2])
    with pytest.raises(DataError, match="keep-all was not run with seed 2"):
        rows(replace(results, methods=[fewer, *others]))


@pytest.mark.parametrize(
    ("lambdas", "nearest"),
    [((1.0, 4.0, 16.0, 32.0), 16.0), ((1.0, 7.0, 40.0), 7.0), ((0.0, 2.0), 2.0), ((0.0,), 0.0)],
)
def test_the_nearest_lambda_is_nearest_by_ratio(lambdas: tuple[float, ...], nearest: float) -> None:
    found = random_results(lambdas=lambdas).near("bc-aligner")
    assert found is not None
    assert found.lam == nearest


def test_a_method_that_was_not_run_has_no_nearest(results: Results) -> None:
    assert results.near("nobody") is None
    without = results.near("non-bc")
    assert without is not None
    assert without.lam is None


def test_a_variant_is_told_by_its_name() -> None:
    assert is_variant("bc-aligner-refit", "bc-aligner")
    assert is_variant("bc-aligner", "bc-aligner")
    assert not is_variant("bc-aligners", "bc-aligner")
    assert not is_variant("bc-aligner", "bc-aligner-refit")


def test_rows_are_grouped_by_method_in_order_and_by_ascending_lambda() -> None:
    groups = by_method(rows(random_results(lambdas=(16.0, 1.0, 4.0))))
    assert list(groups)[:3] == [KEEP_ALL, "fix-m0", "finetune-m0"]
    assert [row.lam for row in groups["bc-aligner"]] == [1.0, 4.0, 16.0]
    assert [row.lam for row in groups["non-bc"]] == [None]


def test_all_pairs_are_averaged_over_the_seeds(results: Results) -> None:
    method = results.of("bc-aligner", 4.0)
    table = pairs(method)
    assert [(p.k, p.j) for p in table] == [(k, j) for k in range(VERSIONS) for j in range(k + 1)]
    for pair in table:
        close(pair.error, [run.error[pair.k][pair.j] for run in method.runs])
        close(pair.norm, [run.norm[pair.k][pair.j] for run in method.runs])
        close(pair.amplification, [run.amplification[pair.k][pair.j] for run in method.runs])
        close(pair.condition, [run.condition[pair.k][pair.j] for run in method.runs])


def test_results_read_back_as_they_were_even_where_a_figure_is_not_finite(
    results: Results,
) -> None:
    first, *others = results.methods
    odd = replace(first.runs[0], condition=[[math.inf], [math.nan, 1.0]])
    written = replace(results, methods=[replace(first, runs=[odd]), *others])
    text = json.dumps(written.document(), allow_nan=False)
    read = Results.from_document(json.loads(text))
    [[infinite], [unknown, one]] = read.methods[0].runs[0].condition
    assert infinite == math.inf
    assert math.isnan(unknown)
    assert one == 1.0
    assert read.methods[1:] == written.methods[1:]
    assert isinstance(read.methods[0], MethodResult)
