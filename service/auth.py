"""Bearer keys: who is asking, and may they."""

import time

from anyio import to_thread

from backcast.errors import Forbidden, Unauthorized
from backcast.registry.database import utc_now
from backcast.registry.keys import Keys, matches, split_secret
from backcast.versions import Key, Scope


class KeyRing:
    """Finds the key of a secret, and trusts what it found for a few seconds.

    Unknown prefixes are not remembered, so that guessing fills no memory.
    """

    def __init__(self, keys: Keys, seconds: float) -> None:
        self._keys = keys
        self._seconds = seconds
        self._found: dict[str, tuple[Key, float]] = {}

    async def identify(self, secret: str) -> Key:
        """Return the key in force that ``secret`` belongs to; raise Unauthorized.

        Only who holds the secret learns that its key has expired or was revoked.
        """
        prefix = split_secret(secret)
        key = None if prefix is None else self._trusted(prefix) or await self._find(prefix)
        return _checked(key, secret)

    def recall(self, secret: str) -> Key | None:
        """Return the same without asking the database, None where it would have to be asked."""
        prefix = split_secret(secret)
        key = None if prefix is None else self._trusted(prefix)
        return None if key is None else _checked(key, secret)

    def _trusted(self, prefix: str) -> Key | None:
        key, seen_at = self._found.get(prefix, (None, 0.0))
        return key if time.monotonic() - seen_at < self._seconds else None

    async def _find(self, prefix: str) -> Key | None:
        # The database may take its time, and the event loop has others to serve.
        key = await to_thread.run_sync(self._keys.find, prefix)
        if key is not None:
            self._found[prefix] = (key, time.monotonic())
        return key


def _checked(key: Key | None, secret: str) -> Key:
    if key is None or not matches(key, secret):
        raise Unauthorized("This key is not known here.")
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
