"""A generated evolving user–item graph, for demonstrations, tests and benchmarks.

What is generated, in words. Items have a brand and one to three categories; brands and categories
differ in size as words do, and each brand keeps to a few categories. An item's place in a space of
tastes is the sum of its brand's, its categories' and its own. Users belong to communities of like
taste and drift from one taste towards another the longer they stay. A third of the items and a
quarter of the users are there from the start, the others arrive evenly over the whole time. A few
users are very active and a few items very popular (power laws). At each interaction a user meets
some of the items that exist by then, the popular ones more often, and takes the one that suits the
taste of the moment best, up to chance.

Each item has a quality: partly its brand's, partly its place in the space of tastes, partly its
own. A rating from 1 to 5 follows the quality, the match of taste, how generous the user is, and
chance. So whether an item is rated above the median can be learned from its attributes and its
neighbours in the graph, but not perfectly.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from backcast.errors import InvalidInput

EPOCH = 1_262_304_000
"""The first possible timestamp: 2010-01-01 UTC."""
SECONDS_PER_DAY = 86_400

FACTORS = 8
"""Dimensions of the space of tastes."""
COMMUNITIES = 16
CANDIDATES = 24
"""Items that a user meets before taking one."""
PICKINESS = 8.0
"""Weight of taste against chance in the choice among them."""
STAY = 0.25
"""For how long a user stays active on average, as a share of the whole time."""
BLOCK = 1 << 15
"""Interactions generated at once, which bounds the memory."""

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class SynthConfig:
    """How large a graph to generate. Equal configurations give equal data.

    Attributes:
        users: users with at least one interaction.
        items: items, some of which may have no interaction.
        interactions: distinct (user, item) pairs; at least ``users``, at most half of all pairs.
        seed: of the random generator.
        days: over which the interactions are spread.
        brands: None gives one per 25 items.
        categories: None gives one per 40 items, 3 to 60.
        drift: from 0, a user's taste stays, to 1, nothing is left in the end of that on arrival.
    """

    users: int = 2000
    items: int = 1000
    interactions: int = 40_000
    seed: int = 0
    days: int = 2000
    brands: int | None = None
    categories: int | None = None
    drift: float = 0.5

    def __post_init__(self) -> None:
        for name in ("users", "items", "interactions", "days"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}; expected at least 1.")
        for name in ("brands", "categories"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InvalidInput(f"{name} is {getattr(self, name)}; expected at least 1.")
        if self.seed < 0:
            raise InvalidInput(f"seed is {self.seed}; expected 0 or more.")
        if not 0 <= self.drift <= 1:
            raise InvalidInput(f"drift is {self.drift}; expected a number from 0 to 1.")
        most = self.users * self.items // 2
        if not self.users <= self.interactions <= most:
            raise InvalidInput(
                f"interactions is {self.interactions}; expected {self.users} (one per user) to "
                f"{most} (half of all user–item pairs)."
            )

    @property
    def brand_count(self) -> int:
        """How many brands there are."""
        return self.brands or max(2, self.items // 25)

    @property
    def category_count(self) -> int:
        """How many categories there are."""
        return self.categories or min(60, max(3, self.items // 40))


@dataclass(frozen=True, eq=False)
class _Items:
    """Items in the order of arrival, I of them.

    Attributes:
        arrivals: float64 (I,), ascending in [0, 1).
        reach: float64 (I,), running sum of popularity.
        tastes: float32 (I, FACTORS), unit rows.
        quality: float32 (I,), standardised.
        brands: int64 (I,).
        categories: int64 (I, 3), -1 where there is no second or third.
    """

    arrivals: NDArray[np.float64]
    reach: NDArray[np.float64]
    tastes: Floats
    quality: Floats
    brands: Integers
    categories: Integers


@dataclass(frozen=True, eq=False)
class _Users:
    """Users in the order of arrival, U of them.

    Attributes:
        arrivals: float64 (U,), ascending in [0, 1).
        reach: float64 (U,), running sum of activity.
        tastes: float32 (U, FACTORS), unit rows, on arrival.
        drifts: float32 (U, FACTORS), what is added to the taste in the end.
        generosity: float32 (U,), added to every rating.
    """

    arrivals: NDArray[np.float64]
    reach: NDArray[np.float64]
    tastes: Floats
    drifts: Floats
    generosity: Floats


@dataclass(frozen=True, eq=False)
class _Edges:
    """Interactions: user and item int64 (E,), time float64 (E,) in [0, 1)."""

    users: Integers
    items: Integers
    times: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.users)

    def plus(self, others: "_Edges", item_count: int, limit: int) -> "_Edges":
        """Append what is not yet there of ``others``, up to ``limit`` edges in all."""
        users, items, times = (
            np.concatenate([getattr(self, name), getattr(others, name)])
            for name in ("users", "items", "times")
        )
        _, first = np.unique(users * item_count + items, return_index=True)
        kept = np.sort(first)[:limit]
        return _Edges(users[kept], items[kept], times[kept])


def _nothing(done: int) -> None:
    del done


def synthesize(
    config: SynthConfig, advance: Callable[[int], None] = _nothing
) -> tuple[pa.Table, pa.Table]:
    """Generate the interactions, sorted by time, and the items; the module says how.

    Args:
        config: sizes and seed.
        advance: told how many interactions are generated so far.

    Returns:
        interactions: user_id string, item_id string, rating float32 in 1..5, timestamp int64.
        items: item_id string, brand string, categories list<string>.
    """
    rng = np.random.default_rng(config.seed)
    items = _make_items(config, rng)
    users = _make_users(config, rng)
    edges = _make_edges(config, users, items, rng, advance)
    order = np.argsort(edges.times, kind="stable")
    edges = _Edges(edges.users[order], edges.items[order], edges.times[order])

    user_ids = _shuffled_ids("u", config.users, 5, rng)
    item_ids = _shuffled_ids("i", config.items, 4, rng)
    seconds = np.floor(edges.times * config.days * SECONDS_PER_DAY).astype(np.int64)
    interactions = pa.table(
        {
            "user_id": user_ids.take(pa.array(edges.users)),
            "item_id": item_ids.take(pa.array(edges.items)),
            "rating": _rate(edges, users, items, rng),
            "timestamp": EPOCH + seconds,
        }
    )
    return interactions, _item_table(config, items, item_ids)


def _make_items(config: SynthConfig, rng: np.random.Generator) -> _Items:
    brands = _skewed(config.brand_count, config.items, rng)
    categories = _pick_categories(config, brands, rng)
    brand_tastes = _normal(rng, config.brand_count, FACTORS)
    category_tastes = _normal(rng, config.category_count, FACTORS)
    present = (categories >= 0)[:, :, None]
    of_categories = (category_tastes[categories] * present).sum(1) / present.sum(1)
    own = _normal(rng, config.items, FACTORS)
    tastes = _unit(0.7 * brand_tastes[brands] + 0.7 * of_categories + 0.7 * own)

    quality = 0.85 * _standard(_normal(rng, config.brand_count)[brands])
    quality += 0.55 * _standard(tastes @ _normal(rng, FACTORS))
    quality += 0.5 * _normal(rng, config.items)
    return _Items(
        arrivals=_arrivals(config.items, 1 / 3, rng),
        reach=np.cumsum(_pareto(config.items, 1.5, rng)),
        tastes=tastes,
        quality=_standard(quality),
        brands=brands,
        categories=categories,
    )


def _make_users(config: SynthConfig, rng: np.random.Generator) -> _Users:
    centres = _normal(rng, COMMUNITIES, FACTORS)
    now, later = (
        _unit(
            centres[rng.integers(COMMUNITIES, size=config.users)]
            + 0.6 * _normal(rng, config.users, FACTORS)
        )
        for _ in range(2)
    )
    return _Users(
        arrivals=_arrivals(config.users, 1 / 4, rng),
        reach=np.cumsum(_pareto(config.users, 1.5, rng)),
        tastes=now,
        drifts=np.float32(config.drift) * (later - now),
        generosity=0.35 * _normal(rng, config.users),
    )


def _make_edges(
    config: SynthConfig,
    users: _Users,
    items: _Items,
    rng: np.random.Generator,
    advance: Callable[[int], None],
) -> _Edges:
    """One interaction per user at arrival, then rounds until there are enough distinct ones."""
    everyone = np.arange(config.users)
    edges = _Edges(
        everyone, _choose_items(everyone, users.arrivals, users, items, rng), users.arrivals
    )
    meet = _meet_by_taste
    while len(edges) < config.interactions:
        size = min(BLOCK, config.interactions - len(edges) + 64)
        before = len(edges)
        edges = edges.plus(meet(size, users, items, rng), config.items, config.interactions)
        if len(edges) < before + size // 10:
            # The active users have nearly all the items that they like.
            meet = _meet_by_chance
        advance(len(edges))
    return edges


def _meet_by_taste(size: int, users: _Users, items: _Items, rng: np.random.Generator) -> _Edges:
    """Generate at most ``size`` interactions, those of active users more often, by taste."""
    who = _draw(users.reach, np.full(size, users.reach[-1]), rng)
    when = users.arrivals[who] + rng.exponential(STAY, size)
    who, when = who[when < 1], when[when < 1]
    return _Edges(who, _choose_items(who, when, users, items, rng), when)


def _meet_by_chance(size: int, users: _Users, items: _Items, rng: np.random.Generator) -> _Edges:
    """Generate ``size`` interactions of any user with any item, late enough to find many items."""
    who = rng.integers(len(users.arrivals), size=size)
    start = users.arrivals[who]
    when = start + (1 - start) * rng.random(size) ** 0.25
    return _Edges(who, rng.integers(_existing(items, when)), when)


def _choose_items(
    who: Integers,
    when: NDArray[np.float64],
    users: _Users,
    items: _Items,
    rng: np.random.Generator,
) -> Integers:
    """Return int64 (N,): for each user and time, the candidate that suits best, up to chance."""
    shape = (len(who), CANDIDATES)
    spans = items.reach[_existing(items, when) - 1, None]
    candidates = _draw(items.reach, np.broadcast_to(spans, shape), rng)  # (N, CANDIDATES)
    tastes = _tastes_at(who, when, users)
    match = np.einsum("nf,ncf->nc", tastes, items.tastes[candidates])
    chance = rng.gumbel(size=shape).astype(np.float32)
    best = np.argmax(PICKINESS * match + chance, axis=1)
    chosen: Integers = candidates[np.arange(len(who)), best]
    return chosen


def _existing(items: _Items, when: NDArray[np.float64]) -> Integers:
    """Return int64 (N,): how many items have arrived at each time; the first are there from 0."""
    return np.asarray(np.searchsorted(items.arrivals, when, side="right"), dtype=np.int64)


def _tastes_at(who: Integers, when: NDArray[np.float64], users: _Users) -> Floats:
    """Return float32 (N, FACTORS), unit rows; the drift is complete after twice the usual stay."""
    stayed = np.clip((when - users.arrivals[who]) / (2 * STAY), 0, 1).astype(np.float32)
    return _unit(users.tastes[who] + stayed[:, None] * users.drifts[who])


def _rate(edges: _Edges, users: _Users, items: _Items, rng: np.random.Generator) -> Floats:
    """Return float32 (E,), whole numbers from 1 to 5."""
    match = np.einsum(
        "ef,ef->e", _tastes_at(edges.users, edges.times, users), items.tastes[edges.items]
    )
    ratings = 3.6 + 0.7 * items.quality[edges.items] + 0.4 * match
    ratings += users.generosity[edges.users] + 0.8 * _normal(rng, len(edges))
    return np.asarray(np.clip(np.rint(ratings), 1, 5), dtype=np.float32)


def _pick_categories(config: SynthConfig, brands: Integers, rng: np.random.Generator) -> Integers:
    """Return int64 (I, 3): one to three distinct categories, mostly among the brand's own."""
    home = rng.integers(config.category_count, size=(config.brand_count, 3))
    own = np.take_along_axis(home[brands], rng.integers(3, size=(config.items, 3)), axis=1)
    anywhere = _skewed(config.category_count, config.items, rng)
    own[:, 0] = np.where(rng.random(config.items) < 0.3, anywhere, own[:, 0])
    own[rng.random(config.items) > 0.5, 1] = -1
    own[rng.random(config.items) > 0.2, 2] = -1
    for later, earlier in ((1, 0), (2, 0), (2, 1)):
        own[own[:, later] == own[:, earlier], later] = -1
    return own


