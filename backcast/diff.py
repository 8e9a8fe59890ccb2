"""What every consumer would see change: a candidate's vectors beside what is live, streamed.

For each version j that both sides serve, and each id that both hold, after = W_k^j z_k and
before = W_live^j z_live, each by the map that is really served, as float32; Δ = after - before is
the change of the ver-j vector, exactly as its consumer will see it. Norms are taken in float64.

The candidate comes in batches, what is live is gathered for the ids of each. What is held does not
grow with the number of vectors, but for 8 bytes an id, which tell what was lost.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from backcast.spreads import Spread, Tally
from backcast.stores import StoredSnapshot
from backcast.transforms import AffineMap, behaviour
from backcast.vectors import VectorBatch, norms
from backcast.versions import Entity

NAMED = 20
"""How many gained and lost ids are named."""

MOST_CHANGED = 10
_ROWS = 4_096  # compared at once: they stay in the processor's cache

Rows = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Route:
    """How the vectors of one version are made before and after; None: they are stored so."""

    version: int
    before: AffineMap | None
    after: AffineMap | None


@dataclass(frozen=True)
class Mover:
    """One id and how far its vector moves; ``relative`` to its length before."""

    id: str
    absolute: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class Turn:
    """Cosines between vectors before and after: 5 % are below ``p05``."""

    mean: float
    p05: float
    min: float


@dataclass(frozen=True)
class Change:
    """How the vectors of one version and one entity kind change.

    Attributes:
        compared: ids that both sides hold.
        without_length: of those, how many vectors are zero before (no relative change) or on
            either side (no cosine).
        not_finite: of those, how many products overflow float32; they are in no other figure.
        absolute: of ‖Δ‖. relative: of ‖Δ‖ / ‖before‖.
        most_changed: the ids that change most relative to their length, most first.
    """

    compared: int
    without_length: int
    not_finite: int
    absolute: Spread | None
    relative: Spread | None
    cosine: Turn | None
    most_changed: Sequence[Mover]


@dataclass(frozen=True)
class Overlap:
    """Which ids of one entity kind both sides hold; the first of the others are named."""

    before: int
    after: int
    compared: int
    gained: int
    lost: int
    gained_ids: Sequence[str] = ()
    lost_ids: Sequence[str] = ()

    @property
    def coverage(self) -> float:
        """The fraction of the live ids that the candidate holds; 1 where there are none."""
        return self.compared / self.before if self.before else 1.0


@dataclass(frozen=True)
class TargetDiff:
    """What the consumers of one version would see.

    Attributes:
        gain: the largest singular value of W_k^j. condition: that over the smallest; None where
            it is infinite.
    """

    version: int
    gain: float
    condition: float | None
    entities: Mapping[Entity, Change]

    def figures(self) -> dict[str, Any]:
        """Return it as a JSON document, without the version's number."""
        return {
            "gain": self.gain,
            "condition": self.condition,
            "entities": {str(entity): asdict(change) for entity, change in self.entities.items()},
        }


@dataclass(frozen=True)
class Diff:
    """What a promotion changes: ids by entity kind, vectors by version, the newest first."""

    ids: Mapping[Entity, Overlap]
    targets: Sequence[TargetDiff]

    def ids_document(self) -> dict[str, Any]:
        """Return which ids come and go, as a JSON document."""
        return {str(entity): asdict(overlap) for entity, overlap in self.ids.items()}

    def document(self) -> dict[str, Any]:
        """Return it as a JSON document."""
        return {
            "ids": self.ids_document(),
            "versions": [{"version": t.version, **t.figures()} for t in self.targets],
        }


@dataclass(frozen=True, eq=False)
class Moved:
    """A batch after comparison.

    Attributes:
        found: (n,) bool, whether the id is live.
        distances: (n, J) float64, ‖Δ‖ by route; NaN where the id is not live.
    """

    entity: Entity
    ids: Sequence[str]
    found: NDArray[np.bool_]
    distances: NDArray[np.float64]


