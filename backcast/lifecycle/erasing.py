"""Erasures of one registry are done again in another, such as one restored from an older backup.

A list holds digests, not ids: the ids are found where they are held.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import orjson

from backcast.artifacts import SHA256, dump_json
from backcast.changes import read_delta
from backcast.errors import Conflict, InvalidInput
from backcast.lifecycle.changing import ATTEMPTS, erase_digests, pause
from backcast.lifecycle.places import Backcast
from backcast.registry import Erased, StateMoved
from backcast.snapshots import read_ids
from backcast.versions import DeltaKind, Entity, SnapshotRecord

FORMAT = 1


@dataclass(frozen=True)
class Listed:
    """The erasures that were in force in a registry."""

    erased: Erased

    def write(self, file: Path) -> None:
        """Write the list to a file."""
        digests = {str(entity): sorted(found) for entity, found in self.erased.digests.items()}
        file.write_bytes(dump_json({"format": FORMAT, "erased_sha256": digests}))

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a list; raise InvalidInput where it is none."""
        try:
            document: Any = orjson.loads(file.read_bytes())
            if document["format"] != FORMAT:
                raise ValueError(f"format {document['format']}")
            listed = document["erased_sha256"].items()
            return cls(Erased(0, {Entity(e): _digests(found) for e, found in listed}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(
                f"{file} is no list of erasures ({error}); `backcast erasures export` writes one."
            ) from error


def _digests(found: list[str]) -> frozenset[str]:
    for digest in found:
        if not SHA256.fullmatch(digest):
            raise ValueError(f"{digest!r:.80} is no SHA-256 in lower-case hex")
    return frozenset(found)


def erase_listed(backcast: Backcast, listed: Listed, *, actor: str) -> int:
    """Erase what is on a list and not erased here; return how many ids were held here.

    Raises:
        ArtifactError: a snapshot or a delta cannot be read, so that it might hold one.
        Conflict: snapshots and changes come faster than this can follow.
    """
    here, count = backcast.registry.erasures.all(), 0
    for entity, digests in listed.erased.digests.items():
        wanted = Erased(0, {entity: digests - here.digests.get(entity, frozenset())})
        if not wanted.digests[entity]:
            continue
        count += _erase(backcast, entity, wanted, actor)
    return count


def _erase(backcast: Backcast, entity: Entity, wanted: Erased, actor: str) -> int:
    ids, seen, digests = set[str](), dict[str, int](), sorted(wanted.digests[entity])
    naming = backcast.registry.erasures.naming(entity, digests)
    for attempt in range(ATTEMPTS):
        for record in backcast.registry.snapshots.undeleted():
            held = _held_since(backcast, record, entity, seen.get(record.id))
            ids.update(id for id in held if wanted.covers(entity, id))
            seen[record.id] = record.head
        try:
            erase_digests(
                backcast, entity, sorted(ids), digests, seen=seen, naming=naming, actor=actor
            )
        except StateMoved:  # what came meanwhile may hold one too
            pause(attempt)
        else:
            return len(ids)
    raise Conflict(
        f"Snapshots and vectors came {ATTEMPTS} times meanwhile; no {entity} of the list was "
        "erased. Run it again when fewer do."
    )


def _held_since(
    backcast: Backcast, record: SnapshotRecord, entity: Entity, seen: int | None
) -> Iterator[str]:
    """Yield what a snapshot holds, or was given after the delta ``seen``."""
    if record.condemned_at is not None:
        return
    if seen is None:
        for ids in read_ids(backcast.artifacts, record, entity):
            yield from ids
    for delta in backcast.registry.deltas.of(record.id, after=seen or 0, upto=record.head):
        if delta.entity is entity and delta.kind is DeltaKind.UPSERT:
            yield from read_delta(backcast.artifacts, delta).ids
