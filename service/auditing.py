"""Acts of administrators over HTTP, as the audit log is told of them."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from anyio import to_thread
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from backcast.acts import CONSUMER, KEY, OPERATION, VERSION, Act, ActName, Actor
from backcast.errors import Forbidden, InvalidInput
from backcast.registry.audit import Recorded
from backcast.versions import Key
from service.problems import code_of
from service.state import state_of

ACTS: Mapping[str, str] = {
    "promote_version": ActName.PROMOTE,
    "refresh_version": ActName.REFRESH,
    "roll_back": ActName.ROLLBACK,
    "cancel_operation": ActName.CANCEL,
    "put_embeddings": ActName.UPSERT,
    "delete_embeddings": ActName.ERASE,
    "deprecate_version": ActName.DEPRECATE,
    "withdraw_version_deprecation": ActName.WITHDRAW_DEPRECATION,
    "retire_version": ActName.RETIRE,
    "pin_consumer": ActName.PIN,
    "create_key": ActName.CREATE_KEY,
    "rotate_key": ActName.ROTATE_KEY,
    "revoke_key": ActName.REVOKE_KEY,
}
"""The act that each endpoint is for; endpoints that only look are not here."""

_RECORDED = "backcast.recorded"
_FORBIDDEN_S = 60.0
_TARGETS = {"k": VERSION, "j": VERSION, "name": CONSUMER, "prefix": KEY, "id": OPERATION}

UNSOUND = (Forbidden, InvalidInput, RequestValidationError, HTTPException)
"""What ends a request before its act is begun: it is not allowed, or it is none."""


@contextmanager
def recorded(request: Request, caller: Key, act: Act) -> Iterator[Recorded]:
    """Record an act of ``caller`` before the block, and after it what became of it."""
    request.scope[_RECORDED] = True
    audit = state_of(request).backcast.registry.audit
    with audit.recording(Actor(caller.consumer, caller.prefix), act) as found:
        yield found


async def record_refusal(request: Request, caller: Key, endpoint: str, error: Exception) -> None:
    """Record that a request for an act was refused before it was begun; nothing, if it was.

    Who may not act at all is recorded once a minute for each act, lest the log be filled.

    Raises:
        RegistryError: the registry does not answer.
    """
    if endpoint not in ACTS or _RECORDED in request.scope:
        return
    state = state_of(request)
    tried, now = (caller.prefix, endpoint), time.monotonic()
    forbidden = isinstance(error, Forbidden)
    if forbidden and now - state.forbidden.get(tried, -_FORBIDDEN_S) < _FORBIDDEN_S:
        return
    audit = state.backcast.registry.audit
    act = Act(ACTS[endpoint], _target(request.path_params))
    actor = Actor(caller.consumer, caller.prefix)
    if forbidden:  # before it is written: others may be refused meanwhile
        state.forbidden[tried] = now
    try:
        refuse = partial(audit.refuse, actor, act, code_of(error))
        await to_thread.run_sync(refuse, limiter=state.refusals)
    except BaseException:  # it is to be told the next time
        state.forbidden.pop(tried, None)
        raise


def _target(params: Mapping[str, str]) -> str | None:
    named = [f"{what} {params[name]}" for name, what in _TARGETS.items() if name in params]
    return named[0] if named else None
