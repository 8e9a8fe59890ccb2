"""Versions trained one on another: what is registered, and what an interruption leaves."""

import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backcast.chains import load_chain
from backcast.closed_form import least_squares
from backcast.errors import (
    ArtifactCorrupt,
    ArtifactMissing,
    BackcastError,
    Conflict,
    InvalidInput,
)
from backcast.transforms import AffineMap
from backcast.versions import FileDigest, Transform, Version, VersionState
from tests.trainer_support import (
    TINY,
    Workshop,
    command,
    environment,
    open_workshop,
    quick_methods,
    synthetic,
    threads,
)
from trainer.archive import (
    ABOUT,
    MODEL,
    TRAINED,
    TRANSFORM,
    VOCABULARY,
    ArchivedModel,
    library_versions,
    load_model,
    map_file,
)
from trainer.balance import balanced_weights
from trainer.config import Protocol, TrainConfig
from trainer.data.dataset import Dataset, MultiHot, resolve_until
from trainer.fitting import EpochReport
from trainer.graph import Graph
from trainer.methods import method
from trainer.methods.maps import JointlyTrained
from trainer.methods.models import Joint
from trainer.model import embed
from trainer.ranking import recall_at_k
from trainer.sampling import PairSampler
from trainer.split import Holdout, Split, make_split
from trainer.training import TrainRequest, train_version

LEARNED = (MODEL, TRANSFORM, VOCABULARY)
"""The files that training makes; ``version.json`` also says how long it took."""

