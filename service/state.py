"""What the service holds while it runs: built once at the start, found from every request."""

import logging
import threading
from asyncio import Transport
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from anyio import CapacityLimiter, Lock
from fastapi import Request

from backcast.lifecycle import Backcast, Collector, Policy, open_backcast
from backcast.lifecycle.operations import beat_seconds
from backcast.registry import database
from backcast.settings import Settings
from backcast.stores import shown_url
from service.auth import KeyRing
from service.engine import Engine
from service.gates import Gate
from service.limits import Limits, open_limits
from service.metrics.gauges import read_gauges
from service.metrics.meter import Meter
from service.metrics.replica import WRITE_SECONDS, Metrics
from service.metrics.scrapes import Scrapes
from service.metrics.sheets import claimed
from service.operations import Operator
from service.poller import Poller
from service.usage import UsageMeter

logger = logging.getLogger(__name__)

_CHANGES = 2


@dataclass(frozen=True)
class State:
    """Settings, the places a version lives in, and what works on them.

    Attributes:
        limits: how much each consumer may ask for.
        batches: lets a few batches run at once, so that one looks its ids up while another is
            multiplied; more would answer no sooner and take more memory.
        changes: lets two changes of ids at once come to the registry, which makes one after
            another. Each that waits there holds a connection, and a switch needs two; those that
            wait here hold neither connection nor thread.
        writing: lets one piece of JSON be written in each turn of the event loop, so that singles
            wait for one at most, however many batches are being answered.
        refreshes: lets one request at a time wait for another look at the registry, so that a
            slow one takes no threads from requests that need none.
        plans: lets one dry run of a promotion at a time go through all vectors, which takes long,
            and memory; those that wait hold no threads, which others need.
        probes: lets one health check at a time ask the store, which may hang.
        refusals: lets one refusal at a time be written into the audit log.
        idle: the connections on which nothing is being answered, the one that has been so for
            longest first.
        crowd: the same of the connections that are too many.
        shed: how many requests were refused so far because there was too much to do, by the kind
            of limit.
        draining: set once the replica is told to stop.
        forbidden: when a key, by its prefix, last tried what it may not do, by the endpoint.
    """

    settings: Settings
    backcast: Backcast
    engine: Engine
    keys: KeyRing
    usage: UsageMeter
    meter: Meter
    metrics: Metrics
    operator: Operator
    limits: Limits
    batches: Gate
    changes: Gate
    writing: Lock
    refreshes: CapacityLimiter
    plans: CapacityLimiter
    probes: CapacityLimiter
    scrapes: Scrapes
    refusals: CapacityLimiter
    shed: Counter[str]
    draining: threading.Event
    idle: OrderedDict[Transport, None] = field(default_factory=OrderedDict)
    crowd: OrderedDict[Transport, None] = field(default_factory=OrderedDict)
    forbidden: dict[tuple[str, str], float] = field(default_factory=dict)


@contextmanager
def open_state(settings: Settings) -> Iterator[State]:
    """Open everything and follow the registry until the block ends.

    Where what is live cannot be read yet, the service starts all the same, says so in the log
    and by ``/readyz``, and tries again.
    """
    with ExitStack() as stack:
        folder = settings.metrics_folder
        sheet = None if folder is None else stack.enter_context(claimed(folder))
        meter = Meter({} if sheet is None else sheet.taken_over().counts)

        def poller(name: str, task: Callable[[], object], seconds: float) -> Poller:
            return Poller(name, task, seconds, meter.failures_of(name))

        backcast = stack.enter_context(open_backcast(settings))
        engine = Engine(backcast.registry, backcast.artifacts, backcast.store, settings.device)
        timeout = settings.operation_timeout
        operator = stack.enter_context(Operator(backcast, engine, timeout, meter.ended))
        following = poller("following the registry", engine.refresh, settings.poll_seconds)
        following.attempt()
        _log_start(settings, engine)
        stack.enter_context(following)
        # On a thread of its own: dropping a large snapshot must not keep a replica behind.
        collector = Collector(backcast, Policy.of(settings))
        sweeping = poller("sweeping", collector.collect, settings.poll_seconds)
        stack.enter_context(sweeping)
        watching = poller("watching operations", operator.watch, beat_seconds(timeout))
        stack.enter_context(watching)
        usage = UsageMeter(backcast.registry.usage)
        counting = poller("writing usage", usage.flush, settings.usage_seconds)
        stack.callback(counting.attempt)  # what came after the last time, when all is answered
        stack.enter_context(counting)
        keys = KeyRing(
            backcast.registry.keys, settings.key_cache_seconds, settings.key_outage_seconds
        )
        stack.enter_context(poller("confirming keys", keys.refresh, keys.refresh_seconds))
        shed: Counter[str] = Counter()
        metrics = Metrics(meter, partial(read_gauges, engine, operator, meter), sheet, shed)
        writing = poller("writing metrics", metrics.write, WRITE_SECONDS)
        stack.callback(writing.attempt)  # the last requests too, for the workers that live on
        stack.enter_context(writing)
        yield State(
            settings,
            backcast,
            engine,
            keys,
            usage,
            meter,
            metrics,
            operator,
            limits=open_limits(settings, shed),
            batches=Gate(
                "batches",
                shed,
                at_once=settings.batches_at_once,
                waiting=settings.batches_waiting,
                share=0.5,
                seconds=settings.batch_seconds,
            ),
            changes=Gate("changes", shed, at_once=_CHANGES, waiting=settings.batches_waiting),
            writing=Lock(),
            refreshes=CapacityLimiter(1),
            plans=CapacityLimiter(1),
            probes=CapacityLimiter(1),
            scrapes=Scrapes(metrics.text),
            refusals=CapacityLimiter(1),
            shed=shed,
            draining=threading.Event(),
        )


def _log_start(settings: Settings, engine: Engine) -> None:
    served = engine.view.snapshot
    logger.info(
        "registry %s, store %s, reads %s, %s",
        database.shown_url(settings.registry_url),
        shown_url(settings.vector_store_url),
        settings.reads,
        f"version {served.live.version} live from {served.name}" if served else "nothing is live",
    )


def state_of(request: Request) -> State:
    """Return the state of the service that this request came to."""
    return cast("State", request.scope["state"]["service"])
