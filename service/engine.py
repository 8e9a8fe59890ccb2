"""The serving engine: one immutable Snapshot for each state served, and the swap between them.

It knows no HTTP. A request takes one Snapshot and uses nothing else, so that vectors of one
version can never meet weights of another.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from threading import Lock
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backcast.artifacts import Artifacts
from backcast.chains import load_chain
from backcast.changes import ChangedSnapshot, read_changes
from backcast.devices import choose_device
from backcast.drift import DriftBounds, LiveDrift, open_bounds
from backcast.errors import (
    ArtifactError,
    BackcastError,
    NotReady,
    SnapshotMismatch,
    SnapshotNotLoaded,
    StoreError,
    UnknownSnapshot,
    UnknownVersion,
    VersionNotPromoted,
    VersionOffChain,
    VersionRetired,
)
from backcast.registry import Catalog, Registry
from backcast.registry.database import utc_now
from backcast.stores import VectorStore, is_embedded
from backcast.transforms import AffineMap, behaviour
from backcast.versions import Entity, Lineage, Live, Transform, Version, VersionState

logger = logging.getLogger(__name__)

_ROWS = 2_048  # of a batch that are mapped at once: they stay in the processor's cache
_SMALL = 2**18  # numbers of a map; beyond, NumPy wakes other threads and waits for them
_MULTIPLYING = Lock()  # a product takes all of a worker's cores; two at once would fight for them


class Embeddings(NamedTuple):
    """Vectors of one version, in the order of the ids asked for.

    A frozen dataclass would take a microsecond longer to make, for every vector served.

    Attributes:
        vectors: (n, D_j) float32; rows of unknown ids are NaN. What is stored is always finite,
            so NaN says that a vector is missing and nothing else.
        found: (n,) bool.
        drift: (n,) float32, the drift bounds where they were asked for; NaN where there is none.
        seconds: what lookup and reading took, and what the products took; 0 without any.
    """

    vectors: NDArray[np.float32]
    found: NDArray[np.bool_]
    drift: NDArray[np.float32] | None = None
    seconds: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, eq=False)
class ServedMap:
    """W_k^j, composed in float64 and kept as float32 on the device.

    Attributes:
        weight: (D_j, D_k).
        bias: (D_j,), or None.
    """

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def on(cls, device: torch.device, composed: AffineMap) -> "ServedMap":
        """Bring a composed map to the device."""

        def moved(array: NDArray[np.float64]) -> Tensor:
            return torch.from_numpy(array.astype(np.float32)).to(device)

        return cls(moved(composed.weight), None if composed.bias is None else moved(composed.bias))

    def __call__(self, stored: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        """Write what ``stored`` of shape (n, D_k) maps to into ``out`` of shape (n, D_j)."""
        if len(stored) == 1 and self._small is not None:
            weight, bias = self._small
            np.dot(weight, stored[0], out=out[0])
            if bias is not None:
                out += bias
            return
        z, answer = torch.from_numpy(stored), torch.from_numpy(out)
        with nullcontext() if len(z) == 1 else _MULTIPLYING:
            if self.weight.device.type == "cpu":
                self._multiply(z, answer)
            else:
                answer.copy_(self._multiply(z.to(self.weight.device)))

    def _multiply(self, z: Tensor, out: Tensor | None = None) -> Tensor:
        if self.bias is None:
            return torch.mm(z, self._columns, out=out)
        return torch.addmm(self.bias, z, self._columns, out=out)

    @cached_property
    def _columns(self) -> Tensor:
        return self.weight.T

    @cached_property
    def _small(self) -> tuple[NDArray[np.float32], NDArray[np.float32] | None] | None:
        # For one vector and a small map torch's own work takes longer than the product.
        if self.weight.device.type != "cpu" or self.weight.numel() > _SMALL:
            return None
        return self.weight.numpy(), None if self.bias is None else self.bias.numpy()

    @cached_property
    def behaviour(self) -> tuple[float, float | None]:
        """The largest singular value of W_k^j, and its condition number (None: infinite)."""
        return behaviour(self.weight.double().cpu().numpy())


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything that a request is answered from, as it was at one moment.

    Attributes:
        live: version k, snapshot S, delta d and generation.
        dim: D_k.
        store: the ver-k vectors as stored, and the changes on them.
        maps: W_k^j for every other version j on the chain of k, retired ones included.
        transforms: what the maps were composed of.
        versions: the record of every version, by number.
        bounds: the drift bounds of S, where there are any and the store holds them.
        at_hand: one vector is found and mapped on this host's CPU, from memory, in less time than
            it takes to hand the work to another thread.
        published_at: when S was written.
    """

    live: Live
    dim: int
    store: ChangedSnapshot
    maps: Mapping[int, ServedMap]
    transforms: frozenset[Transform]
    versions: Mapping[int, Version]
    at_hand: bool
    loaded_at: datetime
    published_at: datetime
    bounds: DriftBounds | None = None

    @property
    def name(self) -> str:
        """S.d: the snapshot, and the last delta on it."""
        return self.live.name

    def with_endings(self, versions: Mapping[int, Version]) -> "Snapshot":
        """Return the snapshot with what was deprecated or retired meanwhile on its chain."""
        chain = {j: versions[j] for j in (*self.maps, self.live.version)}
        return replace(self, versions={**self.versions, **chain})

    @cached_property
    def servable(self) -> tuple[int, ...]:
        """The versions that can be asked for, oldest first."""
        chain = (*self.maps, self.live.version)
        return tuple(j for j in sorted(chain) if self.versions[j].state is not VersionState.RETIRED)

    def resolve(self, version: int) -> Version:
        """Return the record of a servable version; no other is ever put in its place.

        Raises:
            UnknownVersion, VersionRetired, VersionNotPromoted, VersionOffChain: why it is not.
        """
        if version in self.servable:
            return self.versions[version]
        record = self.versions.get(version)
        if record is None:
            raise UnknownVersion(version, self.servable)
        if record.state is VersionState.RETIRED:
            raise VersionRetired(version, self.servable, record.note)
        if record.state is VersionState.REGISTERED and version > self.live.version:
            raise VersionNotPromoted(version, self.live.version, self.servable)
        raise VersionOffChain(version, self.live.version, self.servable, record.state, record.note)

    def vectors(self, entity: Entity, ids: Sequence[str], version: int) -> Embeddings:
        """Return ver-``version`` vectors of ``ids``; order and duplicates kept.

        Raises:
            UnknownVersion, VersionRetired, VersionNotPromoted, VersionOffChain: see ``resolve``.
            StoreError: the vector store does not answer.
        """
        dim = self.resolve(version).dim
        gathering = mapping = 0.0
        if version == self.live.version:
            started = perf_counter()
            gathered = self.store.gather(entity, ids)
            gathering = perf_counter() - started
            rows, found = gathered.vectors, gathered.found
        else:
            rows, found = np.empty((len(ids), dim), np.float32), np.empty(len(ids), np.bool_)
            for start in range(0, len(ids), _ROWS):
                piece = slice(start, start + _ROWS)
                started = perf_counter()
                gathered = self.store.gather(entity, ids[piece])
                reached = perf_counter()
                self.maps[version](gathered.vectors, out=rows[piece])
                gathering += reached - started
                mapping += perf_counter() - reached
                found[piece] = gathered.found
        if np.count_nonzero(found) < len(found):
            rows[~found] = np.nan
        return Embeddings(rows, found, seconds=(gathering, mapping))

    def with_drift(self, entity: Entity, ids: Sequence[str], version: int) -> Embeddings:
        """Return the same, and the drift bound of each vector.

        Raises:
            UnknownVersion, VersionRetired, VersionNotPromoted, VersionOffChain: see ``resolve``.
            StoreError: the vector store does not answer.
        """
        rows = self.vectors(entity, ids, version)
        return rows._replace(drift=self.drift.of(entity, ids, version))

    @cached_property
    def drift(self) -> LiveDrift:
        """How far each vector may be from the last one stored."""

        def mapped(version: int, stored: NDArray[np.float32]) -> NDArray[np.float32]:
            rows = np.empty((len(stored), self.versions[version].dim), np.float32)
            self.maps[version](stored, out=rows)
            return rows

        return LiveDrift(self.live.version, self.store, self.bounds, mapped)


