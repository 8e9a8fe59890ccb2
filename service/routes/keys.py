"""What administrators do about keys, and what was done by whom."""

from datetime import timedelta
from typing import Annotated

from fastapi import Body, Path, Query, Request, Response
from pydantic import Field

from backcast import acts
from backcast.registry.keys import PREFIX
from backcast.versions import Key
from service.administration import Administrator, admin_router
from service.auditing import recorded
from service.declarations import problem_responses
from service.documents import in_words
from service.documents_keys import (
    ActDocument,
    ActsDocument,
    ActsQuery,
    KeyDocument,
    KeyRequest,
    KeysDocument,
    NewKeyDocument,
    RevocationRequest,
    RotationRequest,
)
from service.state import state_of

router = admin_router()

_Prefix = Annotated[
    str,
    Field(pattern=f"^{PREFIX}$"),
    in_words("8 of the digits 0 to 9 and a to f, as after bc_ in the key"),
    Path(description="The key's prefix: the digits after `bc_`."),
]
_ONCE = {
    "headers": {
        "Cache-Control": {
            "description": "`no-store`: the secret is shown once.",
            "schema": {"type": "string"},
        }
    }
}


@router.get("/keys", summary="All keys", responses=problem_responses(401, 403, 422, 503))
def list_keys(request: Request) -> KeysDocument:
    """Return every key, in force or not, without its secret."""
    registry = state_of(request).backcast.registry
    now = registry.now()
    return KeysDocument(keys=[KeyDocument.of(key, now) for key in registry.keys.all()])


@router.post(
    "/keys",
    summary="Create a key",
    status_code=201,
    responses={
        201: {"description": "The key, with its secret.", **_ONCE},
        **problem_responses(401, 403, 404, 408, 409, 410, 413, 415, 422, 503),
    },
)
def create_key(
    request: Request,
    response: Response,
    caller: Administrator,
    wanted: Annotated[KeyRequest, Body()],
) -> NewKeyDocument:
    """Make a key of a consumer, which begins with its first one. Its secret is shown only now."""
    keys = state_of(request).backcast.registry.keys
    act = acts.creating_key(
        wanted.consumer, wanted.scope, wanted.pin, wanted.expires_at, wanted.reason
    )
    with recorded(request, caller, act) as found:
        made = keys.create(
            wanted.consumer, wanted.scope, pin=wanted.pin, expires_at=wanted.expires_at
        )
        found.found["key"] = made[0].prefix
    return _shown(response, *made)


@router.post(
    "/keys/{prefix}/rotate",
    summary="Rotate a key",
    status_code=201,
    responses={
        201: {"description": "The new key, with its secret.", **_ONCE},
        **problem_responses(401, 403, 404, 408, 409, 413, 415, 422, 503),
    },
)
def rotate_key(
    request: Request,
    response: Response,
    caller: Administrator,
    prefix: _Prefix,
    wanted: Annotated[RotationRequest, Body()],
) -> NewKeyDocument:
    """Make the successor of a key, for the same consumer and scope; the old one soon expires.

    Replicas take the new one at once; what befalls the old one reaches them within
    BACKCAST_KEY_CACHE_SECONDS. A key is rotated once: then its successor is.
    """
    keys = state_of(request).backcast.registry.keys
    overlap = timedelta(seconds=wanted.overlap_seconds)
    act = acts.rotating_key(prefix, wanted.overlap_seconds, wanted.reason)
    with recorded(request, caller, act) as found:
        made = keys.rotate(prefix, overlap, expires_at=wanted.expires_at)
        found.found["key"] = made[0].prefix
    return _shown(response, *made)


@router.post(
    "/keys/{prefix}/revoke",
    summary="Revoke a key",
    responses=problem_responses(401, 403, 404, 408, 409, 413, 415, 422, 503),
)
def revoke_key(
    request: Request,
    caller: Administrator,
    prefix: _Prefix,
    wanted: Annotated[RevocationRequest, Body()],
) -> KeyDocument:
    """End a key: no replica takes it any more, within BACKCAST_KEY_CACHE_SECONDS.

    The last one in force with scope admin is refused with 409 `last-admin-key`, unless forced.
    Revoking twice changes nothing.
    """
    keys = state_of(request).backcast.registry.keys
    with recorded(request, caller, acts.revoking_key(prefix, wanted.force, wanted.reason)):
        revoked = keys.revoke(prefix, spare_last_admin=not wanted.force)
    return KeyDocument.of(revoked, revoked.created_at)  # it is revoked, whatever the time is


@router.get("/audit", summary="The audit log", responses=problem_responses(401, 403, 422, 503))
def list_acts(request: Request, query: Annotated[ActsQuery, Query()]) -> ActsDocument:
    """Return what administrators did, over HTTP or by a command, newest first."""
    audit = state_of(request).backcast.registry.audit
    found = audit.recent(query.limit, before=query.before)
    return ActsDocument(acts=[ActDocument.model_validate(act) for act in found])


def _shown(response: Response, key: Key, secret: str) -> NewKeyDocument:
    response.headers["Cache-Control"] = "no-store"
    # Nothing is asked of the registry any more: if it failed, nobody would have the secret.
    return NewKeyDocument(**KeyDocument.of(key, key.created_at).model_dump(), key=secret)
