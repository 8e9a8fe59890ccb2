"""What the service holds while it runs: built once at the start, found from every request."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

from anyio import CapacityLimiter
from fastapi import Request
from sqlalchemy import make_url

from backcast.lifecycle import Backcast, Collector, Policy, open_backcast
from backcast.lifecycle.operations import beat_seconds
from backcast.settings import Settings
from backcast.stores import shown_url
from service.auth import KeyRing
from service.engine import Engine
from service.operations import Operator
from service.poller import Poller
from service.usage import UsageMeter

logger = logging.getLogger(__name__)

_BATCHES = 4
_CHANGES = 2


@dataclass(frozen=True)
class State:
    """Settings, the places a version lives in, and what works on them.

    Attributes:
        batches: lets a few batches run at once, so that one looks its ids up while another is
            multiplied; more would answer no sooner and take more memory.
        changes: lets two changes of ids at once come to the registry, which makes one after
            another. Each that waits there holds a connection, and a switch needs two; those that
            wait here hold neither connection nor thread.
        refreshes: lets one request at a time wait for another look at the registry, so that a
            slow one takes no threads from requests that need none.
        probes: lets one health check at a time ask the store, which may hang.
    """

    settings: Settings
    backcast: Backcast
    engine: Engine
    keys: KeyRing
    usage: UsageMeter
    operator: Operator
    batches: CapacityLimiter
    changes: CapacityLimiter
    refreshes: CapacityLimiter
    probes: CapacityLimiter


@contextmanager
def open_state(settings: Settings) -> Iterator[State]:
    """Open everything and follow the registry until the block ends.

    Where what is live cannot be read yet, the service starts all the same, says so in the log
    and by ``/readyz``, and tries again.
    """
    with ExitStack() as stack:
        backcast = stack.enter_context(open_backcast(settings))
        engine = Engine(backcast.registry, backcast.artifacts, backcast.store, settings.device)
        grace = timedelta(seconds=settings.grace_seconds)
        timeout = settings.operation_timeout
        operator = stack.enter_context(Operator(backcast, engine, grace, timeout))
        following = Poller("following the registry", engine.refresh, settings.poll_seconds)
        following.attempt()
        _log_start(settings, engine)
        stack.enter_context(following)
        # On a thread of its own: dropping a large snapshot must not keep a replica behind.
        collector = Collector(backcast, Policy.of(settings))
        sweeping = Poller("sweeping", collector.collect, settings.poll_seconds)
        stack.enter_context(sweeping)
        watching = Poller("watching operations", operator.watch, beat_seconds(timeout))
        stack.enter_context(watching)
        usage = UsageMeter(backcast.registry.usage)
        counting = Poller("writing usage", usage.flush, settings.usage_seconds)
        stack.callback(counting.attempt)  # what came after the last time, when all is answered
        stack.enter_context(counting)
        keys = KeyRing(
            backcast.registry.keys, settings.key_cache_seconds, settings.key_outage_seconds
        )
        stack.enter_context(Poller("confirming keys", keys.refresh, keys.refresh_seconds))
        yield State(
            settings,
            backcast,
            engine,
            keys,
            usage,
            operator,
            batches=CapacityLimiter(_BATCHES),
            changes=CapacityLimiter(_CHANGES),
            refreshes=CapacityLimiter(1),
            probes=CapacityLimiter(1),
        )


def _log_start(settings: Settings, engine: Engine) -> None:
    served = engine.view.snapshot
    logger.info(
        "registry %s, store %s, reads %s, %s",
        make_url(settings.registry_url).render_as_string(hide_password=True),
        shown_url(settings.vector_store_url),
        settings.reads,
        f"version {served.live.version} live from {served.name}" if served else "nothing is live",
    )


def state_of(request: Request) -> State:
    """Return the state of the service that this request came to."""
    return cast("State", request.scope["state"]["service"])
