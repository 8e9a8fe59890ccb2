"""How much each consumer may ask for in a second, counted by all workers together in Redis.

A worker takes what a consumer may ask for in a tenth of a second at once, and spends that without
asking again: few requests wait for Redis. What it has not spent after the limit's window is void.
In T seconds a consumer is therefore given at most its rate times T and one window more, and what
each worker held when they began: a tenth of a second's worth.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from anyio import CapacityLimiter, Lock, fail_after, to_thread
from limits import RateLimitItem, RateLimitItemPerSecond
from limits.errors import ConfigurationError, StorageError
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from redis import ConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.retry import Retry

from backcast.errors import ConfigError, RateLimited
from backcast.registry.consumers import ANONYMOUS
from backcast.settings import Settings
from backcast.versions import Key

logger = logging.getLogger(__name__)

REQUESTS, VECTORS = "requests", "vectors"
_PATIENCE_S = 0.25  # that an answer of Redis is waited for
_OUTAGE_S = 1.0  # before Redis is asked again after it did not answer
_PAUSE_S = 0.1  # before anybody asks again for a consumer that had nothing left
_ASKING = 8  # at once; a Redis that hangs keeps their threads for longer


@dataclass(frozen=True)
class Rate:
    """So many of ``unit`` in a window of some seconds."""

    unit: str
    amount: int
    seconds: int

    @property
    def lease(self) -> int:
        """What a worker takes at once."""
        return max(1, self.amount // self.seconds // 10)

    @property
    def item(self) -> RateLimitItem:
        """The same in the library's words."""
        return RateLimitItemPerSecond(self.amount, self.seconds, namespace=self.unit)


def rates_of(settings: Settings) -> list[Rate]:
    """Return the rates that are limited.

    The window of vectors is as long as the largest batch needs, so that it can be had at all.
    """
    rates = []
    if settings.requests_per_second:
        rates.append(Rate(REQUESTS, settings.requests_per_second, 1))
    if a_second := settings.vectors_per_second:
        seconds = math.ceil(settings.max_batch / a_second)
        rates.append(Rate(VECTORS, a_second * seconds, seconds))
    return rates


class Counts:
    """What consumers were given: counted in Redis, and by this process alone while that is away."""

    def __init__(self, url: str) -> None:
        self._alone = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._shared = SlidingWindowCounterRateLimiter(_open_redis(url)) if url else None
        self._asking = CapacityLimiter(_ASKING)
        self._ask_from = 0.0
        self._away = False

    async def take(self, rate: Rate, consumer: str, cost: int) -> bool:
        """Return whether the consumer may have ``cost`` more now; if so, it is counted."""
        if self._shared is None or time.monotonic() < self._ask_from:
            return self._alone.hit(rate.item, consumer, cost=cost)
        hit = partial(self._shared.hit, rate.item, consumer, cost=cost)
        try:
            with fail_after(_PATIENCE_S):
                given = await to_thread.run_sync(hit, limiter=self._asking, abandon_on_cancel=True)
        except (TimeoutError, StorageError) as error:
            self._note_absence(error)
            return self._alone.hit(rate.item, consumer, cost=cost)
        if self._away:
            logger.info("limits are counted in Redis again")
        self._away = False
        return given

    def _note_absence(self, error: Exception) -> None:
        self._ask_from = time.monotonic() + _OUTAGE_S
        if not self._away:
            logger.warning("limits are counted by each worker alone, without Redis: %r", error)
        self._away = True


@dataclass
class _Purse:
    """What this worker may still give a consumer; void after ``until``."""

    rate: Rate
    left: int = 0
    until: float = 0.0
    empty_until: float = 0.0
    asking: Lock = field(default_factory=Lock)

    def holds(self, cost: int, now: float) -> bool:
        return self.left >= cost and now < self.until

    def fill(self, more: int, now: float) -> None:
        self.left = more + (self.left if now < self.until else 0)
        self.until = now + self.rate.seconds


