"""The catalog of methods, and what each strategy does by its definition."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from backcast.alignment import LeastSquaresHead
from backcast.closed_form import least_squares, zero_padded_procrustes
from backcast.errors import ConfigError
from backcast.transforms import AffineMap
from tests.trainer_support import TINY, chain_of, make_line, quick_methods, step_of
from trainer.archive import ArchivedModel
from trainer.config import TrainConfig
from trainer.data.dataset import Dataset
from trainer.fitting import EpochReport
from trainer.graph import Graph
from trainer.methods import DEFAULT_METHOD, Made, Method, catalog, make_version, method, methods
from trainer.methods.base import ModelStrategy, Trained, train_alone
from trainer.methods.maps import GradientFitted, JointlyTrained, LeastSquares, Truncated
from trainer.methods.models import (
    FineTuned,
    Frozen,
    Independent,
    Joint,
    JointSolved,
    principal,
)
from trainer.model import GraphSAGE, embed
from trainer.sampling import PairSampler
from trainer.step import Step

pytestmark = pytest.mark.usefixtures("one_thread")

PAPER = {
    "keep-all": "Keep-All",
    "fix-m0": "Fix-M0",
    "finetune-m0": "Finetune-M0",
    "non-bc": "Non-BC",
    "post-lin-sloss": "Post-Lin-SLoss",
    "post-lin-mloss": "Post-Lin-MLoss",
    "joint-notrans": "Joint-NoTrans",
    "joint-lin-sloss": "Joint-Lin-SLoss",
    "bc-aligner": "BC-Aligner",
}
"""In the order of the table."""

NAMES = pytest.mark.parametrize("name", methods())
QUICK = quick_methods()


def configured(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({**TINY.model_dump(), **changes})


STILL = configured(epochs=1, batch_size=1 << 20, learning_rate=1e-12, weight_decay=0.0)
"""Moves no weight: what is reported is of the model that training began with."""


def state_of(model: GraphSAGE) -> Mapping[str, Tensor]:
    return model.state_dict()


def equal(one: GraphSAGE, other: GraphSAGE) -> bool:
    """Return whether two models are equal bit by bit."""
    first, second = state_of(one), state_of(other)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def same_maps(one: Made, other: Made) -> bool:
    """Return whether two versions have the same maps bit by bit."""
    return one.maps.keys() == other.maps.keys() and all(
        _bits(found) == _bits(other.maps[version]) for version, found in one.maps.items()
    )


def _bits(found: AffineMap) -> tuple[bytes, bytes | None]:
    return found.weight.tobytes(), None if found.bias is None else found.bias.tobytes()


@pytest.fixture(scope="module")
def lines(
    dataset: Dataset,
    one_thread: None,  # noqa: ARG001
) -> Mapping[str, Sequence[Made]]:
    """Three versions by each method."""
    return {name: make_line(dataset, chosen) for name, chosen in QUICK.items()}


@pytest.fixture(scope="module")
def first(lines: Mapping[str, Sequence[Made]]) -> Made:
    return lines["bc-aligner"][0]


class TestCatalog:
    def test_names_are_unique_and_places_are_in_order(self) -> None:
        found = list(methods().values())
        assert len({m.title for m in found}) == len({m.name for m in found}) == len(found)
        places = [m.place for m in found]
        assert places == sorted(places)
        assert len(set(places)) == len(places)
        assert [m.name for m in found] == list(methods())
        assert all(m.summary.endswith(".") for m in found)

    def test_modules_do_not_hide_one_anothers_methods(self) -> None:
        # By name the later would silently win.
        declared = [m.name for module in _modules() for m in module]
        assert sorted(declared) == sorted(methods())

    def test_the_nine_of_the_paper_are_there(self) -> None:
        assert {name: m.title for name, m in methods().items() if name in PAPER} == PAPER
        assert [name for name in methods() if name in PAPER] == list(PAPER)
        strategies = {name: (methods()[name].models, methods()[name].maps) for name in PAPER}
        assert strategies == {
            "keep-all": (Independent(), None),
            "fix-m0": (Frozen(), Truncated()),
            "finetune-m0": (FineTuned(), Truncated()),
            "non-bc": (Independent(), Truncated()),
            "post-lin-sloss": (Independent(), GradientFitted("single", 200, 51)),
            "post-lin-mloss": (Independent(), GradientFitted("multi", 200, 51)),
            "joint-notrans": (Joint("single", "truncation"), JointlyTrained()),
            "joint-lin-sloss": (Joint("single", "linear"), JointlyTrained()),
            "bc-aligner": (Joint("multi", "linear"), JointlyTrained()),
        }

    def test_what_keeps_everything_or_trains_nothing_is_not_servable(self) -> None:
        assert [n for n, m in methods().items() if not m.servable] == ["keep-all", "fix-m0"]
        assert method(DEFAULT_METHOD).servable

    def test_an_unknown_name_lists_all(self) -> None:
        with pytest.raises(ConfigError) as raised:
            method("bc-alinger")
        assert raised.value.message == (
            f"Method 'bc-alinger' is unknown; there are {', '.join(methods())}."
        )

    def test_a_method_more_is_one_file(
        self, dataset: Dataset, first: Made, one_file_more: None
    ) -> None:
        added = method("shrunk")
        assert (added.title, added.servable) == ("Shrunk", True)
        names = list(methods())
        assert names.index("bc-aligner") + 1 == names.index("shrunk")
        assert len(names) == len(QUICK) + 1
        made = make_version(added, step_of(dataset, [first], config=STILL))
        assert made.maps[0].weight.tolist() == (0.5 * np.eye(8, 10)).tolist()

    def test_a_file_that_is_gone_is_forgotten(self) -> None:
        with pytest.raises(ConfigError, match="Method 'shrunk' is unknown"):
            method("shrunk")


def _modules() -> Iterator[Sequence[Method]]:
    for name in sorted(sys.modules):
        if name.startswith(f"{catalog.__name__}."):
            yield sys.modules[name].METHODS


MODULE = """
from collections.abc import Mapping
from dataclasses import dataclass

