"""Ids in the registry: diffs name those that changed most, came or went, until they are erased."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, select, update

from backcast.registry import tables
from backcast.versions import Entity

UNNAMED = "(erased)"
"""What stands in a diff in the place of an erased id."""

Figures = Mapping[str, Any]
_BY_KIND = ("entities", "ids")  # of a diff's figures
_AT_ONCE = 500  # rows in memory, values in a statement


def digest_of(id: str) -> str:
    """Return the digest by which an id is on the list of the erased."""
    return hashlib.sha256(id.encode()).hexdigest()


@dataclass(frozen=True)
class Naming:
    """Which diffs name some ids, as far as they were looked through; later ones only name less.

    Attributes:
        diffs: those that do.
        upto: the last that was looked at.
    """

    diffs: AbstractSet[int] = frozenset()
    upto: int = 0


NOT_LOOKED = Naming()


def find_naming(connection: Connection, entity: Entity, digests: AbstractSet[str]) -> Naming:
    """Look through all diffs for ids. There are more with every deployment."""
    upto, found = 0, set[int]()
    for id, figures in _rows(connection):
        upto = id
        if any(digest_of(name) in digests for name in _named(figures, entity)):
            found.add(id)
    return Naming(found, upto)


def unname_everywhere(
    connection: Connection, entity: Entity, digests: AbstractSet[str], known: Naming
) -> None:
    """Take erased ids out of all diffs, within the caller's transaction.

    Only those are read that are ``known`` to name one, or came since.
    """
    diffs = tables.diffs.c
    conditions = [diffs.id.in_(some) for some in _pieces(sorted(known.diffs))]
    for condition in [*conditions, diffs.id > known.upto]:
        for id, figures in _rows(connection, condition):
            unnamed = _without(figures, entity, digests)
            if unnamed != figures:
                changed = update(tables.diffs).where(diffs.id == id)
                connection.execute(changed.values(figures=unnamed))


def _rows(
    connection: Connection, condition: ColumnElement[bool] | None = None
) -> Iterator[tuple[int, Figures]]:
    diffs, after = tables.diffs.c, 0
    wanted = select(diffs.id, diffs.figures).order_by(diffs.id).limit(_AT_ONCE)
    if condition is not None:
        wanted = wanted.where(condition)
    while True:
        rows = connection.execute(wanted.where(diffs.id > after)).all()
        for row in rows:
            yield row.id, row.figures
        if len(rows) < _AT_ONCE:
            return
        after = rows[-1].id


def _pieces(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), _AT_ONCE):
        yield ids[start : start + _AT_ONCE]


def unnamed(connection: Connection, drafts: Sequence[Figures]) -> list[dict[str, Any]]:
    """Return the figures of new diffs without ids that were erased while they were measured."""
    found = [dict(figures) for figures in drafts]
    listed = tables.erasures.c
    for entity in Entity:
        named = {digest_of(id) for figures in found for id in _named(figures, entity)}
        wanted = (listed.entity == entity) & listed.sha256.in_(named)
        erased = frozenset(connection.scalars(select(listed.sha256).where(wanted)))
        found = [_without(figures, entity, erased) for figures in found]
    return found


def _named(figures: Figures, entity: Entity) -> Iterator[str]:
    for about in _BY_KIND:
        yield from _texts(figures.get(about, {}).get(entity))


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, Mapping):
        for found in node.values():
            yield from _texts(found)
    elif isinstance(node, Sequence):
        for found in node:
            yield from _texts(found)


def _without(figures: Figures, entity: Entity, digests: AbstractSet[str]) -> dict[str, Any]:
    return {
        about: {
            kind: _replaced(found, digests) if kind == entity else found
            for kind, found in by_kind.items()
        }
        if about in _BY_KIND
        else by_kind
        for about, by_kind in figures.items()
    }


def _replaced(node: Any, digests: AbstractSet[str]) -> Any:
    if isinstance(node, Mapping):
        return {name: _replaced(found, digests) for name, found in node.items()}
    if isinstance(node, str):
        return UNNAMED if digest_of(node) in digests else node
    return [_replaced(found, digests) for found in node] if isinstance(node, Sequence) else node
