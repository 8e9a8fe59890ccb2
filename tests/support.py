"""Homes with registered versions, and what their vectors must be, worked out the slow way."""

import math
import multiprocessing
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine, event, select
from sqlalchemy.exc import OperationalError

from backcast.artifacts import dump_json, dump_tensors
from backcast.chains import load_chain
from backcast.changes import read_changes
from backcast.lifecycle import (
    Backcast,
    open_backcast,
    promote,
    publish,
    register_version,
)
from backcast.registry import VersionDraft, tables
from backcast.registry.schema import make_engine, upgrade
from backcast.settings import Settings
from backcast.snapshots import read_snapshot
from backcast.stores import Precision
from backcast.vectors import VectorBatch
from backcast.versions import (
    Entity,
    OperationState,
    SnapshotRecord,
    Transform,
    Version,
    VersionState,
)

SHARED_ID = "in both/kinds"
"""An id that every published snapshot holds twice: as an item and as a user."""

Vectors = dict[str, NDArray[np.float32]]
Map = tuple[NDArray[np.float32], NDArray[np.float32] | None]

SPAWNER = multiprocessing.get_context("forkserver")
SPAWNER.set_forkserver_preload(["tests.support", "redis", "psycopg"])


@dataclass(frozen=True)
class Home:
    """One place with versions, and everything that was put there, to compare with.

    Attributes:
        maps: the weight and bias of each fitted map, by (source, target, direct).
        vectors: what was published last, by version, entity kind and id.
    """

    settings: Settings
    backcast: Backcast
    parents: dict[int, int | None] = field(default_factory=dict)
    dims: dict[int, int] = field(default_factory=dict)
    maps: dict[tuple[int, int, bool], Map] = field(default_factory=dict)
    vectors: dict[int, dict[Entity, Vectors]] = field(default_factory=dict)

    def register(
        self,
        dim: int,
        *,
        parent: int | None = None,
        bias: bool = False,
        direct: Sequence[int] = (),
        seed: int = 0,
    ) -> Version:
        """Register the next version, with random maps to its parent and to each of ``direct``."""
        number = self.backcast.registry.versions.next_number()
        rng = np.random.default_rng([seed, number])
        targets = [(j, True) for j in direct] + ([] if parent is None else [(parent, False)])
        maps = {
            (j, is_direct): normal_map(rng, self.dims[j], dim, bias) for j, is_direct in targets
        }
        version = register_version(
            self.backcast.registry,
            self.backcast.artifacts,
            draft(number, parent, dim, [transform(number, *key, m) for key, m in maps.items()]),
            {
                "model.safetensors": dump_tensors({"layer": normal(rng, 2, dim)}),
                "version.json": dump_json({"seed": seed}),
                **{_file(*key): dump_map(m) for key, m in maps.items()},
            },
        )
        self.parents[number], self.dims[number] = parent, dim
        self.maps.update({(number, *key): m for key, m in maps.items()})
        return version

    def publish(
        self, version: int, *, items: int = 12, users: int = 5, seed: int = 0
    ) -> SnapshotRecord:
        """Publish random vectors, those of ``SHARED_ID`` among them."""
        rng = np.random.default_rng([seed, version, 1])
        self.vectors[version] = {
            entity: dict(zip(ids, normal(rng, len(ids), self.dims[version]), strict=True))
            for entity, ids in (
                (Entity.ITEM, [f"item {n}" for n in range(items - 1)] + [SHARED_ID]),
                (Entity.USER, [SHARED_ID] + [f"user {n}" for n in range(users - 1)]),
            )
        }
        return publish(
            self.backcast.registry,
            self.backcast.artifacts,
            version,
            batches(self.vectors[version]),
            details={},
        )

    def held(self) -> list[str]:
        """Return the snapshots that the store holds, without the drift bounds that go with them."""
        return [name for name in self.backcast.store.snapshots() if "-drift-" not in name]

    def promote(self, version: int, **options: Any) -> str:
        """Promote a version and return the snapshot that is live now."""
        return promote(self.backcast, version, actor="tests", **options).live.snapshot

    def check_served(self, version: int) -> None:
        """Open everything anew: ``version`` is live, and answers for all of its chain are right.

        Right is ‖served − reference‖₂ ≤ 1e-5 · ‖W_k^j‖₂ ‖z_k‖₂ for every vector and every j.
        """
        with open_backcast(self.settings) as backcast:
            catalog = backcast.registry.deployments.catalog()
            assert catalog.live is not None
            assert catalog.live.version == version
            held = backcast.store.open(catalog.live.snapshot)
            chain = load_chain(catalog, backcast.artifacts, version)
            assert sorted(chain) == sorted(self.chain(version))
            for entity, rows in self.vectors[version].items():
                answer = held.gather(entity, list(rows))
                assert answer.found.all()
                assert answer.vectors.tobytes() == np.stack(list(rows.values())).tobytes()
                norms = np.linalg.norm(answer.vectors, axis=1)
                for j, composed in chain.items():
                    want = self.reference(j, list(rows), entity, live=version)
                    error = np.linalg.norm(composed(answer.vectors) - want, axis=1)
                    assert (error <= 1e-5 * composed.norm * norms).all()

    def chain(self, version: int) -> list[int]:
        """Return a version and its ancestors, newest first."""
        parent = self.parents[version]
        return [version, *([] if parent is None else self.chain(parent))]

    def ids(self, entity: Entity = Entity.ITEM, *, version: int) -> list[str]:
        """Return the ids that were published for ``version``."""
        return list(self.vectors[version][entity])

    def reference(
        self, target: int, ids: Sequence[str], entity: Entity = Entity.ITEM, *, live: int
    ) -> NDArray[np.float64]:
        """Return ver-``target`` vectors made from those of ``live``: (n, D_target), float64.

        Step by step from each stored vector, in Python numbers, with no product of two maps.
        """
        stored = self.vectors[live][entity]
        rows = [self._mapped(target, live, [float(x) for x in stored[id]]) for id in ids]
        return np.array(rows, dtype=np.float64).reshape(len(ids), self.dims[target])

    def _mapped(self, target: int, live: int, z: list[float]) -> list[float]:
        if target == live:
            return z
        if (live, target, True) in self.maps:
            return _apply(self.maps[live, target, True], z)
        newer = live
        while self.parents[newer] != target:
            above = self.parents[newer]
            assert above is not None, f"{target} is not an ancestor of {live}"
            newer = above
        return _apply(self.maps[newer, target, False], self._mapped(newer, live, z))


