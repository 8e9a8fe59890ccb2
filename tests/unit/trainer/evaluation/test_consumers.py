"""Consumers against plain PyTorch, one at a time; and that they learn, last and refuse."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from backcast.errors import DimensionMismatch, InvalidInput
from trainer.config import Protocol
from trainer.data.dataset import Dataset, resolve_until
from trainer.evaluation.consumers import (
    PAPER,
    SMALL,
    ConsumerConfig,
    Consumers,
    Vectors,
    train_consumers,
)
from trainer.evaluation.ensemble import Dropout, Member
from trainer.evaluation.tasks import (
    EDGE_RATING,
    ITEM_RATING_AVG,
    ITEM_RATING_STD,
    TASKS,
    USER_ACTIVITY,
    Examples,
    Timeline,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
FAST = ConsumerConfig(
    hidden=(16,), dropout=(0.25,), seeds=(0, 1), epochs=4, batch_size=512, learning_rate=0.01
)
DIM = 6


@pytest.fixture(scope="module")
def timeline(dataset: Dataset) -> Timeline:
    moments = [resolve_until(dataset, f) for f in ("0.4", "0.6", "0.8", "1")]
    return Timeline(dataset, moments, Protocol.STRICT)


def vectors_of(timeline: Timeline, k: int) -> Vectors:
    """Return vectors of everybody, another set for each k."""
    users, items = len(timeline.dataset.user_ids), len(timeline.dataset.item_ids)
    drawn = torch.randn(users + items, DIM, generator=torch.Generator().manual_seed(k))
    return drawn[:users], drawn[users:]


def train(timeline: Timeline, config: ConsumerConfig = FAST, **more: Any) -> Consumers:
    return train_consumers(timeline, 0, lambda k: vectors_of(timeline, k), config, **more)


def naive_auc(scores: Sequence[float], labels: Sequence[bool]) -> float:
    """Return the share of pairs in order, ties as halves."""
    positives = [s for s, label in zip(scores, labels, strict=True) if label]
    negatives = [s for s, label in zip(scores, labels, strict=True) if not label]
    wins = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives]
    return sum(wins) / len(wins)


class OneDropout(nn.Module):
    """Dropout of an ensemble of one, for rows (b, h)."""

    def __init__(self, share: float, generator: torch.Generator) -> None:
        super().__init__()
        self.of_one = Dropout([share])
        self.of_one.generators = [generator]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        dropped: Tensor = self.of_one(x.T.unsqueeze(0).contiguous())
        return dropped.squeeze(0).T


def plain(inputs: int, member: Member, hidden_layers: int) -> nn.Sequential:
    """Build a consumer of layers of PyTorch."""
    weights, noise = (member.generator(what, CPU) for what in ("weights", "dropout"))
    layers: list[nn.Module] = []
    for depth in range(hidden_layers):
        linear = nn.Linear(member.hidden if depth else inputs, member.hidden, bias=False)
        bound = linear.in_features**-0.5
        nn.init.uniform_(linear.weight, -bound, bound, generator=weights)
        layers += [linear, nn.BatchNorm1d(member.hidden)]
        layers += [OneDropout(member.dropout, noise)]
        layers += [nn.ReLU()] if depth == 0 else []
    last = nn.Linear(member.hidden, 1)
    for parameter in (last.weight, last.bias):
        nn.init.uniform_(parameter, -(member.hidden**-0.5), member.hidden**-0.5, generator=weights)
    return nn.Sequential(*layers, last)


def rows_of(examples: Examples, vectors: Vectors) -> tuple[Tensor, Tensor]:
    parts = [
        table[torch.from_numpy(rows)]
        for table, rows in zip(vectors, (examples.users, examples.items), strict=True)
        if rows is not None
    ]
    return torch.cat(parts, dim=1), torch.from_numpy(examples.labels)


@dataclass(frozen=True)
class Look:
    """How a consumer that is trained by itself does after an epoch."""

    validation: float
    scores: Sequence[float]


def train_plain(
    member: Member,
    config: ConsumerConfig,
    training: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    test: Tensor,
) -> dict[int, Look]:
    x, y = training
    model = plain(x.shape[1], member, config.hidden_layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    order = member.generator("order", CPU)
    looks = {}
    for epoch in range(1, config.epochs + 1):
        model.train()
        shuffled = torch.randperm(len(x), generator=order)[: config.rows_per_epoch]
        for rows in shuffled.tensor_split(-(-len(shuffled) // config.batch_size)):
            optimizer.zero_grad()
            torch.autograd.backward(
                binary_cross_entropy_with_logits(model(x[rows]).squeeze(1), y[rows].float())
            )
            optimizer.step()
        if epoch % config.evaluate_every == 0 or epoch == config.epochs:
            model.eval()
            with torch.no_grad():
                seen, scores = model(validation[0]).squeeze(1), model(test).squeeze(1)
            auc = naive_auc(seen.tolist(), validation[1].tolist())
            looks[epoch] = Look(auc, scores.tolist())
    return looks


@pytest.mark.parametrize(
    "config",
    [
        replace(FAST, batch_size=40, hidden_layers=1),
        replace(FAST, batch_size=40, hidden_layers=2, dropout=(0.5,), evaluate_every=3),
        replace(FAST, batch_size=1000, dropout=(0.0,), epochs=12),
        replace(FAST, batch_size=30, rows_per_epoch=50),
    ],
    ids=["one layer", "two layers", "one batch", "some rows"],
)
def test_consumers_are_what_plain_pytorch_makes_of_the_same_draws(
    timeline: Timeline, config: ConsumerConfig
) -> None:
    tasks = (USER_ACTIVITY, ITEM_RATING_AVG, ITEM_RATING_STD)
    consumers = train(timeline, config, tasks=tasks)
    facts, aucs = consumers.about()["tasks"], consumers.auc(2, *vectors_of(timeline, 2))
    for task in tasks:
        looked_up = [
            rows_of(examples, vectors_of(timeline, k))
            for examples, k in (
                (task.training(timeline, 0), 0),
                (task.validation(timeline, 0), task.validated_after),
                (task.test(timeline, 0, 2), 2),
            )
        ]
        found = aucs[task.name]
        assert found is not None
        for n, seed in enumerate(config.seeds):
            member = Member(task.name, seed, 16, config.dropout[0])
            looks = train_plain(member, config, looked_up[0], looked_up[1], looked_up[2][0])
            alone = looks[facts[task.name]["epochs"][n]]
            best = max(look.validation for look in looks.values())
            assert alone.validation == pytest.approx(best, abs=1e-6)
            assert facts[task.name]["validation"][n] == pytest.approx(alone.validation, abs=1e-5)
            test = naive_auc(alone.scores, looked_up[2][1].tolist())
            assert found[n] == pytest.approx(test, abs=1e-5)
            scores = consumers.scores(
                task.name, task.test(timeline, 0, 2), *vectors_of(timeline, 2)
            )
            torch.testing.assert_close(scores[n], torch.tensor(alone.scores), rtol=1e-5, atol=1e-5)


def assert_same_consumers(one: Consumers, other: Consumers, tasks: Sequence[str]) -> None:
    weights, others = one.state(), other.state()
    for name in weights:
        if name.startswith(tuple(tasks)):
            torch.testing.assert_close(weights[name], others[name], rtol=1e-6, atol=1e-6)


def test_a_consumer_does_not_depend_on_its_company(timeline: Timeline) -> None:
    config = replace(FAST, epochs=2)
    together = train(timeline, config)
    assert together.tasks == tuple(task.name for task in TASKS)
    for task in TASKS:
        assert_same_consumers(together, train(timeline, config, tasks=(task,)), (task.name,))
    other_seeds = train(timeline, replace(config, seeds=(5, 0)), tasks=(ITEM_RATING_AVG,))
    for name, value in other_seeds.state().items():
        torch.testing.assert_close(value[1], together.state()[name][0], rtol=1e-6, atol=1e-6)


def test_the_grid_point_is_the_one_that_validates_best_with_the_first_seed(
    timeline: Timeline,
) -> None:
    config = replace(FAST, hidden=(4, 16), dropout=(0.0, 0.5), seeds=(3, 4), epochs=3)
    tasks = (ITEM_RATING_AVG, ITEM_RATING_STD, EDGE_RATING)
    chosen = train(timeline, config, tasks=tasks)
    single = {
        (hidden, dropout): train(
            timeline, replace(config, hidden=(hidden,), dropout=(dropout,)), tasks=tasks
        )
        for hidden in config.hidden
        for dropout in config.dropout
    }
    for task in chosen.tasks:
        merits = {p: c.about()["tasks"][task]["validation"][0] for p, c in single.items()}
        best = max(merits, key=lambda point: merits[point])
        facts = chosen.about()["tasks"][task]
        assert (facts["hidden"], facts["dropout"]) == best
        assert_same_consumers(chosen, single[best], (task,))


def test_the_same_seed_gives_the_same_consumers(timeline: Timeline) -> None:
    states = []
    for seeds, noise in (((0, 1), 0), ((0, 1), 1), ((5, 6), 0)):
        torch.manual_seed(noise)  # what is drawn elsewhere must not matter
        config = replace(FAST, seeds=seeds, epochs=2)
        states.append(train(timeline, config, tasks=(ITEM_RATING_AVG,)).state())
    first, same, other = states
    for name, value in first.items():
        assert torch.equal(value, same[name])
    name = "item-rating-avg.layers.0.weight"
    assert not torch.equal(first[name][0], first[name][1])
    assert not torch.equal(first[name], other[name])


def test_the_global_generator_is_left_alone(timeline: Timeline) -> None:
    before = torch.get_rng_state()
    train(timeline, replace(FAST, epochs=1)).auc(2, *vectors_of(timeline, 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_stored_consumers_answer_as_before(timeline: Timeline) -> None:
    config = replace(FAST, epochs=1, hidden_layers=2)
    consumers = train(timeline, config)
    about = json.loads(json.dumps(consumers.about()))
    state = safetensors.torch.load(safetensors.torch.save(consumers.state()))
    again = Consumers.load(timeline, about, state)
    assert again.tasks == consumers.tasks
    assert (again.version, again.config) == (0, config)
    assert again.about() == consumers.about()
    for k in (1, 2):
        vectors = vectors_of(timeline, k)
        assert again.auc(k, *vectors) == consumers.auc(k, *vectors)


@pytest.mark.parametrize(
    ("version", "tested"), [(0, {1: 3, 2: 5}), (1, {0: 0, 1: 0, 2: 3}), (2, {0: 0, 2: 0})]
)
def test_tasks_are_tested_from_their_first_version_on(
    timeline: Timeline, version: int, tested: dict[int, int]
) -> None:
    asked = []

    def vectors(k: int) -> Vectors:
        asked.append(k)
        return vectors_of(timeline, k)

    consumers = train_consumers(timeline, version, vectors, replace(FAST, epochs=1))
    assert len(consumers.tasks) == max(tested.values())
    for k, count in tested.items():
        found = consumers.auc(k, *vectors_of(timeline, k))
        assert list(found) == [task.name for task in TASKS]
        assert sum(aucs is not None and len(aucs) == 2 for aucs in found.values()) == count
    # Later vectors are for the user tasks alone, and the last version needs none at all.
    assert sorted(asked) == {0: [0, 1], 1: [1], 2: []}[version]


def test_a_task_with_one_class_has_no_auc(timeline: Timeline) -> None:
    dataset = timeline.dataset
    for ratings, tasks in (
        # All good and alike: nothing to learn. All means reach their median.
        (np.full_like(dataset.ratings, 5.0), (ITEM_RATING_AVG, ITEM_RATING_STD, EDGE_RATING)),
        # No ratings, no examples.
        (np.full_like(dataset.ratings, np.nan), (ITEM_RATING_AVG, ITEM_RATING_STD, EDGE_RATING)),
    ):
        dull = replace(timeline, dataset=replace(dataset, ratings=ratings))
        consumers = train(dull, tasks=tasks)
        assert consumers.tasks == ()
        assert consumers.state() == {}
        assert consumers.auc(2, *vectors_of(dull, 2)) == {task.name: None for task in tasks}


def test_one_class_in_validation_or_test_is_no_reason_not_to_train(timeline: Timeline) -> None:
    ratings = timeline.dataset.ratings.copy()
    ratings[timeline.edges(0) : timeline.edges(2)] = 5.0
    mixed = replace(timeline, dataset=replace(timeline.dataset, ratings=ratings))
    consumers = train(mixed, replace(FAST, dropout=(0.5, 0.25)), tasks=(EDGE_RATING,))
    facts = consumers.about()["tasks"]["edge-rating"]
    assert facts == {
        "hidden": 16,
        "dropout": 0.5,
        "epochs": [FAST.epochs, FAST.epochs],
        "validation": [None, None],
    }
    assert consumers.auc(1, *vectors_of(mixed, 1)) == {"edge-rating": None}
    assert consumers.auc(2, *vectors_of(mixed, 2))["edge-rating"] is not None


@dataclass(frozen=True)
class Agreement:
    """Whether the first two coordinates of an item's vector agree in sign."""

    count: int
    name: str = "agreement"
    tested_after: int = 1
    validated_after: int = 0

    def vectors(self, seed: int) -> Vectors:
        drawn = np.random.default_rng(seed).standard_normal((self.count, 4), dtype=np.float32)
        return torch.empty(0, 4), torch.from_numpy(drawn)

    def examples(self, seed: int) -> Examples:
        _, items = self.vectors(seed)
        return Examples(None, np.arange(self.count), (items[:, 0] * items[:, 1] > 0).numpy())

    def training(self, timeline: Timeline, version: int) -> Examples:
        return self.examples(version)

    validation = training

    def test(self, timeline: Timeline, version: int, k: int) -> Examples:
        return self.examples(k)


