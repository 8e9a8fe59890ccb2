"""What administrators do about consumers: pin them, see what they use, end a version."""

from datetime import timedelta
from typing import Annotated

from fastapi import Body, Path, Query, Request

from backcast import acts
from backcast.lifecycle import deprecate, retire, withdraw_deprecation
from backcast.registry.usage import first_day
from service.administration import Administrator, admin_router
from service.auditing import recorded
from service.declarations import problem_responses
from service.documents import LARGEST_VERSION
from service.documents_consumers import (
    ConsumerDocument,
    ConsumersDocument,
    DeprecationRequest,
    EndingDocument,
    PinDocument,
    PinRequest,
    RetirementRequest,
    UsageDocument,
    UsageQuery,
    UseDocument,
    WithdrawalQuery,
)
from service.state import state_of

router = admin_router()

_Number = Annotated[int, Path(ge=0, le=LARGEST_VERSION, description="The version's number.")]
_ENDING = problem_responses(401, 403, 404, 408, 409, 410, 413, 415, 422, 503)


@router.post("/versions/{j}/deprecate", summary="Announce a version's end", responses=_ENDING)
def deprecate_version(
    request: Request,
    caller: Administrator,
    j: _Number,
    wanted: Annotated[DeprecationRequest, Body()],
) -> EndingDocument:
    """Say in every answer of this version until when it is served; again, with another date."""
    with recorded(request, caller, acts.deprecating(j, wanted.sunset_at, wanted.reason)):
        version = deprecate(
            state_of(request).backcast,
            j,
            sunset_at=wanted.sunset_at,
            actor=caller.consumer,
            reason=wanted.reason,
        )
    return EndingDocument.model_validate(version)


@router.delete("/versions/{j}/deprecate", summary="Take that back", responses=_ENDING)
def withdraw_version_deprecation(
    request: Request,
    caller: Administrator,
    j: _Number,
    query: Annotated[WithdrawalQuery, Query()],
) -> EndingDocument:
    """Announce the end of this version no more; without an announcement nothing changes."""
    with recorded(request, caller, acts.withdrawing(j, query.reason)):
        version = withdraw_deprecation(state_of(request).backcast, j, actor=caller.consumer)
    return EndingDocument.model_validate(version)


@router.post("/versions/{j}/retire", summary="Stop serving a version", responses=_ENDING)
def retire_version(
    request: Request,
    caller: Administrator,
    j: _Number,
    wanted: Annotated[RetirementRequest, Body()],
) -> EndingDocument:
    """Answer 410 for this version from now on, in every replica within its poll time.

    Refused with 409 `version-in-use`, which names them, while consumers are pinned to it, used it
    within BACKCAST_RETIRE_IDLE_DAYS, or were promised more time. Retiring twice changes nothing.
    """
    state = state_of(request)
    with recorded(request, caller, acts.retiring(j, wanted.force, wanted.reason)):
        state.usage.flush()  # what was used a moment ago counts too, as far as this replica knows
        version = retire(
            state.backcast,
            j,
            actor=caller.consumer,
            idle=timedelta(days=state.settings.retire_idle_days),
            force=wanted.force,
            reason=wanted.reason,
        )
    return EndingDocument.model_validate(version)


@router.get("/consumers", summary="All consumers", responses=problem_responses(401, 403, 422, 503))
def list_consumers(request: Request) -> ConsumersDocument:
    """Return every consumer: its pin, its keys in force, and when it last asked for a vector."""
    consumers = state_of(request).backcast.registry.consumers.all()
    return ConsumersDocument(consumers=[ConsumerDocument.model_validate(one) for one in consumers])


@router.put(
    "/consumers/{name:path}",
    summary="Pin a consumer",
    responses=problem_responses(401, 403, 404, 408, 410, 413, 415, 422, 503),
)
def pin_consumer(
    request: Request,
    caller: Administrator,
    name: Annotated[str, Path(description="The consumer's name, percent-encoded.")],
    wanted: Annotated[PinRequest, Body()],
) -> PinDocument:
    """Set or clear a consumer's default version, for all of its keys.

    Replicas follow within BACKCAST_KEY_CACHE_SECONDS.
    """
    with recorded(request, caller, acts.pinning(name, wanted.pin, wanted.reason)):
        state_of(request).backcast.registry.consumers.pin(name, wanted.pin)
    return PinDocument(pin=wanted.pin)


@router.get("/usage", summary="Who uses what", responses=problem_responses(401, 403, 422, 503))
def get_usage(request: Request, query: Annotated[UsageQuery, Query()]) -> UsageDocument:
    """Return requests and vectors by consumer, version and UTC day.

    Replicas write what they have counted every BACKCAST_USAGE_SECONDS.
    """
    since = first_day(query.days)
    uses = state_of(request).backcast.registry.usage.since(since, query.version)
    return UsageDocument(since=since, usage=[UseDocument.model_validate(use) for use in uses])
