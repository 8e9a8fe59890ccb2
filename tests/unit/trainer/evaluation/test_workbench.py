"""What is measured is what one computes from the models in the work folder."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from backcast.errors import DataError
from backcast.transforms import AffineMap, compose
from backcast.versions import Lineage
from tests.benchmark_support import FRACTIONS, line_folder, measured, tiny_plan, without_times
from trainer.config import Protocol
from trainer.data.dataset import Dataset, resolve_until
from trainer.evaluation import workbench
from trainer.evaluation.benchmark import Contender, Plan, is_done, phases
from trainer.evaluation.consumers import Consumers
from trainer.evaluation.results import Results
from trainer.evaluation.tasks import TASKS, Timeline
from trainer.evaluation.workbench import Workbench, read_trained
from trainer.graph import Graph
from trainer.methods.base import Trained
from trainer.model import embed
from trainer.split import Edges, Holdout, holdout

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = ("non-bc", "post-direct", "post-affine", "bc-aligner", "joint-direct")


@pytest.fixture(scope="module", params=["paper", "strict"])
def plan(
    request: pytest.FixtureRequest, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Plan:
    out = tmp_path_factory.mktemp("out")
    protocol = Protocol(request.param)
    return tiny_plan(dataset.folder, out, *METHODS, training={"protocol": protocol})


@pytest.fixture(scope="module")
def results(plan: Plan) -> Results:
    return measured(plan)


class ByHand:
    """A method's vectors, made from nothing but the files of its models."""

    def __init__(self, plan: Plan, dataset: Dataset, name: str) -> None:
        self.plan, self.dataset = plan, dataset
        self.moments = [resolve_until(dataset, share) for share in FRACTIONS]
        folder = line_folder(plan, name)
        first = plan.work / "seed-0/models/first/0"
        self.made = [read_trained(path) for path in (first, folder / "1", folder / "2")]

    def edges(self, k: int) -> int:
        return self.dataset.edges_until(self.moments[k])

    def look(self, k: int) -> Holdout:
        found = holdout(self.dataset, self.edges(k), self.edges(k + 1))
        assert found is not None
        return found

    def true(self, j: int, k: int) -> tuple[Tensor, Tensor]:
        """M_j on the version-k graph, that of the past alone or as published."""
        look = self.look(k)
        if self.plan.training.protocol is Protocol.PAPER:
            return self._embed(self.made[j], look.visible, look.users, look.items)
        known = self.edges(k)
        past = Edges(self.dataset.users[:known], self.dataset.items[:known])
        users, items = int(past.users.max()) + 1, int(past.items.max()) + 1
        return self._embed(self.made[j], past, users, items)

    def for_recall(self, k: int) -> tuple[Tensor, Tensor]:
        look = self.look(k)
        return self._embed(self.made[k], look.visible, look.users, look.items)

    def _embed(self, made: Trained, edges: Edges, users: int, items: int) -> tuple[Tensor, Tensor]:
        vocabulary = made.archived.vocabulary
        graph = Graph.of(self.dataset, edges, users, items, vocabulary)
        return embed(made.archived.model, graph)

    def map(self, k: int, j: int) -> AffineMap:
        """W_k^j of the line's own maps."""
        found = AffineMap.identity(self.made[k].archived.model.width)
        for version in range(k, j, -1):
            joint_map = self.made[version].joint_map
            assert joint_map is not None
            found = joint_map.after(found)
        return found


@pytest.fixture(scope="module")
def by_hand(plan: Plan, results: Results, dataset: Dataset) -> ByHand:
    assert results.methods
    return ByHand(plan, dataset, "bc-aligner")


def test_alignment_error_is_the_mean_distance_of_served_from_true(
    results: Results, by_hand: ByHand
) -> None:
    (run,) = results.of("bc-aligner").runs
    for k in range(3):
        for j in range(k + 1):
            true = [z.double().numpy() for z in by_hand.true(j, k)]
            latest = [z.double().numpy() for z in by_hand.true(k, k)]
            served = [by_hand.map(k, j)(z) for z in latest]
            users, items = (
                [float(np.sqrt(((a[n] - b[n]) ** 2).sum())) for n in range(len(b))]
                for a, b in zip(served, true, strict=True)
            )
            assert run.error_users[k][j] == pytest.approx(np.mean(users), rel=1e-5, abs=1e-12)
            assert run.error_items[k][j] == pytest.approx(np.mean(items), rel=1e-5, abs=1e-12)
            assert run.error[k][j] == pytest.approx(np.mean(users + items), rel=1e-5, abs=1e-12)
            norms = np.linalg.norm(np.concatenate(true), axis=1)
            assert run.norm[k][j] == pytest.approx(norms.mean(), rel=1e-5)
            singular = np.linalg.svd(by_hand.map(k, j).weight, compute_uv=False)
            assert run.amplification[k][j] == pytest.approx(singular[0])
            assert run.condition[k][j] == pytest.approx(singular[0] / singular[-1])