class Comparison:
    """Takes the candidate's batches, and then says what is different.

    Args:
        live: what is served now.
        routes: one for each version that both sides serve.
    """

    def __init__(self, live: StoredSnapshot, routes: Sequence[Route]) -> None:
        self.routes = routes
        self._live = live
        self._served = [(_served(route.before), _served(route.after)) for route in routes]
        self._ids = {entity: _Ids() for entity in live.counts}
        self._changes: dict[Entity, list[_Changes]] = {}

    def take(self, batch: VectorBatch) -> Moved:
        """Compare a batch of ids that were in none before; return how far each vector moves."""
        gathered = self._live.gather(batch.entity, batch.ids)
        found = gathered.found
        self._ids.setdefault(batch.entity, _Ids()).add(batch.ids, found)
        distances = np.full((len(batch.ids), len(self.routes)), np.nan)
        changes = self._changes.setdefault(batch.entity, [_Changes() for _ in self.routes])
        rows = np.flatnonzero(found)
        for start in range(0, len(rows), _ROWS):
            piece = rows[start : start + _ROWS]
            before, after = gathered.vectors[piece], batch.vectors[piece]
            for at, (map_before, map_after) in enumerate(self._served):
                distances[piece, at] = changes[at].add(
                    batch.ids, piece, map_before(before), map_after(after)
                )
        return Moved(batch.entity, batch.ids, found, distances)

    def missing(self) -> Mapping[Entity, int]:
        """Return how many live ids no batch has held so far, by entity kind."""
        return {
            entity: self._live.counts.get(entity, 0) - known.compared
            for entity, known in self._ids.items()
        }

    def without(self, entity: Entity, live_ids: Sequence[str]) -> list[str]:
        """Return those of some live ids that no batch has held."""
        held = self._ids[entity].held(live_ids)
        return [id for id, known in zip(live_ids, held.tolist(), strict=True) if not known]

    def result(self, lost: Mapping[Entity, Sequence[str]]) -> Diff:
        """Return what all batches amount to; ``lost`` names live ids that none of them held."""
        missing = self.missing()
        ids = {
            entity: Overlap(
                before=self._live.counts.get(entity, 0),
                after=known.count,
                compared=known.compared,
                gained=known.count - known.compared,
                lost=missing[entity],
                gained_ids=tuple(known.gained),
                lost_ids=tuple(lost.get(entity, ())),
            )
            for entity, known in sorted(self._ids.items())
        }
        return Diff(ids, [self._target(at, route) for at, route in enumerate(self.routes)])

    def _target(self, at: int, route: Route) -> TargetDiff:
        gain, condition = (1.0, 1.0) if route.after is None else behaviour(route.after.weight)
        changes = {entity: c[at].result() for entity, c in sorted(self._changes.items())}
        return TargetDiff(route.version, gain, condition, changes)


class _Served:
    """A map as it is served: float32."""

    def __init__(self, mapped: AffineMap) -> None:
        self._columns = np.ascontiguousarray(mapped.weight.T.astype(np.float32))
        self._bias = None if mapped.bias is None else mapped.bias.astype(np.float32)

    def __call__(self, vectors: Rows) -> Rows:
        with np.errstate(over="ignore", invalid="ignore"):  # counted, and refused by a gate
            product: Rows = vectors @ self._columns
            return product if self._bias is None else product + self._bias


def _stored(vectors: Rows) -> Rows:
    return vectors


def _served(mapped: AffineMap | None) -> Callable[[Rows], Rows]:
    return _stored if mapped is None else _Served(mapped)