WITH_DIRECT_MAPS = ["post-direct", "joint-direct", "solved-direct", "grown-direct"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return synthetic(tmp_path_factory.mktemp("data") / "synthetic")


@pytest.fixture(scope="module")
def trained(
    dataset: Dataset, tmp_path_factory: pytest.TempPathFactory, _one_thread: None
) -> Iterator[Workshop]:
    """Three versions, each measured on the next tenth of the edges; nothing is added to it."""
    with open_workshop(tmp_path_factory.mktemp("trained"), dataset) as workshop:
        for until, horizon in ((0.5, 0.6), (0.6, 0.7), (0.7, 0.8)):
            workshop.train(until, horizon)
        yield workshop


@pytest.fixture
def workshop(dataset: Dataset, tmp_path: Path) -> Iterator[Workshop]:
    with open_workshop(tmp_path, dataset) as workshop:
        yield workshop


def configured(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({**TINY.model_dump(), **changes})


def read_json(workshop: Workshop, version: Version, name: str) -> Any:
    return workshop.artifacts.read_json(version.folder, name, version.files[name].sha256)


def read_tensors(workshop: Workshop, version: Version, name: str) -> Mapping[str, NDArray[Any]]:
    return workshop.artifacts.read_tensors(version.folder, name, version.files[name].sha256)


def training_split(dataset: Dataset, version: Version) -> Split:
    return make_split(dataset, version.until, version.details["horizon"], Protocol.STRICT)


def training_graph(dataset: Dataset, split: Split, archived: ArchivedModel) -> Graph:
    return Graph.of(dataset, split.train, split.users, split.items, archived.vocabulary)


def known_vectors(workshop: Workshop, number: int, at: Version) -> NDArray[np.float64]:
    """Return the vectors of version ``number`` of all that is known at the cut of another."""
    archived = load_model(workshop.artifacts, workshop.registry.versions.get(number))
    known = training_split(workshop.dataset, at).known
    users, items = int(known.users.max()) + 1, int(known.items.max()) + 1
    graph = Graph.of(workshop.dataset, known, users, items, archived.vocabulary)
    return torch.cat(embed(archived.model, graph)).numpy().astype(np.float64)


def learned(version: Version) -> dict[str, FileDigest]:
    """Return the digests of what was learned: equal digests are equal bits."""
    return {name: version.files[name] for name in LEARNED if name in version.files}


class TestWhatIsRegistered:
    def test_rows(self, trained: Workshop, dataset: Dataset) -> None:
        versions = trained.registry.versions.all()
        assert [v.number for v in versions] == [0, 1, 2]
        assert [v.parent for v in versions] == [None, 0, 1]
        assert [v.dim for v in versions] == [8, 10, 12]
        assert [v.method for v in versions] == ["intended-only", "bc-aligner", "bc-aligner"]
        assert {v.state for v in versions} == {VersionState.REGISTERED}
        assert [v.until for v in versions] == [resolve_until(dataset, t) for t in (0.5, 0.6, 0.7)]
        assert {v.seed for v in versions} == {1}
        assert {v.dataset for v in versions} == {str(dataset.folder.resolve())}
        assert {v.dataset_fingerprint for v in versions} == {dataset.fingerprint}

    def test_maps(self, trained: Workshop) -> None:
        assert trained.registry.versions.transforms() == [
            Transform(1, 0, False, 8, 10, False, "transform.safetensors"),
            Transform(2, 1, False, 10, 12, False, "transform.safetensors"),
        ]
        for k, shape in ((1, (8, 10)), (2, (10, 12))):
            arrays = read_tensors(trained, trained.registry.versions.get(k), TRANSFORM)
            assert {name: a.shape for name, a in arrays.items()} == {"weight": shape}
            assert arrays["weight"].dtype == np.float32
        chain = load_chain(trained.registry.deployments.catalog(), trained.artifacts, 2)
        assert {j: (m.rows, m.cols) for j, m in chain.items()} == {
            2: (12, 12),
            1: (10, 12),
            0: (8, 12),
        }

    def test_details(self, trained: Workshop, dataset: Dataset) -> None:
        for version, layers, horizon in zip(
            trained.registry.versions.all(), (1, 2, 2), (0.6, 0.7, 0.8), strict=True
        ):
            details = dict(version.details)
            metrics = details.pop("metrics")
            assert details == {
                "architecture": {"name": "GraphSAGE", "width": version.dim, "layers": layers},
                "config": {**TINY.model_dump(mode="json"), "alignment_weight": 16.0},
                "vocabulary_sizes": {"brand": 6, "categories": 3},
                "horizon": resolve_until(dataset, horizon),
                "libraries": library_versions(),
            }
            measured = {"selected_epoch", "selection_recall_at_50", "seconds", "recall_at_50"}
            aligned = {"alignment_error", "parent_norm", "parent_recall_at_50"}
            aligned = aligned if version.number else set()
            assert set(metrics) == measured | aligned
            assert metrics["selected_epoch"] in {2, 4, 6}

    def test_files(self, trained: Workshop) -> None:
        root = Path(trained.settings.artifacts_root)
        folders = set()
        for version in trained.registry.versions.all():
            names = {MODEL, VOCABULARY, ABOUT} | ({TRANSFORM} if version.number else set())
            assert set(version.files) == names
            assert {path.name for path in (root / version.folder).iterdir()} == names
            for name, digest in version.files.items():
                assert (root / version.folder / name).stat().st_size == digest.size
            assert re.fullmatch(rf"versions/v{version.number}-[0-9a-f]{{8}}", version.folder)
            folders.add(version.folder)
        assert set(trained.folders()) == folders

    def test_version_json_says_what_the_registry_says(self, trained: Workshop) -> None:
        for version in trained.registry.versions.all():
            about = read_json(trained, version, ABOUT)
            kept = ("parent", "dim", "method", "until", "seed", "dataset", "dataset_fingerprint")
            assert about == {**{k: getattr(version, k) for k in kept}, **version.details}

    def test_depth_and_width_follow_the_schedule(self, trained: Workshop) -> None:
        for version, layers in zip(trained.registry.versions.all(), (1, 2, 2), strict=True):
            archived = load_model(trained.artifacts, version)
            assert (archived.model.width, archived.model.layers) == (version.dim, layers)
            assert archived.model.user.shape == (version.dim,)


class TestMetrics:
    @pytest.mark.parametrize("number", [0, 1, 2])
    def test_recalls_are_those_of_the_model_kept(
        self, trained: Workshop, dataset: Dataset, number: int
    ) -> None:
        version = trained.registry.versions.get(number)
        archived = load_model(trained.artifacts, version)
        split = training_split(dataset, version)

        def recall(holdout: Holdout | None, of: ArchivedModel) -> float:
            assert holdout is not None
            graph = Graph.of(dataset, holdout.visible, holdout.users, holdout.items, of.vocabulary)
            return recall_at_k(*embed(of.model, graph), holdout, 50)

        metrics = version.details["metrics"]
        assert metrics["selection_recall_at_50"] == recall(split.selection, archived)
        assert metrics["recall_at_50"] == recall(split.test, archived)
        if version.parent is not None:
            parent = load_model(trained.artifacts, trained.registry.versions.get(version.parent))
            assert metrics["parent_recall_at_50"] == recall(split.test, parent)

    @pytest.mark.parametrize("number", [1, 2])
    def test_alignment_error_is_that_of_the_model_kept(
        self, trained: Workshop, dataset: Dataset, number: int
    ) -> None:
        version = trained.registry.versions.get(number)
        z = {k: known_vectors(trained, k, version) for k in (number - 1, number)}
        weight = read_tensors(trained, version, TRANSFORM)["weight"].astype(np.float64)
        errors = np.linalg.norm(z[number] @ weight.T - z[number - 1], axis=1)
        norms = np.linalg.norm(z[number - 1], axis=1)
        metrics = version.details["metrics"]
        assert metrics["alignment_error"] == pytest.approx(errors.mean(), rel=1e-5)
        assert metrics["parent_norm"] == pytest.approx(norms.mean(), rel=1e-5)

    def test_without_a_horizon_nothing_is_measured_on_later_edges(self, workshop: Workshop) -> None:
        version = workshop.train(0.5)
        assert version.details["horizon"] is None
        assert version.details["metrics"]["recall_at_50"] is None
        assert version.details["metrics"]["selection_recall_at_50"] > 0


def test_the_loss_is_over_the_steps_to_all_older_versions(workshop: Workshop) -> None:
    # With a learning rate next to zero, what is registered is what training began with.
    still = configured(epochs=1, batch_size=1 << 20, learning_rate=1e-12, weight_decay=0)
    reports: list[EpochReport] = []
    for until in (0.5, 0.6):
        workshop.train(until)
    version = workshop.train(0.7, config=still, on_epoch=reports.append)

    split = training_split(workshop.dataset, version)
    new, parent = (
        load_model(workshop.artifacts, workshop.registry.versions.get(k)) for k in (2, 1)
    )
    with torch.no_grad():
        z = new.model.train()(training_graph(workshop.dataset, split, new))
    target = torch.cat(embed(parent.model, training_graph(workshop.dataset, split, parent)))
    to_0, to_1 = (
        torch.from_numpy(
            read_tensors(workshop, workshop.registry.versions.get(k), TRANSFORM)["weight"]
        )
        for k in (1, 2)
    )
    (batch,) = PairSampler(
        split.train, split.items, torch.Generator().manual_seed(still.seed)
    ).epoch(1 << 20)
    total = 0.0
    for rows in (batch.users, split.users + batch.positives, split.users + batch.negatives):
        delta = z[rows] @ to_1.T - target[rows]
        total += float((delta @ to_0.T).square().mean() + delta.square().mean()) / 2
    assert reports[0].alignment == pytest.approx(total, rel=1e-4)


SERVABLE = {name: found for name, found in quick_methods().items() if found.servable}
"""The methods that ``train_version`` takes; maps fitted by gradient descent take four epochs."""


@pytest.fixture(scope="module")
def by_method(
    dataset: Dataset, tmp_path_factory: pytest.TempPathFactory, _one_thread: None
) -> Iterator[Mapping[str, Workshop]]:
    """Three versions by each method; nothing is added to them."""
    with ExitStack() as stack:
        workshops = {}
        for name, chosen in SERVABLE.items():
            folder = tmp_path_factory.mktemp(name)
            workshops[name] = stack.enter_context(open_workshop(folder, dataset))
            for until in (0.5, 0.6, 0.7):
                workshops[name].train(until, by=chosen)
        yield workshops


def read_map(workshop: Workshop, source: int, file: str) -> AffineMap:
    """Read a map as it lies in the artifacts."""
    arrays = read_tensors(workshop, workshop.registry.versions.get(source), file)
    return AffineMap(arrays["weight"], arrays.get("bias"))


def served_chain(workshop: Workshop, version: int) -> Mapping[int, AffineMap]:
    return load_chain(workshop.registry.deployments.catalog(), workshop.artifacts, version)


def assert_same(found: AffineMap, expected: AffineMap) -> None:
    """Compare two maps, to the rounding of float32."""
    np.testing.assert_allclose(found.weight, expected.weight, rtol=1e-5, atol=1e-6)
    assert (found.bias is None) is (expected.bias is None)
    if found.bias is not None and expected.bias is not None:
        np.testing.assert_allclose(found.bias, expected.bias, rtol=1e-5, atol=1e-6)


class TestMethods:
    @pytest.mark.parametrize("name", SERVABLE)
    def test_versions_are_registered_and_their_chain_composes_to_their_maps(
        self, by_method: Mapping[str, Workshop], name: str
    ) -> None:
        workshop = by_method[name]
        versions = workshop.registry.versions.all()
        assert [v.method for v in versions] == ["intended-only", name, name]
        to_1, to_0 = read_map(workshop, 2, TRANSFORM), read_map(workshop, 1, TRANSFORM)
        chain = served_chain(workshop, 2)
        assert sorted(chain) == [0, 1, 2]
        assert_same(chain[2], AffineMap.identity(versions[2].dim))
        assert_same(chain[1], to_1)
        direct = map_file(0, direct=True)
        if name in WITH_DIRECT_MAPS:
            assert_same(chain[0], read_map(workshop, 2, direct))
            composed = to_0.after(to_1).weight
            assert np.abs(chain[0].weight - composed).max() > 1e-3, "composing shows nothing"
        else:
            assert direct not in versions[2].files
            assert_same(chain[0], to_0.after(to_1))

    @pytest.mark.parametrize("name", SERVABLE)
    def test_transforms_say_what_the_files_hold(
        self, by_method: Mapping[str, Workshop], name: str
    ) -> None:
        workshop = by_method[name]
        transforms = workshop.registry.versions.transforms()
        has_direct = [(t.source, t.target) for t in transforms if t.direct]
        assert has_direct == ([(2, 0)] if name in WITH_DIRECT_MAPS else [])
        assert [(t.source, t.target) for t in transforms if not t.direct] == [(1, 0), (2, 1)]
        for transform in transforms:
            found = read_map(workshop, transform.source, transform.file)
            assert transform.file == map_file(transform.target, direct=transform.direct)
            assert (transform.rows, transform.cols) == (found.rows, found.cols)
            assert transform.affine is (found.bias is not None)
        for version in workshop.registry.versions.all():
            named = {t.file for t in transforms if t.source == version.number}
            others = {MODEL, VOCABULARY, ABOUT}
            assert set(version.files) - {TRAINED} == named | others

    def test_the_first_version_is_the_same_by_every_method(
        self, by_method: Mapping[str, Workshop]
    ) -> None:
        firsts = [learned(w.registry.versions.get(0)) for w in by_method.values()]
        assert len(firsts) == len(SERVABLE)
        assert all(first == firsts[0] for first in firsts)

    @pytest.mark.parametrize("name", ["post-affine", "post-direct", "grown-direct"])
    def test_fitted_maps_are_the_closed_form_on_what_is_served(
        self, by_method: Mapping[str, Workshop], name: str
    ) -> None:
        workshop = by_method[name]
        last = workshop.registry.versions.get(2)
        chain = served_chain(workshop, 2)
        z = {k: known_vectors(workshop, k, last) for k in (0, 1, 2)}
        users = int(training_split(workshop.dataset, last).known.users.max()) + 1
        for k in (0, 1) if name in WITH_DIRECT_MAPS else (1,):
            given: dict[str, Any] = {"bias": True, "ridge": 1e-4}
            if name == "grown-direct":
                given["weights"] = balanced_weights(torch.from_numpy(z[k]), users).numpy()
            assert_same(chain[k], least_squares(z[2], z[k], **given))

    def test_the_map_that_was_trained_is_kept_where_another_is_served(
        self, by_method: Mapping[str, Workshop]
    ) -> None:
        aligner, refit = by_method["bc-aligner"], by_method["bc-aligner-affine"]
        for k in (1, 2):
            one, other = (w.registry.versions.get(k).files for w in (aligner, refit))
            # Later models look at maps as trained, so that refitting changes none of them.
            assert one[MODEL] == other[MODEL]
            assert TRAINED not in one
            assert one[TRANSFORM] == other[TRAINED] != other[TRANSFORM]
        for name in ("post-affine", "solved", "joint-notrans"):
            assert TRAINED not in by_method[name].registry.versions.get(2).files

    @pytest.mark.parametrize("name", WITH_DIRECT_MAPS)
    def test_without_an_older_model_there_is_no_direct_map(
        self, workshop: Workshop, name: str
    ) -> None:
        for until in (0.5, 0.6):
            workshop.train(until, by=name)
        remove(workshop, 0, MODEL)
        version = workshop.train(0.7, by=name)
        assert map_file(0, direct=True) not in version.files
        assert [(t.source, t.target) for t in workshop.registry.versions.transforms()] == [
            (1, 0),
            (2, 1),
        ]
        chain = served_chain(workshop, 2)
        to_1, to_0 = read_map(workshop, 2, TRANSFORM), read_map(workshop, 1, TRANSFORM)
        assert_same(chain[0], to_0.after(to_1))

    @pytest.mark.parametrize("name", SERVABLE)
    def test_without_the_parents_model_nothing_is_trained(
        self, workshop: Workshop, name: str
    ) -> None:
        workshop.train(0.5)
        remove(workshop, 0, MODEL)
        reports: list[EpochReport] = []
        with pytest.raises(ArtifactMissing, match=MODEL), unchanged(workshop):
            workshop.train(0.6, by=SERVABLE[name], on_epoch=reports.append)
        assert reports == []

    @pytest.mark.parametrize("name", ["keep-all", "fix-m0"])
    @pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
    def test_what_cannot_be_served_is_refused(
        self, workshop: Workshop, name: str, first: bool
    ) -> None:
        if not first:
            workshop.train(0.5)
        with pytest.raises(InvalidInput) as raised, unchanged(workshop):
            workshop.train(0.6, by=name)
        assert raised.value.message == (
            f"{method(name).title} has no map to serve old versions through. "
            f"Train with one of {', '.join(SERVABLE)}."
        )

    @pytest.mark.parametrize("name", SERVABLE)
    def test_the_same_seed_gives_the_same_files(
        self, by_method: Mapping[str, Workshop], workshop: Workshop, name: str
    ) -> None:
        torch.manual_seed(99)  # what is drawn elsewhere must not matter
        for until in (0.5, 0.6, 0.7):
            found = workshop.train(until, by=SERVABLE[name])
            expected = by_method[name].registry.versions.get(found.number)
            assert {**found.files, ABOUT: None} == {**expected.files, ABOUT: None}

    def test_a_bias_trained_jointly_is_registered_and_served(self, workshop: Workshop) -> None:
        affine = replace(
            method("joint-lin-sloss"), models=Joint("single", "affine"), maps=JointlyTrained()
        )
        for until in (0.5, 0.6, 0.7):
            workshop.train(until, by=affine, config=configured(epochs=20))
        assert [t.affine for t in workshop.registry.versions.transforms()] == [True, True]
        chain = served_chain(workshop, 2)
        b1, b2 = (
            read_tensors(workshop, workshop.registry.versions.get(k), TRANSFORM) for k in (1, 2)
        )
        assert np.abs(b1["bias"]).max() > 0.01
        last = workshop.registry.versions.get(2)
        z2, z1 = (known_vectors(workshop, k, last) for k in (2, 1))
        to_1 = z2 @ b2["weight"].T.astype(np.float64) + b2["bias"]
        to_0 = to_1 @ b1["weight"].T.astype(np.float64) + b1["bias"]
        np.testing.assert_allclose(chain[1](z2), to_1, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(chain[0](z2), to_0, rtol=1e-10, atol=1e-10)
        error = np.linalg.norm(to_1 - z1, axis=1).mean()
        assert last.details["metrics"]["alignment_error"] == pytest.approx(error, rel=1e-5)


def remove(workshop: Workshop, number: int, name: str) -> None:
    """Remove a file of a version."""
    folder = workshop.registry.versions.get(number).folder
    (Path(workshop.settings.artifacts_root) / folder / name).unlink()


class TestParents:
    def test_an_older_parent_may_be_asked_for(self, workshop: Workshop) -> None:
        workshop.train(0.5)
        workshop.train(0.6)
        version = workshop.train(0.7, parent=0)
        assert (version.number, version.parent, version.dim) == (2, 0, 12)
        assert read_tensors(workshop, version, TRANSFORM)["weight"].shape == (8, 12)
        catalog = workshop.registry.deployments.catalog()
        assert sorted(load_chain(catalog, workshop.artifacts, 2)) == [0, 2]

    def test_a_parent_is_left_as_it_was(self, workshop: Workshop) -> None:
        parent = workshop.train(0.5)
        before = workshop.registry.versions.get(0)
        workshop.train(0.6)
        assert workshop.registry.versions.get(0) == before == parent
        for name, digest in parent.files.items():
            workshop.artifacts.read(parent.folder, name, digest.sha256)

    def test_a_damaged_parent_is_refused(self, workshop: Workshop) -> None:
        parent = workshop.train(0.5)
        path = Path(workshop.settings.artifacts_root) / parent.folder / MODEL
        path.write_bytes(path.read_bytes()[:-1] + b"!")
        with pytest.raises(ArtifactCorrupt, match=MODEL), unchanged(workshop):
            workshop.train(0.6)

    def test_a_horizon_that_is_not_later_is_refused(self, workshop: Workshop) -> None:
        until = resolve_until(workshop.dataset, 0.6)
        for horizon in (until, until - 1):
            request = TrainRequest(
                workshop.dataset, configured(), until, method("bc-aligner"), horizon
            )
            with pytest.raises(InvalidInput, match="not after the cut-off"), unchanged(workshop):
                train_version(workshop.registry, workshop.artifacts, request, lambda _: None)


class TestSeeds:
    @pytest.mark.parametrize("count", [1, 2])
    def test_the_same_seed_gives_the_same_versions(
        self, dataset: Dataset, tmp_path: Path, count: int
    ) -> None:
        runs = []
        with threads(count):
            for run, seed in enumerate((1, 1, 2)):
                torch.manual_seed(run)  # what is drawn elsewhere must not matter
                with open_workshop(tmp_path / str(run), dataset) as workshop:
                    # So many numbers that torch shares out the work among its threads.
                    config = configured(seed=seed, epochs=2, widths=(32, 40), batch_size=4096)
                    runs.append([learned(workshop.train(t, config=config)) for t in (0.5, 0.6)])
        first, same, other = runs
        assert [sorted(files) for files in first] == [sorted({MODEL, VOCABULARY}), sorted(LEARNED)]
        assert first == same
        for k in (0, 1):
            assert first[k][MODEL] != other[k][MODEL]
        assert first[1][TRANSFORM] != other[1][TRANSFORM]

    def test_the_global_generator_is_left_alone(self, workshop: Workshop) -> None:
        workshop.train(0.5)
        torch.manual_seed(2024)
        before = torch.get_rng_state()
        workshop.train(0.6, 0.7)
        assert torch.equal(torch.get_rng_state(), before)

    def test_what_comes_later_changes_nothing(self, dataset: Dataset, tmp_path: Path) -> None:
        moments = [resolve_until(dataset, t) for t in (0.5, 0.6)]
        known = dataset.edges_until(moments[-1])
        brands = dataset.attributes["brand"]
        renamed = brands.values.copy()
        renamed[brands.offsets[dataset.items_known(moments[-1])] :] = "brand of tomorrow"
        assert (renamed == "brand of tomorrow").sum() > 2 * TINY.min_value_count
        past = replace(
            dataset,
            users=dataset.users[:known],
            items=dataset.items[:known],
            ratings=dataset.ratings[:known],
            timestamps=dataset.timestamps[:known],
            attributes={**dataset.attributes, "brand": MultiHot(brands.offsets, renamed)},
        )
        runs = []
        for name, chosen in (("past", past), ("whole", dataset)):
            with open_workshop(tmp_path / name, chosen) as workshop:
                runs.append([learned(workshop.train(moment)) for moment in moments])
        assert runs[0] == runs[1]


def state(workshop: Workshop) -> tuple[Sequence[Version], Sequence[Transform], Sequence[str]]:
    return (
        workshop.registry.versions.all(),
        workshop.registry.versions.transforms(),
        workshop.folders(),
    )


@contextmanager
def unchanged(workshop: Workshop) -> Iterator[None]:
    """Check that neither a row nor a folder comes or goes, whatever is raised."""
    before = state(workshop)
    try:
        yield
    finally:
        assert state(workshop) == before


class TestInterruptions:
    @pytest.mark.parametrize("epoch", [1, TINY.epochs])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
    def test_an_interrupted_fit_leaves_nothing(
        self, workshop: Workshop, error: type[BaseException], epoch: int
    ) -> None:
        def interrupt(report: EpochReport) -> None:
            if report.epoch == epoch:
                raise error

        for until in (0.5, 0.6):
            with pytest.raises(error), unchanged(workshop):
                workshop.train(until, on_epoch=interrupt)
            workshop.train(until)
        assert [v.number for v in workshop.registry.versions.all()] == [0, 1]
        assert len(workshop.folders()) == 2

    @pytest.mark.parametrize(
        ("until", "horizon", "changes", "reason"),
        [
            (0.6, None, {"protocol": "paper"}, "give --horizon"),
            (0.6, None, {"min_value_count": 1000}, "cannot tell items apart"),
        ],
        ids=["paper without a horizon", "no attribute"],
    )
    def test_a_refused_request_leaves_nothing(
        self,
        workshop: Workshop,
        until: float,
        horizon: float | None,
        changes: dict[str, object],
        reason: str,
    ) -> None:
        workshop.train(0.5)
        with pytest.raises(InvalidInput, match=reason), unchanged(workshop):
            workshop.train(until, horizon, config=configured(**changes))

    @pytest.mark.parametrize("parent", [0, 3])
    def test_an_unfit_parent_leaves_nothing(self, workshop: Workshop, parent: int) -> None:
        with pytest.raises(BackcastError, match=f"Version {parent}"), unchanged(workshop):
            workshop.train(0.5, parent=parent)

    def test_a_second_trainer_gets_the_next_number(self, workshop: Workshop) -> None:
        workshop.train(0.5)

        def overtake(report: EpochReport) -> None:
            if report.epoch == TINY.epochs:
                workshop.train(0.6, config=configured(seed=7))

        version = workshop.train(0.6, on_epoch=overtake)
        first = workshop.registry.versions.get(1)
        assert (first.seed, first.parent) == (7, 0)
        assert (version.number, version.seed, version.parent, version.dim) == (2, 1, 0, 10)
        assert version.folder.startswith("versions/v2-")
        assert "number" not in read_json(workshop, version, ABOUT)
        catalog = workshop.registry.deployments.catalog()
        assert sorted(load_chain(catalog, workshop.artifacts, 2)) == [0, 2]
        assert len(workshop.folders()) == 3

    def test_two_first_versions_cannot_be(self, workshop: Workshop) -> None:
        def overtake(report: EpochReport) -> None:
            if report.epoch == 1:
                workshop.train(0.5)

        with pytest.raises(Conflict, match="Version 0 was registered meanwhile"):
            workshop.train(0.5, on_epoch=overtake)
        assert [v.number for v in workshop.registry.versions.all()] == [0]
        assert workshop.folders() == [workshop.registry.versions.get(0).folder]


@contextmanager
def training_process(workshop: Workshop) -> Iterator["subprocess.Popen[str]"]:
    """Run ``backcast train`` for more epochs than anyone waits for, and wait for the first."""
    arguments = ("--data", str(workshop.dataset.folder), "--until", "0.6", "--epochs", "1000000")
    process = subprocess.Popen(
        command("train", *arguments),
        env=environment(workshop.settings.home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert re.match(r"epoch \d+/1000000 loss \d", first), first + process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate()


class TestProcesses:
    def test_an_interrupt_says_so_in_one_line(self, workshop: Workshop) -> None:
        workshop.train(0.5)
        with unchanged(workshop), training_process(workshop) as process:
            process.send_signal(signal.SIGINT)
            output, log = process.communicate(timeout=30)
        assert process.returncode == 130
        assert output == ""
        *lines, last = log.splitlines()
        assert last == "Interrupted: nothing was registered."
        assert all(line.startswith("epoch ") for line in lines), log

    def test_a_kill_leaves_nothing(self, workshop: Workshop) -> None:
        workshop.train(0.5)
        with unchanged(workshop), training_process(workshop) as process:
            process.kill()
            process.wait(timeout=30)
        assert process.returncode == -signal.SIGKILL
        assert workshop.train(0.6).number == 1
