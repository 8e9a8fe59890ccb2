"""Whether this replica runs, and whether it can serve."""

from fastapi import APIRouter, Request

from service.declarations import problem_responses
from service.documents import AliveDocument, ReadyDocument
from service.state import state_of

router = APIRouter(tags=["health"])


@router.get("/livez", summary="Does the process answer?")
async def live() -> AliveDocument:
    """Answer, without looking at anything else."""
    return AliveDocument()


@router.get("/readyz", summary="Can vectors be served?", responses=problem_responses(503))
async def ready(request: Request) -> ReadyDocument:
    """Return what is served; 503 until a version is live and loaded here."""
    snapshot = state_of(request).engine.current()
    return ReadyDocument(live_version=snapshot.live.version, snapshot=snapshot.name)
