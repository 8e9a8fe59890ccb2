"""Bearer keys: who is asking, and may they."""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio import CapacityLimiter, Semaphore, fail_after, to_thread

from backcast.errors import Forbidden, Overloaded, RegistryError, Unauthorized
from backcast.registry.database import utc_now
from backcast.registry.keys import Keys, matches, split_secret
from backcast.versions import Key, Scope

_PATIENCE_S = 1.0  # that an answer of the registry is waited for
_PAUSE_S = 1.0  # before the registry is asked again after it did not answer
_ASKING = 4  # lookups at once; a registry that hangs keeps their threads for longer
_STRANGERS = 2  # more of them, of keys that were never seen: there is no end of made-up ones


class _Turns:
    """Lets so many ask the registry at once: ``free`` before, and ``threads`` while it answers."""

    def __init__(self, most: int) -> None:
        self.free, self.threads = Semaphore(most), CapacityLimiter(most)


class KeyRing:
    """Finds the key of a secret, and trusts what it found for a few seconds.

    All keys seen are confirmed together by :meth:`refresh`, more often than that, so that requests
    hardly ever wait for the registry. While it is away, they are trusted for ``outage`` seconds;
    keys never seen cannot be told from wrong ones then. Unknown prefixes are not remembered, so
    that guessing fills no memory, and wait for each other only, so that it holds up nobody.
    """

    def __init__(self, keys: Keys, seconds: float, outage: float = 0.0) -> None:
        self._keys = keys
        self._seconds, self._outage = seconds, outage
        self._found: dict[str, tuple[Key, float]] = {}
        self._asked_at: float | None = None  # by ``refresh``, which waits for the answer
        self._failed_at: float | None = None  # last; None since the registry answered
        self._away_since = 0.0
        self._seen, self._unseen = _Turns(_ASKING), _Turns(_STRANGERS)

    @property
    def refresh_seconds(self) -> float:
        """How often :meth:`refresh` is to be called, so that no key in use grows stale."""
        return min(1.0, max(0.25, self._seconds / 4))

    async def identify(self, secret: str) -> Key:
        """Return the key in force that ``secret`` belongs to.

        Only who holds the secret learns that its key has expired or was revoked.

        Raises:
            Unauthorized: there is none.
            RegistryError: the key was never seen here, and the registry does not answer.
            Overloaded: nor did its turn to be asked come.
        """
        prefix = self._prefix_of(secret)
        known = self._trusted(prefix)
        if known is None:
            try:
                async with self._turn(prefix) as threads:  # others may have found it by now
                    known = self._trusted(prefix) or await self._ask(prefix, threads)
            except (RegistryError, Overloaded):
                known = self._trusted(prefix)
                if known is None:
                    raise
        return _checked(known, secret)

    async def confirm(self, secret: str) -> Key:
        """Return the same, always from the registry; raise RegistryError while it is away."""
        prefix = self._prefix_of(secret)
        async with self._turn(prefix) as threads:
            return _checked(await self._ask(prefix, threads), secret)

    def recall(self, secret: str) -> Key | None:
        """Return the same without asking the registry, None where it would have to be asked."""
        prefix = split_secret(secret)
        key = None if prefix is None else self._trusted(prefix)
        return None if key is None else _checked(key, secret)

    def refresh(self) -> None:
        """Ask the registry for all keys seen, in one query.

        Raises:
            RegistryError: it does not answer.
        """
        self._asked_at = asked_at = time.monotonic()
        try:
            found = self._keys.find_many(list(self._found))
        except RegistryError:
            self._note_failure()
            raise
        finally:
            self._asked_at = None
        self._failed_at = None
        for prefix, key in found.items():
            self._remember(prefix, key, asked_at)

    def _trusted(self, prefix: str) -> Key | None:
        key, seen_at = self._found.get(prefix, (None, 0.0))
        if key is None:
            return None
        now = time.monotonic()
        fresh = now - seen_at < self._seconds
        return key if fresh or self._excused(now) else None

    def _excused(self, now: float) -> bool:
        """Return whether the registry is away, and not for too long."""
        hanging = self._asked_at is not None and now - self._asked_at > _PATIENCE_S
        if hanging and self._failed_at is None:
            self._note_failure()
        return self._failed_at is not None and now - self._away_since < self._outage

    def _prefix_of(self, secret: str) -> str:
        """Return the prefix; raise Unauthorized where the registry need not be asked for that."""
        prefix = split_secret(secret)
        if prefix is None:
            raise Unauthorized(_UNKNOWN)
        key, _ = self._found.get(prefix, (None, 0.0))
        if key is not None and not matches(key, secret):  # a prefix is public, and has one secret
            raise Unauthorized(_UNKNOWN)
        return prefix

    @asynccontextmanager
    async def _turn(self, prefix: str) -> AsyncIterator[CapacityLimiter]:
        """Wait for a turn to ask, and yield what limits the threads; raise Overloaded."""
        turns = self._seen if prefix in self._found else self._unseen
        try:
            with fail_after(_PATIENCE_S):
                await turns.free.acquire()
        except TimeoutError as error:  # which says nothing about the registry
            raise Overloaded("Too many keys are being looked up here; try again.") from error
        try:
            yield turns.threads
        finally:
            turns.free.release()

    async def _ask(self, prefix: str, threads: CapacityLimiter) -> Key | None:
        asked_at, failed_at = time.monotonic(), self._failed_at
        if failed_at is not None and asked_at - failed_at < _PAUSE_S:
            raise RegistryError("The registry does not answer, a moment ago at least; try again.")
        try:
            with fail_after(_PATIENCE_S):
                # The database may take its time, and the event loop has others to serve.
                key = await to_thread.run_sync(
                    self._keys.find, prefix, limiter=threads, abandon_on_cancel=True
                )
        except TimeoutError as error:
            self._note_failure()
            raise RegistryError(
                f"The registry does not answer within {_PATIENCE_S:g} s."
            ) from error
        except RegistryError:
            self._note_failure()
            raise
        self._failed_at = None
        if key is not None:
            self._remember(prefix, key, asked_at)
        return key

    def _remember(self, prefix: str, key: Key, asked_at: float) -> None:
        _, seen_at = self._found.get(prefix, (None, asked_at))
        if asked_at >= seen_at:
            self._found[prefix] = (key, asked_at)

    def _note_failure(self) -> None:
        now = time.monotonic()
        if self._failed_at is None:
            self._away_since = now
        self._failed_at = now


_UNKNOWN = "This key is not known here."


def _checked(key: Key | None, secret: str) -> Key:
    if key is None or not matches(key, secret):
        raise Unauthorized(_UNKNOWN)
    if key.revoked_at is not None:
        raise Unauthorized(f"The key {key.prefix} was revoked; ask for a new one.")
    if not key.in_force(utc_now()):
        raise Unauthorized(f"The key {key.prefix} has expired; ask for a new one.")
    return key


def bearer_secret(authorization: str | None) -> str | None:
    """Return the secret in an Authorization header, None without one; raise Unauthorized."""
    if authorization is None:
        return None
    scheme, _, secret = authorization.strip().partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        raise Unauthorized("The Authorization header must be `Bearer <key>`.")
    return secret.strip()


def demand(key: Key | None, scope: Scope) -> Key:
    """Return ``key`` if it covers ``scope``; raise Unauthorized without one, else Forbidden."""
    if key is None:
        raise Unauthorized("This needs a key: send `Authorization: Bearer <key>`.")
    if not key.scope.covers(scope):
        raise Forbidden(scope)
    return key
