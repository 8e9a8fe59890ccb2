"""What Prometheus scrapes."""

from anyio import to_thread
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
    # One at a time, beside the requests: it takes milliseconds, and anybody may ask.
    content, media_type = await to_thread.run_sync(
        state.metrics.text, accept, limiter=state.scrapes
    )
    return Response(content, headers={"content-type": media_type})