class Limits:
    """Lets consumers ask for as much as their rates allow; on the event loop only.

    Attributes:
        on: whether anything is limited at all.
    """

    def __init__(self, rates: Sequence[Rate], counts: Counts, shed: Counter[str]) -> None:
        self.on = bool(rates)
        self._rates = {rate.unit: rate for rate in rates}
        self._counts, self._shed = counts, shed
        self._purses: dict[str, dict[str, _Purse]] = {}

    def pay_at_once(self, caller: Key | None) -> bool:
        """Pay for one request of one vector; return False where others must be asked first.

        Raises:
            RateLimited: they were asked a moment ago.
        """
        now, consumer = time.monotonic(), _consumer(caller)
        purses = self._purses.get(consumer)
        if purses is None:
            return False
        for purse in purses.values():
            if not purse.holds(1, now):
                if now < purse.empty_until:
                    raise self._refusal(purse.rate, consumer, 1)
                return False
        for purse in purses.values():
            purse.left -= 1
        return True

    async def pay(self, caller: Key | None, unit: str, cost: int = 1) -> None:
        """Pay for ``cost`` units, where they are limited.

        Raises:
            RateLimited: the consumer may not have so many now.
        """
        if unit not in self._rates or not cost:
            return
        consumer = _consumer(caller)
        purse = self._purses_of(consumer)[unit]
        async with purse.asking:  # those who wait live on what the first of them is given
            if not purse.holds(cost, time.monotonic()):
                await self._fill(purse, consumer, cost)
            purse.left -= cost

    async def _fill(self, purse: _Purse, consumer: str, cost: int) -> None:
        now, rate = time.monotonic(), purse.rate
        if now < purse.empty_until:
            raise self._refusal(rate, consumer, cost)
        for amount in sorted({max(cost, rate.lease), cost}, reverse=True):
            if await self._counts.take(rate, consumer, amount):
                purse.fill(amount, time.monotonic())
                return
        if cost <= rate.lease:  # there may still be something for those who want less than a batch
            purse.empty_until = time.monotonic() + _PAUSE_S
        raise self._refusal(rate, consumer, cost)

    def _purses_of(self, consumer: str) -> dict[str, _Purse]:
        if consumer not in self._purses:
            purses = {unit: _Purse(rate) for unit, rate in self._rates.items()}
            self._purses[consumer] = purses
        return self._purses[consumer]

    def _refusal(self, rate: Rate, consumer: str, cost: int) -> RateLimited:
        self._shed[f"rate of {rate.unit}"] += 1
        after = max(1, math.ceil(cost * rate.seconds / rate.amount))
        return RateLimited(consumer, rate.unit, rate.amount, rate.seconds, after)


def open_limits(settings: Settings, shed: Counter[str]) -> Limits:
    """Return what ``settings`` limit; raise ConfigError for a Redis that cannot be one."""
    rates = rates_of(settings)
    return Limits(rates, Counts(settings.shared_limits_url if rates else ""), shed)


def _consumer(caller: Key | None) -> str:
    return ANONYMOUS if caller is None else caller.consumer


def _open_redis(url: str) -> RedisStorage:
    """Return a storage that has not connected yet."""
    try:
        pool = ConnectionPool.from_url(
            url,
            socket_timeout=_PATIENCE_S,
            socket_connect_timeout=_PATIENCE_S,
            # An idle connection may have been closed; a server that hangs is not asked twice.
            retry=Retry(NoBackoff(), 1, (RedisConnectionError,)),
        )
        return RedisStorage(
            url, connection_pool=pool, key_prefix="backcast-limits", wrap_exceptions=True
        )
    except (ValueError, TypeError, ConfigurationError, RedisError):
        raise ConfigError(
            "BACKCAST_LIMITS_URL: the form is redis[s]://[user:password@]host:port/number?options, "
            "special characters of a password percent-encoded."
        ) from None
