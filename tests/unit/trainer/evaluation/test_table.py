"""The written tables say what the derived figures are."""

import csv
import io
import json
import math
from dataclasses import replace
from typing import Any

import pytest

from tests.evaluation_support import random_results
from trainer.evaluation.published import published
from trainer.evaluation.results import KEEP_ALL, Figure, Results, pairs, rows
from trainer.evaluation.table import comma_separated, document, lines, markdown, number, shown

MUSICAL = (27_530, 10_611, 231_312)
GAMES = (55_223, 17_389, 496_315)
GROCERY = (127_496, 41_280, 1_143_063)
UNITS = {
    "recall_percent": ("recall", 100.0),
    "auc_percent": ("auc", 100.0),
    "intended_percent": ("intended", 1.0),
    "unintended_percent": ("unintended", 1.0),
    "sum_percent": ("total", 1.0),
    "alignment_error": ("error", 1.0),
}
RELATIVE = ("intended_percent", "unintended_percent", "sum_percent")


@pytest.fixture(scope="module")
def results() -> Results:
    return random_results()


def markdown_rows(text: str, heading: str) -> list[dict[str, str]]:
    """Read a Markdown table whose first column is ``heading``."""
    table = [
        [cell.strip() for cell in line.strip("|").split(" |")]
        for line in text.split(f"| {heading} |", 1)[1].split("\n\n", 1)[0].splitlines()
    ]
    heads = [heading, *(cell for cell in table[0] if cell)]
    return [dict(zip(heads, row, strict=True)) for row in table[2:]]


def test_json_holds_every_column_at_full_precision(results: Results) -> None:
    content = json.loads(document(results, []))
    table = rows(results)
    assert len(content["rows"]) == len(table)
    for record, row in zip(content["rows"], table, strict=True):
        assert (record["method"], record["lambda"]) == (row.name, row.lam)
        assert (record["stores_all"], record["seeds"]) == (row.stores_all, 3)
        for key, (name, factor) in UNITS.items():
            figure = getattr(row, name)
            if row.name == KEEP_ALL and key in RELATIVE:
                assert record[key] == {"mean": None, "spread": None}
            else:
                assert record[key]["mean"] == factor * figure.mean
                assert record[key]["spread"] == factor * figure.spread


def test_json_says_what_was_run(results: Results) -> None:
    content = json.loads(document(results, []))
    assert content["dataset"] == "made up"
    assert (content["preset"], content["protocol"]) == ("small", "paper")
    assert content["seeds"] == [0, 1, 2]
    assert content["lambdas"] == [1.0, 4.0, 16.0, 32.0]
    assert content["machine"] == "2 cores, no GPU"
    assert content["published_for"] is None
    assert "not squared" in content["conventions"]["alignment error"]
    assert "floor of 50" in content["conventions"]["unintended, %"]


def test_csv_is_the_same_table_flat(results: Results) -> None:
    flat = list(csv.DictReader(io.StringIO(comma_separated(results))))
    records = json.loads(document(results, []))["rows"]
    assert len(flat) == len(records)
    for line, record in zip(flat, records, strict=True):
        assert (line["dataset"], line["preset"], line["protocol"]) == ("made up", "small", "paper")
        assert line["method"] == record["method"]
        assert line["lambda"] == ("" if record["lambda"] is None else str(record["lambda"]))
        for key in UNITS:
            for part in ("mean", "spread"):
                value = record[key][part]
                assert line[f"{key}_{part}"] == ("" if value is None else repr(value))


def test_markdown_prints_mean_and_spread(results: Results) -> None:
    printed = markdown_rows(markdown(results, []), "method")
    for line, row in zip(printed, rows(results), strict=True):
        assert line["method"] == row.title
        assert line["λ"] == ("–" if row.lam is None else f"{row.lam:g}")
        assert line["Recall@50, %"].strip("*") == (
            f"{100 * row.recall.mean:.2f} ± {100 * row.recall.spread:.2f}"
        )
        assert (
            line["alignment error"].strip("*") == f"{row.error.mean:.3f} ± {row.error.spread:.3f}"
        )
        if row.name == KEEP_ALL:
            assert [line[head] for head in ("intended, %", "unintended, %", "sum, %")] == ["–"] * 3
        else:
            assert row.total is not None
            text = f"{row.total.mean:.2f} ± {row.total.spread:.2f}".replace("-", "−")
            assert line["sum, %"].strip("*") == text


