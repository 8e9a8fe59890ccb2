"""The written files: which, how, and a page that needs nothing but itself."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from backcast.errors import DataError
from tests.evaluation_support import KINDS, random_results
from trainer.evaluation.claims import claims, summary
from trainer.evaluation.report import write_report
from trainer.evaluation.results import Results
from trainer.evaluation.table import PAIR_HEADINGS, conventions, facts, lines

NASTY = "<script>alert(\"x\")</script> & 'q'"
PICTURES = (
    "frontier",
    "fig3_metrics",
    "fig4_tasks",
    "fig5_lambda",
    "heatmap_bc-aligner",
    "heatmap_bc-aligner-refit",
)
TABLES = ("results.json", "table3.md", "table3.csv", "table3.json", "report.html")


@pytest.fixture(scope="module")
def results() -> Results:
    return random_results()


@pytest.fixture(scope="module")
def out(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new" / "folder"
    write_report(results, folder)
    return folder


@pytest.fixture(scope="module")
def page(out: Path) -> ElementTree.Element:
    """The page, which is well-formed XML too."""
    return ElementTree.fromstring((out / "report.html").read_text())


def text_of(element: ElementTree.Element) -> str:
    return "".join(element.itertext())


def tables(page: ElementTree.Element) -> list[list[list[str]]]:
    return [
        [[text_of(cell) for cell in row] for row in table.iter("tr")]
        for table in page.iter("table")
    ]


def test_all_files_are_written_and_nothing_else(out: Path) -> None:
    expected = {*TABLES, *(f"{name}.{suffix}" for name in PICTURES for suffix in ("png", "svg"))}
    assert {path.name for path in out.iterdir()} == expected


def test_the_results_read_back_and_give_the_same_files(out: Path, tmp_path: Path) -> None:
    read = Results.from_document(json.loads((out / "results.json").read_text()))
    written = write_report(read, tmp_path)
    assert set(written) == set(tmp_path.iterdir())
    for path in written:
        assert path.read_bytes() == (out / path.name).read_bytes(), path.name


def test_the_page_is_whole(page: ElementTree.Element, out: Path) -> None:
    assert (out / "report.html").read_text().startswith('<!DOCTYPE html>\n<html lang="en">')
    assert [child.tag for child in page] == ["head", "body"]
    assert page.findtext("head/title") == "Backward compatibility on made up"
    assert len(list(page.iter("h1"))) == 1
    assert [text_of(heading) for heading in page.iter("h2")] == [
        "What holds here",
        "The table",
        "Figures",
        "All pairs of versions",
        "Methods and time spent",
        "Configuration and machine",
    ]


def test_the_page_loads_nothing(page: ElementTree.Element, out: Path) -> None:
    text = (out / "report.html").read_text()
    assert "://" not in text
    assert "@import" not in text
    tags = {element.tag for element in page.iter()}
    assert not tags & {"script", "link", "img", "image", "iframe", "object", "embed", "base"}
    for element in page.iter():
        assert not {"src", "srcset", "data", "action"} & set(element.attrib)
        assert element.get("href", "#").startswith("#")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    [policy] = [meta.get("content") for meta in page.iter("meta") if meta.get("http-equiv")]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_every_id_is_one_elements_and_every_reference_leads_to_one(
    page: ElementTree.Element, out: Path
) -> None:
    ids = Counter(element.get("id") for element in page.iter() if element.get("id"))
    assert set(ids.values()) == {1}
    targets = {element.get("href", "").removeprefix("#") for element in page.iter()} - {""}
    targets |= set(re.findall(r"url\(#([^)]*)\)", (out / "report.html").read_text()))
    assert targets
    assert targets <= set(ids)


def test_the_drawings_follow_the_colours_of_the_page(page: ElementTree.Element) -> None:
    drawings = list(page.iter("svg"))
    assert len(drawings) == len(PICTURES)
    for drawing in drawings:
        assert drawing.get("role") == "img"
        assert drawing.get("aria-label")
        content = ElementTree.tostring(drawing, encoding="unicode")
        assert "var(--ink)" in content
        assert "#1f2933" not in content
        assert "<style" not in content


def test_the_table_has_every_cell_and_the_best_in_bold(
    results: Results, page: ElementTree.Element
) -> None:
    head, *body = tables(page)[0]
    assert head[:3] == ["method", "λ", "Recall@50, %"]
    expected = lines(results)
    assert body == [
        [line.title, line.lam, *(cell.text for cell in line.cells)] for line in expected
    ]
    bold = [text_of(cell) for cell in next(page.iter("table")).iter("b")]
    assert bold == [cell.text for line in expected for cell in line.cells if cell.best]


def test_conventions_facts_and_configuration_are_told(
    results: Results, page: ElementTree.Element
) -> None:
    told = {
        (text_of(term), text_of(meaning))
        for listing in page.iter("dl")
        for term, meaning in zip(listing.iter("dt"), listing.iter("dd"), strict=True)
    }
    assert set(conventions(results)) | set(facts(results)) <= told
    assert ("widths", "32, 40, 48, 56, 64") in told
    assert ("epochs", "100") in told
    assert ("Non-BC", "What Non-BC does.") in told


def test_the_story_is_told_with_its_figures(results: Results, page: ElementTree.Element) -> None:
    [section] = [section for section in page.iter("section") if section.get("id") == "story"]
    told = text_of(section).replace("\u00a0", " ")
    assert summary(results) in told
    for claim in claims(results):
        assert f"{claim.verdict.capitalize()}: {claim.numbers}." in told


def test_every_figure_has_its_caption(page: ElementTree.Element) -> None:
    figures = list(page.iter("figure"))
    assert len(figures) == len(PICTURES)
    for figure in figures:
        assert len(text_of(next(figure.iter("figcaption")))) > 40
        assert len(list(figure.iter("h3"))) == 1


def test_all_pairs_and_the_time_spent_are_tables(
    results: Results, page: ElementTree.Element
) -> None:
    _, aligner, refit, spent = tables(page)
    assert aligner[0] == refit[0] == list(PAIR_HEADINGS)
    assert len(aligner) == 1 + 15
    for row, method in zip(spent[1:], results.methods, strict=True):
        seconds = sum(sum(run.seconds) for run in method.runs) / 3
        assert row[0] == method.title
        assert row[2] == ("all vectors" if method.stores_all else "the latest vectors")
        assert row[3] == f"{seconds:.1f}"


def test_names_are_text_not_markup(results: Results, tmp_path: Path) -> None:
    first, *_, last = results.methods
    methods = [first, replace(last, title=NASTY, summary=NASTY)]
    nasty = replace(
        results,
        dataset=NASTY,
        machine=NASTY,
        config={NASTY: NASTY, "nested": {"deep": [1, NASTY]}},
        methods=methods,
    )
    write_report(nasty, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<script" not in text
    page = ElementTree.fromstring(text)
    assert page.findtext("head/title") == f"Backward compatibility on {NASTY}"
    terms = [text_of(term) for term in page.iter("dt")]
    assert NASTY in terms
    assert "nested.deep" in terms
    assert tables(page)[0][2][0] == NASTY


def test_what_is_not_drawn_is_explained(tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if not kind.joint]
    written = write_report(random_results(kinds=kinds), tmp_path)
    assert [path.name for path in written if path.suffix == ".png"] == ["frontier.png"]
    text = text_of(ElementTree.fromstring((tmp_path / "report.html").read_text()))
    assert "Not drawn: Each unintended task over time, for bc-aligner was not run." in text
    assert "No table: bc-aligner was not run." in text


def test_the_methods_that_are_looked_into_can_be_named(tmp_path: Path) -> None:
    kinds = [kind for kind in KINDS if not kind.joint]
    written = write_report(random_results(kinds=kinds), tmp_path, ["post-closed-form", "nobody"])
    assert [path.name for path in written if path.name.startswith("heatmap")] == [
        "heatmap_post-closed-form.png",
        "heatmap_post-closed-form.svg",
    ]


def test_one_version_and_one_seed_make_a_report_too(tmp_path: Path) -> None:
    small = random_results(versions=1, seeds=(0,))
    write_report(replace(small, config={}), tmp_path)
    ElementTree.fromstring((tmp_path / "report.html").read_text())


def test_the_measurements_are_kept_when_no_table_can_be_made(
    results: Results, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="keep-all was not run"):
        write_report(replace(results, methods=results.methods[1:]), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_a_file_that_cannot_be_replaced_leaves_no_draft(results: Results, tmp_path: Path) -> None:
    (tmp_path / "results.json").mkdir()
    with pytest.raises(IsADirectoryError):
        write_report(results, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_an_older_report_is_replaced(tmp_path: Path) -> None:
    few = random_results(kinds=KINDS[:2], seeds=(0,))
    (tmp_path / "report.html").write_text("old")
    write_report(few, tmp_path)
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
