"""Deployments of random vectors, written by the library's own calls and without training."""

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backcast.artifacts import dump_json, dump_tensors
from backcast.lifecycle import Backcast, open_backcast, promote, publish, register_version
from backcast.registry import Switch, VersionDraft
from backcast.registry.database import utc_now
from backcast.settings import Settings
from backcast.vectors import VectorBatch
from backcast.versions import Entity, SnapshotRecord, Transform

_ROWS = 16_384
_MAP = "transform.safetensors"
_LETTERS = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
_STRIDE = 1_000_000_007  # without a common factor with 36, so that no two numbers share an id


@dataclass(frozen=True)
class Deployment:
    """Versions 0, 1, … in one line, random vectors of the live one, and maps back to the others.

    Attributes:
        dims: D_k of version k.
        live: the version whose vectors are stored.
        published: promoted from a published snapshot; otherwise the vectors go straight to the
            embedded store, which takes half the time and a third of the disk.
    """

    name: str
    dims: Sequence[int]
    live: int
    items: int
    published: bool = True


def ids_of(numbers: NDArray[np.int64]) -> list[str]:
    """Return the ids of items 0, 1, …: 10 letters and digits each, in no visible order."""
    codes = (numbers * _STRIDE) % 36**8
    text = np.empty((len(numbers), 10), np.uint8)
    text[:, :2] = np.frombuffer(b"B0", np.uint8)
    for at in range(9, 1, -1):
        codes, digits = np.divmod(codes, 36)
        text[:, at] = _LETTERS[digits]
    ids: list[str] = text.view("S10").ravel().astype("U10").tolist()
    return ids


def random_ids(items: int, count: int, seed: int = 0) -> list[str]:
    """Return the ids of ``count`` items drawn with replacement."""
    return ids_of(np.random.default_rng([seed, 1]).integers(0, items, count))


def random_batches(items: int, dim: int) -> Iterator[VectorBatch]:
    """Yield vectors of norm near 1 for all items, always the same ones."""
    rng = np.random.default_rng([dim, 2])
    for start in range(0, items, _ROWS):
        ids = ids_of(np.arange(start, min(start + _ROWS, items)))
        vectors = rng.standard_normal((len(ids), dim), dtype=np.float32) / np.float32(dim**0.5)
        yield VectorBatch(Entity.ITEM, ids, vectors)


def prepare(folder: Path, deployment: Deployment) -> Settings:
    """Make a deployment in ``folder``, unless it is there, and return its settings."""
    home = folder / f"{deployment.name}-{deployment.items}"
    if not home.exists():
        unfinished = home.with_name(f".{home.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        _make(Settings.load(home=unfinished), deployment)
        unfinished.rename(home)
    return Settings.load(home=home)


def _make(settings: Settings, deployment: Deployment) -> None:
    dim, live = deployment.dims[deployment.live], deployment.live
    batches = random_batches(deployment.items, dim)
    with open_backcast(settings) as backcast:
        for number in range(len(deployment.dims)):
            _register(backcast, deployment.dims, number)
        if deployment.published:
            publish(backcast.registry, backcast.artifacts, live, batches, details={})
            promote(backcast, live, actor="benchmark")
        else:
            _load(backcast, live, dim, deployment.items, batches)


def _register(backcast: Backcast, dims: Sequence[int], number: int) -> None:
    dim, parent = dims[number], number - 1 if number else None
    files = {
        "model.safetensors": dump_tensors({"none": np.zeros(1, np.float32)}),
        "version.json": dump_json({}),
    }
    transforms = []
    if parent is not None:
        rng = np.random.default_rng([number, 3])
        shape = rows, _ = dims[parent], dim
        weight = rng.standard_normal(shape, dtype=np.float32) / np.float32(math.sqrt(rows))
        files[_MAP] = dump_tensors({"weight": weight})
        transforms.append(Transform(number, parent, False, *shape, False, _MAP))
    draft = VersionDraft(
        number=number,
        parent=parent,
        dim=dim,
        method="random",
        until=number,
        seed=number,
        dataset="random",
        dataset_fingerprint="0" * 64,
        folder="",
        files={},
        details={},
        transforms=tuple(transforms),
    )
    register_version(backcast.registry, backcast.artifacts, draft, files)


def _load(
    backcast: Backcast, version: int, dim: int, items: int, batches: Iterator[VectorBatch]
) -> None:
    id = f"v{version}-loaded"
    counts = {Entity.ITEM: items}
    backcast.store.load(id, dim, counts, batches)
    record = SnapshotRecord(
        id=id,
        version=version,
        dim=dim,
        counts={str(Entity.ITEM): items},
        folder=f"snapshots/{id}",
        manifest_sha256="0" * 64,
        head=0,
        created_at=utc_now(),
    )
    backcast.registry.snapshots.register(record, {})
    switch = Switch(kind="promote", seen=None, version=version, snapshot=id, actor="benchmark")
    backcast.registry.deployments.switch(switch)