def _item_table(config: SynthConfig, items: _Items, ids: pa.Array) -> pa.Table:
    brand_names = _names("brand", config.brand_count)
    category_names = _names("category", config.category_count)
    present = items.categories >= 0
    offsets = np.concatenate([[0], np.cumsum(present.sum(1))]).astype(np.int32)
    flat = category_names.take(pa.array(items.categories[present]))
    return pa.table(
        {
            "item_id": ids,
            "brand": brand_names.take(pa.array(items.brands)),
            "categories": pa.ListArray.from_arrays(pa.array(offsets), flat),
        }
    )


def _skewed(kinds: int, count: int, rng: np.random.Generator) -> Integers:
    """Return int64 (count,) in 0..kinds-1: sizes fall as in Zipf's law, from at least about 5."""
    least = np.tile(np.arange(kinds), 5)[: count // 2]
    weights = 1 / (np.arange(kinds) + 3.0)
    others = rng.choice(kinds, size=count - len(least), p=weights / weights.sum())
    return rng.permutation(np.concatenate([least, others]))


def _arrivals(count: int, at_start: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return float64 (count,), ascending: a share at 0, of at least one, and the rest evenly."""
    arrivals: NDArray[np.float64] = rng.random(count)
    arrivals[: max(1, round(at_start * count))] = 0
    return np.sort(arrivals)


def _pareto(count: int, exponent: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return float64 (count,) of at least 1, whose tail falls as x**-exponent.

    Cut at the largest value to be expected of so many, lest one item take half of everything.
    """
    weights: NDArray[np.float64] = 1 + rng.pareto(exponent, count)
    return weights.clip(max=count ** (1 / exponent))


def _draw(
    reach: NDArray[np.float64], spans: NDArray[np.float64], rng: np.random.Generator
) -> Integers:
    """Return int64, of the shape of ``spans``: numbers drawn by weight from those within a span.

    ``reach`` (K,) is the running sum of the weights; each span is one of its elements.
    """
    points = rng.random(spans.shape) * spans
    # A product that rounds up to the span itself would name the number after the last.
    points = np.minimum(points, np.nextafter(spans, 0))
    return np.asarray(np.searchsorted(reach, points, side="right"), dtype=np.int64)


def _shuffled_ids(letter: str, count: int, digits: int, rng: np.random.Generator) -> pa.Array:
    """Return ``count`` ids in random order, so that an id says nothing about its arrival."""
    width = max(digits, len(str(count - 1)))
    return pa.array([f"{letter}{number:0{width}d}" for number in rng.permutation(count)])


def _names(kind: str, count: int) -> pa.Array:
    width = len(str(count - 1))
    return pa.array([f"{kind}-{number:0{width}d}" for number in range(count)])


def _normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape, dtype=np.float32)


def _unit(rows: Floats) -> Floats:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def _standard(values: Floats) -> Floats:
    """Shift and scale to mean 0 and variance 1; a single value becomes 0."""
    return np.asarray((values - values.mean()) / max(values.std(), 1e-6), dtype=np.float32)