def test_the_best_of_the_rows_that_keep_the_latest_is_bold(results: Results) -> None:
    printed = markdown_rows(markdown(results, []), "method")
    table = rows(results)
    latest = [(at, row) for at, row in enumerate(table) if not row.stores_all]
    bold = {
        head: [at for at, line in enumerate(printed) if line[head].startswith("**")]
        for head in printed[0]
    }
    best = max(latest, key=lambda pair: pair[1].total.mean if pair[1].total else -math.inf)
    assert bold["sum, %"] == [best[0]]
    assert bold["alignment error"] == [at for at, row in latest if row.error.mean == 0.0]
    assert bold["intended, %"] == [
        at for at, row in latest if row.intended and abs(row.intended.mean) < 0.005
    ]
    assert bold["method"] == bold["λ"] == []
    kept = [at for at, row in enumerate(table) if row.stores_all]
    assert kept
    assert not any(at in places for at in kept for places in bold.values())


def test_one_seed_is_printed_without_a_spread() -> None:
    results = random_results(seeds=(7,))
    text = markdown(results, [results.of("bc-aligner")])
    assert "±" not in text
    assert "- Training seeds: 1 (7)" in text
    assert "no spread is known" in text
    assert json.loads(document(results, []))["rows"][1]["recall_percent"]["spread"] is None


def test_the_header_names_what_the_figures_depend_on(results: Results) -> None:
    head = markdown(results, []).partition("| method")[0]
    for text in (
        "made up (6,170 users, 2,753 items, 195,791 interactions; fingerprint 0f0f0f0f0f0f)",
        "Preset: small",
        "Protocol: paper",
        "t_0 = 0.5, t_1 = 0.6",
        "Training seeds: 3 (0, 1, 2)",
        "λ: 1, 4, 16, 32",
        "Machine: 2 cores, no GPU",
    ):
        assert text in head


def test_what_markdown_would_read_as_its_own_is_escaped(results: Results) -> None:
    first, *others = results.methods
    odd = replace(
        results, dataset="a|b *c*\n<d>", methods=[replace(first, title="Keep|All"), *others]
    )
    text = markdown(odd, [])
    assert text.startswith("# Backward compatibility on a\\|b \\*c\\* \\<d>\n")
    assert "\n| Keep\\|All | – |" in text


def test_all_pairs_of_a_method_are_a_table_of_their_own(results: Results) -> None:
    method = results.of("bc-aligner", 16.0)
    text = markdown(results, [method])
    assert "## All pairs: BC-Aligner, λ = 16" in text
    printed = markdown_rows(text, "k")
    recorded = json.loads(document(results, [method]))["pairs"]
    assert [(one["method"], one["lambda"], one["seeds"]) for one in recorded] == [
        ("bc-aligner", 16.0, 3)
    ]
    for line, record, pair in zip(printed, recorded[0]["pairs"], pairs(method), strict=True):
        assert (line["k"], line["j"]) == (str(pair.k), str(pair.j))
        assert (record["k"], record["j"]) == (pair.k, pair.j)
        for head, key, figure, decimals in (
            ("alignment error", "alignment_error", pair.error, 3),
            ("mean ‖z_j‖₂", "norm", pair.norm, 3),
            ("largest singular value", "largest_singular_value", pair.amplification, 3),
            ("condition number", "condition_number", pair.condition, 1),
        ):
            assert line[head] == f"{figure.mean:.{decimals}f} ± {figure.spread:.{decimals}f}"
            assert record[key] == {"mean": figure.mean, "spread": figure.spread}


