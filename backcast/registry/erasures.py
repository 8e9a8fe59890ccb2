"""Erased ids: a delta on every snapshot there is, and a list for all that are to come.

The list holds digests, not ids: whoever reads the registry does not learn who was erased.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from sqlalchemy import Connection, func, insert, select, update

from backcast.registry import tables
from backcast.registry.database import Database, take_turn, utc_now
from backcast.registry.deltas import StateMoved, append_deltas, end_erasures
from backcast.registry.deployments import read_live
from backcast.registry.names import NOT_LOOKED, Naming, digest_of, find_naming, unname_everywhere
from backcast.versions import DeltaDraft, Entity, Live


@dataclass(frozen=True)
class Erased:
    """The ids that publishing leaves out, as of one moment.

    Attributes:
        number: that of the last erasure; a later one has a larger number.
        digests: SHA-256 of the ids, in hexadecimal, by entity kind.
    """

    number: int = 0
    digests: Mapping[Entity, AbstractSet[str]] = field(default_factory=dict)

    def covers(self, entity: Entity, id: str) -> bool:
        """Return whether an id is left out."""
        digests = self.digests.get(entity)
        if not digests:
            return False  # as a rule: nothing is hashed
        return digest_of(id) in digests


class Erasures:
    """Erase ids, and say which are erased."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def all(self, *, after: int = 0) -> Erased:
        """Return the ids that are erased, those only that were after the erasure ``after``."""
        digests: dict[Entity, set[str]] = {}
        with self._db.read() as connection:
            listed = tables.erasures.c
            number = last_erasure(connection)
            found = select(listed.entity, listed.sha256).where(listed.number > after)
            for entity, digest in connection.execute(found):
                digests.setdefault(Entity(entity), set()).add(digest)
        return Erased(number, digests)

    def naming(self, entity: Entity, digests: Sequence[str]) -> Naming:
        """Look through the diffs for ids, so that ``append``, which others wait for, need not."""
        with self._db.read() as connection:
            return find_naming(connection, entity, frozenset(digests))

    def append(
        self,
        drafts: Mapping[str, DeltaDraft],
        entity: Entity,
        digests: Sequence[str],
        actor: str,
        seen: Mapping[str, int] | None = None,
        naming: Naming = NOT_LOOKED,
    ) -> tuple[Live | None, frozenset[str]]:
        """Erase ids from all snapshots and from all to come, in one transaction.

        ``drafts`` holds a delta for each snapshot that is not deleted, ``seen`` the last delta that
        the caller knows of on each, where that counts; ``naming`` is what was found in the diffs
        up to some time ago. Returns what is live then, and the snapshots
        whose deltas were used: some may have been deleted meanwhile.

        Raises:
            StateMoved: there is a snapshot without a draft, or a delta after those seen; nothing
                was changed.
        """
        with self._db.write() as connection:
            take_turn(connection)
            heads = _heads(connection)
            if not heads.keys() <= drafts.keys():
                raise StateMoved
            if seen is not None and any(seen[name] != head for name, head in heads.items()):
                raise StateMoved
            for snapshot, head in heads.items():
                append_deltas(connection, snapshot, head, [drafts[snapshot]])
            _follow_live(connection, heads)
            end_erasures(connection, entity, digests)  # each is listed once, with its last number
            now = utc_now()
            rows = [
                {"entity": entity, "sha256": digest, "actor": actor, "created_at": now}
                for digest in digests
            ]
            connection.execute(insert(tables.erasures), rows)
            unname_everywhere(connection, entity, frozenset(digests), naming)
            return read_live(connection), frozenset(heads)


def last_erasure(connection: Connection) -> int:
    """Return the largest number of an erasure in force, within the caller's transaction."""
    return int(connection.scalar(select(func.max(tables.erasures.c.number))) or 0)


def _heads(connection: Connection) -> dict[str, int]:
    snapshots = tables.snapshots.c
    kept = select(snapshots.id, snapshots.head).where(snapshots.deleted_at.is_(None))
    return {row.id: row.head for row in connection.execute(kept)}


def _follow_live(connection: Connection, heads: Mapping[str, int]) -> None:
    live = read_live(connection)
    if live is not None:
        values = {"delta": heads[live.snapshot] + 1, "updated_at": utc_now()}
        connection.execute(update(tables.live).values(values))
