"""What all routes of administrators have in common: the key, and the record of what is refused."""

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Request, Response, Security
from fastapi.routing import APIRoute

from backcast.versions import Key, Scope
from service.auditing import UNSOUND, record_refusal
from service.auth import demand
from service.declarations import KEY
from service.requests import CALLER, demand_known_query, find_secret, media_of, unsupported
from service.state import state_of
from service.wire import Format

_CONFIRMED = "backcast.confirmed"


async def find_admin(request: Request) -> Key:
    """Return the caller's key, which has scope admin; see ``AdminRoute``."""
    return demand(await _find_confirmed(request), Scope.ADMIN)


class _JsonRequest(Request):
    """Reads JSON as it is defined: Python's own reader takes NaN, and UTF-16 at a guess."""

    async def json(self) -> Any:
        """Return the body's content; raise json.JSONDecodeError."""
        return orjson.loads(await self.body())


class AdminRoute(APIRoute):
    """Finds the administrator before anything of a body is read, and records what is refused.

    What is not refused here is for the endpoint to record.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the framework's handler, behind the key."""
        handle = super().get_route_handler()

        async def handle_for_admin(request: Request) -> Response:
            caller = await _find_confirmed(request)
            try:
                await find_admin(request)
                self._demand_json(request)
                return await handle(_JsonRequest(request.scope, request.receive))
            except UNSOUND as error:
                if caller is not None:
                    await record_refusal(request, caller, self.name, error)
                raise

        return handle_for_admin

    def _demand_json(self, request: Request) -> None:
        media = media_of(request)
        if self.body_field is not None and media != Format.JSON:
            raise unsupported("The body comes", media, Format.JSON)


async def _find_confirmed(request: Request) -> Key | None:
    """Return the caller's key; the registry is asked for it, once a request."""
    if _CONFIRMED not in request.scope:
        secret = find_secret(request)
        confirm = state_of(request).keys.confirm
        request.scope[_CONFIRMED] = None if secret is None else await confirm(secret)
    found: Key | None = request.scope[_CONFIRMED]
    request.scope[CALLER] = found
    return found


Administrator = Annotated[Key, Depends(find_admin)]
"""The key of the administrator who asks."""


def admin_router() -> APIRouter:
    """Return a router whose paths lie below ``/admin``, and let only administrators in."""
    return APIRouter(
        prefix="/admin",
        tags=["admin"],
        dependencies=[Security(KEY), Depends(find_admin), Depends(demand_known_query)],
        route_class=AdminRoute,
        strict_content_type=False,  # of a body that says nothing of itself: it is JSON
    )
