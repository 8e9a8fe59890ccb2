"""Splits against the protocol, edge by edge."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backcast.errors import InvalidInput
from tests.trainer_support import dataset_of, pairs_of
from trainer.config import Protocol
from trainer.data.dataset import Dataset
from trainer.split import Edges, Holdout, Split, holdout, make_split

GROWING = dataset_of(
    [
        ("ann", "x", 1),
        ("bob", "y", 1),
        ("ann", "y", 2),
        # after t_k = 2; several of these moments are shared
        ("cat", "x", 3),  # new, three edges until the horizon
        ("ann", "z", 3),  # known
        ("dan", "z", 4),  # new, a single edge until the horizon
        ("cat", "w", 4),
        ("cat", "z", 5),  # the last edge of cat
        ("bob", "x", 5),  # known
        # after the horizon = 5
        ("eve", "v", 6),
        ("cat", "v", 6),
    ]
)


def named(dataset: Dataset, edges: Edges) -> list[str]:
    """Return edges as "user item", by id."""
    users, items = dataset.user_ids[edges.users], dataset.item_ids[edges.items]
    return [f"{user} {item}" for user, item in zip(users, items, strict=True)]


class TestPaper:
    split = make_split(GROWING, until=2, horizon=5, protocol=Protocol.PAPER)

    def test_known_users_and_the_last_edge_of_new_ones_are_predicted(self) -> None:
        assert self.split.test is not None
        assert named(GROWING, self.split.test.targets) == ["ann z", "cat z", "bob x"]

    def test_other_edges_of_new_users_are_trained_on(self) -> None:
        past = ["ann x", "bob y", "ann y"]
        support = ["cat x", "dan z", "cat w"]
        assert named(GROWING, self.split.train) == past + support
        assert self.split.test is not None
        assert named(GROWING, self.split.test.past) == past
        assert named(GROWING, self.split.test.support) == support
        assert named(GROWING, self.split.test.visible) == past + support

    def test_nodes_and_candidates_are_all_seen_by_the_horizon(self) -> None:
        assert (self.split.users, self.split.items) == (4, 4)
        assert self.split.test is not None
        assert (self.split.test.users, self.split.test.items) == (4, 4)

    def test_the_epoch_is_selected_on_the_test_edges(self) -> None:
        assert self.split.selection is self.split.test

    @pytest.mark.parametrize("horizon", [None, 2], ids=["absent", "not later"])
    def test_needs_a_horizon(self, horizon: int | None) -> None:
        with pytest.raises(InvalidInput, match="give --horizon"):
            make_split(GROWING, until=2, horizon=horizon, protocol=Protocol.PAPER)


class TestStrict:
    def test_five_per_cent_are_held_out_of_a_hundred_in_file_order(self) -> None:
        # One moment for all of them: nothing but their order in the file tells them apart.
        old = [(f"u{n // 10}", f"i{n % 10}", 7) for n in range(95)]
        held = [
            ("new", "i0", 7),
            ("u9", "i9", 7),
            ("once", "i1", 7),
            ("new", "j", 7),
            ("u9", "j", 7),
        ]
        later = [("u0", "later", 8), ("later", "i3", 8)]
        dataset = dataset_of(old + held + later)
        split = make_split(dataset, until=7, horizon=None, protocol=Protocol.STRICT)

        assert named(dataset, split.train) == [f"{user} {item}" for user, item, _ in old]
        assert (split.users, split.items) == (10, 10)
        assert split.selection is not None
        assert pairs_of(split.selection.past) == pairs_of(split.train)
        assert named(dataset, split.selection.support) == ["new i0", "once i1"]
        assert named(dataset, split.selection.targets) == ["u9 i9", "new j", "u9 j"]
        assert (split.selection.users, split.selection.items) == (12, 11)
        assert split.test is None

    def test_the_test_starts_where_training_was_allowed_to_look(self) -> None:
        split = make_split(GROWING, until=2, horizon=5, protocol=Protocol.STRICT)
        paper = make_split(GROWING, until=2, horizon=5, protocol=Protocol.PAPER)
        assert split.test is not None
        assert paper.test is not None
        assert_same_holdout(split.test, paper.test)
        assert named(GROWING, split.train) == ["ann x", "bob y", "ann y"]
        assert (split.users, split.items) == (2, 2)

    def test_a_share_below_one_edge_leaves_nothing_to_select_on(self) -> None:
        # 95 % of 3 edges, rounded up, are all of them
        split = make_split(GROWING, until=2, horizon=5, protocol=Protocol.STRICT)
        assert split.selection is None

    @pytest.mark.parametrize(
        ("known", "fitted"), [(19, 19), (20, 19), (21, 20), (40, 38), (41, 39)]
    )
    def test_the_fitted_share_is_rounded_up(self, known: int, fitted: int) -> None:
        dataset = dataset_of([("u", f"i{n}", 1) for n in range(known)])
        split = make_split(dataset, until=1, horizon=None, protocol=Protocol.STRICT)
        assert len(split.train) == fitted


@pytest.mark.parametrize("protocol", list(Protocol))
def test_no_edge_until_then_is_refused(protocol: Protocol) -> None:
    with pytest.raises(InvalidInput, match="no interaction is as early as 0"):
        make_split(GROWING, until=0, horizon=5, protocol=protocol)


def test_new_users_with_one_edge_each_leave_nothing_to_predict() -> None:
    dataset = dataset_of([("ann", "x", 1), ("bob", "x", 2), ("cat", "y", 3)])
    assert holdout(dataset, 1, 3) is None
    split = make_split(dataset, until=1, horizon=3, protocol=Protocol.STRICT)
    assert (split.selection, split.test) == (None, None)


@pytest.mark.parametrize("horizon", [3, 2], ids=["empty", "backwards"])
def test_no_edges_in_between_leave_nothing_to_predict(horizon: int) -> None:
    assert holdout(GROWING, 3, horizon) is None


@dataclass(frozen=True)
class History:
    """Some edges, how many of them are known, and how many there are until the horizon."""

    edges: Sequence[tuple[str, str, int]]
    until: int
    horizon: int

    @property
    def dataset(self) -> Dataset:
        return dataset_of(self.edges)

    @property
    def known(self) -> int:
        return sum(t <= self.until for _, _, t in self.edges)


@st.composite
def histories(draw: st.DrawFn) -> History:
    ids = st.tuples(st.sampled_from("abcdefg"), st.sampled_from("pqrstuvwxyz"))
    pairs = draw(st.lists(ids, min_size=1, max_size=60, unique=True))
    steps = draw(st.lists(st.integers(0, 1), min_size=len(pairs), max_size=len(pairs)))
    times = np.cumsum([1, *steps[1:]]).tolist()
    until = draw(st.integers(1, times[-1]))
    horizon = draw(st.integers(until, times[-1]))
    return History([(u, i, t) for (u, i), t in zip(pairs, times, strict=True)], until, horizon)


def assert_same_holdout(found: Holdout | None, expected: Holdout | None) -> None:
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        for name in ("past", "support", "targets", "visible"):
            assert pairs_of(getattr(found, name)) == pairs_of(getattr(expected, name)), name
        assert (found.users, found.items) == (expected.users, expected.items)


def check_holdout(found: Holdout | None, dataset: Dataset, past: int, horizon: int) -> None:
    """Compare with the protocol's words, one edge at a time."""
    edges = list(zip(dataset.users.tolist(), dataset.items.tolist(), strict=True))
    known = {user for user, _ in edges[:past]}
    support: list[tuple[int, int]] = []
    targets: list[tuple[int, int]] = []
    for at in range(past, horizon):
        user = edges[at][0]
        own = [n for n in range(past, horizon) if edges[n][0] == user]
        is_predicted = user in known or (len(own) > 1 and at == own[-1])
        (targets if is_predicted else support).append(edges[at])
    if not targets:
        assert found is None
        return
    assert found is not None
    assert pairs_of(found.past) == edges[:past]
    assert pairs_of(found.support) == support
    assert pairs_of(found.targets) == targets
    assert found.users == len({user for user, _ in edges[:horizon]})
    assert found.items == len({item for _, item in edges[:horizon]})


