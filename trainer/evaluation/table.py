"""The table of a benchmark as Markdown, CSV and JSON, and the words that explain its columns."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.evaluation.published import Published, PublishedRow, published
from trainer.evaluation.results import (
    KEEP_ALL,
    Figure,
    MethodResult,
    Pair,
    Results,
    Row,
    pairs,
    rows,
)

NOTHING = "–"


@dataclass(frozen=True)
class Column:
    """A measured column.

    Attributes:
        key: its name in CSV and JSON.
        heading: its name for people, with the unit.
        convention: what is averaged, and relative to what.
        figure: its figure in the unit of ``heading``, None where a row has none.
        best: ``max`` or ``min``.
    """

    key: str
    heading: str
    convention: str
    figure: Callable[[Row], Figure | None]
    best: Callable[[Iterable[float]], float]
    decimals: int = 2


def _percent(figure: Figure | None) -> Figure | None:
    return None if figure is None else figure.times(100.0)


def _lost(figure: Callable[[Row], Figure | None]) -> Callable[[Row], Figure | None]:
    """Keep-All is what losses are relative to: it has none to print."""
    return lambda row: None if row.name == KEEP_ALL else figure(row)


COLUMNS = (
    Column(
        "recall_percent",
        "Recall@50, %",
        "the absolute Recall@50 of M_k on the interactions in (t_k, t_{k+1}], averaged over k",
        lambda row: _percent(row.recall),
        max,
    ),
    Column(
        "auc_percent",
        "ROC-AUC, %",
        "the absolute ROC-AUC of consumers of ver-0 vectors, averaged over the tested k ≥ 1 "
        "(k ≥ 2 for the user tasks) and over the tasks; chance is 50",
        lambda row: _percent(row.auc),
        max,
    ),
    Column(
        "intended_percent",
        "intended, %",
        "the relative change of Recall@50 against Keep-All, taken after averaging over k",
        _lost(lambda row: row.intended),
        max,
    ),
    Column(
        "unintended_percent",
        "unintended, %",
        "the relative change of ROC-AUC against the same consumers fed true ver-0 vectors, taken "
        "after averaging over k and tasks; the floor of 50 stays inside, so that losses look small",
        _lost(lambda row: row.unintended),
        max,
    ),
    Column(
        "sum_percent",
        "sum, %",
        "intended + unintended, the single figure of merit",
        _lost(lambda row: row.total),
        max,
    ),
    Column(
        "alignment_error",
        "alignment error",
        "the mean over users and items of ‖z̃_0 − z_0‖₂, not squared, averaged over k, the exact "
        "zero at k = 0 included",
        lambda row: row.error,
        min,
        decimals=3,
    ),
)

PUBLISHED_HEADINGS = ("paper: intended, %", "paper: unintended, %", "paper: sum, %", "paper: error")

PAIR_HEADINGS = (
    "k",
    "j",
    "alignment error",
    "mean ‖z_j‖₂",
    "largest singular value",
    "condition number",
)


@dataclass(frozen=True)
class Cell:
    """A printed figure; the best ones of the keep-latest rows are marked."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Line:
    """A printed row: method, λ, one cell a column, and the published figures if there are any."""

    title: str
    lam: str
    cells: Sequence[Cell]
    published: Sequence[str]


def shown(figure: Figure | None, decimals: int, seeds: int) -> str:
    """Return mean ± spread; without the spread where there is one seed only."""
    if figure is None:
        return NOTHING
    mean = number(figure.mean, decimals)
    return mean if seeds < 2 else f"{mean} ± {number(figure.spread, decimals)}"


def number(value: float, decimals: int) -> str:
    """Return a number with a proper minus, and none before a zero."""
    text = f"{value:.{decimals}f}"
    return text.replace("-", "−") if text.strip("-0.") else text.lstrip("-")


def lambda_text(lam: float | None) -> str:
    """Return λ, or a dash where a method has none."""
    return NOTHING if lam is None else f"{lam:g}"


def label(method: MethodResult | Row) -> str:
    """Return a method's title, with its λ where it has one."""
    return method.title if method.lam is None else f"{method.title}, λ = {method.lam:g}"