@dataclass
class _Ids:
    """The candidate's ids of one entity kind: how many, which are new, and a hash of each."""

    count: int = 0
    compared: int = 0
    gained: list[str] = field(default_factory=list)
    hashes: list[NDArray[np.uint64]] = field(default_factory=list)
    ordered: NDArray[np.uint64] | None = None

    def add(self, ids: Sequence[str], found: NDArray[np.bool_]) -> None:
        self.count += len(ids)
        self.compared += int(np.count_nonzero(found))
        if len(self.gained) < NAMED:
            new = np.flatnonzero(~found)[: NAMED - len(self.gained)]
            self.gained += [ids[row] for row in new]
        self.hashes.append(_hashes(ids))

    def held(self, ids: Sequence[str]) -> NDArray[np.bool_]:
        if self.ordered is None:
            self.ordered = np.concatenate([*self.hashes, np.empty(0, np.uint64)])
            self.ordered.sort()
            self.hashes.clear()
        ordered, wanted = self.ordered, _hashes(ids)
        at = np.searchsorted(ordered, wanted)
        inside = at < len(ordered)
        inside[inside] = ordered[at[inside]] == wanted[inside]
        return inside


def _hashes(ids: Sequence[str]) -> NDArray[np.uint64]:
    encoded = map(str.encode, ids)
    return np.fromiter(map(xxhash.xxh3_64_intdigest, encoded), np.uint64, len(ids))


class _Changes:
    """Adds up how the vectors of one version and one entity kind change."""

    def __init__(self) -> None:
        self._absolute, self._relative, self._turned = Tally(), Tally(), Tally()
        self._compared = self._without_length = self._not_finite = 0
        self._most: list[Mover] = []

    def add(
        self, ids: Sequence[str], rows: NDArray[np.intp], before: Rows, after: Rows
    ) -> NDArray[np.float64]:
        """Take the vectors of ``rows``, each (n, D_j); return ‖Δ‖, (n,)."""
        with np.errstate(over="ignore", invalid="ignore"):
            moved, was, now = norms(after - before), norms(before), norms(after)
        self._compared += len(rows)
        finite = np.isfinite(moved) & np.isfinite(was) & np.isfinite(now)
        if not finite.all():
            self._not_finite += int(np.count_nonzero(~finite))
        self._absolute.add(moved[finite])
        long = finite & (was > 0)
        relative = np.divide(moved, was, out=np.zeros_like(moved), where=long)
        self._relative.add(relative[long])
        turning = long & (now > 0)
        self._without_length += int(np.count_nonzero(finite & ~turning))
        turned = np.zeros_like(moved)  # 1 - cosine, without the loss of digits where it is small
        turned[turning] = _turned(moved[turning], was[turning], now[turning])
        self._turned.add(turned[turning])
        self._keep_most_changed(ids, rows, moved, relative, turned)
        return moved

    def _keep_most_changed(
        self,
        ids: Sequence[str],
        rows: NDArray[np.intp],
        moved: NDArray[np.float64],
        relative: NDArray[np.float64],
        turned: NDArray[np.float64],
    ) -> None:
        least = self._most[-1].relative if len(self._most) == MOST_CHANGED else 0.0
        ahead = np.flatnonzero(relative > least)
        if len(ahead) > MOST_CHANGED:
            ahead = ahead[np.argpartition(relative[ahead], -MOST_CHANGED)[-MOST_CHANGED:]]
        new = [
            Mover(ids[rows[at]], float(moved[at]), float(relative[at]), 1 - float(turned[at]))
            for at in ahead
        ]
        self._most = sorted([*self._most, *new], key=lambda m: -m.relative)[:MOST_CHANGED]

    def result(self) -> Change:
        turned = self._turned.spread()
        return Change(
            self._compared,
            self._without_length,
            self._not_finite,
            self._absolute.spread(),
            self._relative.spread(),
            None if turned is None else Turn(1 - turned.mean, 1 - turned.p95, 1 - turned.max),
            tuple(self._most),
        )


def _turned(
    moved: NDArray[np.float64], was: NDArray[np.float64], now: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return 1 - cosine of vectors of these lengths whose difference has this one."""
    with np.errstate(over="ignore", under="ignore"):
        turned = (moved + (was - now)) / was * ((moved - (was - now)) / now) / 2
    return np.clip(turned, 0.0, 2.0)
