"""Versions: which exist, and which can be asked for."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Security

from backcast.errors import UnknownVersion
from backcast.versions import Lineage
from service.declarations import KEY, problem_responses
from service.documents import (
    LARGEST_VERSION,
    VersionDetailDocument,
    VersionDocument,
    VersionsDocument,
)
from service.engine import Snapshot
from service.requests import demand_known_query, find_reader
from service.state import state_of

router = APIRouter(
    tags=["versions"],
    dependencies=[Security(KEY), Depends(find_reader), Depends(demand_known_query)],
)


@router.get(
    "/versions", summary="All versions", responses=problem_responses(401, 403, 422, 429, 503)
)
async def list_versions(request: Request) -> VersionsDocument:
    """Return every version, oldest first, and what this replica serves.

    Versions that others register are seen here within BACKCAST_POLL_SECONDS.
    """
    view = state_of(request).engine.view
    servable = _servable(view.snapshot)
    return VersionsDocument(
        live_version=None if view.snapshot is None else view.snapshot.live.version,
        snapshot=None if view.snapshot is None else view.snapshot.name,
        servable_versions=list(servable),
        versions=[
            VersionDocument.of(version, servable=number in servable)
            for number, version in sorted(view.versions.items())
        ],
    )


@router.get(
    "/versions/{j}",
    summary="One version",
    responses=problem_responses(401, 403, 404, 422, 429, 503),
)
def get_version(
    request: Request,
    j: Annotated[int, Path(ge=0, le=LARGEST_VERSION, description="The version's number.")],
) -> VersionDetailDocument:
    """Return one version, its lineage, and how the live version's map back to it behaves."""
    view = state_of(request).engine.view
    servable = _servable(view.snapshot)
    if j not in view.versions:
        raise UnknownVersion(j, servable)
    gain, condition = (
        _behaviour(view.snapshot, j) if view.snapshot and j in servable else (None, None)
    )
    return VersionDetailDocument.of(
        view.versions[j],
        servable=j in servable,
        lineage=Lineage.of(view.versions.values()).chain(j),
        gain=gain,
        condition=condition,
        drift=_drift(view.snapshot, j),
    )


def _servable(snapshot: Snapshot | None) -> tuple[int, ...]:
    return () if snapshot is None else snapshot.servable


def _drift(snapshot: Snapshot | None, version: int) -> Mapping[str, Any] | None:
    if snapshot is None or snapshot.bounds is None or version not in snapshot.servable:
        return None
    figures: Mapping[str, Any] | None = snapshot.bounds.record.figures.get(str(version))
    return figures


def _behaviour(snapshot: Snapshot, version: int) -> tuple[float, float | None]:
    if version == snapshot.live.version:
        return 1.0, 1.0
    return snapshot.maps[version].behaviour
