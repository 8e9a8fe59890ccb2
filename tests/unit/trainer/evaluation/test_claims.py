"""The verdicts follow from the figures, seed by seed."""

from dataclasses import replace
from math import sqrt
from statistics import linear_regression, mean, stdev

import pytest

from tests.evaluation_support import KINDS, random_results
from trainer.evaluation.claims import Claim, Verdict, claims, error_growth, summary
from trainer.evaluation.results import Results, Scores


def results_of(seeds: tuple[int, ...] = (0, 1, 2), **changed: dict[str, float]) -> Results:
    """Make results of the methods of the paper, some of which tend to other figures."""
    kinds = [
        replace(kind, **changed.get(kind.name.replace("-", "_"), {}))  # type: ignore[arg-type]
        for kind in KINDS
    ]
    return random_results(kinds=kinds, seeds=seeds)


def claim_about(results: Results, words: str) -> Claim:
    [found] = [claim for claim in claims(results) if words in claim.statement]
    return found


def differences(results: Results, metric: str, one: str, other: str) -> list[float]:
    """One's metric less the other's at λ = 16, by seed."""
    scores = Scores.of(results)
    pair = [results.of(name, 16.0 if name not in PLAIN else None) for name in (one, other)]
    return [
        getattr(scores, metric)(a) - getattr(scores, metric)(b)
        for a, b in zip(pair[0].runs, pair[1].runs, strict=True)
    ]


PLAIN = {kind.name for kind in KINDS if not kind.joint}
"""Methods without λ."""


def test_what_the_figures_bear_out_holds_and_says_by_how_much() -> None:
    results = results_of()
    claim = claim_about(results, "Joint-NoTrans")
    found = differences(results, "intended", "joint-notrans", "joint-lin-sloss")
    assert mean(found) < -2 * stdev(found) / sqrt(3)
    assert claim.verdict == Verdict.HOLDS
    assert claim.numbers.startswith("Joint-NoTrans, λ = 16: −")
    assert "against Joint-Lin-SLoss, λ = 16: −" in claim.numbers
    text = f"difference {mean(found):.2f} ± {stdev(found):.2f}".replace("-", "−")
    assert claim.numbers.endswith(text)


def test_the_opposite_does_not_hold() -> None:
    results = results_of(joint_notrans={"intended": -1.0})
    assert claim_about(results, "Joint-NoTrans").verdict == Verdict.FAILS


def test_what_two_standard_errors_do_not_exceed_is_noise() -> None:
    results = results_of(joint_notrans={"intended": -3.6})
    found = differences(results, "intended", "joint-notrans", "joint-lin-sloss")
    assert abs(mean(found)) <= 2 * stdev(found) / sqrt(3)
    assert claim_about(results, "Joint-NoTrans").verdict == Verdict.NOISE


def test_non_bc_is_by_far_the_worst_or_it_is_not() -> None:
    claim = claim_about(results_of(), "Non-BC")
    assert claim.verdict == Verdict.HOLDS
    assert "against Post-Lin-SLoss: −" in claim.numbers
    near = claim_about(results_of(post_lin_sloss={"unintended": -22.0}), "Non-BC")
    assert near.verdict == Verdict.FAILS
    assert near.numbers.endswith("the worst, but by 1.2 times only")
    better = claim_about(results_of(post_lin_sloss={"unintended": -30.0}), "Non-BC")
    assert better.verdict == Verdict.FAILS
    assert "times only" not in better.numbers


def test_the_best_sum_is_compared_with_the_best_of_other_keep_latest_rows() -> None:
    better = {"unintended": -5.0}
    results = results_of(post_closed_form=better)
    aligner = claim_about(results, "BC-Aligner has the best sum")
    refit = claim_about(results, "BC-Aligner, refitted has the best sum")
    for claim, name in ((aligner, "bc-aligner"), (refit, "bc-aligner-refit")):
        found = differences(results, "total", name, "joint-lin-sloss")
        assert claim.verdict == Verdict.HOLDS
        assert f"difference {mean(found):.2f} ± {stdev(found):.2f}" in claim.numbers
        assert "Post-Direct" not in claim.numbers  # which stores everything
    worse = claim_about(results_of(post_closed_form={"unintended": -1.0}), "BC-Aligner has")
    assert worse.verdict == Verdict.FAILS
    assert "against Post-Closed-Form: −" in worse.numbers


def test_growth_is_the_slope_of_the_error_over_the_versions() -> None:
    run = results_of().of("bc-aligner").runs[0]
    slope = linear_regression([1, 2, 3, 4], [row[0] for row in run.error[1:]]).slope
    assert error_growth(run) == pytest.approx(slope)
    assert error_growth(replace(run, error=run.error[:2])) is None


def test_a_steeper_error_is_told_from_a_flatter_one() -> None:
    flat = results_of(joint_lin_sloss={"error": 4.0})
    assert claim_about(flat, "grows more slowly").verdict == Verdict.HOLDS
    steep = results_of(bc_aligner={"error": 4.0})
    assert claim_about(steep, "grows more slowly").verdict == Verdict.FAILS


def test_one_seed_goes_by_the_sign_and_says_so() -> None:
    results = results_of(seeds=(4,))
    assert claim_about(results, "Joint-NoTrans").verdict == Verdict.HOLDS
    assert "±" not in claim_about(results, "Joint-NoTrans").numbers
    assert "one training seed" in summary(results)


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("non-bc", "Non-BC"),
        ("joint-notrans", "Joint-NoTrans"),
        ("bc-aligner", "bc-aligner has the best sum"),
        ("joint-lin-sloss", "grows more slowly"),
    ],
)
def test_what_was_not_run_cannot_be_told(missing: str, words: str) -> None:
    kinds = [kind for kind in KINDS if not kind.name.startswith(missing)]
    claim = claim_about(random_results(kinds=kinds), words)
    assert claim.verdict == Verdict.OPEN
    assert claim.numbers == f"{missing} was not run"


def test_keep_all_alone_tells_nothing() -> None:
    results = random_results(kinds=KINDS[:1])
    assert {claim.verdict for claim in claims(results)} == {Verdict.OPEN}
    assert "No sum of both losses is known." in summary(results)


def test_without_any_test_nothing_can_be_told_of_the_consumers() -> None:
    found = {claim.statement: claim for claim in claims(random_results(versions=1))}
    assert [claim.numbers for claim in found.values()].count("nothing was tested") >= 3


def test_the_summary_sorts_the_statements_by_verdict() -> None:
    results = results_of(joint_notrans={"intended": -1.0})
    text = summary(results)
    by_verdict = {claim.statement: claim.verdict for claim in claims(results)}
    assert len(by_verdict) == 5
    held, failed = text.index("Holds: "), text.index("Does not hold: ")
    for statement, verdict in by_verdict.items():
        assert text.count(statement) == 1
        if verdict == Verdict.HOLDS:
            assert held < text.index(statement) < failed
    assert "over 3 training seeds" in text


def test_the_summary_names_the_best_row_of_all_and_of_the_paper() -> None:
    own = summary(results_of())
    assert "Of all rows that keep the latest vectors only, BC-Aligner, refitted, λ = " in own
    assert "as the best of BC-Aligner's" not in own
    other = summary(results_of(post_closed_form={"unintended": -0.5}))
    assert (
        "Of all rows that keep the latest vectors only, Post-Closed-Form with a sum of −0." in other
    )
    assert "before BC-Aligner, refitted, λ = " in other