def test_a_consumer_learns_what_no_linear_model_could(timeline: Timeline) -> None:
    task = Agreement(400)
    config = replace(FAST, epochs=60, batch_size=100)
    consumers = train_consumers(timeline, 0, task.vectors, config, (task,))
    learned = consumers.auc(1, *task.vectors(1))["agreement"]
    chance = consumers.auc(1, *task.vectors(2))["agreement"]
    assert learned is not None
    assert min(learned) > 0.9
    assert chance is not None
    assert chance == pytest.approx([0.5, 0.5], abs=0.1)


def test_a_consumer_answers_alike_every_time(timeline: Timeline) -> None:
    task = Agreement(200)
    consumers = train_consumers(timeline, 0, task.vectors, FAST, (task,))
    examples, vectors = task.examples(1), task.vectors(1)
    scores = consumers.scores(task.name, examples, *vectors)
    assert torch.equal(scores, consumers.scores(task.name, examples, *vectors))
    order = np.argsort(vectors[1][:, 3].numpy())
    turned = Examples(None, order, examples.labels[order])
    torch.testing.assert_close(
        consumers.scores(task.name, turned, *vectors), scores[:, torch.from_numpy(order)]
    )


def scoring_by(timeline: Timeline, *weights: float) -> Consumers:
    """Make consumers that give an item the score w·x, one for each w."""
    task, count = ITEM_RATING_AVG.name, len(weights)
    config = replace(FAST, hidden=(2,), seeds=tuple(range(count)))
    both_signs = torch.tensor([[1.0], [-1.0]]).expand(count, 2, 1)
    state = {
        "layers.0.weight": both_signs,
        "layers.0.gain": torch.ones(count, 2),
        "layers.0.bias": torch.zeros(count, 2),
        "layers.0.running_mean": torch.zeros(count, 2),
        "layers.0.running_var": torch.ones(count, 2),
        "layers.3.weight": torch.tensor([[[w, -w]] for w in weights]),
        "layers.3.bias": torch.zeros(count, 1),
    }
    facts = {"hidden": 2, "dropout": 0.0, "epochs": [1] * count, "validation": [None] * count}
    about = {"version": 0, "config": asdict(config), "asked": [task], "tasks": {task: facts}}
    return Consumers.load(timeline, about, {f"{task}.{n}": v for n, v in state.items()})


