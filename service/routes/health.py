"""Whether this replica runs, and whether it can serve."""

from anyio import fail_after, to_thread
from fastapi import APIRouter, Request

from backcast.errors import Draining, StoreError
from service.declarations import problem_responses
from service.documents import AliveDocument, ReadyDocument
from service.state import state_of

router = APIRouter(tags=["health"])

_PROBE_S = 1.0


@router.get("/livez", summary="Does the process answer?")
async def live() -> AliveDocument:
    """Answer, without looking at anything else."""
    return AliveDocument()


@router.get("/readyz", summary="Can vectors be served?", responses=problem_responses(503))
async def ready(request: Request) -> ReadyDocument:
    """Return what is served; 503 until a version is live and loaded here, and in the store.

    503 `draining` from the moment on in which the replica is told to stop.
    """
    state = state_of(request)
    if state.draining.is_set():
        raise Draining
    try:
        with fail_after(_PROBE_S):
            snapshot = await to_thread.run_sync(
                state.engine.probe, limiter=state.probes, abandon_on_cancel=True
            )
    except TimeoutError as error:
        raise StoreError(f"The vector store took more than {_PROBE_S:g} s.") from error
    return ReadyDocument(live_version=snapshot.live.version, snapshot=snapshot.name)
