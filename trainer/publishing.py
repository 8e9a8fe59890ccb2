"""Compute {z_k} on a graph and publish them as a snapshot."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backcast.artifacts import Artifacts
from backcast.devices import choose_device
from backcast.lifecycle import Base, demand_promotable, publish
from backcast.registry import Registry
from backcast.vectors import VectorBatch
from backcast.versions import Entity, SnapshotRecord
from trainer.archive import ArchivedModel, load_model
from trainer.data.dataset import Dataset
from trainer.graph import Graph
from trainer.model import embed
from trainer.split import Edges

_ROWS = 10_000


def publish_version(
    registry: Registry,
    artifacts: Artifacts,
    version: int,
    dataset: Dataset,
    *,
    until: int,
    device: str = "auto",
    on_rows: Callable[[int], None] = lambda _rows: None,
) -> SnapshotRecord:
    """Run M_k on all interactions until ``until`` and publish every user and item seen by then.

    Users and items that training never saw get vectors too: the model needs their edges and
    attributes only. Attribute values that it does not know are ignored and counted.

    Raises:
        UnknownVersion, VersionRetired: there is no such version, or not any more.
        Conflict: it was rejected; see also ``publish``.
    """
    base = Base.now(registry)  # what is put from here on is newer than the vectors
    known = registry.versions.get(version)
    demand_promotable(known)
    archived = load_model(artifacts, known)
    graph, users, items = run_model(archived, dataset, until, device)

    def batches() -> Iterator[VectorBatch]:
        done = 0
        for entity, ids, vectors in (
            (Entity.USER, dataset.user_ids, users),
            (Entity.ITEM, dataset.item_ids, items),
        ):
            for batch in _batches(entity, ids, vectors):
                yield batch
                done += len(batch.ids)
                on_rows(done)

    details = _details(dataset, until, graph)
    return publish(registry, artifacts, version, batches(), details, base=base)


def run_model(
    archived: ArchivedModel, dataset: Dataset, until: int, device: str = "auto"
) -> tuple[Graph, NDArray[np.float32], NDArray[np.float32]]:
    """Return the graph of all interactions until ``until``, and its users' and items' vectors.

    The vectors are float32, (U, D_k) and (I, D_k), by user and item number.
    """
    edges = dataset.edges_until(until)
    graph = Graph.of(
        dataset,
        Edges(dataset.users[:edges], dataset.items[:edges]),
        dataset.users_known(until),
        dataset.items_known(until),
        archived.vocabulary,
    )
    on = choose_device(device)
    users, items = embed(archived.model.to(on), graph.to(on))
    return graph, users.cpu().numpy(), items.cpu().numpy()


def _batches(
    entity: Entity, ids: NDArray[np.object_], vectors: NDArray[np.float32]
) -> Iterator[VectorBatch]:
    for start in range(0, len(vectors), _ROWS):
        stop = min(start + _ROWS, len(vectors))
        yield VectorBatch(entity, ids[start:stop].tolist(), vectors[start:stop])


def _details(dataset: Dataset, until: int, graph: Graph) -> dict[str, Any]:
    return {
        "dataset": str(dataset.folder.resolve()),
        "dataset_fingerprint": dataset.fingerprint,
        "until": until,
        "unknown_attribute_values": dict(graph.features.unknown),
    }
