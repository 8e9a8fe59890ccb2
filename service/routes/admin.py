"""What administrators do: promote, refresh, roll back, follow operations, read the history."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import (
    Body,
    Header,
    Path,
    Query,
    Request,
    Response,
)
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from backcast import acts
from backcast.lifecycle import (
    Expected,
    Order,
    Plan,
    Promote,
    Refresh,
    Rollback,
    deployment_diff,
    plan_promotion,
    plan_rollback,
)
from backcast.lifecycle.operations import cancel
from backcast.versions import Key, OperationState
from service.administration import Administrator, admin_router
from service.auditing import recorded
from service.declarations import problem_responses
from service.documents import (
    LARGEST_VERSION,
    CancellationRequest,
    DeploymentDetailDocument,
    DeploymentDocument,
    DeploymentsDocument,
    OperationDocument,
    OperationsDocument,
    PlanDocument,
    PromotionRequest,
    RefreshRequest,
    RollbackPlanDocument,
    RollbackRequest,
    in_words,
)
from service.state import state_of

router = admin_router()


def _ordered(plan: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Declare the answers to an order; ``plan`` is that of a dry run."""
    return {
        200: {
            "description": "The plan of a dry run, or the ended operation of this key.",
            "model": plan | OperationDocument,
        },
        202: {
            "description": "The operation that was started, or the running one of this key.",
            "model": OperationDocument,
            "headers": {
                "Location": {"description": "Where to follow it.", "schema": {"type": "string"}}
            },
        },
        **problem_responses(401, 403, 404, 408, 409, 410, 413, 415, 422, 503),
    }


_Idempotent = Annotated[
    str,
    Field(pattern=r"^[\x21-\x7e]{1,128}$"),
    in_words("1 to 128 printable ASCII characters without spaces"),
]
IdempotencyKey = Annotated[
    _Idempotent | None,
    Header(
        alias="Idempotency-Key",
        description="Any text that stands for this request: sent again, it leads to the same "
        "operation and starts none. With another request it is refused.",
    ),
]


@router.post(
    "/versions/{k}/promote",
    summary="Promote a version",
    status_code=202,
    response_model=OperationDocument,
    responses=_ordered(PlanDocument),
)
async def promote_version(
    request: Request,
    caller: Administrator,
    k: Annotated[int, Path(ge=0, le=LARGEST_VERSION, description="The version to make live.")],
    wanted: Annotated[PromotionRequest, Body()],
    key: IdempotencyKey = None,
) -> Response:
    """Load the newest snapshot of a version and make it live, if its gates pass.

    What can be refused at once is; the rest becomes an operation, which fails or succeeds.
    A dry run answers with the plan, when every gate has been run; a replica makes one at a time.
    """
    expected = _expected(wanted)
    if wanted.dry_run:
        look = partial(plan_promotion, expected_live=expected, snapshot=wanted.snapshot)
        return await _planned(request, partial(look, state_of(request).backcast, k))
    order = Promote(k, expected, wanted.force, wanted.reason, wanted.snapshot)
    return await to_thread.run_sync(_start, request, order, caller, key)


@router.post(
    "/versions/{k}/refresh",
    summary="Refresh the live version",
    status_code=202,
    response_model=OperationDocument,
    responses=_ordered(PlanDocument),
)
async def refresh_version(
    request: Request,
    caller: Administrator,
    k: Annotated[int, Path(ge=0, le=LARGEST_VERSION, description="The live version.")],
    wanted: Annotated[RefreshRequest, Body()],
    key: IdempotencyKey = None,
) -> Response:
    """Make the newest snapshot of the live version live.

    Ids that were upserted since it was begun go with it.
    """
    order = Refresh(k, wanted.expected_live, wanted.compact, wanted.reason)
    if wanted.dry_run:
        backcast = state_of(request).backcast

        def look() -> Plan:
            order.check(backcast)
            return plan_promotion(backcast, k, expected_live=wanted.expected_live)

        return await _planned(request, look)
    return await to_thread.run_sync(_start, request, order, caller, key)


