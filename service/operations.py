"""Promotions in the background of this replica, each visible as an operation in the registry."""

import logging
import os
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Self

from backcast.errors import BackcastError, ServiceError
from backcast.lifecycle import Backcast, Expected, Report, find_candidate, promote, sweep
from backcast.versions import Live, Operation
from service.engine import Engine

logger = logging.getLogger(__name__)

_AT_ONCE = 4  # more than one is rare; the registry's compare-and-swap decides between them


@dataclass(frozen=True)
class PromotionOrder:
    """What an administrator asked for."""

    version: int
    expected_live: int | Expected | None
    force: bool
    reason: str | None
    actor: str

    def document(self) -> dict[str, Any]:
        """Return the request as the operation shows it."""
        expected = None if self.expected_live is Expected.NOTHING else self.expected_live
        return {
            "version": self.version,
            "expected_live": expected,
            "force": self.force,
            "reason": self.reason,
        }


class Operator:
    """Runs operations on threads of its own; leaving the block waits for those that run."""

    def __init__(self, backcast: Backcast, engine: Engine, grace: timedelta) -> None:
        self._backcast, self._engine, self._grace = backcast, engine, grace
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="operation")
        self._owner = f"{socket.gethostname()}:{os.getpid()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True)

    def promote(self, order: PromotionOrder) -> Operation:
        """Start a promotion and return its operation; what can be refused at once is.

        Raises:
            UnknownVersion, VersionRetired, NothingPublished, PromotionConflict: nothing started.
        """
        find_candidate(self._backcast, order.version, expected_live=order.expected_live)
        return self._start("promote", order.document(), order.actor, partial(self._promote, order))

    def _start(
        self,
        kind: str,
        request: Mapping[str, Any],
        actor: str,
        act: Callable[[str, Report], Mapping[str, Any]],
    ) -> Operation:
        operations = self._backcast.registry.operations
        operation = operations.start(kind, request, actor, self._owner)
        self._pool.submit(self._run, operation.id, act)
        return operation

    def _run(self, id: str, act: Callable[[str, Report], Mapping[str, Any]]) -> None:
        operations = self._backcast.registry.operations
        try:
            try:
                result = act(id, partial(operations.progress, id))
            except BackcastError as error:
                logger.warning("operation %s failed: %s", id, error.message)
                operations.fail(id, error)
            except Exception:
                operations.fail(id, ServiceError("An unforeseen error; the service's log has it."))
                raise
            else:
                operations.succeed(id, result)
        except Exception:  # the edge of a thread: nobody above could see the error
            logger.exception("operation %s", id)

    def _promote(self, order: PromotionOrder, id: str, report: Report) -> dict[str, Any]:
        promoted = promote(
            self._backcast,
            order.version,
            actor=order.actor,
            expected_live=order.expected_live,
            force=order.force,
            reason=order.reason,
            operation=id,
            report=report,
        )
        live = promoted.live
        logger.info(
            "version %d is live, from snapshot %s, stored as %s",
            live.version,
            live.snapshot,
            promoted.rounding,
        )
        self._follow(live)
        return {
            "live_version": live.version,
            "snapshot": f"{live.snapshot}.{live.delta}",
            "stored": asdict(promoted.rounding),
        }

    def _follow(self, live: Live) -> None:
        try:
            self._engine.refresh()
            sweep(self._backcast, self._grace)
        except BackcastError as error:  # the promotion is done; the next poll does this again
            logger.warning("after the promotion of version %d: %s", live.version, error.message)