def items_scoring(scores: Sequence[float], labels: Sequence[bool]) -> tuple[Examples, Tensor]:
    vectors = torch.tensor(scores, dtype=torch.float32).unsqueeze(1)
    return Examples(None, np.arange(len(scores)), np.array(labels)), vectors


@settings(max_examples=40)
@given(
    rows=st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=12).filter(
        lambda rows: len({label for _, label in rows}) == 2
    )
)
def test_roc_auc_is_that_of_counted_pairs(
    timeline: Timeline, rows: Sequence[tuple[int, bool]]
) -> None:
    scores, labels = [score for score, _ in rows], [label for _, label in rows]
    examples, items = items_scoring(scores, labels)
    expected = [naive_auc([w * score for score in scores], labels) for w in (1.0, -2.0)]
    found = scoring_by(timeline, 1.0, -2.0)
    assert found.auc_on("item-rating-avg", examples, torch.empty(0, 1), items) == pytest.approx(
        expected, rel=1e-6
    )


def test_large_scores_do_not_tie(timeline: Timeline) -> None:
    examples, items = items_scoring([20.0, 25.0, 30.0], [False, True, True])
    consumers = scoring_by(timeline, 1.0)
    assert consumers.auc_on("item-rating-avg", examples, torch.empty(0, 1), items) == [1.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("entity", ["users", "items"])
def test_vectors_that_are_not_finite_are_refused(
    timeline: Timeline, value: float, entity: str
) -> None:
    config = replace(FAST, epochs=1)
    consumers = train(timeline, config, tasks=(EDGE_RATING,))
    users, items = vectors_of(timeline, 1)
    spoiled = (users if entity == "users" else items)[3]
    spoiled[2] = value
    with pytest.raises(InvalidInput, match=f"vector of the {entity} is not finite"):
        consumers.auc(1, users, items)
    with pytest.raises(InvalidInput, match=f"vector of the {entity} is not finite"):
        train_consumers(timeline, 0, lambda _k: (users, items), config, (EDGE_RATING,))


def test_vectors_that_overflow_are_refused(timeline: Timeline) -> None:
    examples, items = items_scoring([1.0, 3e38], [False, True])
    with pytest.raises(InvalidInput, match="scores are not finite"):
        scoring_by(timeline, 2.0).auc_on("item-rating-avg", examples, torch.empty(0, 1), items)


def test_vectors_that_do_not_fit_are_refused(timeline: Timeline) -> None:
    consumers = train(timeline, replace(FAST, epochs=1), tasks=(EDGE_RATING,))
    users, items = vectors_of(timeline, 1)
    with pytest.raises(DimensionMismatch, match="input of edge-rating: expected 12, got 11"):
        consumers.auc(1, users, items[:, 1:])
    needed = timeline.users(1)
    with pytest.raises(DimensionMismatch, match=rf"vectors of users: expected \({needed}"):
        consumers.auc(1, users[: needed - 1], items)
    with pytest.raises(InvalidInput, match=r"expected 0\.\.2, got 3"):
        consumers.auc(3, users, items)


def test_batches_hold_each_row_once_and_never_a_single_one(timeline: Timeline) -> None:
    # 7 rows in batches of 2 or fewer would leave one by itself, which has no variance.
    task = Agreement(7)
    config = replace(FAST, batch_size=2, epochs=3)
    consumers = train_consumers(timeline, 0, task.vectors, config, (task,))
    assert consumers.tasks == ("agreement",)


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden": ()},
        {"dropout": ()},
        {"seeds": ()},
        {"hidden": (0,)},
        {"epochs": 0},
        {"batch_size": 0},
        {"evaluate_every": 0},
        {"dropout": (1.0,)},
        {"dropout": (-0.1,)},
        {"learning_rate": 0.0},
        {"hidden_layers": 3},
        {"rows_per_epoch": 1},
    ],
    ids=str,
)
def test_configurations_that_cannot_be_trained_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match="Consumers: expected"):
        replace(FAST, **wrong)


def test_presets_are_the_papers_and_a_small_one() -> None:
    assert PAPER.hidden == (128, 256, 512, 1024)
    assert PAPER.dropout == (0.0, 0.25, 0.5)
    assert (len(PAPER.seeds), PAPER.epochs, PAPER.batch_size) == (10, 300, 2048)
    assert (PAPER.learning_rate, PAPER.hidden_layers) == (0.001, 1)
    assert (SMALL.hidden, SMALL.dropout, len(SMALL.seeds)) == ((128,), (0.25,), 3)
