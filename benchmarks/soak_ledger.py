"""The soak's own idea of what every state S.d holds, made from what it meant and not from answers.

The registry gives the names: which snapshots and deltas there are, what went live after what. What
they hold is worked out here, from the vectors that were published and changed, by the rules that
the documentation states. A name whose contents cannot be explained so is a fault.
"""

from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from threading import RLock

import numpy as np
from numpy.typing import NDArray

from backcast.versions import Entity

Row = NDArray[np.float32]
Id = tuple[Entity, str]
Vectors = Mapping[Id, Row]
Step = tuple[NDArray[np.float64], NDArray[np.float64]]


class UnknownState(Exception):
    """The ledger has not heard of this S.d yet."""


@dataclass(frozen=True, eq=False)
class Models:
    """Versions and the maps between them.

    Attributes:
        parents: of each version, None for the first.
        dims: D_k by version.
        steps: weight (D_parent, D_k) and bias (D_parent,) of the map to the parent, by version.
    """

    parents: Mapping[int, int | None]
    dims: Mapping[int, int]
    steps: Mapping[int, Step]

    def chain(self, version: int) -> list[int]:
        """Return a version and its ancestors, newest first."""
        parent = self.parents[version]
        return [version, *([] if parent is None else self.chain(parent))]

    def reference(self, target: int, live: int, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Take (n, D_live) to (n, D_target), one map after the other, in float64."""
        while live != target:
            weight, bias = self.steps[live]
            rows = rows @ weight.T + bias
            parent = self.parents[live]
            assert parent is not None, f"{target} is no ancestor"
            live = parent
        return rows

    def bound(self, target: int, live: int) -> tuple[float, float]:
        """Return ‖W_live^target‖₂ and the length of its bias."""
        return _bound(self, target, live)


@cache
def _bound(models: Models, target: int, live: int) -> tuple[float, float]:
    origin = models.reference(target, live, np.zeros((1, models.dims[live])))
    columns = models.reference(target, live, np.eye(models.dims[live])) - origin
    return float(np.linalg.norm(columns, ord=2)), float(np.linalg.norm(origin))


@dataclass
class _Contents:
    """One snapshot and its deltas: of each changed id, the numbers of its changes."""

    version: int
    base: Vectors
    put: AbstractSet[Id]  # of the base: whose vectors were once upserted
    base_snapshot: str | None
    base_delta: int
    head: int = 0
    changes: dict[Id, list[tuple[int, Row | None]]] = field(default_factory=dict)

    def at(self, delta: int, id: Id) -> Row | None:
        for number, row in reversed(self.changes.get(id, ())):
            if number <= delta:
                return row
        return self.base.get(id)

    def put_at(self, delta: int) -> dict[Id, Row]:
        """Return the vectors of S.d that were upserted, on this snapshot or before it.

        Those that were erased on it later are none any more, be the id put again elsewhere.
        """
        changed = {id for id, found in self.changes.items() if any(n <= delta for n, _ in found)}
        kept = (id for id in self.put | changed if not self._erased_after(delta, id))
        rows = {id: self.at(delta, id) for id in kept}
        return {id: row for id, row in rows.items() if row is not None}

    def _erased_after(self, delta: int, id: Id) -> bool:
        return any(number > delta and row is None for number, row in self.changes.get(id, ()))


@dataclass(frozen=True)
class Publication:
    """Vectors that are being published; None for a compaction: those of the state live then."""

    version: int
    vectors: Vectors | None


@dataclass(frozen=True)
class Span:
    """A snapshot while it was live: from the delta it went live with to the one it left with."""

    snapshot: str
    first: int
    last: int


class Ledger:
    """What each id's vector is in each S.d; safe to use from several threads."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self._lock = RLock()
        self._contents: dict[str, _Contents] = {}
        self._meant: dict[Id, list[Row]] = {}
        self._doomed: set[Id] = set()
        self._publication: Publication | None = None

    # What is meant, said before it is done.

    def will_publish(self, version: int, vectors: Vectors | None) -> None:
        """Note that the next snapshot is of this version; None: a compaction."""
        with self._lock:
            self._publication = Publication(version, vectors)

    def will_upsert(self, vectors: Vectors) -> None:
        """Note vectors that may be found in deltas from now on."""
        with self._lock:
            for id, row in vectors.items():
                self._meant.setdefault(id, []).append(row)

    def will_erase(self, ids: Sequence[Id]) -> None:
        """Note ids that deltas may erase from now on."""
        with self._lock:
            self._doomed |= set(ids)

    # What the registry names.

    def add_snapshot(
        self,
        id: str,
        version: int,
        base: tuple[str, int] | None = None,
        erased: AbstractSet[Id] = frozenset(),
    ) -> None:
        """Take up a snapshot that was published from ``base``, the last S.d of its version then.

        ``erased`` are the ids that it leaves out.

        Raises:
            ValueError: nobody meant to publish it.
        """
        with self._lock:
            meant = self._publication
            if meant is None or meant.version != version:
                raise ValueError(f"snapshot {id} of version {version} was not meant")
            vectors, put = self._published(meant, base)
            kept = {key: row for key, row in vectors.items() if key not in erased}
            self._contents[id] = _Contents(version, kept, put, *(base or (None, 0)))
            self._publication = None

    def _published(
        self, meant: Publication, base: tuple[str, int] | None
    ) -> tuple[Vectors, AbstractSet[Id]]:
        """Return what is published: what was meant, and what was put and is not among it."""
        put = {} if base is None else self._contents[base[0]].put_at(base[1])
        if meant.vectors is None:
            assert base is not None
            return self.everything(*base), put.keys()
        added = {id: row for id, row in put.items() if id not in meant.vectors}
        return {**meant.vectors, **added}, added.keys()

    def add_delta(self, snapshot: str, number: int, changes: Mapping[Id, Row | None]) -> None:
        """Take up the next delta of a snapshot.

        Raises:
            ValueError: nobody meant one of its vectors.
        """
        with self._lock:
            contents = self._contents[snapshot]
            assert number == contents.head + 1, f"{snapshot}.{number} after {contents.head}"
            for id, row in changes.items():
                if not self._was_meant(id, row):
                    raise ValueError(f"{snapshot}.{number} changes {id} to what nobody meant")
            for id, row in changes.items():
                contents.changes.setdefault(id, []).append((number, row))
            contents.head = number

    def _was_meant(self, id: Id, row: Row | None) -> bool:
        if row is None:
            return id in self._doomed
        return any(np.array_equal(row, known) for known in self._meant.get(id, ()))

    def carried(
        self, lived: Sequence[Span], target: Span, condemned: AbstractSet[str] = frozenset()
    ) -> list[tuple[Id, str]]:
        """Return what is wrong with a switch to ``target``: id and words.

        ``lived`` are the spans before it, newest first; ``target`` goes from the head that the
        snapshot had before the switch to the one after it. Upserts of the same version that are
        newer than the target must have come with it, and nothing else. What was put on a condemned
        snapshot, or before it, may have come: its files may have been there still.
        """
        with self._lock:
            kept = list(takewhile(lambda span: span.snapshot not in condemned, lived))
            wanted = self._newer(kept, target.snapshot)
            known = self._newer(lived, target.snapshot)
            found = {
                id: row
                for id, changes in self._contents[target.snapshot].changes.items()
                for number, row in changes
                if target.first < number <= target.last
            }
        found = {id: row for id, row in found.items() if row is not None or id in known}
        lost = [(id, "is not carried over") for id in wanted if id not in found]
        strange = [(id, "is carried over for no reason") for id in found if id not in known]
        other = [
            (id, "is carried over with another vector")
            for id, row in known.items()
            if id in found and not _same(row, found[id])
        ]
        return lost + strange + other

    def _newer(self, lived: Sequence[Span], target: str) -> dict[Id, Row]:
        """Return the last vector of each id that was put since the target was begun."""
        new, rows = self._contents[target], dict[Id, Row | None]()
        was_live = any(span.snapshot == target for span in lived)
        for span in lived:
            if span.snapshot == target:
                break
            contents = self._contents[span.snapshot]
            is_base = span.snapshot == new.base_snapshot and not was_live
            first = new.base_delta if is_base else span.first
            for id, changes in contents.changes.items():
                if any(first < number <= span.last for number, _ in changes):
                    row = contents.at(span.last, id)
                    # Vectors of another version are not for this one; that an id is erased, is.
                    if row is None or contents.version == new.version:
                        rows.setdefault(id, row)
            if is_base:
                break
        return {id: row for id, row in rows.items() if row is not None}

    # What answers are compared with.

    def version_of(self, snapshot: str) -> int:
        """Return k of a snapshot; raise UnknownState."""
        with self._lock:
            return self._known(snapshot).version

    def head(self, snapshot: str) -> int:
        """Return the number of a snapshot's last delta; raise UnknownState."""
        with self._lock:
            return self._known(snapshot).head

    def snapshots(self) -> list[str]:
        """Return every snapshot that was taken up."""
        with self._lock:
            return list(self._contents)

    def knows(self, snapshot: str) -> bool:
        """Return whether a snapshot was taken up."""
        with self._lock:
            return snapshot in self._contents

    def rows(
        self, snapshot: str, delta: int, entity: Entity, ids: Sequence[str]
    ) -> list[Row | None]:
        """Return the vector of each id in S.d, None where there is none; raise UnknownState."""
        with self._lock:
            contents = self._known(snapshot)
            if delta > contents.head:
                raise UnknownState(f"{snapshot}.{delta}")
            return [contents.at(delta, (entity, id)) for id in ids]

    def everything(self, snapshot: str, delta: int) -> dict[Id, Row]:
        """Return all that S.d holds."""
        with self._lock:
            contents = self._known(snapshot)
            rows = {id: contents.at(delta, id) for id in {*contents.base, *contents.changes}}
            return {id: row for id, row in rows.items() if row is not None}

    def others(self, entity: Entity, id: str) -> Iterator[tuple[str, int, Row]]:
        """Yield every vector that an id ever had: snapshot, delta, vector."""
        with self._lock:
            found = [
                (name, number, row)
                for name, contents in self._contents.items()
                for number, row in (
                    (0, contents.base.get((entity, id))),
                    *contents.changes.get((entity, id), ()),
                )
                if row is not None
            ]
        yield from found

    def _known(self, snapshot: str) -> _Contents:
        contents = self._contents.get(snapshot)
        if contents is None:
            raise UnknownState(snapshot)
        return contents


def _same(row: Row | None, other: Row | None) -> bool:
    return row is not None and other is not None and np.array_equal(row, other)
