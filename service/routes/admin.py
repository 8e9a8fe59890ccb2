"""What administrators do: promote, follow operations, read the history."""

from typing import Annotated

from fastapi import APIRouter, Body, Depends, Path, Request, Response, Security
from fastapi.responses import JSONResponse

from backcast.lifecycle import Expected, plan_promotion
from backcast.versions import Key
from service.declarations import KEY, problem_responses
from service.documents import (
    LARGEST_VERSION,
    DeploymentDocument,
    DeploymentsDocument,
    OperationDocument,
    PlanDocument,
    PromotionRequest,
)
from service.operations import PromotionOrder
from service.requests import find_admin
from service.state import state_of

router = APIRouter(
    prefix="/admin", tags=["admin"], dependencies=[Security(KEY), Depends(find_admin)]
)


@router.post(
    "/versions/{k}/promote",
    summary="Promote a version",
    status_code=202,
    response_model=OperationDocument,
    responses={
        200: {"description": "The plan of a dry run.", "model": PlanDocument},
        202: {
            "description": "The operation that was started.",
            "headers": {
                "Location": {
                    "description": "Where to follow it.",
                    "schema": {"type": "string"},
                }
            },
        },
        **problem_responses(401, 403, 404, 409, 410, 422, 503),
    },
)
def promote_version(
    request: Request,
    caller: Annotated[Key, Depends(find_admin)],
    k: Annotated[int, Path(ge=0, le=LARGEST_VERSION, description="The version to make live.")],
    wanted: Annotated[PromotionRequest, Body()],
) -> Response:
    """Load the newest snapshot of a version and make it live, if its gates pass.

    What can be refused at once is; the rest becomes an operation, which fails or succeeds.
    A dry run answers with the plan, when every gate has been run.
    """
    state = state_of(request)
    expected = _expected(wanted)
    if wanted.dry_run:
        plan = plan_promotion(state.backcast, k, expected_live=expected)
        return JSONResponse(plan.document())
    order = PromotionOrder(k, expected, wanted.force, wanted.reason, caller.consumer)
    operation = OperationDocument.model_validate(state.operator.promote(order))
    return JSONResponse(
        operation.model_dump(mode="json"),
        status_code=202,
        headers={"Location": f"/admin/operations/{operation.id}"},
    )


def _expected(wanted: PromotionRequest) -> int | Expected | None:
    if wanted.states_expectation and wanted.expected_live is None:
        return Expected.NOTHING
    return wanted.expected_live


@router.get(
    "/operations/{id}",
    summary="One operation",
    responses=problem_responses(401, 403, 404, 422, 503),
)
def get_operation(
    request: Request, id: Annotated[str, Path(pattern=r"^[\w-]{1,64}$")]
) -> OperationDocument:
    """Return an operation, while it runs and afterwards."""
    operation = state_of(request).backcast.registry.operations.get(id)
    return OperationDocument.model_validate(operation)


@router.get("/deployments", summary="All deployments", responses=problem_responses(401, 403, 503))
def list_deployments(request: Request) -> DeploymentsDocument:
    """Return every change of what is live, newest first."""
    history = state_of(request).backcast.registry.deployments.history()
    return DeploymentsDocument(deployments=[DeploymentDocument(**row) for row in history])