@contextmanager
def build_home(
    folder: Path,
    dims: Sequence[int] = (4, 6, 8),
    *,
    parents: Sequence[int | None] | None = None,
    bias: bool = False,
    direct: Mapping[int, Sequence[int]] | None = None,
    items: int = 12,
    users: int = 5,
    published: bool = True,
    live: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Iterator[Home]:
    """Make a home with one version for each of ``dims``, the parent of each the one before it.

    Args:
        folder: where the home lies.
        dims: D_k of version k.
        parents: the parent of each version, where it is not the one before it.
        bias: give every map a bias.
        direct: the versions that version k carries direct maps to, by k.
        items, users: how many of each a snapshot holds, ``SHARED_ID`` included.
        published: publish a snapshot of every version.
        live: promote the versions of this one's chain, oldest first, until it is live.
        seed: of maps and vectors.
        settings: fields of ``Settings``, such as ``database_url``.
    """
    # Random vectors and maps: a promotion changes everything, and may lose any id.
    lenient = {"gate_coverage": 0.0, "gate_change": 1e9}
    chosen = Settings.load(**{"home": folder, **lenient, **settings})
    if chosen.database_url:
        engine = make_engine(chosen.database_url)
        upgrade(engine)
        engine.dispose()
    with open_backcast(chosen) as backcast:
        home = Home(chosen, backcast)
        for number, dim in enumerate(dims):
            parent = (number - 1 if number else None) if parents is None else parents[number]
            home.register(
                dim, parent=parent, bias=bias, direct=(direct or {}).get(number, ()), seed=seed
            )
            if published:
                home.publish(number, items=items, users=users, seed=seed)
        for number in reversed([] if live is None else home.chain(live)):
            home.promote(number)
        yield home


def check_books(home: Home) -> None:
    """Demand that the registry explains what is live, and that everything it names is there.

    Nothing may be going on meanwhile.
    """
    with open_backcast(home.settings) as backcast:
        registry = backcast.registry
        live, history = registry.deployments.live(), registry.deployments.history()
        generations = [row["generation"] for row in history]
        assert generations == list(range(len(history), 0, -1))
        if live is None:
            assert not history
            return
        newest = history[0]
        assert (newest["version"], newest["snapshot"], newest["generation"]) == (
            live.version,
            live.snapshot,
            live.generation,
        )
        assert newest["delta"] <= live.delta == registry.snapshots.get(live.snapshot).head
        states = {v.number: v.state for v in registry.versions.all()}
        assert [n for n, state in states.items() if state is VersionState.LIVE] == [live.version]
        assert live.snapshot in backcast.store.snapshots()
        for snapshot in registry.snapshots.undeleted():
            if snapshot.condemned_at is None:
                assert sum(len(b.ids) for b in read_snapshot(backcast.artifacts, snapshot))
            deltas = registry.deltas.of(snapshot.id)
            assert [delta.number for delta in deltas] == list(range(1, snapshot.head + 1))
            read_changes(backcast.artifacts, deltas)
        with registry._engine.connect() as connection:
            for row in connection.execute(select(tables.operations)):
                assert row.state in {OperationState.SUCCEEDED, OperationState.FAILED}
                assert (row.result is None) is (row.state == OperationState.FAILED)
                assert (row.error is None) is (row.state == OperationState.SUCCEEDED)


@contextmanager
def registry_away_after(statement: str) -> Iterator[None]:
    """Let no registry answer from the commit on that follows a statement with these words."""
    seen, away = threading.Event(), threading.Event()

    def look(*execution: Any) -> None:
        if statement in execution[2]:
            seen.set()

    def leave(_connection: Connection) -> None:
        if seen.is_set():
            away.set()

    def refuse(_connection: Connection) -> None:
        if away.is_set():
            raise OperationalError("BEGIN", None, OSError("the server is away"))

    listeners = (("before_cursor_execute", look), ("commit", leave), ("begin", refuse))
    for name, listener in listeners:
        event.listen(Engine, name, listener)
    try:
        yield
    finally:
        for name, listener in listeners:
            event.remove(Engine, name, listener)
    assert away.is_set()


def as_stored(vector: NDArray[np.float32], precision: Precision) -> NDArray[np.float32]:
    """Round to a precision and back, as PyTorch does."""
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    rounded: NDArray[np.float32] = torch.from_numpy(vector).to(dtype[precision]).float().numpy()
    return rounded


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    """Return standard normal float32 numbers."""
    return rng.standard_normal(shape, dtype=np.float32)


def normal_map(rng: np.random.Generator, rows: int, cols: int, bias: bool) -> Map:
    """Return a weight (rows, cols) that keeps lengths about as they are, and a bias (rows,)."""
    weight = normal(rng, rows, cols) / np.float32(math.sqrt(cols))
    return weight, normal(rng, rows) if bias else None


def dump_map(fitted: Map) -> bytes:
    """Return a map as the file that is registered."""
    weight, bias = fitted
    return dump_tensors({"weight": weight} if bias is None else {"weight": weight, "bias": bias})


def transform(source: int, target: int, direct: bool, fitted: Map) -> Transform:
    """Describe a map for the registry."""
    rows, cols = fitted[0].shape
    affine = fitted[1] is not None
    return Transform(source, target, direct, rows, cols, affine, _file(target, direct))


def draft(
    number: int, parent: int | None, dim: int, transforms: Sequence[Transform] = ()
) -> VersionDraft:
    """Return a draft whose files are still to be written."""
    return VersionDraft(
        number=number,
        parent=parent,
        dim=dim,
        method="bc-aligner",
        until=1_400_000_000 + number,
        seed=number,
        dataset="tests",
        dataset_fingerprint="f" * 64,
        folder="",
        files={},
        details={"lambda": 16},
        transforms=tuple(transforms),
    )


def batches(vectors: Mapping[Entity, Vectors]) -> Iterator[VectorBatch]:
    """Yield one batch an entity kind."""
    for entity, rows in vectors.items():
        yield VectorBatch(entity, list(rows), np.stack(list(rows.values())))


def exit_codes(target: Callable[..., None], *calls: tuple[Any, ...]) -> list[int | None]:
    """Run ``target`` in one new process a call, all at once, and return how each ended.

    An exit code is 0 after a return, 1 after an exception and ``-SIGKILL`` after a kill.
    """
    processes = [SPAWNER.Process(target=target, args=arguments) for arguments in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
        process.close()
    return codes


def _apply(fitted: Map, z: Sequence[float]) -> list[float]:
    weight, bias = fitted
    return [
        math.fsum([float(w) * x for w, x in zip(row, z, strict=True)])
        + (0.0 if bias is None else float(bias[at]))
        for at, row in enumerate(weight)
    ]


def _file(target: int, direct: bool) -> str:
    return f"direct-{target}.safetensors" if direct else "transform.safetensors"
