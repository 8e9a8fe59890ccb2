"""Operations: an order is begun, run with signs of life, and ended or carried on by another.

No clock of another host is ever compared: who watches an operation counts on its own monotonic
clock how long its beat has not changed.
"""

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from threading import Event, Thread
from typing import Any, Self

from backcast.errors import (
    BackcastError,
    Conflict,
    OperationAbandoned,
    OperationCancelled,
    OperationRunning,
    RegistryError,
    StoreError,
)
from backcast.lifecycle.orders import Order, Promote, Refresh, Rollback, read_order
from backcast.lifecycle.places import Backcast, Report
from backcast.logs import Trouble
from backcast.registry import Operations, Registry
from backcast.registry.operations import OperationDraft, running
from backcast.stores import Rounding
from backcast.tracing import Steps
from backcast.versions import Claim, Live, Operation, OperationState

logger = logging.getLogger(__name__)

_BEAT = 1.0  # seconds between two signs of life, less where the timeout is short
_BEATS = 5  # within a timeout, at least
_CANCELLABLE = {Promote.kind, Refresh.kind, Rollback.kind}  # others change things as they go
_UNDONE_BY_ROLLBACK = {Promote.kind, Refresh.kind}
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0  # between two attempts while the registry is away


def new_owner(role: str) -> str:
    """Return a name for who runs one operation, unlike any other, this process's included."""
    return f"{role} {socket.gethostname()}:{os.getpid()}:{secrets.token_hex(3)}"


def beat_seconds(timeout: float) -> float:
    """Return how often an owner gives a sign of life, and how often it is looked for."""
    return min(_BEAT, timeout / _BEATS)


def begin(
    backcast: Backcast,
    order: Order,
    actor: str,
    *,
    owner: str,
    resumable: bool = False,
    key: str | None = None,
    act: int | None = None,
) -> Operation:
    """Write down an operation, if its order cannot be refused at once; it runs nowhere yet.

    Where its idempotency key is known, the operation of that key is returned: its owner is
    another. ``act`` is its number in the audit log.

    Raises:
        OperationRunning, IdempotencyKeyReused: see ``Operations.start``.
        BackcastError: what the order's ``check`` raises.
    """
    draft = OperationDraft(order.kind, order.document(), actor, owner, resumable, key, act)
    operations = backcast.registry.operations
    known = operations.known(draft)
    if known is not None:
        return known
    order.check(backcast)
    return operations.start(draft)


