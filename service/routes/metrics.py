"""What Prometheus scrapes."""

from fastapi import APIRouter, Request, Response

from service.state import state_of

router = APIRouter(tags=["health"])

_EXAMPLE = 'backcast_vectors_total{version="1",format="raw"} 1024.0\n'


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={
        200: {
            "description": "Counts of all workers of this replica, as text or OpenMetrics.",
            "content": {"text/plain": {"schema": {"type": "string"}, "example": _EXAMPLE}},
        }
    },
)
async def metrics(request: Request) -> Response:
    """Return what this replica has counted, and how it stands: no ids, no keys, no consumers."""
    state, accept = state_of(request), ",".join(request.headers.getlist("accept"))
    content, media_type = await state.scrapes.text(accept)
    return Response(content, headers={"content-type": media_type})
