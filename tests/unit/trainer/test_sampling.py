"""Training pairs against their definition: which are drawn, and how often."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from backcast.errors import DataError
from tests.trainer_support import edges_of, pairs_of
from trainer.sampling import PairSampler
from trainer.split import Edges

pytestmark = pytest.mark.usefixtures("one_thread")

ITEMS = 30
Integers = NDArray[np.int64]


def skewed() -> Edges:
    """Return edges of 20 users with 1, 2, …, 20 of the 30 items."""
    rng = np.random.default_rng(0)
    return edges_of(
        *((user, int(item)) for user in range(20) for item in rng.permutation(ITEMS)[: user + 1])
    )


def sampler(edges: Edges, seed: int = 0, items: int = ITEMS) -> PairSampler:
    return PairSampler(edges, items, torch.Generator().manual_seed(seed))


def epochs(pairs: PairSampler, count: int, batch_size: int = 1 << 20) -> tuple[Integers, ...]:
    """Return the users, positives and negatives of some epochs: three int64 arrays."""
    batches = [batch for _ in range(count) for batch in pairs.epoch(batch_size)]
    return tuple(
        torch.cat([getattr(batch, name) for batch in batches]).numpy()
        for name in ("users", "positives", "negatives")
    )


def assert_uniform(counts: Sequence[Integers]) -> None:
    """Compare counts, each group drawn uniformly, by chi-square with a bound of five sigma."""
    statistic = sum(float((((c - c.mean()) ** 2) / c.mean()).sum()) for c in counts)
    freedom = sum(len(c) - 1 for c in counts)
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_users_are_uniform_whatever_their_degree() -> None:
    users, _, _ = epochs(sampler(skewed()), 400)
    assert_uniform([np.bincount(users, minlength=20)])


def test_positives_are_uniform_over_the_edges_of_their_user() -> None:
    edges = skewed()
    users, positives, _ = epochs(sampler(edges), 400)
    assert set(zip(users.tolist(), positives.tolist(), strict=True)) == set(pairs_of(edges))
    counts = np.zeros((20, ITEMS), dtype=np.int64)
    np.add.at(counts, (users, positives), 1)
    assert_uniform([row[row > 0] for row in counts])


def test_negatives_are_uniform_over_all_other_items() -> None:
    edges = skewed()
    users, _, negatives = epochs(sampler(edges), 400)
    counts = np.zeros((20, ITEMS), dtype=np.int64)
    np.add.at(counts, (users, negatives), 1)
    chosen = np.zeros_like(counts, dtype=bool)
    chosen[edges.users, edges.items] = True
    assert counts[chosen].sum() == 0
    assert_uniform([row[~own] for row, own in zip(counts, chosen, strict=True)])


def test_the_last_item_left_is_found() -> None:
    # user 0 lacks item 2 only, user 1 item 0 only
    users, _, negatives = epochs(sampler(edges_of((0, 0), (0, 1), (1, 1), (1, 2)), items=3), 20)
    assert set(zip(users.tolist(), negatives.tolist(), strict=True)) == {(0, 2), (1, 0)}


def test_users_without_edges_are_not_drawn() -> None:
    users, positives, _ = epochs(sampler(edges_of((3, 1), (5, 0)), items=2), 20)
    assert set(zip(users.tolist(), positives.tolist(), strict=True)) == {(3, 1), (5, 0)}


@pytest.mark.parametrize(
    ("batch_size", "sizes"),
    [(100, [100, 100, 10]), (70, [70, 70, 70]), (210, [210]), (1000, [210])],
)
def test_an_epoch_has_as_many_pairs_as_there_are_edges(batch_size: int, sizes: list[int]) -> None:
    batches = list(sampler(skewed()).epoch(batch_size))
    assert [len(batch.users) for batch in batches] == sizes
    assert [len(batch.positives) for batch in batches] == sizes
    assert [len(batch.negatives) for batch in batches] == sizes


def test_batches_cut_one_epoch_in_pieces() -> None:
    whole = epochs(sampler(skewed()), 1)
    pieces = epochs(sampler(skewed()), 1, batch_size=17)
    for one, other in zip(whole, pieces, strict=True):
        assert one.tolist() == other.tolist()


def test_pairs_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = epochs(sampler(skewed(), seed=5), 2)
    torch.manual_seed(2)
    again = epochs(sampler(skewed(), seed=5), 2)
    other = epochs(sampler(skewed(), seed=6), 2)
    for one, same, different in zip(first, again, other, strict=True):
        assert one.tolist() == same.tolist()
        assert one.tolist() != different.tolist()


def test_the_order_of_the_edges_does_not_matter() -> None:
    edges = skewed()
    turned = Edges(edges.users[::-1], edges.items[::-1])
    for one, other in zip(epochs(sampler(edges), 1), epochs(sampler(turned), 1), strict=True):
        assert one.tolist() == other.tolist()


def test_every_epoch_is_drawn_anew() -> None:
    pairs = sampler(skewed())
    first, second = (epochs(pairs, 1) for _ in range(2))
    assert all(a.tolist() != b.tolist() for a, b in zip(first, second, strict=True))


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(2024)
    before = torch.get_rng_state()
    epochs(sampler(skewed()), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_user_with_every_item_is_refused() -> None:
    with pytest.raises(DataError, match="each of the 3 items"):
        sampler(edges_of((0, 0), (1, 0), (1, 1), (1, 2)), items=3)