@given(histories())
def test_strict_is_what_the_protocol_says(history: History) -> None:
    dataset, known = history.dataset, history.known
    split = make_split(dataset, history.until, history.horizon, Protocol.STRICT)
    fitted = known - math.floor(known / 20)
    assert pairs_of(split.train) == pairs_of(Edges(dataset.users[:fitted], dataset.items[:fitted]))
    assert split.users == len(set(dataset.users[:fitted].tolist()))
    assert split.items == len(set(dataset.items[:fitted].tolist()))
    check_holdout(split.selection, dataset, fitted, known)
    check_holdout(split.test, dataset, known, dataset.edges_until(history.horizon))


@given(histories())
def test_paper_is_what_the_protocol_says(history: History) -> None:
    dataset, horizon = history.dataset, history.dataset.edges_until(history.horizon)
    split: Split | None = None
    try:
        split = make_split(dataset, history.until, history.horizon, Protocol.PAPER)
    except InvalidInput:
        check_holdout(None, dataset, history.known, horizon)
        return
    assert split.selection is split.test
    assert split.test is not None
    check_holdout(split.test, dataset, history.known, horizon)
    assert pairs_of(split.train) == pairs_of(split.test.past) + pairs_of(split.test.support)
    assert (split.users, split.items) == (split.test.users, split.test.items)


@given(histories(), st.sampled_from(list(Protocol)))
def test_edges_until_the_horizon_are_used_once_each(history: History, protocol: Protocol) -> None:
    dataset = history.dataset
    horizon = dataset.edges_until(history.horizon)
    try:
        split = make_split(dataset, history.until, history.horizon, protocol)
    except InvalidInput:
        return
    every = sorted(pairs_of(Edges(dataset.users[:horizon], dataset.items[:horizon])))
    if split.test is not None:
        assert sorted(pairs_of(split.test.visible + split.test.targets)) == every
    if protocol is Protocol.STRICT and split.selection is not None:
        known = sorted(pairs_of(split.selection.visible + split.selection.targets))
        assert known == sorted(
            pairs_of(Edges(dataset.users[: history.known], dataset.items[: history.known]))
        )


@given(histories(), st.data())
def test_strict_fits_and_selects_alike_whatever_comes_later(
    history: History, data: st.DataObject
) -> None:
    past = list(history.edges[: history.known])
    later = data.draw(st.lists(st.tuples(st.sampled_from("abhij"), st.sampled_from("pqlmn"))))
    taken = {(user, item) for user, item, _ in past}
    future = [(u, i, history.until + 1) for u, i in dict.fromkeys(later) if (u, i) not in taken]
    one = make_split(history.dataset, history.until, history.horizon, Protocol.STRICT)
    other = make_split(dataset_of(past + future), history.until, None, Protocol.STRICT)
    assert pairs_of(one.train) == pairs_of(other.train)
    assert (one.users, one.items) == (other.users, other.items)
    assert_same_holdout(one.selection, other.selection)