def test_recall_is_the_share_of_the_next_interactions_among_the_first_fifty(
    results: Results, by_hand: ByHand
) -> None:
    (run,) = results.of("bc-aligner").runs
    for k in range(3):
        look, (users, items) = by_hand.look(k), by_hand.for_recall(k)
        bounds = []
        for user in sorted(set(look.targets.users.tolist())):
            wanted = set(look.targets.items[look.targets.users == user].tolist())
            seen = set(look.visible.items[look.visible.users == user].tolist())
            scores = [round(score, 5) for score in (items @ users[user]).tolist()]
            candidates = [item for item in range(look.items) if item not in seen]
            # Items that nobody has seen yet and that look alike are tied: for the worse or better.
            bounds.append([hits(candidates, scores, wanted, better) for better in (False, True)])
        worst, best = np.mean(bounds, axis=0)
        assert worst - 1e-9 <= run.recall[k] <= best + 1e-9
        assert best - worst < 0.05


def hits(
    candidates: Sequence[int], scores: Sequence[float], wanted: set[int], better: bool
) -> float:
    ranked = sorted(candidates, key=lambda item: (-scores[item], (item in wanted) != better))
    return len(wanted & set(ranked[:50])) / len(wanted)


def test_auc_is_that_of_consumers_of_true_vectors_fed_served_ones(
    plan: Plan, results: Results, by_hand: ByHand, dataset: Dataset
) -> None:
    (run,) = results.of("bc-aligner").runs
    folder = plan.work / "seed-0/consumers/first-0"
    timeline = Timeline(dataset, by_hand.moments, plan.training.protocol)
    about = orjson.loads((folder / "about.json").read_bytes())
    consumers = Consumers.load(timeline, about, load_file(folder / "consumers.safetensors"))
    tolerance = 2e-4  # a pair of nearly equal scores may swap: the order of float32 sums
    for task in TASKS:
        for k in range(3):
            given = {
                "true": by_hand.true(0, k),
                "compatible": tuple(
                    torch.from_numpy(by_hand.map(k, 0)(z.numpy())).float()
                    for z in by_hand.true(k, k)
                ),
            }
            for name, (users, items) in given.items():
                value = getattr(run.auc[task.name], name)[k][0]
                if k < task.tested_after:
                    assert value is None
                    continue
                examples = task.test(timeline, 0, k)
                scores = consumers.scores(task.name, examples, users, items)
                aucs = [pair_count(own.tolist(), examples.labels.tolist()) for own in scores]
                assert value == pytest.approx(np.mean(aucs), abs=tolerance)
                if name == "compatible":
                    spread = run.auc[task.name].spread[k][0]
                    assert spread == pytest.approx(np.std(aucs), abs=tolerance)