def test_what_is_not_finite_is_null_in_json(results: Results) -> None:
    method = results.of("bc-aligner", 16.0)
    singular = replace(
        method, runs=[replace(method.runs[0], condition=[[math.inf]], error=[[0.0]])]
    )
    [record] = json.loads(document(results, [singular]))["pairs"]
    assert record["pairs"][0]["condition_number"] == {"mean": None, "spread": None}
    assert "| inf |" in markdown(results, [singular])


@pytest.mark.parametrize(
    ("counts", "dataset", "keep_all", "aligner"),
    [
        (MUSICAL, "Musical Instruments", (12.13, 68.66), (-2.96, -0.65, 0.38)),
        (GAMES, "Video Games", (12.69, 72.76), (-3.35, -0.59, 0.28)),
        (GROCERY, "Grocery", (7.78, 65.82), (-3.21, -0.07, 0.13)),
    ],
)
def test_published_figures_are_found_by_the_counts(
    counts: tuple[int, int, int],
    dataset: str,
    keep_all: tuple[float, float],
    aligner: tuple[float, float, float],
) -> None:
    found = published(random_results(counts=counts))
    assert found is not None
    assert (found.dataset, found.recall, found.auc) == (dataset, *keep_all)
    row = found.row("bc-aligner", 16.0)
    assert row is not None
    assert (row.intended, row.unintended, row.error) == aligner
    assert row.total == aligner[0] + aligner[1]
    assert len(found.rows) == 8
    assert all(found.row(name, None) for name in ("fix-m0", "non-bc", "post-lin-mloss"))
    assert found.row("bc-aligner", 4.0) is None
    assert found.row("bc-aligner-refit", 16.0) is None


def test_published_figures_stand_beside_the_measured_ones() -> None:
    results = random_results(counts=MUSICAL)
    printed = {
        (line["method"], line["λ"]): [line[head] for head in line if head.startswith("paper: ")]
        for line in markdown_rows(markdown(results, []), "method")
    }
    assert printed["Keep-All", "–"] == ["12.13 abs.", "68.66 abs.", "–", "–"]
    assert printed["Non-BC", "–"] == ["0.00", "−26.45", "−26.45", "2.61"]
    assert printed["BC-Aligner", "16"] == ["−2.96", "−0.65", "−3.61", "0.38"]
    assert printed["BC-Aligner", "4"] == ["–"] * 4
    assert printed["Post-Closed-Form", "–"] == ["–"] * 4
    content = json.loads(document(results, []))
    assert content["published_for"] == "Musical Instruments"
    by_method: dict[str, Any] = {row["method"]: row["published"] for row in content["rows"]}
    assert by_method["keep-all"]["recall_percent"] == 12.13
    assert by_method["keep-all"]["intended_percent"] is None
    assert by_method["finetune-m0"] == {
        "recall_percent": None,
        "auc_percent": None,
        "intended_percent": -7.69,
        "unintended_percent": -7.46,
        "sum_percent": -7.69 - 7.46,
        "alignment_error": 1.01,
    }


def test_any_other_data_set_has_no_published_columns(results: Results) -> None:
    assert published(results) is None
    assert published(random_results(counts=(27_530, 10_611, 231_313))) is None
    assert "paper:" not in markdown(results, [])
    assert all(line.published == () for line in lines(results))


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [(-1.234, 2, "−1.23"), (-0.001, 2, "0.00"), (0.0, 2, "0.00"), (12.0, 0, "12"), (-20, 0, "−20")],
)
def test_numbers_have_a_proper_minus_and_zero_has_none(
    value: float, decimals: int, text: str
) -> None:
    assert number(value, decimals) == text


def test_a_figure_is_shown_with_its_spread_if_it_has_one() -> None:
    assert shown(Figure(-1.0, 0.25), 2, 3) == "−1.00 ± 0.25"
    assert shown(Figure(-1.0, 0.0), 2, 1) == "−1.00"
    assert shown(None, 2, 3) == "–"
