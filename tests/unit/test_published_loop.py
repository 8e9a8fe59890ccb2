"""The published loop, restated, and the trainer compute the same: loss, gradients and Recall."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backcast.alignment import AlignmentLoss, alignment_gram
from benchmarks.problems import Problem
from benchmarks.published_loop import (
    Alignment,
    Evaluator,
    GraphData,
    Pairs,
    Progress,
    PublishedModel,
    batch_loss,
    train,
)
from tests.trainer_support import edges_of, ignore_epochs, pairs_of, synthetic, threads
from trainer.config import Protocol, TrainConfig
from trainer.data.dataset import Dataset
from trainer.fitting import EpochReport, JointAlignment, fit
from trainer.model import GraphSAGE, embed
from trainer.ranking import recall_at_k
from trainer.sampling import Batch, PairSampler
from trainer.split import Edges, Holdout

CONFIG = TrainConfig(
    widths=(6, 8, 10, 12),
    layers=(2, 2, 2, 3),  # one layer gives items of equal attributes equal vectors, and ties
    epochs=1,
    batch_size=1 << 20,
    learning_rate=0.003,
    adam_beta2=0.999,
    unit_scores=False,
    protocol=Protocol.PAPER,
    evaluate_every=1,
    seed=3,
    device="cpu",
)
VERSIONS = (0, 1, 2, 3)
"""Version 3 has two older maps."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    with threads(1):
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return synthetic(tmp_path_factory.mktemp("data") / "synthetic")