@dataclass(frozen=True, eq=False)
class View:
    """What a replica knows at one moment.

    Attributes:
        versions: the record of every version, by number.
        snapshot: what is served, None before the first promotion.
        kept: superseded snapshots in their grace period, by S. Each is the world as it was when
            its successor went live, but for versions that were deprecated or retired since.
        read_at: when the registry was last read; None before.
    """

    versions: Mapping[int, Version] = field(default_factory=dict)
    snapshot: Snapshot | None = None
    kept: Mapping[str, Snapshot] = field(default_factory=dict)
    read_at: datetime | None = None

    def find(self, name: str) -> Snapshot | None:
        """Return the snapshot called S or S.d, if it can be served."""
        served = [self.snapshot, *self.kept.values()]
        return next((s for s in served if s and name in {s.live.snapshot, s.name}), None)


class Engine:
    """Follows what is live. Readers never wait: a new Snapshot is loaded beside the old one."""

    def __init__(
        self, registry: Registry, artifacts: Artifacts, store: VectorStore, device: str
    ) -> None:
        self._registry, self._artifacts, self._store = registry, artifacts, store
        self._device = choose_device(device)
        # TF32 and bfloat16 would cost five of the seven digits that are promised.
        torch.set_float32_matmul_precision("highest")
        self._refreshing = Lock()
        self._view = View()

    @property
    def view(self) -> View:
        """What this replica knows now."""
        return self._view

    def current(self) -> Snapshot:
        """Return what is served now; raise NotReady where that is nothing."""
        snapshot = self._view.snapshot
        if snapshot is None:
            raise NotReady(
                "Nothing can be served yet: no version was promoted, or what is live could not "
                "be loaded here and the log says why."
            )
        return snapshot

    def probe(self) -> Snapshot:
        """Return what is served now, if the store still has it; asks the store for its marker.

        Raises:
            NotReady: nothing is served.
            SnapshotNotLoaded: the store has lost it.
            StoreError: the store does not answer.
        """
        snapshot = self.current()
        try:
            self._store.open(snapshot.live.snapshot)
        except SnapshotNotLoaded:  # or was it superseded, and deleted, since the last look?
            self.refresh()
            snapshot = self.current()
            self._store.open(snapshot.live.snapshot)
        return snapshot

    def expecting(self, name: str) -> Snapshot:
        """Return the snapshot called S or S.d, current or in its grace period.

        A name that is not known here may be newer than the last look at the registry.

        Raises:
            SnapshotMismatch: no such snapshot is served (any more).
            NotReady: none is.
        """
        found = self._view.find(name)
        if found is None:
            self.refresh()
            self._keep_superseded(name.partition(".")[0])
            found = self._view.find(name)
        if found is None:
            raise SnapshotMismatch(name, self.current().name)
        return found

    def refresh(self) -> None:
        """Read what is live and swap it in; what was served goes on being served after an error.

        Raises:
            RegistryError, ArtifactError, StoreError: what is live cannot be read.
        """
        with self._refreshing:
            catalog = self._registry.deployments.catalog()
            before = replace(self._view, read_at=utc_now())
            versions = {v.number: v for v in catalog.versions}
            try:
                snapshot = self._follow(catalog, versions, before.snapshot)
            except BackcastError:
                self._view = self._held_on(before, versions)
                raise
            kept = self._still_kept(before, snapshot, versions)
            self._view = View(versions, snapshot, kept, before.read_at)

    def _held_on(self, before: View, versions: Mapping[int, Version]) -> View:
        """Return what was served without what was erased or retired meanwhile.

        Until what is live can be loaded is too long to go on answering with that.
        """
        if before.snapshot is None:
            return before
        kept = self._still_kept(before, None, versions)
        snapshot = kept.pop(before.snapshot.live.snapshot, before.snapshot)
        return replace(before, snapshot=snapshot, kept=kept)

    def _keep_superseded(self, id: str) -> None:
        """Load a snapshot that went out of service before this replica saw it, in its grace."""
        with self._refreshing:
            try:
                record = self._registry.snapshots.get(id)
            except UnknownSnapshot:
                return
            if record.superseded_at is None or record.condemned_at is not None:
                return
            was_live = Live(record.version, id, record.head, generation=0)
            catalog = self._registry.deployments.catalog()
            try:
                snapshot = self._load(catalog, was_live)
            except SnapshotNotLoaded:  # it was published, and never live
                return
            self._view = replace(self._view, kept={**self._view.kept, id: snapshot})

    def _follow(
        self, catalog: Catalog, versions: Mapping[int, Version], before: Snapshot | None
    ) -> Snapshot | None:
        if catalog.live is None:
            return None
        transforms = _transforms_of(catalog, catalog.live.version)
        same = before is not None and replace(before.live, delta=0) == replace(
            catalog.live, delta=0
        )
        if before is None or not same or before.transforms != transforms:
            return self._load(catalog, catalog.live)
        return replace(self._changed(before, catalog.live.delta), versions=versions)

    def _changed(self, snapshot: Snapshot, delta: int) -> Snapshot:
        """Return the snapshot with its deltas up to ``delta``."""
        live = snapshot.live
        if delta == live.delta:
            return snapshot
        records = self._registry.deltas.of(live.snapshot, after=live.delta, upto=delta)
        changes = read_changes(self._artifacts, records, snapshot.store.changes)
        return replace(
            snapshot,
            live=replace(live, delta=delta),
            store=ChangedSnapshot(snapshot.store.stored, changes),
        )

    def _load(self, catalog: Catalog, live: Live) -> Snapshot:
        versions = {v.number: v for v in catalog.versions}
        return Snapshot(
            live=live,
            dim=versions[live.version].dim,
            store=self._open(live, versions[live.version].dim),
            maps=self._maps(catalog, live.version),
            transforms=_transforms_of(catalog, live.version),
            versions=versions,
            at_hand=is_embedded(self._store) and self._device.type == "cpu",
            loaded_at=utc_now(),
            published_at=self._registry.snapshots.get(live.snapshot).created_at,
            bounds=open_bounds(self._registry.drifts.of(live.snapshot), self._store),
        )

    def _open(self, live: Live, dim: int) -> ChangedSnapshot:
        stored = self._store.open(live.snapshot)
        if stored.dim != dim:
            raise StoreError(
                f"Snapshot {live.snapshot} has dim {stored.dim} in the vector store; "
                f"version {live.version} has {dim}."
            )
        records = self._registry.deltas.of(live.snapshot, upto=live.delta)
        return ChangedSnapshot(stored, read_changes(self._artifacts, records))

    def _maps(self, catalog: Catalog, live: int) -> dict[int, ServedMap]:
        composed = load_chain(catalog, self._artifacts, live)
        return {j: ServedMap.on(self._device, m) for j, m in composed.items() if j != live}

    def _still_kept(
        self, before: View, snapshot: Snapshot | None, versions: Mapping[int, Version]
    ) -> dict[str, Snapshot]:
        known = dict(before.kept)
        if before.snapshot is not None:
            known[before.snapshot.live.snapshot] = before.snapshot
        if snapshot is not None:
            known.pop(snapshot.live.snapshot, None)
        followed = {id: self._kept_on(kept, versions) for id, kept in known.items()}
        return {id: kept for id, kept in followed.items() if kept is not None}

    def _kept_on(self, kept: Snapshot, versions: Mapping[int, Version]) -> Snapshot | None:
        record = self._registry.snapshots.get(kept.live.snapshot)
        if record.condemned_at is not None:
            return None
        try:
            return self._changed(kept, record.head).with_endings(versions)
        except ArtifactError as error:  # it might answer with what was erased
            logger.warning("snapshot %s is kept here no longer: %s", record.id, error.message)
            return None


def _transforms_of(catalog: Catalog, version: int) -> frozenset[Transform]:
    chain = Lineage.of(catalog.versions).chain(version)
    return frozenset(t for t in catalog.transforms if t.source in chain and t.target in chain)
