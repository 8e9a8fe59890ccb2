"""The objective against loops over its definition, and what a fit leaves behind."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Module

from backcast.alignment import (
    AlignmentLoss,
    BackwardTransformation,
    LeastSquaresHead,
    alignment_gram,
)
from backcast.errors import InvalidInput
from tests.trainer_support import TINY, ignore_epochs
from trainer.config import Protocol, TrainConfig
from trainer.data.dataset import Dataset, resolve_until
from trainer.features import Vocabulary
from trainer.fitting import (
    EpochReport,
    FitResult,
    JointAlignment,
    OnEpoch,
    Selection,
    WeightAverage,
    bpr_loss,
    fit,
    node_weights,
)
from trainer.graph import Graph
from trainer.model import GraphSAGE, embed
from trainer.sampling import PairSampler
from trainer.split import Split, make_split

pytestmark = pytest.mark.usefixtures("one_thread")

D0, D1, D2 = 3, 8, 10


SINGLE = TINY.model_copy(update={"averaging": False})


class Task:
    """Version 2 on the generated data: a graph, a parent of dimension 8, and a map from it to 3."""

    def __init__(self, dataset: Dataset) -> None:
        until, horizon = resolve_until(dataset, 0.5), resolve_until(dataset, 0.6)
        self.split: Split = make_split(dataset, until, horizon, Protocol.STRICT)
        self.vocabulary = Vocabulary.of(dataset, self.split.items, 5)
        self.graph = Graph.of(
            dataset, self.split.train, self.split.users, self.split.items, self.vocabulary
        )
        assert self.split.selection is not None
        held = self.split.selection
        graph = Graph.of(dataset, held.visible, held.users, held.items, self.vocabulary)
        self.selection = Selection(held, graph)
        self.parent = self.model(D1, seed=11).requires_grad_(False)
        generator = torch.Generator().manual_seed(12)
        self.older = [torch.randn(D0, D1, generator=generator) / math.sqrt(D1), torch.eye(D1)]

    def model(self, width: int = D2, *, layers: int = 2, seed: int = 1) -> GraphSAGE:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return GraphSAGE(width, layers, self.vocabulary.sizes)

    def joint(self, width: int = D2, *, seed: int = 2, bias: bool = False) -> JointAlignment:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformation = BackwardTransformation(width, D1, bias=bias)
        target = torch.cat(embed(self.parent, self.graph))
        return JointAlignment(transformation, AlignmentLoss(alignment_gram(self.older)), target)

    def fit(
        self,
        model: GraphSAGE,
        config: TrainConfig = SINGLE,
        *,
        joint: JointAlignment | None = None,
        select: bool = True,
        on_epoch: OnEpoch = ignore_epochs,
    ) -> FitResult:
        selection = self.selection if select else None
        return fit(
            model,
            self.graph,
            self.split.train,
            config,
            joint=joint,
            selection=selection,
            on_epoch=on_epoch,
        )

    def alignment_error(self, model: GraphSAGE, joint: JointAlignment) -> float:
        """Return the mean over nodes of ‖B(z) − z_parent‖₂."""
        with torch.no_grad():
            mapped = joint.transformation(torch.cat(embed(model, self.graph)))
        return float((mapped - joint.target).norm(dim=1).mean())


@pytest.fixture(scope="module")
def task(dataset: Dataset) -> Task:
    return Task(dataset)


def configured(**changes: object) -> TrainConfig:
    return TrainConfig.model_validate({**SINGLE.model_dump(), **changes})


def state_of(*modules: Module) -> dict[str, Tensor]:
    """Return copies of all weights and buffers, by number of the module and name."""
    return {
        f"{at}.{name}": tensor.clone()
        for at, module in enumerate(modules)
        for name, tensor in module.state_dict().items()
    }


def equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two states are equal bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def naive_bpr(
    users: Tensor, positives: Tensor, negatives: Tensor, *, weight_decay: float
) -> Tensor:
    """Return the BPR loss and its decay of output vectors, pair by pair."""
    total = users.new_zeros(())
    for u, p, n in zip(users, positives, negatives, strict=True):
        score = torch.dot(u, n) - torch.dot(u, p)
        decay = 0.5 * (torch.dot(u, u) + torch.dot(p, p) + torch.dot(n, n))
        total = total + torch.log1p(torch.exp(score)) + weight_decay * decay
    return total / len(users)


def naive_alignment(mapped: Tensor, target: Tensor, older: Sequence[Tensor]) -> Tensor:
    """Return (1/k) Σ_j of the mean over nodes and dimensions of (W_{k-1}^j δ)²."""
    total = mapped.new_zeros(())
    for weight in older:
        total = total + ((mapped - target) @ weight.T).square().mean()
    return total / len(older)


NODES = 7
row_lists = st.lists(st.tuples(*[st.integers(0, NODES - 1)] * 3), min_size=1, max_size=12)
"""Numbers of user, positive and negative; some nodes several times, some never."""


def rows_of(pairs: Sequence[tuple[int, int, int]]) -> list[Tensor]:
    return list(torch.tensor(pairs).T)


@given(row_lists)
def test_node_weights_are_how_often_a_node_is_met_over_the_pairs(
    pairs: Sequence[tuple[int, int, int]],
) -> None:
    counts = [0.0] * NODES
    for node in chain.from_iterable(pairs):
        counts[node] += 1 / len(pairs)
    weights = node_weights(rows_of(pairs), NODES)
    assert weights.dtype is torch.float32
    assert weights.tolist() == pytest.approx(counts)


@given(row_lists, st.sampled_from([0.0, 0.01, 2.0]), st.integers(0, 2**31))
def test_bpr_is_that_of_a_loop(
    pairs: Sequence[tuple[int, int, int]], weight_decay: float, seed: int
) -> None:
    z = vectors(NODES, 4, seed=seed).requires_grad_()
    rows = rows_of(pairs)
    weights = node_weights(rows, NODES).double()  # shares are float32: 1/3 is not exact
    found = bpr_loss(z, *rows, weights=weights, weight_decay=weight_decay)
    expected = naive_bpr(*(z[row] for row in rows), weight_decay=weight_decay)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(found, z), torch.autograd.grad(expected, z), rtol=1e-6, atol=1e-7
    )


@given(row_lists, st.integers(0, 2**31))
def test_alignment_by_node_is_that_of_the_pairs_parts_added_up(
    pairs: Sequence[tuple[int, int, int]], seed: int
) -> None:
    mapped = vectors(NODES, 4, seed=seed).requires_grad_()
    target, older = vectors(NODES, 4, seed=seed + 1), [vectors(2, 4, seed=3), torch.eye(4).double()]
    rows = rows_of(pairs)
    loss = AlignmentLoss(torch.eye(4))
    loss.gram = alignment_gram(older)
    found = loss(mapped, target, node_weights(rows, NODES).double())
    expected = mapped.new_zeros(())
    for row in rows:
        expected = expected + naive_alignment(mapped[row], target[row], older)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(
        torch.autograd.grad(found, mapped),
        torch.autograd.grad(expected, mapped),
        rtol=1e-6,
        atol=1e-7,
    )


def vectors(nodes: int, dim: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(nodes, dim, generator=generator, dtype=torch.float64)


def bpr_of(u: float, p: float, n: float, weight_decay: float) -> float:
    """Return the loss of one pair of numbers."""
    z = torch.tensor([[n], [u], [p]], dtype=torch.float64)
    rows = [torch.tensor([at]) for at in (1, 2, 0)]
    weights = node_weights(rows, 3).double()
    return bpr_loss(z, *rows, weights=weights, weight_decay=weight_decay).item()


def test_bpr_by_hand() -> None:
    # u·n − u·p = 2 − 1; ½(1 + 1 + 4) = 3
    expected = math.log(1 + math.e) + 0.01 * 3
    assert bpr_of(1.0, 1.0, 2.0, weight_decay=0.01) == pytest.approx(expected, rel=1e-14)


def test_bpr_of_large_scores_is_finite() -> None:
    assert bpr_of(100.0, -100.0, 100.0, weight_decay=0.0) == 20_000.0


def one_step(task: Task, joint: JointAlignment | None, config: TrainConfig) -> tuple[Tensor, ...]:
    """Return intended loss, alignment loss and the gradients of their sum, written out.

    The model is that which ``task.model()`` gives, before its first step.
    """
    model = task.model().train()
    generator = torch.Generator().manual_seed(config.seed)
    (batch,) = PairSampler(task.split.train, task.graph.items, generator).epoch(1 << 20)
    z = model(task.graph)  # training mode: on batch statistics
    users, items = z[: task.graph.users], z[task.graph.users :]
    parts = users[batch.users], items[batch.positives], items[batch.negatives]
    intended = naive_bpr(*parts, weight_decay=config.weight_decay)
    alignment = z.new_zeros(())
    weights: list[Tensor] = list(model.parameters())
    if joint is not None:
        weights.extend(joint.transformation.parameters())
        target_users = joint.target[: task.graph.users]
        target_items = joint.target[task.graph.users :]
        targets = (
            target_users[batch.users],
            target_items[batch.positives],
            target_items[batch.negatives],
        )
        for part, target in zip(parts, targets, strict=True):
            mapped = joint.transformation(part)
            alignment = alignment + naive_alignment(mapped, target, task.older)
    loss = intended + (config.alignment_weight or 0.0) * alignment
    return intended.detach(), alignment.detach(), *torch.autograd.grad(loss, weights)


@pytest.mark.parametrize("bias", [False, True], ids=["linear", "affine"])
def test_a_step_minimises_the_joint_objective(task: Task, bias: bool) -> None:
    config = configured(epochs=1, batch_size=1 << 20, alignment_weight=5.0)
    joint, model, reports = task.joint(bias=bias), task.model(), list[EpochReport]()
    intended, alignment, *gradients = one_step(task, task.joint(bias=bias), config)

    task.fit(model, config, joint=joint, on_epoch=reports.append)
    assert reports[0].loss == pytest.approx(float(intended + 5.0 * alignment), rel=1e-5)
    assert reports[0].alignment == pytest.approx(float(alignment), rel=1e-5)
    left = [p.grad for p in (*model.parameters(), *joint.transformation.parameters())]
    largest = max(float(g.abs().max()) for g in gradients)
    for found, expected in zip(left, gradients, strict=True):
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * largest)


def test_a_step_without_a_parent_minimises_the_intended_loss_alone(task: Task) -> None:
    config = configured(epochs=1, batch_size=1 << 20)
    intended, alignment, *_ = one_step(task, None, config)
    assert alignment == 0
    reports: list[EpochReport] = []
    task.fit(task.model(), config, on_epoch=reports.append)
    assert reports[0].loss == pytest.approx(float(intended), rel=1e-5)
    assert reports[0].alignment is None


def test_a_step_is_adams_with_the_learning_rate_for_model_and_map(task: Task) -> None:
    # The first step of Adam moves each weight by the learning rate, against the gradient's sign.
    config = configured(epochs=1, batch_size=1 << 20, learning_rate=0.003)
    joint, model = task.joint(), task.model()
    (weight,) = joint.transformation.parameters()
    before = [weight.detach().clone(), model.user.detach().clone()]
    task.fit(model, config, joint=joint)
    for found, old in zip((weight, model.user), before, strict=True):
        assert found.grad is not None
        step = -0.003 * found.grad.sign()
        torch.testing.assert_close(found.detach() - old, step, rtol=0.02, atol=0)


def test_adam_remembers_squared_gradients_as_long_as_told(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.optim.Optimizer] = []

    class Recording(torch.optim.Adam):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(torch.optim, "Adam", Recording)
    task.fit(task.model(), configured(epochs=1, adam_beta2=0.7), joint=task.joint())
    assert [group["betas"] for adam in made for group in adam.param_groups] == [(0.9, 0.7)] * 2


def test_a_fit_leaves_the_average_of_the_weights_along_the_way(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    way: list[list[Tensor]] = []

    class Recording(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            done = super().step(closure)
            way.append([p.detach().clone() for g in self.param_groups for p in g["params"]])
            return done

    monkeypatch.setattr(torch.optim, "Adam", Recording)
    config = configured(epochs=4, averaging=True)
    joint, model = task.joint(), task.model()
    began = [[p.detach().clone() for p in m.parameters()] for m in (model, joint.transformation)]
    task.fit(model, config, joint=joint, select=False)
    for module, start, steps in zip(
        (model, joint.transformation), began, (way[0::2], way[1::2]), strict=True
    ):
        for at, left in enumerate(module.parameters()):
            average = start[at].double()
            for t, weights in enumerate(steps, start=1):
                share = 10 / (t + 9)
                average = (1 - share) * average + share * weights[at].double()
            torch.testing.assert_close(left.detach().double(), average, rtol=1e-4, atol=1e-6)
            assert not torch.equal(left, steps[-1][at])


@pytest.mark.parametrize("select", [False, True])
def test_the_average_is_normalised_by_the_training_graph(task: Task, select: bool) -> None:
    model = task.model()
    task.fit(model, configured(averaging=True), select=select)
    with torch.no_grad():
        served = model.eval()(task.graph)
        batch = model.train()(task.graph)
    # All nodes make up the batch; but its variance is over N nodes, and the kept one over N - 1.
    torch.testing.assert_close(served, batch, rtol=0.01, atol=0.005)
    assert all(norm.momentum == 0.1 for _, norm in model.stack)


def test_what_is_selected_and_left_is_the_average(task: Task) -> None:
    model, joint = task.model(), task.joint()
    kept: dict[int, dict[str, Tensor]] = {}

    def on_epoch(report: EpochReport) -> None:
        assert (report.recall is None) is (report.epoch % 2 == 1)
        if report.recall is not None:
            kept[report.epoch] = state_of(*report.kept)
            assert report.recall == task.selection.recall(cast("GraphSAGE", report.kept[0]))
            assert not equal(kept[report.epoch], state_of(model, joint.transformation))

    config = configured(epochs=6, averaging=True)
    result = task.fit(model, config, joint=joint, on_epoch=on_epoch)
    assert equal(state_of(model, joint.transformation), kept[result.epoch])
    assert result.recall == task.selection.recall(model)


def test_an_average_shares_what_is_not_trained(task: Task) -> None:
    head = LeastSquaresHead(task.joint().target)
    model = task.model()
    average = WeightAverage(nn.ModuleList([model, head]))
    assert average.modules[1].target is head.target
    assert all(
        a is not b for a, b in zip(model.parameters(), average.modules.parameters(), strict=True)
    )


def test_a_transformation_without_weights_is_aligned_all_the_same(task: Task) -> None:
    class First(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return z[..., :D1]

    joint = replace(task.joint(), transformation=First())
    model, alone = task.model(), task.model()
    config = configured(epochs=80)
    task.fit(model, config, joint=joint)
    task.fit(alone, config)
    assert task.alignment_error(model, joint) < 0.5 * task.alignment_error(alone, joint)


def test_parent_and_older_maps_stay_as_they_are(task: Task) -> None:
    joint, frozen = task.joint(), state_of(task.parent)
    assert isinstance(joint.loss, AlignmentLoss)
    target, gram = joint.target.clone(), joint.loss.gram.clone()
    older = [weight.clone() for weight in task.older]
    before = state_of(joint.transformation)
    task.fit(task.model(), joint=joint)

    assert equal(state_of(task.parent), frozen)
    assert torch.equal(joint.target, target)
    assert torch.equal(joint.loss.gram, gram)
    assert all(torch.equal(a, b) for a, b in zip(task.older, older, strict=True))
    assert [p.grad for p in task.parent.parameters()] == [None] * len(
        list(task.parent.parameters())
    )
    assert (joint.target.grad, joint.loss.gram.grad) == (None, None)
    assert not equal(state_of(joint.transformation), before)


def test_the_same_seed_gives_the_same_weights(task: Task) -> None:
    states = []
    for sampler_seed, model_seed, noise in ((1, 1, 0), (1, 1, 1), (2, 1, 0), (1, 2, 0)):
        torch.manual_seed(noise)  # what is drawn elsewhere must not matter
        model, joint = task.model(seed=model_seed), task.joint()
        task.fit(model, configured(epochs=3, seed=sampler_seed), joint=joint)
        states.append(state_of(model, joint.transformation))
    first, same, *others = states
    assert equal(first, same)
    assert not any(equal(first, other) for other in others)


def test_the_global_generator_is_left_alone(task: Task) -> None:
    torch.manual_seed(2024)
    before = torch.get_rng_state()
    task.fit(task.model(), joint=task.joint())
    assert torch.equal(torch.get_rng_state(), before)


class History:
    """Every report, and the weights at that moment."""

    def __init__(self, *modules: Module) -> None:
        self._modules = modules
        self.reports: list[EpochReport] = []
        self.states: list[dict[str, Tensor]] = []

    def __call__(self, report: EpochReport) -> None:
        self.reports.append(report)
        self.states.append(state_of(*self._modules))

    @property
    def recalls(self) -> dict[int, float]:
        """Recall by epoch, where it was measured."""
        return {r.epoch: r.recall for r in self.reports if r.recall is not None}


STEEP = {"epochs": 12, "learning_rate": 0.3, "adam_beta2": 0.999, "evaluate_every": 1}
"""Learns so fast that the best epoch is not the last."""


def test_the_best_epoch_is_left_in_the_model(task: Task) -> None:
    model = task.model()
    history = History(model)
    result = task.fit(model, configured(**STEEP), on_epoch=history)
    best = max(history.recalls, key=history.recalls.__getitem__)
    assert best < 12, "a fit that peaks at its end shows nothing"
    assert (result.epoch, result.recall) == (best, history.recalls[best])
    assert equal(state_of(model), history.states[best - 1])
    assert not equal(state_of(model), history.states[-1])
    assert task.selection.recall(model) == result.recall
    for report in history.reports:
        so_far = [recall for epoch, recall in history.recalls.items() if epoch <= report.epoch]
        assert report.best_recall == max(so_far)


def test_a_joint_fit_selects_no_epoch_before_the_first_allowed(task: Task) -> None:
    model, joint = task.model(), task.joint()
    history = History(model, joint.transformation)
    steep = configured(**STEEP, first_selected_epoch=5)
    result = task.fit(model, steep, joint=joint, on_epoch=history)
    allowed = {epoch: recall for epoch, recall in history.recalls.items() if epoch >= 5}
    best = max(allowed, key=allowed.__getitem__)
    assert best < 12, "a fit that peaks at its end shows nothing"
    assert (result.epoch, result.recall) == (best, allowed[best])
    assert equal(state_of(model, joint.transformation), history.states[best - 1])
    assert [r.best_recall for r in history.reports[:4]] == [None] * 4


def test_half_of_the_epochs_may_be_selected_at_the_least(task: Task) -> None:
    joint = task.joint()
    config = configured(**STEEP, first_selected_epoch=50)
    history = History()
    result = task.fit(task.model(), config, joint=joint, on_epoch=history)
    assert [r.best_recall is None for r in history.reports] == [True] * 5 + [False] * 7
    assert result.epoch >= 6


@pytest.mark.parametrize(
    ("epochs", "every", "evaluated"),
    [(6, 2, [2, 4, 6]), (7, 3, [3, 6, 7]), (2, 10, [2]), (3, 1, [1, 2, 3])],
)
def test_recall_is_measured_now_and_then_and_at_the_end(
    task: Task, epochs: int, every: int, evaluated: list[int]
) -> None:
    history = History()
    config = configured(epochs=epochs, evaluate_every=every, batch_size=1 << 20)
    task.fit(task.model(), config, on_epoch=history)
    assert list(history.recalls) == evaluated
    assert [r.epoch for r in history.reports] == list(range(1, epochs + 1))
    assert {r.epochs for r in history.reports} == {epochs}


def test_an_average_that_has_not_settled_is_not_selected(task: Task) -> None:
    history = History()
    task.fit(task.model(), configured(**STEEP, averaging=True), on_epoch=history)
    assert [r.best_recall is None for r in history.reports] == [True] * 8 + [False] * 4


@pytest.mark.parametrize("patience", [1, 2])
def test_a_fit_ends_when_patience_does(task: Task, patience: int) -> None:
    history, whole = History(), History()
    task.fit(task.model(), configured(**STEEP), on_epoch=whole)
    steep = configured(**STEEP, patience=patience)
    result = task.fit(task.model(), steep, on_epoch=history)
    ended = history.reports[-1].epoch
    assert ended < whole.reports[-1].epoch, "where it goes on to the end, nothing is shown"
    assert ended - result.epoch == patience
    assert history.recalls == {e: r for e, r in whole.recalls.items() if e <= ended}
    for epoch in range(1, ended):
        best = max(range(1, epoch + 1), key=lambda e: history.recalls[e])
        assert epoch - best < patience


def test_patience_ends_with_an_evaluation_alone(task: Task) -> None:
    history = History()
    config = configured(**{**STEEP, "evaluate_every": 3}, patience=1)
    result = task.fit(task.model(), config, on_epoch=history)
    assert history.reports[-1].epoch == result.epoch + 3
    unseen = History()
    task.fit(task.model(), configured(**STEEP, patience=1), select=False, on_epoch=unseen)
    assert len(unseen.reports) == 12


def test_a_diverged_fit_is_an_error_and_not_a_model(task: Task) -> None:
    with pytest.raises(InvalidInput, match="Training diverged in epoch"):
        task.fit(task.model(), configured(learning_rate=1e30, epochs=20))


def test_without_a_selection_the_last_epoch_stays(task: Task) -> None:
    model = task.model()
    history = History(model)
    result = task.fit(model, configured(**STEEP), select=False, on_epoch=history)
    assert (result.epoch, result.recall) == (12, None)
    assert equal(state_of(model), history.states[-1])
    assert history.recalls == {}


def test_measuring_changes_nothing_of_the_training(task: Task) -> None:
    states = []
    for every in (1, 5):
        model = task.model()
        history = History(model)
        task.fit(model, configured(epochs=5, evaluate_every=every), on_epoch=history)
        states.append(history.states[-1])
    assert equal(*states)


def test_losses_are_means_over_the_batches(task: Task) -> None:
    # A learning rate next to zero leaves the model as it is; only BatchNorm's statistics move.
    joint = task.joint()
    model = task.model()
    config = configured(epochs=1, batch_size=600, learning_rate=1e-12, weight_decay=0.5)
    history = History()
    task.fit(copy.deepcopy(model), config, joint=joint, on_epoch=history)

    sampler = PairSampler(
        task.split.train, task.graph.items, torch.Generator().manual_seed(config.seed)
    )
    losses, alignments = [], []
    with torch.no_grad():
        z = model.train()(task.graph)
        for batch in sampler.epoch(600):
            rows = (
                batch.users,
                task.graph.users + batch.positives,
                task.graph.users + batch.negatives,
            )
            mapped = [(joint.transformation(z[row]), joint.target[row]) for row in rows]
            alignment = sum(float(naive_alignment(*pair, task.older)) for pair in mapped)
            intended = float(naive_bpr(*(z[row] for row in rows), weight_decay=0.5))
            losses.append(intended + 16.0 * alignment)
            alignments.append(alignment)
    assert len(losses) == 4
    assert history.reports[0].loss == pytest.approx(sum(losses) / 4, rel=1e-4)
    assert history.reports[0].alignment == pytest.approx(sum(alignments) / 4, rel=1e-4)


def test_alignment_brings_the_map_close_to_the_parent(task: Task) -> None:
    errors = {}
    for weight in (0.0, 16.0):
        model, joint = task.model(), task.joint()
        untrained = task.alignment_error(model, joint)
        config = configured(epochs=40, alignment_weight=weight)
        task.fit(model, config, joint=joint)
        errors[weight] = task.alignment_error(model, joint)
    scale = float(task.joint().target.norm(dim=1).mean())
    assert errors[16.0] < 0.25 * scale
    assert errors[16.0] < 0.25 * min(errors[0.0], untrained)


def test_the_intended_task_is_learned(task: Task) -> None:
    model = task.model()
    untrained = task.selection.recall(model)
    history = History()
    result = task.fit(model, configured(epochs=30), on_epoch=history)
    assert result.recall is not None
    assert result.recall > untrained + 0.1
    assert history.reports[-1].loss < 0.8 * history.reports[0].loss