class Twins:
    """The trainer's model and map, and the published loop's with the same weights."""

    def __init__(self, dataset: Dataset, version: int, **changes: object) -> None:
        config = TrainConfig.model_validate({**CONFIG.model_dump(), **changes})
        self.problem = Problem(dataset, config, version)
        self.config = config
        self.model, self.joint = self.problem.model(), self.problem.joint()
        self.data = self.problem.published_data()
        self.twin = self.problem.published_model()
        self.alignment = self.problem.published_alignment()
        self.copy()

    def copy(self) -> None:
        """Give the published loop the trainer's weights."""
        state = dict(self.model.state_dict())
        state["user.weight"] = state.pop("user")[None]
        self.twin.load_state_dict(state)
        if self.joint is not None and self.alignment is not None:
            weight = {"weight": map_of(self.joint)}
            self.alignment.transformation.load_state_dict(weight)

    def fit(self) -> list[EpochReport]:
        """Train the trainer's model."""
        reports: list[EpochReport] = []
        fit(
            self.model,
            self.problem.graph(),
            self.problem.split.train,
            self.config,
            joint=self.joint,
            selection=None,
            on_epoch=reports.append,
        )
        return reports

    def batches(self) -> list[Batch]:
        """Return the batches that ``fit`` trains on, epoch by epoch."""
        generator = torch.Generator().manual_seed(self.config.seed)
        sampler = PairSampler(self.problem.split.train, self.problem.split.items, generator)
        epochs = range(self.config.epochs)
        return [batch for _ in epochs for batch in sampler.epoch(self.config.batch_size)]

    def published_loss(self, batch: Batch) -> Tensor:
        """Return the published loop's loss of a batch."""
        return batch_loss(
            self.twin.train(),
            self.data,
            (batch.users, batch.positives, batch.negatives),
            weight_decay=self.config.weight_decay,
            alignment=self.alignment,
        )

    def gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield, by name, what the trainer and what the published loop left."""
        ours = {"user.weight" if n == "user" else n: p for n, p in self.model.named_parameters()}
        theirs = dict(self.twin.named_parameters())
        if self.joint is not None and self.alignment is not None:
            ours["B_k"] = map_of(self.joint)
            theirs["B_k"] = self.alignment.transformation.get_parameter("weight")
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            found, expected = weight.grad, theirs[name].grad
            assert found is not None
            assert expected is not None
            yield name, found.reshape(expected.shape), expected


def map_of(joint: JointAlignment) -> nn.Parameter:
    """Return W_k."""
    (weight,) = joint.transformation.parameters()
    return weight


@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_has_the_published_loss_and_gradients(dataset: Dataset, version: int) -> None:
    twins = Twins(dataset, version)
    (batch,) = twins.batches()
    expected = twins.published_loss(batch)
    torch.autograd.backward(expected)
    (report,) = twins.fit()
    assert report.loss == pytest.approx(expected.item(), rel=1e-5)
    found = list(twins.gradients())
    largest = max(float(theirs.abs().max()) for _, _, theirs in found)
    for name, ours, theirs in found:
        assert float(theirs.abs().max()) > 0, name
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-6 * largest, msg=name)


@pytest.mark.parametrize("version", [0, 3])
def test_training_goes_the_published_way(dataset: Dataset, version: int) -> None:
    twins = Twins(dataset, version, epochs=10)
    modules = [twins.twin, *([twins.alignment.transformation] if twins.alignment else [])]
    optimizers = [torch.optim.Adam(m.parameters(), lr=twins.config.learning_rate) for m in modules]
    expected = []
    for batch in twins.batches():
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = twins.published_loss(batch)
        torch.autograd.backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        expected.append(loss.item())
    found = [report.loss for report in twins.fit()]
    assert found[-1] < 0.98 * found[0]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("older", [0, 1, 2, 3])
def test_the_gram_matrix_gives_the_published_alignment_loss(older: int) -> None:
    generator = torch.Generator().manual_seed(older)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    widths = [3, 5, 4, 6][-older - 1 :]
    maps = [randn(a, b) for a, b in itertools.pairwise(widths)][::-1]
    z_users, z_items = randn(7, 8).requires_grad_(), randn(9, 8).requires_grad_()
    target_users, target_items = randn(7, 6), randn(9, 6)
    linear = nn.Linear(8, 6, bias=False, dtype=torch.float64)
    batch = (torch.tensor([0, 3, 3]), torch.tensor([8, 1, 0]), torch.tensor([2, 2, 5]))
    theirs = Alignment(target_users, target_items, linear, maps, 1.0).loss(z_users, z_items, batch)

    composed = [torch.eye(6, dtype=torch.float64)]
    for weight in maps:
        composed.append(weight @ composed[-1])
    assert [len(w) for w in composed] == widths[::-1]
    loss = AlignmentLoss(alignment_gram(composed)).double()
    loss.gram.copy_(alignment_gram(composed))
    pairs = ((z_users, target_users), (z_items, target_items), (z_items, target_items))
    ours = torch.stack(
        [loss(linear(z[row]), to[row]) for (z, to), row in zip(pairs, batch, strict=True)]
    ).sum()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    weights = [z_users, z_items, linear.weight]
    torch.testing.assert_close(
        torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights)
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_vectors_and_recall_of_a_model_are_the_published(dataset: Dataset, version: int) -> None:
    twins = Twins(dataset, version, epochs=3)
    twins.fit()
    twins.copy()
    with torch.no_grad():
        theirs = twins.twin.eval()(twins.data)
    ours = embed(twins.model, twins.problem.graph())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    selection = twins.problem.selection()
    found = Evaluator(selection.holdout).evaluate(twins.twin, twins.data)
    assert 0.05 < found < 1.0
    assert found == pytest.approx(selection.recall(twins.model), rel=1e-9)


@pytest.mark.parametrize("k", [1, 5, 50])
def test_recall_is_the_published_on_scores_that_do_not_saturate(dataset: Dataset, k: int) -> None:
    holdout, users, items = random_vectors(dataset, scale=0.3)
    found = Evaluator(holdout).recall(users, items, k)
    assert 0 < found < 1
    assert found == pytest.approx(recall_at_k(users, items, holdout, k), rel=1e-12)


def test_the_published_sigmoid_makes_ties_of_large_scores(dataset: Dataset) -> None:
    holdout, users, items = random_vectors(dataset, scale=100.0)
    published, raw = Evaluator(holdout).recall(users, items), recall_at_k(users, items, holdout)
    assert published != pytest.approx(raw, abs=1e-3)


def random_vectors(dataset: Dataset, scale: float) -> tuple[Holdout, Tensor, Tensor]:
    """Return the holdout of version 1, and vectors for it whose scores are about ``scale``."""
    holdout = Problem(dataset, CONFIG, 1).split.test
    assert holdout is not None
    generator = torch.Generator().manual_seed(0)
    users = torch.randn(holdout.users, 8, generator=generator)
    items = torch.randn(holdout.items, 8, generator=generator)
    return holdout, users, scale / 8**0.5 * items


ITEMS = 30


def skewed() -> Edges:
    """Return edges of 20 users with 1, 2, .., 20 of the 30 items."""
    rng = np.random.default_rng(0)
    return edges_of(
        *((user, int(item)) for user in range(20) for item in rng.permutation(ITEMS)[: user + 1])
    )


def epochs(edges: Edges, count: int, seed: int = 0) -> Tensor:
    """Return the users, positives and negatives of some epochs, fetched one by one: (3, n)."""
    users, items = torch.from_numpy(edges.users), torch.from_numpy(edges.items)
    pairs = Pairs(GraphData(users, items, 20, ITEMS, ()), seed)
    drawn = []
    for _ in range(count):
        pairs.draw()
        drawn += [torch.stack(pairs[at]) for at in range(len(pairs))]
    return torch.stack(drawn, dim=1)


def assert_uniform(counts: Tensor) -> None:
    """Compare counts by chi-square, with a bound of five sigma."""
    mean = counts.double().mean()
    statistic, freedom = float(((counts - mean) ** 2 / mean).sum()), len(counts) - 1
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_the_published_sampler_draws_users_uniformly_and_no_positive_as_negative() -> None:
    edges = skewed()
    users, positives, negatives = epochs(edges, 60)
    known = set(pairs_of(edges))
    assert len(users) == 60 * len(edges)
    assert_uniform(torch.bincount(users, minlength=20))
    assert set(zip(users.tolist(), positives.tolist(), strict=True)) == known
    assert not known & set(zip(users.tolist(), negatives.tolist(), strict=True))


def test_positives_and_negatives_of_a_user_are_uniform() -> None:
    edges = skewed()
    users, positives, negatives = epochs(edges, 60)
    of_last = users == 19
    for drawn, different in ((positives, 20), (negatives, 10)):
        counts = torch.bincount(drawn[of_last], minlength=ITEMS)
        assert int((counts > 0).sum()) == different
        assert_uniform(counts[counts > 0])


def test_the_published_pairs_follow_from_the_seed() -> None:
    torch.manual_seed(1)
    first = epochs(skewed(), 2, seed=5)
    torch.manual_seed(2)
    assert torch.equal(first, epochs(skewed(), 2, seed=5))
    assert not torch.equal(first, epochs(skewed(), 2, seed=6))


def test_the_published_loop_leaves_its_best_epoch(dataset: Dataset) -> None:
    twins, progress = Twins(dataset, 3), list[Progress]()
    holdout = twins.problem.selection().holdout
    best = train(
        twins.twin,
        twins.data,
        holdout,
        epochs=12,
        batch_size=512,
        learning_rate=0.03,
        evaluate_every=3,
        alignment=twins.alignment,
        first_selected=4,
        on_epoch=progress.append,
    )
    recalls = {p.epoch: p.recall for p in progress if p.recall is not None}
    assert list(recalls) == [3, 6, 9, 12]
    assert best == max(recall for epoch, recall in recalls.items() if epoch >= 4)
    assert Evaluator(holdout).evaluate(twins.twin, twins.data) == best
    assert progress[-1].loss < progress[0].loss


def test_the_published_loop_learns_what_the_trainer_learns(dataset: Dataset) -> None:
    # Different pairs from the same distribution: the same Recall but for chance.
    changes = {"epochs": 20, "batch_size": 512, "learning_rate": 0.01}
    twins = Twins(dataset, 0, **changes)
    selection = twins.problem.selection()
    theirs = train(
        twins.twin,
        twins.data,
        selection.holdout,
        epochs=20,
        batch_size=512,
        learning_rate=0.01,
        evaluate_every=1,
    )
    ours = fit(
        twins.model,
        twins.problem.graph(),
        twins.problem.split.train,
        twins.config,
        joint=None,
        selection=selection,
        on_epoch=ignore_epochs,
    ).recall
    assert ours == pytest.approx(theirs, rel=0.1)


def sizes_of(model: GraphSAGE | PublishedModel) -> int:
    """Return how many weights a model has."""
    return sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("version", VERSIONS)
def test_both_models_have_as_many_weights(dataset: Dataset, version: int) -> None:
    twins = Twins(dataset, version)
    assert sizes_of(twins.model) == sizes_of(twins.twin)
