"""Vectors of single ids are put, and ids erased."""

import logging
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from backcast import acts
from backcast.errors import BackcastError
from backcast.lifecycle import erase, upsert_batches
from backcast.vectors import VectorBatch
from backcast.versions import Key, Live
from service.administration import admin_router, find_admin
from service.auditing import recorded
from service.changes import Upsert, erasure_reader, upsert_reader
from service.declarations import erase_request, problem_responses, upsert_request
from service.documents_changes import EraseRequest, ErasureDocument, UpsertDocument
from service.gates import PLACE, Place
from service.state import State, state_of

logger = logging.getLogger(__name__)

router = admin_router()
_SERVED = {
    "headers": {
        "Backcast-Snapshot": {
            "description": "S.d: what is live then.",
            "schema": {"type": "string"},
        }
    }
}


@router.put(
    "/embeddings",
    summary="Put vectors",
    response_model=UpsertDocument,
    responses={
        200: {"description": "What is live with the new vectors.", **_SERVED},
        **problem_responses(401, 403, 408, 409, 413, 415, 422, 503),
    },
    openapi_extra=upsert_request(),
)
async def put_embeddings(request: Request) -> Response:
    """Give ids of the live version new vectors, or their first.

    They are durable, and this replica serves them as the next S.d, when the answer comes; other
    replicas follow within their poll time. All are put, or none.
    """
    caller, state = await _let_in(request), state_of(request)
    read = upsert_reader(request, state.settings.max_batch)
    put = partial(_put, request, partial(read, await request.body()), caller)
    return await to_thread.run_sync(put, limiter=state.changes.at_work)


@router.delete(
    "/embeddings",
    summary="Erase ids",
    response_model=ErasureDocument,
    responses={
        200: {"description": "What was erased, and what still holds it.", **_SERVED},
        **problem_responses(401, 403, 408, 409, 413, 415, 422, 503),
    },
    openapi_extra=erase_request(),
)
async def delete_embeddings(request: Request) -> Response:
    """End the vectors of ids, in every version and snapshot, and in those to come.

    Here they are unknown when the answer comes, on other replicas within their poll time. An id
    that is put again later is back.
    """
    caller, state = await _let_in(request), state_of(request)
    read = erasure_reader(request, state.settings.max_batch)
    end = partial(_end, request, partial(read, await request.body()), caller)
    return await to_thread.run_sync(end, limiter=state.changes.at_work)


async def _let_in(request: Request) -> Key:
    caller = await find_admin(request)
    place: Place = request.scope[PLACE]
    place.take(caller.consumer)
    return caller


def _put(request: Request, read: Callable[[], Upsert], caller: Key) -> Response:
    wanted, state = read(), state_of(request)
    batch = VectorBatch(wanted.entity, wanted.ids, wanted.vectors)
    act = acts.upserting({wanted.entity: len(wanted.ids)}, wanted.reason)
    with recorded(request, caller, act) as found:
        live = upsert_batches(
            state.backcast,
            [batch],
            actor=caller.consumer,
            most_changed=state.settings.max_changed,
            expected_live=wanted.expected_live,
        )
        found.found["snapshot"] = live.name
    logger.info("%d %ss put, %s is live", len(wanted.ids), wanted.entity, live.name)
    document = UpsertDocument(
        snapshot=live.name,
        live_version=live.version,
        entity=wanted.entity,
        upserted=len(wanted.ids),
    )
    return _answer(state, live, document.model_dump(mode="json"))


def _end(request: Request, read: Callable[[], EraseRequest], caller: Key) -> Response:
    wanted, state = read(), state_of(request)
    grace = timedelta(seconds=state.settings.grace_seconds)
    with recorded(request, caller, acts.erasing(wanted.entity, wanted.ids, wanted.reason)):
        report = erase(
            state.backcast, wanted.entity, wanted.ids, actor=caller.consumer, grace=grace
        )
    logger.info("%d %ss erased", report.ids, report.entity)  # never an id
    document = ErasureDocument.model_validate(report.document())
    return _answer(state, report.live, document.model_dump(mode="json"))


def _answer(state: State, live: Live | None, document: dict[str, Any]) -> Response:
    try:
        state.engine.refresh()
    except BackcastError as error:  # it is done and durable; the next poll does this again
        logger.warning("after a change of ids: %s", error.message)
    headers = {} if live is None else {"Backcast-Snapshot": live.name}
    return JSONResponse(document, headers=headers)
