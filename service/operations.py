"""Operations in the background of this replica: its own, and those that another has abandoned."""

import logging
import math
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from threading import Event, Lock, Thread
from typing import Self

from backcast.errors import BackcastError, OperationAbandoned, RegistryError, ServiceError
from backcast.lifecycle import Backcast
from backcast.lifecycle.operations import (
    Attempts,
    Outcome,
    Watcher,
    abandonment,
    begin,
    carry_out,
    end,
    new_owner,
    settle,
)
from backcast.lifecycle.orders import Order
from backcast.versions import Claim, Live, Operation
from service.engine import Engine

logger = logging.getLogger(__name__)

_LAST_SECONDS = 5.0  # that a replica waits, at its end, for an act that it has handed back


class Operator:
    """Runs operations on a thread of their own; leaving the block hands back what runs.

    Another replica then carries it on at once, or this one when it starts again. ``ended`` is told
    of each that was carried out here: its kind, and the error that ended it.
    """

    def __init__(
        self,
        backcast: Backcast,
        engine: Engine,
        timeout: float,
        ended: Callable[[str, Exception | None], object] = lambda _kind, _error: None,
    ) -> None:
        self._backcast, self._engine = backcast, engine
        self._timeout, self._ended = timeout, ended
        self._watcher = Watcher(backcast.registry.operations, timeout)
        self._stopping, self._changing = Event(), Lock()
        self._running: dict[Claim, Thread] = {}
        self.active: str | None = None  # the kind of what was under way at the last look, anywhere

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        with self._changing:
            running = dict(self._running)
        for claim, thread in running.items():
            self._hand_back(claim)
            thread.join(_LAST_SECONDS)

    def start(
        self, order: Order, actor: str, key: str | None = None, act: int | None = None
    ) -> tuple[Operation, bool]:
        """Start an operation, or find that of an idempotency key; return it and whether it is new.

        ``act`` is its number in the audit log.

        Raises:
            OperationRunning, IdempotencyKeyReused: nothing was started.
            BackcastError: what can be refused at once was.
        """
        owner = new_owner("replica on")
        operation = begin(
            self._backcast, order, actor, owner=owner, resumable=True, key=key, act=act
        )
        is_new = operation.owner == owner
        if is_new:
            self._run(operation, Claim(operation.id, owner))
        return operation, is_new

    def watch(self) -> None:
        """Carry on or end an operation that nobody runs; raise RegistryError."""
        watched = self._watcher.look()
        self.active = None if watched is None else watched.operation.kind
        if watched is None or self._runs(watched.operation):
            return
        seen = watched.operation
        if seen.owner is not None and watched.still < self._timeout:
            return
        if seen.resumable:
            self._resume(seen)
        elif settle(self._backcast, seen, abandonment(seen, self._timeout)):
            logger.warning("operation %s was abandoned by %s and is ended", seen.id, seen.owner)

    def _resume(self, seen: Operation) -> None:
        owner = new_owner("replica on")
        claim = self._backcast.registry.operations.take(seen, owner)
        if claim is not None:
            logger.warning("operation %s of %s is carried on here", seen.id, seen.owner or "nobody")
            self._run(seen, claim)

    def _runs(self, operation: Operation) -> bool:
        with self._changing:
            return any(claim.owner == operation.owner for claim in self._running)

    def _run(self, operation: Operation, claim: Claim) -> None:
        work = partial(self._work, operation, claim)
        # What it logs and records belongs to the request that started it.
        context = copy_context()
        name = f"operation {operation.id}"
        thread = Thread(target=context.run, args=(work,), name=name, daemon=True)
        with self._changing:
            self._running[claim] = thread
        thread.start()

    def _work(self, operation: Operation, claim: Claim) -> None:
        attempts = Attempts(math.inf, self._stopping)
        try:
            outcome = carry_out(
                self._backcast,
                operation,
                claim,
                timeout=self._timeout,
                attempts=attempts,
                followed=self._follow,
            )
            logger.info(
                "operation %s: version %d is live, from snapshot %s, stored as %s",
                *(operation.id, outcome.live.version, outcome.live.snapshot, outcome.rounding),
            )
            self._ended(operation.kind, None)
        except BackcastError as error:
            self._ended(operation.kind, error)
            logger.warning("operation %s: %s", operation.id, error.message)
        except Exception as error:  # the edge of a thread: nobody above could see the error
            logger.exception("operation %s", operation.id)
            self._ended(operation.kind, None if self._end(claim) else error)
        finally:
            with self._changing:
                del self._running[claim]

    def _end(self, claim: Claim) -> Outcome | None:
        error = ServiceError("An unforeseen error; the service's log has it.")
        try:
            return end(self._backcast, claim, error)
        except (OperationAbandoned, RegistryError) as lost:
            logger.warning("operation %s: %s", claim.id, lost.message)
            return None

    def _hand_back(self, claim: Claim) -> None:
        try:
            self._backcast.registry.operations.release(claim)
        except (OperationAbandoned, RegistryError) as error:
            logger.warning("operation %s is not handed back: %s", claim.id, error.message)
        else:
            logger.info("operation %s is handed back, for another replica to carry on", claim.id)

    def _follow(self, live: Live) -> None:
        try:
            self._engine.refresh()
        except BackcastError as error:  # the switch is done; the next poll does this again
            logger.warning("version %d is live, not yet here: %s", live.version, error.message)
        except Exception:  # whatever it is, what others see of the operation is that it succeeded
            logger.exception("version %d is live, not yet here", live.version)