def seeds_of(results: Results) -> list[int]:
    """Return every training seed, in order."""
    return sorted({run.seed for method in results.methods for run in method.runs})


def lambdas_of(results: Results) -> list[float]:
    """Return every λ, in order."""
    return sorted({method.lam for method in results.methods if method.lam is not None})


def facts(results: Results) -> list[tuple[str, str]]:
    """Return what the figures depend on: data set, preset, protocol, seeds, λ and machine."""
    counts = (
        f"{results.users:,} users, {results.items:,} items, {results.interactions:,} interactions"
    )
    seeds = seeds_of(results)
    return [
        ("Data set", f"{results.dataset} ({counts}; fingerprint {results.fingerprint[:12]})"),
        ("Preset", results.preset),
        ("Protocol", results.protocol),
        ("Moments", ", ".join(f"t_{k} = {t:g}" for k, t in enumerate(results.times))),
        ("Training seeds", f"{len(seeds)} ({', '.join(map(str, seeds))})"),
        ("λ", ", ".join(f"{lam:g}" for lam in lambdas_of(results)) or NOTHING),
        ("Machine", results.machine),
    ]


def conventions(results: Results) -> list[tuple[str, str]]:
    """Return what each column means."""
    seeds = len(seeds_of(results))
    spread = (
        "mean ± standard deviation over training seeds"
        if seeds > 1
        else "one training seed, so that no spread is known"
    )
    found = published(results)
    return [
        ("All columns", spread),
        *((column.heading, column.convention) for column in COLUMNS),
        ("Keep-All", "what the changes are relative to: its figures are absolute"),
        ("Best", "of the rows that keep the vectors of the latest version only, column by column"),
        *([("paper", _paper_convention(found))] if found else []),
    ]


def _paper_convention(found: Published) -> str:
    return (
        f"as printed in arXiv 2206.03040 for {found.dataset}, λ = 16; Keep-All's are the absolute "
        "Recall@50 and ROC-AUC"
    )


def lines(results: Results) -> list[Line]:
    """Return the table as people read it, in the methods' order."""
    table, found = rows(results), published(results)
    bests = [_best(table, column) for column in COLUMNS]
    return [
        Line(
            row.title,
            lambda_text(row.lam),
            [_cell(row, column, best) for column, best in zip(COLUMNS, bests, strict=True)],
            _published_cells(row, found) if found else (),
        )
        for row in table
    ]


def _cell(row: Row, column: Column, best: str | None) -> Cell:
    figure = column.figure(row)
    text = shown(figure, column.decimals, len(row.seeds))
    is_best = figure is not None and number(figure.mean, column.decimals) == best
    return Cell(text, is_best and not row.stores_all)


def _best(table: Sequence[Row], column: Column) -> str | None:
    """Return the best mean as printed: what reads alike is equally good."""
    figures = [column.figure(row) for row in table if not row.stores_all]
    means = [figure.mean for figure in figures if figure and math.isfinite(figure.mean)]
    return number(column.best(means), column.decimals) if means else None


def _published_cells(row: Row, found: Published) -> Sequence[str]:
    if row.name == KEEP_ALL:
        return f"{found.recall:.2f} abs.", f"{found.auc:.2f} abs.", NOTHING, NOTHING
    printed = found.row(row.name, row.lam)
    if printed is None:
        return (NOTHING,) * len(PUBLISHED_HEADINGS)
    values = (printed.intended, printed.unintended, printed.total, printed.error)
    return [number(value, 2) for value in values]


def headings(results: Results) -> list[str]:
    """Return the heads of the columns of ``lines``."""
    paper = PUBLISHED_HEADINGS if published(results) else ()
    return ["method", "λ", *(column.heading for column in COLUMNS), *paper]


def pair_cells(pair: Pair, seeds: int) -> list[str]:
    """Return one (k, j) as people read it, under PAIR_HEADINGS."""
    figures = ((pair.error, 3), (pair.norm, 3), (pair.amplification, 3), (pair.condition, 1))
    return [str(pair.k), str(pair.j), *(shown(figure, digits, seeds) for figure, digits in figures)]