from backcast.closed_form import truncation
from backcast.transforms import AffineMap
from trainer.methods.base import Method, Trained
from trainer.methods.models import Independent
from trainer.step import Step


@dataclass(frozen=True)
class Shrunk:
    def fit(self, step: Step, trained: Trained) -> Mapping[int, AffineMap]:
        whole = truncation(trained.archived.model.width, step.target.shape[1])
        return {step.parent: AffineMap(0.5 * whole.weight)}


METHODS = (Method("shrunk", "Shrunk", 90.5, "Half of the first.", Independent(), Shrunk()),)
"""


@pytest.fixture
def one_file_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a module beside those of the catalog."""
    (tmp_path / "shrunk.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.setattr(catalog, "__path__", [*catalog.__path__, str(tmp_path)])
    methods.cache_clear()
    yield
    sys.modules.pop(f"{catalog.__name__}.shrunk", None)
    if hasattr(catalog, "shrunk"):
        delattr(catalog, "shrunk")
    monkeypatch.undo()
    methods.cache_clear()


class TestEveryMethod:
    @NAMES
    def test_the_first_model_is_the_same_for_all(
        self, lines: Mapping[str, Sequence[Made]], first: Made, name: str
    ) -> None:
        found = lines[name][0]
        assert equal(found.trained.archived.model, first.trained.archived.model)
        assert found.trained.archived.vocabulary == first.trained.archived.vocabulary
        assert found.maps == {}

    @NAMES
    def test_the_same_seed_gives_the_same_versions(
        self, dataset: Dataset, lines: Mapping[str, Sequence[Made]], name: str
    ) -> None:
        torch.manual_seed(7)  # what is drawn elsewhere must not matter
        for one, other in zip(lines[name], make_line(dataset, QUICK[name]), strict=True):
            assert equal(one.trained.archived.model, other.trained.archived.model)
            assert same_maps(one, other)
            assert (one.trained.fit.epoch, one.trained.fit.recall) == (
                other.trained.fit.epoch,
                other.trained.fit.recall,
            )

    @NAMES
    def test_another_seed_gives_other_models(
        self, dataset: Dataset, lines: Mapping[str, Sequence[Made]], name: str
    ) -> None:
        others = make_line(dataset, QUICK[name], 2, config=configured(seed=2))
        for one, other in zip(lines[name], others, strict=False):
            assert not equal(one.trained.archived.model, other.trained.archived.model)

    @NAMES
    def test_models_are_frozen_in_evaluation_mode_and_maps_fit(
        self, lines: Mapping[str, Sequence[Made]], name: str
    ) -> None:
        made = lines[name]
        for number, version in enumerate(made):
            model = version.trained.archived.model
            assert not any(module.training for module in model.modules())
            assert not any(parameter.requires_grad for parameter in model.parameters())
            for older, found in version.maps.items():
                assert (found.rows, found.cols) == (
                    made[older].trained.archived.model.width,
                    model.width,
                )
            if number and methods()[name].maps is not None:
                assert number - 1 in version.maps

    @NAMES
    def test_the_global_generator_is_left_alone(
        self, dataset: Dataset, lines: Mapping[str, Sequence[Made]], name: str
    ) -> None:
        torch.manual_seed(2024)
        before = torch.get_rng_state()
        make_version(QUICK[name], step_of(dataset, lines[name][:2], config=STILL))
        assert torch.equal(torch.get_rng_state(), before)

    @NAMES
    def test_older_models_stay_as_they_are(
        self, dataset: Dataset, lines: Mapping[str, Sequence[Made]], name: str
    ) -> None:
        made = lines[name][:2]
        before = [
            {n: t.clone() for n, t in state_of(m.trained.archived.model).items()} for m in made
        ]
        make_version(QUICK[name], step_of(dataset, made))
        for old, version in zip(before, made, strict=True):
            state = state_of(version.trained.archived.model)
            assert all(torch.equal(old[n], state[n]) for n in state)


STRATEGIES = [
    Independent(),
    Frozen(),
    FineTuned(),
    Joint("single"),
    Joint("multi"),
    Joint("single", "affine"),
    Joint("single", "truncation"),
    JointSolved(),
    JointSolved(all_versions=True),
    JointSolved(grown=True),
    JointSolved(all_versions=True, grown=True),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
class TestWhatAModelDependsOn:
    @staticmethod
    def trained(step: Step, strategy: ModelStrategy) -> GraphSAGE:
        return strategy.train(step).archived.model

    def test_on_lambda_as_it_says(
        self, dataset: Dataset, lines: Mapping[str, Sequence[Made]], strategy: ModelStrategy
    ) -> None:
        made = lines["bc-aligner"][:2]
        one, other = (
            self.trained(step_of(dataset, made, config=configured(alignment_weight=w)), strategy)
            for w in (1.0, 2.0)
        )
        assert equal(one, other) is (strategy.default_lambda is None)

    def test_on_older_maps_by_the_multi_step_loss_alone(
        self, dataset: Dataset, lines: Mapping[str, Sequence[Made]], strategy: ModelStrategy
    ) -> None:
        made = lines["bc-aligner"][:2]
        chain = chain_of(made)
        changed = {**chain, 0: AffineMap(3.0 * chain[0].weight)}
        one, other = (
            self.trained(step_of(dataset, made, chain=c), strategy) for c in (chain, changed)
        )
        by_maps = isinstance(strategy, Joint) and strategy.loss == "multi"
        assert equal(one, other) is not by_maps


def test_all_strategies_of_the_catalog_are_looked_at() -> None:
    assert {m.models for m in methods().values()} <= set(STRATEGIES)


class TestModels:
    def test_a_frozen_model_is_always_the_first(self, lines: Mapping[str, Sequence[Made]]) -> None:
        m0, m1, m2 = (version.trained.archived for version in lines["fix-m0"])
        assert equal(m1.model, m0.model)
        assert equal(m2.model, m0.model)
        assert m2.vocabulary == m0.vocabulary
        assert [v.maps[k].weight.tolist() for k, v in enumerate(lines["fix-m0"][1:])] == [
            np.eye(8).tolist()
        ] * 2

    def test_fine_tuning_goes_on_from_the_parent_for_half_as_long(
        self, dataset: Dataset, first: Made
    ) -> None:
        reports: list[EpochReport] = []
        step = step_of(dataset, [first], config=configured(epochs=7), on_epoch=reports.append)
        tuned = FineTuned().train(step)
        assert [(r.epoch, r.epochs) for r in reports] == [(1, 3), (2, 3), (3, 3)]
        model = tuned.archived.model
        assert (model.width, model.layers) == (TINY.width(0), TINY.depth(0))
        assert tuned.archived.vocabulary == first.trained.archived.vocabulary
        assert not equal(model, first.trained.archived.model)
        still = FineTuned().train(step_of(dataset, [first], config=STILL)).archived.model
        for (name, one), other in zip(
            still.named_parameters(), first.trained.archived.model.parameters(), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9, msg=name)

    def test_independent_models_are_shared_by_their_methods(
        self, lines: Mapping[str, Sequence[Made]]
    ) -> None:
        names = [n for n, m in methods().items() if m.models == Independent()]
        assert len(names) == 8
        for name in names:
            for k in range(3):
                model = lines[name][k].trained.archived.model
                assert equal(model, lines["keep-all"][k].trained.archived.model)

    def test_models_do_not_depend_on_how_their_maps_are_refitted(
        self, lines: Mapping[str, Sequence[Made]]
    ) -> None:
        # The multi-step loss looks at the maps as they were trained, whichever are served.
        trained = lines["bc-aligner"]
        for name in ("bc-aligner-refit", "bc-aligner-affine"):
            for one, other in zip(trained, lines[name], strict=True):
                assert equal(one.trained.archived.model, other.trained.archived.model)
            assert not same_maps(trained[1], lines[name][1])

    @pytest.mark.parametrize("kind", ["single", "multi"])
    @pytest.mark.parametrize("transformation", ["linear", "affine", "truncation"])
    def test_the_alignment_loss_is_that_of_the_definition(
        self,
        dataset: Dataset,
        lines: Mapping[str, Sequence[Made]],
        kind: str,
        transformation: str,
    ) -> None:
        made, reports = lines["bc-aligner"][:2], list[EpochReport]()
        step = step_of(dataset, made, config=STILL, on_epoch=reports.append)
        strategy = Joint(kind, transformation)  # type: ignore[arg-type]
        trained = strategy.train(step)
        assert trained.joint_map is not None
        weight, bias = trained.joint_map.weight, trained.joint_map.bias
        assert (bias is not None) is (transformation == "affine")
        if transformation == "truncation":
            assert weight.tolist() == np.eye(10, 12).tolist()

        z, target = training_vectors(step, trained), step.target.double().numpy()
        delta = z @ weight.T - target + (0.0 if bias is None else bias)
        to_0 = made[1].maps[0].weight
        squares = (delta**2).mean(axis=1)
        if kind == "multi":
            squares = (squares + ((delta @ to_0.T) ** 2).mean(axis=1)) / 2
        generator = torch.Generator().manual_seed(STILL.seed)
        (batch,) = PairSampler(step.split.train, step.split.items, generator).epoch(1 << 20)
        users = step.split.users
        rows = batch.users, users + batch.positives, users + batch.negatives
        expected = sum(squares[row.numpy()].mean() for row in rows)
        assert reports[0].alignment == pytest.approx(expected, rel=1e-4)

    @pytest.mark.parametrize("all_versions", [False, True])
    def test_a_solved_map_counts_the_variance_that_is_left(
        self, dataset: Dataset, lines: Mapping[str, Sequence[Made]], all_versions: bool
    ) -> None:
        made, reports = lines["solved-direct"][:2], list[EpochReport]()
        step = step_of(dataset, made, config=STILL, on_epoch=reports.append)
        trained = JointSolved(all_versions).train(step)
        assert trained.joint_map is None
        z, left, users = training_vectors(step, trained), [], step.split.users
        kinds = [slice(None, users), slice(users, None)]
        parents = step.target.double().numpy()
        weights = np.concatenate([[0.5 / scatter(parents[kind])] * len(z[kind]) for kind in kinds])
        for version in (0, 1) if all_versions else (1,):
            older = step.older(version)
            assert older is not None
            y = older.double().numpy()
            error = least_squares(z, y, bias=True, ridge=1e-4, weights=weights)(z) - y
            variance = sum(scatter(y[kind]) * weights[kind][0] for kind in kinds)
            left.append((weights @ error**2).sum() / variance)
            if version == 1:
                assert variance == pytest.approx(1.0)
        assert reports[0].alignment == pytest.approx(np.mean(left), rel=1e-3)

    @pytest.mark.parametrize("grown", [False, True])
    def test_a_grown_model_begins_near_its_parent(
        self, dataset: Dataset, lines: Mapping[str, Sequence[Made]], grown: bool
    ) -> None:
        step = step_of(dataset, lines["solved-direct"][:2], config=STILL)
        trained = JointSolved(grown=grown).train(step)
        z, target = training_vectors(step, trained), step.target.double().numpy()
        kept = np.corrcoef(z[:, : target.shape[1]].ravel(), target.ravel())[0, 1]
        assert bool(0.99 > kept > 0.7) is grown

    @pytest.mark.parametrize("loss", ["single", "multi"])
    def test_alignment_leaves_less_error_than_none(
        self, dataset: Dataset, lines: Mapping[str, Sequence[Made]], loss: str
    ) -> None:
        made, errors = lines["bc-aligner"][:2], []
        for strategy in (Joint(loss), Independent()):  # type: ignore[arg-type]
            step = step_of(dataset, made, config=configured(epochs=20))
            trained = strategy.train(step)
            found = LeastSquares(bias=True).fit(step, trained)[1]
            errors.append(error_of(found, step, trained))
        assert errors[0] < 0.7 * errors[1]


def scatter(z: NDArray[np.float64]) -> float:
    return float(((z - z.mean(axis=0)) ** 2).sum())


def training_vectors(step: Step, trained: Trained) -> NDArray[np.float64]:
    """Return z_k in training mode, on the statistics of the graph."""
    model = trained.archived.model.train()
    with torch.no_grad():
        z: Tensor = model(step.training_graph(trained.archived.vocabulary))
    model.eval()
    return z.double().numpy()


def known_vectors(step: Step, archived: ArchivedModel) -> NDArray[np.float64]:
    """Return z as served for all that is known at the cut, not for the fitted share alone."""
    known = step.split.known
    assert len(known) > len(step.split.train)
    users, items = int(known.users.max()) + 1, int(known.items.max()) + 1
    graph = Graph.of(step.dataset, known, users, items, archived.vocabulary)
    return torch.cat(embed(archived.model, graph)).double().numpy()


def error_of(found: AffineMap, step: Step, trained: Trained) -> float:
    """Return the mean of the users' and the items' mean squared error to the parent's vectors."""
    z = step.vectors_of(trained.archived).double().numpy()
    error = found(z) - step.target.double().numpy()
    squares, users = (error**2).mean(axis=1), step.split.users
    return float(squares[:users].mean() + squares[users:].mean()) / 2


@pytest.fixture(scope="module")
def step(dataset: Dataset, lines: Mapping[str, Sequence[Made]]) -> Step:
    return step_of(dataset, lines["non-bc"][:2])


@pytest.fixture(scope="module")
def trained(step: Step) -> Trained:
    return train_alone(step)


class TestMaps:
    def test_truncated_are_the_first_coordinates(self, step: Step, trained: Trained) -> None:
        maps = Truncated().fit(step, trained)
        assert list(maps) == [1]
        assert maps[1].weight.tolist() == np.eye(10, 12).tolist()

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("direct", [False, True])
    def test_least_squares_are_over_all_nodes_as_served(
        self, step: Step, trained: Trained, bias: bool, direct: bool
    ) -> None:
        maps = LeastSquares(bias=bias, direct=direct).fit(step, trained)
        assert sorted(maps) == ([0, 1] if direct else [1])
        z = known_vectors(step, trained.archived)
        for version, found in maps.items():
            older = step.load(version)
            assert older is not None
            expected = least_squares(z, known_vectors(step, older), bias=bias, ridge=1e-4)
            assert _bits(found) == _bits(expected)

    def test_there_is_no_direct_map_where_the_model_is_gone(
        self, dataset: Dataset, lines: Mapping[str, Sequence[Made]], trained: Trained
    ) -> None:
        step = step_of(dataset, lines["non-bc"][:2], gone=[0])
        assert list(LeastSquares(direct=True).fit(step, trained)) == [1]

    def test_procrustes_is_the_closed_form(self, step: Step, trained: Trained) -> None:
        maps = QUICK["post-procrustes"].maps
        assert maps is not None
        found = maps.fit(step, trained)
        parent = step.load(1)
        assert parent is not None
        expected = zero_padded_procrustes(
            known_vectors(step, trained.archived), known_vectors(step, parent)
        )
        assert list(found) == [1]
        assert _bits(found[1]) == _bits(expected)

    @pytest.mark.parametrize("loss", ["single", "multi"])
    def test_gradient_descent_goes_towards_the_closed_form(
        self, step: Step, trained: Trained, loss: str
    ) -> None:
        long, short = (
            GradientFitted(loss, epochs, 1).fit(step, trained)[1]  # type: ignore[arg-type]
            for epochs in (150, 5)
        )
        best = error_of(LeastSquares().fit(step, trained)[1], step, trained)
        assert long.bias is None
        # pairs weigh nodes otherwise than the mean over users and items does
        assert 0.98 * best < error_of(long, step, trained) < 2 * best
        assert error_of(short, step, trained) > 1.2 * error_of(long, step, trained)

    def test_the_multi_step_loss_goes_by_the_older_maps(self, step: Step, trained: Trained) -> None:
        single, multi = (
            GradientFitted(loss, 3, 1).fit(step, trained)[1] for loss in ("single", "multi")
        )
        assert not np.array_equal(single.weight, multi.weight)

    def test_the_epoch_with_the_least_error_is_chosen(self, step: Step, trained: Trained) -> None:
        # An older map that weighs one direction alone, and small batches: errors go up and down.
        older = AffineMap(1000.0 * np.sin(np.arange(10.0))[None])
        chain = {1: AffineMap.identity(10), 0: older}
        step = replace(step, chain=chain, config=configured(batch_size=16))
        # A longer fit begins as a shorter one does, so the last of each length are all of them.
        fits = [GradientFitted("multi", n, n).fit(step, trained)[1] for n in range(9, 14)]
        errors = [error_of(found, step, trained) for found in fits]
        for first in range(9, 14):
            allowed = errors[first - 9 :]
            chosen = GradientFitted("multi", 13, first).fit(step, trained)[1]
            assert _bits(chosen) == _bits(fits[errors.index(min(allowed))])
        assert min(errors) < errors[-1], "where the last is the best, nothing is shown"


def test_principal_components_lose_next_to_nothing_of_what_is_to_be_explained() -> None:
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    old = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    y = torch.cat([old, 2.0 * old, old @ torch.randn(3, 5, generator=generator).double()], dim=1)
    weights = torch.rand(200, generator=generator, dtype=torch.float64)
    found = principal(y, weights)
    assert found.shape == (200, 3)

    def unexplained(target: Tensor) -> float:
        error = LeastSquaresHead(target, weights=weights)(z) - target
        return float(weights @ (error**2).sum(dim=1))

    assert unexplained(found) == pytest.approx(unexplained(y), rel=1e-3)
    assert principal(torch.ones(5, 2), torch.ones(5)).shape == (5, 0)
