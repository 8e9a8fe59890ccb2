"""Recall@K against a loop over users."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.trainer_support import edges_of
from trainer import ranking
from trainer.ranking import recall_at_k
from trainer.split import Holdout

pytestmark = pytest.mark.usefixtures("one_thread")

Pairs = Sequence[tuple[int, int]]


def make_holdout(
    targets: Pairs, *, past: Pairs = (), support: Pairs = (), users: int, items: int
) -> Holdout:
    return Holdout(edges_of(*past), edges_of(*support), edges_of(*targets), users, items)


def naive_recall(
    users: Tensor, items: Tensor, visible: Pairs, targets: Pairs, candidates: int, k: int
) -> float:
    recalls = []
    for user in sorted({user for user, _ in targets}):
        wanted = {item for owner, item in targets if owner == user}
        ranked = [item for item in range(candidates) if (user, item) not in visible]
        ranked.sort(key=lambda item: -float(users[user] @ items[item]))
        recalls.append(len(wanted & set(ranked[:k])) / len(wanted))
    return sum(recalls) / len(recalls)


pairs = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), max_size=20)


@given(
    past=pairs,
    support=pairs,
    targets=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=1, max_size=20),
    k=st.integers(1, 12),
    scores_at_once=st.sampled_from([1, 8, 17, 1 << 24]),
    seed=st.integers(0, 2**31),
)
def test_recall_is_that_of_a_loop(
    past: Pairs, support: Pairs, targets: Pairs, k: int, scores_at_once: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    users = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    items = torch.randn(10, 3, generator=generator, dtype=torch.float64)  # two are no candidates
    found = make_holdout(targets, past=past, support=support, users=6, items=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "_SCORES_AT_ONCE", scores_at_once)
        recall = recall_at_k(users, items, found, k)
    expected = naive_recall(users, items, [*past, *support], targets, 8, k)
    assert recall == pytest.approx(expected, rel=1e-12)


ONE_USER = torch.tensor([[1.0]])
FALLING = torch.tensor([[5.0], [4.0], [3.0], [2.0], [1.0]])
"""Five items that a user (1.0) ranks in their order."""


@pytest.mark.parametrize(("k", "recall"), [(1, 0.0), (2, 0.5), (4, 0.5), (5, 1.0), (9, 1.0)])
def test_hits_in_the_list_over_all_targets(k: int, recall: float) -> None:
    found = make_holdout([(0, 1), (0, 4)], users=1, items=5)
    assert recall_at_k(ONE_USER, FALLING, found, k) == recall


@pytest.mark.parametrize(
    ("past", "support", "recall"),
    [([], [], 0.0), ([(0, 0)], [], 1.0), ([], [(0, 0)], 1.0)],
    ids=["nothing", "past", "support"],
)
def test_visible_items_make_room_in_the_list(past: Pairs, support: Pairs, recall: float) -> None:
    found = make_holdout([(0, 1)], past=past, support=support, users=1, items=5)
    assert recall_at_k(ONE_USER, FALLING, found, 1) == recall


def test_a_visible_target_is_never_a_hit() -> None:
    found = make_holdout([(0, 1), (0, 2)], past=[(0, 1)], users=1, items=5)
    assert recall_at_k(ONE_USER, FALLING, found, 50) == 0.5


def test_items_seen_after_the_horizon_do_not_compete() -> None:
    items = FALLING.flip(0)  # the last are the best
    assert recall_at_k(ONE_USER, items, make_holdout([(0, 2)], users=1, items=5), 1) == 0.0
    assert recall_at_k(ONE_USER, items, make_holdout([(0, 2)], users=1, items=3), 1) == 1.0


def test_users_count_alike_and_those_without_targets_not_at_all() -> None:
    users = torch.tensor([[1.0], [-1.0], [1.0]])
    targets = [(0, 0), (1, 0), (1, 4), (1, 1), (1, 2)]
    found = make_holdout(targets, users=3, items=5)
    assert recall_at_k(users, FALLING, found, 1) == (1 + 1 / 4) / 2


def test_scores_are_ranked_as_they_are() -> None:
    # through a sigmoid in float32 all three would be 1.0
    items = torch.tensor([[100.0], [200.0], [300.0]])
    for at, recall in enumerate([0.0, 0.0, 1.0]):
        found = make_holdout([(0, at)], users=1, items=3)
        assert recall_at_k(ONE_USER, items, found, 1) == recall


def test_fifty_are_the_default() -> None:
    items = torch.arange(60.0, 0.0, -1.0)[:, None]
    inside = make_holdout([(0, 49)], users=1, items=60)
    outside = make_holdout([(0, 50)], users=1, items=60)
    assert (recall_at_k(ONE_USER, items, inside), recall_at_k(ONE_USER, items, outside)) == (1, 0)


def test_vectors_are_left_as_they_were() -> None:
    users, items = ONE_USER.clone(), FALLING.clone()
    recall_at_k(users, items, make_holdout([(0, 2)], past=[(0, 1)], users=1, items=5), 2)
    assert torch.equal(users, ONE_USER)
    assert torch.equal(items, FALLING)
