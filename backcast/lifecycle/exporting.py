"""All vectors of a version, out of what is live, in one file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from backcast.chains import load_chain
from backcast.changes import changed_batches, read_changes
from backcast.errors import (
    Conflict,
    UnknownVersion,
    VersionNotPromoted,
    VersionOffChain,
    VersionRetired,
)
from backcast.lifecycle.places import Backcast
from backcast.registry import Catalog
from backcast.snapshots import read_snapshot
from backcast.transforms import AffineMap
from backcast.vector_files import write_vector_file
from backcast.vectors import VectorBatch
from backcast.versions import Entity, Lineage, Live, Version, VersionState


@dataclass(frozen=True)
class Exported:
    """What was written: how many vectors, of which version, made from what."""

    version: int
    dim: int
    live_version: int
    snapshot: str
    rows: int


def export(
    backcast: Backcast,
    version: int,
    out: Path,
    *,
    entity: Entity | None = None,
    advance: Callable[[int], None] = lambda _rows: None,
) -> Exported:
    """Write the ver-``version`` vectors of all ids that are live to the Parquet file ``out``.

    Columns: ``entity`` string, ``id`` string, ``vector`` fixed_size_list<float32>[D_j]; the
    schema's metadata names version, live_version and snapshot. One moment's S.d is exported,
    whatever goes live meanwhile; a few thousand vectors are held at a time. The file is there
    whole, in the place of an older one, or not at all.

    Args:
        backcast: where the live version lies.
        version: j, on the chain of the live version.
        out: the file.
        entity: export only these; None: users and items.
        advance: told how many vectors are written.

    Raises:
        UnknownVersion, VersionRetired, VersionNotPromoted, VersionOffChain: j cannot be served.
        Conflict: nothing is live.
        ArtifactMissing, ArtifactCorrupt: a file is gone, or not what was registered.
    """
    catalog = backcast.registry.deployments.catalog()
    live, target = _find(catalog, version)
    record = backcast.registry.snapshots.get(live.snapshot)
    deltas = backcast.registry.deltas.of(live.snapshot, upto=live.delta)
    changes = read_changes(backcast.artifacts, deltas)
    composed = load_chain(catalog, backcast.artifacts, live.version)[version]
    apply = _in_float32(composed) if version != live.version else (lambda vectors: vectors)
    name = live.name
    batches = changed_batches(read_snapshot(backcast.artifacts, record), changes)
    mapped = (
        VectorBatch(batch.entity, batch.ids, apply(batch.vectors))
        for batch in batches
        if batch.ids and entity in {None, batch.entity}
    )
    about = {"version": version, "live_version": live.version, "snapshot": name}
    rows = write_vector_file(out, target.dim, mapped, about, advance)
    return Exported(version, target.dim, live.version, name, rows)


def count_exported(backcast: Backcast, entity: Entity | None = None) -> int:
    """Return about how many vectors an export writes: those published, without the changes."""
    live = backcast.registry.deployments.live()
    if live is None:
        return 0
    counts = backcast.registry.snapshots.get(live.snapshot).counts
    return sum(n for kind, n in counts.items() if entity is None or kind == entity)


def _find(catalog: Catalog, version: int) -> tuple[Live, Version]:
    live = catalog.live
    if live is None:
        raise Conflict("Nothing is live, so there is nothing to export; promote a version first.")
    known = {v.number: v for v in catalog.versions}
    chain = Lineage.of(catalog.versions).chain(live.version)
    servable = [j for j in sorted(chain) if known[j].state is not VersionState.RETIRED]
    if version in servable:
        return live, known[version]
    if version not in known:
        raise UnknownVersion(version, servable)
    state = known[version].state
    if state is VersionState.RETIRED:
        raise VersionRetired(version, servable)
    if state is VersionState.REGISTERED and version > live.version:
        raise VersionNotPromoted(version, live.version, servable)
    raise VersionOffChain(version, live.version, servable, state)


def _in_float32(
    composed: AffineMap,
) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Return a map as it is served: composed in float64, applied in float32."""
    weight = np.ascontiguousarray(composed.weight.T, np.float32)  # (D_k, D_j)
    bias = None if composed.bias is None else composed.bias.astype(np.float32)

    def apply(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        mapped: NDArray[np.float32] = vectors @ weight  # (n, D_j)
        return mapped if bias is None else mapped + bias

    return apply