class Heart:
    """Gives signs of life of an operation, on a thread of its own, until the block ends."""

    def __init__(self, operations: Operations, claim: Claim, seconds: float) -> None:
        self._operations, self._claim, self._seconds = operations, claim, seconds
        self._stopping = Event()
        self._trouble = Trouble(logger, f"a sign of life of operation {claim.id}")
        self._thread = Thread(target=self._run, name="heart of an operation", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping.wait(self._seconds):
            try:
                self._operations.beat(self._claim)
            except OperationAbandoned:
                return  # the next report meets this too, and ends the act
            except RegistryError:
                continue  # while it is away nobody can look for signs either
            except Exception as error:  # the edge of a thread: nobody above could see the error
                self._trouble.note(repr(error), error)


@contextmanager
def alone(backcast: Backcast, kind: str, step: str, actor: str, timeout: float) -> Iterator[Claim]:
    """Hold the slot of operations, so that no other runs until the block ends.

    Raises:
        OperationRunning: another one runs.
    """
    operations, owner = backcast.registry.operations, new_owner(f"{kind} on")
    operation = operations.start(OperationDraft(kind, {}, actor, owner))
    claim = Claim(operation.id, owner)
    with (
        Heart(operations, claim, beat_seconds(timeout)),
        _ended_by_interrupt(backcast, claim),
    ):
        operations.progress(claim, step, 0.0)
        try:
            yield claim
        except BackcastError as error:
            operations.fail(claim, error)
            raise
        operations.succeed(claim, {})


@dataclass(frozen=True)
class Attempts:
    """How an owner goes on while the registry is away.

    Attributes:
        seconds: for how long.
        stopping: set where it shall not.
    """

    seconds: float
    stopping: Event

    def pauses(self) -> Iterator[bool]:
        """Yield True before each further attempt, after ever longer pauses, and end in time."""
        pause, until = _FIRST_PAUSE, time.monotonic() + self.seconds
        while time.monotonic() + pause < until and not self.stopping.wait(pause):
            yield True
            pause = min(2 * pause, _LONGEST_PAUSE)


@dataclass(frozen=True)
class Outcome:
    """What an operation made live, and what storing it cost; None where the store cannot tell."""

    live: Live
    rounding: Rounding | None

    @classmethod
    def of(cls, backcast: Backcast, live: Live) -> Self:
        """Ask the store what storing ``live`` cost."""
        try:
            return cls(live, backcast.store.open(live.snapshot).rounding)
        except StoreError:
            return cls(live, None)

    def document(self) -> dict[str, Any]:
        """Return the operation's result."""
        return {
            "live_version": self.live.version,
            "snapshot": self.live.name,
            "stored": None if self.rounding is None else asdict(self.rounding),
        }


def carry_out(
    backcast: Backcast,
    operation: Operation,
    claim: Claim,
    *,
    timeout: float,
    attempts: Attempts,
    report: Report = lambda _step, _fraction: None,
    followed: Callable[[Live], None] = lambda _live: None,
) -> Outcome:
    """Run an operation that this process has claimed, from wherever it stands, to its end.

    ``followed`` is told what is live before others are told that the operation has succeeded;
    it may not fail.

    Raises:
        OperationAbandoned: another process has it now; what this one did is harmless.
        RegistryError: the registry stayed away; the operation stays, and can be carried on.
        BackcastError: what the act raised; the operation has failed.
    """

    def tell(step: str, fraction: float) -> None:
        steps.enter(step)
        backcast.registry.operations.progress(claim, step, fraction)
        report(step, fraction)

    pauses, waiting = attempts.pauses(), Trouble(logger, f"operation {operation.id} waits")
    with (
        Heart(backcast.registry.operations, claim, beat_seconds(timeout)),
        backcast.tracing.span(operation.kind, {"backcast.operation": operation.id}),
        Steps(backcast.tracing) as steps,
    ):
        while True:
            try:
                return _attempt(backcast, operation, claim, tell, followed)
            except RegistryError as error:
                waiting.note(error.message)
                if not next(pauses, False):
                    raise


def _attempt(
    backcast: Backcast,
    operation: Operation,
    claim: Claim,
    tell: Report,
    followed: Callable[[Live], None],
) -> Outcome:
    operations, deployments = backcast.registry.operations, backcast.registry.deployments
    # An attempt before this one, here or elsewhere, may have done it without learning so.
    live = deployments.made_by(operation.id)
    if live is None:
        order = read_order(operation.kind, operation.request)
        try:
            live = order.run(backcast, operation.actor, claim, tell)
        except (RegistryError, OperationAbandoned):
            raise
        except BackcastError as error:
            operations.fail(claim, error)
            raise
    followed(live)
    outcome = Outcome.of(backcast, live)
    operations.succeed(claim, outcome.document())
    return outcome


@dataclass(frozen=True)
class Watched:
    """An active operation, and for how many seconds it has given no sign of life."""

    operation: Operation
    still: float

    @property
    def sign(self) -> tuple[str, str | None, int]:
        """What changes as long as somebody runs it."""
        return self.operation.id, self.operation.owner, self.operation.beat


class Watcher:
    """Looks at the active operation again and again, and counts how long it has not changed."""

    def __init__(
        self, operations: Operations, timeout: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._operations, self._timeout, self._clock = operations, timeout, clock
        self._last: Watched | None = None
        self._looked_at = 0.0

    def look(self) -> Watched | None:
        """Return the active operation, None where there is none; raise RegistryError.

        Only time during which this could look counts: while the registry was away, or this
        process was not running, a living owner might have left no sign either.
        """
        before, self._last = self._last, None
        active = self._operations.active()
        now = self._clock()
        passed, self._looked_at = now - self._looked_at, now
        if active is None:
            return None
        found = Watched(active, 0.0)
        if before is not None and before.sign == found.sign and passed < self._timeout:
            found = Watched(active, before.still + passed)
        self._last = found
        return found


def settle(backcast: Backcast, seen: Operation, error: BackcastError) -> bool:
    """End an operation that nobody carries on: as succeeded where it made its switch, else failed.

    Returns whether it was still as ``seen``; else somebody runs it, or has ended it.
    """
    operations = backcast.registry.operations
    claim = operations.take(seen, new_owner("ended by"))
    if claim is None:
        return False
    end(backcast, claim, error)
    return True


def end(backcast: Backcast, claim: Claim, error: BackcastError) -> Outcome | None:
    """End an operation that goes no further: as succeeded where it made its switch, else failed.

    Returns what it made live, None where it has failed.

    Raises:
        OperationAbandoned: another process has it now.
    """
    live = backcast.registry.deployments.made_by(claim.id)
    if live is None:
        backcast.registry.operations.fail(claim, error)
        return None
    outcome = Outcome.of(backcast, live)
    backcast.registry.operations.succeed(claim, outcome.document())
    return outcome


def abandonment(seen: Operation, timeout: float) -> OperationAbandoned:
    """Return the error of an operation that its owner abandoned."""
    return OperationAbandoned(
        f"Abandoned by {seen.owner or 'its owner'}, which gave no sign of life for {timeout:g} s; "
        "nothing was switched.",
        owner=seen.owner,
    )


def cancel(registry: Registry, id: str, *, actor: str, reason: str | None = None) -> Operation:
    """Call an operation off that has made no switch yet, whoever runs it, and return it.

    When this returns it has failed, nothing was switched, and another can begin. Who runs it is
    told at its next report, stops, and leaves what it has loaded to the collector. An operation
    that was cancelled before stays as it is.

    Raises:
        UnknownOperation: there is none of this id.
        Conflict: it has ended, or made its switch, or is no change of what is live.
    """
    while True:
        seen = registry.operations.get(id)
        if seen.error is not None and seen.error["code"] == OperationCancelled.code:
            return seen
        _demand_cancellable(registry, seen)
        # Its owner writes now and then: if it has since the look, its switch may be made.
        if registry.operations.cancel(seen, OperationCancelled(id, actor, reason)):
            return registry.operations.get(id)


def _demand_cancellable(registry: Registry, seen: Operation) -> None:
    about = {"operation": seen.id, "kind": seen.kind}
    if seen.finished_at is not None:
        undone = seen.state is OperationState.SUCCEEDED and seen.kind in _UNDONE_BY_ROLLBACK
        hint = "; a rollback goes back, in its grace period" if undone else ""
        raise Conflict(f"Operation {seen.id} has {seen.state} already{hint}.", **about)
    if seen.kind not in _CANCELLABLE:
        raise Conflict(f"Operation {seen.id} ({seen.kind}) cannot be cancelled; wait.", **about)
    live = registry.deployments.made_by(seen.id)
    if live is not None:
        raise Conflict(
            f"Operation {seen.id} has made version {live.version} live already; a rollback goes "
            "back, when it has ended.",
            **about,
        )


Say = Callable[[str], None]
"""Told in a line what a command waits for."""


def run_order(
    backcast: Backcast,
    order: Order,
    actor: str,
    *,
    timeout: float,
    act: int | None = None,
    report: Report = lambda _step, _fraction: None,
    say: Say = lambda _line: None,
) -> Outcome:
    """Run an order as an operation of this process, from its beginning to its end.

    Where an operation holds the slot that nobody runs any more, this waits until that is certain,
    ends it, and goes on. An interrupt ends the operation too.

    Raises:
        OperationRunning: another operation is active, and lives.
        BackcastError: see ``begin`` and ``carry_out``.
    """
    owner = new_owner("command on")
    attempt = partial(begin, backcast, order, actor, owner=owner, act=act)
    operation = _begin_patiently(backcast, attempt, timeout, say)
    claim = Claim(operation.id, owner)
    attempts = Attempts(4 * timeout, Event())
    with _ended_by_interrupt(backcast, claim):
        return carry_out(
            backcast, operation, claim, timeout=timeout, attempts=attempts, report=report
        )


def _begin_patiently(
    backcast: Backcast, attempt: Callable[[], Operation], timeout: float, say: Say
) -> Operation:
    while True:
        try:
            return attempt()
        except OperationRunning:
            _wait_for_slot(backcast, timeout, say)


def _wait_for_slot(backcast: Backcast, timeout: float, say: Say) -> None:
    """Return once the slot is free, an abandoned operation ended; raise OperationRunning."""
    watcher, first = Watcher(backcast.registry.operations, timeout), None
    while (watched := watcher.look()) is not None:
        seen = watched.operation
        if first is None:
            first = watched.sign
            say(
                f"Operation {seen.id} ({seen.kind}) of {seen.owner or 'nobody'} is not ended; "
                f"waiting up to {timeout:g} s for a sign of life. "
                f"`backcast operations {seen.id} --cancel` calls it off."
            )
        if watched.sign != first:
            raise running(seen)
        if watched.still >= timeout and settle(backcast, seen, abandonment(seen, timeout)):
            say(f"Operation {seen.id} was abandoned and is ended; going on.")
            return
        time.sleep(beat_seconds(timeout))


@contextmanager
def _ended_by_interrupt(backcast: Backcast, claim: Claim) -> Iterator[None]:
    try:
        yield
    except BackcastError:
        raise  # the operation has ended, or must not
    except BaseException as error:
        word = "Interrupted" if isinstance(error, KeyboardInterrupt) else "Ended by an error"
        end(backcast, claim, OperationAbandoned(f"{word}; nothing was switched."))
        raise
