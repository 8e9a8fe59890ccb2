"""Versions and snapshots are written: files first, then one row in one transaction."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from backcast.artifacts import Artifacts
from backcast.errors import Conflict, InvalidInput, UnknownVersion
from backcast.registry import NumberTaken, Registry, VersionDraft
from backcast.snapshots import write_snapshot
from backcast.vectors import VectorBatch
from backcast.versions import SnapshotRecord, Version


def register_version(
    registry: Registry, artifacts: Artifacts, draft: VersionDraft, files: Mapping[str, bytes]
) -> Version:
    """Write a version's files, then its row and those of its maps in one transaction.

    The number in ``draft`` is a proposal: where another trainer took it meanwhile, the next free
    one is given. ``draft.folder`` and ``draft.files`` are filled in here.
    """
    while True:
        folder = artifacts.new_folder("versions", f"v{draft.number}")
        try:
            draft = replace(draft, folder=folder, files=artifacts.write(folder, files))
        except BaseException:
            artifacts.delete(folder)
            raise
        # Only a row that was refused frees its files: where the answer to a commit is lost, the
        # row may be there, and files that no row names are only litter.
        try:
            return registry.versions.register(draft)
        except NumberTaken:
            artifacts.delete(folder)
            draft = _renumbered(draft, registry.versions.next_number())
        except (InvalidInput, UnknownVersion):
            artifacts.delete(folder)
            raise


def _renumbered(draft: VersionDraft, number: int) -> VersionDraft:
    if draft.parent is None:
        raise Conflict("Version 0 was registered meanwhile; train against it as the parent.")
    maps = tuple(replace(t, source=number) for t in draft.transforms)
    return replace(draft, number=number, transforms=maps)


def publish(
    registry: Registry,
    artifacts: Artifacts,
    version: int,
    batches: Iterable[VectorBatch],
    details: Mapping[str, Any],
) -> SnapshotRecord:
    """Write a snapshot of ``version`` and register it; it can be promoted when this returns."""
    known, live = registry.versions.get(version), registry.deployments.live()
    record = write_snapshot(artifacts, version, known.dim, batches)
    if live is not None:
        record = replace(record, base_snapshot=live.snapshot, base_delta=live.delta)
    registry.snapshots.register(record, details)  # its files stay where the answer is lost
    return record
