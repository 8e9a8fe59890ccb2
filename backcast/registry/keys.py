"""Consumers and their API keys. A secret is shown once and stored as a hash."""

import hashlib
import hmac
import secrets
from collections.abc import Collection
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update
from sqlalchemy.exc import IntegrityError

from backcast.errors import Conflict, InvalidInput, UnknownKey
from backcast.registry import tables
from backcast.registry.consumers import ANONYMOUS, demand_pinnable
from backcast.registry.database import Database, utc_now
from backcast.versions import Key, Scope

_MARK = "bc"
_PREFIX_BYTES, _SECRET_BYTES = 4, 32
_PREFIXES = 500  # asked for in one statement


def split_secret(secret: str) -> str | None:
    """Return the public prefix of a well-formed secret, else None."""
    mark, _, rest = secret.partition("_")
    prefix, _, random = rest.partition("_")
    sound = mark == _MARK and len(prefix) == 2 * _PREFIX_BYTES and bool(random)
    return prefix if sound else None


def matches(key: Key, secret: str) -> bool:
    """Compare in constant time. The secret has 256 random bits, so a plain hash is enough."""
    return hmac.compare_digest(_hash(secret), key.sha256)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class Keys:
    """Create, revoke, list and find keys."""

    def __init__(self, database: Database) -> None:
        self._db = database

    def create(
        self,
        consumer: str,
        scope: Scope,
        *,
        pin: int | None = None,
        expires_at: datetime | None = None,
    ) -> tuple[Key, str]:
        """Return a new key of ``consumer`` and its secret, which is not kept.

        A ``pin`` is the default version of the consumer, that is of all its keys. It is set with
        its first key: a later key never changes what the older ones are answered with.

        Raises:
            Conflict: the consumer exists and has another pin, or none.
            UnknownVersion, VersionRetired: the pin is no version, or none that is served.
            InvalidInput: the name cannot be one.
        """
        if not consumer.strip() or len(consumer) > 128:
            raise InvalidInput("A consumer's name has 1 to 128 characters.")
        if consumer.strip() == ANONYMOUS:
            raise InvalidInput(f"{ANONYMOUS} stands for callers without a key; name another one.")
        prefix = secrets.token_hex(_PREFIX_BYTES)
        secret = f"{_MARK}_{prefix}_{secrets.token_urlsafe(_SECRET_BYTES)}"
        with self._db.write() as connection:
            owner = _consumer(connection, consumer, pin)
            connection.execute(
                insert(tables.api_keys).values(
                    prefix=prefix,
                    sha256=_hash(secret),
                    consumer=owner,
                    scope=scope,
                    created_at=utc_now(),
                    expires_at=expires_at,
                )
            )
        key = self.find(prefix)
        assert key is not None
        return key, secret

    def find(self, prefix: str) -> Key | None:
        """Return the key with this prefix, in force or not."""
        with self._db.read() as connection:
            row = connection.execute(_select().where(tables.api_keys.c.prefix == prefix)).first()
        return None if row is None else _key(row)

    def find_many(self, prefixes: Collection[str]) -> dict[str, Key]:
        """Return those of the keys with these prefixes that there are, in force or not."""
        found: dict[str, Key] = {}
        wanted = list(prefixes)
        with self._db.read() as connection:
            for start in range(0, len(wanted), _PREFIXES):
                piece = tables.api_keys.c.prefix.in_(wanted[start : start + _PREFIXES])
                rows = connection.execute(_select().where(piece))
                found.update((row.prefix, _key(row)) for row in rows)
        return found

    def all(self) -> list[Key]:
        """Return every key, oldest first."""
        with self._db.read() as connection:
            rows = connection.execute(_select().order_by(tables.api_keys.c.created_at))
            return [_key(row) for row in rows]

    def revoke(self, prefix: str) -> None:
        """Revoke a key by its prefix; revoking twice changes nothing."""
        with self._db.write() as connection:
            found = connection.execute(_select().where(tables.api_keys.c.prefix == prefix)).first()
            if found is None:
                raise UnknownKey(prefix)
            connection.execute(
                update(tables.api_keys)
                .where(tables.api_keys.c.prefix == prefix)
                .where(tables.api_keys.c.revoked_at.is_(None))
                .values(revoked_at=utc_now())
            )


def _consumer(connection: Connection, name: str, pin: int | None) -> int:
    if pin is not None:
        demand_pinnable(connection, pin)
    row = connection.execute(
        select(tables.consumers).where(tables.consumers.c.name == name)
    ).first()
    if row is None:
        new = insert(tables.consumers).values(name=name, pin=pin, created_at=utc_now())
        try:
            with connection.begin_nested():
                made = connection.execute(new.returning(tables.consumers.c.id))
                return int(made.scalar_one())
        except IntegrityError:  # its first key elsewhere was made meanwhile
            return _consumer(connection, name, pin)
    if pin not in (None, row.pin):
        raise Conflict(
            f"Consumer {name!r} has {'no pin' if row.pin is None else f'the pin {row.pin}'}, and "
            f"its other keys would change their version with a pin of {pin}. "
            "Create the key without a pin, or for another consumer.",
            consumer=name,
            pin=row.pin,
        )
    return int(row.id)


def _select() -> Any:
    keys, consumers = tables.api_keys, tables.consumers
    return select(
        keys.c.prefix,
        keys.c.sha256,
        keys.c.scope,
        consumers.c.name.label("consumer"),
        consumers.c.pin,
        keys.c.created_at,
        keys.c.expires_at,
        keys.c.revoked_at,
    ).join(consumers, consumers.c.id == keys.c.consumer)


def _key(row: Row[Any]) -> Key:
    values = dict(row._mapping)
    return Key(**{**values, "scope": Scope(values["scope"])})
