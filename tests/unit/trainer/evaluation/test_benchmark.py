"""A whole benchmark on a small data set: what holds of every method, and what is not done twice."""

import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa
import pytest

from backcast.errors import ConfigError, DataError
from tests.benchmark_support import CONSUMERS, line_folder, measured, tiny_plan, without_times
from tests.e2e.documents import blocks
from trainer.config import Protocol
from trainer.data.dataset import Dataset, write_dataset
from trainer.data.synth import SynthConfig, synthesize
from trainer.evaluation.benchmark import (
    Clock,
    Line,
    Plan,
    Unit,
    count_units,
    default_processes,
    is_done,
    phases,
    run,
    untested_tasks,
)
from trainer.evaluation.report import write_report
from trainer.evaluation.results import Results, rows
from trainer.methods import catalog, method, methods
from trainer.methods.models import Frozen, Independent, Joint

pytestmark = pytest.mark.usefixtures("one_thread")

LAMBDAS = (1.0, 4.0)


@pytest.fixture(scope="module")
def everything(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Every method of the catalog, the joint ones at two λ."""
    plan = tiny_plan(
        dataset.folder, tmp_path_factory.mktemp("out"), *methods(), lambdas=LAMBDAS, consumed=(0,)
    )
    return measured(plan)


# --- what holds of every method -------------------------------------------------------------------


def test_every_method_gives_a_run_at_every_lambda_it_has(everything: Results) -> None:
    expected = [
        (m.name, lam)
        for m in methods().values()
        for lam in ((None,) if m.models.default_lambda is None else LAMBDAS)
    ]
    assert [(found.name, found.lam) for found in everything.methods] == expected
    for found in everything.methods:
        (one,) = found.runs
        assert (one.seed, len(one.recall), len(one.epochs)) == (0, 3, 3)
        assert all(0 <= recall <= 1 for recall in one.recall)
        assert [len(row) for row in one.error] == [1, 2, 3]
        assert all(math.isfinite(value) for row in one.error for value in row)


def test_a_version_has_no_error_of_its_own(everything: Results) -> None:
    for found in everything.methods:
        assert [found.runs[0].error[k][k] for k in range(3)] == [0, 0, 0]


def test_all_rows_share_the_first_model(everything: Results) -> None:
    first = everything.methods[0].runs[0]
    for found in everything.methods:
        (one,) = found.runs
        assert (one.recall[0], one.epochs[0]) == (first.recall[0], first.epochs[0])
        assert [row[0] for row in one.norm] == [row[0] for row in first.norm]
        for task, auc in one.auc.items():
            assert [row[0] for row in auc.true] == [row[0] for row in first.auc[task].true]


def test_keep_all_loses_nothing(everything: Results) -> None:
    (keep_all,) = everything.of("keep-all").runs
    assert {value for row in keep_all.error for value in row} == {0.0}
    assert all(auc.compatible == auc.true for auc in keep_all.auc.values())
    row = rows(everything)[0]
    assert (row.name, row.stores_all) == ("keep-all", True)
    assert row.intended is not None
    assert row.unintended is not None
    assert (row.intended.mean, row.unintended.mean, row.error.mean) == (0, 0, 0)


def test_fix_m0_errs_in_nothing_and_learns_nothing(everything: Results) -> None:
    (fixed,), (keep_all,) = everything.of("fix-m0").runs, everything.of("keep-all").runs
    assert {value for row in fixed.error for value in row} == {0.0}
    assert all(auc.compatible == auc.true for auc in fixed.auc.values())
    assert fixed.epochs[1:] == [0, 0]
    assert fixed.recall[0] == keep_all.recall[0]
    assert fixed.recall[1:] != keep_all.recall[1:]


def test_rows_of_independent_models_share_them(everything: Results) -> None:
    (keep_all,) = everything.of("keep-all").runs
    for found in everything.methods:
        if isinstance(method(found.name).models, Independent):
            assert found.runs[0].recall == keep_all.recall


def test_least_squares_maps_err_less_than_truncation(everything: Results) -> None:
    errors = {name: everything.of(name).runs[0].error[1][0] for name in ("non-bc", "post-affine")}
    assert errors["post-affine"] < 0.8 * errors["non-bc"]


def test_lambda_matters_to_joint_methods(everything: Results) -> None:
    weak, strong = (everything.of("bc-aligner", lam).runs[0] for lam in LAMBDAS)
    assert weak.error[1][0] > strong.error[1][0]


def test_a_strategy_is_a_frozen_record_so_that_its_fields_name_its_work() -> None:
    for found in methods().values():
        for strategy in filter(None, (found.models, found.maps)):
            assert is_dataclass(strategy)
            assert not isinstance(strategy, type)
            assert hash(strategy) == hash(replace(strategy))
            assert " at 0x" not in repr(strategy)


# --- seeds ----------------------------------------------------------------------------------------


def test_spread_is_that_over_training_seeds(dataset: Dataset, tmp_path: Path) -> None:
    plan = tiny_plan(dataset.folder, tmp_path, "post-affine", seeds=(0, 3), consumed=(0,))
    results = measured(plan)
    found = results.of("post-affine")
    assert [one.seed for one in found.runs] == [0, 3]
    errors = [fmean([row[0] for row in one.error]) for one in found.runs]
    assert errors[0] != errors[1]
    row = rows(results)[1]
    assert row.error.mean == pytest.approx(fmean(errors))
    assert row.error.spread == pytest.approx(stdev(errors))


def test_the_same_seed_gives_the_same_result_to_the_bit(dataset: Dataset, tmp_path: Path) -> None:
    once, again = (
        measured(tiny_plan(dataset.folder, tmp_path / name, "bc-aligner", consumed=(0,)))
        for name in ("once", "again")
    )
    assert without_times(once.document()) == without_times(again.document())


# --- work that is done is kept --------------------------------------------------------------------


@pytest.fixture
def finished(dataset: Dataset, tmp_path: Path) -> Plan:
    plan = tiny_plan(dataset.folder, tmp_path / "out", "bc-aligner", consumed=(0,))
    measured(plan)
    return plan


def stamps(plan: Plan) -> dict[Path, tuple[int, int]]:
    """When each file was written, and which one it is."""
    files = [path for path in plan.work.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in files}


def test_a_finished_plan_is_only_read(finished: Plan) -> None:
    before, told = stamps(finished), list[tuple[int, int, str]]()
    results = run(finished, processes=1, told=lambda *words: told.append(words))
    assert stamps(finished) == before
    assert told == [(done, 6, "") for done in (1, 3, 4, 6)]
    assert "seconds" not in results.config


def test_only_what_is_missing_is_done(finished: Plan) -> None:
    unit = phases(finished)[-1][-1]
    before = stamps(finished)
    gone = finished.work / unit.key / "run.json"
    gone.unlink()
    gone.parent.rmdir()
    assert not is_done(finished, unit)
    measured(finished)
    after = stamps(finished)
    assert {path for path in after if after[path] != before.get(path)} == {gone}


def test_a_line_goes_on_after_its_last_finished_version(finished: Plan) -> None:
    folder = line_folder(finished, "bc-aligner")
    (unit,) = [u for u in phases(finished)[1] if u.line.kind == "Joint"]
    before = stamps(finished)
    for file in (folder / "2").iterdir():
        file.unlink()
    (folder / "2").rmdir()
    assert not is_done(finished, unit)
    measured(finished)
    after = stamps(finished)
    written = {path for path in after if after[path] != before[path]}
    assert {path.parent for path in written} == {folder / "2"}


def test_a_half_written_unit_is_done_again_and_its_litter_goes_in_time(finished: Plan) -> None:
    unit = phases(finished)[-1][-1]
    folder = finished.work / unit.key
    new, old = (folder.with_name(f".{folder.name}.{age}") for age in ("new", "old"))
    folder.rename(new)
    (new / "run.json").write_bytes(b'{"seed":')
    old.mkdir()
    os.utime(old, (0, time.time() - 7200))
    assert not is_done(finished, unit)
    measured(finished)
    assert is_done(finished, unit)
    assert new.exists()  # another run may be writing it
    assert not old.exists()


CHANGES: list[tuple[str, Callable[[Plan], Plan]]] = [
    ("epochs", lambda p: replace(p, training=p.training.model_copy(update={"epochs": 3}))),
    (
        "protocol",
        lambda p: replace(p, training=p.training.model_copy(update={"protocol": Protocol.PAPER})),
    ),
    ("consumers", lambda p: replace(p, consumers=replace(CONSUMERS, epochs=3))),
    ("consumed", lambda p: replace(p, consumed=(0, 1))),
    ("fractions", lambda p: replace(p, fractions=(0.4, 0.65, 0.8, 1.0))),
]


@pytest.mark.parametrize("change", [c for _, c in CHANGES], ids=[name for name, _ in CHANGES])
def test_other_settings_reuse_nothing(finished: Plan, change: Callable[[Plan], Plan]) -> None:
    changed = change(finished)
    assert changed.work != finished.work
    assert not any(is_done(changed, unit) for phase in phases(changed) for unit in phase)


def test_other_data_reuse_nothing(finished: Plan, tmp_path: Path) -> None:
    interactions, items = synthesize(SynthConfig(users=300, items=150, interactions=4000, seed=2))
    write_dataset(tmp_path / "other", interactions, items, name="other", source={}, counts={})
    changed = replace(finished, data=tmp_path / "other")
    assert changed.work != finished.work


def test_other_methods_seeds_and_lambdas_reuse_what_they_share(finished: Plan) -> None:
    changed = replace(finished, methods=("non-bc",), lambdas=(4.00001,), seeds=(0, 1))
    assert changed.work == finished.work
    done = {str(unit) for phase in phases(changed) for unit in phase if is_done(changed, unit)}
    assert done == {
        "seed 0, the first model",
        "seed 0, Independent models",
        "seed 0, consumers of version 0",
        "seed 0, keep-all",
    }


def test_a_method_that_is_declared_anew_is_measured_anew() -> None:
    declared = method("bc-aligner-refit")
    assert declared.maps is not None
    (field,) = [f for f in fields(declared.maps) if f.name == "bias"]  # type: ignore[arg-type]
    others = [
        replace(declared, maps=replace(declared.maps, **{field.name: True})),  # type: ignore[type-var]
        replace(declared, models=Joint("single")),
    ]
    from trainer.evaluation.benchmark import Contender

    keys = {Contender(m, lam).file for m in (declared, *others) for lam in (0.1234567, 0.1234568)}
    assert len(keys) == 6


# --- time left ------------------------------------------------------------------------------------


def units(*kinds: tuple[str, Any]) -> list[Unit]:
    return [
        Unit(kind, 0, Line(models, None))  # type: ignore[arg-type]
        for kind, models in kinds
    ]


def test_time_left_is_that_of_units_of_the_same_pace() -> None:
    first, slow, slower, quick, taught = work = units(
        ("first model", Independent()),
        ("models", Joint("single")),
        ("models", Joint("multi")),
        ("models", Frozen()),
        ("consumers", Independent()),
    )
    clock = Clock(work, processes=1)
    assert (clock.seconds_left(), clock.note()) == (None, "")
    clock.took(first, 10.0)
    assert clock.seconds_left() == pytest.approx(10 * (3 * 5.0 + 2.0))
    clock.took(slow, 100.0)  # twice as slow as guessed; the other joint one will be, too
    assert clock.seconds_left() == pytest.approx(100 + 20 * (5.0 + 2.0))
    clock.took(quick, 0.1)
    assert clock.seconds_left() == pytest.approx(100 + 20 * 2.0)
    clock.took(slower, 100.0)
    assert (clock.done, clock.total, clock.note()) == (4, 5, "about 40 s left")
    clock.took(taught, 30.0)
    assert (clock.seconds_left(), clock.note()) == (0.0, "")


def test_time_left_is_shared_by_the_processes_and_not_told_by_what_was_done_before() -> None:
    work = units(*[("models", Joint("multi"))] * 6)
    clock = Clock(work, processes=4)
    clock.skip(work[0])
    assert (clock.done, clock.skipped, clock.seconds_left()) == (1, 1, None)
    clock.took(work[1], 600.0)
    assert (clock.seconds_left(), clock.note()) == (600.0, "about 10 min left")
    clock.took(work[2], 600.0)
    assert clock.seconds_left() == pytest.approx(600.0)  # three are left, one process is idle


def test_long_times_are_told_in_hours() -> None:
    work = units(*[("models", Joint("multi"))] * 3)
    clock = Clock(work, processes=1)
    clock.took(work[0], 3900.0)
    assert clock.note() == "about 2 h 10 min left"


def test_each_unit_is_told_with_the_time_left(dataset: Dataset, tmp_path: Path) -> None:
    plan, told = tiny_plan(dataset.folder, tmp_path, "non-bc", consumed=(0,)), list[Any]()
    run(plan, processes=1, told=lambda *words: told.append(words))
    total = count_units(plan)
    assert total == 5
    named = [words for words in told if words[2].startswith("seed")]
    assert [(done, of) for done, of, _ in named] == [(n, total) for n in range(1, total + 1)]
    assert re.fullmatch(r"seed 0, the first model · about \d+ s left", named[0][2])
    assert named[-1][2] == "seed 0, non-bc"


# --- what cannot be measured ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("magic",)}, "Method 'magic' is unknown; there are keep-all, "),
        ({"methods": ()}, r"expected one or more methods, all different; got \[\]"),
        ({"seeds": ()}, r"one or more training seeds, all different; got \[\]"),
        ({"seeds": (1, 2, 1)}, r"one or more training seeds, all different; got \[1, 2, 1\]"),
        ({"seeds": (-1,)}, r"expected seeds of 0 or more; got \[-1\]"),
        ({"seeds": (2**63,)}, "expected seeds of 0 or more"),
        ({"lambdas": (4.0, 4.0)}, r"λs, all different; got \[4.0, 4.0\]"),
        ({"lambdas": (-0.5,)}, r"expected λs of 0 or more; got \[-0.5\]"),
        ({"lambdas": (math.nan,)}, "expected λs of 0 or more"),
        ({"lambdas": (math.inf,)}, "expected λs of 0 or more"),
    ],
    ids=str,
)
def test_a_plan_that_makes_no_sense_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_plan(tmp_path, tmp_path, *change.pop("methods", ("non-bc",)), **change)


def test_keep_all_is_always_measured_and_methods_are_in_the_order_of_the_table(
    tmp_path: Path,
) -> None:
    plan = tiny_plan(tmp_path, tmp_path, "bc-aligner", "non-bc")
    assert plan.methods == ("keep-all", "non-bc", "bc-aligner")


def table(*edges: tuple[str, str, float | None, int]) -> pa.Table:
    users, items, ratings, times = zip(*edges, strict=True)
    return pa.table(
        {
            "user_id": pa.array(users, pa.string()),
            "item_id": pa.array(items, pa.string()),
            "rating": pa.array(ratings, pa.float32()),
            "timestamp": pa.array(times, pa.int64()),
        }
    )


@pytest.mark.parametrize("protocol", Protocol)
def test_data_without_five_versions_are_refused(tmp_path: Path, protocol: Protocol) -> None:
    edges = [(f"u{n % 3}", f"i{n}", 5.0, n // 5) for n in range(10)]
    items = pa.table({"item_id": [f"i{n}" for n in range(10)], "brand": ["b"] * 10})
    write_dataset(tmp_path / "few", table(*edges), items, name="few", source={}, counts={})
    plan = tiny_plan(
        tmp_path / "few",
        tmp_path / "out",
        "non-bc",
        training={"protocol": protocol},
        fractions=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    )
    with pytest.raises(DataError, match="too small for a benchmark of 5 versions: of its 10 inter"):
        measured(plan)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def unrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data whose interactions have no ratings."""
    folder = tmp_path_factory.mktemp("unrated") / "data"
    interactions, items = synthesize(SynthConfig(users=300, items=150, interactions=4000, seed=1))
    at = interactions.column_names.index("rating")
    nothing = pa.nulls(len(interactions), pa.float32())
    interactions = interactions.set_column(at, interactions.schema.field("rating"), nothing)
    write_dataset(folder, interactions, items, name="unrated", source={}, counts={})
    return folder


def test_tasks_that_the_data_do_not_allow_are_left_out_and_named(
    unrated: Path, tmp_path: Path
) -> None:
    results = measured(tiny_plan(unrated, tmp_path, "post-affine"))
    ratings = ["item-rating-avg", "item-rating-std", "edge-rating"]
    assert untested_tasks(results) == ["user-positive-activity", *ratings]
    (one,) = results.of("post-affine").runs
    for task in ratings:
        assert {v for row in one.auc[task].compatible for v in row} == {None}
    assert rows(results)[1].auc is not None
    assert (tmp_path / "report.html") in write_report(results, tmp_path)


@pytest.fixture
def in_the_way(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "report"
    file.write_text("mine")
    yield file
    assert file.read_text() == "mine"


def test_an_output_folder_that_is_none_is_refused(dataset: Dataset, in_the_way: Path) -> None:
    plan = tiny_plan(dataset.folder, in_the_way, "non-bc")
    with pytest.raises(ConfigError, match=f"{in_the_way} is no folder that can be written to: Not"):
        measured(plan)


def test_an_output_folder_that_cannot_be_written_is_refused(dataset: Dataset) -> None:
    plan = tiny_plan(dataset.folder, Path("/proc/report"), "non-bc")
    with pytest.raises(ConfigError, match=r"/proc/report is no folder .* Name another one with"):
        measured(plan)


def test_one_process_a_core_on_the_cpu() -> None:
    assert default_processes("cpu") == os.cpu_count()


# --- a method of one's own ------------------------------------------------------------------------


@pytest.fixture
def shown_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The method of the guide, in a file beside those of the catalog."""
    (python,) = [b.text for b in blocks("docs/benchmark.md") if b.language == "python"]
    (tmp_path / "methods_of_guide").mkdir()
    (tmp_path / "methods_of_guide" / "shrunk.py").write_text(python)
    folders = [*catalog.__path__, str(tmp_path / "methods_of_guide")]
    monkeypatch.setattr(catalog, "__path__", folders)
    methods.cache_clear()
    yield "post-shrunk"
    monkeypatch.undo()
    methods.cache_clear()
    sys.modules.pop(f"{catalog.__name__}.shrunk", None)


def test_a_new_method_is_one_file(dataset: Dataset, tmp_path: Path, shown_method: str) -> None:
    plan = tiny_plan(dataset.folder, tmp_path / "out", "post-affine", shown_method, consumed=(0,))
    assert [m.name for m in methods().values()][-1] != shown_method
    results = measured(plan)
    (whole,), (shrunk,) = (results.of(name).runs for name in ("post-affine", shown_method))
    for k, j in ((1, 0), (2, 1)):
        assert shrunk.amplification[k][j] == pytest.approx(0.9 * whole.amplification[k][j])
    assert shrunk.amplification[2][0] == pytest.approx(0.81 * whole.amplification[2][0])
    assert shrunk.recall == whole.recall