@router.post(
    "/rollback",
    summary="Roll back to what was live before",
    status_code=202,
    response_model=OperationDocument,
    responses=_ordered(RollbackPlanDocument),
)
def roll_back(
    request: Request,
    caller: Administrator,
    wanted: Annotated[RollbackRequest, Body()],
    key: IdempotencyKey = None,
) -> Response:
    """Make the snapshot live again that was live before the last promotion, or one named.

    It must be in its grace period. Consumers of the version that is left get 409 and the reason.
    """
    if wanted.reason is None or wanted.dry_run:
        state = state_of(request)
        plan = plan_rollback(
            state.backcast,
            grace=timedelta(seconds=state.settings.grace_seconds),
            expected_live=wanted.expected_live,
            to_snapshot=wanted.to_snapshot,
        )
        return JSONResponse(plan.document())
    order = Rollback(wanted.expected_live, wanted.reason, wanted.to_snapshot)
    return _start(request, order, caller, key)


async def _planned(request: Request, look: Callable[[], Plan]) -> Response:
    def answer() -> Response:
        return JSONResponse(look().document())

    return await to_thread.run_sync(answer, limiter=state_of(request).plans)


def _start(request: Request, order: Order, caller: Key, key: str | None) -> Response:
    with recorded(request, caller, acts.ordering(order.kind, order.document())) as found:
        operation, is_new = state_of(request).operator.start(
            order, caller.consumer, key, act=found.id
        )
        found.found["operation"] = operation.id  # that of the key, which others began
    ended = not is_new and operation.state in {OperationState.SUCCEEDED, OperationState.FAILED}
    return JSONResponse(
        OperationDocument.model_validate(operation).model_dump(mode="json"),
        status_code=200 if ended else 202,
        headers={"Location": f"/admin/operations/{operation.id}"},
    )


def _expected(wanted: PromotionRequest) -> int | Expected | None:
    if wanted.states_expectation and wanted.expected_live is None:
        return Expected.NOTHING
    return wanted.expected_live


@router.get("/operations", summary="Operations", responses=problem_responses(401, 403, 422, 503))
def list_operations(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=1000, description="At most so many.")] = 100,
) -> OperationsDocument:
    """Return the newest operations, newest first: of every replica and of the command line."""
    found = state_of(request).backcast.registry.operations.recent(limit)
    return OperationsDocument(operations=[OperationDocument.model_validate(o) for o in found])


_OperationId = Annotated[
    str,
    Field(pattern=r"^[\w-]{1,64}$"),
    in_words("1 to 64 letters, digits, hyphens and underscores"),
    Path(),
]


@router.get(
    "/operations/{id}",
    summary="One operation",
    responses=problem_responses(401, 403, 404, 422, 503),
)
def get_operation(request: Request, id: _OperationId) -> OperationDocument:
    """Return an operation, while it runs and afterwards."""
    operation = state_of(request).backcast.registry.operations.get(id)
    return OperationDocument.model_validate(operation)


@router.post(
    "/operations/{id}/cancel",
    summary="Call an operation off",
    responses=problem_responses(401, 403, 404, 408, 409, 413, 415, 422, 503),
)
def cancel_operation(
    request: Request,
    caller: Administrator,
    id: _OperationId,
    wanted: Annotated[CancellationRequest, Body()],
) -> OperationDocument:
    """End an operation that has switched nothing yet, whichever replica or command runs it.

    It has failed then with `operation-cancelled`, and another can begin at once. Cancelling twice
    changes nothing; what has ended otherwise, or has made its switch, is refused.
    """
    with recorded(request, caller, acts.cancelling(id, wanted.reason)):
        operation = cancel(
            state_of(request).backcast.registry, id, actor=caller.consumer, reason=wanted.reason
        )
    return OperationDocument.model_validate(operation)


@router.get(
    "/deployments", summary="All deployments", responses=problem_responses(401, 403, 422, 503)
)
def list_deployments(request: Request) -> DeploymentsDocument:
    """Return every change of what is live, newest first."""
    history = state_of(request).backcast.registry.deployments.history()
    return DeploymentsDocument(deployments=[DeploymentDocument(**row) for row in history])


@router.get(
    "/deployments/{generation}",
    summary="One deployment",
    responses=problem_responses(401, 403, 404, 422, 503),
)
def get_deployment(
    request: Request,
    generation: Annotated[int, Path(ge=1, le=LARGEST_VERSION, description="Its number.")],
) -> DeploymentDetailDocument:
    """Return one change of what is live, its gates, and its diff as it was measured before."""
    registry = state_of(request).backcast.registry
    deployment = registry.deployments.get(generation)
    diff = deployment_diff(registry, generation)
    return DeploymentDetailDocument.model_validate({**deployment, "diff": diff})