def pair_count(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """The share of (positive, negative) pairs in the right order, ties counted half."""
    positive = np.array([s for s, label in zip(scores, labels, strict=True) if label])
    negative = np.array([s for s, label in zip(scores, labels, strict=True) if not label])
    differences = positive[:, None] - negative[None, :]
    return float((differences > 0).mean() + (differences == 0).mean() / 2)


def test_protocols_see_different_graphs(plan: Plan, results: Results, dataset: Dataset) -> None:
    assert results.protocol == plan.training.protocol
    bench, row = Workbench(plan, 0), row_of(plan, "non-bc")
    moments = [resolve_until(dataset, share) for share in FRACTIONS]
    for k in range(3):
        seen = moments[k + 1] if results.protocol == "paper" else moments[k]
        users, items = bench.true(row.line, 0, k)
        assert (len(users), len(items)) == (dataset.users_known(seen), dataset.items_known(seen))


def row_of(plan: Plan, name: str) -> Contender:
    (row,) = [row for row in plan.rows() if row.method.name == name]
    return row


@pytest.mark.parametrize("name", METHODS)
def test_maps_are_composed_as_they_are_served(plan: Plan, results: Results, name: str) -> None:
    assert results.methods
    row, bench = row_of(plan, name), Workbench(plan, 0)
    assert row.method.maps is not None
    found = bench.composed(row)
    assert found is not None
    made = bench.models(row.line)
    maps = dict[tuple[int, int], AffineMap]()
    for k in (1, 2):
        fitted = row.method.maps.fit(bench._step(k, row.lam, found[k - 1], made), made[k])
        maps |= {(k, j): one for j, one in fitted.items()}
        lineage = Lineage({0: None, 1: 0, 2: 1})
        expected = compose(k, made[k].archived.model.width, lineage, maps)
        assert list(found[k]) == list(expected)
        for j, one in expected.items():
            np.testing.assert_allclose(found[k][j].weight, one.weight, rtol=1e-9)
    is_direct = name in {"post-direct", "joint-direct"}
    assert ((2, 0) in maps) == is_direct
    through = maps[1, 0].after(maps[2, 1]).weight
    assert np.allclose(found[2][0].weight, through) != is_direct


def test_keep_all_needs_no_maps(plan: Plan, results: Results) -> None:
    assert results.methods
    assert Workbench(plan, 0).composed(row_of(plan, "keep-all")) is None


# --- files ----------------------------------------------------------------------------------------


def test_a_folder_appears_when_all_is_written(tmp_path: Path) -> None:
    with workbench._new(tmp_path / "unit") as draft:
        (draft / "half").touch()
        assert not (tmp_path / "unit").exists()
        assert draft.parent == tmp_path
    assert [p.name for p in tmp_path.rglob("*")] == ["unit", "half"]


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    def fail_in_the_middle() -> None:
        with workbench._new(tmp_path / "unit") as draft:
            (draft / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_in_the_middle()
    assert list(tmp_path.iterdir()) == []


def test_what_another_run_has_finished_meanwhile_stays(tmp_path: Path) -> None:
    with workbench._new(tmp_path / "unit") as mine:
        (mine / "file").write_text("mine")
        with workbench._new(tmp_path / "unit") as theirs:
            assert mine != theirs
            (theirs / "file").write_text("theirs")
    assert (tmp_path / "unit/file").read_text() == "theirs"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_not_another_run(tmp_path: Path) -> None:
    (tmp_path / "unit").write_text("a file in the way")
    with pytest.raises(NotADirectoryError), workbench._new(tmp_path / "unit"):
        pass


DAMAGES: Any = [
    ("seed-0/models/first/0/model.safetensors", b"1234"),
    ("seed-0/models/first/0/about.json", b'{"width":'),
    ("seed-0/models/first/0/about.json", b"{}"),
    ("seed-0/consumers/first-0/consumers.safetensors", b""),
    ("seed-0/consumers/first-0/about.json", b"[1"),
    ("LINE/2/map.safetensors", b"\xff" * 100),
    ("LINE/1/model.safetensors", None),
]


@pytest.fixture(scope="module")
def finished(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    plan = tiny_plan(dataset.folder, tmp_path_factory.mktemp("out"), "bc-aligner")
    measured(plan)
    return plan


@pytest.fixture
def copied(finished: Plan, tmp_path: Path) -> Plan:
    """The same work in another folder, without the last measurement."""
    copy = replace(finished, out=tmp_path / "copy")
    shutil.copytree(finished.work, copy.work)
    shutil.rmtree(copy.work / phases(copy)[-1][-1].key)
    return copy


@pytest.mark.parametrize(("name", "content"), DAMAGES, ids=[name for name, _ in DAMAGES])
def test_a_damaged_file_is_named_and_deleting_its_folder_mends_it(
    finished: Plan, copied: Plan, name: str, content: bytes | None
) -> None:
    line = line_folder(copied, "bc-aligner").relative_to(copied.work)
    file = copied.work / name.replace("LINE", str(line))
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        measured(copied)
    assert caught.value.message.startswith(f"{file} is damaged: ")
    assert caught.value.message.endswith(
        f" Delete the folder {file.parent}; the same command makes it again."
    )
    shutil.rmtree(file.parent)
    again, before = (without_times(measured(found).document()) for found in (copied, finished))
    assert again == before


def test_a_damaged_measurement_is_named(copied: Plan) -> None:
    unit = phases(copied)[-1][0]
    file = copied.work / unit.key / "run.json"
    file.write_bytes(file.read_bytes()[:100])
    assert is_done(copied, unit)
    with pytest.raises(DataError, match=rf"{file} is damaged: .* Delete the folder {file.parent};"):
        measured(copied)
