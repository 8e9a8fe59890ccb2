"""The figures: what is drawn, what it says, and that it is the same to the byte each time."""

import hashlib
import os
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean, stdev
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from tests.e2e.documents import ROOT
from tests.evaluation_support import KINDS, Kind, random_results
from trainer.evaluation.drawing import INK, PAPER, Look, NotDrawn, Picture, look_of, looks
from trainer.evaluation.figures import draw, metrics_over_lambda, over_time
from trainer.evaluation.frontier import Rect, frontier
from trainer.evaluation.results import Results, Scores, pairs, rows

NAMES = [
    "frontier",
    "fig3_metrics",
    "fig4_tasks",
    "fig5_lambda",
    "heatmap_bc-aligner",
    "heatmap_bc-aligner-refit",
]


def draw_all(results: Results) -> dict[str, Picture]:
    methods = [method for name in NAMES if (method := results.near(name.partition("_")[2]))]
    found = draw(results, methods)
    return {picture.name: picture for picture in found if isinstance(picture, Picture)}


def texts(picture: Picture) -> list[str]:
    """Return every text of the drawing."""
    root = ElementTree.fromstring(picture.svg)
    return ["".join(text.itertext()) for text in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.fixture(scope="module")
def results() -> Results:
    return random_results()


@pytest.fixture(scope="module")
def pictures(results: Results) -> dict[str, Picture]:
    return draw_all(results)


def test_each_figure_is_drawn_as_png_and_svg(pictures: dict[str, Picture]) -> None:
    assert list(pictures) == NAMES
    for picture in pictures.values():
        assert picture.png.startswith(b"\x89PNG")
        width, height = struct.unpack(">II", picture.png[16:24])
        assert min(width, height) > 500
        assert ElementTree.fromstring(picture.svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert picture.title
        assert picture.caption.endswith(".")


def test_drawing_again_gives_the_same_bytes_whatever_the_users_settings(
    results: Results, pictures: dict[str, Picture]
) -> None:
    with mpl.rc_context({"font.size": 20.0, "svg.hashsalt": "other", "axes.grid": False}):
        again = draw_all(results)
        assert mpl.rcParams["font.size"] == 20.0
    assert again == pictures


def test_another_process_draws_the_same_bytes(pictures: dict[str, Picture]) -> None:
    program = (
        "import hashlib\n"
        "from tests.evaluation_support import random_results\n"
        "from trainer.evaluation.frontier import frontier\n"
        "picture = frontier(random_results())\n"
        "print(hashlib.sha256(picture.svg + picture.png).hexdigest())"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    own = pictures["frontier"]
    assert answer.stdout.strip() == hashlib.sha256(own.svg + own.png).hexdigest()


def test_no_date_and_no_program_is_written_into_a_file(pictures: dict[str, Picture]) -> None:
    for picture in pictures.values():
        assert b"<metadata" not in picture.svg
        assert b"Matplotlib" not in picture.svg + picture.png


def test_the_metrics_over_time_are_named_with_unit_and_lambda(
    pictures: dict[str, Picture],
) -> None:
    found = texts(pictures["fig3_metrics"])
    for text in (
        "Joint-NoTrans, λ = 16",
        "Joint-Lin-SLoss, λ = 16",
        "BC-Aligner, λ = 16",
        "change of Recall@50, % vs Keep-All",
        "change of ROC-AUC, % vs Keep-All",
        "mean distance, ‖·‖₂, not squared",
        "t_k, share of interactions seen",
        "0.9",
    ):
        assert text in found
    assert "1" not in found  # the end of the last version's use is no version
    assert "one standard deviation over 3 training seeds" in pictures["fig3_metrics"].caption


def test_a_metric_over_time_is_averaged_over_the_seeds(results: Results) -> None:
    scores, method = Scores.of(results), results.of("bc-aligner", 4.0)
    found = over_time(method, scores.unintended_at)
    assert found[0] is None
    for k, figure in enumerate(found[1:], start=1):
        values = [scores.unintended_at(run, k) or 0.0 for run in method.runs]
        assert figure is not None
        assert figure.mean == pytest.approx(mean(values))
        assert figure.spread == pytest.approx(stdev(values))


def test_every_task_has_a_line(pictures: dict[str, Picture]) -> None:
    found = texts(pictures["fig4_tasks"])
    for task in ("user activity", "user positive activity", "item rating avg", "edge rating"):
        assert found.count(task) == 1


def test_lambda_runs_along_an_axis_for_each_method_with_several(
    pictures: dict[str, Picture],
) -> None:
    found = texts(pictures["fig5_lambda"])
    for lam in ("1", "4", "16", "32"):
        assert found.count(lam) >= 3
    for title in ("Joint-NoTrans", "Joint-Lin-SLoss", "BC-Aligner", "BC-Aligner, refitted"):
        assert title in found
    assert "Non-BC" not in found


def test_each_cell_of_a_heat_map_says_its_value(
    results: Results, pictures: dict[str, Picture]
) -> None:
    found = texts(pictures["heatmap_bc-aligner"])
    for pair in pairs(results.of("bc-aligner", 16.0)):
        assert f"{pair.error.mean:.2f}" in found
        if pair.k > pair.j:
            assert f"± {pair.error.spread:.2f}" in found
    assert found.count("0.00") == 5


def test_the_frontier_names_every_method_and_writes_every_lambda_once(
    results: Results, pictures: dict[str, Picture]
) -> None:
    found = texts(pictures["frontier"])
    for row in rows(results):
        assert found.count(row.title) == 1
    for lam in ("4", "16", "32"):
        assert found.count(lam) == 4  # one for each joint method


def test_a_few_points_need_no_close_up() -> None:
    kinds = [Kind("keep-all", "Keep-All", 0, 0, 0), Kind("one", "One", -5, -1, 1)]
    few = frontier(random_results(kinds=kinds))
    assert isinstance(few, Picture)
    assert "the better half, enlarged" not in texts(few)
    assert "One" in texts(few)


def test_figures_without_their_methods_are_not_drawn_and_say_why() -> None:
    kinds = [kind for kind in KINDS if not kind.joint]
    found = draw(random_results(kinds=kinds), [])
    assert [picture.name for picture in found if isinstance(picture, Picture)] == ["frontier"]
    assert [picture.reason for picture in found if isinstance(picture, NotDrawn)] == [
        "none of joint-notrans, joint-lin-sloss, bc-aligner was run",
        "bc-aligner was not run",
        "no method was run at more than one λ",
    ]


def test_one_version_has_no_test_to_draw() -> None:
    results = random_results(versions=1, lambdas=(16.0,))
    found = draw(results, [results.of("bc-aligner")])
    assert [picture.name for picture in found if isinstance(picture, Picture)] == [
        "fig3_metrics",
        "heatmap_bc-aligner",
    ]
    assert [picture.reason for picture in found if isinstance(picture, NotDrawn)] == [
        "no task was tested on ver-0 vectors",
        "no task was tested on ver-0 vectors",
        "no method was run at more than one λ",
    ]


def test_one_seed_is_drawn_without_bars() -> None:
    found = draw_all(random_results(seeds=(0,), lambdas=(16.0,)))
    assert "no spread is known" in found["frontier"].caption
    assert not any("±" in text for text in texts(found["heatmap_bc-aligner"]))


def test_a_lambda_of_zero_has_no_place_on_a_logarithmic_axis() -> None:
    kinds = [KINDS[0], KINDS[-1]]
    results = random_results(kinds=kinds, seeds=(0,), lambdas=(0.0, 2.0, 8.0))
    found = metrics_over_lambda(results)
    assert isinstance(found, Picture)
    ticks = [text for text in texts(found) if text.isdecimal()]
    assert ticks.count("2") >= ticks.count("8") >= 3
    alone = metrics_over_lambda(random_results(kinds=kinds, seeds=(0,), lambdas=(0.0, 2.0)))
    assert isinstance(alone, NotDrawn)


def test_titles_are_text_and_names_of_files_are_tame(results: Results) -> None:
    method = replace(results.of("bc-aligner"), name="../a b", title="$x_1$ <&> _")
    _, *others = results.methods[:3]
    found = draw(replace(results, methods=[results.methods[0], method, *others]), [method])
    heat_map = found[-1]
    assert isinstance(heat_map, Picture)
    assert heat_map.name == "heatmap_..-a-b"
    assert "$x_1$ <&> _, λ = 1" in texts(heat_map)


def names_to_looks(names: Sequence[str]) -> dict[str, Look]:
    results = random_results(kinds=[Kind(name, name, 0, 0, 0) for name in names], seeds=(0,))
    return looks(results)


def test_a_method_looks_the_same_and_unlike_any_other() -> None:
    names = [kind.name for kind in KINDS]
    found = names_to_looks(names)
    assert set(names) <= set(found)
    assert len({(look.color, look.marker, look.hollow) for look in found.values()}) == len(found)
    assert found["keep-all"].color == INK
    alone = names_to_looks(["keep-all", "bc-aligner"])
    assert alone["bc-aligner"] == found["bc-aligner"]


def test_a_variant_is_a_hollow_dashed_twin_of_its_base() -> None:
    found = names_to_looks(["keep-all", "new", "new-refit", "new-refit-affine", "bc-aligner-refit"])
    base, refit, affine = found["new"], found["new-refit"], found["new-refit-affine"]
    assert base.color == refit.color == affine.color
    assert (base.dash, base.hollow, base.marks["markerfacecolor"]) == ("-", False, base.color)
    assert refit.hollow
    assert affine.hollow
    assert refit.marks["markerfacecolor"] == PAPER
    assert len({base.dash, refit.dash, affine.dash}) == 3
    assert found["bc-aligner-refit"].color == found["bc-aligner"].color


def test_looks_go_on_for_ever() -> None:
    found = [look_of(position) for position in range(40)]
    assert len({(look.color, look.marker) for look in found}) == 40


def test_rectangles_share_what_both_cover() -> None:
    rect = Rect.centred(0, 0, 4, 2)
    assert rect.shared(rect) == 8
    assert rect.shared(Rect(1, 0, 9, 9)) == 1
    assert rect.shared(Rect(2, 0, 9, 9)) == 0
    assert rect.shared(Rect(5, 5, 9, 9)) == 0