def markdown(results: Results, detailed: Sequence[MethodResult]) -> str:
    """Return the table, and the table of all (k, j) of each of the ``detailed`` methods."""
    parts = [
        f"# Backward compatibility on {_escape(results.dataset)}",
        "\n".join(f"- {_escape(what)}: {_escape(text)}" for what, text in facts(results)),
        _grid(headings(results), [_markdown_cells(line) for line in lines(results)], left=1),
        "\n".join(f"- {_escape(what)}: {_escape(text)}" for what, text in conventions(results)),
    ]
    for method in detailed:
        cells = [pair_cells(pair, len(method.runs)) for pair in pairs(method)]
        parts += [
            f"## All pairs: {_escape(label(method))}",
            "Live version k, consumers of version j. The singular values are those of W_k^j.",
            _grid(PAIR_HEADINGS, cells, left=0),
        ]
    return "\n\n".join(parts) + "\n"


def _markdown_cells(line: Line) -> list[str]:
    measured = [f"**{cell.text}**" if cell.best else cell.text for cell in line.cells]
    return [_escape(line.title), line.lam, *measured, *line.published]


def _grid(heads: Sequence[str], cells: Iterable[Sequence[str]], *, left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(heads) - left)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *cells))


def _escape(text: str) -> str:
    for special in "\\|*`<":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.split())


def comma_separated(results: Results) -> str:
    """Return the table as CSV, one row a method and λ, with full precision and no comments."""
    told = {"dataset": results.dataset, "preset": results.preset, "protocol": results.protocol}
    records = [told | _flat(record) for record in _records(results)]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def document(results: Results, detailed: Sequence[MethodResult]) -> str:
    """Return the table and the tables of all (k, j) as JSON, with full precision."""
    found = published(results)
    content = {
        "dataset": results.dataset,
        "users": results.users,
        "items": results.items,
        "interactions": results.interactions,
        "fingerprint": results.fingerprint,
        "preset": results.preset,
        "protocol": results.protocol,
        "times": list(results.times),
        "seeds": seeds_of(results),
        "lambdas": lambdas_of(results),
        "machine": results.machine,
        "conventions": dict(conventions(results)),
        "published_for": found.dataset if found else None,
        "rows": _records(results),
        "pairs": [_pairs_record(method) for method in detailed],
    }
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _records(results: Results) -> list[dict[str, Any]]:
    found = published(results)
    return [_record(row, found) for row in rows(results)]


def _record(row: Row, found: Published | None) -> dict[str, Any]:
    seeds = len(row.seeds)
    return {
        "method": row.name,
        "title": row.title,
        "lambda": row.lam,
        "stores_all": row.stores_all,
        "seeds": seeds,
        **{column.key: _figure_record(column.figure(row), seeds) for column in COLUMNS},
        "published": _published_record(row, found),
    }


def _published_record(row: Row, found: Published | None) -> dict[str, float | None]:
    keep_all = found if row.name == KEEP_ALL else None
    printed: PublishedRow | None = found.row(row.name, row.lam) if found else None
    return {
        "recall_percent": keep_all.recall if keep_all else None,
        "auc_percent": keep_all.auc if keep_all else None,
        "intended_percent": printed.intended if printed else None,
        "unintended_percent": printed.unintended if printed else None,
        "sum_percent": printed.total if printed else None,
        "alignment_error": printed.error if printed else None,
    }


def _pairs_record(method: MethodResult) -> dict[str, Any]:
    seeds = len(method.runs)
    return {
        "method": method.name,
        "lambda": method.lam,
        "seeds": seeds,
        "pairs": [
            {
                "k": pair.k,
                "j": pair.j,
                "alignment_error": _figure_record(pair.error, seeds),
                "norm": _figure_record(pair.norm, seeds),
                "largest_singular_value": _figure_record(pair.amplification, seeds),
                "condition_number": _figure_record(pair.condition, seeds),
            }
            for pair in pairs(method)
        ],
    }


def _figure_record(figure: Figure | None, seeds: int) -> dict[str, float | None]:
    mean, spread = (None, None) if figure is None else (figure.mean, figure.spread)
    return {"mean": _finite(mean), "spread": _finite(spread) if seeds > 1 else None}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Join the keys of nested mappings: ``recall_percent_mean``."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}_{inner}": found for inner, found in value.items()}
        else:
            flat[key] = value
    return flat
