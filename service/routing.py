"""By which route a request was answered, for those outside of the router."""

from starlette.types import Scope

from service.routes import embeddings

BATCH, CHANGES = embeddings.BATCH, "/admin/embeddings"
"""Paths that have gates: their requests may be refused before the router is asked."""


def leads_nowhere(scope: Scope) -> bool:
    """Tell whether the router would take a path for another: it overlooks a line feed at the end.

    That of an id it does not, which may end with one.
    """
    path: str = scope["path"]
    is_of_id = scope["method"] == "GET" and path.startswith(embeddings.PREFIX)
    return path.endswith("\n") and not is_of_id


def route_of(scope: Scope) -> str | None:
    """Return the template of the route, when the request is answered; None where there is none."""
    route = scope.get("route")
    if route is not None:
        return str(route.path_format)
    path: str = scope["path"]
    if path in {BATCH, CHANGES}:
        return path
    if scope["method"] == "GET" and path.startswith(embeddings.PREFIX):
        return embeddings.ROUTE  # by the short way, which asks no router
    return None
