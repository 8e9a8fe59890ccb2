"""Vectors of users and items that the live snapshot lacks, from its version's model."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from backcast.changes import ChangedSnapshot, read_changes
from backcast.errors import Conflict
from backcast.lifecycle import Backcast
from backcast.vectors import VectorBatch
from backcast.versions import Entity, Live
from trainer.archive import load_model
from trainer.data.dataset import Dataset
from trainer.publishing import run_model

_ROWS = 10_000


@dataclass(frozen=True, eq=False)
class Inferred:
    """Vectors that M_k made.

    Attributes:
        live: what was live when they were made.
        dim: D_k.
        batches: one of each entity kind that there is any of.
    """

    live: Live
    dim: int
    batches: Sequence[VectorBatch]

    @property
    def version(self) -> int:
        """K."""
        return self.live.version

    @property
    def counts(self) -> dict[str, int]:
        """How many vectors there are, by entity kind."""
        return {str(batch.entity): len(batch.ids) for batch in self.batches}


def infer(backcast: Backcast, dataset: Dataset, *, until: int, device: str = "auto") -> Inferred:
    """Run the live version's M_k on all interactions until ``until``; erased ids are left out.

    Raises:
        Conflict: nothing is live.
        ArtifactMissing, ArtifactCorrupt: the model is gone, or not what was registered.
    """
    registry = backcast.registry
    live = registry.deployments.live()
    if live is None:
        raise Conflict("Nothing is live, so there is no model to run; promote a version first.")
    version = registry.versions.get(live.version)
    _, users, items = run_model(load_model(backcast.artifacts, version), dataset, until, device)
    erased = registry.erasures.all()
    made = (
        VectorBatch(Entity.USER, dataset.user_ids[: len(users)].tolist(), users),
        VectorBatch(Entity.ITEM, dataset.item_ids[: len(items)].tolist(), items),
    )
    kept = [
        batch.only([n for n, id in enumerate(batch.ids) if not erased.covers(batch.entity, id)])
        for batch in made
    ]
    return Inferred(live, version.dim, [batch for batch in kept if batch.ids])


def only_new(backcast: Backcast, inferred: Inferred) -> Inferred:
    """Return those that the live snapshot lacks, as it was when they were made."""
    live = inferred.live
    changes = read_changes(
        backcast.artifacts, backcast.registry.deltas.of(live.snapshot, upto=live.delta)
    )
    held = ChangedSnapshot(backcast.store.open(live.snapshot), changes)
    lacking = [batch.only(_lacking(held, batch)) for batch in inferred.batches]
    return replace(inferred, batches=[batch for batch in lacking if batch.ids])


def _lacking(held: ChangedSnapshot, batch: VectorBatch) -> list[int]:
    rows = []
    for start in range(0, len(batch.ids), _ROWS):
        found = held.gather(batch.entity, batch.ids[start : start + _ROWS]).found
        rows += [start + n for n, there in enumerate(found.tolist()) if not there]
    return rows
